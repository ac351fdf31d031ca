"""A GPT of model.py as a causal language model of transformers 5, for `generate`, pipelines and Trainer. Nothing of the
GPT changes: the wrapper holds it as it is.

    from surgery.transformers_gpt import wrap

    model = wrap(gpt)   # a PreTrainedModel
    model.generate(ids, max_new_tokens=20)

export.py writes this file, and those of the GPT, beside the weights.
"""

from dataclasses import asdict

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from layers.generation import packed_weights
from model import GPT, GPTConfig


class GPTSettings(PretrainedConfig):
    """`gpt` holds the arguments of GPTConfig; what other tools ask for stands beside it."""

    model_type = 'kan_gpt'
    gpt: dict | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **others):
        config = GPTConfig(**(self.gpt or {}))
        self.gpt = asdict(config)
        self.vocab_size, self.hidden_size = config.vocab_size, config.n_embd
        self.num_hidden_layers, self.num_attention_heads = config.n_layer, config.n_head
        self.max_position_embeddings = config.block_size
        others.setdefault('tie_word_embeddings', not (config.is_kan('head') and config.kan_kind == 'edge'))
        super().__post_init__(**others)


class GPTCache:
    """The caches of all blocks, as `generate` hands them on."""

    is_compileable = False

    def __init__(self, blocks):
        self.blocks = blocks

    def get_seq_length(self, layer_idx=0):
        return self.blocks[0].length

    def reorder_cache(self, rows):
        """Of beam search: go on with these rows of the batch."""
        for block in self.blocks:
            block.select(rows.tolist())


class GPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GPTSettings
    base_model_prefix = 'gpt'
    _supports_sdpa = True  # as the GPT does
    accepts_loss_kwargs = False  # the loss is the mean of a batch, which Trainer divides when it accumulates

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self._tied_weights_keys = {f'gpt.{name}': 'gpt.transformer.wte.weight' for name in self.gpt.tied_names()}
        self.post_init()

    def _init_weights(self, module):
        """The GPT has initialised itself."""

    def _initialize_missing_keys(self, is_quantized):
        """What from_pretrained calls in the end. ValueError for weights that the file lacks."""
        lacking = [name for name, p in self.named_parameters() if not getattr(p, '_is_hf_initialized', False)]
        if lacking:
            raise ValueError(f'the file of weights is not of this model: it lacks {lacking[0]}')
        super()._initialize_missing_keys(is_quantized)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # forward makes the GPT's own

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def resize_token_embeddings(self, new_num_tokens=None, **settings):
        if new_num_tokens in (None, self.config.vocab_size):
            return self.get_input_embeddings()
        raise ValueError('the vocabulary of this model is fixed: train one with more tokens')

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **others):
        """The tokens that the cache lacks. Beyond block_size every position moves: the whole window, and no cache."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                'prompts of different lengths are generated one by one: this model has no padding before them'
            )
        known = 'inputs_embeds', 'position_ids', 'output_hidden_states', 'output_attentions'  # there is more for itself
        refuse({name: others.get(name) for name in known})
        block_size = self.config.max_position_embeddings
        if input_ids.size(1) > block_size:
            return dict(input_ids=input_ids[:, -block_size:], use_cache=False, logits_to_keep=1)
        fresh = input_ids[:, past_key_values.get_seq_length() if past_key_values else 0 :]
        cache = dict(past_key_values=past_key_values, use_cache=others.get('use_cache', True))
        return dict(input_ids=fresh, logits_to_keep=1, **cache)

    def forward(
        self, input_ids, attention_mask=None, past_key_values=None, labels=None, use_cache=None, logits_to_keep=0,
        **others,
    ):  # fmt: skip
        """input_ids (B, T); attention_mask (B, T), zero on padding, which must stand at the end; labels as input_ids,
        -100 where there is none. The logits are those of the last logits_to_keep tokens, 0: of all, or of the tokens at
        the places in a tensor. With a cache attention_mask is of all tokens so far. ValueError for arguments that would
        do nothing.
        """
        refuse({name: value for name, value in others.items() if name != 'return_dict'})
        if past_key_values is not None and not isinstance(past_key_values, GPTCache):
            raise ValueError(
                f'leave past_key_values out: this model makes a cache of its own, no {type(past_key_values).__name__}'
            )
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError('labels want the logits of all tokens: leave logits_to_keep out')
        if use_cache and past_key_values is None and not self.training:
            past_key_values = GPTCache(self.gpt.new_caches())
        caches = past_key_values.blocks if past_key_values is not None else None
        shape = len(input_ids), (caches[0].length if caches else 0) + input_ids.size(1)
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(f'expected an attention_mask of shape {shape}, got {tuple(attention_mask.shape)}')
        lengths = lengths_of(attention_mask)
        if caches is not None and lengths is not None:
            raise ValueError('a cache has no place for padding: leave use_cache out')
        x = self.gpt.features(input_ids, caches, lengths)
        if isinstance(logits_to_keep, torch.Tensor):
            x = x[:, logits_to_keep]
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits, loss = self.gpt.lm_head(x), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if others.get('return_dict') is False else output

    @torch.no_grad()
    def generate(self, *inputs, **settings):
        with packed_weights(self):
            return super().generate(*inputs, **settings)


def refuse(others):
    """ValueError for arguments of other models that would do nothing in this one."""
    set_ones = [name for name, value in others.items() if value is not None and value is not False]
    if set_ones:
        raise ValueError(f'this model takes input_ids and gives logits, without {", ".join(set_ones)}')


def lengths_of(attention_mask):
    """(B,) the number of tokens before the padding, None without any."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    lengths = attention_mask.sum(1)
    places = torch.arange(attention_mask.size(1), device=attention_mask.device)
    if not torch.equal(attention_mask.bool(), places < lengths.unsqueeze(1)):
        raise ValueError("this model takes padding at the end alone, as padding_side='right' puts it")
    return lengths


def wrap(gpt):
    """The GPT as a model of transformers, with the same tensors."""
    with torch.device('meta'):
        model = GPTForCausalLM(GPTSettings(gpt=asdict(gpt.config)))
    model.gpt = gpt
    return model.train(gpt.training)
