"""What compare.py draws: PNG by matplotlib, the same to zoom into by plotly, and the page around it.

A group is a row of the table: its name, seeds, parameters, `best` losses, and `curve` (iterations, mean, std). A law is
a family of sizes: (name, groups, {factor, exponent}). A grid is (family, values of one setting, values of another,
losses (rows, columns)).
"""

import math

import numpy as np
import plotly.graph_objects as go
from matplotlib import colors, rc_context, rcParams, ticker
from matplotlib.figure import Figure

AXES = {  # of the curves: the places of the evaluations in this unit
    'iterations': lambda group: group['curve']['iterations'],
    'tokens': lambda group: group['curve']['tokens'],
    'FLOPs': lambda group: [tokens * group['flops_per_token'] for tokens in group['curve']['tokens']],
    'seconds': lambda group: [iteration * group['seconds_per_step'] for iteration in group['curve']['iterations']],
}
LOGARITHMIC = ('FLOPs', 'seconds')
COLORS = [colors.to_hex(color) for color in rcParams['axes.prop_cycle'].by_key()['color']]
MARGIN = dict(l=50, r=10, t=10, b=40)
LAYOUT = dict(template='plotly_white', height=480, margin=MARGIN, legend=dict(orientation='h', y=-0.2))
N_LINES = 6  # in a panel at most
plain_names = rc_context({'text.parse_math': False})  # they are no formulas of TeX, whatever dollars they hold
LOSS = 'validation loss, nats per token'


def law_text(law):
    return f'{law["factor"]:.3g} · parameters^{law["exponent"]:.4f}'


def has_curves(groups):
    return any(len(group['curve']['iterations']) > 1 for group in groups if group['finished'])


@plain_names
def draw_curves(groups, base):
    """Of more than six groups `base` and those that end lowest."""
    by_end = sorted(groups, key=lambda group: (group is not base, group['curve']['mean'][-1]))
    drawn, others = {group['name'] for group in by_end[:N_LINES]}, max(0, len(groups) - N_LINES)
    groups = [group for group in groups if group['name'] in drawn]
    figure = Figure(figsize=(10, 7.5), layout='constrained')
    panels = figure.subplots(2, 2, sharey=True)
    for panel, (axis, unit) in zip(panels.flat, AXES.items()):
        for group in groups:
            curve = group['curve']
            x = unit(group)
            (line,) = panel.plot(x, curve['mean'], marker='o', markersize=3)
            low, high = curve['mean'] - curve['std'], curve['mean'] + curve['std']
            panel.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        panel.set_xlabel(axis)
        if axis in LOGARITHMIC:
            panel.set_xscale('log')
            panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
        panel.grid(alpha=0.3)
    best = min(groups, key=lambda group: group['curve']['mean'][-1])
    title = f'{best["name"]} ends lowest, at {best["curve"]["mean"][-1]:.3f}'
    figure.suptitle(f'{title}; not drawn: {others} of those that end higher' if others else title)
    figure.supylabel(f'{LOSS}; band: one standard deviation over seeds')
    columns = max(1, 100 // (max(len(group['name']) for group in groups) + 8))
    names = [group['name'] for group in groups]  # one that begins with _ would have no place in a legend made by itself
    figure.legend(panels[0, 0].lines, names, loc='outside lower center', ncols=columns)
    return figure


def draw_scaling(laws):
    figure = Figure(figsize=(8, 6), layout='constrained')
    panel = figure.subplots()
    for _, members, law in laws:
        points = [(group['parameters'], loss) for group in members for loss in group['best']]
        dots = panel.scatter(*zip(*points), s=14)
        x = np.geomspace(members[0]['parameters'], members[-1]['parameters'])
        y = law['factor'] * x ** law['exponent']
        panel.plot(x, y, color=dots.get_facecolor()[0])
    panel.set(xscale='log', yscale='log', xlabel='parameters', ylabel=f'best {LOSS}')
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    panel.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:.3g}'))
    panel.yaxis.set_minor_formatter(ticker.StrMethodFormatter('{x:.3g}'))
    panel.grid(alpha=0.3, which='both')
    legend = panel.legend(panel.lines, [f'{name}: {law_text(law)}' for name, _, law in laws])
    for text in legend.get_texts():  # not all of the figure: its ticks are written in TeX
        text.set_parse_math(False)
    return figure


@plain_names
def draw_grids(grids, settings):
    """A panel for each family, all on one scale of colours."""
    across, down = min(3, len(grids)), math.ceil(len(grids) / 3)
    figure = Figure(figsize=(3.4 * across, 3.1 * down), layout='constrained')
    panels = figure.subplots(down, across, squeeze=False)
    low, high = loss_range(grids)
    for panel in panels.flat[len(grids) :]:
        panel.axis('off')
    for panel, (name, rows, columns, losses) in zip(panels.flat, grids):
        image = panel.imshow(losses, cmap='viridis', vmin=low, vmax=high)
        panel.set_title(name, fontsize=10)
        panel.set(xlabel=settings[1], ylabel=settings[0])
        panel.set_xticks(range(len(columns)), columns)
        panel.set_yticks(range(len(rows)), rows)
        for (i, j), loss in np.ndenumerate(losses):
            text = '' if math.isnan(loss) else f'{loss:.3f}'
            color, weight = 'w' if image.norm(loss) < 0.6 else 'k', 'bold' if loss == np.nanmin(losses) else 'normal'
            panel.text(j, i, text, ha='center', va='center', color=color, weight=weight)
    figure.colorbar(image, ax=panels, label=f'best {LOSS}')
    return figure


def loss_range(grids):
    return min(np.nanmin(losses) for *_, losses in grids), max(np.nanmax(losses) for *_, losses in grids)


def interactive_grid(grid, settings, low, high):
    name, rows, columns, losses = grid
    texts = [['' if math.isnan(loss) else f'{loss:.4f}' for loss in row] for row in losses]
    shown = dict(texttemplate='%{text}', hoverinfo='skip', colorscale='Viridis', zmin=low, zmax=high)
    heatmap = go.Heatmap(x=list(map(str, columns)), y=list(map(str, rows)), z=losses, text=texts, **shown)
    figure = go.Figure(heatmap, dict(LAYOUT, height=360, margin=dict(l=70, r=10, t=50, b=40)))
    titles = dict(xaxis_title=settings[1], yaxis_title=settings[0])
    figure.update_layout(title_text=name, title_font_size=14, **titles)
    figure.update_xaxes(type='category')
    figure.update_yaxes(type='category', autorange='reversed')
    return figure


def interactive_curves(groups, axis, unit):
    figure = go.Figure()
    for group, color in zip(groups, COLORS * len(groups)):
        curve = group['curve']
        x = unit(group)
        mean, std = curve['mean'], curve['std']
        text = [f'{m:.4f}' if math.isnan(s) else f'{m:.4f} ± {s:.4f}' for m, s in zip(mean, std)]
        line = dict(x=x, y=mean.tolist(), name=group['name'], legendgroup=group['name'], line_color=color)
        figure.add_scatter(**line, text=text, hovertemplate='%{text}', mode='lines+markers')
        if len(group['seeds']) > 1:
            band = dict(x=[*x, *x[::-1]], y=[*(mean + std), *(mean - std)[::-1]], fill='toself', fillcolor=color)
            figure.add_scatter(**band, opacity=0.2, mode='none', hoverinfo='skip')
            figure.data[-1].update(legendgroup=group['name'], showlegend=False)
    figure.update_layout(xaxis_title=axis, yaxis_title=f'{LOSS} (± one std)', **LAYOUT)
    figure.update_xaxes(tickformat='~g' if axis == 'seconds' else '~s')
    if axis in LOGARITHMIC:
        figure.update_xaxes(type='log', dtick='D2')
    return figure


def interactive_scaling(laws):
    figure = go.Figure()
    for (name, members, law), color in zip(laws, COLORS * len(laws)):
        x, y = zip(*[(group['parameters'], loss) for group in members for loss in group['best']])
        dots = dict(mode='markers', marker_color=color, showlegend=False)
        figure.add_scatter(x=x, y=y, **dots, hovertemplate='%{x:,}: %{y:.4f}<extra></extra>')
        x = np.geomspace(min(x), max(x))
        y = law['factor'] * x ** law['exponent']
        figure.add_scatter(x=x, y=y, name=f'{name}: {law_text(law)}', line_color=color, hoverinfo='skip')
    figure.update_layout(xaxis_title='parameters', yaxis_title=f'best {LOSS}', **LAYOUT)
    figure.update_xaxes(type='log', dtick='D2', tickformat='~s')
    figure.update_yaxes(type='log', dtick='L0.1', tickformat='~r')
    return figure


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs compared</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; color: #222; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }}
th, td {{ padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 11rem; }}
td:not(:first-child) wbr {{ display: none; }}
th button {{ all: unset; cursor: pointer; font-weight: 600; }}
th button:focus-visible {{ outline: 2px solid #1f77b4; }}
th[aria-sort=ascending] button::after {{ content: " ↑"; }}
th[aria-sort=descending] button::after {{ content: " ↓"; }}
</style>
<script>{plotly}</script>
<h1>Runs compared</h1>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{notes}
{figures}
<script>
for (const header of document.querySelectorAll('th')) header.querySelector('button').onclick = () => {{
  const up = header.ariaSort !== 'ascending', body = document.querySelector('tbody'), i = header.cellIndex;
  const value = row => row.cells[i].dataset.value;
  const key = row => value(row) === 'nan' ? Infinity : isNaN(value(row)) ? value(row) : Number(value(row));
  const order = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (up ? 1 : -1);
  body.append(...[...body.rows].sort(order));
  for (const other of header.parentNode.cells) other.ariaSort = 'none';
  header.ariaSort = up ? 'ascending' : 'descending';
}};
</script>
</html>
"""
