"""Finished runs side by side: a table, curves, and tests over seeds.

    python study/compare.py out-sweep/*
    python study/compare.py out-sweep/* --baseline=shakespeare_char_nano_balanced --out=results/mine
    python study/compare.py out-sizes/* --scaling=True
    python study/compare.py out-pilot/* --over=learning_rate,init_std
    python study/compare.py results/nano/runs.jsonl out-mine --baseline=shakespeare_char_nano_kan

Takes the folders that train.py leaves behind (run.json and log.jsonl are enough), and the records of studies. Runs
that differ in nothing but their seed are one row: mean and standard deviation over its seeds, and a paired t-test
against the baseline over the seeds both have. Writes compare.md, compare.json, compare.html (one file, no network
needed) and the figures as PNG into --out.
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
import plotly.io
import plotly.offline
from scipy import stats

from configurator import INCIDENTAL, configure
from run.files import write_file
from run.records import began_with, complete, perplexity, without_nan
from run.tables import markdown_table
from study import figures
from study.runner import deviation, mean_and_std, paired_p, read_run, read_runs

# -----------------------------------------------------------------------------
out = 'out-compare'  # the folder to write into
baseline = ''  # the row that the others are compared with, by its name; by default the first
mix = False  # compare even runs on other data, other validation windows or another number of tokens
over = ''  # two settings joined by a comma: also the best loss over the two for each family, the rows alike in all else
scaling = False  # fit a power law of loss and parameters to every family, the rows that differ in size only
# -----------------------------------------------------------------------------
SIZE = ('n_layer', 'n_head', 'n_embd', 'mlp_hidden', 'kan_hidden')


def read_all(paths):
    """The runs in folders of train.py and in files of records, [{name, record, log}]; says which of them hold none."""
    runs = []
    for path in paths:
        if path.endswith('.jsonl'):
            found = {f'{path}/{name}': run for name, run in read_runs(path).items()}
        else:
            found = {path: read_run(path)}
        kept = {name: record for name, record in found.items() if 'tokens_per_iter' in record}
        if not kept:
            print(f'left out: {path} holds no run of train.py', file=sys.stderr)
        elif len(kept) < len(found):
            print(f'left out: {len(found) - len(kept)} records of {path}, no runs of train.py', file=sys.stderr)
        runs += [check_run(name, record, path) for name, record in kept.items()]
    return runs


def check_run(name, record, path):
    """{name, record, log} of a run, its settings complete; ValueError where something is missing."""
    try:
        for one, other in ('config', 'seed'), ('parameters', 'total'), ('dataset', 'splits'), ('versions', 'torch'):
            record[one][other]
        for key in 'tokens_per_iter', 'flops_per_token', 'device':
            record[key]
        log = [line for line in record['log'] if line['iter'] > 0]
        for line in log:
            for key in 'val_loss', 'tokens_per_s', 'peak_mem':
                line[key]
        finals = [record['final'][key] for key in ('best_val_loss', 'val_loss')] if 'finished' in record else []
        if not all(map(math.isfinite, finals)):
            raise TypeError('its final losses are not finite')
    except (KeyError, TypeError) as error:
        raise ValueError(f'{path} is damaged or of an older train.py ({error!r})') from None
    return {'name': name, 'record': {**record, 'config': complete(record['config'])}, 'log': log}


def group_runs(runs):
    """[{name, full_name, config, splits, finished: [...], unfinished: [...]}]: runs that differ in their seed only."""
    groups = {}
    for run in runs:
        config = settings_apart(run['record'])
        splits = run['record']['dataset']['splits']
        key = json.dumps([config, splits], sort_keys=True)
        folder = os.path.basename(os.path.normpath(run['name'])).removeprefix('out-')
        named = dict(full_name=without_seed(folder), config=config, splits=splits, finished=[], unfinished=[])
        is_finished = 'finished' in run['record'] and run['log']
        groups.setdefault(key, named)['finished' if is_finished else 'unfinished'].append(run)
    groups = list(groups.values())
    shared = shared_beginning([group['full_name'] for group in groups])
    for group in groups:
        group['name'] = group['full_name'].removeprefix(shared)
        refuse_twins(group, groups)
    return groups


def shared_beginning(names):
    """What all names begin with, up to a comma, or else to an underscore or a dash; nothing of a single name."""
    shared = os.path.commonprefix(names) if len(names) > 1 else ''
    end = shared.rfind(',') if ',' in shared else max(shared.rfind('_'), shared.rfind('-'))
    return shared[: end + 1]


def refuse_twins(group, groups):
    """ValueError where another group has the same name, or two runs of this one the same seed."""
    alike = [other for other in groups if other['full_name'] == group['full_name']]
    if len(alike) > 1:
        raise ValueError(clash_text(*alike))
    seeds = [run['record']['config']['seed'] for run in group['finished']]
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None:
        one, other, *_ = [run['name'] for run, seed in zip(group['finished'], seeds) if seed == twice]
        raise ValueError(f'seed {twice} of {group["name"]} is there twice: {one} and {other}')


def without_seed(name):
    return re.sub(r'[,-]?seed[=-]?\d+', '', name)


def settings_apart(record):
    """The settings of a run that its seeds share: those that tell in its losses, what it began with where that was not
    from scratch, and what changed when it was resumed.
    """
    config = {key: value for key, value in record['config'].items() if key not in (*INCIDENTAL, 'seed')}
    if began_with(record['config']):
        config['init_from'] = without_seed(began_with(record['config']))
    if record.get('changes'):
        config['changes'] = record['changes']
    return config


def clash_text(one, other, *_):
    folders = ' and '.join((group['finished'] + group['unfinished'])[0]['name'] for group in (one, other))
    pairs = {key: (one['config'].get(key), other['config'].get(key)) for key in one['config'] | other['config']}
    changed = [f'{key} ({a!r} and {b!r})' for key, (a, b) in sorted(pairs.items()) if a != b] or ['their data']
    return f'{folders} would be one row, but differ in {", ".join(changed)}: leave one out, or rename its folder'


def check_comparable(groups):
    """ValueError, with the reason, where the groups were not trained or evaluated on the same."""
    found = {group['name']: list_facts(group) for group in groups}
    for what in next(iter(found.values())):
        values = {name: facts[what] for name, facts in found.items()}
        if len(set(values.values())) > 1:
            listed = '; '.join(f'{name}: {" ".join(str(v)[:12] for v in value)}' for name, value in values.items())
            raise ValueError(f'the runs have different {what} ({listed}); to compare them all the same, add --mix=True')


def list_facts(group):
    """What groups must have in common: {what: values}."""
    config, record = group['config'], (group['finished'] + group['unfinished'])[0]['record']
    splits, windows = record['dataset']['splits'] or {}, config['eval_iters'] * config['batch_size']
    return {
        'data': tuple(data['sha256'] for data in splits.values()) or (config['dataset'],),
        'validation windows (eval_iters * batch_size of them, block_size long)': (windows, config['block_size']),
        'iterations between evaluations': (config['eval_interval'],),
        'tokens to train on': (tokens_of(group),),
    }


def tokens_of(group):
    """What its runs trained on by the log of one that has finished, or are to train on."""
    run = (group['finished'] + group['unfinished'])[0]
    last = run['log'][-1] if group['finished'] else {}
    return last.get('tokens', group['config']['max_iters'] * run['record']['tokens_per_iter'])


def tokens_at(line, record):
    """The tokens up to a line of a log. Older ones do not count them, and their steps are all alike."""
    return line.get('tokens', line['iter'] * record['tokens_per_iter'])


def steps_per_second(log, record):
    """Of the evaluation intervals of a run, with steps of the size that it ended with: it may be a resumed one."""
    iteration, tokens, speeds = 0, 0, []
    for line in log:
        step = (tokens_at(line, record) - tokens) / (line['iter'] - iteration)
        iteration, tokens = line['iter'], tokens_at(line, record)
        if line['tokens_per_s'] and step == record['tokens_per_iter']:
            speeds.append(line['tokens_per_s'] / step)
    return speeds or [iteration / log[-1]['seconds']]  # resumed since the last evaluation


def summarize(group):
    """Add what the table and the curves show to a group of finished runs."""
    records, logs = ([run[key] for run in group['finished']] for key in ('record', 'log'))
    first = records[0]
    group['seeds'] = [record['config']['seed'] for record in records]
    group['not_counted'] = f' (+ {len(group["unfinished"])} unfinished)' if group['unfinished'] else ''
    group['parameters'] = first['parameters']['total']
    group['flops_per_token'] = first['flops_per_token']
    group['tokens'] = tokens_of(group)
    speeds = [speed for record, log in zip(records, logs) for speed in steps_per_second(log, record)]
    group['seconds_per_step'] = 1 / float(np.median(speeds))
    group['peak_memory'] = float(np.median([max(line['peak_mem'] for line in log) for log in logs]))
    group['best'] = [record['final']['best_val_loss'] for record in records]
    group['final'] = [record['final']['val_loss'] for record in records]
    group['devices'] = sorted({machine_of(record) for record in records})
    chars = first['dataset'].get('val_chars') or math.nan  # of the validation text, where they were counted
    tokens = first['dataset']['splits']['val']['tokens'] if first['dataset']['splits'] else math.nan
    group['bits_per_char'] = float(np.mean(group['best'])) / math.log(2) * tokens / chars
    iterations = sorted(set.intersection(*({line['iter'] for line in log} for log in logs)))
    by_iteration = [{line['iter']: line['val_loss'] for line in log} for log in logs]
    losses = np.array([[found[i] for i in iterations] for found in by_iteration])
    group['curve'] = {'iterations': iterations, 'mean': losses.mean(0), 'std': deviation(losses)}
    group['curve']['tokens'] = [tokens_at(line, first) for line in logs[0] if line['iter'] in iterations]


def machine_of(record):
    n = record.get('processes', 1)
    return f'{record["device"]}, torch {record["versions"]["torch"]}' + (f', {n} processes' if n > 1 else '')


def compare_with(base, group):
    """Add the mean difference of the best losses over the seeds both have, p of a paired t-test, and how many."""
    of_base = dict(zip(base['seeds'], base['best']))
    pairs = [(loss, of_base[seed]) for seed, loss in zip(group['seeds'], group['best']) if seed in of_base]
    ours, theirs = np.reshape(pairs, (-1, 2)).T
    group['base'], group['pairs'] = None if group is base else base, len(pairs)
    group['difference'] = float((ours - theirs).mean()) if pairs else math.nan
    group['p'] = paired_p(ours, theirs)


def fit_power_law(groups):
    """loss = factor * parameters ** exponent through the mean losses of the sizes of a family, by least squares of the
    logarithms. The 95 % interval of the exponent is Student's, with as many degrees of freedom as sizes but two.
    """
    x, y = [group['parameters'] for group in groups], [np.mean(group['best']) for group in groups]
    fit = stats.linregress(np.log(x), np.log(y))
    width = stats.t.ppf(0.975, len(groups) - 2) * fit.stderr
    interval = [fit.slope - width, fit.slope + width]
    return {'factor': math.exp(fit.intercept), 'exponent': fit.slope, 'interval': interval, 'sizes': len(groups)}


def families(groups, settings):
    """[(name, groups on one text that differ in these settings only)]; the name is what theirs have in common, or the
    first's.
    """
    found = {}
    for group in groups:
        others = {name: value for name, value in group['config'].items() if name not in settings}
        found.setdefault(json.dumps([others, group['splits']], sort_keys=True), []).append(group)
    named = {}
    for members in found.values():
        parts = [group['full_name'].split(',') for group in members]
        common = ','.join(part for part in parts[0] if all(part in others for others in parts))
        first = members[0]['full_name']
        name, n = common if common and common not in named else first, 1
        while name in named:
            n += 1
            name = f'{first} ({n})'
        named[name] = members
    return list(named.items())


def difference_text(group):
    if not group['base']:
        return ''
    if not group['pairs']:
        return 'no seed in common'
    p = '' if math.isnan(group['p']) else f'p = {group["p"]:.2g}, '
    return f'{group["difference"]:+.4f} ({p}n = {group["pairs"]})'


COLUMNS = {  # name: (text, number to sort by)
    'run': lambda g: (g['name'], g['name']),
    'seeds': lambda g: (f'{len(g["seeds"])}{g["not_counted"]}', len(g['seeds'])),
    'parameters': lambda g: (f'{g["parameters"] / 1e6:.3g}M', g['parameters']),
    'FLOPs / token': lambda g: (f'{g["flops_per_token"] / 1e6:.3g}M', g['flops_per_token']),
    'ms / step': lambda g: (f'{g["seconds_per_step"] * 1e3:.3g}', g['seconds_per_step']),
    'peak memory': lambda g: (f'{g["peak_memory"] / 1e9:.2f} GB', g['peak_memory']),
    'tokens': lambda g: (f'{g["tokens"] / 1e6:.3g}M', g['tokens']),
    'best val loss': lambda g: (mean_and_std(g['best'], 4), np.mean(g['best'])),
    'to baseline': lambda g: (difference_text(g), g['difference']),
    'final val loss': lambda g: (mean_and_std(g['final'], 4), np.mean(g['final'])),
    'perplexity': lambda g: (f'{perplexity(np.mean(g["best"])):.3f}', np.mean(g['best'])),
    'bits / char': lambda g: (f'{g["bits_per_char"]:.4f}'.replace('nan', ''), g['bits_per_char']),
}


def notes(groups, base):
    """What a reader of the table has to know, a paragraph each."""
    devices = sorted({device for group in groups for device in group.get('devices', [])})
    apart = ' Times on different ones do not compare.' if len(devices) > 1 else ''
    yield (
        f'Differences are to {base["name"]}: of the best validation losses, negative is better; p of a two-sided '
        'paired t-test over the n seeds that both rows have, not corrected for the number of rows. ± is one standard '
        'deviation over the seeds. ms / step is the median over evaluation intervals and seeds, and the seconds of the '
        'curves are that many for each step; FLOPs are those of matrix products, forward and backward; parameters are '
        'all of them, position embeddings included.'
    )
    yield f'Measured on: {"; ".join(devices)}.{apart}'
    for group in groups:
        if group['finished'] and 'init_from' in group['config']:
            yield f'{group["name"]} began with {group["config"]["init_from"]}: its tokens are those after that.'
    for group in groups:
        for run in group['unfinished']:
            at = run['log'][-1]['iter'] if run['log'] else 0
            state = 'Diverged' if 'failed' in run['record'] else 'Unfinished'
            of = group['config']['max_iters']
            yield f'{state}, not counted: {run["name"]}, evaluated at {at} of {of} iterations.'


def markdown(groups, base, laws, grids, settings):
    rows = [[column(group)[0] for column in COLUMNS.values()] for group in groups if group['finished']]
    parts = ['\n'.join(markdown_table([*COLUMNS], rows)), *notes(groups, base)]
    if figures.has_curves(groups):
        parts += ['![validation loss](curves.png)']
    if laws:
        rows = []
        for name, _, law in laws:
            interval = '{:.4f} to {:.4f}'.format(*law['interval'])
            rows.append([name, figures.law_text(law), interval, law['sizes']])
        lines = markdown_table(['family', 'loss', '95 % interval of the exponent', 'sizes'], rows, 'lllr')
        parts += ['\n'.join(lines), '![scaling](scaling.png)']
    for name, rows, columns, losses in grids:
        heads = [f'{name}: {settings[0]}', *(f'{settings[1]} {value}' for value in columns)]
        lowest = np.nanmin(losses)
        cells = [[row, *(loss_cell(loss, lowest) for loss in found)] for row, found in zip(rows, losses)]
        parts += ['\n'.join(markdown_table(heads, cells))]
    if grids:
        parts += ['![best loss over the two settings](grids.png)']
    return '\n\n'.join(parts) + '\n'


def loss_cell(loss, lowest):
    if math.isnan(loss):
        return ''
    return f'**{loss:.4f}**' if loss == lowest else f'{loss:.4f}'


def make_grid(members, down, across):
    """(values of one setting, values of the other, the best loss of a family's members for each pair of them)"""
    losses = {(group['config'][down], group['config'][across]): np.mean(group['best']) for group in members}
    rows, columns = (sorted({key[i] for key in losses}) for i in (0, 1))
    return rows, columns, np.array([[losses.get((row, column), math.nan) for column in columns] for row in rows])


def page(groups, base, laws, grids, settings):
    shown = [group for group in groups if group['finished']]
    drawn, over = {}, f'Best validation loss over {" and ".join(settings)}'
    if figures.has_curves(shown):
        drawn['Validation loss'] = [figures.interactive_curves(shown, *axis) for axis in figures.AXES.items()]
    if laws:
        drawn['Scaling'] = [figures.interactive_scaling(laws)]
    if grids:
        drawn[over] = [figures.interactive_grid(grid, settings, *figures.loss_range(grids)) for grid in grids]
    options = dict(full_html=False, include_plotlyjs=False, config={'responsive': True})
    texts = {title: ''.join(plotly.io.to_html(figure, **options) for figure in some) for title, some in drawn.items()}
    cells = [[cell_html(*column(group)) for column in COLUMNS.values()] for group in shown]
    return figures.PAGE.format(
        plotly=plotly.offline.get_plotlyjs(),
        head=''.join(f'<th aria-sort="none"><button>{html.escape(name)}</button></th>' for name in COLUMNS),
        body=''.join(f'<tr>{"".join(row)}</tr>' for row in cells),
        notes=''.join(f'<p>{html.escape(note)}</p>' for note in notes(groups, base)),
        figures=''.join(f'<h2>{title}</h2>{text}' for title, text in texts.items()),
    )


def cell_html(text, value):
    return f'<td data-value="{html.escape(str(value))}">{html.escape(text).replace(",", ",<wbr>")}</td>'


def fit_families(groups):
    """[(family, its sizes, its power law)] of the families of at least three sizes; ValueError where there is none."""
    by_size = families(sorted(groups, key=lambda group: group['parameters']), SIZE)
    many = [(name, members) for name, members in by_size if len({group['parameters'] for group in members}) > 2]
    if not many:
        raise ValueError('--scaling wants at least three sizes: rows that differ in n_layer, n_head and widths only')
    return [(name, members, fit_power_law(members)) for name, members in many]


def compare(runs, out, baseline='', mix=False, over='', scaling=False):
    """Write table, page and figures of runs as `read_all` returns them, under settings as above; returns the table."""
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
    base = next((group for group in shown if baseline in ('', group['name'], group['full_name'])), None)
    if base is None:
        raise ValueError(f'baseline={baseline!r}: expected one of {", ".join(group["name"] for group in shown)}')
    for group in shown:
        compare_with(base, group)
    settings = over.split(',') if over else []
    if settings and (len(settings) != 2 or not set(settings) <= shown[0]['config'].keys()):
        raise ValueError(f'over={over!r}: expected two settings of train.py, e.g. learning_rate,init_std')
    grids = [(name, *make_grid(members, *settings)) for name, members in families(shown, settings)] if settings else []
    laws = fit_families(shown) if scaling else []
    table = markdown(groups, base, laws, grids, settings)
    private = ('splits', 'finished', 'unfinished', 'not_counted', 'base')
    public = [{key: value for key, value in group.items() if key not in private} for group in shown]
    report = {'baseline': base['name'], 'groups': public, 'scaling': {name: law for name, _, law in laws}}
    report = without_nan(report, default=lambda array: array.tolist())
    texts = {'compare.md': table, 'compare.json': json.dumps(report, indent=1)}
    texts['compare.html'] = page(groups, base, laws, grids, settings)
    os.makedirs(out, exist_ok=True)
    for name, text in texts.items():
        write_file(os.path.join(out, name), text)
    if figures.has_curves(shown):
        figures.draw_curves(shown, base).savefig(os.path.join(out, 'curves.png'), dpi=120)
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
