"""The study of a GPU: all of it in miniature, its clock, its table of tiles, and what it shows."""

import json
import math
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import settings_of
from helpers import ROOT, complaint, keep_figures, run_forked, write_dataset
from model import GPT, GPTConfig
from run.cost import count_flops
from study.runner import Study, add_run, fill

with pytest.MonkeyPatch.context() as patch:  # read when triton is imported, as in test_spline_triton.py
    if not torch.cuda.is_available():
        patch.setenv('TRITON_INTERPRET', '1')
    pytest.importorskip('triton')
    from layers import spline_triton
    from study import gpu, tiles

# a fork has imported Triton without the interpreter, and Triton 3.6 wants to be taught what numpy has changed
TAUGHT = f"""
import sys
import pytest

for name in [name for name in sys.modules if f'{{name}}.'.startswith('triton.') and not name.startswith('triton._C')]:
    del sys.modules[name]
sys.path.append({str(ROOT / 'tests')!r})
from triton_here import count_with_any_numpy

count_with_any_numpy(pytest.MonkeyPatch())
"""
ABOUT = dict(card='Abacus', family='sm_90', torch='2', triton='3', driver='1', commit='abc', python='3')
CONFIG = {'dataset': 'shakespeare_char'}
FINAL = dict(best_val_loss=1.5, val_loss=1.6, seconds=30.0, peak_mem=1e9)


@pytest.fixture
def study(tmp_path, monkeypatch):
    study = Study('gpu', tmp_path)
    monkeypatch.setattr(gpu, 'out', str(study.folder))
    monkeypatch.setattr(gpu, 'device', 'cpu')
    monkeypatch.setattr(gpu, 'minutes', 1.0)
    monkeypatch.setattr(gpu, 'describe_machine', lambda: ABOUT)
    return study


def test_all_of_it_in_miniature_and_once_more(tmp_path):
    dataset = write_dataset(tmp_path / 'data')
    flags = ['--device=cpu', '--tiny=True', f'--out={tmp_path}/gpu', f'--dataset={dataset}']
    (tmp_path / 'taught.py').write_text(TAUGHT)
    how = dict(env={'TRITON_INTERPRET': '1'}, modules=str(tmp_path), prelude='taught')
    outputs = []
    for minutes in 9, 1:
        done = run_forked(tmp_path, 'study/gpu.py', *flags, f'--minutes={minutes}', **how)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    records = [json.loads(line) for line in (tmp_path / 'gpu/runs.jsonl').read_text().splitlines()]
    assert [record for record in records if 'error' in record] == []
    jobs = [line.removesuffix(' ...') for line in outputs[0].splitlines() if line.endswith(' ...')]
    run = f'run, micro_kan, seed 1, {dataset}, tiny'
    assert jobs[:2] == ['tests, tiny', run] and sorted(jobs) == sorted(record['job'] for record in records)
    assert outputs[1].count(': there is a record') == len(jobs) and ' ...' not in outputs[1]
    by_job = {record['job']: record for record in records}
    assert (
        by_job['tests, tiny']['counts']['passed'] == 1 and '1 passed' in (tmp_path / 'gpu/not-resumes.txt').read_text()
    )
    assert by_job[run]['run']['final']['iter'] == 2
    rows = by_job['tiles, float32, tiny']['rows']
    assert [row['kernel'] for row in rows] == ['forward', 'dx', 'dw'] and all(row['error'] < 1e-5 for row in rows)
    assert not spline_triton.MEASURED.exists() or '""' not in spline_triton.MEASURED.read_text()  # tiles of no card
    page = (tmp_path / 'gpu/table.md').read_text()
    assert all(f'### {job}\n' in page for job in jobs) and (tmp_path / 'gpu/curves.png').stat().st_size > 1e4


def test_a_gpu_is_asked_for(tmp_path):
    words = complaint(tmp_path, 'study/gpu.py', '--device=cpu', f'--out={tmp_path}/gpu')
    assert words.startswith("error: device='cpu': it wants a CUDA card")


def test_time_that_is_over_cuts_off_one_job_and_skips_the_next(study, monkeypatch, capsys):
    monkeypatch.setattr(gpu, 'minutes', 0.5 / 60)
    jobs = {'fast': lambda: {'x': 1}, 'slow': lambda: time.sleep(20), 'never': lambda: pytest.fail('it had no time')}
    t0 = time.monotonic()
    gpu.run_all(jobs, study)
    assert time.monotonic() - t0 < 10
    assert [run['job'] for run in study.read().values()] == ['fast']
    printed = capsys.readouterr().out
    assert 'slow: cut off, the time is over' in printed and 'never: skipped, the time is over' in printed


def test_a_job_that_fails_has_a_record_and_is_tried_again(study):
    gpu.run_all({'bad': lambda: 1 / 0, 'good': lambda: {'x': [math.nan, 1]}}, study)
    runs = {run['job']: run for run in study.read().values()}
    assert runs['bad']['error'] == 'ZeroDivisionError: division by zero' and runs['good']['x'] == [None, 1]
    gpu.run_all({'good': None, 'bad': lambda: {'x': 2}}, study)
    assert [run['x'] for run in study.read().values()] == [2, [None, 1]]


def test_a_run_that_diverged_has_no_figures(study, monkeypatch):
    monkeypatch.setattr(gpu, 'run_to_end', lambda *args: {'failed': 'the loss is not finite'})
    gpu.run_all({'run, micro, seed 1': lambda: gpu.train('micro', 1)}, study)
    assert [run['error'] for run in study.read().values()] == ['ValueError: the loss is not finite']
    gpu.show(study)


def test_ctrl_c_is_none_of_the_clock(study):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.run_all({'one': interrupt}, study)
    assert study.read() == {}


class Slow:
    """A process that something else ends."""

    pid, returncode = 0, -9

    def __init__(self, end):
        self.end = end

    def communicate(self, timeout=None):
        if timeout:
            raise self.end
        return '3 passed in 120 s', None


def test_tests_that_take_too_long_have_a_record_and_those_cut_off_have_none(study, tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(gpu, 'out', str(tmp_path))
    monkeypatch.setattr(gpu.os, 'killpg', lambda *args: killed.append(args))
    ends = [subprocess.TimeoutExpired('pytest', 120), KeyboardInterrupt()]
    monkeypatch.setattr(gpu.subprocess, 'Popen', lambda *args, **settings: Slow(ends[0]))
    monkeypatch.setattr(gpu, 'describe_machine', lambda: dict(card='a card', torch='2'))
    with pytest.raises(KeyboardInterrupt):
        gpu.run_all({'tests': gpu.run_tests, 'tests again': lambda: ends.pop(0) and gpu.run_tests()}, study)
    (run,) = study.read().values()
    assert run['code'] == 'cut off after 120 s' and run['counts'] == {'passed': 3} and len(killed) == 2


# tiles


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table of tiles."""
    monkeypatch.setattr(spline_triton, 'MEASURED', tmp_path / 'tiles.json')
    for function in spline_triton.measured_tiles, spline_triton.tile_of:
        function.cache_clear()
    yield spline_triton.MEASURED
    for function in spline_triton.measured_tiles, spline_triton.tile_of:
        function.cache_clear()


def row(I, O, n_bytes=2, error=1e-3, **tile):
    return dict(kernel='dx', bytes=n_bytes, I=I, O=O, N=8, error=error, us=1.0, tile=tile)


def test_kernels_take_the_tile_of_the_nearest_shape_on_such_a_card(study, table, monkeypatch):
    assert spline_triton.tile_of('dx', 2, 200, 700, 'sm_90') == spline_triton.TILES['dx', 2]

    def use(*rows):
        gpu.use_tiles([{'family': 'sm_90', 'rows': rows}])

    wrong = [row(190, 760, error=error, BLOCK_N=3) for error in (0.5, math.nan, None)]
    use(row(192, 768, BLOCK_N=1), row(3072, 768, BLOCK_N=2), *wrong, dict(kernel='dx', bytes=2, failed=['no']))
    use(row(192, 768, n_bytes=4, BLOCK_N=4))
    assert spline_triton.tile_of('dx', 2, 200, 700, 'sm_90') == dict(BLOCK_N=1)  # what is wrong is no candidate
    assert spline_triton.tile_of('dx', 2, 2000, 700, 'sm_90') == dict(BLOCK_N=2)
    assert spline_triton.tile_of('dx', 4, 2000, 700, 'sm_90') == dict(BLOCK_N=4)
    assert spline_triton.tile_of('dx', 2, 200, 700, 'sm_80') == spline_triton.TILES['dx', 2]
    assert spline_triton.tile_of('dw', 2, 200, 700, 'sm_90') == spline_triton.TILES['dw', 2]
    use(row(192, 768, BLOCK_N=5))  # a second search of the same numbers takes the place of the first
    assert spline_triton.tile_of('dx', 2, 2000, 700, 'sm_90') == dict(BLOCK_N=5)
    assert spline_triton.tile_of('dx', 4, 2000, 700, 'sm_90') == dict(BLOCK_N=4)


@pytest.mark.parametrize('n_bytes', [2, 4])
@pytest.mark.parametrize('kernel', tiles.KERNELS)
def test_a_few_dozen_tiles_that_a_card_can_hold(kernel, n_bytes):
    found = tiles.candidates(kernel, n_bytes)
    assert 24 <= len(found) <= 48 and len({str(tile) for tile in found}) == len(found)
    assert all(tile.keys() == found[0].keys() for tile in found)


def test_a_tile_that_fails_is_told_and_the_others_are_measured(monkeypatch):
    monkeypatch.setattr(tiles, 'microseconds', lambda run, device: run() and 1.0)
    monkeypatch.setattr(tiles, 'launch', lambda kernel, *arguments: lambda: 1 / 0)
    found = tiles.find_fastest('dx', torch.float32, (16, 16, 16), [dict(BLOCK_N=16)], 'cpu')
    assert len(found['failed']) == 2 and 'division by zero' in found['failed'][1] and 'tile' not in found


# what is shown


def make_runs(study):
    path = str(study.folder / 'runs.jsonl')
    for seed in 1, 2:
        log = [dict(seconds=n, val_loss=2.0 - n / 9) for n in range(3)]
        run = dict(config='micro_kan', seed=seed, resumed=seed == 2, took=20.0 * seed)
        run.update(run=dict(final=dict(FINAL, seconds=30.0 * seed), log=log, finished=f'2026-0{seed}', config=CONFIG))
        add_run(path, {'name': f'{seed}', 'job': f'run, micro_kan, seed {seed}', **ABOUT, **run})
    add_run(path, {'name': 't', 'job': 'tests', **ABOUT, 'code': 1, 'counts': {'failed': 1}, 'failed': ['a.py::b']})
    add_run(path, {'name': 'e', 'job': 'bench, step', **ABOUT, 'error': 'ValueError: no', 'took': 1.0})


def test_page_and_readme_say_what_the_records_say(study, tmp_path, capsys):
    make_runs(study)
    gpu.show(study)
    page = (study.folder / 'table.md').read_text()
    assert page == capsys.readouterr().out and page.startswith('## Abacus, torch 2\n\ndriver 1, Triton 3, commit abc\n')
    assert 'last 1.6000, 30 s of training, 20 s in all, 1.00 GB' in page
    assert 'last 1.6000, 60 s of training, 1.00 GB' in page  # a run that was resumed took longer than its last part
    assert '1 failed, exit status 1\n- a.py::b' in page and 'failed: ValueError: no' in page
    table = gpu.readme_table(list(study.read().values()))
    assert '(Abacus, torch 2)' in table[0] and any(
        '| 8.86M | 1.5000 (2 seeds), 45 s, 1.00 GB | 1.554, 38 min' in line for line in table
    )


@pytest.mark.parametrize('place', [dict(card='Slide rule'), dict(torch='1')])
def test_figures_are_those_of_one_card_and_version(study, place):
    make_runs(study)
    runs = list(study.read().values())
    older = [{**run, **place, 'run': {**run['run'], 'finished': '2025'}} for run in runs if 'run' in run]
    assert gpu.readme_table(older + runs) == gpu.readme_table(runs)
    add_run(str(study.folder / 'runs.jsonl'), {**older[0], 'name': 'older'})
    headings = [line for line in gpu.make_page(study).splitlines() if line.startswith('## ')]
    assert headings == sorted(['## Abacus, torch 2', f'## {gpu.place_of(older[0])}'])


def test_runs_on_another_text_or_in_miniature_are_apart(study, monkeypatch):
    make_runs(study)
    runs = list(study.read().values())
    later = dict(runs[0]['run'], finished='2030')
    other = {**runs[0], 'run': {**later, 'config': {'dataset': 'mine'}}}
    first = runs[0]['run']
    final, texts = dict(first['final'], best_val_loss=1.0), [{'splits': {'train': {'sha256': sha}}} for sha in 'ab']
    runs = [{**run, 'run': {**run['run'], 'dataset': texts[0]}} if 'run' in run else run for run in runs]
    more = [{**runs[0], 'seed': 3, 'run': {**first, 'final': final, 'dataset': text}} for text in texts]
    assert gpu.readme_table([more[1], *runs]) == gpu.readme_table(runs)  # another text under the same name
    assert gpu.readme_table([more[0], *runs]) != gpu.readme_table(runs)
    tiny = {**runs[0], 'job': 'run, micro_kan, seed 1, tiny', 'run': later}
    assert gpu.readme_table([other, tiny, *runs]) == gpu.readme_table(runs)
    assert gpu.searches([{'job': 'tiles, float32, tiny'}, {'job': 'tiles, float32'}]) == [{'job': 'tiles, float32'}]
    names = set(gpu.list_jobs())
    monkeypatch.setattr(gpu, 'dataset', 'mine')
    apart = set(gpu.list_jobs()) ^ names
    assert apart == {
        f'run, {run}, seed {seed}{end}' for run in gpu.RUNS for seed in (1, 2, 3) for end in ('', ', mine')
    }
    monkeypatch.setattr(gpu, 'tiny', True)
    assert all(name.endswith(', tiny') for name in gpu.list_jobs())


def test_a_page_names_all_versions_that_were_measured(study):
    make_runs(study)
    add_run(str(study.folder / 'runs.jsonl'), {'name': 'z', 'job': 'tests', **ABOUT, 'driver': '2', 'error': 'no'})
    assert 'driver 1 and 2, Triton 3, commit abc' in gpu.make_page(study)


def test_a_run_that_was_cut_off_under_other_settings_is_no_record(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, 'ROOT', str(tmp_path))
    monkeypatch.setattr(gpu, 'device', 'cpu')
    settings = settings_of('train.py', [f'{ROOT}/config/train_shakespeare_char_micro.py', '--seed=1'])
    monkeypatch.setattr(gpu, 'settings_of', lambda script, args: settings)
    run = dict(config={**settings, 'dtype': 'float32'}, final={}, finished='2030')
    monkeypatch.setattr(gpu, 'run_to_end', lambda script, args, folder: run)
    assert gpu.train('micro', 1)['run'] is run
    for changed in dict(config={**run['config'], 'learning_rate': 0.5}), dict(changes=[{'iter': 1, 'before': {}}]):
        run.update(changed)
        with pytest.raises(ValueError, match='holds a run with'):
            gpu.train('micro', 1)


def test_speed_of_gpt2_and_parts_of_a_step_by_hand(monkeypatch):
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20)
    model, settings = GPT(GPTConfig(**sizes)), dict(batch_size=12, block_size=8)
    monkeypatch.setattr(gpu, 'device', 'cpu')
    monkeypatch.setattr(gpu, 'prepare_step', lambda config, vocab_size, micro_steps: (model, settings, lambda: 0.5))
    monkeypatch.setattr(gpu, 'flops_promised', lambda device, dtype: 1e9)
    monkeypatch.setattr(gpu, 'profile', lambda run, device: [('a', 10, 2.0), ('b', 5, 0.25)])
    row = gpu.step_gpt2('train_gpt2')
    assert (row['seconds'], row['tokens_per_s']) == (0.5, 12 * 8 / 0.5)
    assert row['mfu'] == pytest.approx(192 * count_flops(sizes) / 1e9)
    found = gpu.profile_steps()  # of five steps
    assert found == dict(seconds=0.5, busy=pytest.approx(0.45), kernels=[['a', 2, 0.4], ['b', 1, 0.05]])


def test_losses_are_drawn_over_seconds(study, monkeypatch):
    make_runs(study)
    figures = keep_figures(monkeypatch)
    gpu.show(study)
    (line,) = figures[0].axes[0].lines
    assert np.allclose(line.get_xydata(), [[n, 2.0 - n / 9] for n in range(3)])


def test_table_of_the_readme_is_that_of_the_records(tmp_path):
    copy = Path(shutil.copy(ROOT / 'README.md', tmp_path))
    fill(copy, 'study/gpu.py', gpu.readme_table(list(Study('gpu').read().values())))
    assert copy.read_text() == (ROOT / 'README.md').read_text()
