"""
The exact loss of a model over a whole split: every token once, each after as much context as the stride leaves it.

    python evaluate.py --out_dir=out-shakespeare-char-nano-kan
    python evaluate.py --out_dir=out-shakespeare-char-nano-kan --dataset=./my-data --split=train --stride=1
    python evaluate.py --init_from=gpt2 --dataset=shakespeare

Prints loss (nats per token), perplexity, bits per character and per byte of the text, so that models by character and by byte pair
compare; the last line is JSON. Windows of block_size tokens begin every --stride tokens, and of each but the first only the last
--stride tokens count; <|endoftext|> is text of 13 characters. Checkpoints of nanoGPT and nanoGPKANT work too, as in sample.py.
"""

import json
import math

import torch
from tqdm import tqdm

import loader
from checkpoint import build_model, load_checkpoint, load_tokenizer
from configurator import configure
from cost import count_flops
from device import autocast, device_name, pick_device, pick_dtype
from model import GPT
from tokenizer import measure_text

# -----------------------------------------------------------------------------
init_from = 'resume'  # either 'resume' (from an out_dir) or a gpt2 variant (e.g. 'gpt2-xl') or a folder with one
out_dir = 'out'  # ignored if init_from is not 'resume'
dataset = ''  # by default the one the checkpoint was trained on
split = 'val'  # 'train' or 'val'
stride = 0  # 0 is half of block_size; block_size itself gives the windows of train.py
batch_size = 8  # windows at a time
device = 'auto'  # 'cuda', 'cuda:0', 'mps', 'cpu'; auto takes the first there is
dtype = 'float32'  # or 'bfloat16', 'float16', by autocast
# -----------------------------------------------------------------------------
configure(globals())
if batch_size < 1 or stride < 0 or split not in ('train', 'val'):
    raise ValueError(f'expected batch_size >= 1, stride >= 0, split train or val, got {batch_size}, {stride}, {split!r}')
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


if init_from == 'resume':
    checkpoint = load_checkpoint(out_dir)
    model = build_model(checkpoint, dropout=0.0)
    dataset = dataset or checkpoint.get('config', {}).get('dataset', '')
else:
    checkpoint = {'tokenizer': {'kind': 'gpt2'}}
    model = GPT.from_pretrained(init_from, dict(dropout=0.0))
if not dataset:
    raise ValueError('which data? name it by --dataset, e.g. --dataset=shakespeare_char')
loader.prepare_dataset(dataset)
meta = loader.read_meta(dataset)
if checkpoint.get('tokenizer') and meta and checkpoint['tokenizer'] != meta['tokenizer']:
    raise ValueError(f'data set {dataset!r} has another vocabulary than the model was trained on: encode its text with that of the model')
tokenizer = load_tokenizer(checkpoint, model.config.vocab_size, dataset if meta else '')
data = loader.open_split(dataset, split)
length = min(model.config.block_size, len(data) - 1)
stride = min(stride, length) or max(1, length // 2)
loader.check_dataset(dataset, 1, model.config.vocab_size)
model.eval()
model.to(device)

total = sum_losses(model, data, length, stride)
n_tokens, (n_chars, n_bytes) = len(data) - 1, measure_text(tokenizer, data[1:])
loss = total / n_tokens
result = {
    'loss': loss,
    'perplexity': math.exp(loss),
    'bits_per_char': total / math.log(2) / n_chars,
    'bits_per_byte': total / math.log(2) / n_bytes,
    'tokens': n_tokens,
    'chars': n_chars,
    'bytes': n_bytes,
    'dataset': dataset,
    'split': split,
    'sha256': meta.get('splits', {}).get(split, {}).get('sha256'),
    'stride': stride,
    'block_size': length,
    'model': out_dir if init_from == 'resume' else init_from,
    'iter_num': checkpoint.get('iter_num'),
    'parameters': model.get_num_params(non_embedding=False),
    'flops_per_token': count_flops(vars(model.config)),
    'device': device_name(device),
    'dtype': dtype,
}
print(f'{result["model"]} on {split} of {dataset}: {n_tokens:,} tokens, {n_chars:,} characters, {n_bytes:,} bytes')
print(f'windows of {length} tokens, every {stride}')
print(f'loss {loss:.4f}, perplexity {result["perplexity"]:.3f}', end=', ')
print(f'{result["bits_per_char"]:.4f} bits per character, {result["bits_per_byte"]:.4f} bits per byte')
print(json.dumps(result))
