"""Reading models by transformers: whatever it raises is a ValueError of one line."""

from contextlib import contextmanager

import torch


@contextmanager
def one_line(source):
    """Whatever transformers raises while it reads a source as a ValueError of one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f'loading {source} needs {error.name}: pip install -r requirements-all.txt') from None
    except Exception as error:  # damaged files raise errors of all kinds
        if 'trust_remote_code' in str(error):
            wanted = 'expected a model that needs none'
            raise ValueError(f'{source} brings code of its own, which is never run: {wanted}') from None
        what = f'{type(error).__name__}: {error}'.split('. ')[0].splitlines()[0]
        raise ValueError(f'cannot load {source} ({what[:200]})') from None


def refuse_missing(source, found):
    """ValueError for weights that a model lacks, by what from_pretrained has found."""
    missing = sorted(map(str, [*found['missing_keys'], *found['mismatched_keys']]))
    if missing:
        raise ValueError(f'{source} has no weights that fit for {missing[0]}: it is another model than its config says')


def without_code(config):
    """The config, which names no code but transformers' own. ValueError for kernels of the hub as its attention."""
    attention = getattr(config, '_attn_implementation', None) or ''
    if '/' in str(attention):
        raise ValueError(f'its attention is {attention!r}, code of the hub, which is never run')
    if hasattr(config, 'auto_map'):
        del config.auto_map
    return config


def refuse_adapters(source, model):
    """ValueError where transformers has put an adapter of PEFT, found beside the model, into its layers."""
    if getattr(model, '_hf_peft_config_loaded', False):
        raise ValueError(f'{source} holds an adapter of PEFT: merge it first, or move its adapter_config.json away')


def load_gpt2(name):
    """The GPT-2 of transformers by a name of the hub or a folder, in eval mode; ValueError for what is none."""
    with one_line(name):
        from transformers import AutoConfig, GPT2LMHeadModel

        config = without_code(AutoConfig.from_pretrained(name, trust_remote_code=False))
    if config.model_type != 'gpt2':
        raise ValueError(f'{name!r} is a {config.model_type}, expected a GPT-2')
    settings = dict(config=config, dtype=torch.float32, output_loading_info=True)
    with one_line(name):
        model, found = GPT2LMHeadModel.from_pretrained(name, **settings)
    refuse_adapters(name, model)
    refuse_missing(name, found)
    return model.eval()
