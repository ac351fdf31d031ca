"""Text from a trained model: all samples at once, the first one streamed as it is generated.

    python sample.py --out_dir=out-shakespeare-char-nano-kan --start="ROMEO:" --num_samples=3 --seed=1
    python sample.py --out_dir=out-shakespeare-char-micro-kan --temperature=0 --max_new_tokens=200
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt --top_p=0.9

Checkpoints of nanoGPT and nanoGPKANT work too: put the ckpt.pt into a folder and name it by --out_dir.
"""

import os
import sys

import torch

from configurator import check_ranges, configure
from data.loader import load_tokenizer
from data.tokenizer import IdTokenizer, TextStream, beside_model
from layers.generation import stream
from model import GPT
from run.checkpoint import build_model, holds_model, load_checkpoint
from run.device import autocast, pick_device, pick_dtype
from run.files import decode_text

# -----------------------------------------------------------------------------
init_from = 'resume'  # from an out_dir; or the folder of a run, a gpt2 variant (e.g. 'gpt2-xl') or a folder with one
out_dir = 'out'  # ignored if init_from is not 'resume'
start = '\n'  # the prompt ($'\n' in a shell), or '<|endoftext|>' etc.; a file with it as "FILE:prompt.txt"
num_samples = 10  # number of samples to draw
max_new_tokens = 500  # number of tokens generated in each sample
temperature = 0.8  # 1.0 = no change, < 1.0 = less random, > 1.0 = more random, 0 = always the most likely token
top_k = 200  # retain only the top_k most likely tokens, clamp others to have 0 probability; 0 = all
top_p = 1.0  # retain only the most likely tokens that together have this probability
stop = ''  # end a sample before this text
dataset = ''  # whose vocabulary to use where the checkpoint has none (nanoGPT's)
seed = 1337
device = 'auto'  # 'cuda', 'cuda:0', 'mps', 'cpu'; auto takes the first there is
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; auto is bfloat16 (else float16) on a GPU, float32 elsewhere
compile = False  # torch.compile the model to be faster
# -----------------------------------------------------------------------------
configure(globals())
if init_from != 'resume' and holds_model(init_from):
    init_from, out_dir = 'resume', init_from
check_ranges(
    globals(),
    at_least_one='num_samples max_new_tokens',
    not_negative='temperature top_k seed',
    shares='top_p',
)
if temperature == 0 and top_p < 1:
    print('warning: top_p does nothing with temperature=0, which takes the likeliest token', file=sys.stderr)
device = pick_device(device)
dtype = pick_dtype(dtype, device)


def read_prompt():
    if not start.startswith('FILE:'):
        return start
    path = os.path.expanduser(start.removeprefix('FILE:'))
    with open(path, 'rb') as f:
        return decode_text(f.read(), path)


class Sample:
    """The text of one sample, up to `stop`."""

    def __init__(self):
        self.stream = TextStream(tokenizer, prompt)
        self.text = ''  # what is generated
        self.end = -1  # where `stop` begins in it
        self.shown = 0  # how much of it is on the terminal

    def add(self, token):
        if self.end < 0:
            self.take(self.stream.add(token))

    def take(self, text):
        self.text += text
        self.end = self.text.find(stop) if stop else -1

    def show(self, finished=False):
        """Print what is new; what may be the beginning of `stop` only when the sample is finished."""
        if finished and self.end < 0:
            self.take(self.stream.end())
        waiting = 0 if finished else held_back(self.text)
        ready = self.end if self.end >= 0 else len(self.text) - waiting
        print(self.text[self.shown : ready], end='', flush=True)
        self.shown = max(self.shown, ready)


def held_back(text):
    """How many characters at the end may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def load_model(checkpoint):
    if init_from != 'resume':
        return GPT.from_pretrained(init_from, dict(dropout=0.0))
    if 'finetune' not in checkpoint:
        return build_model(checkpoint, dropout=0.0)
    from tasks.model import load_task_model  # not needed for a plain GPT

    return load_task_model(checkpoint, dropout=0.0)[0].gpt


checkpoint = load_checkpoint(out_dir) if init_from == 'resume' else beside_model(init_from)
model = load_model(checkpoint)
tokenizer = load_tokenizer(checkpoint, model.config.vocab_size, dataset)
last = getattr(tokenizer, 'last_of_text', tokenizer.vocab_size - 1)  # tokens that were added may have no row
if last >= model.config.vocab_size:
    raise ValueError(f'the vocabulary has {last + 1} tokens, the model only {model.config.vocab_size}')
prompt = tokenizer.encode(read_prompt())
if not prompt:
    example = '"12 7 30"' if isinstance(tokenizer, IdTokenizer) else 'TEXT, in characters or words that it knows'
    raise ValueError(f'start has no token of this vocabulary to go on from: give one, e.g. --start={example}')
if max(prompt) >= model.config.vocab_size:
    raise ValueError(f'start holds token {max(prompt)}, and the model has rows for {model.config.vocab_size} tokens')
model.eval()
model.to(device)
if compile:
    model.forward = torch.compile(model.forward)
torch.manual_seed(seed)  # after the model, whose initial weights are drawn, too
x = torch.tensor([prompt] * num_samples, dtype=torch.long, device=device)  # (num_samples, T)
samples = [Sample() for _ in range(num_samples)]
print(tokenizer.decode(prompt), end='', flush=True)
with torch.no_grad(), autocast(device, dtype):
    for tokens in stream(model, x, max_new_tokens, temperature, top_k or None, top_p, tokenizer.vocab_size):
        for sample, token in zip(samples, tokens[:, 0].tolist()):
            sample.add(token)
        samples[0].show()
        if all(sample.end >= 0 for sample in samples):
            break
for i, sample in enumerate(samples):
    if i > 0:
        print(tokenizer.decode(prompt), end='')
    sample.show(finished=True)
    print('\n---------------')
