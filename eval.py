"""The exact loss of a model over a whole split: every token once, each after as much context as the stride leaves it;
or its scores on a fine-tuning task.

    python eval.py --out_dir=out-shakespeare-char-nano-kan
    python eval.py --out_dir=out-shakespeare-char-nano-kan --dataset=./my-data --split=train --stride=1
    python eval.py --init_from=gpt2 --dataset=shakespeare
    python eval.py --out_dir=out-finetune-sst-lora   # what finetune.py made: accuracy and macro F1, of sonnets CHRF
    python eval.py --init_from=gpt2 --adapter=out-finetune-sst-lora   # the same, from its adapter and its base
    python eval.py --init_from=gpt2 --task=quora --shots=4   # the answers of a model that has not learned the task

Of a text it prints loss (nats per token), perplexity, bits per character and per byte, so that models by character and
by byte pair compare; the last line is JSON. Windows of block_size tokens begin every --stride tokens, and of each but
the first only the last --stride tokens count; <|endoftext|> is text of 13 characters. Checkpoints of nanoGPT and of
nanoGPKANT work too, as in sample.py.
"""

import json
import math

import torch
from tqdm import tqdm

from configurator import check_ranges, configure, settings_of
from data import loader
from data.tokenizer import beside_model, measure_text
from model import GPT
from run.checkpoint import build_model, holds_model, load_checkpoint
from run.cost import count_flops
from run.device import autocast, device_name, pick_device, pick_dtype
from run.files import sha256_of
from run.records import perplexity, without_nan
from tasks import model as task_model
from tasks import prompts, score

# -----------------------------------------------------------------------------
init_from = 'resume'  # from an out_dir; or the folder of a run, gpt2 ... gpt2-xl; of a task all that finetune.py takes
out_dir = 'out'  # ignored if init_from is not 'resume'
dataset = ''  # by default the one the checkpoint was trained on
split = 'val'  # 'train', 'val' or, where there is one, 'test'; of a task 'train' or 'dev', which 'val' means too
task = ''  # sst, cfimdb, quora or sonnets; a fine-tuned model has its own
shots = 0  # of a task with labels, for a model that has not learned it: answered examples of train before each prompt
limit = 0  # of a task, score that many examples at most, drawn the same way each time; 0 is all
block_size = 0  # of a model that has not learned its task: tokens of the longest prompt; 0 is what the model takes
adapter = ''  # the out_dir of a run of finetune.py whose adapter goes onto the model of init_from
seed = 1337  # of a model that has not learned its task: draws the shots, and sonnets
stride = 0  # 0 is half of block_size; block_size itself gives the windows of train.py
batch_size = 8  # windows at a time
device = 'auto'  # 'cuda', 'cuda:0', 'mps', 'cpu'; auto takes the first there is
dtype = 'float32'  # or 'bfloat16', 'float16', by autocast
# -----------------------------------------------------------------------------
configure(globals())
if init_from != 'resume' and holds_model(init_from):
    init_from, out_dir = 'resume', init_from
check_ranges(globals(), at_least_one='batch_size', not_negative='stride shots limit block_size seed')
if split not in ('train', 'val', 'test', 'dev'):
    raise ValueError(f'split={split!r}: expected train, val, test or dev')
device = pick_device(device)
dtype = pick_dtype(dtype, device)


def windows(n_tokens, length, stride):
    """(start, first target that counts) of each window: together they count the targets 1 ... n_tokens - 1 once."""
    last = max(0, n_tokens - 1 - length)
    starts = [*range(0, last, stride), last]
    ends = [0, *(start + length for start in starts)]  # where the windows before end
    return [(start, end - start) for start, end in zip(starts, ends)]


@torch.no_grad()
def sum_losses(model, data, length, stride):
    """The sum of the losses, in nats, of all tokens of `data` but the first."""
    total, todo = 0.0, windows(len(data), length, stride)
    for i in tqdm(range(0, len(todo), batch_size), unit='batch', disable=None):
        batch = todo[i : i + batch_size]
        x, y = loader.get_batch(data, length, [start for start, _ in batch], device)
        firsts = torch.tensor([[first] for _, first in batch], device=device)
        y = y.masked_fill(torch.arange(length, device=device) < firsts, -1)  # counted in the window before
        with autocast(device, dtype):
            total += model(x, y)[1].item() * (y >= 0).sum().item()
    return total


def evaluate_text(checkpoint):
    """Loss, perplexity and bits of a model on a split of a data set, in a dict."""
    if shots or limit or block_size:
        given = f'shots={shots}, limit={limit} and block_size={block_size}'
        raise ValueError(f'{given} are of a task: name one, e.g. --task=sst')
    if init_from == 'resume':
        model = build_model(checkpoint, dropout=0.0)
    else:
        model = GPT.from_pretrained(init_from, dict(dropout=0.0))
        checkpoint = beside_model(init_from)
    name, meta, tokenizer, data = loader.open_text(checkpoint, dataset, split, model.config.vocab_size)
    length = min(model.config.block_size, len(data) - 1)
    step = min(stride, length) or max(1, length // 2)
    loader.check_dataset(name, 1, model.config.vocab_size, [split])
    model.to(device).eval()
    tokens, (chars, n_bytes) = len(data) - 1, measure_text(tokenizer, data[1:])
    total = sum_losses(model, data, length, step)
    if not math.isfinite(total):
        raise ValueError(f'the loss is {total}: the weights have diverged, or {dtype} is too small for them')
    loss, bits = total / tokens, total / math.log(2)
    found, size = dict(loss=loss, perplexity=perplexity(loss)), f'{tokens:,} tokens'
    shown = 'loss {loss:.4f}, perplexity {perplexity:.3f}'
    if chars is not None:
        found.update(bits_per_char=bits / chars, bits_per_byte=bits / n_bytes)
        size += f', {chars:,} characters, {n_bytes:,} bytes'
        shown += ', {bits_per_char:.4f} bits per character, {bits_per_byte:.4f} bits per byte'
    print(f'{source} on {split} of {name}: {size}\nwindows of {length} tokens, every {step}')
    print(shown.format(**found))
    sha256 = meta.get('splits', {}).get(split, {}).get('sha256') or sha256_of(data.filename)
    about = dict(tokens=tokens, chars=chars, bytes=n_bytes, dataset=name, split=split, sha256=sha256)
    costs = dict(parameters=model.get_num_params(False), flops_per_token=count_flops(vars(model.config)))
    return {**found, **about, 'stride': step, 'block_size': length, **costs}


def evaluate_task(checkpoint):
    """The scores of a fine-tuned model on its task, or of another one on `task`, in a dict."""
    base = out_dir if init_from == 'resume' else init_from
    if (shots or block_size) and (adapter or 'finetune' in checkpoint):
        raise ValueError('shots and block_size are for a model that has not learned its task: leave them out')
    if split == 'train' and shots:
        raise ValueError(f'shots={shots} are drawn from train, so that an example would hold its own answer: score dev')
    if stride:
        raise ValueError(f'stride={stride} is of texts: leave it out')
    if adapter:
        model, tokenizer, settings = task_model.load_adapter(adapter, base)
    elif 'finetune' in checkpoint:
        settings = task_model.complete(checkpoint['finetune'])
        model, tokenizer = task_model.load_task_model(checkpoint, dropout=0.0)
    else:
        plain = [f'--task={task}', f'--seed={seed}', '--finetune_mode=full', '--use_lora=False']
        settings = settings_of('finetune.py', plain)
        gpt, tokenizer = task_model.load_base(base, 0.0, block_size)
        model = task_model.make_task_model(gpt, tokenizer, settings)
    name, part = settings['task'], 'dev' if split == 'val' else split
    if part == 'test':
        raise ValueError(f'split=test is of texts: {name} has train and dev, as the labels of its test are not public')
    if task not in ('', name):
        raise ValueError(f'task={task!r}, but {adapter or out_dir} holds a model for {name}')
    score.check_packages(name)
    prompts.prepare_task(name)
    before = prompts.encode_shots(name, tokenizer, shots, seed) if shots else ()
    examples = prompts.read_examples(name, part, tokenizer, model.gpt.config.block_size, before)
    examples = prompts.draw_some(examples, limit)
    torch.manual_seed(settings['seed'])
    sampling = {key: settings[key] for key in ('temperature', 'top_p', 'n_beams', 'best_of')}
    scores, _ = score.score(model.to(device), tokenizer, name, examples, batch_size, device, dtype, sampling)
    print(f'{source} on {part} of {name}, {len(examples):,} examples: {score.text_of(scores)}')
    result = dict(scores, task=name, split=part, examples=len(examples), shots=shots)
    result['parameters'] = task_model.count_trained(model)[1]
    if not prompts.find_task(name).answers:
        train = prompts.read_examples(name, 'train', tokenizer, model.gpt.config.block_size)
        texts = [[example.text for example in some] for some in (train, examples)]
        result['baselines'] = score.sonnet_baselines(*texts)
        print(f'without a model: {score.text_of(result["baselines"])}')
    return result


checkpoint = load_checkpoint(out_dir) if init_from == 'resume' else {}
source = (out_dir if init_from == 'resume' else init_from) + (f' with the adapter of {adapter}' if adapter else '')
on_task = task or adapter or 'finetune' in checkpoint
if on_task and dataset:
    raise ValueError(f'dataset={dataset!r} is a text, and this scores a task: leave dataset out')
result = evaluate_task(checkpoint) if on_task else evaluate_text(checkpoint)
iter_num = None if adapter else checkpoint.get('iter_num')  # an adapter has steps of its own
about = {'model': source, 'iter_num': iter_num, 'device': device_name(device), 'dtype': dtype}
print(json.dumps({**without_nan(result), **about}))
