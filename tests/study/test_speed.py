"""The study of speed: its page from made-up records, and one real measurement."""

import json

import pytest

from configurator import flags_of, settings_of
from helpers import complaint
from study import speed
from study.runner import Study, add_run

ROW = dict(dtype='float32', where='1 2 3', peak_bytes=3 * 2**20, operators=[])
RUN = dict(rounds=2, repeats=1, commit='abc')


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, 'STUDY', Study('speed', tmp_path))
    return speed.STUDY


def test_page_is_made_of_all_records(study, capsys):
    times = {'a': [0.1, 0.2, 0.3], 'b': [0.4, 0.4, 0.4]}
    rows = [dict(ROW, name=name, seconds={'total': seconds}) for name, seconds in times.items()]
    rows += [
        dict(ROW, name='c', seconds={}, error='no memory'),
        dict(ROW, where='4', name='d', seconds=dict(total=[1.0])),
        dict(ROW, where='5', name='f', seconds={}, error='no memory'),
        dict(ROW, where='5', name='g', seconds=dict(total=[1.0])),
    ]
    edges = dict(ROW, name='e', seconds={'edges': [0.01], 'rest': [0.19], 'total': [0.2]})
    add_run(str(study.folder / 'runs.jsonl'), dict(RUN, name='layer on an abacus', rows=rows))
    add_run(str(study.folder / 'runs.jsonl'), dict(RUN, name='graph edges on an abacus', rows=[edges]))
    speed.make_page()
    page = (study.folder / 'table.md').read_text()
    assert capsys.readouterr().out == page and page.index('### graph edges') < page.index('### layer')
    assert page.count('an abacus; 2 round(s) of 1, commit abc') == 2
    assert '| 1 2 3, float32: a | 200 (140 to 260) | 1 | 3 MiB |' in page
    assert '| 1 2 3, float32: b | 400 (400 to 400) | 2 | 3 MiB |' in page  # of the first of its group
    assert '| 1 2 3, float32: c | failed: no memory |  |  |' in page
    assert '| 5, float32: g | 1000 (1000 to 1000) |  | 3 MiB |' in page  # the first of its group failed
    assert '| 4, float32: d | 1000 (1000 to 1000) | 1 | 3 MiB |' in page
    assert '| 1 2 3, float32: e | 200 (200 to 200), 5.00% finds edges | 1 | 3 MiB |' in page


def test_a_job_is_a_run_of_bench(study, forks):
    one = dict(suite='layer', only='float32 96 384 2048 nn.Linear$', rounds=1, repeats=2)
    study.run_all({'tiny': one}, speed.make)
    (record,) = study.read().values()
    (row,) = record['rows']
    assert record['name'] == 'tiny' and record['rounds'] == 1 and row['name'] == 'nn.Linear' and 'commit' in record
    assert len(row['seconds']['total']) == 2 and row['peak_bytes'] > 1e6
    assert json.loads((study.folder / 'runs.jsonl').read_text()) == record
    study.run_all({'tiny': one}, None)  # what has a record is not measured again


def test_a_job_that_fails_ends_the_study(study, forks):
    with pytest.raises(ValueError, match='bench.py --suite=layer --only=cubic .* failed, see above'):
        study.run_all({'tiny': dict(suite='layer', only='cubic')}, speed.make)
    assert study.read() == {}


def test_jobs_are_settings_of_bench():
    for settings in speed.JOBS.values():
        settings_of('study/bench.py', flags_of(settings))


def test_unknown_jobs_are_named(tmp_path):
    assert 'jobs: expected any of layer, activation, step, step without' in complaint(
        tmp_path, 'study/speed.py', '--jobs=layers'
    )


def test_page_of_the_repository_is_made_of_its_records(tmp_path, monkeypatch):
    records = speed.STUDY.read()
    assert records
    written = Study('speed', tmp_path)
    for run in records.values():
        add_run(str(written.folder / 'runs.jsonl'), run)
    monkeypatch.setattr(speed, 'STUDY', written)
    committed = Study('speed').folder / 'table.md'
    speed.make_page()
    assert (written.folder / 'table.md').read_text() == committed.read_text()
