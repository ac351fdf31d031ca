"""The study of results/finetune: what it would run, and its page from made-up records."""

import json
import random

import pytest

from configurator import flags_of, settings_of
from helpers import ROOT, complaint, keep_figures
from study import finetune
from study.runner import Study, read_runs


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study/finetune.py with its records in a folder of the test."""
    monkeypatch.setattr(finetune, 'STUDY', Study('finetune', tmp_path))
    return finetune


def make_record(name, settings):
    """A record as a run would leave it, its numbers drawn by its name."""
    draw = random.Random(name)
    task, dev = settings['task'], {'accuracy': draw.random()}
    if task == 'sonnets':
        dev = {key: draw.uniform(20, 50) for key in ('chrf', 'chrf_continuation')}
    log = [dict(epoch=i, iter=20 * i, seconds=10.0 * i, loss=draw.random(), train_loss=draw.random()) for i in (1, 2)]
    record = dict(task=task, settings=settings, dev=dev, valid=min(log, key=lambda line: line['loss']), log=log)
    return dict(record, trained=1000, seconds=10.0, steps=20, peak_memory=5e8, base={'name': 'out-taskmix'})


def make_records(study, *stages):
    study.STUDY.folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        runs = {name: make_record(name, settings) for name, settings in study.list_runs(stage).items()}
        with open(study.STUDY.folder / 'runs.jsonl', 'a') as f:
            f.writelines(json.dumps({'name': name, **run}) + '\n' for name, run in runs.items())


def test_every_run_is_one_of_finetune_and_has_a_record_of_its_own(study):
    make_records(study, 'search')
    path, names, folders = study.STUDY.folder / 'runs.jsonl', [], []
    searched = path.read_text()

    def make(name, settings, folder):
        settings_of('finetune.py', flags_of(settings))
        folders.append(folder)
        return {}

    for stage in ('search', 'final', 'rank', 'single', 'rates', 'time'):
        runs = study.list_runs(stage)
        path.unlink()
        study.STUDY.run_all(runs, make)
        assert list(study.STUDY.read()) == sorted(runs)
        path.write_text(searched)
        names += runs
    assert len(set(folders)) == len(names)
    assert all(' ' not in folder.name and folder.parent == study.STUDY.work for folder in folders)
    assert len(set(names)) == len(names) == 8 * 3 + 8 * 4 * 3 + 9 * 3 + 2 * 3 + 8 * 2 * 3 + 8


def test_the_rate_of_a_method_is_the_one_with_the_lowest_loss_on_what_was_held_out(study):
    make_records(study, 'search')
    rates = {lr: study.record_of('search', f'LoRA, lr={lr:g}')['valid']['loss'] for lr in study.METHODS['LoRA'][1]}
    assert study.best_rate('LoRA') == min(rates, key=rates.get)


def test_runs_on_cfimdb_are_those_at_the_rate_with_the_lowest_loss(study):
    make_records(study, 'search')
    make_records(study, 'final', 'rates')
    found = {lr: study.read_cfimdb('KAN', lr) for lr in study.METHODS['KAN'][1]}
    losses = {lr: sum(record['valid']['loss'] for record in records) for lr, records in found.items()}
    assert len(set(losses.values())) == 3 and study.rate_of('KAN', 'cfimdb') == min(losses, key=losses.get)
    assert study.rate_of('KAN', 'quora') == study.best_rate('KAN')


def test_times_of_another_machine_are_in_no_table(study):
    make_records(study, 'search')
    make_records(study, 'final', 'rates', 'time')
    path = study.STUDY.folder / 'runs.jsonl'
    path.write_text(path.read_text().replace('"name": "time, KAN"', '"name": "time, KAN", "device": "a Xeon"'))
    with pytest.raises(ValueError, match="'time, full' is of an unnamed one, 'time, KAN' of a Xeon"):
        study.make_main_table()


def test_page_is_made_of_all_records(study):
    make_records(study, 'search')
    make_records(study, 'final', 'rank', 'single', 'rates', 'time')
    values = [100 * study.record_of('final', f'KAN, sst, seed={seed}')['dev']['accuracy'] for seed in (1, 2, 3)]
    row = next(line for line in study.make_main_table() if line.startswith('| KAN |'))
    assert f'| {sum(values) / 3:.1f} ± ' in row and row.count('(p = ') == 4 and '| 500 | 500 MB |  |' in row
    assert '(p = ' not in next(line for line in study.make_main_table() if line.startswith('| LoRA |'))
    assert len({line.count('|') for line in study.make_main_table()}) == 1
    assert len(study.make_rank_table()) == 5 and len(study.make_single_table()) == 6
    assert [line.count('**') for line in study.make_rates_table()] == [0, 0] + [2] * 8
    study.draw_curves()
    assert (study.STUDY.folder / 'curves.png').stat().st_size > 10_000


def test_page_of_results_is_that_of_its_records(study):
    study.STUDY.folder.mkdir(parents=True)
    (study.STUDY.folder / 'runs.jsonl').write_bytes((ROOT / 'results/finetune/runs.jsonl').read_bytes())
    tables = (study.make_main_table(), study.make_rank_table(), study.make_single_table(), study.make_rates_table())
    table = '\n\n'.join('\n'.join(lines) for lines in tables) + '\n'
    assert table == (ROOT / 'results/finetune/table.md').read_text()


def test_records_of_results_are_those_of_the_study():
    records = read_runs(ROOT / 'results/finetune/runs.jsonl')
    runs = {}
    for stage in ('search', 'final', 'rank', 'single', 'rates', 'time'):
        runs.update(finetune.list_runs(stage))
    finetune.check_records(runs)
    assert records.keys() == runs.keys()


def test_a_missing_record_is_named(study):
    make_records(study, 'search')
    with pytest.raises(FileNotFoundError, match='final, full, sst, seed=1 is missing: the stage final is not finished'):
        study.read_finals('full', 'sst')


def test_a_record_of_other_settings_or_of_another_model_is_refused(study, monkeypatch):
    make_records(study, 'search')
    runs = study.list_runs('search')
    study.check_records(runs)
    name, settings = next(iter(runs.items()))
    with pytest.raises(ValueError, match='was made with .* the study has .*: move it away'):
        study.check_records({name: {**settings, 'epochs': 9}})
    monkeypatch.setattr(study, 'init_from', 'gpt2')
    with pytest.raises(ValueError, match='began with out-taskmix, the study begins with gpt2: move it away'):
        study.check_records(runs)


def test_a_stage_that_is_not_there(tmp_path):
    message = "error: stages: expected any of search, final, rank, single, rates, time, got 'search,all'\n"
    assert complaint(tmp_path, 'study/finetune.py', '--stages=search,all') == message


def test_curves_are_those_of_train_and_of_what_was_held_out(study, monkeypatch):
    make_records(study, 'search')
    make_records(study, 'final', 'rates')
    figures = keep_figures(monkeypatch)
    study.draw_curves()
    lines = {line.get_label(): line.get_ydata() for line in figures[0].axes[0].lines}
    runs = study.read_finals('LoRA', 'sst')
    for name, key in ('train', 'train_loss'), ('held out', 'loss'):
        expected = [sum(run['log'][i][key] for run in runs) / len(runs) for i in (0, 1)]
        assert lines[f'LoRA, {name}'] == pytest.approx(expected)


def test_a_record_is_that_of_its_run(study, monkeypatch, tmp_path):
    def run_to_end(script, args, folder):
        asked.extend(args)
        about = dict(log=[], device='x', versions={}, commit='c', model_args=dict(n_layer=1), config={})
        return dict(about, final=dict(task='sst', dev=dict(accuracy=0.5)))

    asked, settings = [], study.tune('sst', 'LoRA', 1e-3, seed=3)
    monkeypatch.setattr(study, 'run_to_end', run_to_end)
    record = study.make('search, LoRA, lr=0.001', settings, tmp_path)
    assert {*flags_of(settings), '--init_from=out-taskmix'} <= {*asked}
    assert record['settings'] == settings and record['dev'] == dict(accuracy=0.5) and record['stage'] == 'search'
    assert record['base']['name'] == 'out-taskmix'
