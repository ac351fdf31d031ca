"""interpret.py as a user runs it: what it writes, what it says of a model, and models cut by it."""

import csv
import html
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import sympy
import torch
from filelock import FileLock

from configurator import settings_of
from data.tokenizer import CharTokenizer
from helpers import (
    ENV,
    HEADERS,
    PATIENCE,
    ROOT,
    SHAPE,
    TOKENIZER,
    Words,
    complaint,
    flags,
    load,
    make_checkpoint,
    read_log,
    run_forked,
    train,
    write_dataset,
)
from inside import faithful
from inside.edges import kan_layers, measure, values, watch
from inside.formulas import NAMES, Formula, function_of
from inside.reading import Examples, Text
from inside.report import drive, facts, look, most_driven, neurons, short, summarize, table, total_of
from kan import KANLinear
from model import GPT, GPTConfig
from run import checkpoint as ckpt
from surgery.lora import LoRAConfig, add_lora
from tasks import model as task_model
from tasks import prompts
from tasks.prompts import Example

pytestmark = pytest.mark.usefixtures('one_thread')

MODEL = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, use_kan=True, kan_targets='mlp,head', kan_hidden=1.5)
LAYERS = ['h.0.mlp.0', 'h.0.mlp.1', 'lm_head.0']
SMALL = dict(device='cpu', rows=128, loss_rows=64, n_edges=4, topk=2)
FILES = {'interpret.html', 'formulas.txt', 'formulas.tex', 'formulas.json', 'edges.csv', 'table.md', 'report.json'}
FIGURES = {'activity', 'growth', 'pruning', 'r2'}


def interpret(place, **settings):
    """A run that has to end well: what it printed, and the JSON of its last line."""
    done = run_forked(place, 'interpret.py', *flags(**{**SMALL, **settings}))
    assert done.returncode == 0, done.stderr
    return done.stdout, read_json(done.stdout.splitlines()[-1])


def read_json(text):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    return json.loads(text, parse_constant=refuse)


def complain(place, **settings):
    return complaint(place, 'interpret.py', *flags(**{**SMALL, **settings}))


@pytest.fixture(scope='module')
def trained(tmp_path_factory, dataset):
    """A folder with a run of train.py in out/, which has kept its history."""
    folder = tmp_path_factory.mktemp('trained')
    settings = dict(keep_history=True, max_iters=6, learning_rate=0.05, grid_min=-2.0, grid_max=2.0)
    train(folder, dataset, **MODEL, **settings)
    return folder


@pytest.fixture(scope='module')
def explained(trained):
    """Everything that is written of it, and what is printed."""
    return trained / 'out' / 'interpret', *interpret(trained)


def figures_of(layers):
    return FIGURES | {f'edges-{name}' for name in layers}


# the files


def test_all_files_are_written(explained):
    folder, printed, _ = explained
    expected = FILES | {f'{name}.{suffix}' for name in figures_of(LAYERS) for suffix in ('png', 'svg')}
    assert {path.name for path in folder.iterdir()} == expected
    for name in figures_of(LAYERS):
        assert matplotlib.image.imread(folder / f'{name}.png').std() > 0
        assert (folder / f'{name}.svg').read_text().rstrip().endswith('</svg>')
    page = (folder / 'interpret.html').read_text()
    assert all(name in html.unescape(page) for name in LAYERS)
    assert 'random: ' in printed and (folder / 'table.md').read_text() in printed


def test_what_is_printed_last_is_the_report(explained, dataset):
    folder, _, result = explained
    assert result == read_json((folder / 'report.json').read_text())
    assert result['model'] == 'out' and result['data'] == f'128 tokens of val of {dataset}'
    assert [line['layer'] for line in result['layers']] == [*LAYERS, 'all']
    for line in result['layers']:
        assert line['trained']['edges'] == line['random']['edges'] > 0 and line['trained'] != line['random']
        assert all(
            0 <= line[key][name] <= 1 for key in ('trained', 'random') for name in ('straight', 'close', 'outside')
        )


def test_the_table_has_every_figure_beside_that_of_random_weights(explained):
    folder, _, result = explained
    first, second, third = (folder / 'table.md').read_text().strip().split('\n\n')
    assert [line.split(' | ')[0] for line in first.split('\n')[2:]] == [
        f'| {name}' for name in (*LAYERS, 'all, mean over functions')
    ]
    for line, numbers in zip(first.split('\n')[2:], result['layers']):
        expected = [
            f'{100 * numbers["trained"][key]:.1f} % (random: {100 * numbers["random"][key]:.1f} %)'
            for key in ('straight', 'close', 'curved_variance', 'outside')
        ]
        assert line.strip('| ').split(' | ')[2:] == expected
    assert 'random weights: ' in second and 'random weights: ' in third
    assert f'{result["losses"]["full"]:.4f} (random weights: {result["random_losses"]["full"]:.3f})' in second
    assert result['random_losses']['full'] == pytest.approx(math.log(TOKENIZER.vocab_size), abs=0.3)


def test_losses_are_those_of_the_model(trained, explained, dataset):
    """On every other window, of which the statistics see the rest."""
    source = Text(ckpt.load_checkpoint(str(trained / 'out')), dataset, 'val', 128, 64, 'cpu')
    losses = explained[2]['losses']
    assert losses['full'] == pytest.approx(source.loss(source.model), rel=1e-5)
    assert not set(source.halves[0].tolist()) & set(source.halves[1].tolist())
    assert [len(half) for half in source.halves] == [8, 4]
    layers = look(source.model, lambda: source.read(source.model), rows=128, n_edges=0)
    with faithful.edited([(one.seen, faithful.without(one, torch.zeros_like(one.edges.alive))) for one in layers]):
        assert losses['by_activity'][-1] == pytest.approx(source.loss(source.model), rel=1e-4)


def test_losses_are_means_over_windows(tmp_path):
    """Of batches of unlike size."""
    dataset, state = write_dataset(tmp_path / 'data', n_val=800), make_checkpoint(tmp_path / 'out', **MODEL)
    source = Text(state, dataset, 'val', 17 * 16, 17 * 16, 'cpu')
    losses = [source.mean_loss(source.model, [start]) for start in source.halves[1]]
    assert len(losses) == 17 and source.loss(source.model) == pytest.approx(np.mean(losses), rel=1e-6)


def test_random_weights_are_those_that_the_training_began_with(trained, dataset):
    source = Text(ckpt.load_checkpoint(str(trained / 'out')), '', 'val', 64, 64, 'cpu')
    fresh, first = source.fresh().state_dict(), load(trained / 'out' / 'history', '00000000.pt')['model']
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in source.model.state_dict().items())


OURS = {'relu': lambda z: np.maximum(z, 0), 'silu': lambda z: z / (1 + np.exp(-z))}


def evaluate(text, x):
    names = {name: sympy.Function(name) for name in OURS}
    return sympy.lambdify('x', sympy.sympify(text, locals=names), [OURS, 'numpy'])(x) + 0 * x


def test_formulas_in_every_form_are_the_same_functions(explained):
    folder = explained[0]
    data = read_json((folder / 'formulas.json').read_text())
    with open(folder / 'edges.csv', encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f))
    text, tex = ((folder / f'formulas.{suffix}').read_text() for suffix in ('txt', 'tex'))
    assert len(data) == len(rows) == 4 * len(LAYERS)
    for one, row in zip(data, rows):
        assert [row[key] for key in ('layer', 'family', 'formula')] == [
            one[key] for key in ('layer', 'family', 'formula')
        ]
        assert (int(row['output']), int(row['feature'])) == (one['output'], one['feature'])
        numbers = [one[name] for name in 'abcd']
        assert numbers == [float(row[name]) for name in 'abcd']
        x = np.linspace(one['low'], one['high'], 30)
        formula = Formula(one['family'], *(float(row[name]) for name in 'abcd'), 1.0, 0.5, ())
        y = function_of(formula)(torch.from_numpy(x)).numpy()
        left = evaluate(one['formula'], x) - y
        assert np.abs(left).max() < 0.05 * np.ptp(y), one
        place = f'{one["feature"]:>5} -> {one["output"]:<5}'
        assert f'  {place} R² {float(row["r2"]):.4f} (line {float(row["affine_r2"]):.4f})  {one["formula"]}\n' in text
        assert f'g_{{{one["output"]},{one["feature"]}}} &= {one["latex"]} && R^2 = ' in tex
        assert one['family'] in (*NAMES, 'affine') and 0 <= one['affine_r2'] <= one['r2'] + 0.01


def test_the_latex_is_whole(explained):
    text = (explained[0] / 'formulas.tex').read_text()
    lines = text.strip().split('\n')
    assert lines[:2] == [r'{\allowdisplaybreaks', r'\begin{align*}'] and lines[-1] == r'\end{align*}}'
    assert len(lines) == 5 * len(LAYERS) + 3  # with a title each
    assert sum('intertext' in line for line in lines) == len(LAYERS)
    for line in (line for line in lines[2:-1] if 'intertext' not in line):
        assert line.count('{') == line.count('}') and line.count(r'\left') == line.count(r'\right')
        assert line.count('&') == 3 and line.endswith(r'\\')
        assert set(re.findall(r'\\([a-z]+)', line)) <= {
            *('left', 'right', 'tanh', 'sin', 'exp', 'log', 'sqrt', 'frac', 'cdot', 'operatorname'),
        }
        assert not re.search('nan|inf', line)


def test_files_are_the_same_again_elsewhere(trained, explained):
    """Of some layers, without losses and random weights; and what was there stays."""
    before = {path: path.read_bytes() for path in explained[0].iterdir()}
    printed, result = interpret(trained, layer=0, module='mlp.0', losses=False, random_too=False, folder='elsewhere')
    names = ['h.0.mlp.0']
    folder = trained / 'elsewhere'
    expected = FILES | {f'{name}.{suffix}' for name in figures_of(names) - {'pruning'} for suffix in ('png', 'svg')}
    assert {path.name for path in folder.iterdir()} == expected
    assert [line['layer'] for line in result['layers']] == [*names, 'all'] and 'random:' not in printed
    ours, theirs = (read_json((path / 'formulas.json').read_text()) for path in (folder, explained[0]))
    assert ours == [one for one in theirs if one['layer'] in names]
    assert {path: path.read_bytes() for path in explained[0].iterdir()} == before


@pytest.mark.parametrize(
    'settings, names, folder',
    [
        (dict(module='mlp.0'), LAYERS[:1], 'mlp.0'),
        (dict(layer=0), LAYERS[:2], 'layer0'),
        (dict(module='lm_head'), ['lm_head.0'], 'lm_head'),
        (dict(module='h.0.mlp', layer=0), LAYERS[:2], 'layer0-h.0.mlp'),
    ],
    ids=['module', 'layer', 'head', 'both in one'],
)
def test_layers_are_chosen(trained, settings, names, folder):
    """Each choice has a folder of its own."""
    _, result = interpret(trained, prompt='RO', rows=32, **settings)
    assert {path.name for path in (trained / 'out/interpret' / folder).iterdir()} >= {'prompt.png', 'prompt.json'}
    shutil.rmtree(trained / 'out/interpret' / folder)
    assert {edge['layer'] for token in result['tokens'] for edge in token['edges']} == set(names)


# prompts


@pytest.mark.parametrize('prompt', ['ROME', 'R'])
def test_what_a_prompt_drives(trained, explained, prompt):
    folder = f'prompt-{len(prompt)}'
    printed, result = interpret(trained, prompt=prompt, folder=folder)
    assert {path.name for path in (trained / folder).iterdir()} == {'prompt.png', 'prompt.svg', 'prompt.json'}
    assert [line['token'] for line in result['tokens']] == list(prompt)
    model = ckpt.build_model(load(trained / 'out', 'best.pt'), dropout=0.0).eval()
    met = {}
    layers = {short(name): layer for name, layer in kan_layers(model).items()}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda layer, args, name=name: met.update({name: args[0][0]}))
    with torch.no_grad():
        ids = torch.tensor([TOKENIZER.encode(prompt)])
        model(ids, ids)
    for t, line in enumerate(result['tokens']):
        shares = [abs(edge['share']) for edge in line['edges']]
        assert shares == sorted(shares, reverse=True) and len(shares) == 6 * len(LAYERS)
        for edge in line['edges']:
            assert edge['x'] == pytest.approx(met[edge['layer']][t, edge['i']].item(), abs=1e-4)
            assert edge['z'] * edge['share'] > 0
    assert repr(prompt[0]) in printed


def test_the_share_of_a_driven_edge_is_of_its_output(trained):
    """Against the values of that edge and of its output over the data."""
    source = Text(load(trained / 'out', 'best.pt'), '', 'val', 128, 64, 'cpu')
    names = ['transformer.h.0.mlp.kan.layers.1']
    known = watch(source.model, lambda: source.read(source.model), names, 128)
    ids = torch.tensor([TOKENIZER.encode('ROME')])
    met = watch(source.model, lambda: source.model(ids, ids), names, 4)
    (seen,), (one,) = known.values(), met.values()
    y, edges = seen.layer(seen.x), measure(seen)
    for t, driven in enumerate(drive(dict.fromkeys(known, edges), met, n=5)):
        for edge in driven:
            pair = [(edge['o'], edge['i'])]
            apart = values(one, pair)[t, 0] - values(seen, pair).mean()
            sd = values(seen, pair).std(correction=0)
            assert edge['z'] == pytest.approx((apart / sd).item(), rel=1e-3)
            assert edge['share'] == pytest.approx((apart / y[:, edge['o']].std(correction=0)).item(), rel=1e-3)
    assert edges.output_sd == pytest.approx(y.std(0, correction=0).tolist(), rel=1e-3)


def test_an_edge_that_the_data_never_moved_has_no_deviations():
    layer, x, other = KANLinear(2, 1), torch.randn(100, 2), torch.zeros(2, 2)
    x[:, 1] = 0.7
    (seen,), met = watch(layer, lambda: layer(x)).values(), watch(layer, lambda: layer(other))
    known = {'': measure(seen)}
    driven = drive(known, met)
    assert {edge['i']: math.isnan(edge['z']) for edge in driven[0]} == {0: False, 1: True}
    labels, rows = zip(*most_driven(known, met, driven, 2))
    assert [np.isnan(z).all() for z in rows] == ['1 -> 0' in label for label in labels]


# cut models


def costs_of(outcome):
    """{row: its numbers} of the table of a cut model, which says what the JSON does."""
    printed, result = outcome
    rows = [line.strip('| ').split(' | ') for line in printed.splitlines() if line.startswith('| ')][1:]
    assert [name for name, *_ in rows] == list(result['costs'])
    for name, *cells in rows:
        assert cells[:2] == [f'{result["costs"][name]["loss"]:.4f}', f'{result["costs"][name]["parameters"]:,}']
    return result['costs']


@pytest.fixture(scope='module')
def cut(trained):
    """The run with half of its edges cut and trained on, in cut/ and cut-tuned/, and what was printed."""
    return interpret(trained, prune=0.5, save='cut', tune=2)


def test_a_pruned_model_is_tuned_whatever_its_folder_is_called(trained):
    costs = costs_of(interpret(trained, prune=0.5, save='scratch', tune=2))
    _, pruned, tuned = costs.values()
    assert tuned['parameters'] == pruned['parameters'] and tuned['loss'] == pytest.approx(pruned['loss'], rel=0.5)
    assert load(trained / 'scratch-tuned')['config']['init_from'] == './scratch'


def test_tuning_that_is_stopped_is_saved_and_not_called_tuned(trained):
    command = [sys.executable, str(ROOT / 'interpret.py'), *flags(**SMALL, prune=0.5, save='stopped', tune=10**6)]
    process = subprocess.Popen(
        command, cwd=trained, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    lines = iter(process.stdout.readline, '')
    assert any(line.startswith('iter 20:') for line in lines)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does by Ctrl-C
    _, words = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and 'error: tuning did not come to its end, see above; stopped holds' in words
    assert load(trained / 'stopped-tuned')['iter_num'] >= 20


def test_one_folder_takes_one_pruned_model(trained):
    (trained / 'taken').mkdir()
    with FileLock(trained / 'taken' / 'run.lock'):
        assert "save='taken' is in use by another command" in complain(trained, prune=0.5, save='taken')
    (trained / 'taken' / 'gpt.json').write_text('{}')
    assert "save='taken' holds a model already" in complain(trained, prune=0.5, save='taken')


def test_edges_cut(trained, cut, dataset):
    before, after = load(trained / 'out', 'best.pt'), load(trained / 'cut', 'best.pt')
    assert after['model_args'] == {**before['model_args'], 'kan_bias': True, 'kan_mask': True}
    assert before['model_args']['dropout'] == 0.2
    assert all(after[key] == before[key] for key in ('config', 'tokenizer', 'data', 'iter_num'))
    model = ckpt.build_model(after)
    layers = kan_layers(model)
    assert len(layers) == len(LAYERS)
    for layer in layers.values():
        assert layer.mask.sum() == round(0.5 * layer.mask.numel())
        assert not layer.base_weight[~layer.mask].any() and not layer.spline_weight[~layer.mask].any()
        assert layer.bias.abs().sum() > 0
    costs = costs_of(cut)
    assert list(costs) == ['as trained', '50% of the edges cut', '50% of the edges cut, tuned for 2 iterations']
    n, n_cut = (sum(p.numel() for p in one.parameters()) for one in (ckpt.build_model(before), model))
    K = model.config.grid_size + model.config.spline_order
    n_cut -= (K + 2) * sum((~layer.mask).sum().item() for layer in layers.values())
    assert [cost['parameters'] for cost in costs.values()] == [n, n_cut, n_cut]
    source = Text(after, '', 'val', 128, 64, 'cpu')
    assert costs['50% of the edges cut']['loss'] == pytest.approx(source.loss(source.model), rel=1e-6)
    assert read_json((trained / 'cut' / 'report.json').read_text())['costs'] == costs


def test_a_cut_model_trains_on_with_its_mask(trained, cut, dataset):
    """By interpret.py itself, and when that run is resumed."""
    start, tuned = load(trained / 'cut', 'best.pt'), load(trained / 'cut-tuned')
    assert tuned['iter_num'] == 2 and tuned['config']['init_from'] == './cut'
    assert tuned['config']['learning_rate'] == pytest.approx(0.05 * 0.25)
    shutil.copytree(trained / 'cut-tuned', trained / 'again')
    train(trained, dataset, 'again', init_from='resume', max_iters=4, weight_decay=0.5, **MODEL)
    again = load(trained / 'again')
    assert again['iter_num'] == 4
    for state in tuned, again:
        for name in (name for name in start['model'] if name.endswith('.mask')):
            mask, splines = start['model'][name], state['model'][name.replace('mask', 'spline_weight')]
            assert torch.equal(state['model'][name], mask) and not splines[~mask].any() and splines[mask].any()
            assert not torch.equal(splines, start['model'][name.replace('mask', 'spline_weight')])


def test_a_cut_model_writes_and_is_measured(trained, cut):
    done = run_forked(trained, 'sample.py', *flags(out_dir='cut', device='cpu', max_new_tokens=5, num_samples=1))
    assert done.returncode == 0, done.stderr
    done = run_forked(trained, 'eval.py', '--out_dir=cut', '--device=cpu')
    assert done.returncode == 0 and math.isfinite(json.loads(done.stdout.splitlines()[-1])['loss']), done.stderr


def test_a_cut_model_is_looked_into_and_cut_again(trained, cut):
    """What is cut already stays cut, and goes first."""
    more = dict(random_too=False, losses=False, out_dir='cut', rows=64)
    interpret(trained, prune=0.75, save='twice', **more)
    once, twice = (ckpt.build_model(load(trained / name, 'best.pt')) for name in ('cut', 'twice'))
    for first, second in zip(kan_layers(once).values(), kan_layers(twice).values()):
        assert second.mask.sum() == round(0.25 * second.mask.numel()) and not (second.mask & ~first.mask).any()
    _, result = interpret(trained, layer=0, module='mlp.1', n_edges=1000, **more)
    (line, _) = result['layers']
    assert line['trained']['dead'] == pytest.approx(0.5)


@pytest.mark.parametrize('share', [0.0, 1.0])
def test_all_edges_or_none(trained, share):
    """Nothing cut is the same loss; with all cut, the layers give constants."""
    costs = costs_of(interpret(trained, prune=share, save=f'cut-{share}', layer=0, module='mlp.0'))
    first, second = (cost['loss'] for cost in costs.values())
    model = ckpt.build_model(load(trained / f'cut-{share}', 'best.pt'))
    masks = {short(name): layer.mask for name, layer in kan_layers(model).items()}
    cut = 100 * share * masks['h.0.mlp.0'].numel() / sum(mask.numel() for mask in masks.values())
    assert list(costs)[1] == f'{cut:.3g}% of the edges cut'
    assert all(mask.all() for name, mask in masks.items() if name != 'h.0.mlp.0')
    assert masks['h.0.mlp.0'].all() if share == 0 else not masks['h.0.mlp.0'].any()
    assert (first == second) == (share == 0)


def test_neurons_cut(trained):
    """Smaller tensors that do what the model with masked edges does, and train on."""
    costs = costs_of(interpret(trained, prune=0.5, prune_by='neurons', save='smaller'))
    before, after = load(trained / 'out', 'best.pt'), load(trained / 'smaller', 'best.pt')
    assert after['model_args'] == {
        **before['model_args'],
        **dict(kan_hidden=0.75, kan_bias=True, kan_mask=False),
    }
    model = ckpt.build_model(after)
    assert [block.mlp.kan.layers[0].out_features for block in model.transformer.h] == [6]
    now, then = costs['50% of the neurons cut'], costs['as trained']
    biases = sum(layer.out_features for layer in kan_layers(model).values())
    assert now['parameters'] == sum(p.numel() for p in model.parameters())
    assert now['parameters'] == then['parameters'] - 2 * 6 * 8 * 10 + biases and now['mb'] < then['mb']
    train(trained, after['config']['dataset'], 'smaller-on', init_from='smaller', max_iters=1, **MODEL)
    assert load(trained / 'smaller-on')['model_args']['kan_hidden'] == 0.75


def test_as_many_neurons_of_every_block(tmp_path, dataset):
    make_checkpoint(tmp_path / 'out', **{**MODEL, 'n_layer': 2})
    interpret(tmp_path, dataset=dataset, prune=0.25, prune_by='neurons', save='smaller')
    model = ckpt.build_model(load(tmp_path / 'smaller', 'best.pt'))
    assert [block.mlp.kan.layers[1].in_features for block in model.transformer.h] == [9, 9]


def test_a_share_of_neurons_never_leaves_none(trained):
    costs = costs_of(interpret(trained, prune=1.0, prune_by='neurons', save='least'))
    hidden = ckpt.build_model(load(trained / 'out', 'best.pt')).transformer.h[0].mlp.kan.layers[1].in_features
    assert f'{100 * (1 - 1 / hidden):.3g}% of the neurons cut' in costs
    assert load(trained / 'least', 'best.pt')['model_args']['kan_hidden'] == 1 / 8


# other models


def test_a_checkpoint_of_nanogpkant(tmp_path, dataset):
    """Without a name of its KAN layers, of its data set and of its vocabulary."""
    sizes = dict(SHAPE, n_embd=6, vocab_size=TOKENIZER.vocab_size, bias=False, dropout=0.2)
    model = GPT(GPTConfig(**sizes, use_kan=True, kan_targets='attn,mlp'))
    (tmp_path / 'out').mkdir()
    torch.save({'model': model.state_dict(), 'model_args': sizes}, tmp_path / 'out' / 'ckpt.pt')
    _, result = interpret(tmp_path, dataset=dataset, prompt='RO', rows=48)
    found = {edge['layer'] for token in result['tokens'] for edge in token['edges']}
    assert found == {'h.0.attn.c_attn.0', 'h.0.attn.c_proj.0', 'h.0.mlp.0', 'h.0.mlp.1'}
    interpret(tmp_path, dataset=dataset, prune=0.5, save='cut')
    words = complain(tmp_path, dataset=dataset, prune=0.5, save='tuned', tune=1)
    assert 'out does not say how it was trained: leave tune out, and tune it by train.py' in words
    assert not (tmp_path / 'tuned').exists()
    assert 'which data? name it by --dataset' in complain(tmp_path)


PRELUDE = """
from pathlib import Path

from data import loader, tokenizer
from helpers import Words

loader.DATA = str(Path(__file__).resolve().parent / 'data')
tokenizer.GPT2Tokenizer = loader.GPT2Tokenizer = Words
tokenizer.KINDS['gpt2'] = (Words, [])
"""


@pytest.fixture
def tuned(tmp_path):
    """A folder with a model in out/ as finetune.py leaves one with KAN adapters, its task, and a prelude of scripts."""
    state = make_checkpoint(tmp_path / 'base', n_embd=8, block_size=72, vocab_size=Words.vocab_size + 3)
    state['tokenizer'] = {'kind': 'gpt2'}
    torch.save(state, tmp_path / 'base' / 'ckpt.pt')
    (tmp_path / 'data' / 'sst').mkdir(parents=True)
    (tmp_path / 'data' / 'sst' / 'meta.json').write_text('{}')
    rows = [f'{i}\tdev-{i}\ta {"very " * i}good film\t{i % 5}\n' for i in range(6)]
    (tmp_path / 'data' / 'sst' / 'dev.csv').write_text(HEADERS['sst'] + ''.join(rows))
    (tmp_path / 'small.py').write_text(PRELUDE)
    settings = settings_of('finetune.py', [str(ROOT / f'config/finetune/{name}.py') for name in ('sst', 'kan_lora')])
    settings.update(init_from='base', lora_rank=2)
    model = task_model.make_task_model(ckpt.build_model(state), Words(), settings)
    for name, p in model.named_parameters():
        if 'phi_out' in name:
            torch.nn.init.normal_(p)
    kept = {key: state[key] for key in ('model_args', 'tokenizer', 'iter_num')}
    (tmp_path / 'out').mkdir()
    torch.save({**kept, 'model': model.state_dict(), 'finetune': settings}, tmp_path / 'out' / 'ckpt.pt')
    return tmp_path


def test_adapters_of_finetune_on_their_task(tuned):
    """On the tokens of its examples alone, without padding."""
    how = dict(modules=str(tuned), prelude='small')
    settings = dict(SMALL, rows=1000, module='c_fc')
    done = run_forked(tuned, 'interpret.py', *flags(**settings), **how)
    assert done.returncode == 0, done.stderr
    result = read_json(done.stdout.splitlines()[-1])
    assert result['data'] == '3 examples of dev of sst'
    first, second, _ = result['layers']
    assert (first['layer'], second['layer']) == tuple(f'h.0.mlp.c_fc.default.bottleneck.phi_{n}' for n in ('in', 'out'))
    assert second['random']['dead'] == 1 and second['random']['close'] is None and second['trained']['dead'] == 0
    assert result['losses']['full'] != result['losses']['by_activity'][-1]
    done = run_forked(tuned, 'interpret.py', *flags(**settings, prompt='good'), **how)
    tokens = read_json(done.stdout.splitlines()[-1])['tokens']
    assert done.returncode == 0 and ''.join(line['token'] for line in tokens) == 'good', done.stderr
    words = complaint(tuned, 'interpret.py', *flags(**settings, split='train'), **how)
    assert 'dataset and split are of texts, and out is looked at with dev of its task' in words
    words = complaint(tuned, 'interpret.py', *flags(**settings, prune=0.5, save='cut'), **how)
    assert 'out holds a run of finetune.py: only models of train.py can be saved pruned' in words


@pytest.mark.usefixtures('seed')
def test_an_adapter_that_has_not_learned():
    """Its second layer is all zeros: no edge of it is alive, and figures of others are as they were."""
    model = GPT(GPTConfig(**SHAPE, vocab_size=20, dropout=0.0)).eval()
    add_lora(model, LoRAConfig(kind='kan', rank=2, dropout=0.0, target_modules=('c_fc',)))
    ids = torch.arange(64).remainder(20).view(4, 16)
    first, second = layers = look(model, lambda: model(ids), n_edges=3)
    assert [layer.name for layer in layers] == [
        'h.0.mlp.c_fc.default.bottleneck.phi_in',
        'h.0.mlp.c_fc.default.bottleneck.phi_out',
    ]
    assert summarize(second)['dead'] == 1 and math.isnan(summarize(second)['close'])
    assert {formula.family for formula in second.formulas} == {'constant'}
    whole = total_of(layers)
    assert whole['close'] == pytest.approx(summarize(first)['close'])
    assert '| – |' in table(facts(layers, None)) and facts(layers, layers)[-1]['layer'] == 'all'


@pytest.mark.usefixtures('seed')
@torch.no_grad()
def test_outputs_that_do_not_vary_have_no_sum():
    layer, x = KANLinear(3, 4), torch.randn(200, 3)
    layer.base_weight[[0, 2]] = 0
    layer.spline_weight[[0, 2]] = 0
    (found,) = look(layer, lambda: layer(x))
    assert sorted(o for o, _ in neurons(found)) == [1, 3]


@pytest.mark.usefixtures('seed')
def test_the_strongest_terms_of_a_neuron_explain_its_variance():
    layer = KANLinear(5, 3)
    with torch.no_grad():
        layer.spline_weight.normal_()
        layer.spline_weight[1] *= 3
    x = torch.randn(400, 5)
    (found,) = look(layer, lambda: layer(x))
    (o, terms), *_ = neurons(found, n_terms=5)
    written, explained = zip(*terms)
    features = [int(str(term.free_symbols.pop()).removeprefix('x_')) for term in written]
    assert o == 1 and sorted(features) == list(range(5))
    left, functions = (
        layer(x)[:, 1].detach().numpy(),
        {'silu': lambda z: z / (1 + np.exp(-z)), 'relu': lambda z: z * (z > 0)},
    )
    variance = left.var()
    for n, (i, term) in enumerate(zip(features, written)):
        left = left - sympy.lambdify(f'x_{i}', term, [functions, 'numpy'])(x[:, i].numpy())
        assert explained[n] == pytest.approx(1 - left.var() / variance, abs=0.02)  # three digits are written


# bad input: one line that says what is wrong


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(prune=0.5), 'both or none; tune wants both'),
        (dict(save='cut'), 'both or none; tune wants both'),
        (dict(tune=3), 'both or none; tune wants both'),
        (dict(prune=1.5, save='cut'), 'between 0 and 1, got 1.5'),
        (dict(prune=-0.5, save='cut'), 'between 0 and 1, got -0.5'),
        (dict(prune=0.5, save='cut', prune_by='layers'), "prune_by edges or neurons, got 'val' and 'layers'"),
        (dict(prune=0.5, save='new', prune_by='neurons', layer=0), 'prune_by=neurons cuts those of all KAN MLPs'),
        (dict(prune=0.5, save='out'), "save='out' holds a model already: name another folder"),
        (dict(split='test'), 'expected split train or val'),
        (dict(topk=25), 'topk=25: a figure shows 24 edges at most'),
        (dict(rows=0), 'rows must be at least 1, got 0'),
        (dict(layer=7), "layer=7, module='': no KAN layer; there are h.0.mlp.0, h.0.mlp.1, "),
        (dict(module='mlp.7'), "layer=-1, module='mlp.7': no KAN layer"),
        (dict(prompt='R' * 17), 'the prompt has 17 tokens, expected 1 to 16'),
        (dict(prompt='Z'), "'Z'"),
        (dict(out_dir='nowhere'), "no checkpoint in 'nowhere'"),
        (dict(dataset='shakespear'), "no data set 'shakespear'"),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, dict) else '',
)
def test_bad_settings(trained, settings, words):
    before = sorted(path.name for path in trained.iterdir())
    assert words in complain(trained, **settings)
    assert sorted(path.name for path in trained.iterdir()) == before


@pytest.mark.parametrize('kind', ['edge', 'channel'])
@pytest.mark.parametrize('by', ['edges', 'neurons'])
def test_no_way_of_pruning_that_fails_is_advised(tmp_path, dataset, kind, by):
    """Of a model whose MLPs have no functions."""
    sizes = dict(SHAPE, n_embd=6, vocab_size=TOKENIZER.vocab_size, use_kan=True, kan_kind=kind, kan_targets='attn')
    model = GPT(GPTConfig(**sizes))
    (tmp_path / 'out').mkdir()
    torch.save({'model': model.state_dict(), 'model_args': sizes}, tmp_path / 'out' / 'ckpt.pt')
    if (kind, by) == ('edge', 'edges'):
        interpret(tmp_path, dataset=dataset, prune=0.5, save='cut', prune_by=by)
        return
    words = complain(tmp_path, dataset=dataset, prune=0.5, save='cut', prune_by=by)
    assert ('--prune_by=' in words) == (kind == 'edge'), words


def test_a_second_look_leaves_no_figure_of_the_first(tmp_path, trained, dataset):
    """That it does not draw anew: of losses that are not asked for, of a history that is not there."""
    (tmp_path / 'out').mkdir()
    shutil.copy(trained / 'out' / 'best.pt', tmp_path / 'out')
    folder = tmp_path / 'look'
    folder.mkdir()
    for name in 'pruning.png', 'pruning.svg', 'growth.png', 'growth.svg', 'pruning.txt', 'prompt.png':
        (folder / name).write_text('of an earlier look')
    interpret(tmp_path, dataset=dataset, random_too=False, losses=False, module='mlp.0', folder='look')
    left = {path.name for path in folder.iterdir()} - FILES
    expected = {f'{name}.{suffix}' for name in ('edges-h.0.mlp.0', 'activity', 'r2') for suffix in ('png', 'svg')}
    assert left == expected | {'pruning.txt', 'prompt.png'}


def test_a_model_without_kan_layers(tmp_path, dataset):
    make_checkpoint(tmp_path / 'out')
    words = complain(tmp_path, dataset=dataset)
    assert words == 'error: out holds a model without KAN layers: there are no learned functions to look into\n'
    assert not (tmp_path / 'out' / 'interpret').exists()


@pytest.mark.parametrize('name', ['transformer.h.0.mlp.kan.layers.0.spline_weight', 'lm_head.layers.0.base_weight'])
def test_weights_that_are_nan(trained, tmp_path, name):
    """Of the first layer, which others read, or of the last."""
    state = load(trained / 'out', 'best.pt')
    state['model'][name].view(-1)[5] = math.nan
    (tmp_path / 'out').mkdir()
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    assert 'NaN' in complain(tmp_path)


def test_another_vocabulary_and_too_little_data(trained, tmp_path):
    other = write_dataset(tmp_path / 'other', tokenizer=CharTokenizer(TOKENIZER.chars[::-1]))
    assert 'has another vocabulary than the model' in complain(trained, dataset=other)
    short_one = write_dataset(tmp_path / 'short', n_val=20)
    assert 'holds one window of 16 tokens' in complain(trained, dataset=short_one)


def test_the_run_has_kept_its_history(trained):
    """train.py's keep_history, as growth.png wants it."""
    log, kept = read_log(trained / 'out'), sorted(Path(trained, 'out', 'history').iterdir())
    assert [path.name for path in kept] == [f'{line["iter"]:08d}.pt' for line in log]


def test_a_share_of_channels_is_what_was_cut(tmp_path, dataset):
    for width, share in (0.5, '25'), (0.7, '27.3'):  # two of eight, three of 11 (of 11.2)
        make_checkpoint(tmp_path / 'out', use_kan=True, kan_kind='channel', mlp_hidden=width)
        costs = costs_of(interpret(tmp_path, dataset=dataset, prune=0.3, prune_by='neurons', save=f'smaller-{width}'))
        assert f'{share}% of the neurons cut' in costs


def test_channels_that_add_least_are_cut(tmp_path, dataset):
    """However much they vary themselves; a bias takes over what they gave on average."""
    state, means = make_checkpoint(tmp_path / 'out', use_kan=True, kan_kind='channel', mlp_hidden=0.5, bias=True), []
    into, out = (state['model'][f'transformer.h.0.mlp.{name}.weight'] for name in ('c_fc', 'c_proj'))
    into[[2, 5]] *= 10
    out[:, [2, 5]] *= 1e-2
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    interpret(tmp_path, dataset=dataset, prune=0.25, prune_by='neurons', save='smaller')
    left = load(tmp_path / 'smaller', 'best.pt')['model']['transformer.h.0.mlp.c_proj.weight']
    assert torch.equal(left, out[:, [0, 1, 3, 4, 6, 7]])
    for name, file in ('out', 'ckpt.pt'), ('smaller', 'best.pt'):
        source, met = Text(load(tmp_path / name, file), dataset, 'val', 128, 64, 'cpu'), []
        source.model.transformer.h[0].mlp.register_forward_hook(lambda mlp, inputs, y, met=met: met.append(y))
        source.read(source.model)
        means.append(torch.cat(met).flatten(0, 1).mean(0))
    assert torch.allclose(*means, atol=1e-6)


def test_neurons_that_add_least_are_cut(tmp_path, dataset):
    """However much they vary themselves."""
    state = make_checkpoint(tmp_path / 'out', **MODEL)
    into, out, splines = (
        state['model'][f'transformer.h.0.mlp.kan.layers.{name}_weight'] for name in ('0.base', '1.base', '1.spline')
    )
    into[[2, 5]] *= 10
    out[:, [2, 5]] *= 1e-3
    splines[:, [2, 5]] *= 1e-3
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    interpret(tmp_path, dataset=dataset, prune=1 / 6, prune_by='neurons', save='smaller')
    left = load(tmp_path / 'smaller', 'best.pt')['model']['transformer.h.0.mlp.kan.layers.1.base_weight']
    assert torch.equal(left, out[:, [0, 1, 3, 4, *range(6, 12)]])


@pytest.mark.parametrize('task', ['sst', 'sonnets'])
def test_examples_for_losses_are_others_than_those_for_statistics(monkeypatch, task):
    """Their loss is that of an answer, of sonnets that of a token."""
    examples = [Example(str(i), [*range(3 + 2 * i)], i % 5, 'x' * (task == 'sonnets')) for i in range(6)]
    settings = settings_of('finetune.py', flags(task=task, finetune_mode='full', use_lora=False))
    gpt = GPT(GPTConfig(**SHAPE, vocab_size=Words.vocab_size + 3, dropout=0.0))
    model = task_model.make_task_model(gpt, Words(), settings)
    monkeypatch.setattr(task_model, 'load_task_model', lambda checkpoint, dropout: (model, Words()))
    monkeypatch.setattr(prompts, 'prepare_task', lambda name: None)
    monkeypatch.setattr(prompts, 'read_examples', lambda *args: examples)
    source = Examples({'finetune': settings}, 1000, 1000, 'cpu')
    # in an order of their own, as the files of some tasks are sorted by label
    assert [[example.id for example in half] for half in source.halves] == [['4', '1', '5'], ['2', '0', '3']]
    losses = [source.mean_loss(model, [example]) for example in source.halves[1]]
    n = [len(example.ids) - 1 if task == 'sonnets' else 1 for example in source.halves[1]]
    assert source.loss(model) == pytest.approx(np.average(losses, weights=n), rel=1e-5)
