"""
What compare.py draws: PNG by matplotlib, the same to zoom into by plotly, and the page around it.

A group is a row of the table: its name, seeds, parameters, `best` losses, and `curve` (iterations, mean, std). A law is a family of
sizes: (name, groups, {factor, exponent}). A grid is (family, values of one setting, values of another, losses (rows, columns)).
"""

import math

import matplotlib
import numpy as np
import plotly.graph_objects as go
import plotly.io
from matplotlib import pyplot as plt
from matplotlib import ticker

matplotlib.use('Agg')

AXES = {  # of the curves: what a line of the log says in this unit
    'iterations': lambda group, iteration: iteration,
    'tokens': lambda group, iteration: iteration * group['tokens_per_iter'],
    'FLOPs': lambda group, iteration: iteration * group['tokens_per_iter'] * group['flops_per_token'],
    'seconds': lambda group, iteration: iteration * group['seconds_per_step'],
}
LOGARITHMIC = ('FLOPs', 'seconds')
COLORS = [matplotlib.colors.to_hex(color) for color in plt.rcParams['axes.prop_cycle'].by_key()['color']]
LAYOUT = dict(
    template='plotly_white', height=480, margin=dict(l=50, r=10, t=10, b=40), legend=dict(orientation='h', y=-0.2)
)


def law_text(law):
    return f'{law["factor"]:.3g} · parameters^{law["exponent"]:.4f}'


def has_curves(groups):
    return any(len(group['curve']['iterations']) > 1 for group in groups if group['finished'])


def draw_curves(groups):
    figure, panels = plt.subplots(2, 2, figsize=(12, 9), sharey=True, layout='constrained')
    for panel, (axis, unit) in zip(panels.flat, AXES.items()):
        for group in groups:
            curve = group['curve']
            x = [unit(group, iteration) for iteration in curve['iterations']]
            (line,) = panel.plot(x, curve['mean'], marker='o', markersize=3, label=group['name'])
            panel.fill_between(
                x, curve['mean'] - curve['std'], curve['mean'] + curve['std'], color=line.get_color(), alpha=0.2
            )
        panel.set_xlabel(axis)
        if axis in LOGARITHMIC:
            panel.set_xscale('log')
            panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
        panel.grid(alpha=0.3)
    figure.supylabel('validation loss, nats per token; band: one standard deviation over seeds')
    columns = max(1, 120 // (max(len(group['name']) for group in groups) + 8))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=columns)
    return figure


def draw_scaling(laws):
    figure, panel = plt.subplots(figsize=(8, 6), layout='constrained')
    for name, members, law in laws:
        points = [(group['parameters'], loss) for group in members for loss in group['best']]
        dots = panel.scatter(*zip(*points), s=14)
        x = np.geomspace(members[0]['parameters'], members[-1]['parameters'])
        panel.plot(
            x, law['factor'] * x ** law['exponent'], color=dots.get_facecolor()[0], label=f'{name}: {law_text(law)}'
        )
    panel.set(xscale='log', yscale='log', xlabel='parameters', ylabel='best validation loss, nats per token')
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    panel.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:.3g}'))
    panel.yaxis.set_minor_formatter(ticker.StrMethodFormatter('{x:.3g}'))
    panel.grid(alpha=0.3, which='both')
    panel.legend()
    return figure


def draw_grids(grids, settings):
    """A panel for each family, all on one scale of colours."""
    n = min(3, len(grids))
    figure, panels = plt.subplots(
        -(-len(grids) // n), n, figsize=(4 * n, 3.6 * -(-len(grids) // n)), squeeze=False, layout='constrained'
    )
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
            dark = image.norm(loss) < 0.6
            weight = 'bold' if loss == np.nanmin(losses) else 'normal'
            panel.text(
                j,
                i,
                f'{loss:.3f}'.replace('nan', ''),
                ha='center',
                va='center',
                color='w' if dark else 'k',
                weight=weight,
            )
    figure.colorbar(image, ax=panels, label='best validation loss, nats per token')
    return figure


def loss_range(grids):
    return min(np.nanmin(losses) for *_, losses in grids), max(np.nanmax(losses) for *_, losses in grids)


def interactive_grid(grid, settings, low, high):
    name, rows, columns, losses = grid
    texts = [[f'{loss:.4f}'.replace('nan', '') for loss in row] for row in losses]
    shown = dict(
        z=losses, text=texts, texttemplate='%{text}', hoverinfo='skip', colorscale='Viridis', zmin=low, zmax=high
    )
    figure = go.Figure(go.Heatmap(x=[str(value) for value in columns], y=[str(value) for value in rows], **shown))
    layout = dict(title_text=name, title_font_size=14, xaxis_title=settings[1], yaxis_title=settings[0])
    figure.update_layout(**layout, template='plotly_white', height=360, margin=dict(l=70, r=10, t=50, b=40))
    figure.update_xaxes(type='category')
    figure.update_yaxes(type='category', autorange='reversed')
    return figure


def interactive_curves(groups, axis, unit):
    figure = go.Figure()
    for group, color in zip(groups, COLORS * len(groups)):
        curve = group['curve']
        x = [unit(group, iteration) for iteration in curve['iterations']]
        text = [
            f'{mean:.4f}' + ('' if math.isnan(std) else f' ± {std:.4f}')
            for mean, std in zip(curve['mean'], curve['std'])
        ]
        line = dict(x=x, y=curve['mean'].tolist(), name=group['name'], legendgroup=group['name'], line_color=color)
        figure.add_scatter(**line, text=text, hovertemplate='%{text}', mode='lines+markers')
        if len(group['seeds']) > 1:
            edge = [*(curve['mean'] + curve['std']), *(curve['mean'] - curve['std'])[::-1]]
            figure.add_scatter(
                x=[*x, *x[::-1]], y=edge, fill='toself', fillcolor=color, opacity=0.2, mode='none', hoverinfo='skip'
            )
            figure.data[-1].update(legendgroup=group['name'], showlegend=False)
    figure.update_layout(xaxis_title=axis, yaxis_title='validation loss, nats per token (± one std)', **LAYOUT)
    figure.update_xaxes(
        tickformat='~g' if axis == 'seconds' else '~s', **(dict(type='log', dtick='D2') if axis in LOGARITHMIC else {})
    )
    return figure


def interactive_scaling(laws):
    figure = go.Figure()
    for (name, members, law), color in zip(laws, COLORS * len(laws)):
        x, y = zip(*[(group['parameters'], loss) for group in members for loss in group['best']])
        figure.add_scatter(
            x=x,
            y=y,
            mode='markers',
            marker_color=color,
            showlegend=False,
            hovertemplate='%{x:,}: %{y:.4f}<extra></extra>',
        )
        x = np.geomspace(min(x), max(x))
        figure.add_scatter(
            x=x,
            y=law['factor'] * x ** law['exponent'],
            name=f'{name}: {law_text(law)}',
            line_color=color,
            hoverinfo='skip',
        )
    figure.update_layout(xaxis_title='parameters', yaxis_title='best validation loss, nats per token', **LAYOUT)
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
  const key = row => {{ const v = row.cells[i].dataset.value; return v === 'nan' ? Infinity : isNaN(v) ? v : Number(v); }};
  const order = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (up ? 1 : -1);
  body.append(...[...body.rows].sort(order));
  for (const other of header.parentNode.cells) other.ariaSort = other === header ? (up ? 'ascending' : 'descending') : 'none';
}};
</script>
</html>
"""


def section(title, figures):
    """HTML: a heading and the interactive figures below it; nothing where there are none."""
    drawn = [
        plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, config={'responsive': True})
        for figure in figures
    ]
    return f'<h2>{title}</h2>{"".join(drawn)}' if drawn else ''
