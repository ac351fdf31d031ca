"""
Finished runs side by side: a table, curves, and tests over seeds.

    python study/compare.py out-sweep/*
    python study/compare.py out-sweep/* --baseline=shakespeare_char_nano_balanced --out=results/nano
    python study/compare.py out-sizes/* --scaling=True
    python study/compare.py out-pilot/* --over=learning_rate,init_std
    python study/compare.py results/nano/runs.jsonl out-mine --baseline=nano_kan

Takes the folders that train.py leaves behind (run.json and log.jsonl are enough), and the runs.jsonl of studies. Runs that differ in nothing but their seed are one
row: mean and standard deviation over its seeds, and a paired t-test against the baseline over the seeds both have. Writes compare.md,
compare.json, compare.html (one file, no network needed) and the figures as PNG into --out.
"""

import html
import json
import math
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import numpy as np
import plotly.offline
from scipy import stats

from configurator import INCIDENTAL, configure
from run.files import write_atomically
from run.records import complete
from study import figures
from study.runner import deviation, mean_and_std, paired_p, read_run, read_runs

# -----------------------------------------------------------------------------
out = 'out-compare'  # the folder to write into
baseline = ''  # the row that the others are compared with, by its name; by default the first
mix = False  # compare even runs on other data, other validation windows or another number of tokens
over = (
    ''  # two settings, joined by a comma: also the best loss over the two for each family, the rows alike in all else
)
scaling = False  # fit a power law of loss and parameters to every family, the rows that differ in size only
# -----------------------------------------------------------------------------
SIZE = ('n_layer', 'n_head', 'n_embd', 'mlp_hidden', 'kan_hidden')


# reading


def read_all(paths):
    """The runs in folders of train.py and in files runs.jsonl, [{name, record, log}]; what holds none is left out with a word."""
    runs = []
    for path in paths:
        found = read_runs(path) if path.endswith('.jsonl') else {path: read_run(path)}
        for name, record in found.items():
            if len(record) > 0:
                runs.append(check_run(name, record, path))
            else:
                print(f'left out: {path} holds no run of train.py, it has no run.json', file=sys.stderr)
    return runs


def check_run(name, record, path):
    """{name, record, log} of a run, its settings complete; ValueError where something is missing."""
    try:
        for keys in ('config', 'seed'), ('parameters', 'total'), ('dataset', 'splits'):
            record[keys[0]][keys[1]]
        record['tokens_per_iter'], record['flops_per_token']
    except (KeyError, TypeError) as error:
        raise ValueError(f'{path} is damaged or of an older train.py ({error!r})') from None
    log = [line for line in record['log'] if line['iter'] > 0]
    return {'name': name, 'record': {**record, 'config': complete(record['config'])}, 'log': log}


def group_runs(runs):
    """[{name, config, finished: [...], unfinished: [...]}]: runs that differ in their seed only."""
    groups = {}
    for run in runs:
        config = {key: value for key, value in run['record']['config'].items() if key not in (*INCIDENTAL, 'seed')}
        key = json.dumps([config, run['record']['dataset']['splits']], sort_keys=True)
        group = groups.setdefault(
            key, {'name': name_of_row(run['name']), 'config': config, 'finished': [], 'unfinished': []}
        )
        group['finished' if 'finished' in run['record'] and run['log'] else 'unfinished'].append(run)
    names = [group['name'] for group in groups.values()]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(clash_text(*[group for group in groups.values() if group['name'] == name]))
    shared = os.path.commonprefix(names) if len(names) > 1 else ''
    shared = shared[: 1 + (shared.rfind(',') if ',' in shared else max(shared.rfind('_'), shared.rfind('-')))]
    for group in groups.values():
        group['full_name'], group['name'] = group['name'], group['name'].removeprefix(shared)
        folders = {}
        for run in group['finished']:
            if (seed := run['record']['config']['seed']) in folders:
                raise ValueError(f'seed {seed} of {group["name"]} is there twice: {folders[seed]} and {run["name"]}')
            folders[seed] = run['name']
    return list(groups.values())


def clash_text(one, other, *_):
    folders = [(group['finished'] + group['unfinished'])[0]['name'] for group in (one, other)]
    changed = [
        key for key in sorted(one['config'] | other['config']) if one['config'].get(key) != other['config'].get(key)
    ]
    listed = (
        ', '.join(f'{key} ({one["config"].get(key)!r} and {other["config"].get(key)!r})' for key in changed)
        or 'their data'
    )
    return (
        f'{folders[0]} and {folders[1]} would be one row, but differ in {listed}: leave one out, or rename its folder'
    )


def name_of_row(folder):
    """The name of a run's folder without out- and the seed."""
    name = os.path.basename(os.path.normpath(folder)).removeprefix('out-')
    return re.sub(r'[,-]?seed[=-]?\d+', '', name)


def check_comparable(groups):
    """ValueError, with the reason, where the groups were not trained or evaluated on the same."""
    facts = {
        'data': lambda g, record: (
            tuple(data['sha256'] for data in (record['dataset']['splits'] or {}).values()) or g['config']['dataset']
        ),
        'validation windows (eval_iters * batch_size of them, block_size long)': lambda g, record: (
            g['config']['eval_iters'] * g['config']['batch_size'],
            g['config']['block_size'],
        ),
        'iterations between evaluations': lambda g, record: g['config']['eval_interval'],
        'tokens to train on': lambda g, record: g['config']['max_iters'] * record['tokens_per_iter'],
    }
    for what, fact in facts.items():
        found = {g['name']: fact(g, (g['finished'] + g['unfinished'])[0]['record']) for g in groups}
        if len(set(found.values())) > 1:
            listed = '; '.join(
                f'{name}: {" ".join(str(v)[:12] for v in np.atleast_1d(value))}' for name, value in found.items()
            )
            raise ValueError(f'the runs have different {what} ({listed}); to compare them all the same, add --mix=True')


# numbers


def summarize(group):
    """Add what the table and the curves show to a group of finished runs."""
    records, logs = ([run[key] for run in group['finished']] for key in ('record', 'log'))
    first = records[0]
    group['seeds'] = [record['config']['seed'] for record in records]
    group['parameters'] = first['parameters']['total']
    group['flops_per_token'] = first['flops_per_token']
    group['tokens_per_iter'] = first['tokens_per_iter']
    group['tokens'] = group['config']['max_iters'] * first['tokens_per_iter']
    speeds = [line['tokens_per_s'] / first['tokens_per_iter'] for log in logs for line in log if line['tokens_per_s']]
    speeds = speeds or [log[-1]['iter'] / log[-1]['seconds'] for log in logs]  # resumed at the only evaluation
    group['seconds_per_step'] = 1 / float(np.median(speeds))
    group['peak_memory'] = float(np.median([max(line['peak_mem'] for line in log) for log in logs]))
    group['best'] = [record['final']['best_val_loss'] for record in records]
    group['final'] = [record['final']['val_loss'] for record in records]
    group['devices'] = sorted({f'{record["device"]}, torch {record["versions"]["torch"]}' for record in records})
    chars, splits = first['dataset'].get('val_chars'), first['dataset']['splits']
    group['chars_per_token'] = chars / splits['val']['tokens'] if chars else math.nan
    iterations = sorted(set.intersection(*({line['iter'] for line in log} for log in logs)))
    losses = np.array(
        [[next(line['val_loss'] for line in log if line['iter'] == i) for i in iterations] for log in logs]
    )
    group['curve'] = {'iterations': iterations, 'mean': losses.mean(0), 'std': deviation(losses)}


def compare_with(base, group):
    """(mean difference of the best losses over the seeds both have, p of a paired t-test, number of these seeds); NaN for too few."""
    pairs = [
        (group['best'][i], base['best'][base['seeds'].index(seed)])
        for i, seed in enumerate(group['seeds'])
        if seed in base['seeds']
    ]
    if not pairs:
        return math.nan, math.nan, 0
    ours, theirs = np.array(pairs).T
    return float((ours - theirs).mean()), paired_p(ours, theirs), len(pairs)


def fit_power_law(groups):
    """
    loss = factor * parameters ** exponent through the mean losses of the sizes of a family, by least squares of the logarithms.
    The 95 % interval of the exponent is Student's, with as many degrees of freedom as sizes but two.
    """
    fit = stats.linregress(
        [math.log(group['parameters']) for group in groups], [math.log(np.mean(group['best'])) for group in groups]
    )
    width = stats.t.ppf(0.975, len(groups) - 2) * fit.stderr
    return {
        'factor': math.exp(fit.intercept),
        'exponent': fit.slope,
        'interval': [fit.slope - width, fit.slope + width],
        'sizes': len(groups),
    }


def families(groups, settings):
    """[(name, groups that differ in these settings only)]; the name is what theirs have in common, if anything, else the first's."""
    found = {}
    for group in groups:
        key = json.dumps(
            {name: value for name, value in group['config'].items() if name not in settings}, sort_keys=True
        )
        found.setdefault(key, []).append(group)
    named = {}
    for members in found.values():
        parts = [group['full_name'].split(',') for group in members]
        name = ','.join(part for part in parts[0] if all(part in others for others in parts))
        named[name if name and name not in named else members[0]['full_name']] = members
    return list(named.items())


def plain(value):
    """As JSON has it: lists for arrays, null for what is not a number."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# the table


def difference_text(group):
    if not group['base'] or not group['pairs']:
        return 'no seed in common' if group['base'] else ''
    p = '' if math.isnan(group['p']) else f'p = {group["p"]:.2g}, '
    return f'{group["difference"]:+.4f} ({p}n = {group["pairs"]})'


def bits_per_char(group):
    """Of the best loss, by the characters of the validation text for each of its tokens; NaN where nobody counted them."""
    return float(np.mean(group['best'])) / math.log(2) / group['chars_per_token']


COLUMNS = {  # name: (text, number to sort by)
    'run': lambda g: (g['name'], g['name']),
    'seeds': lambda g: (
        str(len(g['seeds'])) + (f' (+ {len(g["unfinished"])} unfinished)' if g['unfinished'] else ''),
        len(g['seeds']),
    ),
    'parameters': lambda g: (f'{g["parameters"] / 1e6:.3g}M', g['parameters']),
    'FLOPs / token': lambda g: (f'{g["flops_per_token"] / 1e6:.3g}M', g['flops_per_token']),
    'ms / step': lambda g: (f'{g["seconds_per_step"] * 1e3:.3g}', g['seconds_per_step']),
    'peak memory': lambda g: (f'{g["peak_memory"] / 1e9:.2f} GB', g['peak_memory']),
    'tokens': lambda g: (f'{g["tokens"] / 1e6:.3g}M', g['tokens']),
    'best val loss': lambda g: (mean_and_std(g['best'], 4), np.mean(g['best'])),
    'to baseline': lambda g: (difference_text(g), g['difference']),
    'final val loss': lambda g: (mean_and_std(g['final'], 4), np.mean(g['final'])),
    'perplexity': lambda g: (f'{math.exp(np.mean(g["best"])):.3f}', np.mean(g['best'])),
    'bits / char': lambda g: ('' if math.isnan(bits_per_char(g)) else f'{bits_per_char(g):.4f}', bits_per_char(g)),
}


def notes(groups, base):
    """What a reader of the table has to know, a paragraph each."""
    devices = sorted({device for group in groups for device in group.get('devices', [])})
    yield (
        f'Differences are to {base["name"]}: of the best validation losses, negative is better; p of a two-sided paired t-test over the n '
        'seeds that both rows have, not corrected for the number of rows. ± is one standard deviation over the seeds. ms / step is the '
        'median over evaluation intervals and seeds, and the seconds of the curves are that many for each step; FLOPs are those of matrix '
        'products, forward and backward; parameters are all of them, position embeddings included.'
    )
    yield f'Measured on: {"; ".join(devices)}.' + (
        ' Times on different ones do not compare.' if len(devices) > 1 else ''
    )
    for group in groups:
        for run in group['unfinished']:
            at = run['log'][-1]['iter'] if run['log'] else 0
            state = 'Diverged' if 'failed' in run['record'] else 'Unfinished'
            yield f'{state}, not counted: {run["name"]}, evaluated at {at} of {group["config"]["max_iters"]} iterations.'


def markdown(groups, base, laws, grids, settings):
    rows = [[column(group)[0] for column in COLUMNS.values()] for group in groups if group['finished']]
    lines = ['| ' + ' | '.join(row) + ' |' for row in (COLUMNS, ['---', *['--:'] * (len(COLUMNS) - 1)], *rows)]
    lines += ['', *(line for note in notes(groups, base) for line in (note, ''))]
    lines += ['![validation loss](curves.png)', ''] if figures.has_curves(groups) else []
    if laws:
        lines += ['| family | loss | 95 % interval of the exponent | sizes |', '|---|---|---|--:|']
        lines += [
            f'| {name} | {figures.law_text(law)} | {law["interval"][0]:.4f} to {law["interval"][1]:.4f} | {law["sizes"]} |'
            for name, _, law in laws
        ]
        lines += ['', '![scaling](scaling.png)', '']
    for name, rows, columns, losses in grids:
        lines += [f'| {name}: {settings[0]} | ' + ' | '.join(f'{settings[1]} {value}' for value in columns) + ' |']
        lines += ['|---' + '|--:' * len(columns) + '|']
        for row, cells in zip(rows, losses):
            texts = [
                f'**{loss:.4f}**' if loss == np.nanmin(losses) else f'{loss:.4f}'.replace('nan', '') for loss in cells
            ]
            lines += [f'| {row} | ' + ' | '.join(texts) + ' |']
        lines += ['']
    return '\n'.join(lines + ['![best loss over the two settings](grids.png)', ''] * bool(grids))


def make_grid(members, down, across):
    """(values of one setting, values of the other, the best loss of a family's members for each pair of them)"""
    losses = {(group['config'][down], group['config'][across]): np.mean(group['best']) for group in members}
    rows, columns = (sorted({key[i] for key in losses}) for i in (0, 1))
    return rows, columns, np.array([[losses.get((row, column), math.nan) for column in columns] for row in rows])


# the page


def page(groups, base, laws, grids, settings):
    shown = [group for group in groups if group['finished']]
    cells = [[column(group) for column in COLUMNS.values()] for group in shown]
    body = [
        ''.join(
            f'<td data-value="{html.escape(str(value))}">{html.escape(text).replace(",", ",<wbr>")}</td>'
            for text, value in row
        )
        for row in cells
    ]
    curves = [
        figures.interactive_curves(shown, axis, unit)
        for axis, unit in figures.AXES.items()
        if figures.has_curves(shown)
    ]
    maps = [figures.interactive_grid(grid, settings, *figures.loss_range(grids)) for grid in grids]
    return figures.PAGE.format(
        plotly=plotly.offline.get_plotlyjs(),
        head=''.join(f'<th aria-sort="none"><button>{html.escape(name)}</button></th>' for name in COLUMNS),
        body=''.join(f'<tr>{row}</tr>' for row in body),
        notes=''.join(f'<p>{html.escape(note)}</p>' for note in notes(groups, base)),
        figures=figures.section('Validation loss', curves)
        + figures.section('Scaling', [figures.interactive_scaling(laws)] if laws else [])
        + figures.section(f'Best validation loss over {" and ".join(settings)}', maps),
    )


# all of it


def choose_baseline(groups, baseline):
    """The finished group of this name, without one the first."""
    names = [group['name'] for group in groups]
    for group in groups:
        if baseline in ('', group['name'], group['full_name']):
            return group
    raise ValueError(f'baseline={baseline!r}: expected one of {", ".join(names)}')


def check_over(over, groups):
    """The two settings of --over, [] without any."""
    settings = over.split(',') if over else []
    if settings and (len(settings) != 2 or not set(settings) <= groups[0]['config'].keys()):
        raise ValueError(
            f'over={over!r}: expected two settings of train.py joined by a comma, e.g. learning_rate,init_std'
        )
    return settings


def fit_families(groups):
    """[(family, its sizes, its power law)] of the families of at least three sizes; ValueError where there is none."""
    by_size = families(sorted(groups, key=lambda group: group['parameters']), SIZE)
    many = [(name, members) for name, members in by_size if len({group['parameters'] for group in members}) > 2]
    if not many:
        raise ValueError(
            '--scaling wants families of at least three sizes: rows whose settings differ in n_layer, n_head and widths only'
        )
    return [(name, members, fit_power_law(members)) for name, members in many]


def compare(runs, out, baseline='', mix=False, over='', scaling=False):
    """Write table, page and figures of runs as `read_all` returns them; arguments as the settings above. Returns the table."""
    groups = group_runs(runs)
    if not groups:
        raise ValueError('expected folders of runs, e.g. python study/compare.py out-sweep/*')
    if not mix:
        check_comparable(groups)
    shown = [group for group in groups if group['finished']]
    if not shown:
        raise ValueError('none of the runs is finished')
    for group in shown:
        summarize(group)
    base = choose_baseline(shown, baseline)
    for group in shown:
        group['base'] = None if group is base else base
        group['difference'], group['p'], group['pairs'] = compare_with(base, group)
    settings = check_over(over, shown)
    grids = [(name, *make_grid(members, *settings)) for name, members in families(shown, settings)] if settings else []
    laws = fit_families(shown) if scaling else []
    table = markdown(groups, base, laws, grids, settings)
    private = ('finished', 'unfinished', 'base')
    public = [{key: value for key, value in group.items() if key not in private} for group in shown]
    report = plain({'baseline': base['name'], 'groups': public, 'scaling': {name: law for name, _, law in laws}})
    texts = {'compare.md': table, 'compare.json': json.dumps(report, indent=1)}
    texts['compare.html'] = page(groups, base, laws, grids, settings)
    os.makedirs(out, exist_ok=True)
    for name, text in texts.items():
        with write_atomically(os.path.join(out, name), 'w', encoding='utf-8') as f:
            f.write(text)
    if figures.has_curves(shown):
        figures.draw_curves(shown).savefig(os.path.join(out, 'curves.png'), dpi=120)
    if grids:
        figures.draw_grids(grids, settings).savefig(os.path.join(out, 'grids.png'), dpi=120)
    if laws:
        figures.draw_scaling(laws).savefig(os.path.join(out, 'scaling.png'), dpi=120)
    return table


if __name__ == '__main__':
    configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith('-')])
    runs = read_all([arg for arg in sys.argv[1:] if not arg.startswith('-')])
    print(compare(runs, out, baseline, mix, over, scaling))
    print(f'written: {os.path.join(out, "compare.md")}, compare.json, compare.html and figures')
