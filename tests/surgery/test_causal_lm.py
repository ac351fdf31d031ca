"""Models of transformers behind the methods of the GPT: tiny ones of each family, with weights drawn at random."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import peft
import pytest
import tokenizers
import torch
from torch import nn

from data.tokenizer import PretrainedTokenizer, tokenizer_from_dict
from helpers import byte_fallback, byte_pairs
from kan import KANLinear
from surgery.causal_lm import CausalLM, build_hf, load_causal_lm, load_hf_tokenizer, rebuild, set_dropout
from surgery.kanify import kanify

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.usefixtures('one_thread', 'seed')
SIZES = dict(vocab_size=290, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
SIZES.update(max_position_embeddings=24, pad_token_id=None, bos_token_id=None, eos_token_id=0)
FAMILIES = {  # model_type: what its config wants beside SIZES
    'llama': dict(num_key_value_heads=1),
    'mistral': dict(num_key_value_heads=1, sliding_window=8),
    'qwen2': dict(num_key_value_heads=1),
    'qwen3': dict(num_key_value_heads=1, head_dim=8),
    'gpt_neox': dict(),
    'gpt2': dict(),
    'phi': dict(num_key_value_heads=2),
    'opt': dict(ffn_dim=24, word_embed_proj_dim=16),
    'bloom': dict(),
    'mixtral': dict(num_key_value_heads=1, num_local_experts=2),
}
every_family = pytest.mark.parametrize('family', FAMILIES)


def make(family, **more):
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **more})
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return hf


def tokens(B=2, T=9):
    return torch.randint(1, 290, (B, T))


@pytest.mark.parametrize('tied', [True, False])
def test_a_head_that_came_apart_from_the_embeddings_stays_apart(tied, tmp_path):
    """As one that an adapter was merged into, though the config still says that it is tied."""
    hf = make('llama', tie_word_embeddings=True)
    if not tied:
        hf.lm_head.weight = nn.Parameter(torch.randn_like(hf.lm_head.weight))
    model, idx = CausalLM(hf), tokens()
    again = rebuild(model.description, model.config.block_size, 0.0)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(idx, idx)[0], hf(idx).logits, atol=1e-5, rtol=1e-4)
    shared = again.lm_head.weight is again.body.get_input_embeddings().weight
    assert shared == tied and ('tie_word_embeddings' in model.description) >= (not tied)


@every_family
def test_logits_and_greedy_texts_are_those_of_transformers(family, tmp_path):
    hf = make(family)
    hf.save_pretrained(tmp_path)
    model, idx = load_causal_lm(str(tmp_path)), tokens()
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[0], hf(idx).logits, atol=1e-5, rtol=1e-4)
    n = model.config.block_size - idx.size(1)
    expected = hf.generate(idx, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    for use_cache in True, False:
        assert torch.equal(model.generate(idx, n, temperature=0, use_cache=use_cache), expected)


@every_family
def test_is_built_again_from_its_description_and_state(family):
    hf = make(family)
    model = CausalLM(hf)
    description = json.loads(json.dumps(model.description))
    again = rebuild(description, block_size=12, dropout=0.0)
    again.load_state_dict(model.state_dict())
    idx = tokens()
    with torch.no_grad():
        assert torch.equal(again(idx, idx)[0], model(idx, idx)[0])
    assert again.config.block_size == 12
    with pytest.raises(ValueError, match='cannot forward length 13, block_size is only 12'):
        again(tokens(T=13))


def test_padding_behind_a_text_changes_nothing():
    model, idx = CausalLM(make('llama')), tokens()
    with torch.no_grad():
        whole = model.features(idx, lengths=torch.tensor([9, 4]))
        torch.testing.assert_close(whole[1:, :4], model.features(idx[1:, :4]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'gpt_neox', 'gpt2', 'bloom'])
@pytest.mark.parametrize('edges', ['causal', 'window,topk,same'])
def test_graph_layers_are_silent_at_first_then_causal_and_cached(family, edges):
    pytest.importorskip('torch_geometric')
    model, idx = CausalLM(make(family)), tokens(T=12)
    with torch.no_grad():
        before = model.features(idx)
        model.add_graph(graph_heads=2, graph_edges=edges, graph_window=2, graph_topk=2)
        assert torch.equal(model.features(idx), before)
        for block in model.blocks:
            block.graph.gate.normal_()
        after = model.features(idx)
        assert not torch.allclose(after, before, atol=1e-2)
        torch.testing.assert_close(model.features(idx[:, :7]), after[:, :7], atol=1e-5, rtol=1e-4)
        padded = model.features(idx, lengths=torch.tensor([12, 5]))
        torch.testing.assert_close(padded[1:, :5], model.features(idx[1:, :5]), atol=1e-5, rtol=1e-4)
        greedy = [model.generate(idx[:, :5], 12, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*greedy)


def test_passes_in_two_threads_have_edges_of_their_own():
    pytest.importorskip('torch_geometric')
    model, both_begun = CausalLM(make('llama')).add_graph(graph_heads=2, graph_edges='same'), threading.Barrier(2)
    for block in model.blocks:
        block.graph.gate.data.normal_()
    texts = [torch.tensor([[1, 1, 2, 2, 1, 2]]), torch.tensor([[1, 2, 3, 1, 2, 3]])]

    def wait(*_):
        both_begun.wait(60)

    with torch.no_grad():
        alone = [model.features(idx) for idx in texts]
    model.blocks[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        together = [*pool.map(torch.no_grad()(model.features), texts)]
    assert not torch.allclose(*alone)
    for one, other in zip(together, alone):
        assert torch.equal(one, other)


def test_a_part_of_a_model_with_graph_layers_is_not_called_alone():
    pytest.importorskip('torch_geometric')
    model = CausalLM(make('llama')).add_graph(graph_heads=2)
    model(tokens())
    with pytest.raises(ValueError, match='call the CausalLM, not a part of it'):
        model.body(tokens())


def test_rows_of_a_cache_are_chosen():
    pytest.importorskip('torch_geometric')
    model, idx = CausalLM(make('llama')).add_graph(last=1, graph_heads=2), tokens(T=6)
    assert not hasattr(model.blocks[0], 'graph')
    with torch.no_grad():
        model.blocks[1].graph.gate.normal_()
        (cache,) = caches = model.new_caches()
        model.features(idx[:, :5], caches)
        cache.select([1, 1, 0])
        found = model.features(idx[[1, 1, 0], 5:], caches)
        torch.testing.assert_close(found, model.features(idx)[[1, 1, 0], 5:], atol=1e-5, rtol=1e-4)
    assert cache.length == 6
    with pytest.raises(ValueError, match='expected one more at a time, got 2'):
        model.features(idx[[1, 1, 0], :2], caches)


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'gpt_neox', 'gpt2', 'phi'])
def test_gated_mlps_become_kan_layers_that_compute_the_same(family, capsys):
    model, idx = CausalLM(make(family)), tokens()
    with torch.no_grad():
        before = model(idx, idx)[0]
        kanify(model, 'mlp', grid_size=3)
        torch.testing.assert_close(model(idx, idx)[0], before, atol=1e-4, rtol=1e-4)
    layers = [module for module in model.modules() if isinstance(module, KANLinear)]
    assert len(layers) == 2 * (3 if family in ('llama', 'qwen2') else 2)
    assert all(isinstance(layer.base_activation, nn.Identity) for layer in layers)


def test_graph_layers_are_added_once_and_by_their_settings():
    with pytest.raises(ValueError, match='no settings of graph layers: graph_head'):
        CausalLM(make('llama')).add_graph(graph_head=2)
    with pytest.raises(ValueError, match='expected a GPT without graph layers'):
        CausalLM(make('llama')).add_graph(graph_heads=2).add_graph(graph_heads=2)


def test_parts_of_blocks_have_other_names():
    assert CausalLM(make('llama')).parts('attn') == ('self_attn',)
    assert CausalLM(make('gpt_neox')).parts('attn') == ('attention',)
    assert CausalLM(make('opt')).parts('mlp') == ('fc1', 'fc2')
    model = CausalLM(make('opt'))
    for block in model.blocks:
        del block.fc1
    with pytest.raises(ValueError, match='the blocks of this model have no mlp; there is self_attn, activation_fn'):
        model.parts('mlp')


# what is refused


def test_models_that_are_not_causal_or_not_a_head_on_features_are_refused():
    with pytest.raises(ValueError, match='CohereForCausalLM changes the logits of its head'):
        CausalLM(make('cohere'))
    with torch.no_grad():  # logits so small that the cap does nothing yet
        gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8))
        gemma.get_output_embeddings().weight.mul_(1e-3)
    with pytest.raises(ValueError, match='Gemma2ForCausalLM changes the logits of its head'):
        CausalLM(gemma)
    with pytest.raises(ValueError, match='the tokens of BertLMHeadModel see those after them'):
        CausalLM(make('bert', hidden_act='gelu', tie_word_embeddings=False))
    with pytest.raises(ValueError, match='MambaForCausalLM has no cache of keys and values that goes on'):
        CausalLM(make('mamba'))
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    sizes.update(encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=64, max_position_embeddings=24)
    bart = transformers.BartForCausalLM(transformers.BartConfig(**sizes, is_encoder_decoder=True))
    bart.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match='BartForCausalLM is not a decoder with a linear head'):
        CausalLM(bart)
    bart.config.is_encoder_decoder = False
    with pytest.raises(ValueError, match='BartForCausalLM does not say which its token embeddings are'):
        CausalLM(bart)


def test_models_that_are_made_in_another_way_are_refused_in_a_line():
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    electra = transformers.ElectraForCausalLM(transformers.ElectraConfig(**sizes, embedding_size=8, is_decoder=True))
    rembert = transformers.RemBertConfig(**sizes, input_embedding_size=8, output_embedding_size=12, is_decoder=True)
    for hf in electra, transformers.RemBertForCausalLM(rembert):
        with pytest.raises(ValueError, match='does not give features of tokens that its head takes') as error:
            CausalLM(hf)
        assert one_line(error)
    xlnet = transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=24)
    with pytest.raises(ValueError, match='XLNetLMHeadModel') as error:  # max_position_embeddings is -1
        CausalLM(transformers.XLNetLMHeadModel(xlnet))
    assert one_line(error)


def test_an_error_without_words_is_named(monkeypatch):
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    for error, message in (NotImplementedError, 'head takes .NotImplementedError.'), (torch.OutOfMemoryError, None):
        monkeypatch.setattr(hf.model, 'forward', Mock(side_effect=error()))
        with pytest.raises(ValueError if message else error, match=message):
            CausalLM(hf)


def test_the_longest_text_goes_by_other_names():
    sizes = dict(d_model=16, n_heads=2, n_layers=2, expansion_ratio=2, vocab_size=64, max_seq_len=20)
    model = CausalLM(transformers.MptForCausalLM(transformers.MptConfig(**sizes)).eval())
    assert model.config.block_size == 20


def test_dropout_is_set_wherever_a_config_has_it():
    config = transformers.LlamaConfig()
    config.part = transformers.LlamaConfig(attention_dropout=0.1)
    assert set_dropout(config, 0.25).part.attention_dropout == config.attention_dropout == 0.25
    config = set_dropout(transformers.MptConfig(emb_pdrop=0), 0.25)
    assert (config.resid_pdrop, config.emb_pdrop) == (0.25, 0.25)
    assert config.attn_config.attn_pdrop == 0  # of type int: transformers takes no other
    assert set_dropout(transformers.LlamaConfig(attention_dropout=0), 0.25).attention_dropout == 0.25


def one_line(error):
    return '\n' not in str(error.value) and len(str(error.value)) < 300


def test_folders_that_hold_no_such_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)

    def refused(match):
        with pytest.raises(ValueError, match=match) as error:
            load_causal_lm(str(tmp_path))
        assert one_line(error)

    config = tmp_path / 'config.json'
    config.write_text('{"model_type": "llama"')
    refused('cannot load .*config.json')
    config.write_text('{"model_type": "unheard_of"}')
    refused('cannot load .*unheard_of')
    remote = dict(model_type='mine', auto_map={'AutoConfig': 'code.C', 'AutoModelForCausalLM': 'code.M'})
    config.write_text(json.dumps(remote))
    (tmp_path / 'code.py').write_text('raise SystemExit("run")')
    refused('brings code of its own, which is never run')
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=64)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path)
    refused('cannot load .*T5Config')
    hf = make('llama')
    hf.save_pretrained(tmp_path)
    adapted = peft.get_peft_model(make('llama'), peft.LoraConfig(target_modules=['q_proj']))
    adapted.save_pretrained(tmp_path)
    refused('holds an adapter of PEFT: merge it first')
    (tmp_path / 'adapter_config.json').unlink()
    hf.save_pretrained(tmp_path, state_dict={k: p for k, p in hf.state_dict().items() if 'layers.1.mlp.up' not in k})
    refused('has no weights that fit for model.layers.1.mlp.up_proj.weight')
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    refused('cannot load .*SafetensorError')
    for place in './nowhere', '/no/where', '~/nowhere', '/no/where.gguf':
        with pytest.raises(ValueError, match=f'^{re.escape(place)} is not there$'):
            load_causal_lm(place)
    with pytest.raises(ValueError, match='^nowhere.gguf is not there$'):
        load_causal_lm('nowhere.gguf')
    with pytest.raises(ValueError, match='cannot load nobody/nothing-of-this-name') as error:
        load_causal_lm('nobody/nothing-of-this-name')
    assert one_line(error)


def test_a_description_in_a_checkpoint_brings_no_code(tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'code.py').write_text('raise SystemExit("run")')
    monkeypatch.setattr('builtins.input', lambda *prompt: 'y')
    code = dict(auto_map={'AutoModelForCausalLM': f'{tmp_path}/mine--code.M'})
    build_hf(make('llama').config.to_dict() | code)
    for description in dict(model_type='clip_text_model', **code), dict(attn_implementation='some/kernel'):
        with pytest.raises(ValueError, match='cannot load'):
            build_hf(make('llama').config.to_dict() | description)


def write_gguf(path, hf, tokenizer):
    """A Llama in that format: rows of queries and keys are in another order there."""
    gguf = pytest.importorskip('gguf')
    writer, config, state = gguf.GGUFWriter(path, 'llama'), hf.config, hf.state_dict()
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    model = json.loads(tokenizer.to_str())['model']
    writer.add_tokenizer_model('gpt2')
    writer.add_token_list(sorted(model['vocab'], key=model['vocab'].get))
    writer.add_token_types([1] * len(model['vocab']))
    writer.add_token_merges([' '.join(pair) for pair in model['merges']])
    for name in 'bos', 'eos', 'unk':
        getattr(writer, f'add_{name}_token_id')(0)
    names = dict(q_proj='attn_q', k_proj='attn_k', v_proj='attn_v', o_proj='attn_output', gate_proj='ffn_gate')
    names.update(
        up_proj='ffn_up', down_proj='ffn_down', input_layernorm='attn_norm', post_attention_layernorm='ffn_norm'
    )
    whole = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output'}
    for name, p in state.items():
        name = name.removesuffix('.weight')
        if name not in whole:
            _, _, i, *_, last = name.split('.')
            whole[name] = f'blk.{i}.{names[last]}'
        if name.endswith(('q_proj', 'k_proj')):
            n = p.size(0) // config.head_dim
            p = p.view(n, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(p.shape)
        writer.add_tensor(f'{whole[name]}.weight', p.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    hf, path, idx = make('llama'), tmp_path / 'tiny.gguf', tokens()
    write_gguf(path, hf, byte_pairs())
    model = load_causal_lm(str(path))
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[0], hf(idx).logits, atol=1e-5, rtol=1e-4)
    json.dumps(model.description)  # of plain values alone, as a checkpoint wants them
    assert load_hf_tokenizer(str(path))('on and on').input_ids == byte_pairs().encode('on and on').ids
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match='cannot load .*tiny.gguf') as error:
        load_causal_lm(str(path))
    assert one_line(error)


# tokenizers


def test_a_tokenizer_as_that_of_gpt2():
    made = byte_pairs()
    made.add_special_tokens(['<|im_end|>'])
    tokenizer = PretrainedTokenizer(made.to_str(), 290)
    assert tokenizer.start == [] and tokenizer.encode('on<|im_end|>')[-1] == 290
    for encode in tokenizer.encode_ordinary, tokenizer.encode_next:
        assert 290 not in encode(' on<|im_end|>') and tokenizer.decode(encode(' on<|im_end|>')) == ' on<|im_end|>'
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.end_of_text == 290 and again.encode('so on') == tokenizer.encode('so on')


def llama():
    """A space before each text, and <s>."""
    made = byte_fallback()
    made.add_special_tokens(['<s>'])
    steps = tokenizers.normalizers.Prepend('\u2581'), made.normalizer
    made.normalizer = tokenizers.normalizers.Sequence(list(steps))
    strip = tokenizers.decoders.Strip(' ', 1, 0)
    made.decoder = tokenizers.decoders.Sequence([made.decoder, strip])
    id = made.token_to_id('<s>')
    made.post_processor = tokenizers.processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', id)])
    return made


def test_a_tokenizer_as_that_of_llama():
    made = llama()
    tokenizer = PretrainedTokenizer(made.to_str(), 2)
    whole = made.encode('ab ca\nb').ids
    assert tokenizer.start == [made.token_to_id('<s>')] == whole[:1]
    assert tokenizer.encode_ordinary('ab ca\nb') == tokenizer.encode('ab ca\nb') == whole
    parts = [tokenizer.encode_ordinary('ab'), tokenizer.encode_next(' ca'), tokenizer.encode_next('\nb')]
    assert sum(parts, []) == whole  # no second space, as encoding the parts alone would give


def test_a_tokenizer_that_is_slow_is_refused(tmp_path, monkeypatch):
    class Slow:
        is_fast = False

    monkeypatch.setattr(transformers.AutoTokenizer, 'from_pretrained', lambda **place: Slow())
    with pytest.raises(ValueError, match='has a Slow, expected a fast tokenizer'):
        load_hf_tokenizer(str(tmp_path))


def test_small_models_are_wrapped_too():
    model = CausalLM(make('llama', max_position_embeddings=4, vocab_size=5))
    assert model.new_caches() and model.config.block_size == 4


def test_weights_of_a_few_bits_are_refused(tmp_path, monkeypatch):
    make('llama').save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_packed(*place, **settings):
        hf, found = load(*place, **settings)
        hf.config.quantization_config = dict(quant_method='some')
        return hf, found

    monkeypatch.setattr(transformers.AutoModelForCausalLM, 'from_pretrained', load_packed)
    with pytest.raises(ValueError, match='has weights of a few bits each, which cannot be trained'):
        load_causal_lm(str(tmp_path))


def test_texts_become_shorter_at_most():
    model = CausalLM(make('llama'))
    for block_size in 0, 25:
        with pytest.raises(ValueError, match=f'cannot crop to block_size={block_size}, the model has 24'):
            model.crop_block_size(block_size)
