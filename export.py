"""Take a trained model to where other tools read it: a folder of transformers or of PEFT, or a file of ONNX.

    python export.py --out_dir=out-x --to=transformers --folder=hf-x
    python export.py --out_dir=out-x --to=transformers --folder=hf-x --push=user/name   # to the Hugging Face hub, too
    python export.py --out_dir=out-x --to=onnx --folder=onnx-x
    python export.py --out_dir=out-finetune-sst-lora --to=peft --folder=peft-x   # the adapter of a run of finetune.py

A vanilla GPT becomes a GPT-2. Every other one takes the code that it needs with it, in plain PyTorch:

    AutoModelForCausalLM.from_pretrained('hf-x', trust_remote_code=True)

`--init_from=hf-x` brings it back into train.py, sample.py and eval.py.
"""

import json
import os
import re
import shutil

import torch
from torch import nn

from configurator import ROOT, configure
from data.loader import load_tokenizer
from data.tokenizer import IdTokenizer, as_fast
from model import CONV1D, GPT, GPTConfig
from run.checkpoint import EXPORT, build_model, holds_model, load_checkpoint
from run.files import write_file
from run.records import read_log, read_record
from surgery.causal_lm import build_hf, name_in_hf
from surgery.lora import read_adapter

# -----------------------------------------------------------------------------
out_dir = 'out'  # a run of train.py; for peft of finetune.py
to = 'transformers'  # or 'onnx', 'peft'
folder = ''  # to write, by default hf-..., onnx-... or peft-... with the name of the run
push = ''  # user/name on the Hugging Face hub, to upload the folder to
license = 'mit'  # what the card says of the weights
unfinished = False  # take a run that was not trained to its end
dataset = ''  # whose vocabulary to use where the checkpoint has none (nanoGPT's)
# -----------------------------------------------------------------------------
configure(globals())
MODULE = 'transformers_gpt'  # the file with the model's class, and the module of its copy
CODE = {  # file of an export: where it is from
    f'{MODULE}.py': f'surgery/{MODULE}.py',
    'gpt.py': 'model.py',
    'kan.py': 'kan.py',
    **{
        f'{name}.py': f'layers/{name}.py'
        for name in ('activations', 'channel', 'generation', 'graph', 'muon', 'pretrained', 'spline')
    },
}
OPSET = 18  # of ONNX


# the GPT as a model of transformers


def is_gpt2(config):
    """Whether transformers' own GPT-2 computes the same."""
    is_vanilla = not config.use_kan and not config.use_graph and not config.rotary
    return is_vanilla and config.mlp == 'mlp' and config.activation in ('', 'gelu')


def to_gpt2(gpt):
    """transformers' GPT-2 with the weights of a vanilla GPT; biases that this one lacks are zero there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = gpt.config
    sizes = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, vocab_size=config.vocab_size)
    sizes.update(n_positions=config.block_size, n_inner=gpt.transformer.h[0].mlp.c_fc.out_features)
    dropout = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), config.dropout)
    activation = {'none': 'gelu', 'tanh': 'gelu_new'}[config.gelu]
    ends = dict(bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, activation_function=activation, **ends))
    state = gpt.state_dict()
    for name, p in model.state_dict().items():
        if name.endswith('.bias') and name not in state:
            state[name] = torch.zeros_like(p)
        elif name.endswith(CONV1D):
            state[name] = state[name].t()
    model.load_state_dict(state)
    return model.eval()


def copy_code(folder):
    """The files of CODE side by side, importing each other as such. What runs on one kind of machine alone, compilers
    and Triton, stays behind: plain PyTorch does the same.
    """
    names = {source.removesuffix('.py').replace('/', '.'): name.removesuffix('.py') for name, source in CODE.items()}
    for name, source in CODE.items():
        with open(os.path.join(ROOT, source), encoding='utf-8') as f:
            text = f.read()
        for module, file in names.items():
            text = re.sub(rf'^from {re.escape(module)} import', f'from .{file} import', text, flags=re.MULTILINE)
        text = re.sub(r'^( *)from layers import (\w+)$', r'\1\2 = None  # not in an export', text, flags=re.MULTILINE)
        text = text.replace("BACKEND = 'auto'", "BACKEND = 'plain'")
        write_file(os.path.join(folder, name), text)


def as_transformers(gpt):
    from surgery.transformers_gpt import wrap

    return to_gpt2(gpt) if is_gpt2(gpt.config) else wrap(gpt)


def to_transformers(checkpoint, target):
    gpt, tokenizer = build(checkpoint)
    is_plain, model = is_gpt2(gpt.config), as_transformers(gpt)
    if not is_plain:
        copy_code(target)
        classes = dict(AutoConfig='GPTSettings', AutoModelForCausalLM='GPTForCausalLM')
        model.config.auto_map = {auto: f'{MODULE}.{name}' for auto, name in classes.items()}
    ends = save_tokenizer(tokenizer, gpt, target)
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    unused = [*range(tokenizer.vocab_size, gpt.config.vocab_size)]  # rows of the head that are no tokens
    model.generation_config.suppress_tokens = unused or None
    model.save_pretrained(target)
    kept = {key: checkpoint[key] for key in ('config', 'iter_num') if key in checkpoint}
    if 'best_val_loss' in checkpoint:
        kept['best_val_loss'] = float(checkpoint['best_val_loss'])  # nanoGPT's is a tensor
    about = dict(gpt2=is_plain, tied=gpt.tied_names(), model_args=vars(gpt.config), tokenizer=tokenizer.to_dict())
    write_file(os.path.join(target, EXPORT), json.dumps(about | kept, indent=1))
    source = arguments_of(push or target, brings_code=not is_plain)
    longest = gpt.config.block_size - 1 if is_plain else 100
    write_gpt_card(target, how_to_write(source, tokenizer, longest), checkpoint, gpt)


def arguments_of(name, brings_code):
    """What a card hands to from_pretrained, or to a pipeline."""
    return repr(name) + (', trust_remote_code=True' if brings_code else '')


def how_to_write(source, tokenizer, longest):
    """Lines of Python that generate text; from a source, up to so many tokens."""
    n = f'max_new_tokens={max(1, min(longest, 100))}'
    if isinstance(tokenizer, IdTokenizer):
        make = f'model = AutoModelForCausalLM.from_pretrained({source})'
        return ['from transformers import AutoModelForCausalLM', '', make, f'model.generate(ids, {n})  # int64 (B, T)']
    tokens = range(tokenizer.vocab_size // 2, tokenizer.vocab_size)  # behind the bytes, in most vocabularies
    texts = (tokenizer.decode([i]) for i in tokens)
    prompt = next((text for text in texts if is_text(text, tokenizer)), 'A')
    make = f"write = pipeline('text-generation', {source})"
    return ['from transformers import pipeline', '', make, f"print(write({prompt!r}, {n})[0]['generated_text'])"]


def is_text(text, tokenizer):
    """Whether it can be printed, and is one token."""
    return text.isprintable() and '\ufffd' not in text and len(tokenizer.encode(text)) == 1


def save_tokenizer(tokenizer, gpt, target):
    """Returns the token that ends a text, or None."""
    if isinstance(tokenizer, IdTokenizer):
        return None
    fast = as_fast(tokenizer, gpt.config.block_size)
    fast.save_pretrained(target)
    return fast.eos_token_id


# ONNX


class Logits(nn.Module):
    """idx (B, T) -> logits (B, T, V)"""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, idx):
        return self.gpt.lm_head(self.gpt.features(idx))


def to_onnx(checkpoint, target):
    """model.onnx, for any number of sequences of any length up to block_size."""
    import onnxscript  # noqa: F401, torch.onnx wants it

    gpt, tokenizer = build(checkpoint)
    block_size = gpt.config.block_size
    if gpt.config.use_graph or block_size == 1:
        raise ValueError('ONNX has no graph layers here, and no models of one token: --to=transformers has both')
    path = os.path.join(target, 'model.onnx')
    shape = {0: torch.export.Dim('batch', min=1), 1: torch.export.Dim('length', min=1, max=block_size)}
    names = dict(input_names=['idx'], output_names=['logits'])
    example = torch.zeros(2, max(2, block_size // 2), dtype=torch.long)
    settings = dict(dynamo=True, dynamic_shapes=(shape,), opset_version=OPSET, external_data=False, verbose=False)
    program = torch.onnx.export(Logits(gpt).eval(), (example,), path, **names, **settings)
    fixed = [size for size in program.model.graph.inputs[0].shape if isinstance(size, int)]
    if fixed:  # torch.onnx falls back to that without a word
        raise ValueError(f'torch.onnx would export this model for inputs of {fixed} alone')
    save_tokenizer(tokenizer, gpt, target)
    how = [
        'from onnxruntime import InferenceSession',
        '',
        f"session = InferenceSession('{path}')  # opset {OPSET}",
        "(logits,) = session.run(None, {'idx': ids})  # int64 (B, T) -> (B, T, V)",
    ]
    write_gpt_card(target, how, checkpoint, gpt)


# PEFT


def to_peft(checkpoint, target):
    """The adapter as PEFT saves it, for the base as a model of transformers: what it was, GPT-2, or what export.py made
    of it.
    """
    from peft import get_peft_model

    record, tensors = read_adapter(os.path.join(out_dir, 'adapter', 'adapter_model.safetensors'))
    settings = dict(checkpoint['finetune'])
    if os.path.exists(settings['init_from']):  # a name, and no folder of this machine
        settings['init_from'] = name_of_base(settings['init_from'])
    check_adapter(record, settings)
    base, is_plain, name_of = base_for_peft(checkpoint['model_args'])
    base.name_or_path = settings['init_from']  # which PEFT writes down
    names = {path: name_of(path) for path in record['layers']}
    model = get_peft_model(base, peft_config(record, [*names.values()], is_plain))
    for path, name in names.items():
        layer = model.base_model.model.get_submodule(name)
        load_into_peft(
            layer, {key.removeprefix(f'{path}.'): p for key, p in tensors.items() if key.startswith(f'{path}.')}
        )
    model.save_pretrained(target, save_embedding_layers=False)
    brings_code = 'causal_lm' not in checkpoint['model_args'] and not is_plain
    write_adapter_card(target, record['config'], settings, brings_code)


def base_for_peft(model_args):
    """(the model of transformers that an adapter is for, without its weights, which PEFT does not save; whether it is a
    GPT-2; what it calls a path of finetune.py)
    """
    if 'causal_lm' in model_args:
        hf = build_hf(model_args['causal_lm'])
        return hf, False, lambda path: name_in_hf(path.removeprefix('gpt.'), hf)
    gpt = GPT(GPTConfig(**model_args))
    is_plain = is_gpt2(gpt.config)
    return as_transformers(gpt), is_plain, lambda path: path.removeprefix('gpt.') if is_plain else path


def check_adapter(record, settings):
    """ValueError for what PEFT cannot hold: another base than the run began with, heads, adapters of kind kan_base; and
    for adapters of embeddings.
    """
    kinds = {kind for kind, _ in record['layers'].values()}
    embeddings = [path for path, (_, shapes) in record['layers'].items() if shapes.startswith('Embedding(')]
    if embeddings:
        raise ValueError(f'adapters of embeddings are not exported, and {out_dir} has one of {embeddings[0]}')
    if settings['use_kan'] or settings['use_graph'] or kinds not in ({'lora'}, {'kan'}):
        found = f'use_kan={settings["use_kan"]}, use_graph={settings["use_graph"]}, adapters {", ".join(sorted(kinds))}'
        wanted = 'PEFT has adapters of kind lora or kan on a base as it was, and no head'
        raise ValueError(f'{wanted}; {out_dir} has {found}')


def peft_config(record, names, is_plain):
    """What an adapter of surgery/adapters.py is called by PEFT."""
    from peft import LoraConfig

    ours = record['config']
    settings = dict(r=ours['rank'], lora_alpha=ours['alpha'], lora_dropout=ours['dropout'], use_dora=ours['use_dora'])
    settings.update(use_rslora=ours['rs_lora'], target_modules=names, task_type='CAUSAL_LM')
    if ours['kind'] == 'lora':
        return LoraConfig(**settings, fan_in_fan_out=is_plain)  # GPT-2's layers hold their weights the other way round
    from surgery.peft_kan import SHARED, KanLoraConfig  # tells PEFT of the kind

    return KanLoraConfig(**settings | {name: ours[name] for name in SHARED})


def load_into_peft(layer, tensors):
    """Put the tensors of an adapter of surgery/adapters.py into a layer of PEFT."""
    if hasattr(layer, 'kanlora_adapters'):
        layer.kanlora_adapters['default'].load_state_dict(tensors)
        return
    layer.lora_A['default'].weight.data = tensors['lora_A.weight']
    layer.lora_B['default'].weight.data = tensors['lora_B.weight']
    if 'magnitude' in tensors:
        layer.lora_magnitude_vector['default'].weight.data = tensors['magnitude']


# the card


def write_gpt_card(target, how, checkpoint, gpt):
    """README.md with the data, the recipe and the losses, and their curve."""
    record, config = read_record(out_dir), checkpoint.get('config', {})
    log = [line for line in read_log(out_dir) if line['iter'] > 0]
    parts = [f'A GPT of {gpt.get_num_params(False):,} parameters, in the shape of nanoGPT.']
    if 'dataset' in record:
        data = record['dataset']
        parts.append(f'Data: {base_name(data["name"])}, from {data["source"]}.')
    if {'iter_num', 'best_val_loss'} <= checkpoint.keys():
        trained = 'after {iter_num:,} iterations; the best validation loss was {best_val_loss:.4f} nats per token'
        parts.append(f'Weights: {trained.format(**checkpoint)}.')
    if is_cut(config, gpt):
        parts.append('Parts of it were cut: the recipe is that of its last training.')
    if record and 'finished' not in record:
        parts.append('The run was not trained to its end.')
    if log:
        draw_losses(log, os.path.join(target, 'loss.png'))
        parts.append('![Losses in training](loss.png)')
    write_card(target, parts, how, 'pipeline_tag: text-generation', config)


def write_adapter_card(target, adapter, settings, brings_code):
    """README.md of an adapter, whose base may bring code of its own."""
    what = f'An adapter of kind {adapter["kind"]} and rank {adapter["rank"]}, trained on {settings["task"]}.'
    base = settings['init_from']
    how = ['from peft import PeftModel', 'from transformers import AutoModelForCausalLM', '']
    if adapter['kind'] == 'kan':
        how[2:2] = ['import surgery.peft_kan  # tells PEFT of the kind']
    source = arguments_of(base, brings_code)
    how.append(f'base = AutoModelForCausalLM.from_pretrained({source})')
    how.append(f'model = PeftModel.from_pretrained(base, {push or target!r})')
    write_card(target, [what], how, f'base_model: {base}\nlibrary_name: peft', settings)


def write_card(target, parts, how, heading, config):
    """README.md: what it is, how it is used, paragraphs, the recipe."""
    what, *others = parts
    parts = [f'---\nlicense: {license}\n{heading}\n---', f'# {os.path.basename(target)}', what]
    parts += ['\n'.join(['```python', *how, '```']), *others]
    if config:
        settings = (f'`{key} = {value!r}`' for key, value in config.items() if key not in ('out_dir', 'device'))
        parts.append(f'Recipe: {", ".join(settings)}.')
    write_file(os.path.join(target, 'README.md'), '\n\n'.join(parts) + '\n')


def is_cut(config, gpt):
    """Whether the GPT lacks edges or hidden channels that it had in training."""
    C, widths = gpt.config.n_embd, {name: getattr(gpt.config, name) for name in ('kan_hidden', 'mlp_hidden')}
    return gpt.config.kan_mask or any(round(C * config.get(name, n)) != round(C * n) for name, n in widths.items())


def draw_losses(log, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout='constrained')
    panel = figure.subplots()
    for split in 'train', 'val':
        panel.plot([line['iter'] for line in log], [line[f'{split}_loss'] for line in log], 'o-', label=split)
    panel.set(xlabel='iteration', ylabel='loss (nats per token)', title='Losses in training')
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=120)


# the command


def load():
    """The checkpoint in out_dir; ValueError for one that cannot be exported."""
    checkpoint = load_checkpoint(out_dir)
    record = read_record(out_dir)
    if 'finetune' in checkpoint and to != 'peft':
        raise ValueError(f'{out_dir} holds a run of finetune.py: --to=peft takes its adapter, and nothing its model')
    if 'finetune' not in checkpoint and to == 'peft':
        raise ValueError(f'{out_dir} holds no adapter: --to=peft is for runs of finetune.py with use_lora')
    if not unfinished and record and 'finished' not in record:
        raise ValueError(f'{out_dir} was not trained to its end: --unfinished=True exports it as it is')
    config = checkpoint.get('config', {})
    for name in 'dataset', 'init_from':
        if name in config:  # a name, and no folder of this machine
            config[name] = base_name(config[name])
    config.pop('out_dir', None)
    return checkpoint


def base_name(path):
    return os.path.basename(os.path.normpath(path))


def default_folder(run, to):
    """Where a run goes that is exported to transformers, onnx or peft."""
    return f'{to.replace("transformers", "hf")}-{base_name(run).removeprefix("out-")}'


def name_of_base(path):
    """What a card calls the folder or file of a base: a run goes by its export, which transformers can read."""
    is_run = holds_model(path) and not os.path.exists(os.path.join(path, EXPORT))
    return default_folder(path, 'transformers') if is_run else base_name(path)


def build(checkpoint):
    """(GPT, its tokenizer)"""
    gpt = build_model(checkpoint).eval()
    tokenizer = load_tokenizer(checkpoint, gpt.config.vocab_size, dataset)
    return gpt, tokenizer


def export():
    if to not in WAYS:
        raise ValueError(f'to={to!r}: expected {", ".join(WAYS)}')
    if push and to == 'onnx':
        raise ValueError('push uploads a folder of transformers or of PEFT')
    target = os.path.normpath(folder or default_folder(out_dir, to))
    if os.path.exists(target) and os.listdir(target):
        raise ValueError(f'folder={target!r} is not empty: name another one')
    checkpoint = load()
    os.makedirs(target, exist_ok=True)
    try:
        WAYS[to](checkpoint, target)
    except BaseException:  # Ctrl-C, too: what is there is whole
        shutil.rmtree(os.path.realpath(target))
        raise
    print(f'{target}: {", ".join(sorted(os.listdir(target)))}')
    if push:
        upload(target)


def upload(target):
    """ValueError where that fails, with what to type to try again."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(push, exist_ok=True)
        print(api.upload_folder(repo_id=push, folder_path=target))
    except Exception as error:  # of the network, the hub or its client
        what = f'{type(error).__name__}: {error}'.splitlines()[0][:200]
        raise ValueError(f'{target} is whole, its upload failed ({what}): hf upload {push} {target}') from None


WAYS = {'transformers': to_transformers, 'onnx': to_onnx, 'peft': to_peft}
export()
