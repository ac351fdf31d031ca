"""The comparison of MLPs: equal parameters, the same trials for all, and a page that is made from the records."""

import functools

import numpy as np
import pytest
import torch

from configurator import settings_of
from inside.shapes import Shapes
from model import model_settings
from run.cost import count_parameters
from study import win, win_page
from study.runner import Study

CURVE = [[-1.0, 1.0], [0.5, 0.5], [-0.3, 0.7]]
SHAPES = {
    'h.0.mlp.act': dict(
        channels=4, flat=1, turns=[1, 1, 1, 1], turns_before=[4, 0, 0, 0], change=0.5, curves=[CURVE, CURVE]
    )
}
EVERYONE = {**win.FAMILIES, **win.CONTROLS, **win.ABLATION}


@pytest.mark.parametrize('size', win.SIZES)
def test_all_families_have_as_many_parameters(size):
    base, counts = settings_of('train.py', [win.CONFIG]), {}
    for family, about in EVERYONE.items():
        settings = {**base, **win.settings_for(about, size)}
        width = settings['kan_hidden' if family == 'edge KAN' else 'mlp_hidden'] * settings['n_embd']
        assert width / 8 == pytest.approx(round(width / 8)) or family == 'edge KAN'
        counts[family] = count_parameters(dict(model_settings(settings), vocab_size=65))
    for family, count in counts.items():
        assert count == pytest.approx(counts['GELU'], rel=0.01), family


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose runs take no time: the loss is lowest at 4e-3 and 0.16, and KAN-GLU is ahead, by steps that take a
    quarter longer.
    """
    for module in win, win_page:
        monkeypatch.setattr(module, 'STUDY', Study('win', tmp_path))

    def make(name, job, folder):
        about, flags = job
        if about['stage'] == 'steps':
            seconds = {family: 1.25 if family == 'KAN-GLU' else 1.0 for family in ('SwiGLU', *win.MAIN)}
            rows = [dict(name=key, seconds=dict(total=[one]), peak_bytes=1) for key, one in seconds.items()]
            return dict(about, rows=rows)
        rate, std = flags['learning_rate'], flags['init_std']
        loss = (
            1.6 + 20 * abs(rate - 4e-3) - 0.1 * std - 0.01 * (about['family'] == 'KAN-GLU') + 1e-4 * (flags['seed'] % 7)
        )
        log = [dict(iter=n, val_loss=loss + 1 / (n + 1)) for n in (0, 500, 1000)]
        final = dict(val_loss=loss, best_val_loss=loss)
        run = dict(about, seed=flags['seed'], parameters=dict(total=1), finished='now', final=final, log=log)
        run['config'] = {'max_iters': 1000, **flags}
        return run if about['stage'] in ('ablation', 'tuning') else dict(run, test=loss + 0.1, shapes=SHAPES)

    monkeypatch.setattr(win, 'make', make)
    return win


def test_each_family_gets_the_same_trials_and_then_its_best_settings(study):
    study.run(['ablation', 'tuning', 'final'], ['0.23M'], study.GROUPS)
    runs = study.STUDY.read().values()
    for family in study.FAMILIES:
        assert len(study.tried('0.23M', family)) == len(study.RATES) + len(study.SCALES)
        finals = [run for run in runs if (run['stage'], run['family']) == ('final', family)]
        assert len(finals) == 10 and {run['config']['learning_rate'] for run in finals} == {4e-3}
        assert {run['config']['init_std'] for run in finals} == {0.16}
        assert not {run['seed'] for run in finals} & {*study.SEEDS['tuning'], *study.SEEDS['ablation']}
    assert {run['family'] for run in runs if run['stage'] == 'final'} == {*study.FAMILIES, *study.CONTROLS}
    page = win_page.make_page()
    assert page.index('| KAN-GLU | 1 |') < page.index('| SwiGLU | 1 |')  # the best first
    assert '-0.0100 ± 0.0000' in page and '| 0.004, 0.16 |' in page and '## 0.23M: splines varied' in page
    assert '| KAN-GLU | h.0.mlp.act | 0.50 | 25% | 25% (100%) | 25% (0%) | 25% (0%) | 25% (0%) |' in page
    for name in 'gaps', 'curves', 'functions':
        path = study.STUDY.folder / f'{name}.png'
        getattr(win_page, f'draw_{name}')(path, *(['0.23M', 'KAN-GLU'] if name == 'functions' else []))
        assert path.stat().st_size > 10000


def test_the_main_families_can_be_had_alone_and_longer_and_by_seconds(study):
    study.run(['tuning', 'final', 'steps', 'seconds', 'longer'], ['0.23M'], ['main'])
    runs, iters = study.STUDY.read(), {}
    for run in runs.values():
        assert run.get('family', 'KAN-GLU') in study.MAIN
        if run['stage'] != 'steps':
            iters.setdefault((run['stage'], run['family']), set()).add(run['config']['max_iters'])
    assert iters['seconds', 'KAN-GLU'] == {800} and iters['seconds', 'GELU'] == {1000}
    assert all(iters['longer', family] == {study.LONG} for family in study.MAIN)
    seeds = {stage: {run['seed'] for run in runs.values() if run['stage'] == stage} for stage in study.SEEDS}
    assert not seeds['final'] & seeds['seconds'] and not (seeds['final'] | seeds['seconds']) & seeds['longer']
    page = win_page.make_page()
    assert (
        '## 0.23M: at the seconds of SwiGLU' in page
        and '| KAN-GLU | 1250.0 (1250.0 to 1250.0) | 1.25 (1.25 to 1.25) |' in page
    )


def test_losses_are_drawn_over_parameters(study):
    path = study.STUDY.folder / 'scaling.png'
    study.run(['tuning', 'final'], ['0.23M'], ['main'])
    win_page.draw_scaling(path)
    assert not path.exists()  # of one size alone
    study.run(['tuning', 'final'], ['0.45M'], ['main'])
    win_page.draw_scaling(path)
    assert path.stat().st_size > 10000


def test_controls_can_be_had_alone_and_take_the_settings_of_theirs(study):
    study.run(['tuning'], ['0.23M'], ['main'])
    study.run(['final'], ['0.23M'], ['controls'])
    finals = [run for run in study.STUDY.read().values() if run['stage'] == 'final']
    assert {run['family'] for run in finals} == {*study.CONTROLS} and len(finals) == 10 * len(study.CONTROLS)
    assert {(run['config']['learning_rate'], run['config']['init_std']) for run in finals} == {(4e-3, 0.16)}
    assert 'what the learning adds' not in win_page.make_page()  # before the families themselves
    study.run(['final'], ['0.23M'], ['main'])
    lines = win_page.make_controls('0.23M')
    assert len(lines) == 2 + len(study.CONTROLS) + 5 and lines[2].startswith('| KAN-GLU | rate of splines x 1 | ')
    assert lines[-2].startswith(f'- unseen text, {len(study.CONTROLS)} tests: ')


def test_seconds_want_steps_that_were_timed(study):
    study.run(['tuning'], ['0.23M'], ['main'])
    with pytest.raises(ValueError, match='stage seconds wants the times of stage steps first'):
        study.run(['seconds'], ['0.23M'], ['main'])


def test_shapes_are_described_in_numbers_that_add_up():
    x = torch.linspace(0, 2 * np.pi, 201).repeat(4, 1)
    learned = torch.stack([x[0], torch.cos(x[0]), torch.cos(2 * x[0]), torch.cos(0.5 * x[0])])
    change, flat = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.tensor([False, False, True, False])
    found = win.describe(Shapes(x, learned, x, change, flat), n_curves=3)
    assert found['turns'] == [2, 1, 0, 1] and found['turns_before'] == [4, 0, 0, 0]
    assert (found['channels'], found['flat'], found['change']) == (4, 1, 1.0)
    assert [curve[1][-1] for curve in found['curves']] == [pytest.approx(6.2832), -1.0, 1.0]  # by change


def test_no_scale_is_tried_before_all_rates(study):
    assert {flags['init_std'] for _, flags in study.trials('0.23M', study.FAMILIES).values()} == {0.08}


def test_a_run_that_diverged_is_not_chosen(study):
    def try_rate(rate, make):
        jobs = study.jobs_of('tuning', '0.23M', {'GELU': {}}, {'GELU': dict(learning_rate=rate, init_std=0.08)})
        study.STUDY.run_all(jobs, make)

    try_rate(4e-3, functools.partial(failed, study))
    assert study.tried('0.23M', 'GELU') == {(4e-3, 0.08): float('inf')} and not study.best_settings('0.23M')
    try_rate(1.6e-2, study.make)
    assert study.best_settings('0.23M') == {'GELU': dict(learning_rate=1.6e-2, init_std=0.08)}


def test_the_last_tenth_is_not_spent_before_all_trials(study):
    with pytest.raises(ValueError, match='0.23M lacks: GELU, squared ReLU'):
        study.run(['final'], ['0.23M'], study.GROUPS)
    with pytest.raises(ValueError, match='stage ablation has the size 0.23M alone'):
        study.run(['ablation'], ['0.45M'], study.GROUPS)
    assert not study.STUDY.read()


def failed(study, name, job, folder):
    run = study.make(name, job, folder)
    return {key: value for key, value in run.items() if key not in ('finished', 'final')} | dict(failed='loss is nan')


def test_the_page_is_made_from_the_records():
    table = win.STUDY.folder / 'table.md'
    assert win_page.make_page() == table.read_text(encoding='utf-8')
