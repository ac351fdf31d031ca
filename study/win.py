"""Which MLP is best at equal parameters: GPTs whose activations are learned, a function a channel, beside those whose
functions are fixed and those with a function on every edge; results/win.

    OMP_NUM_THREADS=1 python study/win.py   # trains what has no record, in two shells to share it; many hours
    OMP_NUM_THREADS=1 python study/win.py --stages=ablation --sizes=0.23M
    OMP_NUM_THREADS=1 python study/win.py --stages=tuning,final --sizes=0.23M --families=main
    python study/win_page.py                # the page from the records

All settings are chosen on shakespeare_char_tuning, which lacks the last tenth of the text, and on train and val of
python. Stage `ablation` varies the splines, `tuning` gives each family the same number of trials, `depth` compares
shapes on the validation text, and `final` trains each at its best with fresh seeds and measures the loss on what is
left. Two more stages train the main families with other fresh seeds: `seconds` for as long as SwiGLU takes, by the
steps that `steps` has timed (in one shell, on a machine that does nothing else), and `longer` for five times the
iterations, with what was tuned for 1000. Size `0.23M 5000` is tuned at that length.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import numpy as np

from configurator import ROOT, configure, flags_of, settings_of
from data import loader
from inside.edges import kan_layers, watch
from inside.shapes import shapes_of
from kan import ChannelSpline
from run import checkpoint as ckpt
from run.records import read_record
from study.runner import Study, choose, run_json, run_to_end
from study.sweep import check_record, check_texts

STUDY = Study('win')
CONFIG = f'{ROOT}/config/train_shakespeare_char_nano.py'
COMMON = dict(dataset='shakespeare_char_tuning', eval_interval=250, log_interval=250)
LONG = 5000  # iterations of stage longer
LONGER = dict(max_iters=LONG, lr_decay_iters=LONG, eval_interval=LONG // 5)
SIZES = {
    '0.23M': dict(n_layer=2, n_embd=96, n_head=3),
    '0.45M': dict(n_layer=4, n_embd=96, n_head=3),
    '2.2M': dict(n_layer=6, n_embd=176, n_head=4),
    '0.33M Python': dict(n_layer=2, n_embd=96, n_head=3, dataset='python'),
    '0.23M rotary Muon': dict(n_layer=2, n_embd=96, n_head=3, rotary=True, muon=True),
    '0.23M 5000': dict(n_layer=2, n_embd=96, n_head=3, **LONGER),  # tuned at that length
}
SHAPES = [size for size in SIZES if 'max_iters' not in SIZES[size]]  # without other lengths of one of these
DEPTHS = {  # shapes of as many parameters, within 2 %, for what was tuned at two layers
    '0.23M, 1 layer': dict(n_layer=1, n_embd=135, n_head=3),
    '0.23M, 4 layers': dict(n_layer=4, n_embd=69, n_head=3),
}
VOCABULARIES = {'shakespeare_char_tuning': 65, 'python': 1024}  # tokens of the data sets
UNSEEN = 'final', 'seconds', 'longer'  # stages that measure it
TESTS = {  # of a data set what eval.py measures in the end
    'shakespeare_char_tuning': dict(dataset='shakespeare_char'),
    'python': dict(split='test', stride=64),
}
CHANNEL = dict(use_kan=True, kan_kind='channel', grid_min=-4.0, grid_max=4.0, grid_size=8)
FAST = dict(spline_lr_scale=16.0, spline_weight_decay=0.0)  # the ablation chose the rate
SPLINES = dict(CHANNEL, **FAST, spline_order=2)
FAMILIES = {
    'GELU': dict(),
    'squared ReLU': dict(activation='relu2'),
    'bilinear': dict(mlp='swiglu', activation='identity'),
    'GEGLU': dict(mlp='swiglu', activation='gelu'),
    'SwiGLU': dict(mlp='swiglu'),
    'SwiGLU, learned slope': dict(mlp='swiglu', activation='swish', **FAST),
    'edge KAN': dict(use_kan=True, kan_norm=True, grid_min=-3.0, grid_max=3.0),
    'channel KAN': SPLINES,
    'KAN-GLU': dict(SPLINES, mlp='swiglu'),
}
MAIN = ('GELU', 'SwiGLU', 'channel KAN', 'KAN-GLU')
CHANGES = {
    'splines frozen at zero': dict(spline_lr_scale=0.0),
    'splines frozen at random': dict(spline_lr_scale=0.0, spline_init_std=0.1),
    'straight lines': dict(grid_size=1, spline_order=1),
    'rate of splines x 1': dict(spline_lr_scale=1.0),
    'rate of splines x 16': dict(spline_lr_scale=16.0),
}
CONTROLS = {  # name: (family, change): the family at its best settings, but for the change
    f'{family}, {change}': (family, change) for family in ('channel KAN', 'KAN-GLU') for change in CHANGES
}
GATES = dict(CHANNEL, mlp='swiglu', spline_weight_decay=0.0)
GROUPS = {'main': MAIN, 'others': [name for name in FAMILIES if name not in MAIN], 'controls': [*CONTROLS]}
ABLATION = {  # settings of KAN-GLU by what they are, and those of the others by name
    'SwiGLU': dict(mlp='swiglu'),
    'order 3, 8 intervals': dict(GATES, spline_order=3),
    'order 2, 8 intervals': dict(GATES, spline_order=2),
    'order 1, 8 intervals': dict(GATES, spline_order=1),
    'order 2, rate of splines x 4': dict(GATES, spline_order=2, spline_lr_scale=4.0),
    'order 2, rate of splines x 16': dict(GATES, spline_order=2, spline_lr_scale=16.0),
    'order 2, rate of splines x 64': dict(GATES, spline_order=2, spline_lr_scale=64.0),
    'GELU': dict(),
    'channel KAN': SPLINES,
    'channel KAN, order 1': dict(SPLINES, spline_order=1),
    'channel KAN, order 3': dict(SPLINES, spline_order=3),
    'channel KAN, 4 intervals': dict(SPLINES, grid_size=4),
    'channel KAN, 16 intervals': dict(SPLINES, grid_size=16),
    'channel KAN, rate of splines x 4': dict(SPLINES, spline_lr_scale=4.0),
    'channel KAN, rate of splines x 64': dict(SPLINES, spline_lr_scale=64.0),
    'edge KAN': FAMILIES['edge KAN'],
    'edge KAN, rate of splines x 4': dict(FAMILIES['edge KAN'], spline_lr_scale=4.0),
    'edge KAN, rate of splines x 16': dict(FAMILIES['edge KAN'], spline_lr_scale=16.0),
    'SwiGLU, rotary positions': dict(mlp='swiglu', rotary=True),
    'SwiGLU, Muon': dict(mlp='swiglu', muon=True),
}
USUAL = dict(learning_rate=4e-3, init_std=0.08)
RATES = dict.fromkeys(SIZES, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2))
RATES |= dict.fromkeys(['2.2M', '0.23M 5000'], (1e-3, 2e-3, 4e-3, 8e-3))
RATES['0.23M rotary Muon'] = 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2
SCALES = 0.04, 0.16  # at the best rate
# sizes with two more trials at the best of these: other rates, of splines where set
REFINED = '2.2M', '0.33M Python', '0.23M rotary Muon', '0.23M 5000'
WIDER = ('edge KAN',)  # families with three more trials, as the best of these lay at the ends of their ranges
DRAWN = '0.23M'  # the size whose functions are drawn
SEEDS = {
    'ablation': range(1, 5),
    'tuning': (1337,),
    'final': range(11, 21),
    'seconds': range(21, 31),
    'longer': range(31, 36),
    'depth': range(41, 46),
}

# -----------------------------------------------------------------------------
stages = 'ablation,tuning,depth,final,steps,seconds,longer'
sizes = ','.join(SIZES)
families = ','.join(GROUPS)  # of stages tuning and final
# -----------------------------------------------------------------------------


def settings_for(family, size):
    """Settings of train.py for a family in a size."""
    shape = (SIZES | DEPTHS)[size]
    return {**COMMON, **shape, **at_equal_parameters(family, shape['n_embd'])}


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


def name_of(stage, size, family, seed, **changed):
    changed = ', '.join(f'{key}={value}' for key, value in changed.items())
    return f'{stage}, {size}, {family}, {changed}, seed={seed}'


def jobs_of(stage, size, families, **more):
    """{name: (stage, size and family, settings of train.py)} of all seeds, of {family: (settings, what is tuned)}.
    `more` are settings that names leave out.
    """
    jobs = {}
    for seed in SEEDS[stage]:
        for family, (about, chosen) in families.items():
            name = name_of(stage, size, family, seed, **chosen)
            flags = {**settings_for(about, size), **chosen, **more, 'seed': seed}
            jobs[name] = dict(stage=stage, size=size, family=family), flags
    return jobs


def trials(size, families):
    """The jobs of families' trials, as far as they are known."""
    jobs = {}
    for family in families:
        for trial in trials_of(size, family):
            jobs |= jobs_of('tuning', size, {family: (FAMILIES[family], trial)}, eval_interval=1000)
    return jobs


def trials_of(size, family):
    """What a family tries, as far as the losses of those before tell: rates, scales at the best one, finer settings."""
    found = [dict(USUAL, learning_rate=rate) for rate in RATES[size]]
    finer_trials = [scales_at] + [rates_at] * (size in REFINED) + [beyond] * (family in WIDER)
    for finer in finer_trials:
        best = best_of(size, family, found)
        found += finer(family, best) if best else []
    return found


def scales_at(family, best):
    return [dict(best, init_std=scale) for scale in SCALES]


def rates_at(family, best):
    if 'spline_lr_scale' in FAMILIES[family]:
        return [dict(best, spline_lr_scale=scale) for scale in (1.0, 4.0)]
    return [dict(best, learning_rate=round(best['learning_rate'] * scale, 4)) for scale in (0.7, 1.4)]


def beyond(family, best):
    return [
        dict(best, learning_rate=2 * best['learning_rate']),
        dict(best, init_std=best['init_std'] / 2),
        dict(best, spline_lr_scale=4.0),
    ]


def best_of(size, family, trials):
    """The trial of the lowest loss; None where one is not on record yet, or all diverged."""
    losses = tried(size, family)
    losses = [losses.get(key_of(FAMILIES[family] | trial)) for trial in trials]
    if None in losses or min(losses) == float('inf'):
        return None
    return trials[losses.index(min(losses))]


def best_settings(size, family):
    return best_of(size, family, trials_of(size, family))


def tried(size, family):
    """{`key_of` a trial: its final validation loss} of those on record; of one that diverged infinite."""
    losses = {}
    for run in STUDY.read().values():
        if run['stage'] == 'tuning' and (run['size'], run['family']) == (size, family):
            losses[key_of(run['config'])] = last_loss(run)
    return losses


def key_of(settings):
    """What of the settings of a run is tuned."""
    return settings['learning_rate'], settings['init_std'], settings.get('spline_lr_scale', 1.0)


def last_loss(run):
    return run['final']['val_loss'] if 'finished' in run else float('inf')


def tuned(size, names):
    """{name: (settings, the best trial)} of families and controls, without controls that change nothing. ValueError
    where a family lacks trials.
    """
    found = {}
    for name in names:
        family, change = CONTROLS.get(name, (name, None))
        best, changed = best_settings(size, family), CHANGES.get(change, {})
        if best is None:
            lacks = f'{size} lacks trials of {family}, or all of them diverged'
            raise ValueError(f'unseen text is for families with all their trials; {lacks}')
        if change is None or not changed.items() <= (FAMILIES[family] | best).items():
            kept = {key: value for key, value in best.items() if key not in changed}
            found[name] = FAMILIES[family] | changed, kept
    return found


def make(name, job, folder):
    """The record of a run; of fresh seeds with the loss on text that no other run has seen, and the functions."""
    about, settings = job
    if about['stage'] == 'steps':
        found = run_json('study/bench.py', suite='mlp', only=cases_of(about['size']), rounds=20, repeats=5)
        failed = [f'{row["name"]}: {row["error"]}' for row in found['rows'] if 'error' in row]
        if failed:
            raise ValueError(f'steps could not be timed: {"; ".join(failed)}')
        return about | found
    check_record(folder, read_record(folder), settings_of('train.py', args_of(settings)))
    run = run_to_end('train.py', args_of(settings), folder)
    run.update(about)
    if about['stage'] in UNSEEN and 'finished' in run:
        found = run_json('eval.py', out_dir=folder, **TESTS[settings['dataset']])
        run.update(test=found['loss'], test_data={key: found[key] for key in ('dataset', 'split', 'sha256')})
        is_drawn = (about['stage'], about['size'], run['seed']) == ('final', DRAWN, SEEDS['final'][0])
        is_drawn = is_drawn and about['family'] in FAMILIES
        run['shapes'] = describe_shapes(folder, settings['dataset'], 8 if is_drawn else 0)
    return run


def args_of(settings):
    return [CONFIG, *flags_of(settings)]


def cases_of(size):
    """The regular expression of the cases of study/bench.py; one size may begin as another does."""
    return f'^float32 {size} ({"|".join(FAMILIES)})'


def describe_shapes(folder, dataset, n_curves):
    """{layer: what became of its learned activations}, and of n_curves of them, from the least changed to the most,
    the curves themselves. {} where none is learned.
    """
    model = ckpt.build_model(ckpt.load_checkpoint(folder), dropout=0.0).eval()
    names = [name for name, layer in kan_layers(model).items() if isinstance(layer, ChannelSpline)]
    data, block_size = loader.open_split(dataset, 'val'), model.config.block_size
    x, y = loader.get_batch(data, block_size, loader.fixed_starts(data, block_size, 256), 'cpu')
    seen = watch(model, lambda: model(x, y), names)
    return {name: describe(shapes_of(one), n_curves) for name, one in seen.items()}


def describe(shapes, n_curves):
    by_change = shapes.change.argsort()
    chosen = by_change[np.linspace(0, len(by_change) - 1, n_curves).round().astype(int)]
    curves = [[shapes.x[i, ::4], shapes.learned[i, ::4], shapes.plain[i, ::4]] for i in chosen.tolist()]
    turns, before = map(tally, shapes.turns())
    return dict(
        channels=len(by_change),
        flat=shapes.flat.sum().item(),
        turns=turns,
        turns_before=before,  # of the plain activation, over the same inputs
        change=shapes.change.median().item(),
        curves=[[[round(number, 4) for number in line.tolist()] for line in curve] for curve in curves],
    )


def tally(turns):
    """How many channels turn never, once, twice, more often."""
    return [(turns == n).sum().item() for n in range(3)] + [(turns > 2).sum().item()]


def by_seconds(size, families):
    """Families as `tuned` has them, with as many iterations as take the seconds of SwiGLU's, by the steps timed."""
    run = STUDY.read().get(f'steps, {size}')
    if run is None:
        raise ValueError(f'stage seconds wants the times of stage steps first: --stages=steps --sizes={size}')
    seconds = {row['name']: np.median(row['seconds']['total']) for row in run['rows']}
    whole = settings_of('train.py', [CONFIG])['max_iters']
    iters = {name: round(whole * seconds['SwiGLU'] / seconds[name]) for name in families}
    return {
        name: (about, dict(best, max_iters=iters[name], lr_decay_iters=iters[name]))
        for name, (about, best) in families.items()
    }


def run_all(jobs):
    """Make the records that are missing. ValueError for one that is there with other settings than the study has, for
    a text that is not that of the records, and where the unseen text is not of the text that was trained on.
    """
    records = STUDY.read()
    check_texts({name: settings for name, (about, settings) in jobs.items() if about['stage'] != 'steps'}, records)
    for name, (about, settings) in jobs.items():
        if name in records and about['stage'] != 'steps':
            check_record(f'the record {name!r}', records[name], settings_of('train.py', args_of(settings)))
        if name not in records and about['stage'] in UNSEEN:
            check_source(settings['dataset'])
    STUDY.run_all(jobs, make)


@functools.cache
def check_source(dataset):
    """ValueError where a data set and what is unseen of it were made of two texts."""
    names = dataset, TESTS[dataset].get('dataset', dataset)
    for name in names:
        loader.prepare_dataset(name)
    one, other = (loader.read_meta(name)['source'] for name in names)
    if one != other:
        advice = 'prepare both anew from one source'
        raise ValueError(f'{dataset} and what is unseen of it are of two texts, {one} and {other}: {advice}')


def run(stages, sizes, groups):
    for stage in 'ablation', 'depth':
        if stage in stages and '0.23M' not in sizes:
            raise ValueError(f'stage {stage} has the size 0.23M alone: add it to sizes, or leave the stage out')
    chosen = [name for group in groups for name in GROUPS[group]]
    to_tune = [name for name in FAMILIES if name in {CONTROLS.get(each, [each])[0] for each in chosen}]
    for size in sizes:
        if 'ablation' in stages and size == '0.23M':
            ablation = {name: (settings, USUAL) for name, settings in ABLATION.items()}
            run_all(jobs_of('ablation', size, ablation))
        if 'tuning' in stages:
            for _ in 'rates', 'scales', 'finer settings', 'what lies beyond':
                run_all(trials(size, to_tune))
        if 'depth' in stages and size == '0.23M':
            for shape in DEPTHS:
                run_all(jobs_of('depth', shape, tuned(size, MAIN)))
        if 'final' in stages:
            run_all(jobs_of('final', size, tuned(size, chosen)))
        if size not in SHAPES:
            continue
        if 'steps' in stages:
            run_all({f'steps, {size}': (dict(stage='steps', size=size), {})})
        if 'seconds' in stages:
            run_all(jobs_of('seconds', size, by_seconds(size, tuned(size, MAIN))))
        if 'longer' in stages:
            run_all(jobs_of('longer', size, tuned(size, MAIN), **LONGER))


if __name__ == '__main__':
    configure(globals())
    stages, sizes = choose('stages', stages, [*SEEDS, 'steps']), choose('sizes', sizes, SIZES)
    run(stages, sizes, choose('families', families, GROUPS))
