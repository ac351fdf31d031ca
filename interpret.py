"""Look inside a trained KAN-GPT: draw its functions, write them down, cut off what does little.

    python interpret.py --out_dir=out-shakespeare-char-nano-kan
    python interpret.py --out_dir=out-shakespeare-char-nano-kan --layer=0 --module=mlp.0 --topk=12
    python interpret.py --out_dir=out-shakespeare-char-nano-kan --prompt="ROMEO:"
    python interpret.py --out_dir=out-shakespeare-char-nano-kan --prune=0.2 --save=out-pruned --tune=100
    python interpret.py --out_dir=out-shakespeare-char-nano-kan --prune=0.5 --prune_by=neurons --save=out-smaller
    python interpret.py --out_dir=out-finetune-sst-kan-lora   # KAN adapters, on the examples of their task

Into out_dir/interpret go interpret.html, formulas.txt, .tex and .json, edges.csv, table.md, report.json and figures.
Every figure stands beside that of the same model with random initial weights. Checkpoints of nanoGPKANT work too; a run
of train.py with --keep_history=True also shows how its functions grew. The last line that is printed is JSON.
docs/interpret.md explains what is measured.
"""

import functools
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from configurator import ROOT, check_ranges, configure, flags_of, settings_of
from inside import faithful, figures, report
from inside.edges import kan_layers, measure, watch
from inside.page import write_page
from inside.reading import Examples, Text
from kan import KANLinear
from run import checkpoint as ckpt
from run.device import clock, device_name, pick_device
from run.records import read_record
from surgery import prune as surgery

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run to look into
dataset = ''  # by default the one it was trained on
split = 'val'
folder = ''  # where the files go; empty: out_dir/interpret, of some layers a folder of their own there
layer = -1  # the layers of one block alone; -1: of all
module = ''  # layers with this in their name alone, e.g. mlp.0, the first one of the MLP
topk = 24  # strongest edges of a layer in its figure
n_edges = 200  # strongest edges of a layer in the files and on the page, with refined formulas
rows = 16384  # tokens for the statistics
loss_rows = 4096  # other tokens for losses
random_too = True  # the same figures for random initial weights
losses = True  # with edges cut, and with formulas in their place
prompt = ''  # which edges this text drives, token by token, and nothing else
prune = -1.0  # share of the edges or of the hidden neurons of the MLPs to cut off, the least active first
prune_by = 'edges'  # or 'neurons'
save = ''  # the folder for the pruned model
tune = 0  # iterations of train.py with it, into a folder of that name with -tuned; 0: none
tune_lr_scale = 0.25  # learning rate of these, in multiples of that of the run
device = 'auto'  # 'cuda', 'cuda:0', 'cpu'; auto takes the first there is
# -----------------------------------------------------------------------------
config = configure(globals())
check_ranges(config, at_least_one='topk n_edges rows loss_rows', not_negative='tune tune_lr_scale')
if layer < -1:
    raise ValueError(f'layer is the number of a block, or -1 for all, got {layer}')
if split not in ('train', 'val') or prune_by not in ('edges', 'neurons'):
    raise ValueError(f'expected split train or val, prune_by edges or neurons, got {split!r} and {prune_by!r}')
if prune != -1 and not 0 <= prune <= 1:
    raise ValueError(f'prune is the share to cut off, between 0 and 1, got {prune}')
if prompt and save:
    raise ValueError('prompt and save are two commands: name one of them')
if topk > 24:
    raise ValueError(f'topk={topk}: a figure shows 24 edges at most; n_edges is how many the page has')
if (prune >= 0) != bool(save) or (tune and not save):
    raise ValueError(
        'prune is the share to cut off and save the folder for the pruned model: both or none; tune wants both'
    )
if save and ckpt.holds_model(save):
    raise ValueError(f'save={save!r} holds a model already: name another folder')
device = pick_device(device)
if device.startswith('mps'):  # it has no float64
    device = 'cpu'
pruned_dir = os.path.join(os.curdir, save)  # which no name of a model can be mistaken for
part = '-'.join(filter(None, [f'layer{layer}' if layer >= 0 else '', module]))  # e.g. layer0-mlp.0
folder = folder or os.path.normpath(os.path.join(out_dir, 'interpret', part))
started = time.perf_counter()


def say(text):
    print(f'[{time.perf_counter() - started:5.1f} s] {text}', flush=True)


def layers_asked_for(model):
    """The full names of the KAN layers that layer and module name."""
    names = {name: report.short(name) for name in kan_layers(model)}
    if not names:
        raise ValueError(f'{out_dir} holds a model without KAN layers: there are no learned functions to look into')
    blocks = getattr(model, 'gpt', model).blocks_path
    found = [name for name in names if layer < 0 or f'.{blocks}.{layer}.' in f'.{name}.']
    if module:
        found = [name for name in found if any(f'.{module}.' in f'.{known}.' for known in (name, names[name]))]
    if not found:
        raise ValueError(f'layer={layer}, module={module!r}: no KAN layer; there are {", ".join(names.values())}')
    return found


def look(model, n_edges=n_edges):
    return report.look(model, lambda: source.read(model), layers_asked_for(model), rows, n_edges)


def explain_prompt():
    """Which edges a text drives, token by token, on the screen and in a figure; returns it in a dict, too."""
    ids = source.tokenizer.encode(prompt)
    gpt = getattr(source.model, 'gpt', source.model)
    if not 1 <= len(ids) <= gpt.config.block_size:
        raise ValueError(f'the prompt has {len(ids)} tokens, expected 1 to {gpt.config.block_size}')
    tokens, names = [source.tokenizer.decode([token]) for token in ids], layers_asked_for(source.model)
    seen = watch(source.model, lambda: source.read(source.model), names, rows)
    known = {name: measure(one) for name, one in seen.items()}
    if not known:
        raise ValueError(
            f'the task of {out_dir} does not call {", ".join(names)}: nothing can be said of a prompt there'
        )
    x = torch.tensor([ids, ids], device=device)  # twice, as `watch` wants two rows
    met = watch(source.model, lambda: gpt(x, x), [*known], 2 * len(ids))
    for one in met.values():
        one.x = one.x[: len(ids)]
    driven = report.drive(known, met)
    print('for each token the functions that move their outputs farthest from the means (sd: deviations over the data)')
    for token, edges in zip(tokens, driven):
        print(repr(token))
        for edge in edges[:5]:
            own = 'which the data never moved' if math.isnan(edge['z']) else f'{edge["z"]:+.1f} sd'
            whole = 'layer' if edge['o'] is None else 'output'
            numbers = f'x = {edge["x"]:.3g}, {own}, which is {edge["share"]:+.2f} sd of its {whole}'
            print(f'    {edge["layer"]} {figures.name_of(edge["i"], edge["o"])}: {numbers}')
    shown = [(name, z[-40:]) for name, z in report.most_driven(known, met, driven, topk)]
    figure = figures.draw_prompt(f'The functions that {prompt[:40]!r} drives most', tokens[-40:], shown)
    report.write_figure(figure, folder, 'prompt')
    say(f'in {folder}: prompt.png')
    return dict(tokens=[dict(token=token, edges=edges) for token, edges in zip(tokens, driven)])


def explain():
    """All files but those of a prompt; returns what the page says, in a dict."""
    fresh_model = source.fresh() if random_too else None  # whose base may be gone, before the work
    layers = look(source.model)
    say(f'{sum(one.edges.activity.numel() for one in layers):,} functions of {len(layers)} layers, on {source.about}')
    fresh = look(fresh_model, n_edges=1) if random_too else None
    result = dict(layers=report.facts(layers, fresh))
    page = report.table(result['layers'])
    if random_too:
        say('the same with random initial weights')
    drawn = dict(report.draw(layers, fresh, topk, history()))
    if losses:
        now = faithful.measure_losses(layers, lambda: source.loss(source.model))
        before = faithful.measure_losses(fresh, lambda: source.loss(fresh_model), draws=0) if random_too else None
        page += '\n' + faithful.table(now, before)
        result.update(losses=now, random_losses=before)
        drawn['pruning'] = report.draw_losses(now)
        say('losses with edges cut and replaced')
    report.write_text(folder, 'table.md', page)
    report.write_formulas(folder, layers)
    write_page(os.path.join(folder, 'interpret.html'), report.page(out_dir, about(), layers, fresh))
    for name, figure in drawn.items():
        report.write_figure(figure, folder, name)
    for name in {'growth', 'pruning'} - drawn.keys():  # of an earlier look, perhaps at other data
        report.remove_figure(folder, name)
    print('', page, sep='\n')
    shown = [f'{name}.png' for name in drawn if name.startswith('edges')]
    say(f'in {folder}: interpret.html, formulas.txt, {shown[0]}' + (' and figures of all layers' if shown[1:] else ''))
    return result


def about():
    n = sum(p.numel() for p in source.model.parameters())
    return f'{n:,} parameters, iteration {checkpoint.get("iter_num")}, {source.about}'


def history():
    """The models of the evaluations of the run, six at most, the first and the last among them: [(iteration, model)]"""
    kept = os.path.join(out_dir, 'history')
    names = sorted(path.name for path in Path(kept).glob('*.pt'))
    picked = dict.fromkeys(names[round(i * (len(names) - 1) / 5)] for i in range(6)) if names else ()
    states = (ckpt.load_checkpoint(kept, [name]) for name in picked)
    return [(state['iter_num'], ckpt.build_model(state, dropout=0.0).to(device).eval()) for state in states]


# pruning


def prune_model():
    """Write the pruned model into the folder `save`, and say what it costs and what it loses."""
    if 'finetune' in checkpoint:
        raise ValueError(f'{out_dir} holds a run of finetune.py: only models of train.py can be saved pruned')
    if tune and not checkpoint.get('config'):
        raise ValueError(f'{out_dir} does not say how it was trained: leave tune out, and tune it by train.py')
    costs = {'as trained': cost(source.model)}
    args = vars(source.model.config) | (cut_edges() if prune_by == 'edges' else cut_neurons())
    args['dropout'] = checkpoint['model_args'].get('dropout', 0.0)  # it is looked at without
    if edge_layers(source.model):
        args.update(kan_bias=True, kan_mask=surgery.complete(edge_layers(source.model)))
    kept = {key: checkpoint[key] for key in ('config', 'tokenizer', 'data', 'iter_num') if key in checkpoint}
    state = dict(model=source.model.state_dict(), model_args=args, versions=ckpt.versions(), **kept)
    cut = f'{share_cut(args):.3g}% of the {prune_by} cut'
    costs[cut] = cost(ckpt.build_model(state).to(device))
    save_pruned(state)
    say(f'saved {save}/best.pt, for sample.py and for train.py CONFIG --init_from={pruned_dir} --out_dir=...')
    if tune:
        costs[f'{cut}, tuned for {tune} iterations'] = cost(tuned())
    print('', report.cost_table(costs), sep='\n')
    return dict(costs=costs)


def save_pruned(state):
    """ValueError where another command writes into the folder `save`, or has done so meanwhile."""
    try:
        os.makedirs(save, exist_ok=True)
        with FileLock(os.path.join(save, 'run.lock'), blocking=False):
            if ckpt.holds_model(save):
                raise ValueError(f'save={save!r} holds a model by now: name another folder')
            ckpt.save_checkpoint(save, state, is_best=True)
    except Timeout:
        raise ValueError(f'save={save!r} is in use by another command: name another folder') from None
    except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
        raise ValueError(f'save={save!r} cannot be written: {error}') from None


def share_cut(args):
    """What is cut, in percent: of the model's edges, or of its hidden neurons. `args` describe what is left."""
    if prune_by == 'neurons':
        config = source.model.config
        width = 'mlp_hidden' if config.kan_kind == 'channel' else 'kan_hidden'
        left, before = (round(config.n_embd * times) for times in (args[width], getattr(config, width)))
        return 100 * (1 - left / before)
    masks = [one.mask for one in edge_layers(source.model)]
    return 100 * sum((~mask).sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def statistics_of(names):
    """{layer: its Layer of report.py}, without formulas"""
    found = report.look(source.model, lambda: source.read(source.model), names, rows, n_edges=0)
    return {one.seen.layer: one for one in found}


def edge_layers(model):
    return [one for one in kan_layers(model).values() if isinstance(one, KANLinear)]


def cut_edges():
    """Mask the least active edges of each layer."""
    config = source.model.config
    if config.kan_kind == 'channel':
        advice = '--prune_by=neurons cuts channels' if config.is_kan('mlp') else 'only channels of MLPs can be cut'
        raise ValueError(f'this model has a function on each channel and none on edges: {advice}')
    for kan, one in statistics_of(layers_asked_for(source.model)).items():
        keep = surgery.strongest(one.edges.activity, 1 - prune)
        surgery.mask_edges(kan, keep, faithful.lost(one, keep))
    return {}


def cut_neurons():
    """Remove the hidden neurons of the KAN MLPs that add least, as many from each; what changes in its args."""
    config = source.model.config
    if layer >= 0 or module:
        raise ValueError('prune_by=neurons cuts those of all KAN MLPs alike: leave layer and module out')
    if not config.is_kan('mlp'):
        advice = ': --prune_by=edges cuts edges' if config.kan_kind == 'edge' else ', nor functions on edges'
        raise ValueError(f'prune_by=neurons cuts those of KAN MLPs, and {out_dir} has none{advice}')
    if config.kan_kind == 'channel':
        return cut_channels()
    if config.kan_norm:
        say('the hidden layer is normalised (kan_norm), from here on over fewer numbers: tune the model')
    known = statistics_of(None)
    for block in source.model.transformer.h:
        first, second = block.mlp.kan.layers
        activity = known[second].edges.activity.square().sum(0)  # (hidden,)
        keep = surgery.strongest(activity, max(1 - prune, 1 / len(activity)))
        surgery.remove_outputs(first, keep)
        surgery.remove_inputs(second, keep, faithful.lost(known[second], keep))
    return dict(kan_hidden=second.in_features / config.n_embd)


def cut_channels():
    """The same where linear layers stand around the functions."""
    mlps = [block.mlp for block in source.model.transformer.h]
    if not source.model.config.bias:
        say('without biases (bias=False) nothing takes over what the cut channels gave on average: tune the model')
    sums = dict.fromkeys(mlps, 0)  # of the hidden channels, of their squares, of ones: (3, H)

    def add(mlp, c_proj, inputs):
        h = inputs[0].flatten(0, -2).double()
        sums[mlp] = sums[mlp] + torch.stack([h.sum(0), h.square().sum(0), torch.ones_like(h).sum(0)])

    handles = [mlp.c_proj.register_forward_pre_hook(functools.partial(add, mlp)) for mlp in mlps]
    source.read(source.model)
    for mlp, handle in zip(mlps, handles):
        handle.remove()
        mean, square = sums[mlp][:2] / sums[mlp][2]
        weight = mlp.c_proj.weight.detach()
        added = (square - mean.square()) * weight.square().sum(0)  # variance, over all outputs
        keep = surgery.strongest(added, max(1 - prune, 1 / len(added)))
        surgery.remove_hidden(mlp, keep, weight @ (mean.float() * ~keep))
    return dict(mlp_hidden=mlps[0].c_proj.in_features / source.model.config.n_embd)


def cost(model):
    """Loss, parameters in use, megabytes of weights, median milliseconds of a forward pass of 1024 tokens."""
    model.eval()
    masks = [one for one in edge_layers(model) if one.mask is not None]
    cut = sum((~one.mask).sum().item() * (one.spline_weight.size(-1) + 2) for one in masks)  # with base and scaler
    parameters = sum(p.numel() for p in model.parameters()) - cut
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}  # tied ones once
    mb = sum(sizes.values()) / 1e6
    T = min(1024, model.config.block_size)
    x = torch.randint(model.config.vocab_size, (max(1, 1024 // T), T), device=device)
    ms = 1000 * median_seconds(lambda: model(x, x)) * 1024 / x.numel()
    return dict(loss=source.loss(model), parameters=parameters, mb=mb, ms=ms)


@torch.no_grad()
def median_seconds(run, n=15):
    seconds = []
    for _ in range(n):
        start = clock(device)
        run()
        seconds.append(clock(device) - start)
    return statistics.median(seconds)


def exit_status_of(command):
    """The exit status of a process, which Ctrl-C reaches as well: it saves first."""
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            pass


def tuned():
    """The pruned model after `tune` iterations of train.py with the settings of its run."""
    then, tuned_dir = checkpoint['config'], f'{os.path.normpath(save)}-tuned'
    rate = then['learning_rate'] * tune_lr_scale
    now = dict(init_from=pruned_dir, out_dir=tuned_dir, device=device, dataset=dataset or then['dataset'])
    now.update(max_iters=tune, eval_interval=tune, learning_rate=rate, keep_history=False)
    if then.get('decay_lr', True):
        now.update(lr_decay_iters=tune, warmup_iters=tune // 10, min_lr=rate / 20)
    now.update(wandb_log=False, wandb_artifact=False, log_to='')
    known = settings_of('train.py', [])  # a checkpoint may hold others
    flags = flags_of({name: value for name, value in {**then, **now}.items() if name in known})
    say(f'python train.py --init_from={pruned_dir} --out_dir={tuned_dir} --max_iters={tune} --learning_rate={rate} ...')
    status = exit_status_of([sys.executable, os.path.join(ROOT, 'train.py'), *flags])
    if status or 'finished' not in read_record(tuned_dir):
        raise ValueError(f'tuning did not come to its end, see above; {save} holds the pruned model')
    return ckpt.build_model(ckpt.load_checkpoint(tuned_dir)).to(device)


checkpoint = ckpt.load_checkpoint(out_dir)
if 'finetune' in checkpoint:
    if dataset or split != 'val':
        raise ValueError(
            f'dataset and split are of texts, and {out_dir} is looked at with dev of its task: leave them out'
        )
    source = Examples(checkpoint, rows, loss_rows, device)
else:
    source = Text(checkpoint, dataset, split, rows, loss_rows, device)
layers_asked_for(source.model)  # says so at once where there are none
if save:
    result = prune_model()
else:
    os.makedirs(folder, exist_ok=True)
    result = explain_prompt() if prompt else explain()
facts = dict(model=out_dir, data=source.about, device=device_name(device), seconds=time.perf_counter() - started)
found = report.as_json({**facts, **result})
report.write_text(save or folder, 'prompt.json' if prompt else 'report.json', found)
print(found)
