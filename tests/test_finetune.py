"""Fine-tuning from the command line: what a run leaves, resume, several processes, early stopping, bad input."""

import copy
import functools
import json
import math
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configurator import names_of_configs, settings_of
from data import course, loader
from data.tokenizer import GPT2Tokenizer
from helpers import (
    FAKE_WANDB,
    ROOT,
    Words,
    answer_pairs,
    complaint,
    flags,
    join_processes,
    load,
    make_checkpoint,
    read_log,
    read_points,
    run_forked,
    same_state,
    together,
)
from run.checkpoint import build_model
from surgery.lora import read_adapter
from tasks import model as task_model
from tasks import prompts

for package in 'sklearn', 'sacrebleu', 'torch_geometric', 'tensorboard':
    pytest.importorskip(package)
pytestmark = pytest.mark.usefixtures('one_thread')

TABLES = {'sst': ('sentence',), 'cfimdb': ('sentence',), 'quora': ('sentence1', 'sentence2')}
COUNTS, POEMS = {'train': 20, 'dev': 7, 'test': 3}, {'train': 20, 'dev': 2, 'test': 1}
WORDS = ['dull', 'bad', 'fair', 'good', 'fine']
FULL = dict(finetune_mode='full', use_lora=False)
TINY = dict(
    device='cpu',
    init_from='base',
    batch_size=4,
    epochs=2,
    patience=0,
    learning_rate=0.01,
    warmup_fraction=0.0,
    dropout=0.1,
    temperature=0.0,
)
BLOCK = 72
N_STEPS = 5  # of an epoch: 18 examples, the others are held out
ADAPTERS = dict(lora_rank=2, lora_alpha=4.0, graph_heads=2)
METHODS = dict.fromkeys(prompts.TASKS, ('full', 'lora', 'kan_lora', 'graph_lora'))
METHODS['sst'] += ('head', 'kan_base_lora', 'kan')
PAIRS = [(task, method) for task in METHODS for method in METHODS[task]]

# the data is where the tests have put it, words are the vocabulary, and a run gets a signal at one of its batches
PRELUDE = """
import os, signal
from pathlib import Path

from data import loader, tokenizer
from helpers import Words
from tasks import prompts

loader.DATA = str(Path(__file__).resolve().parent / 'data')
batches, collate = [], prompts.collate

def count(batch, device):
    batches.append(batch)
    if len(batches) == int(os.environ.get('STOP_AT', 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    return collate(batch, device)

prompts.collate = count
if 'VOCABULARY' not in os.environ:
    tokenizer.GPT2Tokenizer = loader.GPT2Tokenizer = Words
    tokenizer.KINDS['gpt2'] = (Words, [])
"""


def write_table(path, name, labels, text='{word} film {i}'):
    split, n_columns = path.stem, len(TABLES[name])
    header = ['', 'id', *TABLES[name], *[{'quora': 'is_duplicate'}.get(name, 'sentiment')] * (split != 'test')]
    rows = []
    for i, label in enumerate(labels):
        texts = [text.format(word=WORDS[label], i='very ' * (i * (1 + k) % 7)) for k in range(n_columns)]
        rows.append([str(i), f'{split}-{i}', *texts, *[str(label)] * (split != 'test')])
    path.write_text(''.join('\t'.join(row) + '\n' for row in [header, *rows]))


def sonnet(i, n_lines=14):
    return '\n'.join(f'{"abc"[(i + line) % 3]} {line}' for line in range(n_lines)) + 'd' * (
        i % 5 if n_lines == 14 else 0
    )


def write_data(folder):
    for name in TABLES:
        (folder / name).mkdir(parents=True)
        (folder / name / 'meta.json').write_text('{}')
        for split, n in COUNTS.items():
            if (name, split) != ('quora', 'test'):
                write_table(folder / name / f'{split}.csv', name, [i * 3 % course.COLUMNS[name][2] for i in range(n)])
    (folder / 'sonnets').mkdir()
    (folder / 'sonnets' / 'meta.json').write_text('{}')
    for split, n in POEMS.items():
        book = ''.join(f'{i + 1}\n\n{sonnet(i, 3 if split == "test" else 14)}\n\n' for i in range(n))
        (folder / 'sonnets' / f'{split}.txt').write_text('Sonnets\n\n' + book)


def make_base(folder, vocab_size=Words.vocab_size + 3, block_size=BLOCK):
    state = make_checkpoint(folder, n_layer=2, n_embd=8, block_size=block_size, vocab_size=vocab_size)
    torch.save({**state, 'tokenizer': {'kind': 'gpt2'}}, folder / 'ckpt.pt')


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
    """A folder with data, a GPT in base/, and the prelude of runs."""
    folder = tmp_path_factory.mktemp('workshop')
    write_data(folder / 'data')
    (folder / 'small.py').write_text(PRELUDE)
    make_base(folder / 'base')
    return folder


@pytest.fixture
def place(workshop, tmp_path):
    """The same in a folder of the test's own, where it can write."""
    for name in 'base', 'data':
        shutil.copytree(workshop / name, tmp_path / name)
    shutil.copy(workshop / 'small.py', tmp_path)
    return tmp_path


def configs(task, method):
    """The two config files of a run, as arguments of finetune.py."""
    return [str(ROOT / f'config/finetune/{name}.py') for name in (task, method)]


def enter(folder, script, *args, env=()):
    return run_forked(folder, script, *args, modules=str(folder), prelude='small', env=env)


def tune(folder, out_dir='out', *args, env=(), **settings):
    """A run of finetune.py that has to end well."""
    done = enter(folder, 'finetune.py', *args, *flags(**{**TINY, 'out_dir': out_dir, **settings}), env=env)
    assert done.returncode == 0, done.stderr
    return done


def evaluate(folder, *args):
    done = enter(folder, 'eval.py', '--device=cpu', *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def read_json(*parts):
    return json.loads(Path(*parts).read_text())


def same_run(a, b):
    """Weights, optimizer, evaluations, scores and predictions, bit for bit."""
    logs = [[{key: line[key] for key in line if key != 'seconds'} for line in read_log(folder)] for folder in (a, b)]
    files = [{path.name: path.read_bytes() for path in Path(folder, 'predictions').iterdir()} for folder in (a, b)]
    scores = [read_json(folder, 'metrics.json')['dev'] for folder in (a, b)]
    return same_state(load(a), load(b)) and logs[0] == logs[1] and files[0] == files[1] and scores[0] == scores[1]


def read_base(folder, task, n):
    """The GPT in base/, and the first examples of a task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, 'DATA', str(folder / 'data'))
        examples = prompts.read_examples(task, 'train', Words(), BLOCK)[:n]
    return build_model(load(folder / 'base')), examples


# what a run leaves behind


def read_predictions(path, column, n):
    header, *lines = path.read_text().splitlines()
    assert header == f'id \t {column} '
    rows = [re.fullmatch(r'(\S+), (\d+) ', line).groups() for line in lines]
    assert [id for id, _ in rows] == [f'{path.stem.split("-")[1]}-{i}' for i in range(n)]
    return [int(label) for _, label in rows]


def check_labels(out, name):
    """The files of predictions, and the scores of dev against a count by hand."""
    labels = [i * 3 % course.COLUMNS[name][2] for i in range(COUNTS['dev'])]
    column = 'Predicted_Is_Paraphrase' if name == 'quora' else 'Predicted_Sentiment'
    found = read_predictions(out / f'predictions/{name}-dev-out.csv', column, COUNTS['dev'])
    if name == 'quora':
        found = [[3919, 8505].index(token) for token in found]  # GPT-2's tokens of no and yes
        assert not (out / f'predictions/{name}-test-out.csv').exists()
    else:
        assert set(read_predictions(out / f'predictions/{name}-test-out.csv', column, COUNTS['test'])) <= set(range(5))
    right = sum(a == b for a, b in zip(found, labels))
    assert read_json(out, 'metrics.json')['dev']['accuracy'] == pytest.approx(right / len(labels))


def check_sonnets(out):
    from sacrebleu.metrics import CHRF

    true = [sonnet(i) for i in range(POEMS['dev'])]
    for split, n in ('dev', POEMS['dev']), ('test', POEMS['test']):
        text = (out / f'predictions/sonnets-{split}-out.txt').read_text()
        assert text.startswith('--Generated Sonnets-- \n\n\n1\n')
        written = [part.strip('\n') for part in re.split(r'\n\n\d+\n', text)[1:]]
        assert len(written) == n
        for i, poem in enumerate(written):
            assert poem.startswith(sonnet(i, 3) + '\n') and len(poem.split('\n')) <= 14
        if split == 'dev':
            found = read_json(out, 'metrics.json')['dev']
            assert found['chrf'] == pytest.approx(CHRF().corpus_score(written, [true]).score)


@pytest.mark.parametrize(
    'name, method, more',
    [
        ('sst', 'lora', {}),
        ('sst', 'head', dict(form='linear')),
        ('sst', 'kan_base_lora', {}),
        ('cfimdb', 'full', dict(gradient_accumulation_steps=1)),
        ('quora', 'graph_lora', {}),
        ('sonnets', 'kan_lora', dict(temperature=0.8)),
    ],
)
def test_what_a_run_leaves(workshop, name, method, more):
    """And eval.py finds the same scores in it."""
    out_dir = f'out-{name}-{method}'
    settings = dict(more) if method in ('full', 'head') else dict(more, **ADAPTERS)
    done = tune(workshop, out_dir, *configs(name, method), **settings)
    out = workshop / out_dir
    expected = [
        'best.pt',
        'ckpt.pt',
        'ckpt_prev.pt',
        'log.jsonl',
        'metrics.json',
        'predictions',
        'run.json',
        'run.lock',
    ]
    assert sorted(os.listdir(out)) == ['adapter'] * ('lora' in method) + expected
    record, metrics, log = read_json(out, 'run.json'), read_json(out, 'metrics.json'), read_log(out)
    assert list(record)[-1] == 'finished' and record['final'] == metrics
    assert record['config']['task'] == metrics['task'] == name and record['config']['lora_rank'] == settings.get(
        'lora_rank', 32
    )
    n_dev = (POEMS if name == 'sonnets' else COUNTS)['dev']
    assert record['dataset'] == {'name': name, 'train': 18, 'valid': 2, 'dev': n_dev}
    assert [(line['iter'], line['epoch']) for line in log] == [(N_STEPS, 1), (2 * N_STEPS, 2)] and metrics[
        'steps'
    ] == 2 * N_STEPS
    assert metrics['valid'] == min(log, key=lambda line: line['loss']) and log[-1]['train_loss'] > 0
    assert load(out)['iter_num'] == 2 * N_STEPS and load(out, 'best.pt')['iter_num'] == metrics['valid']['iter']
    assert load(out)['best_val_loss'] == metrics['valid']['loss']
    assert f'{metrics["trained"]:,} of {metrics["parameters"]:,} parameters train' in done.stdout
    if 'lora' in method:
        tensors = read_adapter(str(out / 'adapter' / 'adapter_model.safetensors'))[1]
        state = load(out, 'best.pt')['model']
        assert sum(tensor.numel() for tensor in tensors.values()) == metrics['trained'] + (
            'kan' in method and count_knots(tensors)
        )
        names = {key: next(n for n in state if n.replace('.adapters.default', '') == key) for key in tensors}
        assert all(torch.equal(tensors[key], state[name]) for key, name in names.items())
    check_sonnets(out) if name == 'sonnets' else check_labels(out, name)

    scores, baselines = metrics['dev'], metrics.get('baselines')
    found = evaluate(workshop, f'--out_dir={out_dir}')
    assert {key: found[key] for key in scores} == pytest.approx(scores, rel=1e-5)
    assert found.get('baselines') == (pytest.approx(baselines) if name == 'sonnets' else None)
    if (name, method) == ('quora', 'graph_lora'):  # its adapter on the model that it began with
        found_again = evaluate(workshop, '--init_from=base', f'--adapter={out_dir}')
        assert {key: found_again[key] for key in scores} == pytest.approx(scores, rel=1e-5)
        assert found_again['model'] == f'base with the adapter of {out_dir}' and found_again['iter_num'] is None
        wrong = ['--init_from=base', f'--adapter={out_dir}', '--task=sst', '--device=cpu']
        words = complaint(workshop, 'eval.py', *wrong, modules=str(workshop), prelude='small')
        assert words.endswith(f"error: task='sst', but {out_dir} holds a model for quora\n")
    assert (found['task'], found['split'], found['examples'], found['model']) == (name, 'dev', n_dev, out_dir)


def count_knots(tensors):
    """Grids are saved with an adapter, but do not train."""
    return sum(tensor.numel() for key, tensor in tensors.items() if key.endswith('grid'))


@pytest.fixture(scope='module')
def gpt2s(workshop):
    """Untrained models with GPT-2's tokens: a folder of transformers, and our checkpoint of a padded vocabulary."""
    transformers = pytest.importorskip('transformers')
    try:
        GPT2Tokenizer()  # and its files are in the cache for the runs
    except OSError as error:
        pytest.skip(f'no network and no package to read the vocabulary from: {error}')
    sizes = dict(vocab_size=50257, n_positions=64, n_embd=8, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(workshop / 'gpt2')
    make_base(workshop / 'padded', vocab_size=50304, block_size=64)
    return {'gpt2': 50257, 'padded': 50304}


@pytest.mark.parametrize(
    'task, method, init_from',
    [
        ('sst', 'full', 'gpt2'),
        ('cfimdb', 'lora', 'gpt2'),
        ('quora', 'graph_lora', 'gpt2'),
        ('sonnets', 'kan_lora', 'gpt2'),
        ('sonnets', 'lora', 'padded'),
    ],
)
def test_models_with_the_tokens_of_gpt2(workshop, gpt2s, task, method, init_from):
    settings = {} if method == 'full' else ADAPTERS
    out = workshop / f'out-{init_from}-{task}-{method}'
    tune(
        workshop,
        out.name,
        *configs(task, method),
        env={'VOCABULARY': 'gpt2'},
        init_from=init_from,
        epochs=1,
        **settings,
    )
    check_sonnets(out) if task == 'sonnets' else check_labels(out, task)
    shape = load(out)['model']['gpt.lm_head.weight'].shape
    assert shape == (gpt2s[init_from], 8)


@pytest.fixture(scope='module')
def llama(workshop):
    """A tiny Llama of transformers in llama/, with a tokenizer of its own."""
    transformers = pytest.importorskip('transformers')
    tokenizer = answer_pairs()
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    sizes.update(vocab_size=len(tokenizer), max_position_embeddings=96, bos_token_id=None, eos_token_id=0)
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    hf.save_pretrained(workshop / 'llama')
    tokenizer.save_pretrained(workshop / 'llama')
    return hf


@pytest.mark.parametrize(
    'task, method, more',
    [
        ('sst', 'full', dict(block_size=64)),
        ('sst', 'head', dict(form='linear')),
        ('cfimdb', 'kan_base_lora', {}),
        ('quora', 'graph_lora', dict(gradient_checkpointing=True)),
        ('sonnets', 'lora', dict(weights='bfloat16')),
    ],
)
def test_another_model_of_transformers(workshop, llama, task, method, more):
    """eval.py finds the same scores, in the run and with its adapter on the model that it began with."""
    out = workshop / f'out-llama-{task}-{method}'
    settings = dict(more, **({} if method in ('full', 'head') else ADAPTERS))
    tune(workshop, out.name, *configs(task, method), init_from='llama', epochs=1, **settings)
    check_sonnets(out) if task == 'sonnets' else check_labels(out, task)
    scores = read_json(out, 'metrics.json')['dev']
    found = evaluate(workshop, f'--out_dir={out.name}')
    assert {key: found[key] for key in scores} == pytest.approx(scores, rel=1e-5)
    if method in ('lora', 'graph_lora'):
        found = evaluate(workshop, '--init_from=llama', f'--adapter={out.name}')
        assert {key: found[key] for key in scores} == pytest.approx(scores, rel=1e-5)
    if task == 'sonnets':
        args = flags(out_dir=out.name, start='Line 1', num_samples=1, max_new_tokens=8, device='cpu')
        done = enter(workshop, 'sample.py', *args)
        assert done.returncode == 0 and done.stdout.startswith('Line 1'), done.stderr


def test_a_model_without_a_row_for_an_added_token_writes(place, workshop, llama):
    """As where a tokenizer got a [PAD] of its own."""
    tokenizer, hf = answer_pairs(), copy.deepcopy(llama)
    tokenizer.add_special_tokens({'pad_token': '[PAD]'})
    assert tokenizer.pad_token_id == hf.config.vocab_size
    hf.save_pretrained(place / 'padded')
    tokenizer.save_pretrained(place / 'padded')
    tune(place, 'out', *configs('sonnets', 'lora'), init_from='padded', epochs=1, **ADAPTERS)
    settings = dict(out_dir='out', num_samples=1, max_new_tokens=8, device='cpu')
    done = enter(place, 'sample.py', *flags(**settings, start='Line 1'))
    assert done.returncode == 0 and done.stdout.startswith('Line 1'), done.stderr
    done = enter(place, 'sample.py', *flags(**settings, start='Line [PAD]'))
    n = hf.config.vocab_size
    assert done.stderr == f'error: start holds token {n}, and the model has rows for {n} tokens\n'


@pytest.mark.parametrize('kind, targets', [('lora', 'attn,mlp'), ('kan', 'attn,mlp'), ('lora', 'lm_head')])
def test_its_adapter_goes_to_peft(workshop, llama, kind, targets):
    peft = pytest.importorskip('peft')
    import surgery.peft_kan  # noqa: F401  # PEFT learns of the kind

    out, folder = f'out-llama-to-peft-{kind}-{targets}', f'peft-llama-{kind}-{targets}'
    method = dict(ADAPTERS, lora_kind=kind, lora_targets=targets, learning_rate=0.1)
    tune(workshop, out, task='sst', init_from='llama', epochs=1, **method)
    done = enter(workshop, 'export.py', f'--out_dir={out}', '--to=peft', f'--folder={folder}')
    assert done.returncode == 0, done.stderr
    model, _ = task_model.load_task_model(load(workshop / out, 'best.pt'), dropout=0.0)
    idx = torch.arange(1, 10).view(1, 9)
    with torch.no_grad():
        plain = llama.eval()(idx).logits
        expected = model.eval().gpt(idx, idx)[0]
        again = peft.PeftModel.from_pretrained(copy.deepcopy(llama), workshop / folder).eval()
        torch.testing.assert_close(again(idx).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_a_llama_resumed_is_one_not_stopped(place, workshop, llama):
    shutil.copytree(workshop / 'llama', place / 'llama')
    settings = dict(init_from='llama', task='sst', weights='bfloat16', save_base=False, **ADAPTERS)
    tune(place, 'whole', **settings)
    tune(place, 'parts', env={'STOP_AT': '7'}, **settings)
    assert load(place / 'parts')['iter_num'] < load(place / 'whole')['iter_num']
    tune(place, 'parts', resume=True, **settings)
    assert same_run(place / 'whole', place / 'parts')
    assert all('.adapters.' in name for name in load(place / 'whole')['model'])
    scores = read_json(place / 'whole', 'metrics.json')['dev']
    found = evaluate(place, '--out_dir=whole')
    assert {key: found[key] for key in scores} == pytest.approx(scores, rel=1e-5)
    shutil.rmtree(place / 'llama')
    done = enter(place, 'eval.py', '--device=cpu', '--out_dir=whole', env={'HF_HUB_OFFLINE': '1'})
    gone = 'error: the checkpoint was saved without its base, init_from=llama: cannot load llama ('
    assert done.returncode == 1 and done.stderr.startswith(gone)


def test_sample_writes_on_from_a_fine_tuned_model(workshop):
    tune(workshop, 'out-sample', task='sonnets', epochs=1, **ADAPTERS)
    done = enter(
        workshop,
        'sample.py',
        *flags(out_dir='out-sample', start='a 1 b', num_samples=2, max_new_tokens=8, device='cpu'),
    )
    assert done.returncode == 0 and done.stderr == '', done.stderr
    samples = done.stdout.split('\n---------------\n')
    assert len(samples) == 3 and all(text.startswith('a 1 b') and len(text) > 5 for text in samples[:2])


def test_part_of_train_is_enough(workshop):
    tune(workshop, 'out-part', epochs=1, train_limit=10, valid_fraction=0.2, **ADAPTERS)
    record = read_json(workshop, 'out-part', 'run.json')
    tune(workshop, 'out-few', epochs=1, train_limit=10, valid_fraction=0.2, dev_limit=3, **ADAPTERS)
    of_part, of_few = (
        (workshop / f'out-{name}/predictions/sst-dev-out.csv').read_text().splitlines() for name in ('part', 'few')
    )
    assert len(of_few) == 1 + 3 and set(of_few) < set(of_part) and of_few[1:] != of_part[1:4]
    assert (
        record['dataset'] == {'name': 'sst', 'train': 10, 'valid': 2, 'dev': COUNTS['dev']}
        and record['final']['steps'] == 3
    )


def test_a_limit_beyond_train_cuts_nothing(workshop):
    tune(workshop, 'out-all', epochs=1, valid_fraction=0.4, **ADAPTERS)
    tune(workshop, 'out-beyond', epochs=1, valid_fraction=0.4, train_limit=12, **ADAPTERS)
    whole, beyond = (read_json(workshop, f'out-{name}', 'run.json')['dataset'] for name in ('all', 'beyond'))
    assert whole == beyond


def test_earlier_run_is_moved_with_all_that_it_left(place):
    tune(place, epochs=1, **ADAPTERS)
    out = place / 'out'
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob('*') if path.is_file()}
    del before[Path('run.lock')]
    done = tune(place, epochs=1, **FULL, env={'STOP_AT': '2'})
    assert f'moved to {os.path.join("out", "earlier-1")}' in done.stdout
    assert {
        path.relative_to(out / 'earlier-1'): path.read_bytes()
        for path in (out / 'earlier-1').rglob('*')
        if path.is_file()
    } == before
    assert sorted(os.listdir(out)) == ['ckpt.pt', 'earlier-1', 'log.jsonl', 'run.json', 'run.lock']


def test_a_run_that_is_not_saved_is_not_said_to_go_on(place):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))  # more than the records
    args = flags(**{**TINY, **FULL, 'out_dir': 'out'})
    how = dict(modules=str(place), prelude='small', env={'STOP_AT': '2'})
    done = run_forked(place, 'finetune.py', *args, before=limit, **how)
    assert done.returncode == 1 and 'warning: step 2 is not saved' in done.stdout
    assert 'to go on' not in done.stdout and not list((place / 'out').glob('*.pt'))


def test_nodes_with_other_settings_do_not_train_together(place):
    def run(env, rate):
        args = flags(**{**TINY, **ADAPTERS, 'out_dir': 'out', 'learning_rate': rate})
        args += flags(gradient_accumulation_steps=2)
        return run_forked(place, 'finetune.py', *args, modules=str(place), prelude='small', env=env)

    first, second = join_processes(per_node=1)
    for done in together(lambda: run(first, 0.1), lambda: run(second, 0.2)):
        assert done.returncode == 1
        assert done.stderr.endswith(
            'is not the same on process 1 as on process 0: type the same settings on each node\n'
        )
    assert not (place / 'out').exists()


# resume


@pytest.mark.parametrize(
    'settings', [ADAPTERS, dict(task='sonnets', use_kan=True, spline_order=1, **FULL)], ids=['lora', 'sonnets kan']
)
def test_a_run_in_three_parts_is_the_run_in_one(place, settings):
    """Stopped within an epoch, then at the evaluation after it. The control goes on without its random state."""
    together(
        lambda: tune(place, 'straight', **settings),
        lambda: tune(place, 'parts', env={'STOP_AT': '2'}, **settings),
    )
    parts = place / 'parts'
    assert load(parts)['iter_num'] == 2 and read_log(parts) == [] and 'finished' not in read_json(parts, 'run.json')
    shutil.copytree(parts, place / 'control')
    state = load(place / 'control')
    torch.save({**state, 'rng': []}, place / 'control' / 'ckpt.pt')
    done, _ = together(
        lambda: tune(place, 'parts', resume=True, env={'STOP_AT': str(N_STEPS - 2 + 1)}, **settings),
        lambda: tune(place, 'control', resume=True, **settings),
    )
    assert 'resuming at step 2\n' in done.stdout and f'stopped at step {N_STEPS}; to go on' in done.stdout
    assert load(parts)['iter_num'] == N_STEPS and read_log(parts) == []
    (place / 'wandb.py').write_text(FAKE_WANDB)
    shown = dict(resume=True, log_to='wandb,tensorboard', wandb_artifact=True)
    done = tune(place, 'parts', **shown, **settings)
    told = ['wandb run None None', f'logged {N_STEPS}', f'logged {2 * N_STEPS}', 'with parts/best.pt', 'uploaded']
    assert [text for text in done.stdout.splitlines() if text in told] == told
    for name, points in read_points(parts).items():
        assert points == [(line['iter'], pytest.approx(line[name])) for line in read_log(parts)]
    assert load(parts)['iter_num'] == 2 * N_STEPS and same_run(place / 'straight', parts)
    assert not same_state(load(place / 'straight'), load(place / 'control'))
    if settings is ADAPTERS:  # once more where all is done: stopped while dev is scored, then the same scores again
        done = tune(place, 'parts', env={'STOP_AT': '1'}, **shown, **settings)
        assert f'stopped at step {2 * N_STEPS}; to go on' in done.stdout and 'finished' not in read_json(
            parts, 'run.json'
        )
        assert 'uploaded' not in done.stdout
        done = tune(place, 'parts', **shown, **settings)
        assert 'wandb run abc allow\nartifact model-abc model\n' in done.stdout
        assert same_run(place / 'straight', parts)


def test_frozen_blocks_are_read_once(place):
    settings = dict(dropout=0.0, lora_dropout=0.0, lora_targets='transformer.h.1', **ADAPTERS)
    tune(place, 'plain', **settings)
    settings['frozen_cache'] = 'kept'
    done = tune(place, 'whole', **settings)
    (path,) = (place / 'kept').glob('*.safetensors')
    n, before = len(load_file(path)), path.stat().st_mtime_ns
    assert f'{path.name}: texts as the first 1 of 2 blocks give them, {n} of {n} are new' in done.stdout
    tune(place, 'stopped', env={'STOP_AT': '2'}, **{**settings, 'frozen_cache': 'begun'})  # while it reads
    assert load(place / 'stopped')['iter_num'] == 0
    (begun,) = (place / 'begun').glob('*.safetensors')
    assert 0 < len(load_file(begun)) < n
    n_batches = math.ceil(sum(COUNTS.values()) / TINY['batch_size'])
    tune(place, 'parts', env={'STOP_AT': str(n_batches + 7)}, **settings)
    assert 0 < load(place / 'parts')['iter_num'] < load(place / 'whole')['iter_num']
    done = tune(place, 'parts', resume=True, **settings)
    assert f'0 of {n} are new' in done.stdout and path.stat().st_mtime_ns == before
    assert same_run(place / 'whole', place / 'parts')
    losses = [[line['loss'] for line in read_log(place / name)] for name in ('plain', 'whole')]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_resume_wants_the_same_settings_and_data(place):
    tune(place, env={'STOP_AT': '2'}, **ADAPTERS)
    before = {path.name: path.read_bytes() for path in (place / 'out').iterdir()}
    common = {**TINY, **ADAPTERS, 'out_dir': 'out', 'resume': True}
    for changed, was in (
        (dict(learning_rate=0.1), 'learning_rate=0.01'),
        (dict(task='quora', lora_rank=3), 'task=sst, lora_rank=2'),
    ):
        words = complaint(place, 'finetune.py', *flags(**{**common, **changed}), modules=str(place), prelude='small')
        assert words == f'error: a run is resumed by the command it began with: there {was}\n'
    words = complaint(
        place, 'finetune.py', *flags(**{**common, 'out_dir': 'base'}), modules=str(place), prelude='small'
    )
    assert words == 'error: base/ckpt.pt is not one of finetune.py: train.py resumes it, by --init_from=resume\n'
    words = complaint(
        place, 'finetune.py', *flags(**{**common, 'out_dir': 'nowhere'}), modules=str(place), prelude='small'
    )
    assert "no checkpoint in 'nowhere'" in words and not (place / 'nowhere').exists()
    write_table(place / 'data' / 'sst' / 'train.csv', 'sst', [i % 5 for i in range(21)])
    words = complaint(place, 'finetune.py', *flags(**common), modules=str(place), prelude='small')
    assert words == 'error: train of data/sst is not what this run began with: to resume, put it back as it was\n'
    assert {path.name: path.read_bytes() for path in (place / 'out').iterdir()} == before


def test_a_run_from_before_some_settings_goes_on(place):
    tune(place, env={'STOP_AT': '7'}, **ADAPTERS)
    state = load(place / 'out')
    del state['data']
    for name in 'block_size', 'weights', 'gradient_checkpointing', 'dev_limit', 'log_to', 'wandb_artifact':
        del state['finetune'][name]
    torch.save(state, place / 'out' / 'ckpt.pt')
    other = flags(**TINY, **ADAPTERS, out_dir='out', resume=True, weights='bfloat16')
    words = complaint(place, 'finetune.py', *other, modules=str(place), prelude='small')
    assert words == 'error: a run is resumed by the command it began with: there weights=float32\n'
    tune(place, resume=True, **ADAPTERS)
    assert read_json(place, 'out', 'metrics.json')['steps'] == 2 * N_STEPS


# several processes


@pytest.mark.parametrize(
    'settings',
    [dict(form='linear', valid_fraction=0.05, **FULL), dict(task='sonnets', use_graph=True, **ADAPTERS)],
    ids=['full', 'graph-lora'],
)
def test_two_processes_give_the_weights_of_one(workshop, settings):
    """The last step of an epoch has a micro-batch for one of them alone; so has the held-out part in the first case."""
    settings = dict(settings, dropout=0.0, lora_dropout=0.0, gradient_accumulation_steps=2)
    names = [f'out-{n}-{settings.get("task", "sst")}' for n in (1, 2)]
    tune(workshop, names[0], **settings)
    ranks = join_processes()
    master, other = together(*(lambda env=env: tune(workshop, names[1], env=env, **settings) for env in ranks))
    assert '2 process(es)' in master.stdout and other.stdout == ''
    one, two = (load(workshop / name) for name in names)
    assert one['iter_num'] == two['iter_num'] == 6 and len(two['rng']) == 2
    start = load(workshop / 'base')['model']
    assert all(torch.allclose(two['model'][name], p, rtol=0, atol=1e-6) for name, p in one['model'].items())
    if settings.get('use_lora', True):
        moved = [p for name, p in two['model'].items() if 'lora_B' in name]
        assert moved and all(p.abs().max() > 1e-3 for p in moved)
    else:
        assert any(not torch.allclose(two['model'][f'gpt.{name}'], p, atol=1e-3) for name, p in start.items())
    logs = [
        [[line[key] for key in ('iter', 'train_loss', 'loss')] for line in read_log(workshop / name)] for name in names
    ]
    assert torch.allclose(*map(torch.tensor, logs), rtol=0, atol=1e-5)
    scores = [read_json(workshop, name, 'metrics.json')['dev'] for name in names]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.parametrize('task', ['sst', 'sonnets'])
def test_loss_of_a_step_is_the_mean_over_its_micro_batches(workshop, task):
    """By the model at its start, which a rate of zero keeps. Each epoch has other batches, its last step only one."""
    settings = dict(
        task=task, dropout=0.0, learning_rate=0.0, gradient_accumulation_steps=2, valid_fraction=0.1, **FULL
    )
    tune(workshop, f'out-mean-{task}', **settings)
    gpt, examples = read_base(workshop, task, 20)
    train, valid = prompts.hold_out(examples, 0.1)
    model = task_model.make_task_model(gpt, Words(), settings_of('finetune.py', flags(**settings))).eval()

    def mean_loss(examples):
        losses = []
        for example in examples:
            idx, lengths, targets = prompts.collate([example], 'cpu')
            logits = model(idx, lengths).flatten(0, -2).log_softmax(-1)
            losses += [-row[target].item() for row, target in zip(logits, targets.flatten())]
        return sum(losses) / len(losses)

    log = read_log(workshop / f'out-mean-{task}')
    for epoch, line in enumerate(log):
        batches = prompts.make_batches(train, 4, seed=f'1337 {epoch}')
        steps = [mean_loss(sum(batches[i : i + 2], [])) for i in (0, 2, 4)]
        assert line['train_loss'] == pytest.approx(sum(steps) / 3, rel=1e-5) and line['loss'] == pytest.approx(
            mean_loss(valid), rel=1e-5
        )
    assert log[0]['train_loss'] != pytest.approx(log[1]['train_loss'], rel=1e-4)


# when a run ends


def test_a_run_stops_when_it_gets_no_better(workshop):
    done = tune(workshop, 'out-early', epochs=30, learning_rate=0.3, patience=2, **FULL)
    out = workshop / 'out-early'
    losses = [line['loss'] for line in read_log(out)]
    best = losses.index(min(losses))
    assert len(losses) < 30 and best == len(losses) - 3 and read_json(out, 'run.json')['finished']
    assert load(out, 'best.pt')['iter_num'] == (best + 1) * N_STEPS and load(out)['iter_num'] == len(losses) * N_STEPS
    assert done.stdout.count('epoch ') == len(losses)
    base, found = evaluate(workshop, '--out_dir=base', '--task=sst'), evaluate(workshop, '--out_dir=out-early')
    shown = evaluate(workshop, '--out_dir=base', '--task=sst', '--shots=1')
    assert (base['shots'], shown['shots']) == (0, 1) and shown['loss'] != base['loss']
    assert evaluate(workshop, '--out_dir=base', '--task=sst', '--block_size=5')['loss'] != base['loss']
    for wrong, words in (
        (['--out_dir=out-early', '--shots=1'], 'shots and block_size are for a model that has not learned its task'),
        (['--out_dir=base', '--task=sst', '--shots=1', '--split=train'], 'shots=1 are drawn from train'),
        (['--out_dir=out-early', '--stride=3'], 'stride=3 is of texts'),
        (['--out_dir=base', '--shots=1'], 'shots=1, limit=0 and block_size=0 are of a task: name one'),
        (['--out_dir=base', '--limit=3'], 'shots=0, limit=3 and block_size=0 are of a task: name one'),
    ):
        done = enter(workshop, 'eval.py', '--device=cpu', *wrong)
        assert done.returncode == 1 and words in done.stderr
    dev = read_json(out, 'metrics.json')['dev']
    assert {key: found[key] for key in dev} == pytest.approx(dev, rel=1e-5) and base['loss'] != pytest.approx(
        dev['loss'], rel=0.01
    )


def test_a_rate_of_zero_stops_after_the_patience(workshop):
    tune(workshop, 'out-zero', epochs=30, learning_rate=0.0, patience=1, **ADAPTERS)
    out = workshop / 'out-zero'
    assert [line['epoch'] for line in read_log(out)] == [1, 2] and load(out, 'best.pt')['iter_num'] == N_STEPS


def test_loss_that_is_not_finite_ends_the_run(place):
    tune(place, env={'STOP_AT': '2'}, **FULL)
    state = load(place / 'out')
    state['model']['gpt.transformer.ln_f.weight'].fill_(math.nan)
    torch.save(state, place / 'out' / 'ckpt.pt')
    before = (place / 'out' / 'ckpt.pt').read_bytes()
    args = flags(**{**TINY, **FULL, 'out_dir': 'out', 'resume': True})
    words = complaint(place, 'finetune.py', *args, modules=str(place), prelude='small')
    assert words == 'error: the loss or its gradient is not finite at step 2; the checkpoints are untouched\n'
    assert (place / 'out' / 'ckpt.pt').read_bytes() == before
    record = read_json(place, 'out', 'run.json')
    assert 'not finite at step 2' in record['failed'] and 'finished' not in record


# bad input: one line that says what is wrong


@pytest.fixture
def complain(workshop):
    def complain(folder=workshop, **settings):
        args = flags(**{**TINY, 'out_dir': 'out-bad', **settings})
        words = complaint(folder, 'finetune.py', *args, modules=str(folder), prelude='small')
        assert not (folder / 'out-bad').exists()
        return words

    return complain


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(task='imdb'), "task='imdb': expected one of sst, cfimdb, quora, sonnets"),
        (dict(finetune_mode='full'), "use_lora=True with finetune_mode='full': adapters train alone"),
        (
            dict(init_from='data'),
            'data holds no model: expected best.pt or ckpt.pt of train.py, or a model of transformers',
        ),
        (dict(epochs=0), 'epochs must be at least 1, got 0'),
        (dict(log_to='wandbs'), "log_to='wandbs': expected any of wandb, tensorboard joined by commas"),
        (dict(lora_dropout=1.0), 'lora_dropout must be less than 1, got 1.0'),
        (dict(valid_fraction=0.99), 'valid_fraction=0.99 of 20 examples leaves none to learn from'),
        (
            dict(n_beams=2, best_of=3),
            'one of n_beams and best_of must be 1, got 2 and 3',
        ),
        (dict(top_p=2.0), 'top_p must be greater than 0 and at most 1, got 2.0'),
    ],
    ids=str,
)
def test_bad_setting(complain, settings, words):
    assert words in complain(**settings)


def test_bad_data_is_named(place, complain):
    path = place / 'data' / 'sst' / 'dev.csv'
    header = path.read_text().splitlines()[0]
    for content, words in [
        (header + '\n', 'dev.csv has no row that can be used\n'),
        (
            header + '\n0\ta\tGood\t5\n',
            'dev.csv has no row that can be used; 1 row(s) left out, with a label other than 0 to 4: line 2\n',
        ),
        ('id,sentence,sentiment\na,b,1\n', 'dev.csv has no column id or sentence or sentiment'),
    ]:
        path.write_text(content)
        assert words in complain(place)
    path.with_name('test.csv').write_text('id\n')  # before anything is learned
    write_table(path, 'sst', [1, 2])
    assert 'test.csv has no column sentence' in complain(place)
    path.unlink()
    assert 'data/sst/dev.csv is not there: python data/sst/prepare.py writes it\n' in complain(place)


def test_base_that_cannot_be_one(place, complain):
    tune(place, 'tuned', epochs=1, **ADAPTERS)
    assert 'tuned holds a fine-tuned model: init_from wants one of train.py or of transformers\n' in complain(
        place, init_from='tuned'
    )
    make_checkpoint(place / 'char')
    assert 'sst is English text: it wants the tokens of GPT-2 or of a model of transformers' in complain(
        place, init_from='char'
    )
    make_base(place / 'short', block_size=1)
    assert 'block_size=1 has no room for the prompt of quora' in complain(place, init_from='short', task='quora')
    assert 'block_size=1 has no room for a sonnet: its first 3 lines take 12 tokens' in complain(
        place, init_from='short', task='sonnets'
    )


def test_what_is_left_out_or_cut_is_said_in_a_line_and_the_run_goes_on(place):
    path = place / 'data' / 'sst' / 'train.csv'
    write_table(path, 'sst', [i % 5 for i in range(20)], '{word} ' * 100)
    path.write_text(path.read_text() + '20\ta\tGood\t5\n21\tb\tGood\n')
    done = tune(place, epochs=1, **ADAPTERS)
    assert done.stderr.splitlines() == [
        f'{path}: 1 row(s) left out, of another number of columns than the first line: line 23',
        f'{path}: 1 row(s) left out, with a label other than 0 to 4: line 22',
        f'train.csv of sst: 20 of 20 texts are cut to fit into block_size={BLOCK}',
    ]


# configs


@pytest.mark.parametrize('task, method', PAIRS)
def test_every_config_learns(workshop, task, method):
    """Two steps on one batch."""
    rates = flags(learning_rate=0.0003, dropout=0.0, lora_dropout=0.0)
    settings = settings_of('finetune.py', configs(task, method) + rates)
    assert settings['task'] == task
    base, examples = read_base(workshop, task, 4)
    torch.manual_seed(0)
    model = task_model.make_task_model(base, Words(), settings)
    task_model.trained_report(model, settings)
    optimizer, losses = torch.optim.AdamW(task_model.param_groups(model, settings), lr=0.0003), []
    for _ in range(3):
        idx, lengths, targets = prompts.collate(examples, 'cpu')
        losses.append(task_model.sum_losses(model(idx, lengths), targets))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]


def test_configs_cover_tasks_and_variants():
    files = {path for pair in PAIRS for path in configs(*pair)}
    assert files == {str(path) for path in ROOT.glob('config/finetune/*.py')}
    found = [settings_of('finetune.py', configs(*pair)) for pair in PAIRS]
    assert {settings['task'] for settings in found} == set(prompts.TASKS)
    assert {settings['finetune_mode'] for settings in found} == set(task_model.CHOICES['finetune_mode'])
    assert {settings['lora_kind'] for settings in found} == {'lora', 'kan', 'kan_base'}
    assert any(settings['use_graph'] for settings in found) and any(
        settings['use_kan'] and not settings['use_lora'] for settings in found
    )
    assert len({tuple(names_of_configs(configs(*pair))) for pair in PAIRS}) == len(found) == 19
    assert all(
        settings['out_dir'] == settings['wandb_run_name'] == '' for settings in found
    )  # it follows from the names


@pytest.mark.parametrize(
    'names, out_dir',
    [(['sst', 'kan_lora'], 'out-finetune-sst-kan-lora'), (['sst'], 'out-finetune-sst'), ([], 'out-finetune')],
)
def test_out_dir_follows_from_the_names_of_the_configs(place, names, out_dir):
    paths = [ROOT / f'config/finetune/{name}.py' for name in names]
    command = [*paths, *flags(**{**TINY, **ADAPTERS, 'epochs': 1, 'train_limit': 4})]
    done = enter(place, 'finetune.py', *command)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in place.glob('out*')] == [out_dir]
    config = read_json(place, out_dir, 'run.json')['config']
    assert config['out_dir'] == out_dir and config['wandb_run_name'] == ''  # by default the same in wandb
    assert config['lora_kind'] == ('kan' if 'kan_lora' in names else 'lora')
    assert load(place / out_dir)['finetune']['out_dir'] == out_dir
    again = enter(place, 'finetune.py', *command, '--resume=True')
    assert again.returncode == 0 and 'resuming at step 1\n' in again.stdout, again.stderr


def test_flags_win_over_the_names_of_the_configs(place):
    tune(place, 'mine', *configs('sst', 'lora'), epochs=1, train_limit=4, wandb_run_name='me', **ADAPTERS)
    config = read_json(place, 'mine', 'run.json')['config']
    assert (config['out_dir'], config['wandb_run_name']) == ('mine', 'me')


def test_rates_of_each_epoch_and_what_the_optimizer_has(workshop):
    """Warm-up over 6 of 15 steps, then down to zero."""
    settings = dict(epochs=3, warmup_fraction=0.4, beta1=0.8, beta2=0.9)
    tune(workshop, 'out-rates', **settings, **FULL)
    rates = [0.01 * share for share in (5 / 7, 6 / 9, 1 / 9)]
    assert [line['lr'] for line in read_log(workshop / 'out-rates')] == pytest.approx(rates)
    for group in load(workshop / 'out-rates')['optimizer']['param_groups']:
        assert group['betas'] == (0.8, 0.9) and group['lr'] == pytest.approx(rates[-1])


def test_gradients_are_clipped(workshop):
    start, moved = load(workshop / 'base')['model'], []
    for name, grad_clip in ('out-clipped', 1e-12), ('out-free', 0.0):
        tune(workshop, name, epochs=1, grad_clip=grad_clip, weight_decay=0.0, dropout=0.0, **FULL)
        state = load(workshop / name)['model']
        pairs = [(p, state[f'gpt.{key}']) for key, p in start.items() if 'lm_head' not in key]
        moved.append(max((p - q).abs().max() for p, q in pairs))
    assert moved[0] < 1e-4 < 1e-3 < moved[1]


def test_a_best_state_that_is_damaged_is_sought_anew(place):
    tune(place, env={'STOP_AT': '9'}, **FULL)
    best = place / 'out/best.pt'
    best.write_bytes(best.read_bytes()[:-9])
    assert N_STEPS < load(place / 'out')['iter_num'] < 2 * N_STEPS
    assert 'best.pt: moved to out/earlier-1, as later than ' in tune(place, resume=True, **FULL).stdout
    assert load(place / 'out', 'best.pt')['iter_num'] == 2 * N_STEPS
