"""The figures of interpret.py by matplotlib: the edges of a layer, how much they do and how straight they are, and what
cutting, training and a prompt do to them.

Legend: I, O features in and out; P knots; T tokens; m moments of the training; n numbers. A curve is 64 numbers over x.
"""

import bisect
import math
import textwrap

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

WIDTH = 10  # inches: a README shows them on about 850 pixels, where 8 points can still be read
SMALL, TITLE = 8, 11  # points; all else has 9
TICKS, OVER = 0.7, 0.2  # inches beside a panel for the numbers of its axis, and what a title may take of them
BLACK, ORANGE, SKY, BLUE, VERMILION = '#000 #e69f00 #56b4e9 #0072b2 #d55e00'.split()
INPUTS, OUTSIDE, GREY, DARK = '#b7d7ea', '#e8e8e8', '#777777', '#444444'
STEPS = (1, 2, 5, 10)  # between ticks
# names and tokens are no formulas of TeX, whatever dollars they hold
STYLE = {'font.size': 9, 'axes.titlesize': 9, 'legend.fontsize': 9, 'text.parse_math': False}
BINS = np.linspace(0, 4.25, 18)  # of -log10(1 - R2); the last holds all above the last of R2
R2 = (0, 0.9, 0.99, 0.999, 0.9999)  # at 0, 1, 2, 3, 4
STRAIGHT = 0.99  # R2 from which a function counts as the line or the formula
DECADES = 4  # of activity that are told apart
SIDE, NARROW = 512, 256  # dots of a map along an axis, and where three maps or more share the width
LIMIT = 4  # standard deviations


@rc_context(STYLE)
def draw_edges(title, edges):
    """A panel for each edge, up to 24: {'i', 'o' (None of a channel), 'x', 'total', 'base', 'fit' (curves), 'formula',
    'family', 'r2' (may be NaN), 'counts' (of inputs, evenly from x[0] to x[-1]), 'knots' (P,), 'grid' (low, high)}.
    """
    check(edges, 'edges', 24)
    names = [f'{name_of(edge["i"], edge["o"])}  {edge["family"]}, R² ' for edge in edges]
    names = [name + f'{edge["r2"]:.3f}'.replace('nan', '–') for name, edge in zip(names, edges)]
    widest = max(width(name, SMALL) for name in names) + TICKS - OVER
    figure, panels = make_panels(title, len(edges), min(6, max(2, int(WIDTH / widest))), 1.45)
    room = panel_width(figure, panels) + OVER
    formulas = [edge['formula'] if width(edge['formula'], SMALL) <= room else '' for edge in edges]
    for panel, edge, name, formula in zip(panels, edges, names, formulas):
        draw_edge(panel, edge)
        set_title(panel, shorten(name, room, SMALL), SMALL, formula, any(formulas))
    label_axes(figure, panels, 'input', what_of(edges))
    add_legend(figure, panels)
    return figure


def name_of(i, o):
    return f'channel {i}' if o is None else f'{i} -> {o}'


def what_of(edges):
    return 'learned function' if edges[0]['o'] is None else 'what the edge adds to its output'


def draw_edge(panel, edge):
    x, total, fit = edge['x'], edge['total'], edge['fit']
    parts = [edge['base'], total - edge['base'], fit]
    panel.plot(x, total, color=BLACK, linewidth=2.4, label='function')
    panel.plot(x, parts[0], color=ORANGE, linewidth=1.2, label='its activation')
    panel.plot(x, parts[1], color=BLUE, linewidth=1.2, label='its spline')
    panel.plot(x, fit, color=VERMILION, linewidth=1.5, linestyle=(0, (3, 2)), label='formula')
    draw_inputs(panel, x, edge['counts'])
    marks = dict(color=DARK, markersize=5, transform=panel.get_xaxis_transform(), label='knots')
    panel.plot(edge['knots'], np.full(len(edge['knots']), 0.03), '|', **marks)
    low, high = edge['grid']
    for start, end in ((x[0], min(low, x[-1])), (max(high, x[0]), x[-1])):
        if start < end:
            panel.axvspan(start, end, color=OUTSIDE, zorder=0, label='outside the grid')
    set_limits(panel, x, [total], parts)


@rc_context(STYLE)
def draw_maps(layers):
    """A heat map for each (name, activity (O, I)), up to 12, all on one scale of colours."""
    check(layers, 'layers', 12)
    figure, panels = make_panels('How much each edge does, by layer', len(layers), 4, 2.3)
    room = panel_width(figure, panels)
    # more dots than pixels would hide what stands alone
    side = SIDE if room > WIDTH / 3 else NARROW
    high = max(np.nanmax(activity, initial=0) for _, activity in layers) or 1
    above = [activity[activity > high / 10**DECADES] for _, activity in layers]
    low = min(min(part.min(initial=high) for part in above), high / 10)
    cmap = colormaps['viridis']
    cmap = cmap.with_extremes(bad=cmap(0), under=cmap(0))
    reduced_any = any(max(activity.shape) > side for _, activity in layers)
    for panel, (name, activity) in zip(panels, layers):
        (O, I), reduced = activity.shape, block_maximum(activity, side)
        down, across = (math.ceil(size / side) for size in activity.shape)
        edges = (-0.5, across * reduced.shape[1] - 0.5, down * reduced.shape[0] - 0.5, -0.5)
        norm = LogNorm(low, high)
        image = panel.imshow(reduced, cmap=cmap, norm=norm, extent=edges, aspect='auto', interpolation='nearest')
        panel.set(xlim=(-0.5, I - 0.5), ylim=(O - 0.5, -0.5))
        for axis in panel.xaxis, panel.yaxis:
            axis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True, min_n_ticks=1))
        note = f'a dot: the largest of {down} × {across} edges' if down * across > 1 else ''
        set_title(panel, shorten(name, room, 9), 9, note, reduced_any)
    label_axes(figure, panels, 'input feature', 'output neuron')
    below = any((activity < low).any() for _, activity in layers)
    bar = figure.colorbar(image, ax=panels, extend='min' if below else 'neither', pad=0.02, aspect=30)
    bar.set_label('standard deviation of what an edge adds')
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.set_major_locator(log_ticks(low, high))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(compact))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return figure


def block_maximum(values, side):
    """(O, I) -> at most (side, side): the largest of each block, the last of which may hang over; NaN is none."""
    down, across = (math.ceil(size / side) for size in values.shape)
    padding = [(0, -size % block) for size, block in zip(values.shape, (down, across))]
    padded = np.pad(np.nan_to_num(values), padding)
    O, I = padded.shape
    return padded.reshape(O // down, down, I // across, across).max((1, 3))


@rc_context(STYLE)
def draw_r2(groups):
    """Histograms for each (name, trained_affine_r2 (n,), random_affine_r2, trained_r2, random_r2), up to 4: a column
    for each; random may be None and have another n. NaN is left out.
    """
    check(groups, 'groups', 4)
    title = 'How much of a function is a straight line, and how much a formula'
    figure, panels = make_panels(title, 2 * len(groups), len(groups), 2.15, sharex=True, sharey=True)
    panels = panels.reshape(2, -1)
    room = panel_width(figure, panels[0])
    for column, (name, *values) in zip(panels.T, groups):
        for panel, trained, random in zip(column, values[::2], values[1::2]):
            draw_shares(panel, trained, random)
        column[0].set_title(shorten(name, room, 9), fontsize=9, pad=15)
    for panel, what in zip(panels[:, 0], ('best straight line', 'best formula')):
        panel.set_ylabel(f'{what}:\nshare of functions')
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for panel in panels[-1]:
        panel.set_xticks(range(len(R2)), [f'{tick:g}' for tick in R2])
        panel.set(xlim=(0, BINS[-1]), xlabel='R² (last bar: above 0.9999)')
    add_legend(figure, panels.flat)
    return figure


def draw_shares(panel, trained, random):
    texts = []
    for values, style in (
        (trained, dict(fill=True, color=SKY, label='trained')),
        (random, dict(color=VERMILION, linewidth=1.5, label='random')),
    ):
        if values is not None and np.isfinite(values).any():
            values = values[np.isfinite(values)]
            places = -np.log10(np.clip(1 - values, 10 ** -BINS[-1], 1))
            panel.stairs(np.histogram(places, BINS)[0] / len(values), BINS, **style)
            share = (values >= STRAIGHT).mean()
            texts.append(f'{share:.{0 if share >= 0.1 else 1}%} {style["label"]}')
    panel.axvline(-math.log10(1 - STRAIGHT), color=GREY, linewidth=0.8, linestyle=':')
    set_title(panel, '', SMALL, f'R² ≥ {STRAIGHT}: ' + ', '.join(texts) if texts else 'no function varies')


@rc_context(STYLE)
def draw_pruning(curves, full_loss):
    """Loss over the share of edges cut, as it is and above full_loss, for each (name, shares (n,), losses (n,), spread
    (n,) or None), up to 2.
    """
    check(curves, 'curves', 2)
    figure = Figure((WIDTH, 5), layout='constrained')
    add_title(figure, 'Loss against the share of functions cut')
    panels = figure.subplots(1, 2)
    for (name, shares, losses, spread), color, marker in zip(curves, (BLUE, VERMILION), 'os'):
        label = shorten(name, WIDTH / 3, 9)
        for panel, zero in zip(panels, (0, full_loss)):
            panel.plot(shares, losses - zero, color=color, marker=marker, markersize=5, label=label)
            if spread is not None:
                band = losses - zero - spread, losses - zero + spread
                panel.fill_between(shares, *band, color=color, alpha=0.2, linewidth=0)
    for panel, level in zip(panels, (full_loss, 0)):
        panel.axhline(level, color=BLACK, linewidth=0.8, label=f'nothing cut: {compact(full_loss)}', zorder=1)
        panel.set_xlabel('share of functions cut')
        panel.xaxis.set_major_formatter(PercentFormatter(1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('loss')
    panels[1].set_ylabel('loss above that with nothing cut, log scale')
    ends = [(losses - spread, losses + spread) for _, _, losses, spread in curves if spread is not None]
    scale_losses(panels, np.ravel(np.concatenate([*(losses for _, _, losses, _ in curves), *sum(ends, ())])), full_loss)
    for panel in panels:
        panel.tick_params(labelsize=SMALL)
        panel.yaxis.set_major_formatter(FuncFormatter(compact))
        panel.yaxis.set_minor_locator(NullLocator())
    add_legend(figure, panels)
    return figure


def scale_losses(panels, losses, full_loss):
    losses = np.append(losses[np.isfinite(losses)], full_loss)
    size, rises = abs(full_loss), losses - full_loss
    if losses.max() > 10 * losses.min() > 0:
        panels[0].set_yscale('log')
        panels[0].yaxis.set_major_locator(log_ticks(losses.min(), losses.max()))
    elif 0 < np.abs(rises).max() < size / 100:
        panels[0].set_ylim(full_loss - size / 50, full_loss + size / 50)
    # even up to about half a per cent of the loss, so that noise around zero stays small
    even = min(size / 200 or math.inf, max(np.abs(rises).max() / 10, size / 1e6) or 1)
    even = 10 ** round(math.log10(even))
    panels[1].set_yscale('symlog', linthresh=even)
    scale = panels[1].yaxis.get_transform()
    low, high = scale.transform([rises.min(), rises.max()])
    room = 0.05 * (high - low) if high - low > even else 2 * even
    panels[1].set_ylim(scale.inverted().transform([low - room, high + room]))


@rc_context(STYLE)
def draw_growth(title, edges):
    """A panel for each edge, up to 8: {'i', 'o', 'iterations' (m), 'x', 'curves' (m, 64), 'counts'}, m <= 6."""
    check(edges, 'edges', 8)
    for edge in edges:
        check(edge['iterations'], 'iterations', 6)
    figure, panels = make_panels(title, len(edges), 4, 2.3)
    iterations = sorted({iteration for edge in edges for iteration in edge['iterations']})
    # the yellow end of the map is too pale for a line
    colors = [GREY, *colormaps['viridis_r'](np.linspace(0.2, 1, max(1, len(iterations) - 1)))]
    styles = [dict(color=color, linewidth=1.6, label=f'{n:,}') for color, n in zip(colors, iterations)]
    styles[0].update(linestyle='--', label=f'iteration {iterations[0]:,}', zorder=3)
    styles = dict(zip(iterations, styles))
    for panel, edge in zip(panels, edges):
        for iteration, curve in zip(edge['iterations'], edge['curves']):
            panel.plot(edge['x'], curve, **styles[iteration])
        draw_inputs(panel, edge['x'], edge['counts'])
        set_limits(panel, edge['x'], edge['curves'])
        panel.set_title(name_of(edge['i'], edge['o']), fontsize=9)
    label_axes(figure, panels, 'input', what_of(edges))
    add_legend(figure, panels)
    return figure


@rc_context(STYLE)
def draw_prompt(title, tokens, rows):
    """A heat map of rows (label, z (T,)), up to 24, over tokens, up to 40."""
    check(tokens, 'tokens', 40)
    check(rows, 'rows', 24)
    names = [shorten(''.join(map(visible, token)), 0.9, SMALL) for token in tokens]
    labels = [shorten(label, 2.6, SMALL) for label, _ in rows]
    deep = max(width(name, SMALL) for name in names)
    across, down = min(WIDTH, max(7.5, 0.3 * len(tokens) + 3)), 2.2 + 0.2 * len(rows) + deep
    figure = Figure((across, down), layout='constrained')
    add_title(figure, title)
    panel, z = figure.subplots(), np.stack([z for _, z in rows])
    most = np.abs(z[np.isfinite(z)]).max(initial=1)
    limit = min(LIMIT, most)
    cmap = colormaps['RdBu_r'].with_extremes(bad='#cccccc')
    image = panel.imshow(z, cmap=cmap, vmin=-limit, vmax=limit, aspect='auto', interpolation='nearest')
    panel.set_xticks(range(len(names)), names, rotation=90 if deep > 0.15 else 0)
    panel.set_yticks(range(len(labels)), labels)
    panel.tick_params(labelsize=SMALL)
    panel.set_xlabel('tokens of the prompt')
    bar = figure.colorbar(image, location='bottom', extend='both' if most > limit else 'neither', aspect=50, pad=0.02)
    bar.set_label('distance from its mean over the data, in standard deviations')
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.xaxis.set_major_formatter(FuncFormatter(compact))
    return figure


def visible(character):
    """The character, or '·' for a space and an escape for what the font does not have."""
    drawn = character.isprintable() and get_font(findfont(FontProperties())).get_char_index(ord(character))
    if character == ' ':
        return '·'
    return character if drawn else ascii(character)[1:-1]


def check(items, what, most):
    if not 0 < len(items) <= most:
        raise ValueError(f'a figure draws 1 to {most} {what}, got {len(items)}')


def make_panels(title, count, most, height, **shared):
    """A figure and its panels, at most so many across, each so many inches high with all that is around it."""
    down = math.ceil(count / most)
    across = math.ceil(count / down)
    figure = Figure((min(WIDTH, max(6, 3.4 * across)), max(4, 1.3 + height * down)), layout='constrained')
    figure.get_layout_engine().set(rect=(0, 0, 1 - OVER / figure.get_figwidth(), 1))
    add_title(figure, title)
    panels = figure.subplots(down, across, squeeze=False, **shared).ravel()
    for panel in panels[count:]:
        panel.remove()
    for panel in panels[:count]:
        panel.tick_params(labelsize=SMALL)
    return figure, panels[:count]


def panel_width(figure, panels):
    """In inches, about"""
    return figure.get_figwidth() / panels[0].get_gridspec().ncols - TICKS


def set_title(panel, text, size, below='', raised=False):
    """A title, raised where others have a small line below it."""
    panel.set_title(text, fontsize=size, pad=15 if raised else 4)
    place = dict(xycoords='axes fraction', xytext=(0, 3), textcoords='offset points', ha='center', va='bottom')
    panel.annotate(below, (0.5, 1), **place, fontsize=SMALL, color=DARK)


def label_axes(figure, panels, x, y):
    """x below the last panel of each column, where a legend leaves room for it."""
    across = panels[0].get_gridspec().ncols
    for panel in panels[-across:]:
        panel.set_xlabel(x)
    figure.supylabel(y, fontsize=9)


def add_title(figure, title):
    room = figure.get_figwidth() - 0.4
    letters = int(room / width('n', TITLE))
    lines = textwrap.wrap(shorten(title, 1.5 * room, TITLE), letters)
    figure.suptitle('\n'.join(shorten(line, room, TITLE) for line in lines), fontsize=TITLE)


def add_legend(figure, panels):
    handles = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    widths = [width(label, 9) + 0.6 for label in handles]
    room = figure.get_figwidth() - 0.2
    columns = len(widths) if sum(widths) < room else max(1, int(room / max(widths)))
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=columns)


def draw_inputs(panel, x, counts):
    """A histogram over the lowest fifth of a panel."""
    heights, edges = counts / (5 * (counts.max() or 1)), np.linspace(x[0], x[-1], len(counts) + 1)
    bottom = panel.get_xaxis_transform()
    panel.stairs(heights, edges, fill=True, color=INPUTS, transform=bottom, label='inputs', zorder=0.5)


def log_ticks(low, high):
    return LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))


def set_limits(panel, x, curves, parts=()):
    """Around x and all of the curves, above the histogram. Parts that are much larger leave the panel."""
    low, high = limits(curves)
    least, most = limits([*curves, *parts])
    if high - low > 1e-6 * (most - least):  # no rounding of what is constant
        least, most = max(least, 2 * low - high), min(most, 2 * high - low)
    room = 0.55 * (max(most - least, 0.01 * max(abs(least), abs(most))) or 1)
    middle = (least + most) / 2
    panel.set_ylim(middle - 1.5 * room, middle + room)
    panel.set_xlim((x[0], x[-1]) if x[0] < x[-1] else (x[0] - 0.5, x[0] + 0.5))
    for axis in panel.xaxis, panel.yaxis:
        axis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axis.set_major_formatter(FuncFormatter(compact))


def limits(curves):
    values = np.concatenate([np.ravel(curve) for curve in curves])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)


def compact(value, _=None):
    """A number of an axis without an offset: 0.25, 1e-12."""
    return f'{value:.4g}'.replace('e+0', 'e').replace('e+', 'e').replace('e-0', 'e-').replace('-', '−')


def width(text, size):
    """Of a line in so many points, in inches."""
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0] / 72


def shorten(text, room, size):
    """The text, less its middle where it is wider than so many inches."""
    if width(text, size) <= room:
        return text
    cuts = [text[: (left + 1) // 2] + '…' + text[len(text) - left // 2 :] for left in range(2, len(text))]
    return cuts[max(1, bisect.bisect_right(cuts, room, key=lambda cut: width(cut, size))) - 1]
