"""The page of study/interpret.py is made from its records, and docs/interpret.md says what stands there."""

import json
import re

import pytest

from helpers import ROOT
from study import interpret


def records():
    return interpret.STUDY.read()


def test_the_page_is_made_from_the_records():
    assert interpret.table(records()) == (interpret.STUDY.folder / 'table.md').read_text(encoding='utf-8')


def test_every_job_has_its_record_and_every_figure_its_file():
    assert records().keys() == interpret.JOBS.keys()
    assert all((interpret.STUDY.folder / f'{name}.png').exists() for name in interpret.FIGURES.values())


def test_the_numbers_of_the_essay_are_those_of_the_records():
    """Losses have four digits behind the point there, shares one and a %."""
    page = (interpret.STUDY.folder / 'table.md').read_text(encoding='utf-8')
    essay = (ROOT / 'docs' / 'interpret.md').read_text(encoding='utf-8')
    losses, shares = re.findall(r'\b[1-5]\.\d{4}\b', essay), re.findall(r'\b\d+\.\d %', essay)
    assert len(losses) > 8 and len(shares) > 8
    assert not [number for number in (*losses, *shares) if number not in page]


def test_cuts_on_another_machine_or_of_another_model_are_in_no_table():
    name = next(name for name in interpret.JOBS if 'cut' in name)
    run = records()[name]
    with pytest.raises(ValueError, match='times on different machines do not compare'):
        interpret.table({**records(), name: {**run, 'device': 'an abacus'}})
    costs = {**run['costs'], 'as trained': {**run['costs']['as trained'], 'loss': 1.5}}
    with pytest.raises(ValueError, match='was cut from another model than the jobs before'):
        interpret.table({**records(), name: {**run, 'costs': costs}})


def test_a_model_of_other_settings_is_not_looked_into(monkeypatch, tmp_path):
    monkeypatch.setattr(interpret.STUDY, 'work', tmp_path)
    folder = tmp_path / 'models' / 'nano_kan'
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text(json.dumps({'config': {'n_layer': 99}, 'finished': '2030'}))
    with pytest.raises(ValueError, match='holds a run with n_layer=99'):
        interpret.trained('nano_kan')


def test_a_model_without_records_is_left_out():
    assert interpret.table({}) == ''
    one = {'nano_kan': records()['nano_kan']}
    assert '`nano_kan_mlp`' not in interpret.table(one) and 'pruned' not in interpret.table(one)
