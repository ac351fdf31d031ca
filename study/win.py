"""Which MLP is best at equal parameters: GPTs whose activations are learned, a function a channel, beside those whose
functions are fixed and those with a function on every edge; results/win.

    OMP_NUM_THREADS=1 python study/win.py   # trains what has no record, in two shells to share it; many hours
    OMP_NUM_THREADS=1 python study/win.py --stages=ablation --sizes=0.23M
    python study/win.py --stages=           # the page from the records alone

All settings are chosen on shakespeare_char_tuning, which lacks the last tenth of the text. Stage `ablation` varies the
splines of KAN-GLU, `tuning` gives each family the same number of trials, and `final` trains each at its best with fresh
seeds and measures the loss on the last tenth, once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import numpy as np

from configurator import ROOT, configure
from study.runner import Study, choose, mean_and_std, paired_p, run_json, run_to_end

STUDY = Study('win')
CONFIG = f'{ROOT}/config/train_shakespeare_char_nano.py'
COMMON = dict(dataset='shakespeare_char_tuning', eval_interval=250, log_interval=250)
SIZES = {
    '0.23M': dict(n_layer=2, n_embd=96, n_head=3),
    '0.45M': dict(n_layer=4, n_embd=96, n_head=3),
    '2.2M': dict(n_layer=6, n_embd=176, n_head=4),
}
CHANNEL = dict(use_kan=True, kan_kind='channel', grid_min=-4.0, grid_max=4.0, spline_weight_decay=0.0)
CUBIC = dict(CHANNEL, grid_size=8, spline_order=3)
FAMILIES = {
    'GELU': dict(),
    'squared ReLU': dict(activation='relu2'),
    'bilinear': dict(mlp='swiglu', activation='identity'),
    'GEGLU': dict(mlp='swiglu', activation='gelu'),
    'SwiGLU': dict(mlp='swiglu'),
    'SwiGLU, learned slope': dict(mlp='swiglu', activation='swish'),
    'edge KAN': dict(use_kan=True, kan_norm=True, grid_min=-3.0, grid_max=3.0),
    'channel KAN': dict(CUBIC),
    'KAN-GLU': dict(CUBIC, mlp='swiglu'),
}
CONTROLS = {  # of KAN-GLU, with its rate and scale
    'KAN-GLU, splines frozen at zero': dict(FAMILIES['KAN-GLU'], spline_lr_scale=0.0),
    'KAN-GLU, splines frozen at random': dict(FAMILIES['KAN-GLU'], spline_lr_scale=0.0, spline_init_std=0.1),
    'KAN-GLU, straight lines': dict(FAMILIES['KAN-GLU'], grid_size=1, spline_order=1),
}
ABLATION = {  # families of which these settings are varied
    'SwiGLU': dict(mlp='swiglu'),
    'order 3, 8 intervals': FAMILIES['KAN-GLU'],
    'order 2, 8 intervals': dict(FAMILIES['KAN-GLU'], spline_order=2),
    'order 1, 8 intervals': dict(FAMILIES['KAN-GLU'], spline_order=1),
    'order 2, rate of splines x 4': dict(FAMILIES['KAN-GLU'], spline_order=2, spline_lr_scale=4.0),
    'order 2, rate of splines x 16': dict(FAMILIES['KAN-GLU'], spline_order=2, spline_lr_scale=16.0),
}
USUAL = dict(learning_rate=4e-3, init_std=0.08)
RATES, SCALES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), (0.04, 0.16)  # the scales at the best rate alone
KAN = ('channel KAN', 'KAN-GLU')  # drawn in blue
SEEDS = {'ablation': range(1, 9), 'tuning': (1337,), 'final': range(11, 21)}

# -----------------------------------------------------------------------------
stages = 'ablation,tuning,final'
sizes = ','.join(SIZES)
# -----------------------------------------------------------------------------


def settings_for(family, size):
    """Settings of train.py for a family in a size."""
    return {**COMMON, **SIZES[size], **at_equal_parameters(family, SIZES[size]['n_embd'])}


def at_equal_parameters(family, C):
    """The settings of a family, and the width of the hidden layer, a multiple of 8 as products of matrices like them,
    at which a block comes nearest to the parameters of a GELU GPT's.
    """
    K = family.get('grid_size', 5) + family.get('spline_order', 3)
    unit = 3 * C if family.get('mlp') == 'swiglu' else 2 * C  # the weights of a hidden channel
    width, step = 'mlp_hidden', 8
    if family.get('kan_kind') == 'channel':
        unit += K
    elif family.get('use_kan'):
        unit, width, step = 2 * C * (K + 2), 'kan_hidden', 1  # few channels of many numbers
    elif family.get('activation') == 'swish':
        unit += 1
    return {**family, width: step * round(8 * C * C / unit / step) / C}


def name_of(stage, size, family, seed, learning_rate, init_std):
    return f'{stage}, {size}, {family}, learning_rate={learning_rate}, init_std={init_std}, seed={seed}'


def jobs_of(stage, size, families, settings=None):
    """{name: (stage, size and family, settings of train.py)} of all seeds; `settings` {family: rate and scale}, by
    default the usual ones.
    """
    jobs = {}
    for seed in SEEDS[stage]:
        for family, about in families.items():
            chosen = (settings or {}).get(family, USUAL)
            name = name_of(stage, size, family, seed, **chosen)
            flags = {**settings_for(about, size), **chosen, 'seed': seed}
            jobs[name] = dict(stage=stage, size=size, family=family), flags
    return jobs


def trials(size):
    """The rates of all families, and the scales at the best of them once all have been tried."""
    jobs = {}
    for rate in RATES:
        jobs |= jobs_of('tuning', size, FAMILIES, dict.fromkeys(FAMILIES, dict(USUAL, learning_rate=rate)))
    best = best_settings(size)
    for scale in SCALES:
        found = {
            family: dict(chosen, init_std=scale) for family, chosen in best.items() if len(tried(size, family)) >= 5
        }
        jobs |= jobs_of('tuning', size, {family: FAMILIES[family] for family in found}, found)
    return jobs


def tried(size, family):
    """{(learning_rate, init_std): final validation loss} of the trials on record; of one that diverged infinite."""
    losses = {}
    for run in STUDY.read().values():
        if run['stage'] == 'tuning' and (run['size'], run['family']) == (size, family):
            losses[run['config']['learning_rate'], run['config']['init_std']] = last_loss(run)
    return losses


def last_loss(run):
    return run['final']['val_loss'] if 'finished' in run else float('inf')


def best_settings(size):
    """{family: the rate and scale of its best trial}"""
    found = {}
    for family in FAMILIES:
        losses = tried(size, family)
        if losses and min(losses.values()) < float('inf'):
            rate, scale = min(losses, key=losses.get)
            found[family] = dict(learning_rate=rate, init_std=scale)
    return found


def make(name, job, folder):
    """The record of a run; in the final stage with the loss on the last tenth of the text."""
    about, settings = job
    run = run_to_end('train.py', [CONFIG, *(f'--{key}={value}' for key, value in settings.items())], folder)
    run.update(about)
    if about['stage'] == 'final' and 'finished' in run:
        run['test'] = run_json('eval.py', out_dir=folder, dataset='shakespeare_char')['loss']
    return run


def run(stages, sizes):
    if 'ablation' in stages and '0.23M' not in sizes:
        raise ValueError('stage ablation has the size 0.23M alone: add it to sizes, or leave the stage out')
    for size in sizes:
        if 'ablation' in stages and size == '0.23M':
            STUDY.run_all(jobs_of('ablation', size, ABLATION), make)
        if 'tuning' in stages:
            STUDY.run_all(trials(size), make)  # the rates
            STUDY.run_all(trials(size), make)  # then the scales
        if 'final' in stages:
            best = best_settings(size)
            untried = [family for family in FAMILIES if len(tried(size, family)) < len(RATES) + len(SCALES)]
            if untried or len(best) < len(FAMILIES):
                raise ValueError(
                    f'stage final wants all trials of {size} first, lacking: {", ".join(untried) or "finite ones"}'
                )
            best |= dict.fromkeys(CONTROLS, best.get('KAN-GLU', USUAL))
            STUDY.run_all(jobs_of('final', size, {**FAMILIES, **CONTROLS}, best), make)


# the page


def groups_of(stage, size):
    """{family: {seed: record}} of the runs of a stage that finished, in the order of the families."""
    found = {family: {} for family in {'ablation': ABLATION}.get(stage, {**FAMILIES, **CONTROLS})}
    for run in STUDY.read().values():
        if (run['stage'], run['size']) == (stage, size) and 'finished' in run and run['family'] in found:
            found[run['family']][run['seed']] = run
    return {family: runs for family, runs in found.items() if runs}


def difference(runs, others, key):
    """Of the seeds of both the mean difference, half its 95 % interval, p of a paired t-test, and their number, or None
    for fewer than two.
    """
    from scipy.stats import t

    seeds = sorted(runs.keys() & others.keys())
    if len(seeds) < 2 or runs is others:
        return None
    values, baseline = ([key(some[seed]) for seed in seeds] for some in (runs, others))
    apart = np.subtract(values, baseline)
    half = t.ppf(0.975, len(seeds) - 1) * apart.std(ddof=1) / len(seeds) ** 0.5
    return apart.mean(), half, paired_p(values, baseline), len(seeds)


def cell(found):
    return '{:+.4f} ± {:.4f} (p = {:.2g}, n = {})'.format(*found) if found else ''


def validation(run):
    return run['final']['val_loss']


def held_out(run):
    return run['test']


def make_ablation(groups):
    lines = [
        '| gates | parameters | last validation loss | to SwiGLU | to order 3, 8 intervals |',
        '|---|--:|--:|--:|--:|',
    ]
    for family, runs in groups.items():
        losses, (first, *_) = [validation(run) for run in runs.values()], runs.values()
        cells = [family, f'{first["parameters"]["total"]:,}', mean_and_std(losses, 4)]
        for baseline in 'SwiGLU', 'order 3, 8 intervals':
            cells.append(cell(difference(runs, groups.get(baseline, {}), validation)))
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def make_tuning(size):
    """A line for each family: its loss at each rate, with the usual scale, and at the other scales at its best rate."""
    heads = ['family', *(f'{rate:g}' for rate in RATES), *(f'scale {scale:g}' for scale in SCALES), 'chosen']
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' + '|--:' * (len(heads) - 1) + '|']
    for family, chosen in best_settings(size).items():
        losses = tried(size, family)
        numbers = [losses.get((rate, USUAL['init_std'])) for rate in RATES]
        numbers += [next((loss for (_, std), loss in losses.items() if std == scale), None) for scale in SCALES]
        cells = [family, *('' if loss is None else f'{loss:.4f}' for loss in numbers)]
        lines.append('| ' + ' | '.join([*cells, '{learning_rate:g}, {init_std:g}'.format(**chosen)]) + ' |')
    return lines


def make_final(groups):
    heads = ['family', 'parameters', 'last validation loss', 'loss on the last tenth', 'to SwiGLU', 'to GELU']
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' + '|--:' * (len(heads) - 1) + '|']
    for family, runs in sorted(groups.items(), key=lambda pair: np.mean([held_out(run) for run in pair[1].values()])):
        first = next(iter(runs.values()))
        cells = [family, f'{first["parameters"]["total"]:,}']
        cells += [mean_and_std([key(run) for run in runs.values()], 4) for key in (validation, held_out)]
        cells += [cell(difference(runs, groups.get(baseline, {}), held_out)) for baseline in ('SwiGLU', 'GELU')]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def make_page():
    parts = []
    for size in SIZES:
        tables = {
            f'{size}: fresh seeds, on the last tenth': make_final(groups_of('final', size)),
            f'{size}: trials of learning rate and initial scale': make_tuning(size),
            f'{size}: splines of KAN-GLU': make_ablation(groups_of('ablation', size)),
        }
        for title, lines in tables.items():
            if len(lines) > 2:
                parts += [f'## {title}', '', *lines, '']
    return '\n'.join(parts)


def draw(path):
    """Of each size how far the families are from SwiGLU on the last tenth, with 95 % intervals."""
    from matplotlib.figure import Figure

    groups = {size: groups_of('final', size) for size in SIZES}
    groups = {size: found for size, found in groups.items() if len(found.get('SwiGLU', {})) > 1}
    if not groups:
        return
    figure = Figure(figsize=(9, 4.5), layout='constrained')
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for panel, (size, found) in zip(panels, groups.items()):
        gaps = {family: difference(runs, found['SwiGLU'], held_out) for family, runs in found.items()}
        gaps = dict(sorted(((family, gap) for family, gap in gaps.items() if gap), key=lambda pair: -pair[1][0]))
        for place, (family, (mean, half, *_)) in enumerate(gaps.items()):
            panel.errorbar(mean, place, xerr=half, fmt='o', capsize=3, color='#0072b2' if family in KAN else '#777777')
        panel.axvline(0, color='black', linewidth=0.8)
        panel.set_yticks(range(len(gaps)), gaps)
        panel.set(title=f'{size} parameters', xlabel='loss less that of SwiGLU, nats per character')
        panel.grid(alpha=0.3, axis='x')
    figure.savefig(path, dpi=130)


if __name__ == '__main__':
    configure(globals())
    run(choose('stages', stages, SEEDS), choose('sizes', sizes, SIZES))
    if STUDY.read():
        STUDY.show(make_page())
        draw(STUDY.folder / 'gaps.png')
