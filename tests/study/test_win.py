"""The comparison of MLPs: equal parameters, the same trials for all, and a page that is made from the records."""

import functools

import pytest

from configurator import settings_of
from model import model_settings
from run.cost import count_parameters
from study import win
from study.runner import Study

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
    """A study whose runs take no time: the loss is lowest at 4e-3 and 0.16, and KAN-GLU is ahead."""
    monkeypatch.setattr(win, 'STUDY', Study('win', tmp_path))

    def make(name, job, folder):
        about, flags = job
        rate, std = flags['learning_rate'], flags['init_std']
        loss = (
            1.6 + 20 * abs(rate - 4e-3) - 0.1 * std - 0.01 * (about['family'] == 'KAN-GLU') + 1e-4 * (flags['seed'] % 7)
        )
        run = dict(
            about, seed=flags['seed'], config=flags, parameters=dict(total=1), finished='now', final=dict(val_loss=loss)
        )
        return dict(run, test=loss + 0.1) if about['stage'] == 'final' else run

    monkeypatch.setattr(win, 'make', make)
    return win


def test_each_family_gets_the_same_trials_and_then_its_best_settings(study):
    study.run(['ablation', 'tuning', 'final'], ['0.23M'])
    runs = study.STUDY.read().values()
    for family in study.FAMILIES:
        assert len(study.tried('0.23M', family)) == len(study.RATES) + len(study.SCALES)
        finals = [run for run in runs if (run['stage'], run['family']) == ('final', family)]
        assert len(finals) == 10 and {run['config']['learning_rate'] for run in finals} == {4e-3}
        assert {run['config']['init_std'] for run in finals} == {0.16}
        assert not {run['seed'] for run in finals} & {*study.SEEDS['tuning'], *study.SEEDS['ablation']}
    assert {run['family'] for run in runs if run['stage'] == 'final'} == {*study.FAMILIES, *study.CONTROLS}
    page = study.make_page()
    assert page.index('| KAN-GLU | 1 |') < page.index('| SwiGLU | 1 |')  # the best first
    assert '-0.0100 ± 0.0000' in page and '| 0.004, 0.16 |' in page and '## 0.23M: splines of KAN-GLU' in page
    study.draw(study.STUDY.folder / 'gaps.png')
    assert (study.STUDY.folder / 'gaps.png').exists()


def test_no_scale_is_tried_before_all_rates(study):
    assert {flags['init_std'] for _, flags in study.trials('0.23M').values()} == {0.08}


def test_a_run_that_diverged_is_not_chosen(study):
    def try_rate(rate, make):
        jobs = study.jobs_of('tuning', '0.23M', {'GELU': {}}, {'GELU': dict(learning_rate=rate, init_std=0.08)})
        study.STUDY.run_all(jobs, make)

    try_rate(4e-3, functools.partial(failed, study))
    assert study.tried('0.23M', 'GELU') == {(4e-3, 0.08): float('inf')} and not study.best_settings('0.23M')
    try_rate(1.6e-2, study.make)
    assert study.best_settings('0.23M') == {'GELU': dict(learning_rate=1.6e-2, init_std=0.08)}


def test_the_last_tenth_is_not_spent_before_all_trials(study):
    with pytest.raises(ValueError, match='stage final wants all trials of 0.23M first, lacking: GELU, squared ReLU'):
        study.run(['final'], ['0.23M'])
    with pytest.raises(ValueError, match='stage ablation has the size 0.23M alone'):
        study.run(['ablation'], ['0.45M'])
    assert not study.STUDY.read()


def failed(study, name, job, folder):
    run = study.make(name, job, folder)
    return {key: value for key, value in run.items() if key not in ('finished', 'final')} | dict(failed='loss is nan')


def test_the_page_is_made_from_the_records():
    table = win.STUDY.folder / 'table.md'
    assert win.make_page() == table.read_text(encoding='utf-8')
