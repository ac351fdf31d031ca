"""Training from the command line: resume, signals, several processes, full disks, bad input, what a run leaves."""

import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import flags_of, idle_settings, settings_of
from data.loader import read_meta, write_meta, write_split
from data.tokenizer import CharTokenizer
from helpers import (
    ENV,
    FAKE_WANDB,
    KAN,
    ROOT,
    SHAPE,
    TINY,
    TOKENIZER,
    complaint,
    copy_code,
    finish,
    flags,
    join_processes,
    load,
    make_checkpoint,
    read_log,
    read_points,
    read_until,
    run,
    run_forked,
    run_group,
    same_run,
    same_state,
    start_forked,
    together,
    train,
    write_dataset,
)
from model import GPT, GPTConfig
from run import checkpoint as ckpt
from run.cost import count_flops

NEVER = 10**6
SPLINES = dict(spline_lr_scale=2.0, spline_weight_decay=0.0)


def start_training(folder, dataset, out_dir='out', processes=1, **settings):
    args = flags(**{**TINY, 'dataset': dataset, 'out_dir': out_dir, **settings})
    return start_forked(folder, 'train.py', *args, processes=processes)


def without_meta(dataset, folder):
    """The files of tokens of a data set in a folder that says nothing of them."""
    folder.mkdir()
    for name in 'train.bin', 'val.bin':
        shutil.copy(Path(dataset, name), folder)
    return folder


def contents(folder):
    """{name: bytes} of a folder, without the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'run.lock'}


def stopped_at(stdout):
    return int(re.search(r'stopped at iteration (\d+)', stdout)[1])


# resume


@pytest.mark.parametrize(
    'processes, settings',
    [(1, {}), (1, {**KAN, **SPLINES}), (1, dict(muon=True, rotary=True)), (2, {})],
    ids=['vanilla', 'kan', 'muon', 'two processes'],
)
def test_two_and_two_iterations_equal_four(tmp_path, dataset, processes, settings):
    def go(out_dir, **more):
        return lambda: train(tmp_path, dataset, out_dir, processes, **settings, **more)

    together(go('straight', max_iters=4), go('parts', max_iters=2))
    shutil.copytree(
        tmp_path / 'parts', tmp_path / 'control'
    )  # the same without its random state, or with the other process's
    state = load(tmp_path / 'control')
    state['rng'] = state['rng'][::-1] if processes > 1 else []
    torch.save(state, tmp_path / 'control' / 'ckpt.pt')
    together(go('parts', max_iters=4, init_from='resume'), go('control', max_iters=4, init_from='resume'))
    assert same_run(tmp_path / 'straight', tmp_path / 'parts')
    assert not same_state(load(tmp_path / 'straight'), load(tmp_path / 'control'))
    assert load(tmp_path / 'straight')['iter_num'] == 4


def test_settings_of_splines_change_the_run(tmp_path, dataset):
    changes = dict(
        same={},
        rate=dict(spline_lr_scale=2.0),
        decay=dict(spline_weight_decay=0.0),
        alike=dict(spline_weight_decay=0.1),
    )
    together(*(lambda name=name: train(tmp_path, dataset, name, **KAN, **changes[name]) for name in changes))
    same, rate, decay, alike = (load(tmp_path / name) for name in changes)
    assert same_state(same, alike) and not same_state(same, rate) and not same_state(same, decay)


def test_one_and_two_processes_reach_the_same_losses(tmp_path, dataset):
    together(*(lambda n=n: train(tmp_path, dataset, f'out{n}', n, dropout=0.0, **KAN) for n in (1, 2)))
    one, two = ([(line['train_loss'], line['val_loss']) for line in read_log(tmp_path / f'out{n}')] for n in (1, 2))
    assert len(one) == 3
    assert np.allclose(one, two, rtol=0, atol=1e-5)


def test_evaluation_and_seeds(tmp_path, dataset):
    """How often a run evaluates changes nothing, its seed does."""
    changes = dict(often=dict(eval_interval=1), never=dict(eval_interval=NEVER, eval_iters=5), seed=dict(seed=1))
    together(*(lambda name=name: train(tmp_path, dataset, name, **changes[name]) for name in changes))
    often, never, seed = (load(tmp_path / name) for name in changes)
    assert same_state(often, never) and not same_state(often, seed)
    assert [line['iter'] for line in read_log(tmp_path / 'often')] == [0, 1, 2, 3, 4]


# signals


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_during_training_saves_and_exits_0(tmp_path, dataset, number):
    process = start_training(tmp_path, dataset, 'parts', max_iters=NEVER, eval_interval=NEVER)
    read_until(process.stdout, 'iter 3:')
    process.send_signal(number)
    done = finish(process)
    assert done.returncode == 0, done.stderr
    assert 'stopping: finishing the step and saving' in done.stderr and 'Traceback' not in done.stderr
    iter_num = stopped_at(done.stdout)
    assert load(tmp_path / 'parts')['iter_num'] == iter_num
    assert 'finished' not in json.loads((tmp_path / 'parts' / 'run.json').read_text())
    together(
        lambda: train(tmp_path, dataset, 'parts', max_iters=iter_num + 2, eval_interval=NEVER, init_from='resume'),
        lambda: train(tmp_path, dataset, 'straight', max_iters=iter_num + 2, eval_interval=NEVER),
    )
    assert same_run(tmp_path / 'straight', tmp_path / 'parts')


def test_sigterm_during_evaluation_saves_and_exits_0(tmp_path, dataset):
    long = write_dataset(tmp_path / 'long', n_train=10**6, n_val=10**6)
    together(
        lambda: train(tmp_path, long, 'parts', max_iters=3), lambda: train(tmp_path, long, 'straight', max_iters=6)
    )
    process = start_training(
        tmp_path, long, 'parts', max_iters=NEVER, init_from='resume', eval_interval=4, eval_iters=NEVER
    )
    read_until(process.stdout, 'iter 4:')
    time.sleep(0.5)  # into the evaluation, which takes much longer
    process.terminate()
    begin = time.monotonic()
    done = finish(process)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 10
    assert stopped_at(done.stdout) == load(tmp_path / 'parts')['iter_num'] == 4
    assert 'step 4' not in done.stdout and read_log(tmp_path / 'parts') == []  # of these windows
    assert [line['iter'] for line in read_log(tmp_path / 'parts/earlier-1')] == [0, 2, 3]
    train(tmp_path, long, 'parts', max_iters=6, init_from='resume')
    assert [line['iter'] for line in read_log(tmp_path / 'parts')] == [4, 6]
    assert same_state(load(tmp_path / 'straight'), load(tmp_path / 'parts'))


def test_second_signal_exits_at_once(tmp_path, dataset):
    process = start_training(tmp_path, dataset, gradient_accumulation_steps=NEVER)  # a step of an hour
    read_until(process.stdout, 'step 0:')
    time.sleep(0.5)
    process.terminate()
    read_until(process.stderr, 'stopping: finishing the step and saving')
    process.terminate()  # at once: the launcher's copy of the first
    time.sleep(1.2)
    assert process.poll() is None
    begin = time.monotonic()
    process.terminate()
    assert finish(process).returncode > 0 and time.monotonic() - begin < 5


@pytest.mark.parametrize('send', ['to torchrun', 'to all, as ctrl-c does'])
def test_signal_to_two_processes_leaves_a_checkpoint(tmp_path, dataset, send):
    process = start_training(tmp_path, dataset, processes=2, max_iters=NEVER, eval_interval=NEVER)
    read_until(process.stdout, 'iter 3:')
    if send == 'to torchrun':
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert load(tmp_path / 'out')['iter_num'] == stopped_at(done.stdout), done.stderr
    assert len(load(tmp_path / 'out')['rng']) == 2


# runs beside and after each other


def test_a_run_wants_a_folder(tmp_path, dataset):
    words = complaint(tmp_path, 'train.py', *flags(dataset=dataset, out_dir='', **TINY))
    assert words == 'error: out_dir is empty: name a folder for the run by --out_dir\n'


def test_a_folder_is_for_one_run_at_a_time(tmp_path, dataset):
    """Whether it would begin anew or be resumed, and whether one process asks or two; a run that was killed is over."""
    first = start_training(tmp_path, dataset, max_iters=NEVER, eval_interval=2)
    read_until(first.stdout, 'saved out/ckpt.pt')
    args = flags(**{**TINY, 'dataset': dataset, 'out_dir': 'out', 'max_iters': 10**7})
    words = 'error: out is in use by another run; name another folder by --out_dir\n'
    assert complaint(tmp_path, 'train.py', *args) == words
    assert complaint(tmp_path, 'train.py', *args, '--init_from=resume') == words
    for process in run_group(tmp_path, 'train.py', *args):
        assert process.returncode == 1 and words.removeprefix('error: ') in process.stderr
    assert not list((tmp_path / 'out').glob('earlier-*'))
    train(tmp_path, dataset, 'out', eval_only=True, init_from='resume', max_iters=0)  # which writes nothing
    first.kill()
    finish(first)
    at = load(tmp_path / 'out')['iter_num']
    train(tmp_path, dataset, 'out', init_from='resume', max_iters=at + 2)
    assert load(tmp_path / 'out')['iter_num'] == at + 2


def test_another_text_has_a_best_loss_of_its_own(tmp_path, dataset):
    """However low the loss on the text before it was."""
    train(tmp_path, dataset, max_iters=2, log_to='tensorboard')
    state = load(tmp_path / 'out', 'ckpt.pt')
    torch.save({**state, 'best_val_loss': 0.001}, tmp_path / 'out' / 'ckpt.pt')
    before = (tmp_path / 'out' / 'best.pt').read_bytes()
    other = write_dataset(tmp_path / 'other', n_train=3000)
    said = train(tmp_path, other, init_from='resume', eval_only=True, max_iters=2).stdout
    assert 'are not those this run began with\n' in said and 'finished' not in said
    assert not (tmp_path / 'out' / 'earlier-1').exists()
    done = train(tmp_path, other, init_from='resume', max_iters=4, log_to='tensorboard')
    assert 'are not those this run began with: its best loss starts anew' in done.stdout
    best = load(tmp_path / 'out', 'best.pt')
    assert best['iter_num'] > 2 and best['best_val_loss'] > 1 and best['data'] != state['data']
    assert (tmp_path / 'out' / 'earlier-1' / 'best.pt').read_bytes() == before
    assert [step for step, _ in read_points(tmp_path / 'out')['val_loss']] == [2, 4]
    again = train(tmp_path, other, init_from='resume', max_iters=6)
    assert [line['iter'] for line in read_log(tmp_path / 'out')][0] == 2  # of the text before there is another log
    assert 'starts anew' not in again.stdout and not (tmp_path / 'out' / 'earlier-2').exists()


def test_no_run_goes_into_a_folder_of_an_export(tmp_path, dataset):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'gpt.json').write_text('{}')
    words = complaint(tmp_path, 'train.py', *flags(**{**TINY, 'dataset': dataset, 'out_dir': 'out'}))
    assert words == 'error: out is a folder of export.py: name another one for the run by --out_dir\n'


def test_a_run_with_muon_is_resumed_with_muon(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2, muon=True)
    args = flags(**{**TINY, 'dataset': dataset, 'out_dir': 'out', 'init_from': 'resume', 'max_iters': 4})
    words = complaint(tmp_path, 'train.py', *args)
    assert words == 'error: the run to resume has its weights in other groups: resume it with --muon=True\n'


@pytest.mark.parametrize(
    'first, then', [(dict(spline_lr_scale=0.5), dict(muon=True)), (dict(muon=True), dict(spline_lr_scale=0.5))]
)
def test_groups_of_one_size_and_other_weights_are_told_apart(tmp_path, dataset, first, then):
    edges = dict(use_kan=True, kan_targets='mlp')  # of each block four matrices for Muon, and four of splines
    train(tmp_path, dataset, max_iters=2, **edges, **first)
    args = flags(
        **{**TINY, **edges, **then, 'dataset': dataset, 'out_dir': 'out', 'init_from': 'resume', 'max_iters': 4}
    )
    words = complaint(tmp_path, 'train.py', *args)
    asked = ' '.join(sorted(flags_of({'muon': False, 'spline_lr_scale': 1.0, **first})))
    assert words == f'error: the run to resume has its weights in other groups: resume it with {asked}\n'


def test_moments_of_other_weights_are_refused(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    state = load(tmp_path / 'out')
    moments = state['optimizer']['state']
    moments[0], moments[1] = moments[1], moments[0]
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    args = flags(**{**TINY, 'dataset': dataset, 'out_dir': 'out', 'init_from': 'resume', 'max_iters': 4})
    words = 'error: out/ckpt.pt holds the state of an optimizer for other weights than its own\n'
    assert complaint(tmp_path, 'train.py', *args) == words


def test_groups_that_the_decay_alone_sets_apart_are_named(tmp_path, dataset):
    channel = dict(use_kan=True, kan_kind='channel', weight_decay=0.1, spline_weight_decay=0.1)
    train(tmp_path, dataset, max_iters=2, **channel)
    args = flags(
        **{**TINY, 'dataset': dataset, 'init_from': 'resume', **channel, 'weight_decay': 0.05, 'out_dir': 'out'}
    )
    assert complaint(tmp_path, 'train.py', *args).endswith('in other groups: resume it with --weight_decay=0.1\n')


def test_figures_of_an_evaluation_outlive_a_resumed_run(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    before = read_log(tmp_path / 'out')[-1]
    train(tmp_path, dataset, init_from='resume', max_iters=2)
    again = read_log(tmp_path / 'out')[-1]
    assert before['tokens_per_s'] == again['tokens_per_s'] and again['peak_mem'] >= before['peak_mem']
    assert json.loads((tmp_path / 'out' / 'run.json').read_text())['final']['tokens_per_s'] == before['tokens_per_s']


def test_the_vocabulary_goes_with_the_model(tmp_path, dataset):
    """To a run on files that do not say theirs, begun with the model or resumed."""
    plain = without_meta(dataset, tmp_path / 'plain')
    train(tmp_path, dataset, max_iters=2)
    train(tmp_path, plain, 'more', init_from='out', max_iters=2)
    train(tmp_path, plain, init_from='resume', max_iters=4)
    for name in 'more', 'out':
        assert load(tmp_path / name)['tokenizer'] == TOKENIZER.to_dict()


def test_settings_that_do_nothing_are_named(tmp_path, dataset):
    settings = dict(kan_kind='channel', spline_lr_scale=4.0, graph_edges='window', learning_rate=1e-4, max_iters=1)
    said = train(tmp_path, dataset, **settings, spline_weight_decay=0.0).stdout
    without = 'without it these do nothing'
    assert f'warning: use_kan is off, and {without}: kan_kind, spline_lr_scale, spline_weight_decay\n' in said
    assert f'warning: use_graph is off, and {without}: graph_edges\n' in said
    assert 'warning: min_lr=0.001 is above learning_rate=0.0001: the rate will rise' in said
    said = train(tmp_path, dataset, 'plain', max_iters=1).stdout
    assert 'warning' not in said
    said = train(tmp_path, dataset, 'more', max_iters=1, init_from='plain', spline_lr_scale=4.0).stdout
    assert f'warning: use_kan is off, and {without}: spline_lr_scale\n' in said


def test_going_back_to_an_earlier_state_seeks_the_best_anew(tmp_path, dataset):
    """Else the folder might have none, and the record the loss of weights that are not there."""
    out, settings = tmp_path / 'out', dict(eval_interval=1, warmup_iters=0)
    train(tmp_path, dataset, max_iters=2, **settings)
    assert torch.load(out / 'best.pt', weights_only=True)['iter_num'] == 2
    shutil.copyfile(out / 'ckpt_prev.pt', out / 'ckpt.pt')
    more = dict(settings, init_from='resume', learning_rate=3.0, decay_lr=False)
    done = train(tmp_path, dataset, max_iters=3, **more)
    assert 'best.pt: moved to out/earlier-1, as later than iteration 1 or damaged\n' in done.stdout
    best, record = torch.load(out / 'best.pt', weights_only=True), json.loads((out / 'run.json').read_text())
    assert best['iter_num'] == 1 and record['final']['val_loss'] > record['final']['best_val_loss']
    assert record['final']['best_val_loss'] == pytest.approx(read_log(out)[1]['val_loss'])


def test_what_does_nothing():
    graph = dict(use_graph=True, graph_edges='causal,topk', graph_window=4, graph_topk=4)
    edges, all_of_them = "graph_edges='causal,topk'", 'holds causal, and with it all earlier tokens'
    swish = dict(activation='swish', spline_lr_scale=4.0)
    off = 'use_kan is off, and without it these do nothing'
    for settings, lines in (
        (
            graph,
            [f'graph_window does nothing: {edges} holds no window', f'graph_topk does nothing: {edges} {all_of_them}'],
        ),
        (swish, []),
        (dict(swish, spline_weight_decay=0.5), [f'{off}: spline_weight_decay']),
        (dict(decay_lr=False, min_lr=1e-5), ['decay_lr is off, and without it these do nothing: min_lr']),
    ):
        assert idle_settings('train.py', settings_of('train.py', []) | settings) == lines
    tuned = settings_of('finetune.py', []) | dict(use_lora=False, lora_rank=8, use_dora=True, grid_size=3)
    lines = idle_settings('finetune.py', tuned)
    assert [line.partition('these do nothing: ')[2] for line in lines] == ['grid_size', 'lora_rank, use_dora']
    for settings, line in (
        (dict(use_lora=True, lora_grid_size=9), "these do nothing with lora_kind='lora': lora_grid_size"),
        (dict(use_lora=True, lora_kind='kan', lora_grid_size=9), None),
        (
            dict(best_of=4, temperature=0.1),
            'these do nothing in the task sst, which writes no text: temperature, best_of',
        ),
        (dict(task='sonnets', n_beams=4, top_p=0.5), 'these do nothing with n_beams=4: top_p'),
        (dict(task='sonnets', top_p=0.5), None),
        (
            dict(task='sonnets', temperature=0.0, best_of=2),
            'these do nothing with temperature=0, which takes the likeliest token: best_of',
        ),
    ):
        lines = idle_settings('finetune.py', settings_of('finetune.py', []) | settings)
        assert lines == ([] if line is None else [line])
    for script, folder in ('train.py', 'config/train_*.py'), ('finetune.py', 'config/finetune/*.py'):
        for path in ROOT.glob(folder):
            assert idle_settings(script, settings_of(script, [str(path)])) == [], path


def test_files_without_a_meta_file_are_known_by_their_tokens(tmp_path, dataset):
    """Such as nanoGPT's of GPT-2's tokens."""
    plain = without_meta(dataset, tmp_path / 'plain')
    train(tmp_path, plain, max_iters=2)
    known = json.loads((tmp_path / 'out' / 'run.json').read_text())['dataset']['splits']
    again = train(tmp_path, plain, init_from='resume', max_iters=3)
    assert known == read_meta(dataset)['splits'] and 'starts anew' not in again.stdout
    shutil.copy(plain / 'train.bin', plain / 'val.bin')
    done = train(tmp_path, plain, init_from='resume', max_iters=4)
    assert 'are not those this run began with: its best loss starts anew' in done.stdout
    record = json.loads((tmp_path / 'out' / 'run.json').read_text())
    assert record['changes'] == [{'iter': 3, 'before': {'data': known}}] and record['dataset']['splits'] != known


def test_a_resumed_run_with_other_settings_says_so_and_counts_its_tokens(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=4)
    (n,) = {line['tokens'] / line['iter'] for line in read_log(tmp_path / 'out') if line['iter']}
    changed = dict(dropout=0.1, gradient_accumulation_steps=6, beta2=0.5)
    done = train(tmp_path, dataset, init_from='resume', max_iters=6, **changed)
    words = (
        'warning: the run goes on with other settings: gradient_accumulation_steps=6 (it had 2), dropout=0.1 (it had '
    )
    assert words in done.stdout and 'max_iters=6' not in done.stdout and 'starts anew' not in done.stdout
    assert read_log(tmp_path / 'out')[-1]['tokens'] == 4 * n + 2 * 3 * n
    again = train(tmp_path, dataset, init_from='resume', max_iters=6, **changed)
    assert 'warning: the run goes on' not in again.stdout
    record = json.loads((tmp_path / 'out' / 'run.json').read_text())
    assert record['config']['init_from'] == 'scratch'  # what it began with
    before = dict(gradient_accumulation_steps=2, dropout=0.2, beta2=0.95)
    assert record['changes'] == [{'iter': 4, 'before': before}]


def test_other_windows_have_a_best_loss_of_their_own(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    done = train(tmp_path, dataset, init_from='resume', max_iters=4, eval_iters=2 * TINY['eval_iters'])
    assert 'windows of the validation are not those this run began with: its best loss starts anew' in done.stdout
    assert (tmp_path / 'out' / 'earlier-1' / 'best.pt').exists()
    assert [line['iter'] for line in read_log(tmp_path / 'out')][0] > 0
    train(tmp_path, dataset, 'all', max_iters=2, eval_iters=NEVER)
    done = train(tmp_path, dataset, 'all', init_from='resume', max_iters=4, eval_iters=2 * NEVER)
    assert 'starts anew' not in done.stdout  # all windows that there are


def test_a_data_set_of_ones_own_is_found_from_elsewhere(tmp_path):
    write_dataset(tmp_path / 'mine')
    train(tmp_path, './mine', max_iters=2)
    (tmp_path / 'elsewhere').mkdir()
    done = run(tmp_path / 'elsewhere', 'eval.py', '--out_dir=../out', '--device=cpu')
    assert done.returncode == 0, done.stderr


def test_gpt2_weights_want_a_data_set_of_their_vocabulary(tmp_path, dataset):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=97, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / 'hf')
    args = flags(**{**TINY, 'dataset': dataset, 'init_from': './hf', 'out_dir': 'x'})
    done = run_forked(tmp_path, 'train.py', *args)
    assert done.returncode == 1 and done.stderr.endswith(
        'different tokens, the model 97: name one with its vocabulary\n'
    )


def test_a_size_of_the_world_without_a_rank_is_one_process(tmp_path, dataset):
    """As some launchers of clusters leave it to every program."""
    env = {**ENV, 'WORLD_SIZE': '2'}
    done = run_forked(tmp_path, 'train.py', *flags(**{**TINY, 'dataset': dataset, 'max_iters': 2}), env=env)
    assert done.returncode == 0 and '1 process(es)' in done.stdout, done.stderr


def test_a_run_may_begin_with_another_one(tmp_path, dataset):
    train(tmp_path, dataset, 'first', max_iters=3, **KAN)
    other = write_dataset(tmp_path / 'other', n_train=3000)
    train(tmp_path, other, 'second', init_from='first', max_iters=0, always_save_checkpoint=True)
    first, second = load(tmp_path / 'first', 'best.pt'), load(tmp_path / 'second')
    assert all(torch.equal(p, second['model'][name]) for name, p in first['model'].items())
    assert second['iter_num'] == 0 and second['tokenizer'] == first['tokenizer'] and second['model_args']['use_kan']
    train(tmp_path, other, 'shorter', init_from='first', block_size=8, max_iters=2)
    assert load(tmp_path / 'shorter')['model_args']['block_size'] == 8
    strange = write_dataset(tmp_path / 'strange', tokenizer=CharTokenizer(TOKENIZER.chars[::-1]))
    words = complaint(
        tmp_path, 'train.py', *flags(**{**TINY, 'dataset': strange, 'init_from': 'first', 'out_dir': 'x'})
    )
    assert words.startswith('error: first has another vocabulary than data set') and not (tmp_path / 'x').exists()


# what cannot go on


def test_loss_that_is_not_finite_stops_before_the_update(tmp_path, dataset):
    train(tmp_path, dataset, 'nan', max_iters=2)
    shutil.copytree(tmp_path / 'nan', tmp_path / 'diverging')
    state = load(tmp_path / 'nan')
    for p in state['model'].values():
        p.fill_(float('nan'))
    torch.save(state, tmp_path / 'nan' / 'ckpt.pt')
    before = (tmp_path / 'nan' / 'ckpt.pt').read_bytes()
    common = dict(TINY, dataset=dataset, init_from='resume', max_iters=50, eval_interval=1)
    nan, diverging = together(
        lambda: run_forked(tmp_path, 'train.py', *flags(**{**common, 'out_dir': 'nan', 'eval_interval': 7})),
        lambda: run_forked(
            tmp_path, 'train.py', *flags(**{**common, 'out_dir': 'diverging', 'decay_lr': False, 'learning_rate': 1e30})
        ),
    )
    assert re.fullmatch(r'error: the loss or its gradient is not finite at iteration 2;.*\n', nan.stderr)
    assert re.fullmatch(
        r'error: the (loss or its gradient|evaluated loss) is not finite at iteration \d+;.*\n', diverging.stderr
    )
    assert nan.returncode == diverging.returncode == 1
    assert (tmp_path / 'nan' / 'ckpt.pt').read_bytes() == before
    assert all(p.isfinite().all() for p in load(tmp_path / 'diverging')['model'].values())
    for name in 'nan', 'diverging':
        record = json.loads((tmp_path / name / 'run.json').read_text())
        assert 'finished' not in record and 'is not finite at iteration' in record['failed']


def test_a_loss_that_is_read_later_stops_at_its_iteration(tmp_path, dataset):
    settings = {**TINY, 'dataset': dataset, 'out_dir': 'out', 'max_iters': 20, 'eval_interval': 20, 'log_interval': 10}
    settings.update(learning_rate=1e30, decay_lr=False)
    words = complaint(tmp_path, 'train.py', *flags(**settings))
    assert 'the loss or its gradient is not finite at iteration 1; the checkpoints' in words
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


def test_evaluated_loss_that_is_not_finite_stops_too(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    state = load(tmp_path / 'out')
    state['model']['transformer.ln_f.weight'].fill_(float('nan'))
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    error = complaint(
        tmp_path, 'train.py', *flags(**{**TINY, 'dataset': dataset, 'out_dir': 'out', 'init_from': 'resume'})
    )
    assert 'the evaluated loss is not finite at iteration 2' in error


def test_earlier_run_is_moved_and_not_lost(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    before = contents(tmp_path / 'out')
    done = train(tmp_path, dataset, max_iters=2, seed=2)
    assert f'moved to {os.path.join("out", "earlier-1")}' in done.stdout
    assert contents(tmp_path / 'out' / 'earlier-1') == before
    assert (tmp_path / 'out' / 'best.pt').read_bytes() != before['best.pt']


@pytest.mark.parametrize('share', [0.5, 0.001])
def test_full_disk_is_a_warning_and_an_exit_status(tmp_path, dataset, share):
    """With half of a checkpoint's size left only checkpoints fail; with a few bytes the run does not begin."""
    train(tmp_path, dataset, max_iters=2)
    out = tmp_path / 'out'
    before = contents(out)
    size = int(share * len(before['ckpt.pt']))
    args = flags(**{**TINY, 'dataset': dataset, 'out_dir': 'out', 'init_from': 'resume', 'max_iters': 5})
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    full = run_forked(tmp_path, 'train.py', *args, before=limit)
    assert full.returncode == 1
    if share == 0.5:
        assert 'iter 5:' in full.stdout and 'warning: iteration 5 is not saved' in full.stdout + full.stderr
    else:
        assert 'iter' not in full.stdout and full.stderr.startswith('error: out cannot be written: ')
    assert full.stderr.splitlines()[-1].startswith('error: ') and 'Traceback' not in full.stderr
    changed = ('run.json', 'log.jsonl') if share == 0.5 else ()
    after = contents(out)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name not in changed)
    if changed:
        assert [line['iter'] for line in read_log(out)] == [0, 2, 4, 5]


def test_where_nothing_could_be_saved_the_run_has_not_finished(tmp_path, dataset):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))  # more than the records
    args = flags(**{**TINY, 'dataset': dataset, 'out_dir': 'out', 'max_iters': 3})
    full = run_forked(tmp_path, 'train.py', *args, before=limit)
    assert full.returncode == 1 and 'Traceback' not in full.stderr
    assert 'warning: iteration 3 is not saved' in full.stdout
    assert full.stderr.splitlines()[-1].startswith('error: not everything could be saved')
    assert 'to go on' not in full.stdout and 'finished' not in full.stdout
    record = json.loads((tmp_path / 'out/run.json').read_text())
    assert 'started' in record and 'finished' not in record and not list((tmp_path / 'out').glob('*.pt'))


# what a run leaves behind


def test_a_resumed_run_keeps_the_state_before_its_own(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=4)
    train(tmp_path, dataset, max_iters=4, init_from='resume')
    assert load(tmp_path / 'out')['iter_num'] == 4 and load(tmp_path / 'out', 'ckpt_prev.pt')['iter_num'] == 2
    assert 'finished' in json.loads((tmp_path / 'out/run.json').read_text())


def test_a_resumed_run_that_stops_at_once_keeps_the_states_before(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=4)
    before = contents(tmp_path / 'out')
    long = write_dataset(tmp_path / 'long', n_train=10**6, n_val=10**6)
    for settings, code in (dict(max_iters=NEVER), 0), (dict(max_iters=4), 0), (dict(max_iters=4, eval_only=True), 1):
        shutil.copytree(tmp_path / 'out', tmp_path / 'again')
        process = start_training(tmp_path, long, 'again', init_from='resume', eval_iters=NEVER, **settings)
        read_until(process.stdout, 'resuming at iteration 4')
        time.sleep(0.5)  # into the evaluation, which takes much longer
        process.terminate()
        done = finish(process)
        assert done.returncode == code and 'Traceback' not in done.stderr, done.stderr
        assert ('stopped at iteration 4' in done.stdout) == (code == 0) and 'finished' not in done.stdout
        for name in 'ckpt.pt', 'ckpt_prev.pt':
            assert (tmp_path / 'again' / name).read_bytes() == before[name]
        shutil.rmtree(tmp_path / 'again')


def test_the_command_for_text_can_be_pasted(tmp_path, dataset):
    said = train(tmp_path, dataset, 'my run', max_iters=0).stdout
    assert said.endswith("for text: python sample.py --out_dir='my run'\n")


def test_a_best_state_that_is_lost_and_cannot_be_saved_anew(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=4)
    (tmp_path / 'out/best.pt').unlink()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    args = flags(**{**TINY, 'dataset': dataset, 'out_dir': 'out', 'max_iters': 4, 'init_from': 'resume'})
    full = run_forked(tmp_path, 'train.py', *args, before=limit)
    assert full.returncode == 1 and 'Traceback' not in full.stderr and 'finished' not in full.stdout
    done = train(tmp_path, dataset, max_iters=4, init_from='resume')
    best = load(tmp_path / 'out', 'best.pt')['best_val_loss']
    assert f'finished: best val loss {best:.4f}; for text: python sample.py --out_dir=out\n' in done.stdout


@pytest.mark.parametrize('damage', ['lost', 'cut off'])
def test_without_the_best_state_a_resumed_run_seeks_it_anew(tmp_path, dataset, damage):
    train(tmp_path, dataset, max_iters=4)
    best = tmp_path / 'out/best.pt'
    best.unlink() if damage == 'lost' else best.write_bytes(best.read_bytes()[:-9])
    train(tmp_path, dataset, max_iters=6, init_from='resume', learning_rate=9.0, decay_lr=False)  # none is as good
    assert (tmp_path / 'out/earlier-1/best.pt').exists() == (damage == 'cut off')
    assert load(tmp_path / 'out', 'ckpt_prev.pt')['iter_num'] == 4  # and not twice the state it went on from
    best = load(tmp_path / 'out', 'best.pt')
    losses = {line['iter']: line['val_loss'] for line in read_log(tmp_path / 'out')}
    final = json.loads((tmp_path / 'out/run.json').read_text())['final']
    assert best['iter_num'] == 4 and best['best_val_loss'] == losses[4] == final['best_val_loss'] < losses[6]


def test_record_log_and_checkpoint(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=3)
    out = tmp_path / 'out'
    assert sorted(os.listdir(out)) == ['best.pt', 'ckpt.pt', 'ckpt_prev.pt', 'log.jsonl', 'run.json', 'run.lock']
    keys = {
        'model',
        'optimizer',
        'model_args',
        'iter_num',
        'best_val_loss',
        'config',
        'rng',
        'scaler',
        'tokenizer',
        'versions',
    }
    state = load(out)
    assert keys <= state.keys() and state['iter_num'] == 3  # the last step is saved
    assert state['tokenizer'] == TOKENIZER.to_dict() and state['config']['dropout'] == 0.2
    record = json.loads((out / 'run.json').read_text())
    assert list(record)[-1] == 'finished'
    assert {
        'config',
        'seed',
        'commit',
        'versions',
        'device',
        'parameters',
        'dataset',
        'started',
        'final',
    } <= record.keys()
    assert record['flops_per_token'] == count_flops(record['model_args'])
    assert record['config']['max_iters'] == 3 and record['dataset']['source'] == 'random characters'
    log = read_log(out)
    assert [line['iter'] for line in log] == [0, 2, 3]  # and evaluated
    assert {'iter', 'tokens', 'seconds', 'train_loss', 'val_loss', 'lr', 'tokens_per_s', 'peak_mem'} <= log[0].keys()
    assert record['final']['val_loss'] == log[-1]['val_loss']
    assert abs(state['best_val_loss'] - min(line['val_loss'] for line in log)) < 1e-12

    assert (
        'resuming at iteration 3\n' in train(tmp_path, dataset, max_iters=5, init_from='resume', decay_lr=False).stdout
    )
    log = read_log(out)
    assert [line['iter'] for line in log] == [0, 2, 3, 4, 5]
    assert log[-1]['lr'] == TINY['learning_rate']


def refuse_constant(name):
    raise ValueError(f'{name} is not JSON')


def test_run_of_no_iterations_saves_the_initial_model(tmp_path, dataset):
    """With a loss that is a number, and a record that every reader of JSON takes."""
    train(tmp_path, dataset, max_iters=0)
    out = tmp_path / 'out'
    assert sorted(os.listdir(out)) == ['best.pt', 'ckpt.pt', 'log.jsonl', 'run.json', 'run.lock']
    record = json.loads((out / 'run.json').read_text(), parse_constant=refuse_constant)
    assert record['finished'] and 'failed' not in record
    (text,) = (out / 'log.jsonl').read_text().splitlines()
    line = json.loads(text, parse_constant=refuse_constant)
    assert line['iter'] == 0 and math.isfinite(line['val_loss'])
    assert record['final']['best_val_loss'] == record['final']['val_loss'] == line['val_loss']
    for name in 'ckpt.pt', 'best.pt':
        state = load(out, name)
        assert state['iter_num'] == 0 and state['best_val_loss'] == line['val_loss']
    torch.manual_seed(record['seed'])
    initial = GPT(GPTConfig(**state['model_args'])).state_dict()
    assert all(torch.equal(p, state['model'][name]) for name, p in initial.items())


def test_best_is_kept_where_only_the_best_is_saved(tmp_path, dataset):
    """Random characters cannot be learned: a high learning rate makes the validation loss worse."""
    train(
        tmp_path,
        dataset,
        max_iters=30,
        eval_interval=3,
        learning_rate=0.3,
        decay_lr=False,
        always_save_checkpoint=False,
    )
    best = min(read_log(tmp_path / 'out')[1:], key=lambda line: line['val_loss'])
    assert load(tmp_path / 'out')['iter_num'] == 30
    if (tmp_path / 'out' / 'best.pt').exists():
        assert load(tmp_path / 'out', 'best.pt')['iter_num'] == best['iter']


def test_run_from_scratch_does_not_leave_the_best_of_the_run_before(tmp_path, dataset):
    """In the same folder. What sample.py reads is of the run that run.json describes, even if it never got better."""
    train(tmp_path, dataset)
    train(tmp_path, dataset, n_embd=8, learning_rate=0, min_lr=0)
    assert ckpt.load_checkpoint(str(tmp_path / 'out'))['model_args']['n_embd'] == 8


def test_eval_only_writes_nothing(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    before = contents(tmp_path / 'out')
    scratch, resumed = together(
        lambda: train(tmp_path, dataset, 'none', eval_only=True),
        lambda: train(tmp_path, dataset, eval_only=True, init_from='resume'),
    )
    assert 'step 0: train loss' in scratch.stdout and 'step 2: train loss' in resumed.stdout
    assert contents(tmp_path / 'out') == before
    assert not (tmp_path / 'none').exists()


# settings, packages and data of all kinds

ABSENT = "raise ImportError('not here')"
WANDB = {
    'absent': ABSENT,
    'failing in init': "run = None\ndef init(**settings):\n    raise RuntimeError('no key')",
    'failing in log': f"{FAKE_WANDB}\ndef log(line):\n    raise OSError('no network')",
    'working': FAKE_WANDB,
}
LOG_TO = {'absent': 'wandb,tensorboard', 'failing in log': 'tensorboard', 'working': 'wandb,tensorboard'}


def test_wandb_and_tensorboard_never_stop_a_run(tmp_path, dataset):
    pytest.importorskip('tensorboard')
    done = {}
    for name, source in WANDB.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'wandb.py').write_text(source)
        if name in ('absent', 'failing in init'):  # and not imported where only wandb is asked for
            (tmp_path / name / 'tensorboard.py').write_text(ABSENT)
        settings = dict(TINY, dataset=dataset, out_dir=f'out {name}', max_iters=2, log_to=LOG_TO.get(name, ''))
        settings.update(wandb_log=name != 'absent', wandb_artifact=True)
        done[name] = run_forked(tmp_path, 'train.py', *flags(**settings), modules=name)
        assert done[name].returncode == 0 and read_log(tmp_path / f'out {name}')[-1]['iter'] == 2, done[name].stderr
        assert done[name].stdout.count('warning: no wandb') == (name != 'working')
        assert done[name].stdout.count('warning: no tensorboard') == (name == 'absent')
        assert (tmp_path / f'out {name}' / 'tensorboard').exists() == (name in ('failing in log', 'working'))
    assert 'uploaded' not in done['failing in log'].stdout
    told = ['wandb run None None', 'logged 0', 'logged 2', 'artifact model-abc model', 'with out working/best.pt']
    assert [text for text in done['working'].stdout.splitlines() if text in told] == told

    # two iterations more, then once more from the checkpoint before: wandb has one run, TensorBoard each point once
    out, settings = tmp_path / 'out working', {**settings, 'init_from': 'resume', 'max_iters': 4}
    for _ in range(2):
        again = run_forked(tmp_path, 'train.py', *flags(**settings), modules='working')
        assert again.returncode == 0 and 'resuming at iteration 2' in again.stdout, again.stderr
        assert 'wandb run abc allow' in again.stdout
        shutil.copy(out / 'ckpt_prev.pt', out / 'ckpt.pt')
    names = 'tokens seconds train_loss val_loss lr tokens_per_s peak_mem'.split()
    points, log = read_points(out), read_log(out)
    assert [each['iter'] for each in log] == [0, 2, 4]
    for name in names:
        wanted = [(each['iter'], pytest.approx(each[name])) for each in log if each[name] is not None]
        assert points.get(name, []) == wanted, name
    assert points.keys() <= set(names)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_mixed_precision_on_a_cpu(tmp_path, dataset, dtype):
    """The weights stay float32, and a run can go on at another precision."""
    train(tmp_path, dataset, max_iters=2)
    train(tmp_path, dataset, max_iters=4, init_from='resume', dtype=dtype)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in load(tmp_path / 'out')['model'].values())
    assert json.loads((tmp_path / 'out' / 'run.json').read_text())['config']['dtype'] == dtype
    assert abs(read_log(tmp_path / 'out')[-1]['val_loss'] - np.log(TOKENIZER.vocab_size)) < 0.5


def test_data_made_for_nanogpt(tmp_path):
    rng = np.random.default_rng(0)
    for split in 'train', 'val':
        rng.integers(50257, size=500, dtype=np.uint16).tofile(tmp_path / f'{split}.bin')
    train(tmp_path, tmp_path, n_embd=4, max_iters=2)
    assert load(tmp_path / 'out')['model_args']['vocab_size'] == 50304
    assert 'tokenizer' not in load(tmp_path / 'out')


def test_missing_data_set_is_prepared(tmp_path):
    """In a copy of the repository, by two processes of which one prepares it."""
    copy_code(tmp_path)
    (tmp_path / 'data' / 'toy').mkdir()
    (tmp_path / 'data' / 'toy' / 'prepare.py').write_text(
        'import os, sys\n'
        f'sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]\n'
        'from helpers import write_dataset\n'
        'write_dataset(os.path.dirname(os.path.abspath(__file__)))\n'
    )
    args = flags(**{**TINY, 'dataset': 'toy', 'out_dir': 'out'})
    done, other = run_group(tmp_path, tmp_path / 'train.py', *args)
    assert done.returncode == other.returncode == 0, done.stderr + other.stderr
    assert (done.stdout + other.stdout).count('preparing') == 1
    assert load(tmp_path / 'out')['iter_num'] == 4


PREPARE = """
import os, sys

sys.path[:0] = {paths!r}
from data.loader import write_meta, write_split
from helpers import TOKENIZER

folder = os.path.dirname(os.path.abspath(__file__))
for split, n in ('train', 4000), ('val', 800):
    write_split(folder, split, [i * {factor} % TOKENIZER.vocab_size for i in range(n)])
write_meta(folder, TOKENIZER, 'a row of characters')
"""


def train_on_node(folder, factor, env):
    """A process in a folder of its own, where a data set can be prepared that has this factor."""
    (folder / 'data').mkdir(parents=True)
    script = PREPARE.format(paths=[str(ROOT / 'tests'), str(ROOT)], factor=factor)
    (folder / 'data' / 'prepare.py').write_text(script)
    return run_forked(folder, 'train.py', *flags(**TINY, dataset='./data', out_dir='out'), env=env)


def train_on_two_nodes(folder, factors):
    first, second = join_processes(per_node=1)
    return together(
        lambda: train_on_node(folder / 'node0', factors[0], first),
        lambda: train_on_node(folder / 'node1', factors[1], second),
    )


def test_each_node_prepares_its_own_data(tmp_path):
    first, second = train_on_two_nodes(tmp_path, [3, 3])
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    for done in first, second:
        assert done.stdout.count("data set './data' is missing, preparing it") == 1
    for name in 'train.bin', 'val.bin', 'meta.json':
        one, two = ((tmp_path / node / 'data' / name).read_bytes() for node in ('node0', 'node1'))
        assert one == two
    assert load(tmp_path / 'node0' / 'out')['iter_num'] == 4 and not (tmp_path / 'node1' / 'out').exists()


def test_nodes_with_other_data_do_not_train_together(tmp_path):
    words = "data set './data' is not the same on process 1 as on process 0: copy its files from one node to all"
    for rank, done in enumerate(train_on_two_nodes(tmp_path, [3, 5])):
        assert done.returncode == 1
        assert done.stderr.removeprefix(f'[rank{rank}]: ') == f'error: {words}\n'  # the prefix is PyTorch's
    assert not (tmp_path / 'node0' / 'out').exists()


def test_weights_of_gpt2_are_tuned_and_cropped(tmp_path, dataset):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=TOKENIZER.vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / 'gpt2')
    train(tmp_path, dataset, init_from=tmp_path / 'gpt2')
    state = load(tmp_path / 'out')
    assert (
        state['iter_num'] == 4
        and state['model_args']['bias']
        and state['model_args']['block_size'] == SHAPE['block_size']
    )
    assert state['model']['transformer.wpe.weight'].shape == (SHAPE['block_size'], 16)
    train(tmp_path, dataset, init_from='resume', max_iters=5)


# the weights of every evaluation


def test_a_run_keeps_the_weights_of_every_evaluation(tmp_path, dataset):
    """Also when it is resumed; they change nothing, and the next run puts them aside with the others."""
    together(
        lambda: train(tmp_path, dataset, 'parts', max_iters=4, keep_history=True, **KAN),
        lambda: train(tmp_path, dataset, 'straight', max_iters=6, **KAN),
    )
    history = tmp_path / 'parts' / 'history'
    first = {name: load(history, name) for name in os.listdir(history)}
    assert sorted(first) == ['00000000.pt', '00000002.pt', '00000004.pt']
    train(tmp_path, dataset, 'parts', max_iters=6, init_from='resume', keep_history=True, **KAN)
    assert same_run(tmp_path / 'straight', tmp_path / 'parts')
    for name, weights in first.items():
        again = load(history, name)['model']
        assert all(torch.equal(tensor, again[key]) for key, tensor in weights['model'].items())
    last, latest = load(history, '00000006.pt'), load(tmp_path / 'parts')
    assert last.keys() == {'model', 'model_args', 'iter_num'} and last['iter_num'] == 6
    assert all(torch.equal(tensor, latest['model'][name]) for name, tensor in last['model'].items())
    begun = ckpt.build_model(load(history, '00000000.pt')).state_dict()
    assert not any(torch.equal(tensor, begun[name]) for name, tensor in last['model'].items() if 'spline' in name)
    assert not (tmp_path / 'straight' / 'history').exists()
    train(tmp_path, dataset, 'parts', max_iters=2, **KAN)
    assert not history.exists() and set(contents(tmp_path / 'parts' / 'earlier-1' / 'history')) == {
        *first,
        '00000006.pt',
    }


def test_weights_of_iterations_that_are_done_again_are_set_aside(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=6, keep_history=True)
    os.replace(tmp_path / 'out' / 'history' / '00000002.pt', tmp_path / 'kept.pt')
    state = load(tmp_path / 'out')
    torch.save({**state, 'iter_num': 4}, tmp_path / 'out' / 'ckpt.pt')
    done = train(tmp_path, dataset, init_from='resume', max_iters=5, keep_history=True)
    assert 'history/00000006.pt: moved to out/earlier-1, as later than iteration 4 or damaged\n' in done.stdout
    assert sorted(os.listdir(tmp_path / 'out' / 'history')) == ['00000000.pt', '00000004.pt', '00000005.pt']
    assert os.listdir(tmp_path / 'out' / 'earlier-1' / 'history') == ['00000006.pt']


# bad input: one line that says what is wrong


@pytest.fixture
def complain(tmp_path, dataset):
    def complain(env=(), **settings):
        return complaint(
            tmp_path, 'train.py', *flags(**{**TINY, 'dataset': dataset, 'out_dir': 'out', **settings}), env=env
        )

    return complain


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(learning_rat=1), "unknown setting 'learning_rat', did you mean 'learning_rate'"),
        (dict(max_iters='many'), "max_iters is int (default 600000), got str 'many'"),
        (dict(max_iters=1.5), 'max_iters is int'),
        (dict(n_embd=15), 'n_embd=15 is not divisible by n_head=2; nearest: n_embd=14 or 16, or n_head=1'),
        (dict(block_size=900), 'block_size=900 needs more than 900 tokens'),
        (dict(device='abacus'), "device='abacus' is not here: expected auto or"),
        (dict(device='cpu:7'), "device='cpu:7' is not here: expected auto or"),
        (dict(dtype='float8'), "dtype='float8': expected auto, float32, bfloat16 or float16"),
        (dict(gradient_accumulation_steps=0), 'gradient_accumulation_steps'),
        (dict(kan_targets='mlp,hat', use_kan=True), "kan_targets='mlp,hat': expected any of attn, mlp, head"),
        (dict(grid_min=2.0, use_kan=True), 'grid_min must be less than grid_max, got 2.0 and 1.0'),
        (dict(dataset='shakespear'), "no data set 'shakespear'"),
        (dict(dataset='/nowhere/at/all'), "no data set '/nowhere/at/all'"),
        (dict(beta2=2.0), 'beta2 must be less than 1'),
        (dict(spline_weight_decay=-2.0), 'spline_weight_decay must not be negative, or -1'),
        (dict(mlp='gelu'), "mlp='gelu': expected 'mlp' or 'swiglu'"),
        (dict(seed=2**64), 'seed must be less than'),
        (dict(log_to='tensorbord'), "log_to='tensorbord': expected any of wandb, tensorboard joined by commas"),
        (dict(init_from='gtp2'), "init_from='gtp2'"),
        (dict(init_from='resume'), 'no checkpoint in '),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_bad_setting(complain, settings, words):
    assert words in complain(**settings)


def test_resume_where_nothing_is_leaves_nothing(tmp_path, complain):
    complain(init_from='resume')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'settings',
    [
        dict(batch_size=0),
        dict(block_size=0),
        dict(n_head=0),
        dict(n_layer=-1),
        dict(eval_iters=0),
        dict(eval_interval=0),
        dict(log_interval=0),
        dict(seed=-1),
        dict(use_kan=True, grid_size=0),
        dict(use_kan=True, spline_order=-1),
    ],
    ids=lambda settings: list(settings)[-1],
)
def test_number_out_of_range(complain, settings):
    assert list(settings)[-1] in complain(**settings)


def test_bad_config_file_is_named_with_its_line(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text('# mine\nbatch_size = 4\nbatchsize = 4\n')
    assert f"{path}:3: unknown setting 'batchsize', did you mean 'batch_size'?" in complaint(tmp_path, 'train.py', path)


@pytest.mark.parametrize('steps, nearest', [(3, 4), (1, 2), (7, 8)])
def test_accumulation_that_does_not_divide(complain, steps, nearest):
    words = complain(env=dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2'), gradient_accumulation_steps=steps)
    assert f'gradient_accumulation_steps={steps} cannot be shared by 2 processes; nearest: {nearest}' in words


@pytest.mark.parametrize('damage', ['odd', 'shorter', 'empty', 'missing', 'flipped', 'meta.json', 'meta.json cut off'])
def test_damaged_data_is_named(tmp_path, complain, damage):
    folder = write_dataset(tmp_path / 'data')
    path = Path(folder, 'meta.json' if 'meta' in damage else 'val.bin')
    content = path.read_bytes()
    flipped = content[:100] + bytes([content[100] ^ 1]) + content[101:]
    damaged = {'odd': content[:-1], 'shorter': content[:-2], 'empty': b'', 'flipped': flipped, 'meta.json': b'[]'}
    path.write_bytes(damaged.get(damage, content[:-20]))
    if damage == 'missing':
        path.unlink()
    assert (folder if damage == 'missing' else str(path)) in complain(dataset=folder)


def test_token_outside_the_vocabulary_is_named(tmp_path, complain):
    few, tokenizer = tmp_path / 'few', CharTokenizer('abc')
    few.mkdir()
    write_split(few, 'train', [0, 1, 2, 3] * 20)
    write_split(few, 'val', [0, 1, 2] * 20)
    write_meta(few, tokenizer, 'one too many')
    assert f'{few}/train.bin holds token id 3, but the vocabulary ends at 2' in complain(dataset=few)


def test_resume_from_a_damaged_checkpoint(tmp_path, complain):
    for _ in range(2):
        make_checkpoint(tmp_path / 'out')
    path = tmp_path / 'out' / 'ckpt.pt'
    path.write_bytes(path.read_bytes()[:-1000])
    before = contents(path.parent)
    words = complain(init_from='resume')
    assert 'out/ckpt.pt' in words and 'ckpt_prev.pt' in words
    assert contents(path.parent) == before


def test_resume_without_its_config_file_names_the_data_set(tmp_path, dataset, complain):
    """Before it prepares another one."""
    train(tmp_path, dataset, max_iters=2)
    words = complain(init_from='resume', dataset='./absent')
    assert f"out is a run on data set {dataset!r}, and './absent' is not prepared: name the config file" in words


def test_resume_on_another_vocabulary(tmp_path, complain):
    make_checkpoint(tmp_path / 'out')
    other = write_dataset(tmp_path / 'other', tokenizer=CharTokenizer(TOKENIZER.chars[::-1]))
    assert 'another vocabulary' in complain(init_from='resume', dataset=other)
    smaller = write_dataset(tmp_path / 'smaller', tokenizer=CharTokenizer(TOKENIZER.chars[:-1]))
    checkpoint = load(tmp_path / 'out')
    del checkpoint['tokenizer']  # as nanoGPT's have none
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    assert 'name one with its vocabulary' in complain(init_from='resume', dataset=smaller)


def test_settings_that_would_do_nothing(complain):
    assert 'whose width is kan_hidden' in complain(use_kan=True, mlp='swiglu')


def test_resume_at_another_size(tmp_path, complain):
    make_checkpoint(tmp_path / 'out')
    assert 'block_size=8, but the model was made with 16' in complain(init_from='resume', block_size=8)


def test_resume_without_an_optimizer(tmp_path, complain):
    """As from a checkpoint of another kind."""
    saved = make_checkpoint(tmp_path / 'out')
    torch.save({name: saved[name] for name in ('model', 'model_args')}, tmp_path / 'out' / 'ckpt.pt')
    assert 'out/ckpt.pt' in complain(init_from='resume')


def test_a_complaint_is_all_that_a_user_sees(tmp_path, dataset):
    done = run(tmp_path, 'train.py', *flags(**{**TINY, 'dataset': dataset, 'n_embd': 15}))
    assert done.returncode == 1 and done.stdout == ''
    assert re.fullmatch(r'error: n_embd=15 is not divisible.*\n', done.stderr)


# the recipe


def test_rates_of_each_iteration_and_what_the_optimizer_has(tmp_path, dataset):
    """Warm-up, half a cosine, the end."""
    schedule = dict(max_iters=8, warmup_iters=2, lr_decay_iters=6, eval_interval=1, eval_iters=1)
    done = train(tmp_path, dataset, **schedule, beta1=0.8, beta2=0.9, weight_decay=0.2)
    top, low = TINY['learning_rate'], TINY['min_lr']
    cosine = [low + (top - low) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    log = read_log(tmp_path / 'out')
    assert [line['lr'] for line in log] == pytest.approx([top / 3, 2 * top / 3, *cosine, low, low, low])
    decaying, rest = load(tmp_path / 'out')['optimizer']['param_groups']
    assert decaying['lr'] == rest['lr'] == pytest.approx(low) and decaying['betas'] == (0.8, 0.9)
    assert (decaying['weight_decay'], rest['weight_decay']) == (0.2, 0.0)
    best = load(tmp_path / 'out', 'best.pt')
    assert best['optimizer']['param_groups'][0]['lr'] == pytest.approx(log[best['iter_num'] - 1]['lr'])
    shown = [float(loss) for loss in re.findall(r'iter \d+: loss ([\d.]+)', done.stdout)]
    assert len(shown) == 8 and all(abs(loss - math.log(TOKENIZER.vocab_size)) < 1 for loss in shown)
    for before, line in zip(log, log[1:]):
        speed = (line['tokens'] - before['tokens']) / (line['seconds'] - before['seconds'])
        assert line['tokens_per_s'] == pytest.approx(speed)


def test_gradients_of_a_run_are_clipped(tmp_path, dataset):
    for name, grad_clip in ('clipped', 1e-12), ('free', 0.0):
        train(tmp_path, dataset, name, max_iters=1, grad_clip=grad_clip, weight_decay=0.0, decay_lr=False)
    torch.manual_seed(1337)
    initial = GPT(GPTConfig(**load(tmp_path / 'free')['model_args'])).state_dict()
    clipped, free = (
        max((p - initial[key]).abs().max() for key, p in load(tmp_path / name)['model'].items())
        for name in ('clipped', 'free')
    )
    assert clipped < 1e-4 < 1e-3 < free


def test_the_loss_that_is_shown_is_the_mean_over_all_processes(tmp_path, dataset):
    done = train(tmp_path, dataset, processes=2, max_iters=2)
    shown = [float(loss) for loss in re.findall(r'iter \d+: loss ([\d.]+)', done.stdout)]
    assert len(shown) == 2 and all(abs(loss - math.log(TOKENIZER.vocab_size)) < 1 for loss in shown)


def test_a_run_learns_from_train_and_is_measured_on_both(tmp_path):
    """One is of one character, the other of another."""
    write_split(tmp_path, 'train', [1] * 400)
    write_split(tmp_path, 'val', [2] * 200)
    write_meta(tmp_path, TOKENIZER, 'two characters')
    train(tmp_path, tmp_path, max_iters=20, eval_interval=20, learning_rate=0.03, decay_lr=False)
    last = read_log(tmp_path / 'out')[-1]
    assert last['train_loss'] < 1 < math.log(TOKENIZER.vocab_size) < last['val_loss']


def test_the_seed_decides_which_windows_are_learned(tmp_path, dataset):
    """Also where the weights are given."""
    train(tmp_path, dataset, 'first', max_iters=0)
    for seed in 1, 2:
        train(tmp_path, dataset, f'out{seed}', init_from='first', max_iters=1, dropout=0.0, seed=seed)
    assert not same_state(load(tmp_path / 'out1'), load(tmp_path / 'out2'))
