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


from configurator import ROOT, configure
from study.runner import Study, choose, run_json, run_to_end

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
    'order 2, 4 intervals': dict(FAMILIES['KAN-GLU'], spline_order=2, grid_size=4),
    'order 2, rate of splines x 4': dict(FAMILIES['KAN-GLU'], spline_order=2, spline_lr_scale=4.0),
}
USUAL = dict(learning_rate=4e-3, init_std=0.08)
RATES, SCALES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), (0.04, 0.16)  # the scales at the best rate alone
SEEDS = {'ablation': range(1, 9), 'tuning': (1337,), 'final': range(11, 21)}

# -----------------------------------------------------------------------------
stages = 'ablation,tuning,final'
sizes = ','.join(SIZES)
# -----------------------------------------------------------------------------


def settings_for(family, size):
    """Settings of train.py for a family in a size: as many parameters as the GELU GPT has, by the hidden layer's width."""
    C, K = SIZES[size]['n_embd'], family.get('grid_size', 5) + family.get('spline_order', 3)
    unit = 3 * C if family.get('mlp') == 'swiglu' else 2 * C  # the weights of a hidden channel
    width = 'mlp_hidden'
    if family.get('kan_kind') == 'channel':
        unit += K
    elif family.get('use_kan'):
        unit, width = 2 * C * (K + 2), 'kan_hidden'
    elif family.get('activation') == 'swish':
        unit += 1
    return {**COMMON, **SIZES[size], **family, width: round(8 * C * C / unit) / C}


def name_of(stage, size, family, seed, learning_rate, init_std):
    return f'{stage}, {size}, {family}, learning_rate={learning_rate}, init_std={init_std}, seed={seed}'


def jobs_of(stage, size, families, settings=None):
    """{name: (stage, size and family, settings of train.py)} of all seeds; `settings` {family: rate and scale}, by default the usual."""
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
        if losses:
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
    for size in sizes:
        if 'ablation' in stages and size == '0.23M':
            STUDY.run_all(jobs_of('ablation', size, ABLATION), make)
        if 'tuning' in stages:
            STUDY.run_all(trials(size), make)  # the rates
            STUDY.run_all(trials(size), make)  # then the scales
        if 'final' in stages:
            best = best_settings(size)
            best |= dict.fromkeys(CONTROLS, best.get('KAN-GLU', USUAL))
            STUDY.run_all(jobs_of('final', size, {**FAMILIES, **CONTROLS}, best), make)


if __name__ == '__main__':
    configure(globals())
    run(choose('stages', stages, SEEDS), choose('sizes', sizes, SIZES))
