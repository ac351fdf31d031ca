"""balance.py: what it finds costs what the KAN-GPT costs, and trains."""

import itertools
import json
import re

import pytest

from configurator import settings_of
from data.loader import read_meta
from helpers import complaint, flags, run_forked
from model import model_settings
from run.cost import count_flops, count_parameters

CONFIG = """
use_kan = True
kan_targets = 'attn,mlp'
n_layer = 2
n_head = {n_head}
n_embd = {n_embd}
block_size = 16
batch_size = 2
gradient_accumulation_steps = 1
grid_size = {grid_size}
learning_rate = 1e-2
"""
SMALL, LARGER = dict(n_head=2, n_embd=24, grid_size=5), dict(n_head=3, n_embd=48, grid_size=3)
CLOCK = """
from run import cost

def make_step(model, *settings, muon):
    assert settings == (2, 1, 'cpu', 'float32', True) and muon is False, settings
    # grows, but as no other cost does
    seconds = cost.count_parameters(vars(model.config)) ** 0.8 + 50 * model.config.n_layer
    taken = iter([1e9])  # of the first step, which compiles and does not count
    return lambda: next(taken, seconds)

cost.make_step = make_step
"""


def balance(folder, dataset, sizes, *args):
    (folder / 'train_x_kan.py').write_text(CONFIG.format(**sizes))
    (folder / 'clock').mkdir()
    (folder / 'clock/clock.py').write_text(CLOCK)
    done = run_forked(
        folder,
        'study/balance.py',
        'train_x_kan.py',
        f'--dataset={dataset}',
        '--device=cpu',
        *args,
        modules=str(folder / 'clock'),
        prelude='clock',
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def model_args(dataset, *args):
    settings = settings_of('train.py', [*map(str, args), f'--dataset={dataset}'])
    return dict(model_settings(settings), vocab_size=read_meta(dataset)['vocab_size'])


def clocked(args):
    return count_parameters(args) ** 0.8 + 50 * args['n_layer']


def test_wide_hidden_layers_where_one_layer_more_is_too_much(tmp_path, dataset):
    """Attention over 1024 tokens: two layers cost more than the KAN-GPT even with a hidden width of 1."""
    flags = ('--by=flops', '--kan_targets=attn', '--n_layer=1', '--block_size=1024')
    printed = balance(tmp_path, dataset, dict(n_head=3, n_embd=48, grid_size=5), *flags, '--repeats=1')
    kan = model_args(dataset, tmp_path / 'train_x_kan.py', *flags[1:])
    found = model_args(dataset, tmp_path / 'train_x_by_flops.py')
    assert (
        found['n_layer'] == 1
        and found['mlp_hidden'] > 4
        and count_flops(found) == pytest.approx(count_flops(kan), rel=0.01)
    ), printed


@pytest.mark.parametrize(
    'by, first, sizes',
    [
        *itertools.product(['params'], ['depth', 'width'], [SMALL, LARGER]),
        ('flops', 'depth', LARGER),
        ('flops', 'width', SMALL),
        ('seconds', 'depth', SMALL),
        ('seconds', 'width', LARGER),
    ],
)
def test_found_within_the_tolerance(tmp_path, dataset, by, first, sizes):
    cost, tolerance = dict(params=(count_parameters, 0.01), flops=(count_flops, 0.01), seconds=(clocked, 0.05))[by]
    printed = balance(tmp_path, dataset, sizes, f'--by={by}', f'--first={first}', '--repeats=1')
    kan = model_args(dataset, tmp_path / 'train_x_kan.py')
    found = model_args(dataset, tmp_path / f'train_x_by_{by}{"_wide" if first == "width" else ""}.py')
    assert not found['use_kan'] and cost(found) == pytest.approx(cost(kan), rel=tolerance)
    assert found['n_embd' if first == 'depth' else 'n_layer'] == kan['n_embd' if first == 'depth' else 'n_layer']
    assert f'{count_parameters(kan):,}' in printed and f'{count_flops(found):,.0f}' in printed


def test_flags_for_the_mlp_leave_the_kan_gpt_as_it_is(tmp_path, dataset):
    printed = []
    for name, flag in ('plain', []), ('swiglu', ['--mlp=swiglu', '--mlp_hidden=2.0']):
        (tmp_path / name).mkdir()
        printed.append(balance(tmp_path / name, dataset, SMALL, '--kan_kind=channel', '--repeats=1', *flag))
    kans = [re.search(r'^KAN-GPT .*?([\d,]+,\d+)', text, re.MULTILINE)[1] for text in printed]
    assert kans[0] == kans[1]


def test_written_config_trains_and_keeps_the_recipe(tmp_path, dataset):
    printed = balance(tmp_path, dataset, SMALL, '--mlp=swiglu', '--out=mine.py')
    assert printed.endswith('written: python train.py mine.py\n')
    settings = settings_of('train.py', [str(tmp_path / 'mine.py')])
    assert (settings['mlp'], settings['learning_rate'], settings['batch_size']) == ('swiglu', 1e-2, 2)
    assert settings['device'] == settings_of('train.py', [])['device']  # that of whoever trains it
    done = run_forked(tmp_path, 'train.py', 'mine.py', *flags(dataset=dataset, device='cpu', max_iters=1, eval_iters=1))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'out-mine/run.json').read_text())
    assert f'{record["parameters"]["total"]:,} parameters' in (tmp_path / 'mine.py').read_text()


def test_the_written_command_is_the_one_that_was_typed(tmp_path, dataset):
    flags = '--by=params', '--first=width', '--wandb_run_name=my\nown run', '--out=mine.py'
    balance(tmp_path, dataset, SMALL, *flags, '--repeats=1')
    settings = settings_of('train.py', [str(tmp_path / 'mine.py')])
    assert settings['wandb_run_name'] == ''  # that of the KAN-GPT
    assert "'--wandb_run_name=my own run' --out=mine.py --repeats=1`" in (tmp_path / 'mine.py').read_text()


def test_mistakes_are_named(tmp_path, dataset):
    (tmp_path / 'train_x_kan.py').write_text(CONFIG.format(**SMALL))
    (tmp_path / 'there.py').write_text('')
    common = ('train_x_kan.py', f'--dataset={dataset}', '--device=cpu')
    assert 'there.py exists' in complaint(tmp_path, 'study/balance.py', *common, '--out=there.py')
    assert (tmp_path / 'there.py').read_text() == ''
    assert 'expected --by=params, flops or seconds' in complaint(tmp_path, 'study/balance.py', *common, '--by=size')
    assert 'config file of a KAN-GPT' in complaint(tmp_path, 'study/balance.py', f'--dataset={dataset}')
    assert "unknown setting 'grid_sise'" in complaint(tmp_path, 'study/balance.py', *common, '--grid_sise=3')


@pytest.mark.parametrize('flag', ['--rotary=True', '--use_graph=True', '--kan_kind=channel --spline_init_std=0.1'])
def test_widths_suit_what_both_have(tmp_path, dataset, flag):
    """Rotary positions want heads of an even width, graph layers another number of heads."""
    balance(tmp_path, dataset, LARGER, '--by=params', '--first=width', '--repeats=1', *flag.split())
    found = model_args(dataset, tmp_path / 'train_x_by_params_wide.py')
    wanted = {'--rotary=True': 6, '--use_graph=True': 12}.get(flag, 3)
    assert found['n_embd'] % wanted == 0 and not found['use_kan'] and found['spline_init_std'] == 0


def test_slopes_keep_their_rate(tmp_path, dataset):
    flags = '--kan_kind=channel', '--activation=swish', '--mlp=swiglu', '--spline_lr_scale=4.0'
    balance(tmp_path, dataset, SMALL, *flags, '--repeats=1')
    assert settings_of('train.py', [str(tmp_path / 'train_x_by_params.py')])['spline_lr_scale'] == 4.0
