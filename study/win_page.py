"""The page of study/win.py from its records: table.md and figures in results/win.

python study/win_page.py
"""

import itertools
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import numpy as np

from configurator import ROOT, configure, settings_of
from run.records import complete
from run.tables import markdown_table
from study import win
from study.compare import settings_apart
from study.runner import deviation, fill, holm, mean_and_std, paired, paired_p
from study.win import ABLATION, CHANGES, CONTROLS, FAMILIES, LONG, MAIN, SIZES, STUDY

ENOUGH = 4  # seeds for a row of an answer, or a curve: fewer are a study under way
COLOURS = dict(zip(MAIN, ('#e69f00', '#777777', '#56b4e9', '#0072b2')))
TITLES = {  # of the sizes
    '0.23M': 'Shakespeare, 0.23M',
    '0.45M': 'Shakespeare, 0.45M',
    '2.2M': 'Shakespeare, 2.2M',
    '0.33M Python': 'Python code, 0.33M',
    '0.23M rotary Muon': 'Shakespeare, 0.23M, rotary, Muon',
    '0.23M 5000': 'Shakespeare, 0.23M, tuned for 5,000',
}
ANSWERS = {  # the tables of `make_answer` by their baseline, and the pages that show them
    'SwiGLU': ['README.md', 'results/win/README.md'],
    'GELU': ['results/win/README.md'],
}


def groups_of(stage, size):
    """{family: {seed: record}} of the runs of a stage that finished, in the order of the families; of stages after the
    trials those with the settings that these chose.
    """
    found = {family: {} for family in (ABLATION if stage == 'ablation' else {**FAMILIES, **CONTROLS})}
    runs = [run for run in STUDY.read().values() if (run['stage'], run['size']) == (stage, size) and 'finished' in run]
    if stage != 'ablation' and runs:
        chosen = {family: chosen_key(size.partition(',')[0], family) for family in found}
        runs = [run for run in runs if win.key_of(run['config']) == chosen.get(run['family'])]
    runs = [run for run in runs if run['family'] in found]
    check_alike(runs)
    for run in runs:
        found[run['family']][run['seed']] = run
    return {family: runs for family, runs in found.items() if runs}


def check_alike(runs):
    """ValueError for runs of different texts, and for those of a family that differ in more than their seed, or not
    even in that.
    """
    first = {}
    for run in runs:
        settings = settings_apart({**run, 'config': complete(run['config'])})
        facts = {'texts': run['dataset']['splits'], f'settings of {run["family"]}': settings}
        if 'test_data' in run:
            facts['unseen texts'] = run['test_data']
        for what, fact in facts.items():
            name, known = first.setdefault(what, (run['name'], fact))
            if known != fact:
                raise ValueError(f'records of different {what}: {name!r} and {run["name"]!r}; move one of them away')
        name = first.setdefault((run['family'], run['seed']), run['name'])
        if name != run['name']:
            raise ValueError(f'{name!r} and {run["name"]!r} have the same seed: move one of them away')


def diverged(stage, size):
    """Which runs of a stage diverged, and are in no mean, as lines of the page."""
    runs = [run for run in STUDY.read().values() if (run['stage'], run['size']) == (stage, size) and 'failed' in run]
    return ['', f'Diverged, and not counted: {"; ".join(sorted(run["name"] for run in runs))}.'] if runs else []


def chosen_key(size, name):
    """The `key_of` the best trial of a family, or of that of a control with its change; None before all trials."""
    family, change = CONTROLS.get(name, (name, None))
    best = win.best_settings(size, family)
    return best and win.key_of(FAMILIES[family] | best | CHANGES.get(change, {}))


def difference(runs, others, key):
    """Of the seeds of both the mean difference, half its 95 % interval, p of a paired t-test, and their number, or None
    for fewer than two.
    """
    values, baseline = paired(runs, others, key)
    if len(values) < 2 or runs is others:
        return None
    apart = np.subtract(values, baseline)
    return apart.mean(), half_interval(apart), paired_p(values, baseline), len(values)


def half_interval(values):
    """Half the 95 % interval of a mean over the first axis."""
    from scipy.stats import t

    return t.ppf(0.975, len(values) - 1) * deviation(values) / len(values) ** 0.5


def cell(found):
    return '{:+.4f} ± {:.4f} (p = {:.2g}, n = {})'.format(*found) if found else ''


def corrected(where, found):
    """What of the differences {name: `difference`} holds when all of them are counted, as a line of the page."""
    tests = {name: each[2] for name, each in found.items() if each}
    return [f'- {where}, {len(tests)} tests: {"; ".join(holm(tests)) or "none"}'] if tests else []


def with_holm(lines, columns):
    """A table, and below it which differences of its columns {name: {row: `difference`}} hold."""
    held = [line for name, found in columns.items() for line in corrected(name, found)]
    return [*lines, '', "At 0.05 these hold by Holm's correction:", '', *held] if held else lines


def validation(run):
    return run['final']['val_loss']


def held_out(run):
    return run['test']


def trained_on(run):
    return run['final']['train_loss']


# the tables, as lists of lines


def make_answer(baseline, key=held_out):
    """How far the main families are from one of them, by default on unseen text, on the seeds that all have, a row for
    each size and stage with enough of them. Those are bold that hold by Holm's correction over their row.
    """
    others = [name for name in ('channel KAN', 'KAN-GLU', 'GELU', 'SwiGLU') if name != baseline]
    rows, lost = [], []
    long_ones = [size for size in SIZES if size not in win.SHAPES]
    for stage, size in [*itertools.product(win.UNSEEN, win.SHAPES), *itertools.product(win.UNSEEN, long_ones)]:
        groups = groups_of(stage, size)
        seeds = set.intersection(*(set(groups.get(name, {})) for name in MAIN))
        if len(seeds) < ENOUGH:
            continue
        groups = {name: {seed: groups[name][seed] for seed in seeds} for name in MAIN}
        gaps = {name: difference(groups[name], groups[baseline], key) for name in others}
        held = holm({name: gap[2] for name, gap in gaps.items()})
        cells = ['{:+.4f} ± {:.4f}'.format(*gap) for gap in gaps.values()]
        cells = [f'**{cell}**' if name in held else cell for name, cell in zip(gaps, cells)]
        loss = mean_and_std([*map(key, groups[baseline].values())], 4)
        rows.append([TITLES[size], during(stage, size), str(len(seeds)), *cells, loss])
        lost += diverged(stage, size)
    heads = ['GPT', 'trained for', 'seeds', *(f'{name} to {baseline}' for name in others), f'loss of {baseline}']
    return markdown_table(heads, rows) + lost


def during(stage, size):
    iterations = SIZES[size].get('max_iters') or settings_of('train.py', [win.CONFIG])['max_iters']
    lengths = {'seconds': f'as many seconds as {iterations:,} take SwiGLU', 'longer': f'{LONG:,} iterations'}
    return lengths.get(stage, f'{iterations:,} iterations')


def make_ablation(size):
    groups, rows = groups_of('ablation', size), []
    baselines = 'SwiGLU', 'GELU'
    for family, runs in groups.items():
        first = next(iter(runs.values()))
        cells = [family, f'{first["parameters"]["total"]:,}', mean_and_std([*map(validation, runs.values())], 4)]
        rows.append(cells + [cell(difference(runs, groups.get(name, {}), validation)) for name in baselines])
    heads = ['splines', 'parameters', 'last validation loss', *(f'to {name}' for name in baselines)]
    return markdown_table(heads, rows)


def make_tuning(size):
    """A line for each family: its loss at each rate with the usual scale, at the other scales at its best rate, and at
    finer settings.
    """
    heads = [*(f'{rate:g}' for rate in win.RATES[size]), *(f'scale {scale:g}' for scale in win.SCALES)]
    rows, n = [], len(heads)
    for family in FAMILIES:
        losses, trials = win.tried(size, family), win.trials_of(size, family)
        found = [losses.get(win.key_of(FAMILIES[family] | trial)) for trial in trials] + [None] * (n - len(trials))
        cells = ['' if loss is None else f'{loss:.4f}' for loss in found]
        finer = [f'{named(trial)}: {cell}' for trial, cell in zip(trials[n:], cells[n:]) if cell]
        best = win.best_settings(size, family)
        if losses:
            rows.append([family, *cells[:n], '; '.join(finer), named(best) if best else ''])
    return markdown_table(['family', *heads, 'finer', 'chosen'], rows)


def make_depths(size):
    """The last validation losses of other depths, of as many parameters, beside those of the final runs."""
    groups = {shape: groups_of('depth', shape) for shape in win.DEPTHS if shape.startswith(f'{size}, ')}
    if not any(groups.values()):
        return []
    groups[size], rows = groups_of('final', size), []
    for family in MAIN:
        found = [[*map(validation, groups[shape].get(family, {}).values())] for shape in groups]
        rows.append([family, *(f'{mean_and_std(losses, 4)} (n = {len(losses)})' if losses else '' for losses in found)])
    return markdown_table(['family', *groups], rows)


def named(trial):
    """A trial in a few words."""
    splines = f', splines x {trial["spline_lr_scale"]:g}' if 'spline_lr_scale' in trial else ''
    return f'{trial["learning_rate"]:g}, {trial["init_std"]:g}{splines}'


def make_final(stage, size):
    """The families by their loss on unseen text, and how far they are from two of them."""
    groups, rows = groups_of(stage, size), []
    gaps = {'SwiGLU': {}, 'GELU': {}}  # of each family, to these
    for family, runs in sorted(groups.items(), key=lambda pair: np.mean([*map(held_out, pair[1].values())])):
        first = next(iter(runs.values()))
        cells = [family, f'{first["parameters"]["total"]:,}', f'{first["config"]["max_iters"]:,}']
        for key in validation, lambda run: run['final']['best_val_loss'], held_out:
            cells.append(mean_and_std([key(run) for run in runs.values()], 4))
        for baseline, found in gaps.items():
            found[family] = difference(runs, groups.get(baseline, {}), held_out)
        rows.append(cells + [cell(found[family]) for found in gaps.values()])
    heads = ['family', 'parameters', 'iterations', 'last validation loss', 'best one', 'unseen text']
    heads += [f'to {baseline}' for baseline in gaps]
    tests = {
        f'to {baseline} (controls apart)': {family: gap for family, gap in found.items() if family in FAMILIES}
        for baseline, found in gaps.items()
    }
    return with_holm(markdown_table(heads, rows), tests) + diverged(stage, size)


def make_controls(size):
    """What the learning adds: how far a family is from itself with one thing changed, on the seeds of both."""
    groups, rows = groups_of('final', size), []
    columns = {'unseen text': {}, 'last validation loss': {}}
    for control in sorted(groups.keys() & CONTROLS.keys()):
        family, change = CONTROLS[control]
        found = [difference(groups.get(family, {}), groups[control], key) for key in (held_out, validation)]
        if any(found):
            rows.append([family, change, *map(cell, found)])
            for column, gap in zip(columns.values(), found):
                column[control] = gap
    return with_holm(markdown_table(['family', 'less itself with', *columns], rows), columns)


def make_steps(size):
    run, rows = STUDY.read().get(f'steps, {size}'), []
    first = run['rows'][0]['seconds']['total'] if run else None
    for row in run['rows'] if run else []:
        low, median, high = 1e3 * np.percentile(row['seconds']['total'], [20, 50, 80])
        ratio = f'{median / 1e3 / np.median(first):.2f}'
        if row is not run['rows'][0]:
            ratio += ' ({:.2f} to {:.2f})'.format(*ratio_interval(row['seconds']['total'], first))
        cells = [row['name'], f'{median:.1f} ({low:.1f} to {high:.1f})', ratio]
        rows.append([*cells, f'{row["peak_bytes"] / 2**20:,.0f} MiB'])
    return markdown_table(['family', 'ms of a step (p20 to p80)', 'times SwiGLU (95 % interval)', 'peak memory'], rows)


def ratio_interval(seconds, others):
    """The 95 % interval of the ratio of the medians of steps taken in turn, by a bootstrap of the turns."""
    picks = np.random.default_rng(0).integers(len(others), size=(2000, len(others)))
    ratios = np.median(np.asarray(seconds)[picks], 1) / np.median(np.asarray(others)[picks], 1)
    return np.quantile(ratios, [0.025, 0.975])


def make_shapes(size):
    """What the functions of the final runs became: shares of all channels of a layer, over the seeds."""
    rows = []
    for family, runs in groups_of('final', size).items():
        for layer in next(iter(runs.values())).get('shapes', {}):
            shapes = [run['shapes'][layer] for run in runs.values()]
            n = sum(shape['channels'] for shape in shapes)
            shares = [sum(shape['flat'] for shape in shapes) / n]
            for key in 'turns', 'turns_before':
                shares += [counts / n for counts in np.sum([shape[key] for shape in shapes], 0)]
            flat, never, once, twice, often, *before = (f'{share:.0%}' for share in shares)
            after = [f'{a} ({b})' for a, b in zip((never, once, twice, often), before)]
            change = np.median([shape['change'] for shape in shapes])
            rows.append([family, layer.removeprefix('transformer.'), f'{change:.2f}', flat, *after])
    return markdown_table(['family', 'layer', 'change', 'flat', 'no turn', 'one', 'two', 'three or more'], rows)


def make_page():
    tables = {
        f'All sizes, to {baseline}, {text}': make_answer(baseline, key)
        for text, key in (('validation text', validation), ('text that they were trained on', trained_on))
        for baseline in ('SwiGLU', 'GELU')
    }
    varied = 'splines varied (of KAN-GLU, where no other family is named), and what helps all'
    for size in SIZES:
        tables |= {
            f'{size}: fresh seeds': make_final('final', size),
            f'{size}: what the learning adds': make_controls(size),
            f'{size}: at the seconds of SwiGLU': make_final('seconds', size),
            f'{size}: {LONG:,} iterations': make_final('longer', size),
            f'{size}: steps taken in turn': make_steps(size),
            f'{size}: trials of learning rate and initial scale': make_tuning(size),
            f'{size}: other depths, last validation loss': make_depths(size),
            f'{size}: {varied}': make_ablation(size),
            f'{size}: what the learned functions became (in brackets: the activation they began as)': make_shapes(size),
        }
    parts = []
    for title, lines in tables.items():
        if lines:
            parts += [f'## {title}', '', *lines, '']
    return '\n'.join(parts)


# the figures


def draw_gaps(path):
    """Of each size how far the main families are from SwiGLU on unseen text."""
    panels = {TITLES[size]: gaps_of(size, MAIN) for size in SIZES}
    draw_differences(path, panels, MAIN, 'Ahead of SwiGLU on unseen text')


def draw_families(path):
    """How far all families are from SwiGLU, at the sizes that have them."""
    panels = {TITLES[size]: found for size in SIZES if len(found := gaps_of(size, FAMILIES)) == len(FAMILIES)}
    draw_differences(path, panels, [*FAMILIES], 'Ahead of SwiGLU on unseen text')


def gaps_of(size, names):
    """{family: (its `difference` to SwiGLU on unseen text, a colour)}"""
    groups = groups_of('final', size)
    found = {name: difference(groups[name], groups.get('SwiGLU', {}), held_out) for name in names if name in groups}
    return {name: (gap, COLOURS.get(name, '#777777')) for name, gap in found.items()}


def draw_controls(path):
    """How far each family that learns is from itself with one thing changed, on unseen text: a panel for each of them
    and each size.
    """
    panels = {}
    for size in SIZES:
        groups = groups_of('final', size)
        for control in sorted(groups.keys() & CONTROLS.keys()):
            family, change = CONTROLS[control]
            if change != 'rate of splines x 16':  # of Python alone, where it tells what a second search gained
                gap = difference(groups.get(family, {}), groups[control], held_out)
                panels.setdefault(f'{family} of {size}', {})[change] = gap, COLOURS[family]
    draw_differences(path, panels, [*CHANGES], 'Ahead of itself with one change', of_panels=True)


def draw_differences(path, panels, names, what, of_panels=False):
    """Panels {title: {row: (`difference`, colour)}}, of at least five seeds, with their 95 % intervals. The title says
    which rows (or panels) are below zero, as `what` names that.
    """
    panels = {name: {row: of for row, of in rows.items() if of[0] and of[0][3] >= 5} for name, rows in panels.items()}
    panels = {name: rows for name, rows in panels.items() if rows}
    names = [name for name in names if any(name in rows for rows in panels.values())]
    if not names:
        return
    figure, axes = rows_of(len(panels), min(2, len(panels)), 7.5, 0.9 + 0.35 * len(names))
    for i, (axis, (name, rows)) in enumerate(zip(axes, panels.items())):
        for row, ((mean, half, *_), colour) in rows.items():
            axis.errorbar(mean, names.index(row), xerr=half, fmt='o', capsize=3, color=colour)
        axis.axvline(0, color='black', linewidth=0.8)
        axis.set_yticks(range(len(names)), names if i % 2 == 0 else [''] * len(names))
        axis.set(title=name, xlabel=f'nats per {"token" if "Python" in name else "character"}')
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.locator_params(axis='x', nbins=4)
        axis.grid(alpha=0.3, axis='x')
    counted = "differences of losses, 95 % intervals; named: what holds by Holm's rule in its panel"
    named = textwrap.fill(leaders(panels, of_panels), 62)
    figure.suptitle(f'{what}:\n{named}\n({counted})')
    figure.savefig(path, dpi=130)


def leaders(panels, of_panels):
    """Which rows (or panels) are below zero, and of several in how many, by Holm's correction over a panel."""
    below = {}
    for panel, rows in panels.items():
        held = holm({row: gap[2] for row, (gap, _) in rows.items()})
        for row, (gap, _) in rows.items():
            below.setdefault(panel if of_panels else row, []).append(gap[0] < 0 and row in held)
    ahead = {name: found for name, found in below.items() if any(found)}
    counts = [f'{name} in {sum(found)} of {len(found)}' if found[1:] else name for name, found in ahead.items()]
    return ', '.join(counts) or 'none'


def draw_curves(path):
    """Validation losses in training, less those of SwiGLU of the same seed, with 95 % intervals."""
    groups = {(stage, size): curves_of(stage, size) for size in SIZES for stage in ('final', 'longer')}
    groups = {key: found for key, found in groups.items() if found}
    if not groups:
        return
    figure, panels = rows_of(len(groups), 3, 11, 3.2)
    for panel, ((_, size), found) in zip(panels, groups.items()):
        for family, (steps, apart) in found.items():
            mean, half = apart.mean(0), half_interval(apart)
            panel.plot(steps, mean, 'o-', color=COLOURS[family], label=family, markersize=4)
            panel.fill_between(steps, mean - half, mean + half, color=COLOURS[family], alpha=0.15, linewidth=0)
        panel.axhline(0, color='black', linewidth=0.8)
        panel.set_title(f'{TITLES[size]}\n{steps[-1]:,} iterations', fontsize=10)
        panel.set_xlabel('iteration')
        panel.grid(alpha=0.3)
        panel.locator_params(axis='x', nbins=5)
    panels[0].legend(frameon=False)
    panels[0].set_ylabel("validation loss less SwiGLU's")
    figure.suptitle('In training: below SwiGLU is better (95 % intervals)')
    figure.savefig(path, dpi=130)


def curves_of(stage, size):
    """{family: (iterations, losses less those of SwiGLU, a row a seed)} of those with enough of SwiGLU's seeds."""
    groups, found = groups_of(stage, size), {}
    baseline = groups.get('SwiGLU', {})
    for family in [name for name in MAIN if name in groups and name != 'SwiGLU']:
        seeds = sorted(groups[family].keys() & baseline.keys())
        if len(seeds) >= ENOUGH:
            steps = [line['iter'] for line in baseline[seeds[0]]['log'][1:]]
            found[family] = steps, np.subtract(*(losses_of(runs, seeds) for runs in (groups[family], baseline)))
    return found


def losses_of(runs, seeds):
    """(seeds, evaluations) of the validation, but for that before the first step."""
    return [[line['val_loss'] for line in runs[seed]['log'][1:]] for seed in seeds]


def draw_scaling(path):
    """The loss on unseen Shakespeare over the parameters, with 95 % intervals."""
    alike = [size for size in SIZES if SIZES[size].keys() == {'n_layer', 'n_head', 'n_embd'}]  # but for the shape
    sizes = [size for size in alike if len(groups_of('final', size).get('SwiGLU', {})) > 1]
    if len(sizes) < 2:
        return
    figure, (panel,) = panels_of(1, 1, 6, 4)
    groups = [groups_of('final', size) for size in sizes]
    for family in MAIN:
        runs = [found[family] for found in groups if family in found]
        losses = [np.array([*map(held_out, each.values())]) for each in runs]
        means, halves = [loss.mean() for loss in losses], [half_interval(loss) for loss in losses]
        panel.errorbar([*map(count_of, runs)], means, halves, fmt='o-', capsize=3, color=COLOURS[family], label=family)
    panel.set(xscale='log', xlabel='parameters', ylabel='loss on unseen text (nats per character)')
    panel.set_xticks([count_of(found['SwiGLU']) for found in groups], sizes, minor=False)
    panel.set_xticks([], minor=True)
    panel.set_title('On unseen text by size, lower is better (95 % intervals)')
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=130)


def count_of(runs):
    return next(iter(runs.values()))['parameters']['total']


def draw_functions(path, size, family):
    """Of each layer of a GPT some functions, from the one that changed least to the one that changed most."""
    began = 'SiLU' if FAMILIES[family].get('mlp') == 'swiglu' else 'GELU'
    runs = groups_of('final', size).get(family, {})
    layers = next((run['shapes'] for run in runs.values() if any(one['curves'] for one in run['shapes'].values())), {})
    if not layers:
        return
    n = max(len(one['curves']) for one in layers.values())
    figure, panels = panels_of(len(layers), n, 1.7 * n, 1.8 * len(layers) + 0.6)
    for row, one in enumerate(layers.values()):
        for column, (x, learned, plain) in enumerate(one['curves']):
            panel = panels[row * n + column]
            panel.plot(x, plain, color='#999999', linewidth=1.2, label=began)
            panel.plot(x, learned, color='#0072b2', linewidth=1.8, label='learned')
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.3)
        panels[row * n].set_ylabel(f'layer {row}')
    panels[0].legend(frameon=False, fontsize=8, handlelength=1)
    figure.supxlabel('input of the channel', fontsize=9)
    figure.suptitle(f'{family}, {size}: what {began} became, from the channel that changed least to the most')
    figure.savefig(path, dpi=130)


def panels_of(down, across, width, height):
    """(figure, its panels in a row)"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(down, across, squeeze=False).flatten()


def rows_of(n, across, width, height):
    """(figure, n panels) in rows of so many, each of this height."""
    down = -(-n // across)
    figure, panels = panels_of(down, across, width, 0.5 + height * down)
    for panel in panels[n:]:
        panel.remove()
    return figure, panels[:n]


if __name__ == '__main__':
    configure(globals())
    STUDY.show(make_page())
    for baseline, pages in ANSWERS.items():
        answer = make_answer(baseline)
        for page in pages:
            fill(Path(ROOT, page), f'study/win_page.py, {baseline}', answer)
    draw_gaps(STUDY.folder / 'gaps.png')
    draw_families(STUDY.folder / 'families.png')
    draw_controls(STUDY.folder / 'controls.png')
    draw_curves(STUDY.folder / 'curves.png')
    draw_scaling(STUDY.folder / 'scaling.png')
    for family in 'channel KAN', 'KAN-GLU':
        draw_functions(STUDY.folder / f'functions-{family.replace(" ", "-")}.png', win.DRAWN, family)
