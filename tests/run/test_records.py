"""run.json and log.jsonl."""

import os
import subprocess

import pytest

from run import records


def test_record_comes_back(tmp_path):
    assert records.read_record(tmp_path) == {}
    records.write_record(tmp_path, {'seed': 1, 'splits': None})
    assert records.read_record(tmp_path) == {'seed': 1, 'splits': None}


def test_log_survives_a_line_cut_off(tmp_path):
    lines = [{'iter': 0, 'val_loss': 4.2}, {'iter': 2, 'val_loss': 4.0}]
    records.write_log(tmp_path, lines)
    assert records.read_log(tmp_path) == lines
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"iter": 4, "val_')
    assert records.read_log(tmp_path) == lines
    assert records.read_log(tmp_path / 'nowhere') == []


@pytest.mark.parametrize('name, read', [('run.json', records.read_record), ('log.jsonl', records.read_log)])
def test_damage_is_named(tmp_path, name, read):
    for damaged in '{"iter": \n', '[' * 200_000 + '\n':
        (tmp_path / name).write_text(damaged)
        with pytest.raises(ValueError, match=f'{tmp_path}/{name} is damaged'):
            read(tmp_path)


@pytest.mark.parametrize('name, read', [('run.json', records.read_record), ('log.jsonl', records.read_log)])
def test_json_of_another_kind_is_named(tmp_path, name, read):
    (tmp_path / name).write_text('[1]\n')
    with pytest.raises(
        ValueError, match=f'{tmp_path}/{name} (holds a list, expected a dict|is damaged .expected a dict)'
    ):
        read(tmp_path)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_number_that_json_does_not_have_is_refused(tmp_path, value):
    """And the files stay as they were."""
    records.write_record(tmp_path, {'final': {'loss': 1.0}})
    records.write_log(tmp_path, [{'loss': 1.0}])
    with pytest.raises(ValueError, match='JSON compliant'):
        records.write_record(tmp_path, {'final': {'loss': value}})
    with pytest.raises(ValueError, match='JSON compliant'):
        records.write_log(tmp_path, [{'loss': 1.0}, {'loss': value}])
    assert records.read_record(tmp_path) == {'final': {'loss': 1.0}} and records.read_log(tmp_path) == [{'loss': 1.0}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['log.jsonl', 'run.json']


def test_a_commit_says_whether_its_code_was_changed(tmp_path, monkeypatch):
    """Other results are no change."""

    def git(*words):
        command = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    monkeypatch.setenv('GIT_CONFIG_GLOBAL', os.devnull)  # where hooks and signatures may be asked for
    monkeypatch.setenv('GIT_CONFIG_NOSYSTEM', '1')
    monkeypatch.setattr(records, 'ROOT', str(tmp_path))
    assert records.commit() is None
    (tmp_path / 'results').mkdir()
    for name in 'code.py', 'results/table.md':
        (tmp_path / name).write_text('a')
    git('init'), git('add', '.'), git('commit', '-m', 'a')
    head = git('rev-parse', 'HEAD')
    (tmp_path / 'results/table.md').write_text('b')
    assert records.commit() == head
    (tmp_path / 'code.py').write_text('b')
    assert records.commit() == f'{head}+'
