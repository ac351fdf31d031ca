"""Everything that wants measuring on a CUDA card, in one command: tests, tiles, speed, and the runs of the README.

    python study/gpu.py --minutes=9   # in order of importance, a record of each; once more: what is missing
    python study/gpu.py --out=FOLDER  # with the records there; copy them into results/gpu to show them
    python study/gpu.py --minutes=0   # page, figure and the README's table from the records alone
    TRITON_INTERPRET=1 python study/gpu.py --device=cpu --tiny=True --out=FOLDER   # all of it in miniature

It needs no network where data/shakespeare_char is prepared. Time that runs out cuts a job off: its record is missing,
training resumes. A test that fails is told and the rest goes on, as it would for a user. The tiles it finds become
layers/tiles.json at once, so that what follows runs on them.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import torch
from matplotlib.figure import Figure

from configurator import ROOT, configure, flags_of, settings_of
from data.loader import is_prepared
from model import GPT, GPTConfig, model_settings
from run.cost import count_flops, make_step
from run.device import device_name, flops_promised, peak_memory, pick_device, profile, set_up
from run.files import write_file
from run.records import commit, read_record, without_nan
from run.tables import markdown_table
from study.runner import Study, add_run, fill, run_json, run_to_end
from study.speed import make_table
from study.sweep import check_record

TESTS = ['tests/layers/test_spline_triton.py', 'tests/layers/test_channel_triton.py', 'tests/test_gpu.py']
RUNS = ['micro_kan', 'micro', 'micro_boosted', 'micro_balanced']
BENCH = dict(rounds=1, repeats=5, dtypes='bfloat16')
BENCHES = {  # settings of bench.py
    'layer': dict(BENCH, suite='layer', only='(192 768|768 192) 16384|768 3072'),
    'step': dict(BENCH, suite='step', only='micro (vanilla, 16|KANLinear$|efficient)'),
    'step, eager': dict(BENCH, suite='step', only='micro (vanilla, 16|KANLinear$|efficient)', compile=False),
    'step, other models': dict(BENCH, suite='step', only='micro (vanilla$|vanilla, eq|KANLinear, |inkan)'),
    'activation': dict(BENCH, suite='activation', dtypes='bfloat16,float32'),
    'mlp': dict(BENCH, suite='mlp', only='micro', rounds=4),
    'sample': dict(BENCH, suite='sample'),
    'adapter': dict(BENCH, suite='adapter'),
    'layer, float32': dict(BENCH, suite='layer', only='(192 768|768 192) 16384|768 3072', dtypes='float32'),
    'step, float32': dict(BENCH, suite='step', only='micro (vanilla, 16|KANLinear$|efficient)', dtypes='float32'),
}
TINY_BENCHES = {'layer': dict(suite='layer', only='float32 96 384 2048 nn.Linear$', rounds=1, repeats=1)}
TINY_RUN = dict(max_iters=2, eval_iters=1, eval_interval=2, batch_size=2, block_size=16, n_embd=12, n_layer=1)
TEST_SECONDS = 120
DATASET = 'shakespeare_char'  # of the runs in the README

# -----------------------------------------------------------------------------
out = ''  # where the records are; empty: results/gpu
minutes = 9.0  # after which it stops; 0: the page alone
device = 'auto'  # 'cuda', 'cuda:0'; 'cpu' goes with tiny
dataset = 'shakespeare_char'  # of the runs
tiny = False  # small sizes, for a test of this script
# -----------------------------------------------------------------------------


def list_jobs():
    """{name: a function that returns its record}, in order of importance."""
    text = '' if dataset == DATASET else f', {dataset}'
    runs = {f'run, {config}, seed {seed}{text}': (train, config, seed) for seed in (1, 2, 3) for config in RUNS}
    benches = {f'bench, {name}': (bench, flags) for name, flags in (TINY_BENCHES if tiny else BENCHES).items()}
    others = {
        'tests': (run_tests,),
        'tiles, bfloat16': (find_tiles, torch.bfloat16),
        'profile, micro_kan': (profile_steps,),
        'tiles, float32': (find_tiles, torch.float32),
        'GPT-2': (lambda: {'rows': [step_gpt2('train_gpt2_kan'), step_gpt2('train_gpt2')]},),
        'tests of train.py': (run_tests, 'resumes'),
    }
    # a name that comes twice is done the first time
    middle = 'profile, micro_kan', 'tiles, float32', 'GPT-2'
    order = ['tests', 'tiles, bfloat16', *list(runs)[:2], *list(benches)[:2], *middle, *list(runs)[2 : len(RUNS)]]
    order += [*benches, 'tests of train.py', *runs]
    if tiny:
        order = ['tests', *list(runs)[:1], *benches, *middle]
    small = ', tiny' if tiny else ''
    return {name + small: functools.partial(*(runs | benches | others)[name]) for name in order}


def bench(flags):
    return run_json('study/bench.py', **flags, device=device)


def run_all(jobs, study):
    """Make the record of each job that has none on this card, or one of an error."""
    # the end of the time is a Ctrl-C, at which training saves
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    about, until = describe_machine(), time.monotonic() + 60 * minutes
    for job, make in jobs.items():
        name, left = f'{job} on {place_of(about)}', until - time.monotonic()
        if 'error' not in study.read().get(name, {'error': 'no record'}):
            print(f'{job}: there is a record', flush=True)
        elif left <= 0:
            print(f'{job}: skipped, the time is over', flush=True)
        else:
            print(f'{job} ...', flush=True)
            record = run_one(make, left)
            if record is None:
                print(f'{job}: cut off, the time is over; the same command goes on', flush=True)
                continue
            add_run(str(study.folder / 'runs.jsonl'), {'name': name, 'job': job, **about, **record})
            said = record.get('error') or record.get('counts') or 'done'
            print(f'{job}: {said}, {record["took"]:.0f} s', flush=True)


def place_of(run):
    """The card of a record and the version of torch there: figures of others do not compare with it."""
    return f'{run["card"]}, torch {run["torch"]}'


def run_one(make, seconds):
    """The record of a job, or None where the seconds are over first."""
    t0 = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        record = make()
    except KeyboardInterrupt:
        if time.monotonic() - t0 < seconds:  # by hand
            raise
        return None
    except Exception as error:  # whatever a card can raise: the other jobs go on
        record = {'error': f'{type(error).__name__}: {error}'[:2000]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {**without_nan(record), 'took': time.monotonic() - t0}


def describe_machine():
    import triton

    about = dict(card=device_name(device), family=card_family(), torch=torch.__version__, triton=triton.__version__)
    about.update(commit=commit(), driver=None, python=sys.version.split()[0])
    if shutil.which('nvidia-smi'):
        command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        done = subprocess.run(command, capture_output=True, text=True)
        about['driver'] = (done.stdout.splitlines() or [None])[0]
    return about


def card_family():
    from layers import spline_triton

    return spline_triton.card_family(torch.device(device))


def run_tests(which='not resumes'):
    """How many of the tests for CUDA and Triton passed, and what the others say; all of it in a file named
    by `which`, e.g. not-resumes.txt.
    """
    command = [sys.executable, '-m', 'pytest', '-q', '-rf', '--tb=short', *TESTS]
    command += ['-k', 'test_shapes and 16' if tiny else which]
    if importlib.util.find_spec('xdist') and not tiny:
        command += ['-n', '8']
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        text, code = process.communicate(timeout=TEST_SECONDS)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, code = process.communicate()[0], f'cut off after {TEST_SECONDS} s'
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    write_file(Path(out, f'{which.replace(" ", "-")}.txt'), text)
    counts = {what: int(n) for n, what in re.findall(r'(\d+) (passed|failed|skipped|errors?)', text[-400:])}
    failed = re.findall(r'^(?:FAILED|ERROR) (.*)', text, re.MULTILINE)[:40]
    return {'code': code, 'counts': counts, 'failed': failed}


def find_tiles(dtype):
    from study import tiles

    rows = tiles.search(dtype, tiles.TINY_SHAPES if tiny else tiles.SHAPES, device, tiny)
    if not tiny:
        use_tiles([{'family': card_family(), 'rows': rows}])
    return {'rows': rows}


def searches(runs):
    """Those of the records that are of a search for tiles which came to its end."""
    return [run for run in runs if run['job'].startswith('tiles') and 'error' not in run and not is_tiny(run)]


def is_tiny(run):
    return run['job'].endswith(', tiny')


def use_tiles(runs):
    """Write layers/tiles.json from the records of searches: for each family of cards and size of number the last."""
    from layers import spline_triton
    from study.tiles import make_table

    known = json.loads(spline_triton.MEASURED.read_text()) if spline_triton.MEASURED.exists() else {}
    for run in runs:
        family, new = run['family'], make_table(run['rows'])
        if not family:  # of no card, but of the interpreter
            continue
        sizes = {row['bytes'] for row in new}
        known[family] = [row for row in known.get(family, ()) if row['bytes'] not in sizes] + new
    if known:
        write_file(spline_triton.MEASURED, json.dumps(known, indent=1))
    spline_triton.measured_tiles.cache_clear()
    spline_triton.tile_of.cache_clear()


def train(config, seed):
    """A run of train.py from a config file to its end, with its evaluations and checkpoints."""
    args = [f'{ROOT}/config/train_shakespeare_char_{config}.py', f'--seed={seed}', f'--dataset={dataset}']
    args += flags_of({**(TINY_RUN if tiny else {}), 'device': device})
    where = f'{config} {seed} {dataset} {device_name(device)} {torch.__version__}'  # what one run is of
    folder = Path(ROOT, 'out-gpu', re.sub(r'[^\w.+-]+', '_', where))
    resumed, settings = (folder / 'ckpt.pt').exists(), settings_of('train.py', args)
    check_record(folder, read_record(folder), settings)
    run = run_to_end('train.py', args, folder)
    if 'final' not in run:
        raise ValueError(run['failed'])
    check_record(folder, run, settings)  # which tells what changed where it was resumed
    shutil.rmtree(folder, ignore_errors=True)
    return {'config': config, 'seed': seed, 'resumed': resumed, 'run': run}


def prepare_step(config, vocab_size, micro_steps):
    """The model of a config file, its settings, and a function that takes a training step in bfloat16, warm."""
    settings = settings_of('train.py', [f'{ROOT}/config/{config}.py'])
    settings.update(dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2) if tiny else {})
    if device.startswith('cuda'):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = GPT(GPTConfig(vocab_size=vocab_size, **model_settings(settings))).to(device)
    step = make_step(model, settings['batch_size'], micro_steps, device, 'bfloat16')
    for _ in range(1 if tiny else 4):
        step()
    return model, settings, step


def step_gpt2(config):
    """A micro-batch of 12 sequences of 1024 tokens, forward, backward and update."""
    model, settings, step = prepare_step(config, 50304, 1)
    seconds = statistics.median(step() for _ in range(1 if tiny else 10))
    tokens_per_s = settings['batch_size'] * settings['block_size'] / seconds
    peak, flops = flops_promised(device, 'bfloat16'), count_flops(vars(model.config))
    about = dict(config=config, parameters=model.get_num_params(False), seconds=seconds, tokens_per_s=tokens_per_s)
    return {**about, 'mfu': peak and flops * tokens_per_s / peak, 'peak_bytes': peak_memory(device)}


def profile_steps():
    """What a training step of micro_kan is made of: seconds, the part in which the card works, and its kernels."""
    _, _, step = prepare_step('train_shakespeare_char_micro_kan', 65, 1)
    n = 1 if tiny else 5
    seconds = statistics.median(step() for _ in range(n))  # without the profiler
    profiled = profile(lambda: [step() for _ in range(n)], device)
    kernels = [[name, count / n, total / n] for name, count, total in profiled]
    return {'seconds': seconds, 'busy': sum(total for *_, total in kernels), 'kernels': kernels[:25]}


# what is shown


def make_page(study):
    """table.md from all records, by card and version of torch."""
    runs, parts = study.read().values(), []
    for place in sorted({place_of(run) for run in runs}):
        there = {run['job']: run for run in runs if place_of(run) == place}
        about = []
        for what in 'driver', 'Triton', 'commit':
            values = dict.fromkeys(str(run[what.lower()]) for run in there.values())
            about.append(f'{what} {" and ".join(values)}')
        sections = [f'### {job}\n\n{show_job(run)}\n' for job, run in there.items()]
        parts.append(f'## {place}\n\n{", ".join(about)}\n\n' + '\n'.join(sections))
    return '\n'.join(parts)


def show_job(run):
    if 'error' in run:
        return f'failed: {run["error"]}'
    if run['job'].startswith('tests'):
        failed = ''.join(f'\n- {line}' for line in run['failed'])
        return ', '.join([*(f'{n} {what}' for what, n in run['counts'].items()), f'exit status {run["code"]}']) + failed
    shown = {'tiles': show_tiles, 'profile': show_profile, 'run': show_run, 'GPT-2': show_gpt2}
    shown['bench'] = lambda run: make_table(run['rows'])
    return shown[run['job'].partition(',')[0]](run)


def show_tiles(run):
    heads = ['kernel', 'shape', 'tile', 'us', 'the guess', 'bare product', 'floor', 'error']
    rows = []
    for row in run['rows']:
        where = [row['kernel'], f'{row["I"]} -> {row["O"]}, {row["N"]} rows']
        if 'tile' not in row:
            rows.append([*where, f'none works: {row["failed"][0]}', '', '', '', '', ''])
            continue
        tile = ' '.join(map(str, row['tile'].values()))
        times = [f'{row[name]:.0f}' if row[name] else '' for name in ('us', 'guess_us', 'matmul_us', 'floor_us')]
        error = 'not finite' if row['error'] is None else f'{row["error"]:.1e}'
        rows.append([*where, tile, *times, error])
    return '\n'.join(markdown_table(heads, rows, 'lllrrrrr'))


def show_profile(run):
    lines = [f'{run["seconds"] * 1e3:.2f} ms a step, of which the card works {run["busy"] / run["seconds"]:.0%}', '']
    return '\n'.join(lines + [f'- {1e3 * total:.3f} ms {name[:90]}' for name, _, total in run['kernels'][:15]])


def show_run(run):
    final, took = run['run']['final'], '' if run['resumed'] else f', {run["took"]:.0f} s in all'
    losses = f'best validation loss {final["best_val_loss"]:.4f}, last {final["val_loss"]:.4f}'
    return f'{losses}, {final["seconds"]:.0f} s of training{took}, {final["peak_mem"] / 1e9:.2f} GB'


def show_gpt2(run):
    rows = []
    for row in run['rows']:
        cells = [f'`{row["config"]}`', f'{row["parameters"] / 1e6:.1f}M', f'{row["seconds"] * 1e3:.1f}']
        mfu = f'{row["mfu"]:.1%}' if row['mfu'] else ''
        rows.append([*cells, f'{row["tokens_per_s"]:,.0f}', mfu, f'{row["peak_bytes"] / 1e9:.1f} GB'])
    return '\n'.join(markdown_table(['config', 'parameters', 'ms', 'tokens/s', 'MFU', 'peak memory'], rows))


THEIRS = {  # nanoGPKANT's log: loss, time and memory on a 4090
    'micro_kan': ('KAN layers everywhere', '8.86M', '1.554, 38 min, 15.4 GB'),
    'micro': ('the vanilla GPT of the same shape', '0.90M', '1.537, 1 min, 1.9 GB'),
    'micro_boosted': ('vanilla, 16 layers', '7.10M', '1.463, 8 min, 5.8 GB'),
    'micro_balanced': ('vanilla, as many parameters', '8.87M', ''),
}


def readme_table(runs):
    """Runs beside nanoGPKANT's, as lines. Not measured is empty."""
    done = runs_of_newest([run for run in runs if 'config' in run and text_of(run) == DATASET and not is_tiny(run)])
    place = place_of(done[0]) if done else 'not measured: no card was at hand'
    measured = f'best validation loss, seconds of training, memory ({place})'
    heads = ['`train_shakespeare_char_` ...', '', 'parameters', measured, 'nanoGPKANT on a 4090']
    rows = []
    for config, (what, size, theirs) in THEIRS.items():
        of_config = [run for run in done if run['config'] == config]
        final = list({run['seed']: run['run']['final'] for run in of_config}.values())
        cell = ''
        if final:
            loss, seconds = (statistics.mean(f[key] for f in final) for key in ('best_val_loss', 'seconds'))
            memory, seeds = max(f['peak_mem'] for f in final) / 1e9, f'{len(final)} seed{"s" * (len(final) > 1)}'
            cell = f'{loss:.4f} ({seeds}), {seconds:.0f} s, {memory:.2f} GB'
        rows.append([f'`{config}`', what, size, cell, theirs])
    return markdown_table(heads, rows, 'llrll')


def runs_of_newest(runs):
    """The runs of train.py on the card, text and version of torch of the newest: none of others compares with it."""
    done = [run for run in runs if 'config' in run and 'error' not in run]
    newest = max(done, key=lambda run: run['run']['finished'], default=None)
    return [run for run in done if compares_by(run) == compares_by(newest)]


def compares_by(run):
    """Card and torch, and the data set by its name and by the sums of its files: one name has had several texts."""
    return place_of(run), text_of(run), run['run'].get('dataset', {}).get('splits')


def text_of(run):
    return run['run']['config']['dataset']


def draw_runs(runs, path):
    """Validation loss over the seconds of training, a line for each run of the first seed."""
    figure = Figure(figsize=(8, 5), layout='constrained')
    panel = figure.subplots()
    for run in runs:
        seconds, losses = ([line[key] for line in run['run']['log']] for key in ('seconds', 'val_loss'))
        panel.plot(seconds, losses, label=run['config'], marker='.')
    panel.set(xlabel=f'seconds of training on {place_of(runs[0])}', ylabel='validation loss, nats per character')
    panel.set(xscale='symlog', title=f'Validation loss by seconds: {os.path.basename(text_of(runs[0]))}')
    panel.legend()
    figure.savefig(path, dpi=130)


def show(study):
    """Page, figure, and where the records are the repository's own, the README's table."""
    runs = list(study.read().values())
    if runs:
        study.show(make_page(study))
    drawn = [run for run in runs_of_newest(runs) if run['seed'] == 1]
    if drawn:
        draw_runs(drawn, study.folder / 'curves.png')
    if study.folder == Study('gpu').folder:
        if importlib.util.find_spec('triton'):  # without it there is no table to be read
            use_tiles(searches(runs))
        fill(Path(ROOT, 'README.md'), 'study/gpu.py', readme_table(runs))


if __name__ == '__main__':
    configure(globals())
    study = Study('gpu')
    study.folder = Path(out).resolve() if out else study.folder
    out = str(study.folder)
    if minutes > 0:
        os.makedirs(out, exist_ok=True)
        device = pick_device(device)
        if not device.startswith('cuda') and not tiny:
            raise ValueError(
                f'device={device!r}: it wants a CUDA card; --device=cpu --tiny=True tries the script itself'
            )
        if not is_prepared(dataset):
            raise ValueError(f'data set {dataset!r} is not prepared: python data/{dataset}/prepare.py')
        set_up(device)
        use_tiles(searches(study.read().values()))  # what was found before, maybe on another machine
        run_all(list_jobs(), study)
    show(study)
