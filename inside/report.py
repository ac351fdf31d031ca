"""What interpret.py says of a model: its KAN layers looked into, as numbers, as text and as files."""

import contextlib
import csv
import json
import math
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from inside import figures
from inside.edges import Edges, Seen, columns_of, curves, indices, kan_layers, measure, values, watch, weights_of
from inside.faithful import loss_text
from inside.formulas import Formula, Found, expression, function_of, refine, search
from run.files import write_atomically, write_file
from run.records import without_nan
from run.tables import markdown_table

BINS = 40  # of a histogram of inputs
CLOSE = 0.99  # an R2 that is called close
SUFFIXES = 'png', 'svg'  # of figures


@dataclass
class Layer:
    """A KAN layer looked into; `pairs` are its strongest edges (output, feature), with a formula each."""

    name: str
    seen: Seen
    edges: Edges
    found: Found | None
    pairs: list
    formulas: list[Formula]

    @property
    def affine(self):
        """(O, I) whether an edge is called affine; of one without variance False."""
        return self.edges.alive & (self.found.best - self.edges.affine_r2 <= self.found.margin)

    @property
    def r2(self):
        """(O, I) of the best formula, straight lines among them; 0 without variance."""
        return self.found.best.maximum(self.edges.affine_r2.nan_to_num())


def look(model, read, names=None, rows=16384, n_edges=200, **thresholds):
    """Look into the KAN layers of a model, or into those named, while read() has it read data: a list of Layer. The
    n_edges strongest edges of each layer get refined formulas; with 0 there are statistics alone. The thresholds are
    `margin` and `tie` of inside.formulas.search.
    """
    layers = []
    seen = watch(model, read, names, rows)
    bar = tqdm(total=sum(one.layer.in_features for one in seen.values()), unit='feature', leave=False, disable=None)
    for name, one in seen.items():
        edges = measure(one)
        if not n_edges:
            layers.append(Layer(short(name), one, edges, None, [], []))
            continue
        found = search(one, edges, bar.update, **thresholds)
        I = edges.activity.size(1)
        strongest = edges.activity.flatten().argsort(descending=True)[:n_edges].tolist()
        pairs = [divmod(place, I) for place in strongest]
        layers.append(Layer(short(name), one, edges, found, pairs, refine(one, edges, found, pairs)))
    bar.close()
    return layers


def short(name):
    """transformer.h.0.mlp.kan.layers.1 is h.0.mlp.1"""
    return re.sub(r'\b(gpt|transformer|kan|layers|adapters)\.', '', name)


def cost_table(costs):
    """What interpret.py's `cost` found of models as markdown; `costs` are {label: numbers}."""
    heads = ['', 'loss', 'parameters in use', 'MB of weights', 'ms for 1024 tokens']
    rows = []
    for label, cost in costs.items():
        numbers = f'{cost["parameters"]:,}', f'{cost["mb"]:.2f}', f'{cost["ms"]:.1f}'
        rows.append([label, loss_text(cost['loss']), *numbers])
    return '\n'.join(markdown_table(heads, rows)) + '\n'


def share(condition, among=None):
    """The share of True, among those of a mask; NaN of none."""
    chosen = condition if among is None else condition[among]
    return chosen.float().mean().item() if chosen.numel() else math.nan


def summarize(layer):
    """The headline figures of a layer, as a dict of numbers."""
    edges, alive = layer.edges, layer.edges.alive
    variance = edges.activity.double().square()
    curved = variance * (1 - edges.affine_r2.nan_to_num(1.0))
    return dict(
        edges=edges.activity.numel(),
        dead=1 - share(alive),
        outside=edges.outside.mean().item(),
        straight=share(edges.affine_r2 > CLOSE, alive),
        affine=share(layer.affine, alive),
        close=share(layer.r2 > CLOSE, alive),
        curved_variance=(curved.sum() / variance.sum().clamp_min(1e-30)).item(),
        activity=edges.activity.mean().item(),
    )


def total_of(layers):
    """`summarize` of all layers together: means over edges, of shares among edges that vary over these."""
    summaries = [summarize(layer) for layer in layers]
    means = {key: mean_over_edges(key, summaries) for key in summaries[0]}
    return {**means, 'edges': sum(summary['edges'] for summary in summaries)}


def mean_over_edges(key, summaries):
    known = [summary for summary in summaries if not math.isnan(summary[key])]
    counts = [summary['edges'] for summary in known]
    if key in ('straight', 'affine', 'close'):  # shares among the edges that vary
        counts = [summary['edges'] * (1 - summary['dead']) for summary in known]
    return sum(summary[key] * n for summary, n in zip(known, counts)) / sum(counts) if known else math.nan


def table(rows):
    """What `facts` found as markdown, each figure beside that of the same layer with random initial weights, if any."""
    heads = ['layer', 'functions', f'straight lines (R² > {CLOSE})', f'formulas (R² > {CLOSE})']
    heads += ['variance that is no line', 'inputs outside the grid']
    lines = []
    for row in rows:
        now, old = row['trained'], row['random']
        name = 'all, mean over functions' if row['layer'] == 'all' else row['layer']
        cells = [name, f'{now["edges"]:,}']
        for key in ('straight', 'close', 'curved_variance', 'outside'):
            cells.append(percent(now[key]) + (f' (random: {percent(old[key])})' if old else ''))
        lines.append(cells)
    return '\n'.join(markdown_table(heads, lines, 'l' * len(heads))) + '\n'


def percent(value):
    """A share as text; of none, NaN or from JSON None, a dash."""
    return '–' if value is None or math.isnan(value) else f'{100 * value:.1f} %'


def neurons(layer, n_neurons=8, n_terms=6):
    """Of the output neurons that vary most the sum of their strongest edges: [(output, [(formula, share)])], where the
    share of the output's variance is what the formulas up to this one explain together. Outputs that do not vary are
    left out.
    """
    seen, edges = layer.seen, layer.edges
    found = []
    varying = edges.alive.any(1)
    strongest = edges.output_sd.argsort(descending=True)
    for o in strongest[varying[strongest]][:n_neurons].tolist():
        features = edges.activity[o].argsort(descending=True)[:n_terms].tolist()
        added = values(seen, [(o, i) for i in range(len(edges.low))])  # (N, I)
        output = added.sum(1)
        formulas = refine(seen, edges, layer.found, [(o, i) for i in features])
        fits = torch.stack([function_of(formula)(seen.x[:, i]) for i, formula in zip(features, formulas)], 1)
        left = output.unsqueeze(1) - fits.cumsum(1)
        explained = 1 - left.var(0) / output.var().clamp_min(1e-30)
        written = [expression(formula, symbol=f'x_{i}') for i, formula in zip(features, formulas)]
        found.append((o, list(zip(written, explained.tolist()))))
    return found


# pieces of the page and the figures


def inputs_of(layer, i):
    """What the inputs of a feature look like."""
    edges, kan = layer.edges, layer.seen.layer
    low, high = edges.low[i].item(), edges.high[i].item()
    counts = torch.histc(layer.seen.x[:, i], BINS, low, high) if high > low else torch.zeros(BINS)
    knots, k = kan.grid[i].float().tolist(), kan.spline_order
    return dict(low=low, high=high, knots=knots, grid=[knots[k], knots[-1 - k]], counts=counts.int().tolist())


def edges_of(layer, n=None):
    """The strongest edges of a layer, with all that is known of each: a list of dicts."""
    pairs, formulas = layer.pairs[:n], layer.formulas[:n]
    x, total, base = curves(layer.seen, layer.edges, pairs)
    edges, found = layer.edges, []
    for e, ((o, i), formula) in enumerate(zip(pairs, formulas)):
        about = dict(i=i, o=output_of(layer.seen, o), **numbers_of(edges, o, i))
        about.update(r2=formula.r2, family=formula.family, formula=str(expression(formula)), others=formula.others)
        fit = function_of(formula)(x[e]).tolist()
        found.append(dict(about, x=x[e].tolist(), total=total[e].tolist(), base=base[e].tolist(), fit=fit))
    return found


def output_of(seen, o):
    """The output of an edge; None for the function of a channel, which has none."""
    return None if seen.of_channels else o


def numbers_of(edges, o, i):
    names = ('activity', 'share', 'affine_r2', 'roughness')
    return {name: getattr(edges, name)[o, i].item() for name in names}


def page_layer(layer, fresh):
    """A layer as inside/page.py wants it."""
    kan, summary = layer.seen.layer, summarize(layer)
    shown = [{key: rounded(value) for key, value in edge.items() if key != 'x'} for edge in edges_of(layer)]
    headline = dict(straight=summary['straight'], outside=summary['outside'])
    if fresh:
        headline['random_straight'] = summarize(fresh)['straight']
    return dict(
        name=layer.name,
        features=kan.in_features,
        outputs=None if layer.seen.of_channels else kan.out_features,
        edges_total=summary['edges'],
        grid_size=kan.grid_size,
        spline_order=kan.spline_order,
        activation=str(kan.base_activation),
        summary=headline,
        inputs={str(i): rounded(inputs_of(layer, i)) for i in sorted({i for _, i in layer.pairs})},
        edges=shown,
    )


def rounded(value):
    """Numbers with five digits, in lists and dicts too."""
    if isinstance(value, float):
        return float(f'{value:.5g}')
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def page(model, about, layers, fresh):
    """The report that inside/page.py wants."""
    pairs = zip(layers, fresh or [None] * len(layers))
    return dict(model=model, about=about, layers=[page_layer(*pair) for pair in pairs])


def facts(layers, fresh):
    """`summarize` of each layer and of all, with that of random initial weights: a list of dicts."""
    before = [summarize(layer) for layer in fresh] + [total_of(fresh)] if fresh else [None] * (len(layers) + 1)
    rows = [(layer.name, summarize(layer)) for layer in layers] + [('all', total_of(layers))]
    return [dict(layer=name, trained=now, random=old) for (name, now), old in zip(rows, before)]


def draw(layers, fresh, topk, history):
    """(name, figure) of all figures of the layers: `history` holds (iteration, model) of the training."""
    for layer in layers:
        edges = [arrays({**edge, **inputs_of(layer, edge['i'])}) for edge in edges_of(layer, topk)]
        kind = 'channels' if layer.seen.of_channels else 'edges'
        title = f'{layer.name}: the {len(edges)} strongest of {layer.edges.activity.numel():,} {kind}'
        yield f'edges-{layer.name}', figures.draw_edges(title, edges)
    mapped = [layer for layer in layers if not layer.seen.of_channels]
    for place in range(0, len(mapped), 12):
        maps = [(layer.name, layer.edges.activity.cpu().numpy()) for layer in mapped[place : place + 12]]
        yield 'activity' + (f'-{place // 12 + 1}' if len(mapped) > 12 else ''), figures.draw_maps(maps)
    yield 'r2', figures.draw_r2(r2_groups(layers, fresh))
    if len(history) > 1:
        layer = next((layer for layer in layers if layer.name.endswith(('mlp.0', 'mlp.act'))), layers[0])
        title = f'{layer.name}: how its strongest curved functions grew'
        yield 'growth', figures.draw_growth(title, growth_of(layer, history))


def arrays(edge):
    """The curves and counts of an edge as arrays, which the figures want."""
    names = ('x', 'total', 'base', 'fit', 'counts', 'knots', 'curves')
    return {key: np.array(value) if key in names else value for key, value in edge.items()}


def draw_losses(found):
    """The figure of what faithful.measure_losses found."""
    shares = [0.0, *found['shares']]
    active, random = ([found['full'], *found[key]] for key in ('by_activity', 'at_random'))
    spread = [0.0, *found['at_random_std']]
    shares, active, random, spread = map(np.array, (shares, active, random, spread))
    curves = [('the least active first', shares, active, None), ('at random', shares, random, spread)]
    return figures.draw_pruning(curves, found['full'])


def r2_groups(layers, fresh):
    """R2 of lines and of formulas by the place in a block, for the four places with the most edges."""
    groups = {}
    for layer, before in zip(layers, fresh or [None] * len(layers)):
        groups.setdefault(re.sub(r'\b(h|body)\.\d+\.', '', layer.name), []).append((layer, before))
    largest = sorted(groups, key=lambda name: -sum(layer.edges.activity.numel() for layer, _ in groups[name]))[:4]
    return [(name, *r2_of(groups[name])) for name in groups if name in largest]


def r2_of(pairs):
    """R2 of lines, trained and random, then of formulas: (n,) each, None for random where there is none."""
    now, before = zip(*pairs)
    return joined(r2_of_line, now), joined(r2_of_line, before), joined(r2_of_best, now), joined(r2_of_best, before)


def joined(read, layers):
    """What is read of layers, as one array; None where there are none."""
    return None if None in layers else torch.cat([read(layer).flatten() for layer in layers]).cpu().numpy()


def r2_of_line(layer):
    return layer.edges.affine_r2


def r2_of_best(layer):
    return torch.where(layer.edges.alive, layer.r2, torch.nan)


def growth_of(layer, history, n=8):
    """The strongest edges that are no straight lines, at each point of the history: what figures.draw_growth wants."""
    curved = [
        pair for pair, formula in zip(layer.pairs, layer.formulas) if formula.family not in ('affine', 'constant')
    ]
    pairs, found = (curved or layer.pairs)[:n], []
    x = curves(layer.seen, layer.edges, pairs)[0]
    totals = torch.stack([curves_then(layer, model, pairs) for _, model in history], 1)  # (pairs, m, 64)
    iterations = [iteration for iteration, _ in history]
    for e, (o, i) in enumerate(pairs):
        counts = inputs_of(layer, i)['counts']
        about = dict(i=i, o=output_of(layer.seen, o), iterations=iterations, counts=counts)
        found.append(arrays(dict(about, x=x[e].tolist(), curves=totals[e].tolist())))
    return found


def curves_then(layer, model, pairs):
    """What edges of a layer gave in another state of the model, over the inputs that they see at last: (pairs, 64)"""
    module = next(module for name, module in kan_layers(model).items() if short(name) == layer.name)
    then = Seen(module, layer.seen.x, weights_of(module).detach())
    return curves(then, layer.edges, pairs)[1]


# what a prompt drives


def drive(known, met, n=6):
    """Of each token of a prompt the n edges that move their outputs most, against what they give on average: `known`
    {name: Edges} on data, `met` {name: Seen} on the prompt alone. A dict each: layer, output o, feature i, its input x,
    its distance from its mean in its own standard deviations z (NaN if it has none), and in those of its output,
    `share`. A channel has no output o: its share is in those of its layer, the root of the variances of all channels.
    """
    found = [[] for _ in next(iter(met.values())).x]
    for name, one in met.items():
        edges = known[name]
        for t, row in enumerate(one.x):
            phi = columns_of(one.layer, row.unsqueeze(0))[0]  # (P, I)
            apart = (one.weights * phi).sum(1) - edges.mean  # (O, I)
            share = apart / edges.output_sd.clamp_min(1e-30).unsqueeze(1)
            z = deviations(apart, edges.activity, edges.alive)
            for place in share.abs().flatten().topk(min(n, share.numel())).indices.tolist():
                o, i = divmod(place, share.size(1))
                numbers = dict(x=row[i].item(), z=z[o, i].item(), share=share[o, i].item())
                found[t].append(dict(layer=short(name), o=output_of(one, o), i=i, **numbers))
    return [sorted(edges, key=lambda edge: -abs(edge['share'])) for edges in found]


def deviations(apart, activity, alive):
    """Distances in standard deviations; NaN of edges that do not vary over the data."""
    return torch.where(alive, apart / activity.clamp_min(1e-30), torch.nan)


def most_driven(known, met, driven, n):
    """[(label, z of each token)] of the n edges that any token drives most."""
    best = {}
    for edge in (edge for edges in driven for edge in edges):
        key = edge['layer'], edge['o'], edge['i']
        best[key] = max(best.get(key, 0.0), abs(edge['share']))
    chosen, rows = sorted(best, key=best.get, reverse=True)[:n], []
    for name, one in met.items():
        pairs = [(o or 0, i) for layer, o, i in chosen if layer == short(name)]
        if pairs:
            outputs, features = indices(one, pairs)
            mean, *spread = (getattr(known[name], key)[outputs, features] for key in ('mean', 'activity', 'alive'))
            z = deviations(values(one, pairs) - mean, *spread)
            labels = [f'{short(name)} {figures.name_of(i, output_of(one, o))}' for o, i in pairs]
            rows += [(label, z[:, e].cpu().numpy()) for e, label in enumerate(labels)]
    return rows


# files


def write_formulas(folder, layers):
    """formulas.txt and formulas.tex for people, edges.csv and formulas.json for programs: the strongest edges."""
    import sympy

    rows, data, text, tex = [], [], [], []
    for layer in layers:
        text.append(f'\n{layer.name}\n')
        tex.append('\\intertext{\\texttt{' + layer.name.replace('_', '\\_') + '}}\n')
        for pair, formula in zip(layer.pairs, layer.formulas):
            row, latex = row_of(layer, *pair, formula), sympy.latex(expression(formula, symbol=f'x_{{{pair[1]}}}'))
            rows.append(row)
            exact = {name: row[name] for name in 'abcd'}  # five digits of b are too few for inputs far from zero
            data.append({**rounded(row), **exact, 'latex': latex, 'others': rounded(formula.others)})
            text.append(text_of(row, formula))
            tex.append(equation_of(row, latex))
        text += sums(layer)
    write_text(folder, 'formulas.txt', ''.join(text).lstrip())
    write_text(folder, 'formulas.tex', '{\\allowdisplaybreaks\n\\begin{align*}\n' + ''.join(tex) + '\\end{align*}}\n')
    write_text(folder, 'formulas.json', as_json(data))
    with write_atomically(os.path.join(folder, 'edges.csv'), 'w', encoding='utf-8') as f:
        writer = csv.DictWriter(f, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def row_of(layer, o, i, formula):
    """What edges.csv says of an edge."""
    domain = {name: getattr(layer.edges, name)[i].item() for name in ('low', 'high', 'outside')}
    row = dict(layer=layer.name, output=output_of(layer.seen, o), feature=i, **domain, **numbers_of(layer.edges, o, i))
    row.update(family=formula.family, formula=str(expression(formula)), r2=formula.r2)
    return dict(row, a=formula.a, b=formula.b, c=formula.c, d=formula.d)


def text_of(row, formula):
    """An edge in formulas.txt."""
    name = f'{row["feature"]:>5}' if row['output'] is None else f'{row["feature"]:>5} -> {row["output"]:<5}'
    return f'  {name} R² {formula.r2:.4f} (line {formula.affine_r2:.4f})  {row["formula"]}\n'


def equation_of(row, latex):
    """An edge in formulas.tex."""
    index = row['feature'] if row['output'] is None else f'{row["output"]},{row["feature"]}'
    r2 = '' if math.isnan(row['r2']) else f' && R^2 = {row["r2"]:.4f}'
    return f'g_{{{index}}} &= {latex}{r2} \\\\\n'


def sums(layer):
    """The output neurons that vary most, as sums of their strongest edges."""
    if layer.seen.of_channels:
        return []
    lines = ['  sums of edges, with the share of the variance of the output that they explain so far\n']
    for o, terms in neurons(layer):
        lines.append(f'    y_{o} =\n')
        lines += [f'      {100 * explained:4.0f} %  + {written}\n' for written, explained in terms]
    return lines


def as_json(value):
    return json.dumps(without_nan(value), allow_nan=False)


def write_text(folder, name, text):
    write_file(os.path.join(folder, name), text)


def write_figure(figure, folder, name):
    """A figure as PNG and as SVG."""
    for suffix in SUFFIXES:
        with write_atomically(os.path.join(folder, f'{name}.{suffix}')) as f:
            figure.savefig(f, format=suffix, dpi=150)


def remove_figure(folder, name):
    for suffix in SUFFIXES:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, f'{name}.{suffix}'))
