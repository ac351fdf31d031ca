"""compare.py on runs with a known answer."""

import functools
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from scipy import stats

from helpers import ROOT, complaint, run_forked
from run.records import ADDED
from study import nano
from study.compare import check_run, families
from study.runner import Study, fill, read_run

STEPS = re.compile('^{"name": "steps, ', re.MULTILINE)
LOSSES = {  # best validation losses by seed
    'a': {1: 1.50, 2: 1.54, 3: 1.52},
    'b': {1: 1.45, 2: 1.47, 3: 1.49},
    'b_wide': {2: 1.40},
}
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


def write_run(folder, seed, loss, parameters=1000, finished=True, splits='0', changes=(), processes=1, **config):
    """What train.py leaves behind, with losses loss + 1, loss and loss + 0.1 at iterations 10, 20 and 30."""
    settings = dict(
        seed=seed,
        dataset='x_char',
        max_iters=30,
        eval_iters=2,
        batch_size=4,
        block_size=8,
        n_layer=1,
        eval_interval=10,
        out_dir=folder.name,
    )
    log = [dict(iter=0, val_loss=9.0, tokens_per_s=None, peak_mem=1e9)]
    for i, (extra, speed) in enumerate([(1.0, 100.0), (0.0, 200.0), (0.1, 600.0)], 1):
        log.append(dict(iter=10 * i, val_loss=loss + extra, tokens_per_s=speed, peak_mem=1e9 * i, seconds=1.0))
    record = dict(
        config={**settings, **config},
        parameters={'total': parameters},
        flops_per_token=6.0 * parameters,
        tokens_per_iter=50,
        dataset={
            'splits': {split: {'sha256': splits * 64, 'tokens': n} for split, n in (('train', 900), ('val', 100))},
            'val_chars': 400,
        },
        device='an abacus',
        processes=processes,
        changes=list(changes),
        versions={'torch': '2'},
    )
    if finished:
        record.update(final={'val_loss': loss + 0.1, 'best_val_loss': loss}, finished='2026')
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text(json.dumps(record))
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in log[: None if finished else 2]))
    return folder


def write_runs(folder):
    for n_layer, (name, losses) in enumerate(LOSSES.items(), 1):
        for seed, loss in losses.items():
            write_run(folder / f'runs/{name},seed={seed}', seed, loss, 1000 * n_layer, n_layer=n_layer)
    return folder


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path)


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    """The folder of the runs, compared once for all tests that only look, and the table that was printed."""
    folder = write_runs(tmp_path_factory.mktemp('compared'))
    return folder, compare(folder)


def compare(folder, *args):
    done = run_forked(
        folder, 'study/compare.py', *sorted(str(path) for path in (folder / 'runs').iterdir()), '--out=c', *args
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_report(folder):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    return json.loads((folder / 'c/compare.json').read_text(), parse_constant=refuse)


def test_numbers_are_those_of_numpy_and_scipy(compared):
    runs, table = compared
    a, b, wide = read_report(runs)['groups']
    assert [group['name'] for group in (a, b, wide)] == ['a', 'b', 'b_wide']
    ours, theirs = list(LOSSES['b'].values()), list(LOSSES['a'].values())
    assert b['best'] == ours and b['final'] == [loss + 0.1 for loss in ours]
    assert b['difference'] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert b['p'] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert b['p'] != pytest.approx(stats.ttest_ind(ours, theirs).pvalue)
    assert wide['p'] is None and wide['pairs'] == 1  # of the seed both have
    assert wide['difference'] == pytest.approx(1.40 - 1.54)
    assert a['tokens'] == 1500 and a['seconds_per_step'] == 0.25 and a['peak_memory'] == 3e9
    row = next(line for line in table.splitlines() if line.startswith('| b |'))
    assert f'{np.mean(ours):.4f} ± {np.std(ours, ddof=1):.4f}' in row
    assert f'{math.exp(np.mean(ours)):.3f}' in row and f'{np.mean(ours) / math.log(2) / 4:.4f}' in row
    assert f'p = {b["p"]:.2g}' in row


def make_larger(folder):
    """A run as if it had been resumed after 20 iterations with steps of twice the tokens."""
    record, log = (folder / name for name in ('run.json', 'log.jsonl'))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line, tokens in zip(lines, (0, 500, 1000, 2000)):
        line['tokens'] = tokens
    log.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    record.write_text(json.dumps({**json.loads(record.read_text()), 'tokens_per_iter': 100}))


def test_tokens_are_those_that_a_resumed_run_trained_on(tmp_path):
    write_run(tmp_path / 'runs/plain,seed=1', 1, 1.5)
    make_larger(write_run(tmp_path / 'runs/resumed,seed=1', 1, 1.5, changes=[{'iter': 20, 'before': {'x': 1}}]))
    command = ['study/compare.py', *(str(path) for path in sorted((tmp_path / 'runs').iterdir())), '--out=c']
    assert 'different tokens to train on (plain: 1500; resumed: 2000)' in complaint(tmp_path, *command)
    compare(tmp_path, '--mix=True')
    plain, resumed = read_report(tmp_path)['groups']
    assert (plain['tokens'], plain['curve']['tokens']) == (1500, [500, 1000, 1500])
    assert (resumed['tokens'], resumed['curve']['tokens']) == (2000, [500, 1000, 2000])
    assert resumed['seconds_per_step'] == pytest.approx(100 / 600)  # by the larger steps alone


def test_a_row_that_began_with_another_is_named(tmp_path):
    write_run(tmp_path / 'runs/a,seed=1', 1, 1.5)
    write_run(tmp_path / 'runs/on,seed=1', 1, 1.4, init_from='runs/a,seed=1')
    note = 'on began with runs/a: its tokens are those after that.'
    assert note in compare(tmp_path) and note in (tmp_path / 'c/compare.html').read_text()


@pytest.mark.parametrize('name', ['device', 'versions', 'val_loss', 'tokens_per_s', 'peak_mem'])
def test_a_run_that_lacks_something_is_named(tmp_path, name):
    run = write_run(tmp_path / 'runs/a', 1, 1.5)
    for file in run / 'run.json', run / 'log.jsonl':
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text(''.join(json.dumps({k: v for k, v in line.items() if k != name}) + '\n' for line in lines))
    words = complaint(tmp_path, 'study/compare.py', 'runs/a', '--out=c')
    assert words == f"error: runs/a is damaged or of an older train.py (KeyError('{name}'))\n"


def test_curves_are_means_over_seeds_without_the_start(compared):
    runs, _ = compared
    curve = read_report(runs)['groups'][0]['curve']
    assert curve['iterations'] == [10, 20, 30]
    assert curve['mean'] == pytest.approx([2.52, 1.52, 1.62]) and curve['std'] == pytest.approx([0.02] * 3)
    assert (runs / 'c/curves.png').read_bytes().startswith(b'\x89PNG')


def test_rows_without_a_seed_in_common_say_so(runs):
    write_run(runs / 'runs/z', 9, 1.0, n_layer=9)
    assert '| no seed in common |' in compare(runs)
    assert read_report(runs)['groups'][-1]['difference'] is None


def test_baseline_by_name(runs):
    compare(runs, '--baseline=b')
    a, b, _ = read_report(runs)['groups']
    assert a['difference'] == pytest.approx(0.05) and b['difference'] == 0
    assert 'expected one of a, b, b_wide' in complaint(
        runs, 'study/compare.py', *map(str, (runs / 'runs').iterdir()), '--baseline=c'
    )


def test_folders_without_a_run_are_left_out_with_a_word(runs):
    (runs / 'runs/empty').mkdir()
    done = run_forked(runs, 'study/compare.py', *sorted(map(str, (runs / 'runs').iterdir())), '--out=c')
    assert (
        done.returncode == 0
        and 'runs/empty holds no run of train.py' in done.stderr
        and len(read_report(runs)['groups']) == 3
    )


def test_settings_with_no_finished_run_are_named(runs):
    write_run(runs / 'runs/z', 1, 0.1, finished=False, n_layer=9)
    table = compare(runs)
    assert '| z |' not in table and 'runs/z, evaluated at 10 of 30 iterations' in table


def test_diverged_runs_are_marked(runs):
    folder = write_run(runs / 'runs/a,seed=4', 4, 0.1, finished=False)
    record = json.loads((folder / 'run.json').read_text())
    (folder / 'run.json').write_text(json.dumps({**record, 'failed': 'the loss is not finite'}))
    assert 'Diverged, not counted: ' in compare(runs)


def test_unfinished_runs_are_marked_and_not_counted(runs):
    write_run(runs / 'runs/a,seed=4', 4, 0.1, finished=False)
    table = compare(runs)
    assert (
        '| a | 3 (+ 1 unfinished) |' in table
        and f'Unfinished, not counted: {runs}/runs/a,seed=4, evaluated at 10 of 30' in table
    )
    assert read_report(runs)['groups'][0]['seeds'] == [1, 2, 3]


@pytest.mark.parametrize(
    'change, reason',
    [
        (dict(splits='1'), 'different data (a: 000000000000 000000000000; '),
        (
            dict(block_size=16),
            'different validation windows (eval_iters * batch_size of them, block_size long) (a: 8 8; ',
        ),
        (dict(eval_iters=3), 'different validation windows'),
        (dict(eval_interval=20), 'different iterations between evaluations'),
        (dict(max_iters=40), 'different tokens to train on (a: 1500; '),
    ],
)
def test_what_does_not_compare_is_refused_unless_asked(runs, change, reason):
    write_run(runs / 'runs/z', 1, 1.0, **change)
    assert reason in complaint(runs, 'study/compare.py', *sorted(map(str, (runs / 'runs').iterdir())))
    assert '| z |' in compare(runs, '--mix=True')


def test_mistakes_are_named(runs):
    assert 'expected folders' in complaint(runs, 'study/compare.py')
    assert "unknown setting 'basline', did you mean 'baseline'" in complaint(
        runs, 'study/compare.py', str(runs / 'runs/a,seed=1'), '--basline=a'
    )
    write_run(runs / 'runs/again,seed=1', 1, 1.0)
    assert 'seed 1 of a is there twice: ' in complaint(
        runs, 'study/compare.py', *sorted(map(str, (runs / 'runs').iterdir()))
    )
    (runs / 'runs/a,seed=1/run.json').write_text('{"config": 3')
    assert 'damaged' in complaint(runs, 'study/compare.py', str(runs / 'runs/a,seed=1'))


def test_power_law_of_points_that_lie_on_one(tmp_path):
    for n_layer, parameters in enumerate((1000, 3000, 9000, 20000), 1):
        for seed in (1, 2):
            loss = 5 * parameters**-0.1 + 0.01 * (-1) ** seed  # on the law in the mean over seeds
            write_run(tmp_path / f'runs/d{n_layer},seed={seed}', seed, loss, parameters, n_layer=n_layer)
    table = compare(tmp_path, '--scaling=True')
    (law,) = read_report(tmp_path)['scaling'].values()
    assert law['factor'] == pytest.approx(5) and law['exponent'] == pytest.approx(-0.1) and law['sizes'] == 4
    assert law['interval'] == pytest.approx([-0.1, -0.1]) and '5 · parameters^-0.1000' in table
    assert (tmp_path / 'c/scaling.png').read_bytes().startswith(b'\x89PNG')
    assert (tmp_path / 'c/compare.html').read_text().count('Plotly.newPlot(') == 4 + 1


def test_families_on_different_texts_stay_apart(tmp_path):
    for splits, loss in ('0', 1.0), ('1', 2.0):
        for n_layer in 1, 2, 3:
            name = f'{splits}x,n_layer={n_layer}'
            shape = dict(splits=splits, n_layer=n_layer, learning_rate=0.1)
            write_run(tmp_path / 'runs' / name, 1, loss + n_layer / 10, 1000 * n_layer, **shape)
    table = compare(tmp_path, '--mix=True', '--scaling=True', '--over=n_layer,learning_rate')
    assert {law['sizes'] for law in read_report(tmp_path)['scaling'].values()} == {3}
    assert len(read_report(tmp_path)['scaling']) == 2
    assert '| 1 | **1.1000** |' in table and '| 1 | **2.1000** |' in table


def test_names_are_written_as_they_are(tmp_path):
    from study import figures

    curve = dict(iterations=[10, 20], tokens=[10, 20], mean=np.array([2.0, 1.0]), std=np.array([0.1, 0.1]))
    scales = dict(curve=curve, flops_per_token=1, seconds_per_step=1)
    groups = [dict(scales, name=name) for name in ('a$_$b', '_c')]
    law = {'factor': 5.0, 'exponent': -0.1}
    members = [dict(parameters=1000, best=[2.0]), dict(parameters=2000, best=[1.9])]
    drawn = figures.draw_curves(groups, groups[0]), figures.draw_scaling([(g['name'], members, law) for g in groups])
    for figure in drawn:
        figure.savefig(tmp_path / 'figure.png')
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ['a$_$b', '_c']
    assert [text.get_text()[:5] for text in drawn[1].axes[0].get_legend().texts] == ['a$_$b', '_c: 5']


def test_interval_of_a_power_law_is_that_of_the_textbook(tmp_path):
    x, y = np.log([1000, 3000, 9000]), np.log([2.0, 1.7, 1.6])
    for n_layer, (parameters, loss) in enumerate(zip(np.exp(x), np.exp(y)), 1):
        write_run(tmp_path / f'runs/d{n_layer}', 1, float(loss), float(parameters), n_layer=n_layer)
    compare(tmp_path, '--scaling=True')
    (law,) = read_report(tmp_path)['scaling'].values()
    design = np.stack([np.ones(3), x], 1)
    coefficients, squares, *_ = np.linalg.lstsq(design, y)
    error = math.sqrt(squares[0] / (3 - 2) * np.linalg.inv(design.T @ design)[1, 1])
    width = stats.t.ppf(0.975, 1) * error
    assert law['interval'] == pytest.approx([coefficients[1] - width, coefficients[1] + width])


def test_grid_of_two_settings_for_each_family(tmp_path):
    for family, n_layer in (('deep', 4), ('flat', 1)):
        for rate in (0.1, 0.2):
            for std in (0.02, 0.04):
                name = f'{family},learning_rate={rate},init_std={std}'
                write_run(
                    tmp_path / 'runs' / name,
                    1,
                    10 * rate + std / n_layer,
                    n_layer=n_layer,
                    learning_rate=rate,
                    init_std=std,
                )
    table = compare(tmp_path, '--over=learning_rate,init_std')
    deep = [
        '| deep: learning_rate | init_std 0.02 | init_std 0.04 |',
        '|---|--:|--:|',
        '| 0.1 | **1.0050** | 1.0100 |',
        '| 0.2 | 2.0050 | 2.0100 |',
    ]
    assert '\n'.join(deep) in table and '| 0.2 | 2.0200 | 2.0400 |' in table
    groups = [dict(full_name='nano', config=dict(learning_rate=1, dropout=d), splits={}) for d in (0, 1, 2)]
    assert [name for name, _ in families(groups, ['learning_rate'])] == ['nano', 'nano (2)', 'nano (3)']
    folders = [str(path) for path in (tmp_path / 'runs').iterdir()]
    assert 'expected two settings' in complaint(tmp_path, 'study/compare.py', *folders, '--over=learning_rate')
    assert '(grids.png)' in table and (tmp_path / 'c/grids.png').read_bytes().startswith(b'\x89PNG')
    assert (tmp_path / 'c/compare.html').read_text().count(
        'Plotly.newPlot('
    ) == 4 + 2  # of the curves, and one for each family


@pytest.mark.parametrize('study', nano.RUNS)
def test_pages_of_results_are_those_of_their_records(tmp_path, monkeypatch, study):
    """`make results` would leave them as they are."""
    monkeypatch.setattr(nano, 'Study', functools.partial(Study, root=tmp_path))
    folder = tmp_path / 'results/nano'
    shutil.copytree(ROOT / 'results/nano', folder, ignore=shutil.ignore_patterns('*.png'))
    fill(folder / 'table.md', f'study/nano.py, {study}', ['nothing yet'])
    nano.show(study)
    assert (folder / 'table.md').read_bytes() == (ROOT / 'results/nano/table.md').read_bytes()
    drawn = {path.name for path in folder.glob('*.png')}
    assert drawn == set(nano.FIGURES.get(study, ())[1:])
    assert (nano.study_of(study).work / 'compare.html').exists()


def test_figures_of_results_are_those_of_their_studies():
    assert {name for _, name in nano.FIGURES.values()} == {path.name for path in ROOT.glob('results/nano/*.png')}


def test_make_results_makes_the_page_of_every_study():
    printed = subprocess.run(['make', '-n', 'results'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    others = ('minilm.py --stages=', 'finetune.py --stages=', 'speed.py --jobs=', 'pinn.py --problems=')
    for name in ('nano.py --train=False', *others):
        assert f'python study/{name}\n' in printed
    tables = re.findall(
        r'<!-- study/nano.py, (\w+) writes', (ROOT / 'results/nano/table.md').read_text(encoding='utf-8')
    )
    assert tables == list(nano.RUNS) and not list(ROOT.glob('results/*/compare.md'))


def test_takes_the_records_of_a_study_beside_folders(runs, compared):
    """The same rows, whether a run lies in a folder or is a line."""
    lines = []
    for folder in sorted((runs / 'runs').glob('b*')):
        log = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
        record = json.loads((folder / 'run.json').read_text())
        lines.append(json.dumps({'name': folder.name, **record, 'log': log}) + '\n')
        shutil.rmtree(folder)
    (runs / 'runs/runs.jsonl').write_text(''.join(lines))
    assert compare(runs) == compared[1]
    done = run_forked(runs, 'study/compare.py', 'runs/runs.jsonl', 'nowhere/runs.jsonl', '--out=c')
    assert done.returncode == 0 and done.stderr == 'left out: nowhere/runs.jsonl holds no run of train.py\n'
    assert [group['name'] for group in read_report(runs)['groups']] == ['b', 'b_wide']


def test_records_of_two_studies_are_told_apart_by_their_files(runs):
    files = [str(ROOT / f'results/nano/{name}.jsonl') for name in ('runs', 'graph')]
    twice = ' and '.join(f'{file}/shakespeare_char_nano,seed=1' for file in files)
    assert f'seed 1 of nano is there twice: {twice}\n' in complaint(runs, 'study/compare.py', *files)


@pytest.mark.parametrize(
    'run, difference',
    [
        (dict(init_from='out-base'), "init_from (None and 'out-base')"),
        (dict(changes=[{'iter': 20, 'before': {'learning_rate': 1.0}}]), 'changes (None and [{'),
    ],
)
def test_runs_that_began_with_others_or_changed_are_no_seeds_of_the_same_row(runs, run, difference):
    write_run(runs / 'runs/a,seed=4', 4, 1.51, n_layer=1, init_from='resume')
    assert '| a | 4 |' in compare(runs)
    write_run(runs / 'runs/a,seed=5', 5, 1.51, n_layer=1, **run)
    words = complaint(runs, 'study/compare.py', *sorted(map(str, (runs / 'runs').iterdir())))
    assert f'runs/a,seed=5 would be one row, but differ in {difference}' in words


def test_seeds_may_begin_with_seeds_of_another_row(runs):
    for seed in 1, 2:
        write_run(runs / f'runs/d,seed={seed}', seed, 1.51, n_layer=1, init_from=f'runs/a,seed={seed}')
    assert '| d | 2 |' in compare(runs)


def test_several_processes_are_named(runs):
    write_run(runs / 'runs/a,seed=4', 4, 1.51, n_layer=1, processes=2)
    assert 'an abacus, torch 2, 2 processes' in compare(runs)


def test_records_of_other_kinds_are_left_out(runs):
    found = run_forked(runs, 'study/compare.py', str(ROOT / 'results/win/runs.jsonl'), '--mix=True', '--out=c')
    assert found.returncode == 0, found.stderr
    n = len(STEPS.findall((ROOT / 'results/win/runs.jsonl').read_text()))
    assert n and found.stderr == f'left out: {n} records of {ROOT}/results/win/runs.jsonl, no runs of train.py\n'


def test_settings_that_old_records_do_not_name_are_as_they_were(runs):
    """A record from before graph attention is a seed of the same row as a later one without it, not of one with it."""
    write_run(runs / 'runs/a,seed=4', 4, 1.51, n_layer=1, **ADDED)
    assert '| a | 4 |' in compare(runs)
    write_run(runs / 'runs/g,seed=1', 1, 1.51, n_layer=1, **{**ADDED, 'use_graph': True})
    table = compare(runs)
    assert '| a | 4 |' in table and '| g | 1 |' in table
    write_run(runs / 'runs/a,seed=5', 5, 1.51, n_layer=1, **{**ADDED, 'use_graph': True})
    shutil.rmtree(runs / 'runs/g,seed=1')
    words = complaint(runs, 'study/compare.py', *sorted(map(str, (runs / 'runs').iterdir())))
    assert 'runs/a,seed=5 would be one row, but differ in use_graph (False and True): ' in words


def test_rows_of_one_name_are_told_apart(runs):
    write_run(runs / 'runs/a,seed=7', 7, 1.0, n_layer=1, dtype='bfloat16')
    words = complaint(runs, 'study/compare.py', *sorted(map(str, (runs / 'runs').iterdir())))
    assert "runs/a,seed=7 would be one row, but differ in dtype (None and 'bfloat16')" in words


def test_data_without_checksums_is_told_apart_by_its_name(runs):
    for folder in (runs / 'runs').iterdir():
        record = json.loads((folder / 'run.json').read_text())
        record['dataset']['splits'] = None
        record['config']['dataset'] = './one' if folder.name.startswith('a') else './two'
        (folder / 'run.json').write_text(json.dumps(record))
    assert 'different data (a: ./one; b: ./two' in complaint(
        runs, 'study/compare.py', *sorted(map(str, (runs / 'runs').iterdir()))
    )


def test_time_of_a_run_resumed_at_its_only_evaluation(runs):
    folder = write_run(runs / 'runs/z', 1, 1.0, n_layer=9)
    (folder / 'log.jsonl').write_text(
        json.dumps(dict(iter=30, val_loss=1.0, tokens_per_s=None, peak_mem=1e9, seconds=6.0)) + '\n'
    )
    compare(runs)
    assert read_report(runs)['groups'][-1]['seconds_per_step'] == pytest.approx(0.2)


def test_families_that_share_their_first_settings_keep_their_names(tmp_path):
    for scale in (1, 3):
        for n_layer in (1, 2, 3):
            name = f'nano,n_layer={n_layer},spline_lr_scale={scale}'
            write_run(
                tmp_path / 'runs' / name, 1, 2 / n_layer**scale, 1000 * n_layer, n_layer=n_layer, spline_lr_scale=scale
            )
    compare(tmp_path, '--scaling=True')
    laws = read_report(tmp_path)['scaling']
    assert {name: round(law['exponent'], 3) for name, law in laws.items()} == {
        'nano,spline_lr_scale=1': -1,
        'nano,spline_lr_scale=3': -3,
    }


def test_page_needs_no_network(compared):
    runs, _ = compared
    page = re.sub(
        r'<script>/\*\*.*?</script>', '', (runs / 'c/compare.html').read_text(), count=1, flags=re.DOTALL
    )  # plotly itself
    assert not re.search(r'(src|href)\s*=|url\(|@import', page) and 'viewport' in page


@pytest.mark.skipif(not BROWSER, reason='no Chromium or Chrome here')
def test_page_opens_and_sorts_in_a_browser(compared, tmp_path):
    page = tmp_path / 'compare.html'
    shutil.copy(compared[0] / 'c/compare.html', page)
    probe = """<script>
    window.addEventListener('error', event => document.title = 'error: ' + event.message);
    window.addEventListener('load', () => {
      const names = () => [...document.querySelectorAll('tbody tr')].map(row => row.cells[0].innerText).join(' ');
      const click = name => [...document.querySelectorAll('th button')].find(b => b.innerText === name).click();
      const seen = [names()];
      for (const name of ['best val loss', 'best val loss', 'seeds', 'run']) { click(name); seen.push(names()); }
      seen.push(document.querySelectorAll('.plotly-graph-div .main-svg').length > 7);
      seen.push(document.body.scrollWidth <= innerWidth);
      if (document.title === 'Runs compared') document.title = seen.join('; ');
    });
    </script>"""
    page.write_text(page.read_text().replace('<title>', probe + '<title>', 1))
    command = [
        BROWSER,
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        '--window-size=400,800',
        '--virtual-time-budget=10000',
    ]
    done = subprocess.run([*command, '--dump-dom', page.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r'<title>(.*?)</title>', done.stdout)[1]
    assert title == 'a b b_wide; b_wide b a; a b b_wide; b_wide a b; a b b_wide; true; true'


@pytest.mark.parametrize(
    'change',
    [
        dict(final=None),
        dict(final={'val_loss': 1.0}),
        dict(final={'val_loss': 1.0, 'best_val_loss': 'x'}),
        dict(final={'val_loss': 1.0, 'best_val_loss': math.nan}),
        dict(log=[{'val_loss': 1.0}]),
        dict(log=[{'iter': 'x'}]),
    ],
    ids=str,
)
def test_a_record_that_lacks_something_is_named(tmp_path, change):
    run = read_run(write_run(tmp_path / 'a', 1, 1.0))
    check_run('a', run, 'a')
    with pytest.raises(ValueError, match='a is damaged or of an older train.py'):
        check_run('a', {**run, **change}, 'a')
