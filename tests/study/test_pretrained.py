"""The study of fine-tuning on SmolLM2: what it would run, how it chooses, and its page, from made-up records."""

import json
import re

import pytest

from configurator import flags_of, settings_of
from study import pretrained
from study.runner import Study


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, 'STUDY', Study('pretrained', tmp_path))
    return pretrained


def make(name, job, folder):
    """LoRA is right in 0.5, and more with higher seeds; its best rate is the middle one. KAN-LoRA is 0.1 better."""
    about, settings = job
    settings_of('finetune.py', flags_of(settings))
    right = 0.5 + 0.01 * settings['seed'] + 0.001 * (settings['seed'] % 3) * (about['method'] == 'KAN-LoRA')
    right += 0.1 * (about['method'] == 'KAN-LoRA')
    right += settings['learning_rate'] * (about['stage'] == 'search')  # it is the losses that choose
    if settings['learning_rate'] == 3e-3 and about['method'] == 'LoRA':
        return {**about, 'settings': settings, 'failed': 'loss is nan'}
    loss = abs(settings['learning_rate'] - 1e-3)
    dev = dict(accuracy=right) if about['task'] != 'sonnets' else dict(chrf=30 * right, chrf_continuation=20 * right)
    return {**about, 'settings': settings, 'valid': dict(loss=loss), 'dev': dev, 'trained': 1000}


def make_prompts(name, job, folder):
    about, settings = job
    right = 0.4 + 0.01 * settings.get('seed', 0)
    dev = dict(accuracy=right) if about['task'] != 'sonnets' else dict(chrf=30.0, chrf_continuation=9.0)
    return {**about, **settings, 'dev': dev}


def test_methods_are_trained_at_the_best_rate_and_compared_by_seed(study, monkeypatch):
    monkeypatch.setattr(study, 'make', make)
    monkeypatch.setattr(study, 'make_prompts', make_prompts)
    with pytest.raises(ValueError, match='stage final wants all learning rates of LoRA on sst first'):
        study.run(['final'], ['sst'], ['LoRA'])
    study.run(['prompts', 'search', 'final'], ['sst', 'sonnets'], ['LoRA', 'KAN-LoRA'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.TASKS, 'sst', dict(study.TASKS['sst'], epochs=3))
        with pytest.raises(
            ValueError, match="the record .*, sst, .* was made with .*'epochs': 2.* the study has .*'epochs': 3"
        ):
            study.run(['search'], ['sst'], ['LoRA'])
    for task in 'sst', 'sonnets':
        for method in 'LoRA', 'KAN-LoRA':
            finals = study.runs_of('final', task, method)
            assert {run['settings']['seed'] for run in finals} == set(study.SEEDS)
            assert {run['settings']['learning_rate'] for run in finals} == {1e-3}
    page = study.make_table()
    assert (
        '| prompt alone | 0 | 40.0 |  |  | 9.0 |  |\n| prompt alone, 5 examples shown (to 500 of dev) | 0 | 42.0 ± 1.0 |  |  |  |  |'
        in page
    )
    assert '| LoRA | 1,000 | 52.0 ± 1.0 |  |  | 10.4 ± 0.2 | 0.001, 0.001 |' in page
    assert '| KAN-LoRA | 1,000 | 62.1 ± 1.0 (p = ' in page and 'head' not in page


def test_prompts_are_those_on_as_many_examples_as_the_study_says(study, monkeypatch):
    monkeypatch.setattr(study, 'make_prompts', make_prompts)
    study.run(['prompts'], ['sst'], [])
    monkeypatch.setattr(study, 'SHOWN_TO', 200)
    assert '(to 200 of dev) | 0 |  |' in study.make_table()
    study.run(['prompts'], ['sst'], [])
    assert '(to 200 of dev) | 0 | 42.0 ± 1.0 |' in study.make_table()


def test_the_page_tells_what_is_missing_and_pairs_by_seed(study, monkeypatch):
    monkeypatch.setattr(study, 'make', make)
    study.run(['search', 'final'], ['sst'], ['LoRA', 'KAN-LoRA'])
    path = study.STUDY.folder / 'runs.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    name = next(name for name in study.STUDY.read() if name.startswith('final, sst, KAN-LoRA') and 'seed=2' in name)
    lost = json.dumps(dict(study.STUDY.read()[name], failed='the loss is nan')) + '\n'
    path.write_text(''.join(lost if name in line else line for line in lines))
    assert '| KAN-LoRA | 1,000 | 62.0 ± 1.3 (n = 2) |' in study.make_table()
    theirs = name.replace('KAN-LoRA', 'LoRA')
    path.write_text(''.join(line for line in lines if name not in line and theirs not in line))
    assert re.search(r'\| KAN-LoRA \| 1,000 \| 62.0 ± 1.3 \(p = [\d.e-]+\) \(n = 2\) \|', study.make_table())
    other = name.replace('lr=0.001', 'lr=0.01')
    run = study.STUDY.read()[name.replace('seed=2', 'seed=1')]
    settings = dict(run['settings'], learning_rate=0.01)
    path.write_text(''.join([*lines, json.dumps(dict(run, name=other, settings=settings)) + '\n']))
    with pytest.raises(ValueError, match='final runs of KAN-LoRA on sst have learning rates'):
        study.make_table()


def test_a_method_that_diverges_at_all_rates_is_named(study, monkeypatch):
    def diverge(name, job, folder):
        return {**job[0], 'settings': job[1], 'failed': 'the loss is nan'}

    monkeypatch.setattr(study, 'make', diverge)
    with pytest.raises(ValueError, match='full diverged on sst at all its learning rates: try others'):
        study.run(['search', 'final'], ['sst'], ['full'])


def test_every_run_is_one_of_finetune_and_has_a_name_of_its_own(study, monkeypatch):
    monkeypatch.setattr(study, 'best_rate', lambda task, method: study.METHODS[method][1][0])
    names = []
    for task in study.TASKS:
        for method in study.METHODS:
            for stage in 'search', 'final':
                for name, (_, settings) in study.jobs_of(stage, task, method).items():
                    settings_of('finetune.py', flags_of(settings))
                    assert settings['task'] == task and (settings['seed'] == 0) == (stage == 'search')
                    names.append(name)
    assert len(set(names)) == len(names) == 4 * (5 * 4 + 3 * 3 + 8 * 3)


def test_a_record_is_that_of_a_run_with_its_settings(study, monkeypatch, tmp_path):
    """What frozen blocks make of the texts is kept, but where no block is frozen."""

    def run_to_end(script, args, folder):
        asked.append(dict(arg.removeprefix('--').split('=', 1) for arg in args))
        about = dict(log=[], device='x', versions={}, commit='c')
        return dict(about, final=dict(dev=dict(accuracy=0.5), valid=dict(loss=1.0), trained=7))

    asked = []
    monkeypatch.setattr(study, 'run_to_end', run_to_end)
    for method, cache in ('LoRA', study.FROZEN), ('full', ''):
        (job, *_) = study.jobs_of('search', 'sst', method).values()
        record = study.make('any', job, tmp_path)
        assert record['settings'] == job[1] and (record['task'], record['method']) == ('sst', method)
        places = dict(init_from=study.BASE, save_base=False, frozen_cache=cache)
        assert asked.pop() == {key: str(value) for key, value in {**job[1], **places}.items()}
        assert record['dev'] == dict(accuracy=0.5)


def test_the_page_is_made_from_the_records():
    page = (pretrained.STUDY.folder / 'README.md').read_text(encoding='utf-8')
    table = f'<!-- study/pretrained.py writes this table -->\n{pretrained.make_table()}<!-- until here -->\n'
    assert table in page
