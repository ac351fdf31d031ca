"""The comparison of MLPs: equal parameters, the same trials for all, and a page that is made from the records."""

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import settings_of
from helpers import ROOT, make_checkpoint, write_dataset
from inside.shapes import Shapes
from model import model_settings
from run.cost import count_parameters
from run.files import write_file
from study import win, win_page
from study.runner import Study, add_run, fill
from study.sweep import check_record, check_texts

CURVE = [[-1.0, 1.0], [0.5, 0.5], [-0.3, 0.7]]
SHAPES = {
    'h.0.mlp.act': dict(
        channels=4, flat=1, turns=[1, 1, 1, 1], turns_before=[4, 0, 0, 0], change=0.5, curves=[CURVE, CURVE]
    )
}
CONTROLS = {name: win.FAMILIES[family] | win.CHANGES[change] for name, (family, change) in win.CONTROLS.items()}
EVERYONE = {**win.FAMILIES, **CONTROLS, **win.ABLATION}
WITH_POSITIONS = {family: about for family, about in EVERYONE.items() if 'rotary' not in about}


@pytest.mark.parametrize('size', [*win.SIZES, *win.DEPTHS])
def test_all_families_have_as_many_parameters(size):
    base, counts = settings_of('train.py', [win.CONFIG]), {}
    for family, about in (
        WITH_POSITIONS if size in win.SIZES else {name: win.FAMILIES[name] for name in win.MAIN}
    ).items():
        settings = {**base, **win.settings_for(about, size)}
        width = settings['kan_hidden' if family == 'edge KAN' else 'mlp_hidden'] * settings['n_embd']
        assert width / 8 == pytest.approx(round(width / 8)) or family == 'edge KAN'
        counts[family] = count_parameters(dict(model_settings(settings), vocab_size=65))
    for family, count in counts.items():
        assert count == pytest.approx(counts['GELU'], rel=0.01 if size in win.SIZES else 0.02), family


class AtOnce(Study):
    """A study that writes the records of all jobs together: the runner has tests of its own, and adds one by one."""

    def run_all(self, jobs, make):
        runs = self.read()
        runs |= {name: {'name': name, **make(name, job, None)} for name, job in jobs.items() if name not in runs}
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(runs[name], allow_nan=False) + '\n' for name in sorted(runs)]
        write_file(self.folder / self.file, ''.join(lines))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose runs take no time: the loss is lowest at 4e-3, 0.16 and splines at 4 times the rate, and KAN-GLU is
    ahead, by steps that take a quarter longer.
    """
    for module in win, win_page:
        monkeypatch.setattr(module, 'STUDY', AtOnce('win', tmp_path))

    def make(name, job, folder):
        about, flags = job
        if about['stage'] == 'steps':
            seconds = {family: 1.25 if family == 'KAN-GLU' else 1.0 for family in ('SwiGLU', *win.MAIN)}
            rows = [dict(name=key, seconds=dict(total=[one]), peak_bytes=1) for key, one in seconds.items()]
            return dict(about, rows=rows)
        rate, std = flags['learning_rate'], flags['init_std']
        loss = 1.6 + 20 * abs(rate - 4e-3) - 0.1 * std + 1e-4 * (flags['seed'] % 7)
        loss -= 0.01 * (about['family'] == 'KAN-GLU') + 1e-3 * (flags.get('spline_lr_scale') == 4.0)
        log = [dict(iter=n, val_loss=loss + 1 / (n + 1)) for n in (0, 500, 1000)]
        train_loss = loss - 0.05 - 0.01 * (about['family'] == 'KAN-GLU')
        final = dict(val_loss=loss, best_val_loss=loss, train_loss=train_loss)
        run = dict(about, seed=flags['seed'], parameters=dict(total=1), finished='now', final=final, log=log)
        run['config'] = {'max_iters': 1000, **flags}
        run['dataset'] = dict(splits=dict(train=dict(sha256='a'), val=dict(sha256='b')))
        return run if about['stage'] in ('ablation', 'tuning', 'depth') else dict(run, test=loss + 0.1, shapes=SHAPES)

    monkeypatch.setattr(win, 'make', make)
    monkeypatch.setattr(win, 'check_source', lambda dataset: None)
    monkeypatch.setattr(win, 'check_texts', lambda settings, records: None)
    return win


def test_each_family_gets_the_same_trials_and_then_its_best_settings(study):
    study.run(['ablation', 'tuning', 'final'], ['0.23M'], study.GROUPS)
    runs = study.STUDY.read().values()
    for family in study.FAMILIES:
        beyond = 2 * (family in study.WIDER)  # the third is one of the seven here
        assert len(study.tried('0.23M', family)) == 7 + beyond
        finals = [run for run in runs if (run['stage'], run['family']) == ('final', family)]
        assert len(finals) == 10 and {run['config']['learning_rate'] for run in finals} == {4e-3}
        assert {run['config']['init_std'] for run in finals} == {0.16}
        assert not {run['seed'] for run in finals} & {*study.SEEDS['tuning'], *study.SEEDS['ablation']}
    unlike = {name for name, (_, change) in study.CONTROLS.items() if change != 'rate of splines x 16'}
    assert {run['family'] for run in runs if run['stage'] == 'final'} == {*study.FAMILIES, *unlike}
    page = win_page.make_page()
    assert page.index('| KAN-GLU | 1 |') < page.index('| SwiGLU | 1 |')  # the best first
    assert '-0.0100 ± 0.0000' in page and '| 0.004, 0.16 |' in page and '## 0.23M: splines varied' in page
    assert '| KAN-GLU | h.0.mlp.act | 0.50 | 25% | 25% (100%) | 25% (0%) | 25% (0%) | 25% (0%) |' in page
    for name in 'gaps', 'families', 'controls', 'curves', 'functions':
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
    for text, gap in ('validation text', '-0.0100'), ('text that they were trained on', '-0.0200'):
        rows = page.split(f'## All sizes, to SwiGLU, {text}\n\n')[1].split('\n\n')[0]
        assert rows.count(f'**{gap} ± 0.0000**') == 3  # final, seconds, longer


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(dataset=dict(splits={})), 'records of different texts'),
        (dict(test_data=dict(sha256='c')), 'records of different unseen texts'),
        (dict(config=dict(grid_size=64)), 'records of different settings of KAN-GLU'),
        (dict(seed=12), "seed=12' have the same seed"),
    ],
)
def test_records_that_do_not_belong_together_are_refused(study, change, message):
    study.run(['tuning', 'final'], ['0.45M'], ['main'])
    path = study.STUDY.folder / 'runs.jsonl'
    runs = {name: dict(run, test_data=dict(sha256='b')) for name, run in study.STUDY.read().items()}
    name = next(name for name in runs if 'final' in name and 'KAN-GLU' in name and 'seed=11' in name)
    changed = {**change, 'config': runs[name]['config'] | change.get('config', {})}
    path.write_text(''.join(json.dumps(run | (changed if key == name else {})) + '\n' for key, run in runs.items()))
    with pytest.raises(ValueError, match=message):
        win_page.groups_of('final', '0.45M')


def test_a_record_of_other_settings_is_not_taken_for_done(study):
    study.run(['tuning'], ['0.45M'], ['main'])
    study.run(['tuning'], ['0.45M'], ['main'])
    run = next(run for run in study.STUDY.read().values() if run['family'] == 'KAN-GLU')
    add_run(study.STUDY.folder / 'runs.jsonl', dict(run, config=run['config'] | dict(grid_size=64)))
    with pytest.raises(ValueError, match='holds a run with grid_size=64; move it away first'):
        study.run(['tuning'], ['0.45M'], ['main'])


def test_runs_are_on_the_text_of_the_records(study, tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / 'text')
    monkeypatch.setattr(win, 'check_texts', check_texts)
    monkeypatch.setattr(win, 'COMMON', dict(win.COMMON, dataset=dataset))
    study.run(['tuning'], ['0.45M'], ['main'])
    run = next(iter(study.STUDY.read().values()))
    for source, how in ('another text', ''), ('the nine plays of tinyshakespeare', ' by --source=plays'):
        there = dict(name=dataset, source=source, splits={})
        add_run(study.STUDY.folder / 'runs.jsonl', dict(run, dataset=there))
        study.run(['tuning'], ['0.45M'], ['main'])  # nothing is missing
        message = f'is a run on {source}, data/.*text holds random characters: prepare the text of the record{how}, or'
        with pytest.raises(ValueError, match=message):
            study.run(['final'], ['0.45M'], ['main'])


def test_unseen_text_is_of_the_text_that_was_trained_on(tmp_path, monkeypatch):
    for name, source in ('a', 'one text'), ('b', 'one text'), ('c', 'another text'):
        write_dataset(tmp_path / name)
        meta = json.loads((tmp_path / name / 'meta.json').read_text())
        (tmp_path / name / 'meta.json').write_text(json.dumps(dict(meta, source=source)))
    paths = {name: str(tmp_path / name) for name in 'abc'}
    monkeypatch.setattr(win, 'TESTS', {paths['a']: dict(dataset=paths['b']), paths['b']: dict(dataset=paths['c'])})
    win.check_source(paths['a'])
    with pytest.raises(ValueError, match='are of two texts, one text and another text'):
        win.check_source(paths['b'])


def test_a_study_under_way_has_a_page(study):
    """Whatever part of the runs is there."""
    study.run(['tuning', 'final'], ['0.23M', '0.45M'], ['main'])
    path = study.STUDY.folder / 'runs.jsonl'
    whole = path.read_text().splitlines(keepends=True)
    for n in range(3, len(whole), 23):
        path.write_text(''.join(whole[:n] if n % 2 else whole[-n:]))
        win_page.make_page()
        for draw in win_page.draw_gaps, win_page.draw_controls, win_page.draw_curves, win_page.draw_scaling:
            draw(study.STUDY.folder / 'figure.png')


@pytest.mark.parametrize('size', win.SHAPES)
def test_steps_are_those_of_one_size(size):
    cases = [
        (other, f'float32 {other} {name}') for other in win.SHAPES for name in (*win.FAMILIES, 'KAN-GLU of order 1')
    ]
    found = [other for other, case in cases if re.search(win.cases_of(size), case)]
    assert found == [size] * (len(win.FAMILIES) + 1)


def test_what_is_tuned_at_another_length_has_a_row_of_its_own(study):
    study.run(['tuning', 'final', 'steps', 'seconds', 'longer'], ['0.23M 5000'], ['main'])
    runs = study.STUDY.read().values()
    assert {run['stage'] for run in runs} == {'tuning', 'final'}
    assert {run['config']['max_iters'] for run in runs} == {study.LONG}
    assert len(study.tried('0.23M 5000', 'GELU')) == len(study.tried('0.23M 5000', 'KAN-GLU')) == 8
    study.run(['tuning', 'final', 'longer'], ['0.23M'], ['main'])
    rows = [line.split(' | ')[:3] for line in win_page.make_answer('SwiGLU')[2:]]
    assert rows[-1] == ['| Shakespeare, 0.23M, tuned for 5,000', '5,000 iterations', '10']
    assert [row[1] for row in rows] == ['1,000 iterations', '5,000 iterations', '5,000 iterations']


def test_runs_that_diverged_are_told(study):
    study.run(['tuning', 'final'], ['0.23M'], ['main'])
    path = study.STUDY.folder / 'runs.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for run in lines:
        if 'final' in run['name'] and 'KAN-GLU' in run['name'] and run['seed'] in (12, 13):
            run['failed'] = run.pop('finished')
    path.write_text(''.join(json.dumps(run) + '\n' for run in lines))
    (line,) = {line for line in win_page.make_page().splitlines() if line.startswith('Diverged, and not counted: ')}
    assert line.count('final, 0.23M, KAN-GLU') == 2 and win_page.make_answer('SwiGLU')[-1] == line


def test_depths_are_compared_at_the_best_settings(study):
    study.run(['tuning', 'depth'], ['0.23M'], ['main'])
    runs = [run for run in study.STUDY.read().values() if run['stage'] == 'depth']
    assert len(runs) == len(study.DEPTHS) * 4 * 5 and {run['config']['n_layer'] for run in runs} == {1, 4}
    assert {run['config']['init_std'] for run in runs} == {0.16}
    assert '| family | 0.23M, 1 layer | 0.23M, 4 layers | 0.23M |' in win_page.make_page()


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
    assert len({run['family'] for run in finals}) == 8 and len(finals) == 80  # 16 is the rate of the families
    assert {(run['config']['learning_rate'], run['config']['init_std']) for run in finals} == {(4e-3, 0.16)}
    assert 'what the learning adds' not in win_page.make_page()  # before the families themselves
    study.run(['final'], ['0.23M'], ['main'])
    lines = win_page.make_controls('0.23M')
    assert len(lines) == 2 + 8 + 5 and lines[2].startswith('| KAN-GLU | rate of splines x 1 | ')
    assert lines[-2].startswith('- unseen text, 8 tests: ')


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
        trial = dict(learning_rate=rate, init_std=0.08)
        study.STUDY.run_all(study.jobs_of('tuning', '2.2M', {'GELU': ({}, trial)}), make)
        return trial

    trials = [try_rate(4e-3, functools.partial(failed, study))]
    assert study.tried('2.2M', 'GELU') == {(4e-3, 0.08, 1.0): float('inf')} and not study.best_of(
        '2.2M', 'GELU', trials
    )
    trials += [try_rate(rate, study.make) for rate in (1e-3, 2e-3, 8e-3)]
    assert study.best_of('2.2M', 'GELU', trials) == dict(learning_rate=2e-3, init_std=0.08)
    assert {trial['init_std'] for trial in study.trials_of('2.2M', 'GELU')} == {0.04, 0.08, 0.16}


def test_finer_trials_are_rates_of_splines_or_of_all_weights(study):
    study.run(['tuning', 'final'], ['0.33M Python'], ['main'])
    assert [trial['learning_rate'] for trial in study.trials_of('0.33M Python', 'GELU')[-2:]] == [2.8e-3, 5.6e-3]
    scales = [trial['spline_lr_scale'] for trial in study.trials_of('0.33M Python', 'KAN-GLU')[-2:]]
    assert scales == [1.0, 4.0]
    assert study.best_settings('0.33M Python', 'KAN-GLU') == dict(
        learning_rate=4e-3, init_std=0.16, spline_lr_scale=4.0
    )


def test_the_last_tenth_is_not_spent_before_all_trials(study):
    with pytest.raises(ValueError, match='0.23M lacks trials of GELU'):
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


@pytest.mark.parametrize('baseline', win_page.ANSWERS)
def test_the_answer_on_pages_is_that_of_the_records(baseline, tmp_path):
    answer = win_page.make_answer(baseline)
    for page in win_page.ANSWERS[baseline]:
        copy = Path(shutil.copy(ROOT / page, tmp_path))
        fill(copy, f'study/win_page.py, {baseline}', answer)
        assert copy.read_text() == (ROOT / page).read_text()


def test_readme_says_how_long_steps_take():
    longer = {}  # in percent
    for size in '0.23M', '0.45M', '2.2M':
        for line in win_page.make_steps(size)[2:]:
            family, _, ratio, _ = line.strip('| ').split(' | ')
            longer.setdefault(family, []).append(round(100 * float(ratio.split()[0])) - 100)
    assert min(longer['KAN-GLU']) == 0
    least, most = min(longer['channel KAN']), max(longer['channel KAN'])
    said = f"A step of the channel KAN takes {least} to {most} % longer than SwiGLU's, a step of KAN-GLU up to"
    assert f'{said} {max(longer["KAN-GLU"])} %.' in ' '.join((ROOT / 'README.md').read_text(encoding='utf-8').split())


def test_the_answer_has_what_all_families_have(study):
    assert len(win_page.make_answer('SwiGLU')) == 0
    study.run(['tuning', 'final', 'longer'], ['0.23M'], ['main'])
    runs = study.STUDY.read()
    lacking = {
        name: run for name, run in runs.items() if (run['stage'], run['family'], run['seed']) != ('final', 'GELU', 11)
    }
    path = study.STUDY.folder / 'runs.jsonl'
    path.write_text(''.join(json.dumps(run) + '\n' for run in lacking.values()))
    _, _, first, longer = win_page.make_answer('SwiGLU')
    # a thousandth apart in all, so that ± is of rounding alone
    assert first.startswith('| Shakespeare, 0.23M | 1,000 iterations | 9 | ') and ' | **-0.0100 ± 0.0000** | ' in first
    assert longer.startswith('| Shakespeare, 0.23M | 5,000 iterations | 5 | ')


def test_titles_name_what_is_ahead():
    ahead, even = ((-0.02, 0.01, 0.01, 10), 'red'), ((-0.02, 0.03, 0.2, 10), 'red')
    panels = {'small': {'KAN': ahead, 'GELU': even}, 'large': {'KAN': even, 'GELU': even}}
    assert win_page.leaders(panels, False) == 'KAN in 1 of 2'
    assert win_page.leaders(panels, True) == 'small in 1 of 2'
    assert win_page.leaders({'small': panels['small']}, False) == 'KAN'
    assert win_page.leaders({'large': panels['large']}, False) == 'none'
    nearly = ((-0.02, 0.019, 0.04, 10), 'red')  # alone it would hold
    assert win_page.leaders({'small': {'KAN': ahead, 'GELU': nearly}}, False) == 'KAN, GELU'
    assert win_page.leaders({'small': {'KAN': even, 'GELU': nearly}}, False) == 'none'


@pytest.mark.parametrize('stage', ['depth', 'final', 'seconds', 'longer'])
def test_records_have_the_settings_of_the_study(stage):
    """Those of the first seed; what later trials beat may be on record, too."""
    found, met = {}, set()
    for name, run in win.STUDY.read().items():
        if (run['stage'], run.get('seed')) == (stage, win.SEEDS[stage][0]):
            found[name] = run
    families = {(run['size'], run['family']) for run in found.values()}
    for size, family in families:
        chosen, more = win.tuned(size.partition(',')[0], [family]), win.LONGER if stage == 'longer' else {}
        chosen = win.by_seconds(size, chosen) if stage == 'seconds' else chosen
        for name, (_, settings) in win.jobs_of(stage, size, chosen, **more).items():
            if name in found:
                check_record(name, found[name], settings_of('train.py', win.args_of(settings)))
                met.add((size, family))
    assert families and met == families


def test_trials_are_judged_by_their_last_loss():
    run = dict(final=dict(val_loss=1.6, best_val_loss=1.5))
    assert win.last_loss(dict(run, finished='now')) == 1.6 and win.last_loss(dict(run, failed='nan')) == float('inf')


@pytest.mark.parametrize(
    'size, asked',
    [('0.23M', dict(dataset='shakespeare_char')), ('0.33M Python', dict(split='test', stride=64))],
)
def test_a_final_run_is_measured_on_text_that_no_other_has_seen(tmp_path, monkeypatch, size, asked):
    def run_json(script, out_dir, **flags):
        assert (script, out_dir, flags) == ('eval.py', tmp_path, asked)
        return dict(loss=1.5, perplexity=4.5, dataset='x', split='y', sha256='z', tokens=9)

    def run_to_end(script, args, folder):
        seed = next(int(arg.removeprefix('--seed=')) for arg in args if arg.startswith('--seed='))
        return dict(finished='now', seed=seed, final=dict(val_loss=1.6))

    monkeypatch.setattr(win, 'run_json', run_json)
    monkeypatch.setattr(win, 'run_to_end', run_to_end)
    monkeypatch.setattr(win, 'describe_shapes', lambda folder, dataset, n_curves: n_curves)
    jobs = win.jobs_of('final', size, {'KAN-GLU': (win.FAMILIES['KAN-GLU'], win.USUAL)})
    runs = [win.make(name, job, tmp_path) for name, job in jobs.items()]
    assert {run['test'] for run in runs} == {1.5}
    assert runs[0]['test_data'] == dict(dataset='x', split='y', sha256='z')
    assert [run['shapes'] for run in runs] == [8 * (size == win.DRAWN)] + [0] * 9  # curves of the first seed alone
    (job, *_) = win.jobs_of('tuning', size, {'KAN-GLU': (win.FAMILIES['KAN-GLU'], win.USUAL)}).values()
    assert 'test' not in win.make('a trial', job, tmp_path)


def test_shapes_are_those_on_the_validation_text(tmp_path):
    """The text that was trained on is not read."""
    dataset = write_dataset(tmp_path / 'data')
    Path(dataset, 'train.bin').write_bytes(b'damaged')
    make_checkpoint(tmp_path / 'out', use_kan=True, kan_kind='channel', mlp_hidden=0.5)
    (found,) = win.describe_shapes(tmp_path / 'out', dataset, 3).values()
    assert found['channels'] == 8 and len(found['curves']) == 3 and sum(found['turns']) == 8


# the figures, by what is in them


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the figures that the test draws."""
    panels, make = [], win_page.panels_of

    def panels_of(*sizes):
        figure, found = make(*sizes)
        panels.extend(found)
        return figure, found

    monkeypatch.setattr(win_page, 'panels_of', panels_of)
    return panels


def set_apart(study):
    """Let KAN-GLU be behind on the validation text, but not on the text that no run has seen, and each of its controls
    ever farther behind there.
    """
    path = study.STUDY.folder / 'runs.jsonl'
    for run in (runs := [json.loads(line) for line in path.read_text().splitlines()]):
        if (run['stage'], run['family']) == ('final', 'KAN-GLU'):
            run['final'] = dict(run['final'], val_loss=run['final']['val_loss'] + 1)
        if run['family'].startswith('KAN-GLU, '):
            run['test'] += 0.1 * [*win.CHANGES].index(run['family'].removeprefix('KAN-GLU, '))
    path.write_text(''.join(json.dumps(run) + '\n' for run in runs))


def bars(panel):
    """{height: place} of the points of a panel with their intervals."""
    return {y: x for (point, *_) in panel.containers for x, y in point.get_xydata()}


def test_gaps_are_drawn_as_they_are_on_unseen_text(study, drawn, tmp_path):
    study.run(['tuning', 'final'], ['0.23M'], ['main', 'controls'])
    set_apart(study)
    win_page.draw_gaps(tmp_path / 'gaps.png')
    names = [label.get_text() for label in drawn[0].get_yticklabels()]
    expected = {'GELU': 0.0, 'channel KAN': 0.0, 'KAN-GLU': -0.01}
    assert {names[int(y)]: round(x, 6) for y, x in bars(drawn[0]).items()} == expected
    drawn.clear()
    win_page.draw_controls(tmp_path / 'controls.png')
    changes = [label.get_text() for label in drawn[0].get_yticklabels()]
    panels = {panel.get_title(): {changes[int(y)]: round(x, 6) for y, x in bars(panel).items()} for panel in drawn}
    ahead = {change: round(-0.01 - 0.1 * n, 6) for n, change in enumerate(win.CHANGES)}
    drawn_of = panels['KAN-GLU of 0.23M']
    assert drawn_of == {change: ahead[change] for change in drawn_of} and len(changes) == 4
    assert panels['channel KAN of 0.23M'] == dict.fromkeys(changes, 0.0)


def test_curves_are_gaps_to_swiglu_of_the_same_seed(study, drawn, tmp_path):
    study.run(['tuning', 'final'], ['0.23M'], ['main'])
    win_page.draw_curves(tmp_path / 'curves.png')
    panel = drawn[0]
    lines = {line.get_label(): line.get_xydata() for line in panel.lines}
    assert np.allclose(lines['KAN-GLU'], [[500, -0.01], [1000, -0.01]]) and np.allclose(lines['GELU'][:, 1], 0)
    assert all(np.ptp(band.get_paths()[0].vertices[:, 1]) < 1e-6 for band in panel.collections)  # all seeds agree


def test_scaling_is_drawn_by_losses_on_unseen_text(study, drawn, tmp_path):
    study.run(['tuning', 'final'], ['0.23M', '0.45M'], ['main'])
    set_apart(study)
    win_page.draw_scaling(tmp_path / 'scaling.png')
    heights = {points.get_label(): points[0].get_xydata()[:, 1] for points in drawn[0].containers}
    assert np.allclose(heights['KAN-GLU'], heights['SwiGLU'] - 0.01) and heights['SwiGLU'].shape == (2,)
    mean = np.mean([run['test'] for run in win_page.groups_of('final', '0.45M')['SwiGLU'].values()])
    assert heights['SwiGLU'][1] == pytest.approx(mean)


def test_functions_are_drawn_beside_what_they_began_as(study, drawn, tmp_path):
    study.run(['tuning', 'final'], ['0.23M'], ['main'])
    win_page.draw_functions(tmp_path / 'functions.png', '0.23M', 'KAN-GLU')
    lines = {line.get_label(): line.get_xydata().T.tolist() for line in drawn[0].lines}
    assert lines == {'SiLU': [CURVE[0], CURVE[2]], 'learned': [CURVE[0], CURVE[1]]}
