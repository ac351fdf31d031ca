"""Time and memory of layers, of training steps and of sampling: ours and, where installed, those of others, in one run.

    python study/bench.py --suite=layer
    python study/bench.py --suite=activation
    python study/bench.py --suite=step --only='micro (vanilla|KAN)' --dropout=0
    python study/bench.py --suite=sample
    python study/bench.py --suite=adapter
    python study/bench.py --suite=mlp
    python study/bench.py --suite=graph

Suite activation has learned activations beside those they begin as, `gated` with a value for each gate; its floor is a
copy of as many bytes as are read and written. `pip install -r requirements-all.txt` and `pip install --no-deps
kan-gpt==1.2.0 kolmg-lora==1.0.1` bring the others; of kan-gpt its copy of efficient-kan is measured. Suite mlp has
training steps of GPTs of equal parameters whose MLPs have fixed or learned activations; as these differ by a few per
cent, one process takes their steps in turn. Suite graph has the layers that look at earlier tokens, and the share of a
training step that finds edges. On a CPU each case has processes of its own, one per round, so that its peak memory is
its own; a GPU counts memory by itself. The rounds interleave the cases. Prints a table, then one line of JSON with
every number in it.
"""

import functools
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from configurator import ROOT, check_ranges, configure, flags_of, settings_of
from kan import KAN, ChannelSpline, KANLinear
from layers import channel, spline
from layers.graph import Edges
from model import GPT, Block, GPTConfig, model_settings
from run.checkpoint import versions
from run.cost import make_step
from run.device import autocast, clock, device_name, peak_memory, pick_device, pick_dtype, profile, set_up
from study import win
from study.speed import make_table
from surgery.lora import LoRAConfig, add_lora

# -----------------------------------------------------------------------------
suite = 'layer'  # 'layer', 'activation', 'step', 'mlp', 'sample', 'adapter' or 'graph'
device = 'auto'  # 'cuda', 'cuda:0', 'mps', 'cpu'; auto takes the first there is
dtypes = 'float32,bfloat16'  # any of float32, bfloat16, float16, joined by commas; the latter two by autocast
rounds = 3  # processes of each case
repeats = 3  # timed repeats in each process, after an untimed one
only = ''  # only the cases whose description this regular expression finds, e.g. 'float32 micro (vanilla|KAN)'
dropout = -1.0  # of the models of suite step and of adapters; -1 is what their config files and LoRAConfig say
operators = 0  # also list this many operators of each case, those that take most of the time of one more run
compile = True  # torch.compile the models of suite step, on a GPU
keep = True  # keep freed memory, as train.py does on a CPU; False: PyTorch as it comes
case = ''  # what a process measures, as JSON
# -----------------------------------------------------------------------------
configure(globals())
device = pick_device(device)

PEERS = {'efficient-kan': 'kan_gpt', 'inkan': 'inkan', 'peft': 'peft', 'kolmg-lora': 'kolmg_lora'}  # and their packages
PEER_LAYERS = {'efficient-kan': ('kan_gpt.efficient_kan.model', 'KANLinear'), 'inkan': ('inkan', 'KANLayer')}
PASSES = {'KANLinear, compiled passes': 'compiled', 'KANLinear, plain passes': 'plain'}  # backends of spline.py
LAYERS = ['floor', 'nn.Linear', 'KANLinear', *PASSES, 'efficient-kan', 'inkan']
ACTIVATIONS = ['floor', 'GELU', 'ChannelSpline', 'ChannelSpline, plain passes']
GATES = ['floor, gated', 'SwiGLU, gated', 'ChannelSpline, gated', 'ChannelSpline, gated, plain passes']
# GPTs, and the end of their config's name; a peer's layers take the place of ours
MODELS = {'vanilla': '', 'vanilla, equal parameters': '_balanced', 'vanilla, 16 layers': '_boosted'}
MODELS.update(dict.fromkeys(LAYERS[2:], '_kan'))
SIZES = ['micro', 'nano']
ADAPTERS = {  # settings of LoRAConfig, and who else has it
    'LoRA': (dict(), 'peft'),
    'rsLoRA': (dict(rs_lora=True), 'peft'),
    'DoRA': (dict(use_dora=True), 'peft'),
    'KAN-LoRA': (dict(kind='kan'), 'kolmg-lora'),
    'KAN-DoRA': (dict(kind='kan', use_dora=True), 'kolmg-lora'),
}
ATTENTIONS = {  # settings of the layer
    'self-attention': dict(),
    'GAT': dict(use_graph=True),
    'GATv2': dict(use_graph=True, graph_kind='gatv2'),
    'GAT, window by mask': dict(use_graph=True, graph_edges='window', graph_backend='dense'),
    'GAT, window by list': dict(use_graph=True, graph_edges='window', graph_backend='pyg'),
}
KAN_GLU = win.FAMILIES['KAN-GLU']
MLPS = {'SwiGLU': win.FAMILIES['SwiGLU'], **win.FAMILIES}
MLPS.update({f'KAN-GLU of order {k}': dict(KAN_GLU, spline_order=k) for k in (1, 3)})
ADAPTED = [name for adapter, (_, peer) in ADAPTERS.items() for name in (f'{adapter}, {peer}', adapter)]
SHAPES = ['192 768 16384', '768 192 16384', '96 384 2048', '768 3072 2048']  # features in, features out, rows
ATTENTION_SHAPES = ['192 6 512 8', '768 12 512 8']  # width, heads of self-attention, tokens, sequences
LENGTHS = ['256 255', '256 500', '512 500']  # block_size, new tokens
SAMPLED = [f'{config} {lengths}' for config in ('micro', 'micro_kan') for lengths in LENGTHS]
EDGES = ['no edges', 'causal edges', 'window edges', 'topk edges', 'same edges']
SUITES = {  # where each measures, and what
    'layer': [(SHAPES, LAYERS)],
    'activation': [(['256 16384'], ACTIVATIONS), (['512 16384'], GATES)],  # numbers in a row, rows
    'step': [(SIZES, MODELS)],
    'mlp': [([*win.SHAPES, 'micro'], MLPS)],
    'sample': [(SAMPLED, ['uncached', 'cached'])],
    'adapter': [(['768 768 8192'], ['nn.Linear', *ADAPTED])],
    'graph': [(ATTENTION_SHAPES, ATTENTIONS), (SIZES, EDGES)],
}


def list_cases():
    """What there is to measure: [dtype, where, name] each."""
    if suite not in SUITES:
        raise ValueError(f'suite={suite!r}: expected {", ".join(SUITES)}')
    precisions, cases = [pick_dtype(dtype, device) for dtype in dtypes.split(',')], []
    for wheres, names in SUITES[suite]:
        cases += [[dtype, where, name] for where in wheres for dtype in precisions for name in names]
    if not device.startswith('cuda'):
        cases = [case for case in cases if not case[2].endswith('compiled passes')]  # C++ is faster
    cases = [case for case in cases if case[1:] != ['nano', 'vanilla, 16 layers']]  # there is none
    named = {peer: package for peer, package in PEERS.items() if any(case[2].endswith(peer) for case in cases)}
    missing = [peer for peer, package in named.items() if importlib.util.find_spec(package) is None]
    try:
        chosen = [case for case in cases if not case[2].endswith(tuple(missing)) and re.search(only, ' '.join(case))]
    except re.error as error:
        raise ValueError(f'only={only!r} is not a regular expression: {error}') from None
    if not chosen:
        examples = ', '.join(repr(' '.join(case)) for case in cases[:3])
        raise ValueError(f'only={only!r} finds no case; there are, e.g., {examples}')
    if missing:
        print(f'not installed, left out: {", ".join(missing)} (see requirements-all.txt)', file=sys.stderr)
    return chosen


def make_layer(name, I, O):
    if name in PEER_LAYERS:
        module, layer = PEER_LAYERS[name]
        return getattr(importlib.import_module(module), layer)(I, O)
    if name.partition(',')[0] in ADAPTERS:
        return make_adapted(name, I, O)
    return nn.Linear(I, O, bias=False) if name == 'nn.Linear' else KANLinear(I, O)


def make_adapted(name, I, O):
    """A frozen linear layer with an adapter of rank 16, ours or a peer's."""
    name, _, peer = name.partition(', ')
    options, model = ADAPTERS[name][0], nn.Sequential(nn.Linear(I, O))
    p = LoRAConfig.dropout if dropout < 0 else dropout
    if peer == 'peft':
        from peft import LoraConfig, get_peft_model

        options = dict(use_dora=options.get('use_dora', False), use_rslora=options.get('rs_lora', False))
        get_peft_model(model, LoraConfig(target_modules=['0'], r=16, lora_alpha=32, lora_dropout=p, **options))
    elif peer == 'kolmg-lora':
        from kolmg_lora import add_kolmg_lora

        add_kolmg_lora(model, target_modules=['0'], dropout=p, use_dora=options.get('use_dora', False))
    else:
        add_lora(model, LoRAConfig(target_modules='0', dropout=p, **options))
    return model


# what a process measures: each prepare_... returns a function that runs once and returns its seconds


def prepare_layer(dtype, where, name):
    I, O, N = map(int, where.split())
    if name != 'floor':
        return time_layer(make_layer(name, I, O), torch.randn(N, I), torch.randn(N, O), dtype)
    # the products of a KAN layer of eight bases and an activation, multiplied by all of them, on inputs that are ready
    ready = getattr(torch, dtype)
    layer, x = nn.Linear(9 * I, O, bias=False), torch.randn(N, 9 * I)
    return time_layer(layer.to(ready), x.to(ready), torch.randn(N, O), dtype)


def time_layer(layer, x, g, dtype, forward=None):
    """Forward and backward pass on inputs x, with g the gradients of the outputs; `forward` calls the layer. On a GPU
    the mean of passes one after another, so that it waits for no launch.
    """
    layer.to(device)
    x, g = x.to(device).requires_grad_(), g.to(device, getattr(torch, dtype))
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    n = 20 if device.startswith('cuda') else 1

    def run():
        t0 = clock(device)
        for _ in range(n):
            y = None  # or the graphs of two passes would be in memory
            with autocast(device, dtype):
                y = (forward or layer)(x)
        t1 = clock(device)
        for i in range(n):
            torch.autograd.grad(y, inputs, g, retain_graph=i < n - 1)
        return {'forward': (t1 - t0) / n, 'backward': (clock(device) - t1) / n}

    return run


def prepare_activation(dtype, where, name):
    R, N = map(int, where.split())
    gated = 'gated' in name
    C = R // 2 if gated else R
    if name.startswith('floor'):
        return prepare_copies(N, {'forward': (R + C) // 2, 'backward': (2 * R + C) // 2}, dtype)
    if name.startswith('ChannelSpline'):
        layer = ChannelSpline(C, spline_order=2, base_activation=nn.SiLU if gated else nn.GELU)
    else:
        layer = SwiGLU() if gated else nn.GELU()
    ready = getattr(torch, dtype)
    forward = functools.partial(layer, gated=True) if gated else layer
    return time_layer(layer, torch.randn(N, R, dtype=ready), torch.randn(N, C), dtype, forward)


class SwiGLU(nn.Module):
    def forward(self, x, gated):
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


def prepare_copies(N, widths, dtype):
    """Copies of N rows, {part: numbers in a row}."""
    sources = {part: torch.randn(N, width, device=device).to(getattr(torch, dtype)) for part, width in widths.items()}
    targets = {part: torch.empty_like(source) for part, source in sources.items()}

    def run():
        seconds = {}
        for part, target in targets.items():
            t0 = clock(device)
            target.copy_(sources[part])
            seconds[part] = clock(device) - t0
        return seconds

    return run


def make_gpt(config, vocab_size=65, **overrides):
    """The model of a config file, and its settings."""
    settings = settings_of('train.py', [os.path.join(ROOT, f'config/train_shakespeare_char_{config}.py')])
    settings.update(overrides)
    return GPT(GPTConfig(vocab_size=vocab_size, **model_settings(settings))), settings


def prepare_step(dtype, where, name):
    """A training step as in train.py."""
    changed = {} if dropout < 0 else {'dropout': dropout}
    if suite == 'mlp':
        size = win.SIZES.get(where, {})
        where = 'nano' if size else where
        width = size.get('n_embd') or make_gpt(where)[1]['n_embd']
        changed.update(size | win.at_equal_parameters(MLPS[name], width))
        changed['vocab_size'] = win.VOCABULARIES[size.get('dataset', win.COMMON['dataset'])]
    raw_model, settings = make_gpt(where + MODELS.get(name, ''), **changed)
    for module in raw_model.modules():
        if isinstance(module, KAN) and name in PEERS:
            others = [make_layer(name, layer.in_features, layer.out_features) for layer in module.layers]
            # they take matrices only
            rows, sequences = nn.Flatten(0, -2), nn.Unflatten(0, (-1, settings['block_size']))
            module.layers = nn.ModuleList(nn.Sequential(rows, other, sequences) for other in others)
    raw_model.to(device)
    sizes = settings['batch_size'], settings['gradient_accumulation_steps']
    step = make_step(raw_model, *sizes, device, dtype, compile, settings['muon'])
    return lambda: {'step': step()}


def prepare_sample(dtype, where, name):
    config, block_size, n_tokens = where.split()
    model = make_gpt(config, block_size=int(block_size))[0].to(device).eval()
    start = torch.zeros(1, 1, dtype=torch.long, device=device)

    def run():
        t0 = clock(device)
        with autocast(device, dtype):
            model.generate(start, int(n_tokens), temperature=0, use_cache=name == 'cached')
        return {'sample': clock(device) - t0}

    return run


def prepare_graph(dtype, where, name):
    if where in SIZES:
        return prepare_graph_step(dtype, where, name.removesuffix(' edges'))
    C, n_head, T, B = map(int, where.split())
    config = GPTConfig(n_embd=C, n_head=n_head, block_size=T, bias=False, graph_place='attention', **ATTENTIONS[name])
    layer, ids = Block(config).attn, torch.zeros(B, T, dtype=torch.long, device=device)

    def forward(x):  # graph attention finds its edges in each pass
        return layer(x, edges=Edges(config, ids) if config.use_graph else None)

    return time_layer(layer, torch.randn(B, T, C), torch.randn(B, T, C), dtype, forward)


def prepare_graph_step(dtype, size, edges):
    """A training step of a GPT with graph layers, and how much of it finds edges: the same ones, found once more."""
    model, settings = make_gpt(size, **({} if edges == 'no' else dict(use_graph=True, graph_edges=edges)))
    model.to(device)
    B, T, C = settings['batch_size'], settings['block_size'], settings['n_embd']
    idx, x = torch.randint(65, (B, T), device=device), torch.randn(B, T, C, device=device)
    layers = [block.graph for block in model.transformer.h if block.graph is not None]
    step = make_step(model, B, settings['gradient_accumulation_steps'], device, dtype)

    def find_edges():
        t0 = clock(device)
        for _ in range(settings['gradient_accumulation_steps']):
            found = Edges(model.config, idx)
            for layer in layers:
                found.bias(x) if layer.dense else found.list(x)
        return clock(device) - t0

    def run():
        seconds = step()
        finding = find_edges() if layers else 0.0
        return {'edges': finding, 'rest': seconds - finding}

    return run


def prepare(*case):
    others = {'activation': prepare_activation, 'sample': prepare_sample, 'graph': prepare_graph}
    others.update(dict.fromkeys(('step', 'mlp'), prepare_step))
    return others.get(suite, prepare_layer)(*case)


def measure(dtype, where, name):
    """One round of one case."""
    spline.BACKEND = PASSES.get(name, 'auto')
    channel.BACKEND = 'plain' if name.endswith('plain passes') else 'auto'
    torch.manual_seed(0)
    if device.startswith('cuda'):
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory(device)
    run = prepare(dtype, where, name)
    run()
    found = dict(seconds=[run() for _ in range(repeats)], peak_bytes=peak_memory(device) - before)
    return dict(found, operators=profile(run, device)[:operators] if operators else [])


def measure_apart(*case):
    """The same in a process of its own; ValueError with the last line it says where it fails."""
    settings = dict(suite=suite, device=device, repeats=repeats, dropout=dropout, operators=operators, keep=keep)
    command = [sys.executable, __file__, *flags_of(settings)]
    done = subprocess.run([*command, f'--case={json.dumps(case)}'], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().split('\n')[-1] or f'ended by signal {-done.returncode}')
    return json.loads(done.stdout.split('\n')[-2])


def run_rounds(cases):
    """[{dtype, where, name, seconds: {part: [...]}, peak_bytes}] of all rounds, with `error` where a case fails."""
    rows = [dict(dtype=dtype, where=where, name=name, seconds={}, peak_bytes=0) for dtype, where, name in cases]
    for row in tqdm(rows * (1 if suite == 'mlp' else rounds), unit='case', disable=None):
        if 'error' in row:
            continue
        try:
            result = (measure if device.startswith('cuda') else measure_apart)(row['dtype'], row['where'], row['name'])
        except Exception as error:  # of others' layers, too, and of a card that is too small: the other cases go on
            row['error'] = str(error).strip().split('\n')[-1] or type(error).__name__
            continue
        row['peak_bytes'] = max(row['peak_bytes'], result['peak_bytes'])
        row['operators'] = result['operators']
        for repeat in result['seconds']:
            for part, seconds in {**repeat, 'total': sum(repeat.values())}.items():
                row['seconds'].setdefault(part, []).append(seconds)
    if suite == 'mlp':
        take_turns([row for row in rows if 'error' not in row])
    return rows


def take_turns(rows):
    """Time the cases in turn, again and again, so that whatever the machine does meanwhile meets all alike."""
    runs = [prepare(row['dtype'], row['where'], row['name']) for row in rows]
    for run in runs:
        run()
    taken = [[run()['step'] for run in runs] for _ in range(rounds * repeats)]
    for row, seconds in zip(rows, zip(*taken)):
        row['seconds'] = {'step': seconds, 'total': seconds}


check_ranges(globals(), at_least_one='rounds repeats')
set_up(device, keep)
if case:
    print(json.dumps(measure(*json.loads(case))))
else:
    rows = run_rounds(list_cases())
    print(make_table(rows))
    for name, count, seconds in (operator for row in rows for operator in row.get('operators', [])):
        print(f'{name:64.64} {count:6} times {seconds * 1e3:9.1f} ms')
    about = dict(suite=suite, rounds=rounds, repeats=repeats, dropout=dropout, keep=keep, compile=compile)
    about.update(hardware=device_name(device), threads=torch.get_num_threads(), versions=versions())
    print(json.dumps({**about, 'rows': rows}))
    if all('error' in row for row in rows):
        sys.exit('error: every case failed')
