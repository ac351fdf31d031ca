"""Any causal language model of transformers, a Llama, Mistral, Qwen, GPT-NeoX and so on, with the methods of the GPT of
model.py, so that what works on that works on this.

    model = load_causal_lm('HuggingFaceTB/SmolLM2-135M')   # or a folder, or a GGUF file
    logits, loss = model(idx, targets)

Code that a model brings along is never run.
"""

import os
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch
import torch.nn as nn

from layers.generation import KVCache, check_places
from layers.graph import Edges, GraphAttention, last_of, with_graph
from layers.pretrained import one_line, refuse_adapters, refuse_missing, without_code
from model import GPT, GPTConfig

PASS = ContextVar('PASS')  # of this thread's pass through a CausalLM: (edges, caches of graph layers)


class CausalLM(nn.Module):
    """`body` gives the features of tokens, `lm_head` their logits. `config` holds the sizes, as GPTConfig names them,
    and the settings of graph layers; `description` all that `rebuild` wants.

    ValueError for a model that is not made like that: one with an encoder, or whose tokens see later ones.
    """

    def __init__(self, hf, dropout=0.0):
        super().__init__()
        text = hf.config.get_text_config()
        self.body, self.lm_head = hf.base_model, hf.get_output_embeddings()
        if self.body is hf or not isinstance(self.lm_head, nn.Linear) or hf.config.is_encoder_decoder:
            raise ValueError(f'{type(hf).__name__} is not a decoder with a linear head, as causal language models are')
        longest = (getattr(text, name, None) for name in ('max_position_embeddings', 'max_seq_len'))
        n_layer, block_size = text.num_hidden_layers, next((n for n in longest if n and n > 0), 2048)
        sizes = dict(n_layer=n_layer, n_head=1, n_embd=text.hidden_size, vocab_size=self.lm_head.out_features)
        self.config = GPTConfig(**sizes, block_size=block_size, dropout=dropout)
        self.description = {name: value for name, value in hf.config.to_diff_dict().items() if name != 'dtype'}
        with suppress(NotImplementedError):  # of one without token embeddings, which check tells
            tied = self.lm_head.weight is self.body.get_input_embeddings().weight
            if tied != getattr(hf.config, 'tie_word_embeddings', tied):  # as where an adapter was merged into the head
                self.description['tie_word_embeddings'] = tied
        lists = (
            path
            for path, module in self.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == n_layer
        )
        self.blocks_path = next(lists, None)
        if self.blocks_path is None:
            raise ValueError(f'{type(hf).__name__} holds no list of its {n_layer} blocks')
        self.check(hf)

    @property
    def blocks(self):
        return self.get_submodule(self.blocks_path)

    @torch.no_grad()
    def check(self, hf):
        """ValueError for a model whose logits this one does not give, cached or not, or whose tokens see later ones."""
        T = min(8, self.config.block_size, self.config.vocab_size)
        idx, training = torch.arange(T, device=self.lm_head.weight.device)[None], hf.training
        hf.eval()
        try:
            self.body.get_input_embeddings()
        except NotImplementedError:  # how transformers answers for a model that names none
            raise ValueError(f'{type(hf).__name__} does not say which its token embeddings are') from None
        try:
            ours, half = (self.lm_head(self.features(part)) for part in (idx, idx[:, : T // 2]))
            logits = hf(input_ids=idx, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:  # of whatever else is between them
            why = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise ValueError(
                f'{type(hf).__name__} does not give features of tokens that its head takes ({why})'
            ) from None
        tolerance = 1e-3 if logits.dtype == torch.float32 else 0.1
        close = dict(atol=tolerance * logits.float().std().item(), rtol=tolerance)
        if not torch.allclose(half, ours[:, : T // 2], **close):
            raise ValueError(f'the tokens of {type(hf).__name__} see those after them: it is no causal language model')
        is_capped = getattr(hf.config.get_text_config(), 'final_logit_softcapping', None)  # which small logits hide
        if is_capped or not torch.allclose(ours, logits, **close):
            raise ValueError(f'{type(hf).__name__} changes the logits of its head: this is not supported')
        try:
            caches = self.new_caches()
            last = [self.features(part, caches) for part in (idx[:, :-1], idx[:, -1:])][1]
            works = torch.allclose(self.lm_head(last), ours[:, -1:], **close)
        except (AttributeError, TypeError, ValueError, IndexError):  # models without attention have caches of their own
            works = False
        if not works:
            raise ValueError(f'{type(hf).__name__} has no cache of keys and values that goes on: this is not supported')
        hf.train(training)

    def features(self, idx, caches=None, lengths=None):
        """See GPT.features. Padding needs no mask: it stands at the end, where no token looks."""
        T, cache = idx.size(1), caches[0] if caches else None
        start = cache.length if cache else 0
        check_places(start, T, self.config.block_size)
        with self.graph_pass(idx, cache, lengths):
            if cache is None:
                return self.body(input_ids=idx, use_cache=False).last_hidden_state
            output = self.body(input_ids=idx, past_key_values=cache.kept, use_cache=True)
        cache.kept, cache.length = output.past_key_values, start + T
        return output.last_hidden_state

    @contextmanager
    def graph_pass(self, idx, cache, lengths):
        """Inside, graph layers find the edges of these tokens, and their caches."""
        if not self.config.use_graph:
            yield
            return
        caches = cache.graph if cache else [None] * self.config.n_layer
        before = PASS.set((Edges(self.config, idx, caches[0], lengths), caches))
        try:
            yield
        finally:
            PASS.reset(before)

    forward, generate = GPT.forward, GPT.generate  # of features and lm_head alone

    def new_caches(self):
        """One, of all blocks."""
        return [Cache(self.config)]

    def crop_block_size(self, block_size):
        """Take shorter texts at most."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'cannot crop to block_size={block_size}, the model has {self.config.block_size}')
        self.config.block_size = block_size

    def add_graph(self, last=0, **settings):
        """See layers.graph.add_graph."""
        blocks = last_of([*enumerate(self.blocks)], last)
        self.config = with_graph(self.config, settings)
        for i, block in blocks:
            block.ln_3, block.graph = nn.LayerNorm(self.config.n_embd), GraphAttention(self.config)
            for layer in block.ln_3, block.graph:  # in float32, whatever the block is in
                layer.to(next(block.parameters()).device).train(block.training)
            block.register_forward_hook(AddGraph(i))
        return self

    def parts(self, name):
        """The names of what is the 'attn' or 'mlp' of a block, in OPT fc1 and fc2. ValueError where there is none."""
        there = [path for path, _ in self.blocks[0].named_children()]
        attention = [('attn',), ('self_attn',), ('attention',), ('self_attention',)]
        known = {'attn': attention, 'mlp': [('mlp',), ('fc1', 'fc2')]}[name]
        found = next((names for names in known if {*names} <= {*there}), None)
        if found is None:
            raise ValueError(f'the blocks of this model have no {name}; there is {", ".join(there)}')
        return found


class Cache:
    """What all blocks have computed of the tokens so far; of graph layers by KVCache."""

    def __init__(self, config):
        self.kept, self.length = None, 0
        self.graph = [KVCache(config.block_size) for _ in range(config.n_layer)]

    def select(self, rows):
        """Go on with these rows of the batch (a list), in this order; a row may come several times."""
        self.kept.reorder_cache(torch.tensor(rows))
        for cache in self.graph:
            cache.select(rows)


class AddGraph:
    """What a block gives, and what its graph layers add to that: a hook, as its own code calls the block."""

    def __init__(self, i):
        self.i = i

    def __call__(self, block, inputs, output):
        edges, caches = PASS.get((None, None))
        if edges is None:
            advice = 'call the CausalLM, not a part of it, and put no checkpoint_wrapper around its blocks'
            raise ValueError(f'graph layers have no edges here: {advice}')
        x = output[0] if isinstance(output, tuple) else output
        y = block.graph(block.ln_3(x.float()), caches[self.i], edges)
        x = x + y.to(x.dtype)
        return (x, *output[1:]) if isinstance(output, tuple) else x


def load_causal_lm(source, dropout=0.0, dtype=torch.float32):
    """The CausalLM of a name of the Hugging Face hub, a folder, or a GGUF file; ValueError for what is none."""
    return CausalLM(load_hf(source, dropout, dtype), dropout).eval()


def load_hf(source, dropout=0.0, dtype=torch.float32):
    """The same as the model of transformers that it is."""
    config = set_dropout(load_config(source), dropout)
    with one_line(source):
        from transformers import AutoModelForCausalLM, GgufConfig

        settings = dict(config=config, dtype=dtype, output_loading_info=True)
        if source.endswith('.gguf'):
            settings.update(quantization_config=GgufConfig(dequantize=True))
        hf, found = AutoModelForCausalLM.from_pretrained(**place_of(source), **settings)
    refuse_adapters(source, hf)
    if source.endswith('.gguf'):
        forget_bits(hf)
    elif getattr(hf.config, 'quantization_config', None):
        raise ValueError(
            f'{source} has weights of a few bits each, which cannot be trained: expected one with whole ones'
        )
    refuse_missing(source, found)
    return hf


def forget_bits(hf):
    """Of a model whose weights are all unpacked, the mark that they were packed."""
    for owner, name in (hf.config, 'quantization_config'), (hf, 'hf_quantizer'):
        if hasattr(owner, name):
            delattr(owner, name)
    hf.is_quantized = False


def rebuild(causal_lm, block_size, dropout):
    """The CausalLM of such a `description`, with weights drawn at random."""
    model = CausalLM(build_hf(causal_lm, dropout), dropout)
    model.crop_block_size(block_size)
    return model


def build_hf(description, dropout=0.0):
    """The same as a model of transformers."""
    with one_line(f'a {description.get("model_type", "model")}'):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = set_dropout(AutoConfig.for_model(**description), dropout)
        return AutoModelForCausalLM.from_config(without_code(config), trust_remote_code=False)


def name_in_hf(path, hf):
    """What a module of a CausalLM is called in the model of transformers that it was made from."""
    (head,) = [name for name, module in hf.named_modules() if module is hf.get_output_embeddings()]
    first, _, rest = path.partition('.')
    return '.'.join(filter(None, [{'body': hf.base_model_prefix, 'lm_head': head}[first], rest]))


def load_config(source):
    place = place_of(source)
    with one_line(source):
        from transformers import AutoConfig

        return without_code(AutoConfig.from_pretrained(**place))


def load_hf_tokenizer(source):
    """The fast tokenizer of a model, one of transformers."""
    place = place_of(source)
    with one_line(source):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(**place)
    if not tokenizer.is_fast:
        raise ValueError(f'{source} has a {type(tokenizer).__name__}, expected a fast tokenizer (tokenizer.json)')
    return tokenizer


def place_of(source):
    """Arguments of transformers' from_pretrained. ValueError for a path where nothing is."""
    place = dict(pretrained_model_name_or_path=source, trust_remote_code=False)
    folder, name = os.path.split(source)
    is_gguf = source.endswith('.gguf')
    is_there = os.path.isfile(source) if is_gguf else os.path.exists(source)
    is_path = os.path.isabs(source) or source.startswith(('.', '~')) or (is_gguf and os.path.isdir(folder or '.'))
    if is_path and not is_there:  # what is no path may be on the hub
        raise ValueError(f'{source} is not there')
    if is_gguf:
        place.update(pretrained_model_name_or_path=folder or '.', gguf_file=name)
    return place


def set_dropout(config, dropout):
    """Every kind of it that a model has, in the parts of its config too; one that must be an integer stays."""
    from huggingface_hub.errors import StrictDataclassError

    for name, value in vars(config).items():
        if hasattr(value, 'to_dict'):
            set_dropout(value, dropout)
        elif type(value) in (int, float) and ('dropout' in name or name.endswith('_pdrop')):
            with suppress(StrictDataclassError):
                setattr(config, name, float(dropout))
    return config
