"""Fine-tune a GPT on one of four tasks: sst, cfimdb, quora, sonnets.

    python finetune.py config/finetune/sst.py config/finetune/lora.py
    python finetune.py config/finetune/sonnets.py config/finetune/kan_lora.py --seed=2
    python finetune.py config/finetune/quora.py config/finetune/graph_lora.py --init_from=gpt2-large
    python finetune.py config/finetune/sst.py config/finetune/lora.py --init_from=HuggingFaceTB/SmolLM2-135M
    python finetune.py config/finetune/sst.py config/finetune/lora.py --resume=True
    torchrun --standalone --nproc_per_node=2 finetune.py config/finetune/cfimdb.py config/finetune/lora.py

A part of train is held out to stop by; dev is scored once, at the end, with the weights that did best on that part.
Ctrl-C (or SIGTERM, SIGHUP) finishes the step and saves; the same command with --resume=True then goes on, bit for
bit. --help shows the settings.
"""

import functools
import hashlib
import json
import math
import os
import sys
import time

import torch

from configurator import INCIDENTAL, check_ranges, configure, differing, idle_settings, names_of_configs
from run import checkpoint as ckpt
from run import records
from run.device import autocast, device_name, peak_memory
from run.files import write_file
from run.session import Session
from run.trackers import names_of_trackers
from surgery.lora import digest_of, save_lora
from tasks import model as task_model
from tasks.frozen import keep_frozen
from tasks.prompts import collate, draw_some, find_task, hold_out, make_batches, prepare_task, read_examples
from tasks.score import check_packages, predict, score, sonnet_baselines, text_of, write_predictions

# -----------------------------------------------------------------------------
# default config values; rank, alpha and epochs are those of the paper (arXiv 2504.10490)
# I/O
out_dir = ''  # empty: by the names of the config files, e.g. out-finetune-sst-lora
init_from = 'gpt2'  # or a run of train.py, or any causal language model of transformers: a name, a folder, a GGUF file
resume = False  # go on with the run in out_dir
save_base = True  # in checkpoints; False: frozen weights are not saved, and init_from has to stay as it is
# wandb logging
wandb_log = False  # disabled by default
wandb_project = 'finetune'
wandb_run_name = ''  # empty: as out_dir
wandb_artifact = False  # upload best.pt at the end as an artefact of wandb
log_to = ''  # wandb, tensorboard, or both joined by a comma
# task
task = 'sst'  # sst, cfimdb, quora, sonnets
form = 'cloze'  # labels by the logits of their words after the prompt, or by a new 'linear' head
train_limit = 0  # learn from that many examples at most; 0 is all
dev_limit = 0  # score that many of dev at most, drawn the same way in every run; 0 is all
valid_fraction = 0.1  # of train, held out to stop by
predict_test = True  # write the predictions for test, too
# what trains
finetune_mode = 'adapter'  # 'full', 'head', 'adapter'
dropout = 0.1
block_size = 0  # tokens of the longest text, to which others are cut; 0 is what the model takes
weights = 'float32'  # of the base; 'bfloat16' takes half the memory, where adapters alone train
gradient_checkpointing = False  # compute each block twice and keep less of it
frozen_cache = ''  # a folder: keep there what the blocks below the first trained one make of each text; wants dropout=0
# KAN layers in place of the MLPs, with what these have learned
use_kan = False  # the MLPs become KAN layers
kan_single_layer = -1  # the only block to get them; -1 is all blocks
grid_size = 5  # intervals of the spline grid
spline_order = 3  # 3 is cubic
grid_min = -2.0  # where the grid begins
grid_max = 2.0  # where it ends
# adapters
use_lora = True  # adapters on the layers that lora_targets names
lora_kind = 'lora'  # 'lora', 'kan' (two small KAN layers), 'kan_base' (low rank, on the weights of KAN layers)
lora_rank = 32
lora_alpha = 64.0
lora_dropout = 0.05  # of the inputs of adapters
lora_targets = 'attn,mlp'  # names of layers, or of modules that hold some, joined by commas
rs_lora = False  # rsLoRA: alpha over the square root of the rank, not over the rank
use_dora = False  # DoRA: lengths of rows that learn, too
lora_plus_ratio = 1.0  # learning rate of B and phi_out over that of the others
lora_grid_size = 4  # of 'kan'
lora_spline_order = 1  # of 'kan'
# graph attention behind the MLPs
use_graph = False  # graph attention behind the MLPs, silent at first
graph_kind = 'gat'  # or 'gatv2'
graph_edges = 'causal'  # any of causal, window, topk, same, joined by commas
graph_heads = 4  # of graph attention
graph_window = 8  # tokens before, of window
graph_topk = 8  # earlier tokens, of topk
graph_backend = 'auto'  # 'auto', 'dense', 'pyg'
graph_last = 0  # behind the MLPs of that many of the last blocks; 0 is all
# adamw optimizer
batch_size = 32  # examples per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step, over all processes
epochs = 10  # passes over train
patience = 2  # stop after that many epochs without a lower loss on the part held out; 0 is never
learning_rate = 1e-3  # max learning rate; of adapters ten to a hundred times that of full fine-tuning
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0  # clip gradients at this value, or disable if == 0.0
warmup_fraction = 0.06  # of all steps; then linear decay to zero
# sonnets
temperature = 0.7  # < 1.0 = less random
top_p = 0.9  # the most likely tokens that together have this probability
n_beams = 1  # more than one: beam search in place of sampling
best_of = 1  # draw that many and keep the likeliest
# system
seed = 1337
backend = 'nccl'  # of several GPUs; processes on CPUs talk through gloo
device = 'auto'  # 'cuda', 'cuda:0', 'mps', 'cpu'; auto takes the first there is
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; auto is bfloat16 (else float16) on a GPU, float32 elsewhere
# -----------------------------------------------------------------------------
config = configure(globals())
out_dir = out_dir or '-'.join(['out-finetune', *names_of_configs(sys.argv[1:])])
config.update(out_dir=out_dir)

check_ranges(
    config,
    at_least_one='batch_size gradient_accumulation_steps epochs n_beams best_of lora_rank lora_grid_size',
    not_negative='train_limit dev_limit block_size patience learning_rate weight_decay grad_clip seed temperature',
    fractions='dropout lora_dropout beta1 beta2 warmup_fraction valid_fraction',
    shares='top_p',
)
if valid_fraction == 0:
    raise ValueError('valid_fraction must be greater than 0: what is held out tells when to stop')
if min(n_beams, best_of) > 1:
    raise ValueError(f'one of n_beams and best_of must be 1, got {n_beams} and {best_of}')
names_of_trackers(config)  # which checks them
task_model.check_choices(**config)
check_packages(task)
prepare_task(task)
session = Session(device, dtype)
device, dtype, say = session.device, session.dtype, session.say
config.update(device=device, dtype=dtype)
micro_steps = session.micro_steps(gradient_accumulation_steps)
session.join(backend)
decisive = {name: value for name, value in config.items() if name not in {*INCIDENTAL, 'frozen_cache'} - {'init_from'}}
session.check_same('the command', decisive, 'type the same settings on each node')
session.reserve(out_dir)

# model: with resume all of it is in the checkpoint, or all but the base
torch.manual_seed(seed)
state, step, log = None, 0, []
best_loss, seconds, train_loss = math.inf, 0.0, 0.0
if resume:
    state = ckpt.load_checkpoint(out_dir, ['ckpt.pt'])
    session.check_same(f'{out_dir}/ckpt.pt', (state.get('iter_num'), state.get('seconds')))
    if 'finetune' not in state:
        raise ValueError(f'{out_dir}/ckpt.pt is not one of finetune.py: train.py resumes it, by --init_from=resume')
    free = {*INCIDENTAL, 'resume', 'predict_test', 'save_base', 'frozen_cache'} - {'init_from'}
    then = task_model.complete(state['finetune'])
    changed = [f'{name}={then[name]}' for name in differing(then, config, free)]
    if changed:
        raise ValueError(f'a run is resumed by the command it began with: there {", ".join(changed)}')
    model, tokenizer = task_model.load_task_model(state)
    step, log, model_args = state['iter_num'], state['log'], state['model_args']
    best_loss, seconds, train_loss = float(state['best_val_loss']), state['seconds'], state['train_loss']
    session.set_later_aside(out_dir, step)
    if not session.has_best(out_dir):
        best_loss = math.inf  # the best one is sought anew, so that there is one
else:
    gpt, tokenizer = task_model.load_base(init_from, dropout, block_size, weights)
    model_args = task_model.describe(gpt)
    model = task_model.make_task_model(gpt, tokenizer, config)
is_resumed = state is not None
model.to(device)
for line in idle_settings('finetune.py', config):
    say(f'warning: {line}')
say(task_model.trained_report(model, config))

# data
longest = model.gpt.config.block_size
examples_of_train = read_examples(task, 'train', tokenizer, longest)
train_examples, valid_examples = hold_out(examples_of_train, valid_fraction)
if 0 < train_limit < len(train_examples):
    train_examples = train_examples[:train_limit]
    valid_examples = valid_examples[: max(1, round(train_limit * valid_fraction))]
dev_examples = read_examples(task, 'dev', tokenizer, longest)
scored = {'dev': draw_some(dev_examples, dev_limit)}
if predict_test and find_task(task).path('test').exists():
    scored['test'] = read_examples(task, 'test', tokenizer, longest)
data = hashlib.sha256(repr([(example.ids, example.label) for example in examples_of_train]).encode()).hexdigest()
session.check_same(f'train of data/{task}', data)
if is_resumed and state.get('data', data) != data:
    raise ValueError(f'train of data/{task} is not what this run began with: to resume, put it back as it was')
steps_per_epoch = math.ceil(math.ceil(len(train_examples) / batch_size) / gradient_accumulation_steps)
n_steps = epochs * steps_per_epoch
counts = {'train': len(train_examples), 'valid': len(valid_examples), 'dev': len(scored['dev'])}
say(f'{task}: {counts["train"]:,} examples to learn from, {counts["valid"]:,} to stop by, {counts["dev"]:,} of dev')
per_step = batch_size * gradient_accumulation_steps
say(f'{n_steps:,} steps of {per_step} examples on {device_name(device)}, {session.world_size} process(es), {dtype}')

session.listen()
if frozen_cache:
    examples = [*train_examples, *valid_examples]
    if find_task(task).answers:  # sonnets of dev and test are written, with caches of their own
        examples += sum(scored.values(), [])
    about = task, model_args, dtype, session.device_type, torch.__version__
    keep_frozen(model.gpt, frozen_cache, about, examples, batch_size, session)

base_digest = None if save_base else digest_of(task_model.frozen_weights(model).items())
trained = [p for p in model.parameters() if p.requires_grad]
groups, fused = task_model.param_groups(model, config), session.device_type in ('cpu', 'cuda')
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=fused)
scaler = torch.amp.GradScaler(session.device_type, enabled=dtype == 'float16')
if is_resumed:
    optimizer.load_state_dict(state['optimizer'])
    if scaler.is_enabled():
        scaler.load_state_dict(state['scaler'])
fast_model = session.wrap(model)
torch.manual_seed(seed + session.rank)
if is_resumed:
    session.restore_rng(state)
    state = None  # the host's memory is for others


def get_lr(step):
    """Linear warm-up, then linear decay to zero."""
    n_warmup = int(warmup_fraction * n_steps)
    return learning_rate * min((step + 1) / (n_warmup + 1), (n_steps - step) / (n_steps - n_warmup))


@functools.cache
def epoch_batches(epoch):
    """All micro-batches of an epoch, a pure function of the seed and the epoch."""
    return make_batches(train_examples, batch_size, seed=f'{seed} {epoch}')


def run_step():
    """Forward, backward, update, on the micro-batches of all processes together; returns the mean loss."""
    place = step % steps_per_epoch * gradient_accumulation_steps
    batches = epoch_batches(step // steps_per_epoch)[place : place + gradient_accumulation_steps]
    n_targets = task_model.count_targets(example for batch in batches for example in batch)
    own = batches[session.rank :: session.world_size]
    for group in optimizer.param_groups:
        group['lr'] = get_lr(step) * group.get('lr_scale', 1.0)
    total = 0.0
    for i in range(micro_steps if session.ddp else len(own)):
        # at the end of an epoch a process may have no batch of its own: it takes another's at a weight of zero
        batch, weight = (own[i], 1.0) if i < len(own) else (batches[0], 0.0)
        idx, lengths, targets = collate(batch, device)
        if session.ddp:
            fast_model.require_backward_grad_sync = i == micro_steps - 1
        with autocast(device, dtype):
            loss = weight * task_model.sum_losses(fast_model(idx, lengths), targets) / n_targets
        total = total + loss.detach()
        scaler.scale(loss * session.world_size).backward()  # the gradients of processes are averaged
    return session.settle(session.update(optimizer, scaler, trained, total, grad_clip, step), 'step')


def score_held_out():
    """{'loss', 'accuracy'} on the examples held out, of sonnets the loss alone; None when told to stop."""
    share = valid_examples[session.rank :: session.world_size]
    found = predict(model, share, batch_size, device, dtype, session.signals)
    loss, predictions = found or (0.0, [])
    right = sum(prediction == example.label for prediction, example in zip(predictions, share))
    loss, right = session.all_reduce(loss, right)
    if session.is_stopping():
        return None
    scores = {'loss': loss / task_model.count_targets(valid_examples)}
    if find_task(task).answers:
        scores['accuracy'] = right / len(valid_examples)
    return scores


def save(is_best=False):
    """Save the state of this moment; returns whether it is there."""
    checkpoint = {
        **task_model.state_of(model, base_digest),
        'optimizer': optimizer.state_dict(),
        'model_args': model_args,
        'finetune': config,
        'iter_num': step,
        'best_val_loss': best_loss,
        'seconds': seconds,
        'train_loss': train_loss,  # of the epoch so far
        'log': log,
        'data': data,
        'rng': session.gather_rng(),
        'scaler': scaler.state_dict(),
        'tokenizer': tokenizer.to_dict(),
        'versions': ckpt.versions(),
    }
    return session.save(out_dir, checkpoint, is_best, f'step {step}')


def finish():
    """Score dev with the weights that did best, and write down all that a run leaves; False when told to stop."""
    best = ckpt.load_checkpoint(out_dir, ['best.pt'])
    task_model.load_state(model, best)
    torch.manual_seed(seed)
    sampling = dict(temperature=temperature, top_p=top_p, n_beams=n_beams, best_of=best_of)
    for split, examples in scored.items():
        found = score(model, tokenizer, task, examples, batch_size, device, dtype, sampling, session.signals)
        if found is None:
            return False
        scores, predictions = found
        write_predictions(os.path.join(out_dir, 'predictions'), task, split, examples, predictions)
        if split == 'dev':
            dev = scores
            say(f'dev: {text_of(dev)}')
    if use_lora:
        save_lora(model, os.path.join(out_dir, 'adapter'))
    metrics = dict(task=task, dev=dev, valid=best['log'][-1], steps=step, seconds=seconds)
    metrics.update(trained=n_trained, parameters=n_parameters, peak_memory=peak_memory(device))
    if not find_task(task).answers:
        texts = [[example.text for example in part] for part in (examples_of_train, scored['dev'])]
        metrics['baselines'] = sonnet_baselines(*texts)
    write_file(os.path.join(out_dir, 'metrics.json'), json.dumps(metrics, indent=1, allow_nan=False))
    session.write_record(final=metrics, finished=records.now())
    session.finish_tracking()
    return True


# the record of the run
n_trained, n_parameters = task_model.count_trained(model)
session.begin(
    out_dir,
    log,
    resumed_at=step if is_resumed else None,
    config=config,
    parameters={'total': n_parameters, 'trained': n_trained},
    model_args=model_args,
    dataset={'name': task, **counts},
)
if is_resumed:
    say(f'resuming at step {step}')


def is_done():
    """All steps are done, or the loss on the part held out has not fallen for `patience` epochs."""
    losses = [line['loss'] for line in log]
    epochs_since_best = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    return step >= n_steps or 0 < patience <= epochs_since_best


# training loop
bar = session.bar(n_steps, step, 'step')
saved_at = step if is_resumed else None  # the step of the state in ckpt.pt
model.train()
while True:
    if step > 0 and step % steps_per_epoch == 0 and (not log or log[-1]['iter'] < step):
        scores = score_held_out()
        if scores is None:
            break
        if not math.isfinite(scores['loss']):
            session.give_up(f'the evaluated loss is not finite at step {step}')
        before, is_best = best_loss, scores['loss'] < best_loss
        best_loss = min(best_loss, scores['loss'])
        line = dict(iter=step, epoch=step // steps_per_epoch, seconds=seconds, train_loss=train_loss)
        line.update(lr=get_lr(step - 1), **scores)
        log.append(line)
        say(f'epoch {line["epoch"]}: {text_of(scores)}, {seconds:.0f} s')
        saved_at = step if save(is_best) else None
        if saved_at is None:
            best_loss = before  # the next one may be the best that is saved
        session.track()
        session.write_record()
    if is_done() or session.is_stopping():
        break
    t0 = time.perf_counter()
    loss = run_step()
    train_loss = (train_loss if step % steps_per_epoch else 0.0) + loss / steps_per_epoch
    step += 1
    seconds += time.perf_counter() - t0
    bar.update()
    bar.set_postfix_str(f'loss {loss:.4f}', refresh=False)
bar.close()
done = log and log[-1]['iter'] == step and is_done()
is_saved = saved_at == step or (not done and save())
is_finished = done and (not session.master or finish())
if is_saved and not is_finished:
    say(f'stopped at step {step}; to go on: the same command with --resume=True')
if session.ddp:
    del fast_model  # before its process group: the other way round, gloo aborts now and then
session.leave()
