"""Find the vanilla GPT that costs what a KAN-GPT costs, and write its config file.

    python study/balance.py config/train_shakespeare_char_nano_kan.py --by=params
    python study/balance.py config/train_shakespeare_char_nano_kan.py --by=flops --first=width
    python study/balance.py config/train_shakespeare_char_nano_kan.py --by=seconds --out=config/train_mine.py

Parameters and FLOPs per token (forward and backward, attention included) are counted from the model and meet within
1 %, seconds are those of measured training steps and meet within 5 %. The vanilla GPT gets the number of layers that
comes closest, or the width; where that is not close enough, the hidden layer of its MLPs is widened or narrowed. The
recipe is the KAN-GPT's. Other flags are train.py's, e.g. --device=cpu, or --mlp=swiglu for the vanilla GPT.
"""

import functools
import math
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import numpy as np
import torch

from configurator import check_ranges, configure, divide, settings_of
from data import loader
from model import GPT, GPTConfig, model_settings
from run.cost import count_flops, count_parameters, make_step
from run.device import device_name, pick_device, pick_dtype, set_up
from run.files import write_file

# -----------------------------------------------------------------------------
by = 'params'  # 'params', 'flops' or 'seconds'
first = 'depth'  # 'depth' or 'width'
out = ''  # the config file to write; by default the KAN's, with `_by_...` in place of `_kan`
repeats = 7  # measured steps of each model
# -----------------------------------------------------------------------------
own, others = divide(sys.argv[1:], ['by', 'first', 'out', 'repeats'])
configure(globals(), own)
check_ranges(globals(), at_least_one='repeats')
if by not in ('params', 'flops', 'seconds') or first not in ('depth', 'width'):
    raise ValueError(f'expected --by=params, flops or seconds and --first=depth or width, got {by!r} and {first!r}')
settings = settings_of('train.py', others)
config_file = next((arg for arg in others if not arg.startswith('-')), '')
if not config_file or not settings['use_kan']:
    raise ValueError('expected the config file of a KAN-GPT (use_kan = True), e.g. config/train_gpt2_kan.py')
wide = '_wide' if first == 'width' else ''
out = out or f'{config_file.removesuffix(".py").removesuffix("_kan")}_by_{by}{wide}.py'
if os.path.exists(out):
    raise ValueError(f'{out} exists: move it away, or choose another name by --out=...')
if not os.path.isdir(os.path.dirname(out) or '.'):
    raise ValueError(f'--out={out}: there is no folder {os.path.dirname(out)}')
device = pick_device(settings['device'])
dtype = pick_dtype(settings['dtype'], device)
set_up(device)

loader.prepare_dataset(settings['dataset'])
vocab_size = loader.model_vocab_size(loader.read_meta(settings['dataset']))
# flags for the MLP are of the vanilla GPT alone
of_both = [arg for arg in others if not arg.startswith(('--mlp=', '--mlp_hidden=', '--activation='))]
kan = dict(model_settings(settings_of('train.py', of_both)), vocab_size=vocab_size)
asked = dict(model_settings(settings), vocab_size=vocab_size, use_kan=False, spline_init_std=0.0)


def width_step():
    """What the widths of GPTs with these heads are multiples of."""
    heads = kan['n_head'] * (2 if kan['rotary'] else 1)
    return math.lcm(heads, kan['graph_heads']) if kan['use_graph'] else heads


def vanilla(**shape):
    return {**asked, **shape}


def measure_seconds(*models):
    """Median seconds per step of several models, whose steps alternate, after an untimed one of each."""
    torch.compiler.reset()  # which gives up after a few versions of a model
    steps = []
    for model_args in models:
        torch.manual_seed(0)
        model = GPT(GPTConfig(**model_args)).to(device)
        sizes = settings['batch_size'], settings['gradient_accumulation_steps']
        steps.append(make_step(model, *sizes, device, dtype, settings['compile'], muon=settings['muon']))
    seconds = [[step() for step in steps] for _ in range(1 + repeats)]
    return np.median(seconds[1:], axis=0)


def ratio(model_args):
    """What the model costs, in multiples of what the KAN-GPT costs."""
    if by == 'seconds':
        reference, seconds = measure_seconds(kan, model_args)
        return seconds / reference
    return count(model_args) / count_of_kan


def closest(f, start):
    """(n, f(n)) of the n >= 1 at which the growing function f comes closest to 1; f is called as seldom as can be."""
    value = functools.cache(f)
    low, high = 0, start
    while value(high) < 1:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) < 1 else (low, middle)
    return min(((n, value(n)) for n in (low, high) if n), key=lambda pair: abs(pair[1] - 1))


def fit_hidden(shape):
    """(the shape with the hidden width of its MLPs that comes closest, its ratio)"""
    n_embd = shape.get('n_embd', kan['n_embd'])
    start = round(asked['mlp_hidden'] * n_embd)
    n, found = closest(lambda n: ratio(vanilla(**shape, mlp_hidden=n / n_embd)), start)
    return dict(shape, mlp_hidden=n / n_embd), found


def search():
    """The shape of the vanilla GPT that comes within the tolerance."""
    n, found = closest(lambda n: ratio(vanilla(**{varied: n * step})), start=kan[varied] // step)
    shape = {varied: n * step}
    print(f'{shape}: {found:.3f} of the {by} of the KAN-GPT', flush=True)
    for size in (n, n - 1):  # the smaller one can be widened as far as need be
        if abs(found - 1) > tolerance and size > 0:
            shape, found = fit_hidden({varied: size * step})
            print(f'{shape}: {found:.3f} of the {by} of the KAN-GPT', flush=True)
    if abs(found - 1) > tolerance:
        other = 'width' if first == 'depth' else 'depth'
        closest_one = f'the closest is {shape} with {found:.3f} of the {by}'
        raise ValueError(f'no vanilla GPT within {tolerance:.0%}, {closest_one}; try --first={other}')
    return shape


count = {'params': count_parameters, 'flops': count_flops}.get(by)
count_of_kan = count and count(kan)
tolerance = 0.05 if by == 'seconds' else 0.01
varied, step = ('n_layer', 1) if first == 'depth' else ('n_embd', width_step())
shape = search()
chosen = vanilla(**shape)
sizes = [chosen[varied] + n * step for n in (-1, 0, 1)]
models = [kan, *(vanilla(**{**shape, varied: size}) for size in sizes if size > 0)]
rows = [(m, count_parameters(m), count_flops(m), s) for m, s in zip(models, measure_seconds(*models))]
costs_of_kan = rows[0][1:]
print(f'\n           {"n_layer":>8} {"n_embd":>7} {"mlp_hidden":>11}   parameters  FLOPs/token   ms/step')
for m, *costs in rows:
    label, ratios = 'KAN-GPT', ''
    if m is not kan:
        label = '-> vanilla' if m == chosen else 'vanilla'
        ratios = f'   {", ".join(f"{cost / base:.3f}" for cost, base in zip(costs, costs_of_kan))} of the KAN-GPT'
    shape_text = f'{m["n_layer"]:8} {m["n_embd"]:7} {m["mlp_hidden"]:11.4g}'
    print(f'{label:10} {shape_text} {costs[0]:12,} {costs[1]:12,.0f} {costs[2] * 1e3:9.1f}{ratios}')
print(f'on {device_name(device)}, {dtype}')

# the config file: what the KAN's command says, without the machine and without KAN layers
_, n_params, n_flops, seconds = next(row for row in rows if row[0] == chosen)
times = seconds / costs_of_kan[-1]
measured = f'{seconds * 1e3:.0f} ms per step, {times:.3f} times as long, on {device_name(device)}, {dtype}'
figure = {'params': f'{n_params:,} parameters', 'flops': f'{n_flops:,.0f} FLOPs per token', 'seconds': measured}[by]
if by == 'seconds' and abs(times - 1) > tolerance:
    print(f'warning: measured again it takes {times:.3f} of the time of the KAN-GPT; was the machine busy?')
name = os.path.basename(out).removesuffix('.py').removeprefix('train_').replace('_', '-')
defaults = settings_of('train.py', [])
machine = ('device', 'dtype', 'compile', 'init_from', 'wandb_log', 'wandb_artifact', 'wandb_run_name', 'log_to')
of_kan = tuple(name for name in defaults if name.startswith(('use_kan', 'kan_', 'grid_', 'spline_')))
wanted = {**settings, **shape, 'out_dir': f'out-{name}'}
left_out = {*machine, *of_kan} - ({'spline_lr_scale'} if settings['activation'] == 'swish' else set())  # of its slopes
changed = {key: value for key, value in wanted.items() if value != defaults[key] and key not in left_out}
command = shlex.join(sys.argv[1:]).replace('\n', ' ')
header = f"""# The vanilla GPT that costs what the KAN-GPT of {os.path.basename(config_file)} costs: {figure}.
#     python train.py {os.path.relpath(out)}
# Found by `python study/balance.py {command}`.
"""
write_file(out, header + '\n' + ''.join(f'{key} = {value!r}\n' for key, value in changed.items()))
print(
    '\nlearning_rate and init_std are those of the KAN-GPT, which need not suit this one: study/sweep.py tries others'
)
print(f'written: python train.py {os.path.relpath(out)}')
