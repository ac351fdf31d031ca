"""The study of results/finetune: what it would run, and its page from made-up records."""

import importlib.util
import json
import random
import sys

import pytest

from configurator import settings_of
from helpers import ROOT


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study.py as a module whose records lie in a folder of the test."""
    monkeypatch.setattr(sys, 'argv', ['study.py'])
    spec = importlib.util.spec_from_file_location('finetune_study', ROOT / 'study/finetune.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'HERE', tmp_path)
    (tmp_path / 'runs').mkdir()
    return module


def make_record(study, stage, name, task, settings):
    """A record as a run would leave it, its numbers drawn by its name."""
    draw = random.Random(f'{stage} {name}')
    dev = (
        {key: draw.uniform(20, 50) for key in ('chrf', 'chrf_continuation')}
        if task == 'sonnets'
        else {'accuracy': draw.random()}
    )
    log = [dict(epoch=i, iter=20 * i, seconds=10.0 * i, loss=draw.random(), train_loss=draw.random()) for i in (1, 2)]
    record = dict(task=task, settings=settings, dev=dev, valid=min(log, key=lambda line: line['loss']), log=log)
    record.update(trained=1000, seconds=10.0, steps=20, peak_memory=5e8, base={'name': 'out-taskmix'})
    study.path_of(stage, name).write_text(json.dumps(record))
    return record


def make_records(study, *stages):
    for stage in stages:
        for one in study.list_runs(stage):
            make_record(study, *one)


def make_edges_record(study):
    """A record as bench.py --suite=graph prints it."""
    seconds = {'edges': [0.002, 0.001, 0.009], 'rest': [0.038, 0.039, 0.031], 'total': [0.04, 0.04, 0.04]}
    rows = [
        dict(where=size, name=f'{edges} edges', seconds=seconds)
        for size in ('micro', 'nano')
        for edges in ('no', 'topk')
    ]
    study.path_of('graph', 'edges').write_text(json.dumps({'rows': rows}))


def test_every_run_is_one_of_finetune_and_has_a_record_of_its_own(study):
    make_records(study, 'search')
    paths = set()
    runs = [one for stage in ('search', 'final', 'rank', 'single', 'rates', 'time') for one in study.list_runs(stage)]
    for stage, name, task, settings in runs:
        settings_of('finetune.py', [f'--task={task}', *(f'--{key}={value}' for key, value in settings.items())])
        paths.add(study.path_of(stage, name))
    assert len(paths) == len(runs) == 8 * 3 + 8 * 4 * 3 + 9 * 3 + 2 * 3 + 8 * 2 * 3 + 8
    assert all(' ' not in path.name and path.parent.name == 'runs' for path in paths)


def test_the_rate_of_a_variant_is_the_one_with_the_lowest_loss_on_what_was_held_out(study):
    make_records(study, 'search')
    rates = {lr: study.read_record('search', f'LoRA, lr={lr:g}')['valid']['loss'] for lr in study.VARIANTS['LoRA'][1]}
    assert study.best_rate('LoRA') == min(rates, key=rates.get)


def test_runs_on_cfimdb_are_those_at_the_rate_with_the_lowest_loss(study):
    make_records(study, 'search')
    make_records(study, 'final', 'rates')
    losses = {
        lr: sum(record['valid']['loss'] for record in study.read_cfimdb('KAN', lr)) for lr in study.VARIANTS['KAN'][1]
    }
    assert len(set(losses.values())) == 3 and study.rate_of('KAN', 'cfimdb') == min(losses, key=losses.get)
    assert study.rate_of('KAN', 'quora') == study.best_rate('KAN')


def test_page_is_made_of_all_records(study):
    make_records(study, 'search')
    make_records(study, 'final', 'rank', 'single', 'rates', 'time')
    values = [100 * study.read_record('final', f'KAN, sst, seed={seed}')['dev']['accuracy'] for seed in (1, 2, 3)]
    row = next(line for line in study.make_main_table() if line.startswith('| KAN |'))
    assert f'| {sum(values) / 3:.1f} ± ' in row and row.count('(p = ') == 4 and '| 500 | 500 MB |  |' in row
    assert '(p = ' not in next(line for line in study.make_main_table() if line.startswith('| LoRA |'))
    assert len({line.count('|') for line in study.make_main_table()}) == 1
    assert len(study.make_rank_table()) == 5 and len(study.make_single_table()) == 6
    assert [line.count('**') for line in study.make_rates_table()] == [0, 0] + [2] * 8
    make_edges_record(study)
    study.measure_edges()  # does nothing where there is a record
    assert study.make_edges_table()[-1] == '| topk | 5.00% of 40 ms | 5.00% of 40 ms |'
    study.draw_curves()
    assert (study.HERE / 'curves.png').stat().st_size > 10_000


def test_a_missing_record_is_named(study):
    make_records(study, 'search')
    with pytest.raises(
        FileNotFoundError, match=r'final,full,sst,seed=1\.json is missing: the stage final is not finished'
    ):
        study.read_finals('full', 'sst')


def test_a_record_of_other_settings_or_of_another_model_is_refused(study):
    make_records(study, 'search')
    one = study.list_runs('search')[0]
    study.check_record(*one)
    with pytest.raises(ValueError, match='was made with .* the study has .*: move it away'):
        study.check_record(*one[:3], {**one[3], 'epochs': 9})
    study.init_from = 'gpt2'
    with pytest.raises(ValueError, match='began with out-taskmix, the study begins with gpt2: move it away'):
        study.check_record(*one)
