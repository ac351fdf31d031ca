"""Train a GPT or a KAN-GPT on one GPU, several, or a CPU.

    python train.py config/train_shakespeare_char_nano_kan.py
    python train.py config/train_shakespeare_char_micro_kan.py --max_iters=100 --device=cpu --batch_size=8
    python train.py config/train_shakespeare_char_micro_kan.py --init_from=resume
    torchrun --standalone --nproc_per_node=2 train.py config/train_shakespeare_char_nano_kan.py --device=cpu

Ctrl-C (or SIGTERM, SIGHUP) finishes the step and saves; --init_from=resume then goes on, bit for bit. --help lists
settings.
"""

import math
import os
import shlex
import sys
import time
from dataclasses import asdict

import torch

from configurator import INCIDENTAL, check_ranges, configure, differing, idle_settings
from data import loader
from data.tokenizer import beside_model, same_vocabulary
from model import GPT, GPT2S, GPTConfig, model_settings
from run import checkpoint as ckpt
from run import records
from run.cost import count_flops
from run.device import autocast, device_name, flops_promised, peak_memory
from run.session import Session
from run.trackers import names_of_trackers

# -----------------------------------------------------------------------------
# default config values designed to train a gpt2 (124M) on OpenWebText
# I/O
out_dir = 'out'
eval_interval = 2000  # iterations between evaluations
log_interval = 1  # iterations between printed lines
eval_iters = 200  # batches of fixed validation windows; at most the whole split is used
eval_only = False  # if True, script exits right after the first eval
always_save_checkpoint = True  # if False, save only when the validation loss improves, on interruption and at the end
keep_history = False  # keep the weights of every evaluation in out_dir/history, for interpret.py
init_from = 'scratch'  # 'scratch', 'resume', 'gpt2*', the folder of another run, or of a GPT-2 of transformers
# wandb logging
wandb_log = False  # disabled by default
wandb_project = 'owt'  # of wandb
wandb_run_name = ''  # empty: as out_dir
wandb_artifact = False  # upload best.pt at the end as an artefact of wandb
log_to = ''  # wandb, tensorboard, or both joined by a comma
# data
dataset = 'openwebtext'  # a folder of data/, or a path with a slash in it
gradient_accumulation_steps = 5 * 8  # micro-batches per iteration, over all processes
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens of context
# model
n_layer = 12  # blocks
n_head = 12  # heads of attention
n_embd = 768  # width
dropout = 0.0  # for pretraining 0 is good, for finetuning try 0.1+
bias = False  # do we use bias inside LayerNorm and Linear layers?
mlp = 'mlp'  # or 'swiglu'
mlp_hidden = 4.0  # width of the MLP's hidden layer, in multiples of n_embd; 8 / 3 gives SwiGLU as many parameters
activation = ''  # of the MLP: gelu, silu, relu2, identity or swish; empty: gelu, of swiglu silu
init_std = 0.02  # of the initial weights; those of KAN layers are scaled by init_std / 0.02
rotary = False  # rotary positions, of queries and keys, in place of position embeddings
# KAN layers
use_kan = False  # functions that learn, as kan_kind and kan_targets say
kan_kind = 'edge'  # a function on every edge; 'channel': a linear layer behind one function a channel
kan_targets = 'mlp'  # where: any of attn, mlp, head, joined by commas
kan_hidden = 4.0  # width of the hidden layer of an MLP of kind edge, in multiples of n_embd
kan_norm = False  # normalise that hidden layer, to unit variance; it wants a grid of about -3 to 3
grid_size = 5  # intervals of the spline grid
spline_order = 3  # 3 is cubic
grid_min = -1.0  # where the grid begins
grid_max = 1.0  # where it ends
spline_init_std = 0.0  # of channel functions: zero makes them their plain activations at first
# graph attention; needs torch-geometric
use_graph = False  # graph attention in every block
graph_kind = 'gat'  # or 'gatv2'
graph_edges = 'causal'  # from a token to any of causal, window, topk, same, joined by commas
graph_heads = 4
graph_place = 'after'  # behind the MLP, with a gate that starts at zero; or 'attention': in place of self-attention
graph_window = 8  # window: that many tokens before
graph_topk = 8  # topk: that many of the earlier tokens, those whose inputs to the layer are most similar
graph_backend = 'auto'  # 'dense', 'pyg'; auto is dense where edges hold causal, else pyg
# adamw optimizer
muon = False  # Muon, at the learning rate and decay of AdamW, for linear layers and KAN base weights of the blocks
learning_rate = 6e-4  # max learning rate
max_iters = 600000  # total number of training iterations
weight_decay = 1e-1  # of matrices, splines and embeddings
spline_lr_scale = 1.0  # learning rate of spline weights, scalers and learned slopes, in multiples of the others'
spline_weight_decay = -1.0  # of spline weights and scalers (slopes have none); -1 is weight_decay
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # clip gradients at this value, or disable if == 0.0
# learning rate decay settings
decay_lr = True  # by a cosine, to min_lr
warmup_iters = 2000  # iterations in which the learning rate rises
lr_decay_iters = 600000  # should be ~= max_iters per Chinchilla
min_lr = 6e-5  # should be ~= learning_rate / 10 per Chinchilla
# system
seed = 1337
backend = 'nccl'  # of several GPUs; processes on CPUs talk through gloo
device = 'auto'  # 'cuda', 'cuda:0', 'mps', 'cpu'; auto takes the first there is
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; auto is bfloat16 (else float16) on a GPU, float32 elsewhere
compile = True  # torch.compile on a GPU, where it pays
# -----------------------------------------------------------------------------
config = configure(globals())

check_ranges(
    config,
    at_least_one='n_layer n_embd block_size batch_size gradient_accumulation_steps '
    'eval_interval eval_iters log_interval',
    not_negative='seed max_iters learning_rate min_lr weight_decay spline_lr_scale grad_clip '
    'warmup_iters lr_decay_iters',
    fractions='dropout beta1 beta2',
)
if spline_weight_decay < 0 and spline_weight_decay != -1:
    raise ValueError(f'spline_weight_decay must not be negative, or -1 for weight_decay, got {spline_weight_decay}')

names_of_trackers(config)  # which checks them

# processes and device
session = Session(device, dtype)
device, dtype, say, master = session.device, session.dtype, session.say, session.master
rank, world_size, ddp, device_type = session.rank, session.world_size, session.ddp, session.device_type
config.update(device=device, dtype=dtype, dataset=loader.name_from_anywhere(dataset))
# settings that a resumed run may change without a warning
FREE = 'max_iters', 'eval_only', 'always_save_checkpoint', 'backend', 'dataset'
if decay_lr and min_lr > learning_rate:
    say(f'warning: min_lr={min_lr} is above learning_rate={learning_rate}: the rate will rise where it should decay')
micro_steps = session.micro_steps(gradient_accumulation_steps)
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size


def load_state():
    """The checkpoint that --init_from=resume goes on from; ValueError where it is no run of train.py."""
    state = ckpt.load_checkpoint(out_dir, ['ckpt.pt'])
    if 'finetune' in state:
        raise ValueError(f'{out_dir} holds a run of finetune.py: that script resumes it, by --resume=True')
    if not {'optimizer', 'iter_num', 'best_val_loss'} <= state.keys():
        advice = f'--init_from={out_dir} with another --out_dir begins a new run with it'
        raise ValueError(f'{out_dir}/ckpt.pt holds a model but no state of training to resume: {advice}')
    before = state.get('config', {}).get('dataset', dataset)
    if before != config['dataset'] and not loader.is_prepared(dataset):
        advice = f'name the config file of that run or --dataset={before}, or prepare the other first'
        raise ValueError(f'{out_dir} is a run on data set {before!r}, and {dataset!r} is not prepared: {advice}')
    return state


def load_base():
    """The checkpoint of a run of one's own that a new run begins with: the best one in the folder init_from."""
    state = ckpt.load_checkpoint(init_from)
    if 'finetune' in state:
        raise ValueError(f'{init_from} holds a run of finetune.py, with a head or adapters: name a run of train.py')
    return state


def choose_vocabulary():
    """That of the data set, else of the model to go on from; ValueError where they have different ones."""
    known = state or base or ({} if init_from == 'scratch' else beside_model(init_from))
    ours, theirs = meta.get('tokenizer'), known.get('tokenizer')
    if ours and theirs and not same_vocabulary(ours, theirs):
        place = out_dir if state else init_from
        raise ValueError(f'{place} has another vocabulary than data set {dataset!r}: name one that has the same')
    return ours or theirs


def count_windows(settings):
    """How many windows of each split the loss is evaluated on: of train at most as many as val has."""
    return min(settings['eval_iters'] * settings['batch_size'], (len(val_data) - 1) // block_size)


session.join(backend)
decisive = {name: value for name, value in config.items() if name not in {*INCIDENTAL, 'dataset'}}
session.check_same('the command', decisive, 'type the same settings on each node')
if not eval_only:
    session.reserve(out_dir)

# the run to go on from or to begin with, then the data
is_run = init_from not in ('scratch', 'resume') and ckpt.holds_model(init_from)
state = load_state() if init_from == 'resume' else None
session.check_same(f'{out_dir}/ckpt.pt', state and (state['iter_num'], state.get('seconds')))
base = load_base() if is_run else None
loader.prepare_dataset(dataset)
meta = loader.read_meta(dataset)
tokenizer = choose_vocabulary()
train_data, val_data = loader.open_split(dataset, 'train'), loader.open_split(dataset, 'val')
splits = loader.splits_of(dataset, meta)
session.check_same(f'data set {dataset!r}', splits)
is_resumed = bool(state)
is_another_text = is_resumed and state.get('data', splits) != splits
is_validated_by_another = is_another_text and state['data'].get('val') != splits['val']
has_other_windows = is_resumed and count_windows(config | state.get('config', {})) != count_windows(config)
is_measured_anew = is_validated_by_another or has_other_windows


def make_model(state, base):
    """The GPT that init_from and the settings ask for, or that of the state to resume or of the run to begin with."""
    if state or base:
        model = ckpt.build_model(state or base, dropout=dropout)
    elif init_from == 'scratch':
        if not meta:
            say(f'warning: data set {dataset!r} has no vocabulary (meta.json): its tokens are taken for those of GPT-2')
        sizes = GPTConfig(vocab_size=loader.model_vocab_size(meta), **model_settings(config))
        sizes.refuse_idle()
        model = GPT(sizes)
    elif init_from.startswith('gpt2') or os.path.isdir(init_from):
        model = GPT.from_pretrained(init_from, dict(dropout=dropout))
    else:
        names = f"'scratch', 'resume', {', '.join(GPT2S)} or the folder of a run or of a GPT-2"
        raise ValueError(f'init_from={init_from!r}: expected {names}')
    if meta:
        loader.check_vocab_size(dataset, meta, model.config.vocab_size)
    if not state and block_size < model.config.block_size:
        model.crop_block_size(block_size)
    if block_size != model.config.block_size:
        raise ValueError(f'block_size={block_size}, but the model was made with {model.config.block_size}')
    made = {name: getattr(model.config, name) for name in model_settings(config)}
    changed = [f'{name}={value}' for name, value in made.items() if value != config[name]]
    if changed:
        place = out_dir if state else init_from
        say(f'warning: {place} decides the shape of the model: {", ".join(changed)}')
    config.update(made)
    for line in idle_settings('train.py', config):
        say(f'warning: {line}')
    return model


def find_changes(then):
    """{setting: what a resumed run had} where it goes on with another value, with a warning."""
    changed = differing(then, config, {*INCIDENTAL, *FREE, *model_settings(config)} - {'dropout'})
    if changed:
        shown = ', '.join(f'{name}={config[name]} (it had {then[name]})' for name in changed)
        say(f'warning: the run goes on with other settings: {shown}')
    return {name: then[name] for name in changed}


def make_optimizer(model, state):
    """(AdamW, GradScaler) at the settings of this command, with the moments of the state to resume."""
    splines = spline_lr_scale, None if spline_weight_decay == -1 else spline_weight_decay
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, *splines, muon)
    scaler = torch.amp.GradScaler(device_type, enabled=(dtype == 'float16'))
    if not state:
        return optimizer, scaler
    if not ckpt.moments_fit(optimizer.param_groups, state['optimizer']):
        refuse_groups(records.complete(state.get('config', {})))
    optimizer.load_state_dict({**optimizer.state_dict(), 'state': state['optimizer']['state']})
    if scaler.is_enabled() and state.get('scaler'):
        scaler.load_state_dict(state['scaler'])
    return optimizer, scaler


def refuse_groups(then):
    """ValueError: the state to resume is of other groups. It names the settings that made them, if there are any."""
    names = 'muon', 'spline_lr_scale', 'weight_decay', 'spline_weight_decay'
    wanted = ' '.join(f'--{name}={then[name]}' for name in names if then.get(name, config[name]) != config[name])
    if not wanted:
        raise ValueError(f'{out_dir}/ckpt.pt holds the state of an optimizer for other weights than its own')
    raise ValueError(f'the run to resume has its weights in other groups: resume it with {wanted}')


torch.manual_seed(seed)
raw_model = make_model(state, base)
base = None  # with the state of its optimizer
if session.local_rank == 0:
    loader.check_dataset(dataset, block_size, raw_model.config.vocab_size)
raw_model.to(device)
optimizer, scaler = make_optimizer(raw_model, state)
iter_num, tokens, best_val_loss, seconds = 0, 0, math.inf, 0.0
changes = []  # of settings, as the run was resumed
if is_resumed:
    made_by = state.get('versions', {}).get('torch', torch.__version__)
    if made_by != torch.__version__:
        say(f'warning: ckpt.pt was saved with torch {made_by}, and {torch.__version__} does not go on bit for bit')
    then = state.get('config', {})
    iter_num, best_val_loss, seconds = state['iter_num'], float(state['best_val_loss']), state.get('seconds', 0.0)
    tokens = state.get('tokens', iter_num * tokens_per_iter)
    config['init_from'] = then.get('init_from', 'scratch')  # which the record keeps
    changed = find_changes(then)
    if is_another_text:
        changed['data'] = state['data']
    changes = state.get('changes', []) + ([{'iter': iter_num, 'before': changed}] if changed else [])
if is_measured_anew:
    best_val_loss = math.inf


def compiled(model):
    """The compiled model, or with one warning the model itself where compiling fails on any process."""
    x, y = loader.get_batch(train_data, block_size, [0] * batch_size, device)
    failure = None
    try:
        fast_model = torch.compile(model)
        with autocast(device, dtype):
            fast_model(x, y)[1].backward()
            with torch.no_grad():  # the pass that evaluates is another one
                model.eval()
                fast_model(x, y)
    except Exception as error:  # whatever a compiler can raise: the eager model does the same work
        failure = f'{type(error).__name__}: {error}'.splitlines()[0]
    model.train()
    model.zero_grad(set_to_none=True)
    if session.all_reduce(failure is not None)[0] == 0:
        return fast_model
    say(f'warning: torch.compile failed, going on without it: {failure or "on another process"}')
    return model


fast_model = raw_model
if compile and device_type == 'cuda' and not eval_only:
    fast_model = compiled(raw_model)
model = session.wrap(fast_model)

torch.manual_seed(seed + rank)
if is_resumed:
    session.restore_rng(state)
    state = None  # the host's memory is for others


@torch.no_grad()
def estimate_loss():
    """{'train', 'val'}: the mean loss over eval_iters batches of windows, the same for every model with these settings;
    None when told to stop.
    """
    losses = {}
    n_windows = count_windows(config)
    raw_model.eval()
    for split, data in (('train', train_data), ('val', val_data)):
        starts = loader.fixed_starts(data, block_size, n_windows)
        found, share = [], starts[rank::world_size]
        for i in range(0, math.ceil(len(starts) / world_size), batch_size):
            if session.is_stopping():
                raw_model.train()
                return None
            batch = share[i : i + batch_size]
            if len(batch):
                x, y = loader.get_batch(data, block_size, batch, device)
                evaluated = fast_model if len(batch) == batch_size else raw_model  # compiled for one size
                with autocast(device, dtype):
                    found.append((evaluated(x, y)[1], len(batch)))
        total = sum(loss.item() * n for loss, n in found)  # read when all of them are under way
        losses[split] = session.all_reduce(total)[0] / len(starts)
    raw_model.train()
    return losses


def get_lr(it):
    """Learning rate: linear warmup, then cosine decay to min_lr; constant without decay_lr."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (learning_rate - min_lr)


def save(is_best=False):
    """Save the state of this moment; returns whether it is there."""
    checkpoint = {
        'model': raw_model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'model_args': asdict(raw_model.config),
        'iter_num': iter_num,
        'tokens': tokens,
        'best_val_loss': best_val_loss,
        'config': config,
        'changes': changes,
        'seconds': seconds,
        'rng': session.gather_rng(),
        'scaler': scaler.state_dict(),
        'versions': ckpt.versions(),
        'data': splits,
    }
    if tokenizer:
        checkpoint['tokenizer'] = tokenizer
    return session.save(out_dir, checkpoint, is_best, f'iteration {iter_num}', again=saved_at == iter_num)


def save_weights():
    """Keep the weights of this moment, whatever is saved later."""
    weights = {'model': raw_model.state_dict(), 'model_args': asdict(raw_model.config), 'iter_num': iter_num}
    session.save_weights(out_dir, weights, f'iteration {iter_num}')


def log_line(losses):
    """What the log says of this evaluation. Where a resumed run repeats one, its speed stays, and its higher peak."""
    known = next((line for line in session.log if line['iter'] == iter_num), {})
    timed = (iter_num - iter_timed) * tokens_per_iter  # tokens since the last evaluation
    return dict(
        iter=iter_num,
        tokens=tokens,
        seconds=seconds,
        train_loss=losses['train'],
        val_loss=losses['val'],
        lr=get_lr(iter_num),
        tokens_per_s=timed / (seconds - timed_from) if timed else known.get('tokens_per_s'),
        peak_mem=max(peak_memory(device), known.get('peak_mem', 0)),
    )


def train_batch(iteration, micro_step):
    starts = loader.random_starts(train_data, block_size, batch_size, seed, iteration, micro_step * world_size + rank)
    return loader.get_batch(train_data, block_size, starts, device)


X, Y = train_batch(iter_num, 0)

# the record of the run, and what it says while it runs
log = [line for line in records.read_log(out_dir) if line['iter'] <= iter_num] if is_resumed else []
if is_resumed and not eval_only:
    session.set_later_aside(out_dir, iter_num)
    if not session.has_best(out_dir):
        best_val_loss = math.inf  # the best one is sought anew, so that there is one
if is_measured_anew:
    anew = '' if eval_only else ': its best loss starts anew'
    say(f'warning: the tokens or windows of the validation are not those this run began with{anew}')
if is_measured_anew and not eval_only:
    log = []
    if master:
        ckpt.set_aside(out_dir, ['best.pt', 'log.jsonl', 'tensorboard'])
session.begin(
    None if eval_only else out_dir,
    log,
    resumed_at=iter_num if is_resumed else None,
    config=config,
    changes=changes,
    parameters={'total': raw_model.get_num_params(False), 'non_embedding': raw_model.get_num_params()},
    model_args=asdict(raw_model.config),
    dataset={'name': dataset, 'splits': splits, **{key: meta.get(key) for key in ('source', 'val_chars')}},
    tokens_per_iter=tokens_per_iter,
    flops_per_token=count_flops(asdict(raw_model.config)) if master and not eval_only else None,
)
source = meta.get('source', 'files without meta.json')
say(f'data: {dataset}, {len(train_data):,} + {len(val_data):,} tokens, from {source}')
say(f'number of parameters: {raw_model.get_num_params() / 1e6:.2f}M')
say(f'{tokens_per_iter:,} tokens per iteration on {device_name(device)}, {world_size} process(es), {dtype}')
if is_resumed:
    say(f'resuming at iteration {iter_num}')
bar = session.bar(max_iters, iter_num, 'iter')

# training loop
session.listen()
peak = flops_promised(device, dtype)
timed_from, iter_timed = seconds, iter_num
saved_at = iter_num if is_resumed else None  # the iteration of the state in ckpt.pt
started, stopping = None, False  # when the steps began that the device may still be at
while True:
    # evaluate the loss on train/val sets, write checkpoints and the record
    is_last = iter_num >= max_iters
    is_due = eval_only or is_last or iter_num % eval_interval == 0
    losses = None if stopping or not is_due else estimate_loss()
    if losses and not math.isfinite(losses['train'] + losses['val']):
        session.give_up(f'the evaluated loss is not finite at iteration {iter_num}')
    if losses:
        say(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
        line = log_line(losses)
        timed_from, iter_timed = seconds, iter_num
        session.log[:] = [one for one in session.log if one['iter'] < iter_num] + [line]
        session.track()
        if keep_history and not eval_only:
            save_weights()
        if not eval_only and (iter_num > 0 or is_last):
            before, is_best = best_val_loss, losses['val'] < best_val_loss
            best_val_loss = min(best_val_loss, losses['val'])
            if is_best or ((always_save_checkpoint or is_last) and saved_at != iter_num):
                saved_at = iter_num if save(is_best) else None
                if saved_at is None:
                    best_val_loss = before  # the next one may be the best that is saved
        session.write_record()
    if is_last or eval_only or stopping or (is_due and losses is None):  # told to stop
        break

    # forward, backward, update, with gradient accumulation to simulate larger batches
    if started is None:
        started, first_iter = time.perf_counter(), iter_num
    for group in optimizer.param_groups:
        group['lr'] = get_lr(iter_num) * group.get('lr_scale', 1.0)
    total_loss = 0.0
    for micro_step in range(micro_steps):
        if ddp:
            model.require_backward_grad_sync = micro_step == micro_steps - 1  # one exchange of gradients per iteration
        with autocast(device, dtype):
            loss = model(X, Y)[1] / micro_steps
        total_loss += loss.detach()
        ahead, place = divmod(micro_step + 1, micro_steps)
        X, Y = train_batch(iter_num + ahead, place)  # while the GPU works
        scaler.scale(loss).backward()
    loss = session.update(optimizer, scaler, raw_model.parameters(), total_loss / world_size, grad_clip, iter_num)
    iter_num += 1
    tokens += tokens_per_iter
    bar.update()

    # timing and logging, for which alone a single process with AdamW waits for its GPU
    stopping = session.is_stopping()
    if stopping or iter_num >= max_iters or iter_num % log_interval == 0 or iter_num % eval_interval == 0:
        lossf = session.settle(loss, 'iteration')
        dt = time.perf_counter() - started
        seconds, started = seconds + dt, None
        dt /= iter_num - first_iter
        status = f'loss {lossf:.4f}, {tokens_per_iter / dt:,.0f} tokens/s'
        if peak:
            status += f', mfu {raw_model.estimate_mfu(micro_steps * batch_size, dt, peak):.1%}'
        bar.set_postfix_str(status, refresh=False)
        if iter_num % log_interval == 0 and not session.on_terminal:
            say(f'iter {iter_num}: {status}, {dt * 1000:.0f} ms')

bar.close()
if is_last and losses and not eval_only and saved_at == iter_num:
    session.write_record(final={**line, 'best_val_loss': best_val_loss}, finished=records.now())
    session.finish_tracking()
    say(f'finished: best val loss {best_val_loss:.4f}; for text: python sample.py --out_dir={shlex.quote(out_dir)}')
elif not eval_only and (saved_at == iter_num or save()):
    say(f'stopped at iteration {iter_num}; to go on: the same command with --init_from=resume')
del model  # before its process group: the other way round, gloo aborts now and then
session.leave()
if eval_only and losses is None:
    sys.exit('interrupted before the loss was known')
