"""export.py: what another process, which knows nothing of this repository, reads and computes."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from data.tokenizer import END, CharTokenizer, GPT2Tokenizer, JsonTokenizer, as_fast
from forked import ROOMS
from helpers import TOKENIZER, byte_pairs, complaint, make_checkpoint, run_forked
from run.checkpoint import build_model, load_checkpoint, save_checkpoint
from surgery.lora import LoRAConfig, add_lora, save_lora

pytest.importorskip('transformers')
MODELS = {
    'vanilla': dict(),
    'no-bias': dict(bias=False, gelu='tanh', mlp_hidden=2.0),
    'silu': dict(activation='silu'),
    'swiglu': dict(mlp='swiglu', bias=False),
    'rotary': dict(rotary=True),
    'kan': dict(use_kan=True, kan_targets='attn,mlp,head'),
    'kan-glu': dict(use_kan=True, kan_kind='channel', mlp='swiglu'),
    'kan-head': dict(use_kan=True, kan_kind='channel', kan_targets='head'),
    'graph': dict(use_graph=True),
}
LINES = [
    dict(start='ROME:\nwhat shall', ends=['we do', 'not the sea'], answer=0),
    dict(start='who', ends=['goes there!', 'sun'], answer=0),
    dict(start='O more', ends=['light', 'of it', 'a'], answer=2),
]
TASKS = {  # of lm-eval, on these lines
    'ends': dict(
        output_type='multiple_choice', doc_to_text='{{start}}', doc_to_choice='{{ends}}', doc_to_target='{{answer}}'
    ),
    'starts': dict(
        output_type='loglikelihood_rolling',
        doc_to_text='',
        doc_to_target='{{start}}',
        metric_list=[dict(metric='bits_per_byte')],
    ),
}
READ = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(f'hf-{name}', trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(f'hf-{name}', trust_remote_code=True)
    ids = torch.load('ids.pt')
    greedy = [model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cached) for cached in (True, False)]
    beams = [model.generate(ids, max_new_tokens=3, num_beams=3, use_cache=cached) for cached in (True, False)]
    text = tokenizer.decode(ids[0])
    with torch.no_grad():
        output = model(ids, labels=ids)
    found[name] = output.logits, output.loss, *greedy, *beams, tokenizer(text).input_ids, text
torch.save(found, 'found.pt')
print(sorted({'kan', 'layers', 'model', 'surgery', 'run'} & sys.modules.keys()))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Runs, and their exports to transformers."""
    folder = tmp_path_factory.mktemp('exports')
    for name, args in MODELS.items():
        make_checkpoint(folder / f'out-{name}', **args)
        done = run_forked(folder, 'export.py', f'--out_dir=out-{name}')
        assert done.returncode == 0, done.stderr
    return folder


def ours(folder, name):
    return build_model(load_checkpoint(str(folder / name))).eval()


def test_biases_that_were_trained_elsewhere_are_read(folder, tmp_path):
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(folder / 'hf-no-bias').eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
    shutil.copytree(folder / 'hf-no-bias', tmp_path / 'hf')
    theirs.save_pretrained(tmp_path / 'hf')
    ours, ids = build_model(load_checkpoint(str(tmp_path / 'hf'))).eval(), torch.arange(8).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_process_without_this_repository_gets_the_same_numbers_and_texts(folder):
    ids = torch.randint(TOKENIZER.vocab_size, (2, 5), generator=torch.Generator().manual_seed(1))
    torch.save(ids, folder / 'ids.pt')
    (folder / 'read.py').write_text(READ)
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'} | {'HF_HOME': str(folder / 'home')}
    command = [sys.executable, 'read.py', *MODELS]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == '[]', done.stderr
    for name, found in torch.load(folder / 'found.pt').items():
        gpt = ours(folder, f'out-{name}')
        logits, loss, cached, uncached, beams, slow_beams, again, text = found
        torch.testing.assert_close(logits, gpt.lm_head(gpt.features(ids)), atol=1e-5, rtol=1e-5)
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        greedy = gpt.generate(ids, 12, temperature=0)  # beyond block_size
        assert torch.equal(cached, greedy) and torch.equal(uncached, greedy), name
        assert torch.equal(beams, slow_beams)
        assert again == ids[0].tolist() and text == TOKENIZER.decode(ids[0].tolist())


@pytest.mark.parametrize('name', MODELS)
def test_what_comes_back_is_what_was_exported(folder, name):
    before, after = (load_checkpoint(str(folder / f'{kind}-{name}')) for kind in ('out', 'hf'))
    assert after['model_args'] == before['model_args'] and after['tokenizer'] == before['tokenizer']
    there, here = (build_model(checkpoint).state_dict() for checkpoint in (before, after))
    assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in there)


def test_sampling_from_an_export_gives_the_same_text(folder):
    flags = '--device=cpu', '--num_samples=1', '--max_new_tokens=20', f'--start={TOKENIZER.chars[0]}'
    texts = [run_forked(folder, 'sample.py', *flags, f'--out_dir={name}').stdout for name in ('out-kan', 'hf-kan')]
    texts.append(run_forked(folder, 'sample.py', *flags, '--init_from=hf-kan').stdout)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 20


def test_padding_stands_at_the_end_or_is_refused(folder):
    from surgery.transformers_gpt import wrap

    for name in 'kan-glu', 'graph':
        model = wrap(ours(folder, f'out-{name}'))
        ids = torch.arange(6).view(1, 6) % TOKENIZER.vocab_size
        mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
        with torch.no_grad():
            padded, short = model(ids, attention_mask=mask).logits[:, :4], model(ids[:, :4]).logits
        torch.testing.assert_close(padded, short, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match='takes padding at the end alone'):
            model(ids, attention_mask=mask.flip(1))
        with pytest.raises(ValueError, match='takes input_ids and gives logits, without position_ids'):
            model(ids, position_ids=ids)
        for padding in mask, mask.flip(1):
            with pytest.raises(ValueError, match='padding'):
                model.generate(ids, attention_mask=padding, max_new_tokens=2)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(folder, tmp_path):
    """By transformers' Trainer, which leaves the division to models that say they do it."""
    from transformers import Trainer, TrainingArguments

    from surgery.transformers_gpt import wrap

    ids, moved = torch.arange(40).view(4, 10) % TOKENIZER.vocab_size, []
    data = [dict(input_ids=row, labels=row) for row in ids]
    for parts in 1, 4:
        model = wrap(ours(folder, 'out-kan-glu'))
        before = model.gpt.transformer.wpe.weight.detach().clone()
        settings = dict(per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts, max_steps=1)
        settings.update(optim='sgd', learning_rate=1e-3, max_grad_norm=0.0, report_to=[], use_cpu=True)
        args = TrainingArguments(str(tmp_path / str(parts)), save_strategy='no', **settings)
        Trainer(model, args, train_dataset=data).train()
        moved.append(model.gpt.transformer.wpe.weight.detach() - before)
    torch.testing.assert_close(moved[0], moved[1], atol=1e-7, rtol=1e-3)


def test_logits_of_some_tokens(folder):
    from transformers import DynamicCache

    from surgery.transformers_gpt import wrap

    model, ids = wrap(ours(folder, 'out-swiglu')), torch.arange(6).view(1, 6) % TOKENIZER.vocab_size
    with torch.no_grad():
        every = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, every[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, every[:, [1, 4]])
        torch.testing.assert_close(model(ids, return_dict=False)[0], every)
    with pytest.raises(ValueError, match='labels want the logits of all tokens'):
        model(ids, labels=ids, logits_to_keep=2)
    for name in 'output_hidden_states', 'output_attentions':
        with pytest.raises(ValueError, match=f'takes input_ids and gives logits, without {name}'):
            model.generate(ids, max_new_tokens=2, **{name: True})
    with pytest.raises(ValueError, match='leave past_key_values out: .* no DynamicCache'):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match='the vocabulary of this model is fixed'):
        model.resize_token_embeddings(model.config.vocab_size + 1)
    assert model.resize_token_embeddings(model.config.vocab_size) is model.get_input_embeddings()
    with pytest.raises(ValueError, match='takes input_ids and gives logits, without token_type_ids'):
        model(ids, token_type_ids=ids)
    with pytest.raises(ValueError, match='a cache has no place for padding'):
        model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]), use_cache=True)


def test_a_mask_of_another_shape_is_refused(folder):
    from surgery.transformers_gpt import wrap

    model, ids = wrap(ours(folder, 'out-swiglu')), torch.arange(6).view(1, 6) % TOKENIZER.vocab_size
    packed = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).tril()[None, None]  # of two texts in a row
    for mask in packed, packed.bool(), torch.ones(1, 3), torch.ones(1, 9), torch.ones(2, 6):
        with pytest.raises(ValueError, match=r'expected an attention_mask of shape \(1, 6\), got'):
            model(ids, attention_mask=mask)
    with torch.no_grad():
        first = model.eval()(ids[:, :4], use_cache=True)
        following = dict(past_key_values=first.past_key_values, use_cache=True)
        y = model(ids[:, 4:5], attention_mask=torch.ones(1, 5), **following).logits
        torch.testing.assert_close(y, model(ids).logits[:, 4:5])
    with pytest.raises(ValueError, match=r'expected an attention_mask of shape \(1, 6\), got \(1, 1\)'):
        model(ids[:, 5:], attention_mask=torch.ones(1, 1), **following)


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_attention_may_be_named(folder, attention):
    from transformers import AutoModelForCausalLM

    where = dict(trust_remote_code=True, attn_implementation=attention)
    model = AutoModelForCausalLM.from_pretrained(folder / 'hf-kan-glu', **where)
    ids = torch.arange(6).view(1, 6) % TOKENIZER.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(folder, 'out-kan-glu')(ids, ids)[0])


def test_a_run_in_the_folder_of_an_export_is_the_newer(folder):
    """As train.py --init_from=hf-x --out_dir=hf-x leaves it."""
    from shutil import copytree

    copytree(folder / 'hf-swiglu', folder / 'hf-again')
    checkpoint = make_checkpoint(folder / 'hf-again', n_layer=1)
    assert load_checkpoint(str(folder / 'hf-again'))['model_args'] == checkpoint['model_args']


def test_the_card_says_what_it_is(folder):
    record = dict(config=dict(n_layer=2, learning_rate=1e-3), dataset=dict(name='plays', source='a file'))
    record.update(final=dict(iter=20, val_loss=1.25, best_val_loss=1.2), finished='now')
    make_checkpoint(folder / 'out-card')
    (folder / 'out-card' / 'run.json').write_text(json.dumps(record))
    log = [dict(iter=n, train_loss=2.0, val_loss=2.1) for n in (0, 10, 20)]
    (folder / 'out-card' / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in log))
    done = run_forked(folder, 'export.py', '--out_dir=out-card', '--folder=my-gpt', '--license=apache-2.0')
    assert done.returncode == 0, done.stderr
    card = (folder / 'my-gpt' / 'README.md').read_text()
    assert card.startswith('---\nlicense: apache-2.0\n') and '# my-gpt' in card and 'plays, from a file' in card
    assert 'after 3 iterations; the best validation loss was 1.5000 nats per token' in card  # the checkpoint's own
    assert (
        "`dataset = 'somewhere'`" in card
        and 'not trained to its end' not in card
        and (folder / 'my-gpt' / 'loss.png').stat().st_size > 5000
    )
    exec_lines = card.split('```python\n')[1].split('```')[0]
    compile(exec_lines, 'card', 'exec')


def test_the_card_of_a_smaller_model_says_so_and_names_no_folder(folder):
    checkpoint = make_checkpoint(folder / 'out-cut', mlp_hidden=2.0)
    config = dict(dataset='/somewhere/plays', init_from='/somewhere/out-x', mlp_hidden=4.0)
    torch.save({**checkpoint, 'config': config}, folder / 'out-cut' / 'ckpt.pt')
    done = run_forked(folder, 'export.py', '--out_dir=out-cut', '--folder=my-cut')
    assert done.returncode == 0, done.stderr
    card, saved = ((folder / 'my-cut' / name).read_text() for name in ('README.md', 'gpt.json'))
    assert 'Parts of it were cut: the recipe is that of its last training.' in card and "init_from = 'out-x'" in card
    assert 'somewhere' not in card + saved


@pytest.mark.parametrize('tokenizer', ['characters', 'byte pairs', 'gpt2'])
def test_tokenizers_agree(tokenizer, tmp_path):
    made = {'characters': CharTokenizer('abü \n'), 'byte pairs': JsonTokenizer(byte_pairs().to_str())}.get(
        tokenizer
    ) or GPT2Tokenizer()
    text = 'ab ü\n ba' if tokenizer == 'characters' else 'and so on, größer\n\n  and on'
    fast = as_fast(made, 64)
    assert fast(text).input_ids == made.encode(text) and fast.decode(made.encode(text)) == text
    if tokenizer == 'characters':
        with pytest.raises(Exception, match='UNK'):
            fast('x')


def test_a_tokenizer_adds_cuts_and_pads_nothing():
    from tokenizers import processors

    made = byte_pairs()
    made.add_special_tokens(['[CLS]', '[SEP]'])
    ends = [(name, made.token_to_id(name)) for name in ('[CLS]', '[SEP]')]
    made.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]', special_tokens=ends)
    made.enable_truncation(3)
    made.enable_padding(length=12)
    tokenizer = JsonTokenizer(made.to_str())
    text = 'and so on and on again'
    assert as_fast(tokenizer, 64)(text).input_ids == tokenizer.encode(text)


def test_the_end_of_text_is_told_where_it_is_a_token():
    made = byte_pairs()
    assert as_fast(JsonTokenizer(made.to_str()), 64).eos_token is None
    made.add_special_tokens([END])
    tokenizer = JsonTokenizer(made.to_str())
    fast, text = as_fast(tokenizer, 64), f'and so{END} on'
    assert fast.bos_token == fast.eos_token == END
    assert fast(text).input_ids == tokenizer.encode(text) and fast.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('name', ['rotary', 'kan', 'kan-glu'])
def test_onnx_for_any_number_and_length(folder, name):
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    done = run_forked(folder, 'export.py', f'--out_dir=out-{name}', '--to=onnx')
    assert done.returncode == 0, done.stderr
    assert (folder / f'onnx-{name}' / 'tokenizer.json').exists()
    session = runtime.InferenceSession(str(folder / f'onnx-{name}' / 'model.onnx'), providers=['CPUExecutionProvider'])
    gpt = ours(folder, f'out-{name}')
    for B, T in (1, 1), (2, gpt.config.block_size), (5, 3):
        ids = np.random.default_rng(0).integers(TOKENIZER.vocab_size, size=(B, T))
        (found,) = session.run(None, {'idx': ids})
        with torch.no_grad():
            expected = gpt.lm_head(gpt.features(torch.from_numpy(ids)))
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def write_tasks(folder):
    (folder / 'lines.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in LINES))
    data = dict(data_files=dict(test=str(folder / 'lines.jsonl')), cache_dir=str(folder / 'cache'))
    for name, task in TASKS.items():
        task = dict(task=name, dataset_path='json', dataset_kwargs=data, test_split='test', **task)
        (folder / f'{name}.yaml').write_text(json.dumps(task))  # which is YAML, too


@torch.no_grad()
def log_likelihood(gpt, before, text):
    """Of a text behind another one, in nats, with as much before a token as block_size allows."""
    ids = torch.tensor(TOKENIZER.encode(before + text))[-gpt.config.block_size - 1 :]
    log_p = gpt.lm_head(gpt.features(ids[None, :-1]))[0].log_softmax(-1)
    return log_p.gather(1, ids[1:, None])[-len(text) :].sum().item()


@pytest.mark.parametrize('name', ['vanilla', 'kan'])
def test_the_log_likelihoods_of_lm_eval_are_ours(folder, tmp_path, name):
    pytest.importorskip('lm_eval')
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    write_tasks(tmp_path)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False).load([*TASKS])
    newline = TOKENIZER.encode('\n')[0]  # before a text without a beginning
    settings = dict(device='cpu', batch_size=4, trust_remote_code=True, prefix_token_id=newline)
    found = evaluate(HFLM(str(folder / f'hf-{name}'), **settings), tasks, bootstrap_iters=0)
    gpt, n_right = ours(folder, f'out-{name}'), 0
    for line, sample in zip(LINES, found['samples']['ends'], strict=True):
        expected = [log_likelihood(gpt, line['start'], f' {end}') for end in line['ends']]
        assert sample['doc'] == line
        assert [float(value) for value, _ in sample['filtered_resps']] == pytest.approx(expected, abs=1e-4)
        n_right += expected.index(max(expected)) == line['answer']
    assert found['results']['ends']['acc,none'] == pytest.approx(n_right / len(LINES))
    nats = -sum(log_likelihood(gpt, '\n', line['start']) for line in LINES)
    n_bytes = sum(len(line['start']) for line in LINES)
    assert found['results']['starts']['bits_per_byte,none'] == pytest.approx(nats / n_bytes / np.log(2), abs=1e-4)


@pytest.mark.parametrize('name', ['kan', 'kan-glu'])
def test_code_of_an_export_wants_no_package_of_this_repository(folder, name):
    """As transformers asks before it runs code of the hub."""
    from transformers.dynamic_module_utils import get_imports

    wanted = {package for file in (folder / f'hf-{name}').glob('*.py') for package in get_imports(file)}
    assert 'torch' in wanted and not wanted & {*ROOMS, 'model', 'kan', 'configurator'}


def tuned(folder, name, run=(), **settings):
    """Leave a run of finetune.py (its settings in `run`) with an adapter that has learned; returns its GPT."""
    gpt = ours(folder, f'out-{name}')
    tuned = nn.ModuleDict(dict(gpt=gpt))
    add_lora(tuned, LoRAConfig(**{'rank': 3, 'dropout': 0.0, 'target_modules': ('attn', 'mlp'), **settings}))
    torch.manual_seed(3)
    for key, p in tuned.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, mean=1.0 if key.endswith('magnitude') else 0.0, std=0.3)
    out = folder / 'out-tuned-adapter'
    save_lora(tuned, str(out / 'adapter'))
    settings = dict(use_kan=False, use_graph=False, task='sst', init_from=str(folder / f'hf-{name}')) | dict(run)
    save_checkpoint(str(out), dict(model={}, model_args=vars(gpt.config), finetune=settings), is_best=False)
    return gpt


ADAPTERS = [dict(), dict(rs_lora=True), dict(use_dora=True), dict(kind='kan'), dict(kind='kan', use_dora=True)]


@pytest.mark.parametrize('base', ['vanilla', 'kan-glu'])
@pytest.mark.parametrize('settings', ADAPTERS, ids=str)
def test_adapters_are_those_of_peft(folder, tmp_path, base, settings):
    peft = pytest.importorskip('peft')
    from transformers import AutoModelForCausalLM

    import surgery.peft_kan  # noqa: F401  # PEFT learns of the kind

    ids = torch.arange(7).view(1, 7) % TOKENIZER.vocab_size
    gpt = tuned(folder, base, **settings).double()  # in float32 such adapters make much of a rounding
    done = run_forked(folder, 'export.py', '--out_dir=out-tuned-adapter', '--to=peft', f'--folder={tmp_path}/peft')
    assert done.returncode == 0, done.stderr
    about = peft.PeftConfig.from_pretrained(tmp_path / 'peft')
    assert about.base_model_name_or_path == f'hf-{base}'  # without the folder that it is in
    card = (tmp_path / 'peft' / 'README.md').read_text()
    assert card.startswith(f'---\nlicense: mit\nbase_model: hf-{base}\n') and f'{folder}' not in card
    source = f"'hf-{base}'" + (', trust_remote_code=True' if base == 'kan-glu' else '')
    assert f'from_pretrained({source})' in card and 'trained on sst' in card
    model = AutoModelForCausalLM.from_pretrained(folder / f'hf-{base}', trust_remote_code=True).eval()
    with torch.no_grad():
        plain = model.double()(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / 'peft').eval().double()(ids).logits
        expected = gpt.lm_head(gpt.features(ids))
    assert not torch.allclose(plain, expected, atol=0.1)
    torch.testing.assert_close(adapted, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kind', ['lora', 'kan'])
def test_an_adapter_for_peft_keeps_its_settings_and_the_name_of_its_base(folder, tmp_path, kind):
    peft = pytest.importorskip('peft')
    import surgery.peft_kan  # noqa: F401  # PEFT learns of the kind

    settings = dict(dropout=0.2, grid_range=(-2.0, 3.0), squash='clamp')
    tuned(folder, 'vanilla', run=dict(init_from='someone/gpt'), kind=kind, **settings)
    done = run_forked(folder, 'export.py', '--out_dir=out-tuned-adapter', '--to=peft', f'--folder={tmp_path}/peft')
    assert done.returncode == 0, done.stderr
    about = peft.PeftConfig.from_pretrained(tmp_path / 'peft')
    assert (about.base_model_name_or_path, about.lora_dropout) == ('someone/gpt', 0.2)
    assert kind == 'lora' or (about.squash, about.grid_range) == ('clamp', [-2.0, 3.0])


def test_a_card_names_the_export_of_a_base_that_is_a_run(folder, tmp_path):
    pytest.importorskip('peft')
    tuned(folder, 'vanilla', run=dict(init_from=str(folder / 'out-vanilla')))
    done = run_forked(folder, 'export.py', '--out_dir=out-tuned-adapter', '--to=peft', f'--folder={tmp_path}/peft')
    assert done.returncode == 0, done.stderr
    assert "AutoModelForCausalLM.from_pretrained('hf-vanilla')" in (tmp_path / 'peft' / 'README.md').read_text()


def test_a_gpt2_trains_on_with_the_dropout_of_the_gpt(folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder / 'hf-vanilla')
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0
    assert config.bos_token_id is None  # transformers has that of GPT-2, which is no token here


def test_what_peft_cannot_hold_is_refused(folder):
    command = 'export.py', '--out_dir=out-tuned-adapter', '--to=peft'
    tuned(folder, 'vanilla', run=dict(use_graph=True))
    assert 'on a base as it was, and no head' in complaint(folder, *command)
    tuned(folder, 'vanilla', run=dict(use_kan=True))
    assert 'out-tuned-adapter has use_kan=True' in complaint(folder, *command)
    tuned(folder, 'kan', kind='kan_base')
    assert 'adapters kan_base' in complaint(folder, *command)
    tuned(folder, 'vanilla', target_modules=('wte',))
    assert 'adapters of embeddings are not exported' in complaint(folder, *command)
    assert not (folder / 'peft-tuned-adapter').exists()


HUB = """
import json
import os
import huggingface_hub

class HfApi:
    def create_repo(self, *args, **settings):
        print('created', json.dumps([args, settings]))

    def upload_folder(self, repo_id, folder_path):
        return f'{repo_id} has {",".join(sorted(os.listdir(folder_path)))}'

huggingface_hub.HfApi = HfApi
"""


def test_push_uploads_the_folder(folder):
    """To a hub in the place of Hugging Face's."""
    (folder / 'hub.py').write_text(HUB)
    command = ['--out_dir=out-swiglu', '--folder=hf-pushed', '--push=me/plays']
    done = run_forked(folder, 'export.py', *command, modules=str(folder), prelude='hub')
    assert done.returncode == 0, done.stderr
    written, created, uploaded = done.stdout.splitlines()
    assert created == 'created [["me/plays"], {"exist_ok": true}]'
    assert uploaded == 'me/plays has ' + ','.join(sorted(path.name for path in (folder / 'hf-pushed').iterdir()))
    assert (
        "pipeline('text-generation', 'me/plays', trust_remote_code=True)"
        in (folder / 'hf-pushed/README.md').read_text()
    )


def test_an_upload_that_fails_can_be_tried_again(folder):
    (folder / 'broken_hub.py').write_text(HUB.replace('return f', 'raise OSError(28, "no space")  # '))
    command = ['--out_dir=out-swiglu', '--folder=hf-not-pushed', '--push=me/plays']
    done = run_forked(folder, 'export.py', *command, modules=str(folder), prelude='broken_hub')
    assert done.returncode == 1 and done.stderr.endswith('no space): hf upload me/plays hf-not-pushed\n')
    assert 'Traceback' not in done.stderr
    assert (folder / 'hf-not-pushed' / 'model.safetensors').exists()


@pytest.mark.parametrize('name', ['padded', 'padded-kan'])
def test_generation_ends_where_a_text_ends_and_writes_tokens_alone(folder, name):
    """The head has more rows than the tokenizer has tokens, as nanoGPT's 50304 of 50257."""
    from transformers import AutoModelForCausalLM

    made = byte_pairs()
    made.add_special_tokens([END])
    tokenizer = JsonTokenizer(made.to_str())
    more = dict(use_kan=True, kan_kind='channel') if name == 'padded-kan' else {}
    checkpoint = make_checkpoint(folder / f'out-{name}', vocab_size=tokenizer.vocab_size + 200, **more)
    save_checkpoint(str(folder / f'out-{name}'), {**checkpoint, 'tokenizer': tokenizer.to_dict()}, is_best=True)
    done = run_forked(folder, 'export.py', f'--out_dir=out-{name}')
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder / f'hf-{name}', trust_remote_code=True)
    ids = torch.arange(3).view(1, 3)
    written = [model.generate(ids, do_sample=True, max_new_tokens=8, eos_token_id=None) for _ in range(10)]
    assert all((ids < tokenizer.vocab_size).all() for ids in written)
    ends = as_fast(tokenizer, 16).eos_token_id
    assert model.config.eos_token_id == model.generation_config.eos_token_id == ends is not None
    assert model.config.pad_token_id is None
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # all logits alike, and this one is drawn by a bias
    drawn = model.generate(ids, max_new_tokens=5, sequence_bias={(ends,): 9.0}, do_sample=False)
    assert drawn.tolist()[0][3:] == [ends]


def test_a_file_that_lacks_weights_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from surgery.transformers_gpt import GPTForCausalLM

    shutil.copytree(folder / 'hf-swiglu', tmp_path / 'hf')
    weights = load_file(tmp_path / 'hf' / 'model.safetensors')
    lacking = next(name for name in weights if name.endswith('c_proj.weight'))
    save_file(
        {key: p for key, p in weights.items() if key != lacking},
        tmp_path / 'hf' / 'model.safetensors',
        {'format': 'pt'},
    )
    with pytest.raises(ValueError, match=f'it lacks {lacking}'):
        GPTForCausalLM.from_pretrained(tmp_path / 'hf')


def test_a_head_of_its_own_does_not_come_back_as_a_tied_one(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / 'hf-swiglu', tmp_path / 'hf')
    weights = load_file(tmp_path / 'hf' / 'model.safetensors')
    weights['gpt.lm_head.weight'] = weights['gpt.transformer.wte.weight'] + 1
    save_file(weights, tmp_path / 'hf' / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='lm_head.weight is no longer what transformer.wte.weight is'):
        load_checkpoint(str(tmp_path / 'hf'))


def test_a_checkpoint_of_nanogpt_keeps_its_loss_as_a_number(folder):
    checkpoint = make_checkpoint(folder / 'out-old', block_size=8)
    checkpoint = {**checkpoint, 'best_val_loss': torch.tensor(1.5), 'iter_num': 7}
    save_checkpoint(str(folder / 'out-old'), checkpoint, is_best=True)
    done = run_forked(folder, 'export.py', '--out_dir=out-old')
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / 'hf-old' / 'gpt.json').read_text())['best_val_loss'] == 1.5
    assert 'max_new_tokens=7)' in (folder / 'hf-old' / 'README.md').read_text()  # where transformers' GPT-2 ends


def test_onnx_of_a_length_that_cannot_vary_is_refused(folder):
    pytest.importorskip('onnxscript')
    assert 'ONNX has no graph layers here' in complaint(folder, 'export.py', '--out_dir=out-graph', '--to=onnx')
    assert not (folder / 'onnx-graph').exists()


def test_mistakes_are_named_and_leave_nothing(folder):
    checkpoint = make_checkpoint(folder / 'out-part')
    (folder / 'out-part' / 'run.json').write_text(json.dumps(dict(config={})))
    assert 'was not trained to its end: --unfinished=True' in complaint(folder, 'export.py', '--out_dir=out-part')
    assert not (folder / 'hf-part').exists()
    assert run_forked(folder, 'export.py', '--out_dir=out-part', '--unfinished=True').returncode == 0
    assert 'The run was not trained to its end.' in (folder / 'hf-part' / 'README.md').read_text()
    assert "folder='hf-part' is not empty" in complaint(folder, 'export.py', '--out_dir=out-part')
    assert "to='gguf': expected transformers, onnx, peft" in complaint(folder, 'export.py', '--to=gguf')
    assert 'push uploads a folder of transformers or of PEFT' in complaint(
        folder, 'export.py', '--to=onnx', '--push=a/b'
    )
    assert 'no checkpoint in' in complaint(folder, 'export.py', '--out_dir=nowhere')
    (folder / 'out-tuned').mkdir()
    save_checkpoint(str(folder / 'out-tuned'), checkpoint | {'finetune': {}}, is_best=False)
    assert '--to=peft takes its adapter' in complaint(folder, 'export.py', '--out_dir=out-tuned')
    assert 'holds no adapter' in complaint(folder, 'export.py', '--out_dir=out-kan', '--to=peft')
    (folder / 'hf-part' / 'model.safetensors').write_bytes(b'cut off')
    assert 'is a damaged folder of export.py' in complaint(folder, 'sample.py', '--out_dir=hf-part')
