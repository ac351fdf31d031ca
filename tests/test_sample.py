"""Sampling from the command line: seeds, prompts, where a sample ends, and checkpoints of other projects."""

import json
import math
import os
import re
import time
from pathlib import Path

import pytest
import torch

from data import tokenizer
from data.tokenizer import CharTokenizer, JsonTokenizer
from helpers import (
    ROOT,
    SHAPE,
    TINY,
    TOKENIZER,
    byte_pairs,
    complaint,
    flags,
    make_checkpoint,
    run,
    run_forked,
    start_forked,
    together,
    write_dataset,
)
from model import GPT, GPTConfig

ROMEO = dict(start='ROMEO:', device='cpu', num_samples=1, max_new_tokens=40, temperature=1.0)
END = '\n---------------\n'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder in which out/ckpt.pt is a checkpoint with random weights."""
    folder = tmp_path_factory.mktemp('trained')
    make_checkpoint(folder / 'out')
    return folder


def sample(folder, out_dir='out', **settings):
    """The samples that sample.py prints, each with its prompt."""
    done = run_forked(folder, 'sample.py', *flags(out_dir=out_dir, **{**ROMEO, **settings}))
    assert done.returncode == 0, done.stderr
    return done.stdout.split(END)[:-1]


def test_command_line(trained):
    done = run(
        trained, 'sample.py', '--out_dir=out', '--start=ROMEO:', '--num_samples=3', '--seed=1', '--max_new_tokens=20'
    )
    assert done.returncode == 0 and done.stderr == ''
    samples = done.stdout.split(END)
    assert len(samples) == 4 and samples[3] == ''
    assert all(text.startswith('ROMEO:') and len(text) == 26 for text in samples[:3])
    assert len(set(samples)) == 4


def test_a_prompt_of_windows(trained):
    plain, other = trained / 'plain.txt', trained / 'other.txt'
    plain.write_bytes(b'ROMEO:\nO')
    other.write_bytes(b'\xef\xbb\xbfROMEO:\r\nO')
    first, second = (sample(trained, start=f'FILE:{path}', seed=1) for path in (plain, other))
    assert first == second and first[0].startswith('ROMEO:\nO')


def test_seed_decides(trained):
    first, again, other = together(*(lambda seed=seed: sample(trained, seed=seed, num_samples=2) for seed in (1, 1, 2)))
    assert first == again and first != other and first[0] != first[1]


MORE_DRAWS = """
import sys

import torch

import model

init_weights = model.GPT.init_weights

def draw_once_more(self, *args, **kwargs):
    print(f'one draw before: {torch.rand(1).item()}', file=sys.stderr)
    return init_weights(self, *args, **kwargs)

model.GPT.init_weights = draw_once_more
"""


def test_seed_alone_decides(trained, tmp_path):
    """Whatever random numbers the building of the model draws."""
    (tmp_path / 'draw.py').write_text(MORE_DRAWS)
    args = flags(out_dir='out', seed=1, **{**ROMEO, 'num_samples': 2})
    plain, other = together(
        lambda: run_forked(trained, 'sample.py', *args),
        lambda: run_forked(trained, 'sample.py', *args, modules=str(tmp_path), prelude='draw'),
    )
    assert plain.returncode == other.returncode == 0, other.stderr
    assert 'one draw before' in other.stderr and plain.stderr == ''
    assert plain.stdout == other.stdout


def test_greedy_is_the_same_for_every_seed_and_sample(trained):
    first, other = together(
        *(lambda seed=seed: sample(trained, seed=seed, temperature=0, num_samples=2) for seed in (1, 2))
    )
    assert first == other and first[0] == first[1]
    assert sample(trained, top_k=1) == sample(trained, top_p=1e-6) == first[:1]
    idle = run_forked(trained, 'sample.py', *flags(out_dir='out', **{**ROMEO, 'temperature': 0, 'top_p': 0.5}))
    assert idle.stderr == 'warning: top_p does nothing with temperature=0, which takes the likeliest token\n'


def test_prompt_from_a_file(trained, tmp_path):
    path = tmp_path / 'prompt.txt'
    path.write_text('ROMEO:')
    assert sample(trained, start=f'FILE:{path}') == sample(trained)
    path.write_text('a prompt that is longer than the block of the model')
    assert sample(trained, start=f'FILE:{path}')[0].startswith('a prompt that is longer than the block of the model')


def test_stop_ends_a_sample_before_it(trained):
    (whole,) = sample(trained)
    generated = whole[6:]
    for stop in (
        generated[14],
        generated[14:17],
        whole[-2:] + 'z',
    ):  # the last one could only have begun, and is printed in the end
        assert sample(trained, stop=stop) == ['ROMEO:' + generated.partition(stop)[0]]


def test_stop_ends_each_of_several_samples(trained):
    whole = sample(trained, num_samples=3)
    stop = whole[1][20]
    assert sample(trained, num_samples=3, stop=stop) == ['ROMEO:' + text[6:].partition(stop)[0] for text in whole]


def test_stop_may_be_the_last_that_is_drawn(tmp_path):
    """The mark of a character that is cut waits for the next token, and there is none."""
    saved, short = make_checkpoint(tmp_path / 'out'), dict(start='!', max_new_tokens=1)
    (whole,) = sample(tmp_path, **short)
    chars = saved['tokenizer']['chars'].replace(whole[1], '\ufffd')
    torch.save({**saved, 'tokenizer': {'kind': 'char', 'chars': chars}}, tmp_path / 'out' / 'ckpt.pt')
    assert sample(tmp_path, **short) == ['!\ufffd']
    assert sample(tmp_path, **short, stop='\ufffd') == ['!']


def test_text_arrives_while_it_is_generated(trained):
    process = start_forked(trained, 'sample.py', *flags(out_dir='out', **{**ROMEO, 'max_new_tokens': 10**6}))
    try:
        assert process.stdout.read(50).startswith('ROMEO:')
        time.sleep(0.2)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


# bad input


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(start='what? 1'), "character '?' at position 4"),
        (dict(start=''), 'start has no token of this vocabulary'),
        (dict(start='FILE:nowhere.txt'), 'nowhere.txt'),
        (dict(out_dir='nowhere'), "no checkpoint in 'nowhere'"),
        (dict(temperature=-1), 'temperature'),
        (dict(top_p=2), 'top_p'),
        (dict(top_k=-1), 'top_k'),
        (dict(dtype='float8'), "dtype='float8'"),
        (dict(dataset='shakespear'), 'shakespear'),
        (dict(init_from='gtp2'), "got 'gtp2'"),
        (dict(num_sample=1), "did you mean 'num_samples'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_bad_setting(trained, settings, words):
    assert words in complaint(trained, 'sample.py', *flags(**{**ROMEO, 'out_dir': 'out', **settings}))


def test_prompt_file_that_is_not_text(trained, tmp_path):
    (tmp_path / 'prompt').write_bytes(b'\xff\xfe')
    assert 'utf-8' in complaint(trained, 'sample.py', '--out_dir=out', f'--start=FILE:{tmp_path / "prompt"}')


def test_damaged_checkpoint_is_named(tmp_path):
    for _ in range(2):
        make_checkpoint(tmp_path / 'out')
    os.truncate(tmp_path / 'out' / 'ckpt.pt', 5000)
    words = complaint(tmp_path, 'sample.py', '--out_dir=out')
    assert 'out/ckpt.pt' in words and 'ckpt_prev.pt' in words


# checkpoints of other projects


def save_foreign(folder, use_kan=False, **model_args):
    """What nanoGPT and nanoGPKANT save: torch.compile's prefix, the optimizer, no vocabulary, nothing about KANs."""
    sizes = dict(**SHAPE, bias=False, vocab_size=65, dropout=0.2)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**sizes, **model_args}, use_kan=use_kan, kan_targets='attn,mlp'))
    state = {'_orig_mod.' + name: p for name, p in model.state_dict().items()}
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu').state_dict()
    config = {'dataset': 'shakespeare_char', 'out_dir': 'out'}
    sizes.update(model_args)
    best = torch.tensor(1.5)
    checkpoint = dict(model=state, optimizer=optimizer, model_args=sizes, iter_num=2, best_val_loss=best, config=config)
    folder.mkdir(exist_ok=True)
    torch.save(checkpoint, folder / 'ckpt.pt')


@pytest.mark.parametrize('use_kan', [False, True], ids=['nanoGPT', 'nanoGPKANT'])
def test_checkpoint_of_another_project(tmp_path, use_kan):
    save_foreign(tmp_path / 'out', use_kan)
    done = run_forked(tmp_path, 'sample.py', *flags(out_dir='out', **ROMEO))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('ROMEO:') and len(done.stdout) == 46 + len(END)
    assert '65 characters of tinyshakespeare' in done.stderr


@pytest.mark.parametrize('name', ['text', 'numbers'])
def test_a_vocabulary_of_ones_own(tmp_path, monkeypatch, name):
    """The example of the page makes the data set; from there to a trained model, its samples and its exact loss."""
    monkeypatch.chdir(tmp_path)
    Path('mine').mkdir()
    text = 'and so on and on again, the longer the better ' * 40
    for split in 'train', 'val':
        Path(f'{split}.txt').write_text(text)
    byte_pairs().save('tokenizer.json')
    (example,) = re.findall(r'```python\n(import json.*?)```', (ROOT / 'docs/compare.md').read_text(), re.DOTALL)
    exec(example, {})
    if name == 'numbers':
        Path('mine/meta.json').write_text(json.dumps({'vocab_size': 300}))

    done = run_forked(tmp_path, 'train.py', *flags(dataset='./mine', out_dir='out', **TINY))
    assert done.returncode == 0, done.stderr
    prompt = dict(text='and so on', numbers='12 7')[name]
    (sampled,) = sample(tmp_path, start=prompt)
    assert sampled.startswith(prompt) and len(sampled) > len(prompt) + 20
    if name == 'numbers':
        assert len(sampled.split()) == 42 and all(int(word) < 300 for word in sampled.split())

    done = run_forked(tmp_path, 'eval.py', '--out_dir=out', '--device=cpu')
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ids = byte_pairs().encode(text).ids
    assert found['tokens'] == len(ids) - 1 and ('bits_per_char' in found) == (name == 'text')
    if name == 'text':
        n_chars = len(byte_pairs().decode(ids[1:]))
        assert found['chars'] == n_chars
        assert found['bits_per_char'] == pytest.approx(found['loss'] / math.log(2) * found['tokens'] / n_chars)


def test_vocabulary_that_nobody_knows_is_asked_for(tmp_path):
    save_foreign(tmp_path / 'out', vocab_size=TOKENIZER.vocab_size)
    args = flags(out_dir='out', **ROMEO)
    assert 'name a data set that has it by --dataset' in complaint(tmp_path, 'sample.py', *args)
    dataset = write_dataset(tmp_path / 'data')
    assert sample(tmp_path, dataset=dataset)[0].startswith('ROMEO:')
    other = write_dataset(tmp_path / 'few', tokenizer=CharTokenizer('abcdef'))
    assert 'name one with its vocabulary' in complaint(tmp_path, 'sample.py', *args, f'--dataset={other}')
    os.remove(Path(dataset, 'meta.json'))
    assert 'meta.json' in complaint(tmp_path, 'sample.py', *args, f'--dataset={dataset}')


def test_nothing_in_a_checkpoint_becomes_a_path(tmp_path):
    """An audit hook notes every file that sample.py opens: of the folder named in the checkpoint there is none."""
    trap = write_dataset(tmp_path / 'trap')
    saved = make_checkpoint(tmp_path / 'out')
    saved['config'] = {'dataset': trap, 'out_dir': trap, 'init_from': trap}
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    (tmp_path / 'watch.py').write_text(
        'import os, sys\n'
        f'log = os.open({str(tmp_path / "opened")!r}, os.O_CREAT | os.O_WRONLY)\n'
        'def note(event, args):\n'
        '    event in ("open", "os.listdir") and os.write(log, f"{args[0]}\\n".encode())\n'
        'sys.addaudithook(note)\n'
    )
    args = flags(out_dir='out', **ROMEO)
    done = run_forked(tmp_path, 'sample.py', *args, modules=str(tmp_path), prelude='watch')
    assert done.returncode == 0, done.stderr
    opened = (tmp_path / 'opened').read_text()
    assert 'out/ckpt.pt' in opened and trap not in opened


@pytest.mark.parametrize(
    'tokenizer', [{'kind': 'gpt5'}, {'kind': 'char', 'chars': 7}, {'kind': 'char', 'chars': 'abc', 'path': '/x'}, 'x']
)
def test_vocabulary_that_is_none_is_refused(tmp_path, tokenizer):
    saved = make_checkpoint(tmp_path / 'out')
    torch.save({**saved, 'tokenizer': tokenizer}, tmp_path / 'out' / 'ckpt.pt')
    complaint(tmp_path, 'sample.py', *flags(out_dir='out', **ROMEO))


def test_sample_from_a_folder_of_gpt2(tmp_path):
    """Its vocabulary is not that of GPT-2, so --dataset says which."""
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=TOKENIZER.vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / 'gpt2')
    dataset = write_dataset(tmp_path / 'data')

    assert sample(tmp_path, init_from=tmp_path / 'gpt2', dataset=dataset)[0].startswith('ROMEO:')


def test_added_tokens_make_no_other_vocabulary(tmp_path, monkeypatch):
    class Known(JsonTokenizer):  # in the place of GPT-2's
        vocab_size = byte_pairs().get_vocab_size()

        def __init__(self):
            super().__init__(byte_pairs().to_str())

    monkeypatch.setattr(tokenizer, 'GPT2Tokenizer', Known)
    known = {'tokenizer': {'kind': 'gpt2'}}
    monkeypatch.setattr(Known, 'to_dict', lambda self: known['tokenizer'])
    assert tokenizer.beside_model(str(tmp_path)) == {} and tokenizer.beside_model('gpt2-medium') == known
    byte_pairs().model.save(str(tmp_path))
    assert tokenizer.beside_model(str(tmp_path)) == known
    for names in [], ['[PAD]', '[UNK]']:
        own = byte_pairs()
        own.add_special_tokens(names)
        own.save(str(tmp_path / 'tokenizer.json'))
        assert tokenizer.beside_model(str(tmp_path)) == known
    other = json.loads(byte_pairs().to_str())
    a, b = (next(text for text, i in other['model']['vocab'].items() if i == place) for place in (50, 51))
    other['model']['vocab'].update({a: 51, b: 50})
    (tmp_path / 'tokenizer.json').write_text(json.dumps(other))
    assert tokenizer.beside_model(str(tmp_path))['tokenizer']['kind'] == 'tokenizers'
    for name in 'tokenizer.json', 'vocab.json':
        (tmp_path / name).write_text('{"a": "b"}')
        with pytest.raises(ValueError, match='of a GPT-2|of a tokenizer'):
            tokenizer.beside_model(str(tmp_path))
        (tmp_path / name).unlink()


@pytest.mark.parametrize('files', ['tokenizer.json', 'vocab.json and merges.txt'])
def test_a_gpt2_with_a_tokenizer_of_its_own_writes_with_that(tmp_path, files):
    """As GPT-2s in other languages have one; to data of another vocabulary the other commands say no. What is trained
    on files without a vocabulary keeps the model's.
    """
    transformers = pytest.importorskip('transformers')
    tokenizer = byte_pairs()
    sizes = dict(vocab_size=tokenizer.get_vocab_size(), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / 'gpt2')
    if files == 'tokenizer.json':
        tokenizer.save(str(tmp_path / 'gpt2' / 'tokenizer.json'))
    else:
        tokenizer.model.save(str(tmp_path / 'gpt2'))
    (text,) = sample(tmp_path, init_from=tmp_path / 'gpt2', start='and so on')
    assert text.startswith('and so on') and len(text) > 20
    write_dataset(tmp_path / 'data', tokenizer=CharTokenizer(''.join(map(chr, range(33, 33 + sizes['vocab_size'])))))
    for script, settings in ('eval.py', {}), ('train.py', dict(TINY, out_dir='out')):
        done = run_forked(tmp_path, script, *flags(**settings, init_from='gpt2', dataset='./data'))
        assert done.returncode == 1 and 'has another vocabulary than' in done.stderr.splitlines()[-1]
    os.remove(tmp_path / 'data' / 'meta.json')
    settings = {name: value for name, value in TINY.items() if not name.startswith('n_')}
    done = run_forked(tmp_path, 'train.py', *flags(**settings, out_dir='out', init_from='gpt2', dataset='./data'))
    assert done.returncode == 0, done.stderr
    assert sample(tmp_path, start='and so on')[0].startswith('and so on')


@pytest.mark.parametrize(
    'setting, words',
    [
        (dict(temperature=-1), 'temperature must not be negative, got -1.0'),
        (dict(top_p=2), 'top_p must be greater than 0 and at most 1, got 2.0'),
        (dict(top_k=-3), 'top_k must not be negative, got -3'),
        (dict(num_samples=0), 'num_samples must be at least 1, got 0'),
        (dict(seed=-1), 'seed must not be negative, got -1'),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_before_the_prompt(tmp_path, setting, words):
    make_checkpoint(tmp_path / 'out')
    done = run_forked(tmp_path, 'sample.py', *flags(out_dir='out', device='cpu', **setting))
    assert done.returncode == 1 and done.stdout == '' and done.stderr == f'error: {words}\n'


def test_very_small_temperature_is_greedy(tmp_path):
    make_checkpoint(tmp_path / 'out')
    cold, greedy = (
        run_forked(
            tmp_path,
            'sample.py',
            *flags(out_dir='out', device='cpu', start='ROMEO', num_samples=1, max_new_tokens=20, temperature=t),
        )
        for t in (1e-30, 0)
    )
    assert cold.stdout == greedy.stdout and cold.returncode == 0


def test_rows_of_the_head_that_are_no_tokens_are_never_drawn(tmp_path):
    make_checkpoint(tmp_path / 'out', vocab_size=TOKENIZER.vocab_size + 200)
    texts = sample(tmp_path, start='ROMEO', num_samples=3, max_new_tokens=10, temperature=99)
    assert [len(text) for text in texts] == [15] * 3 and set(''.join(texts)) <= set(TOKENIZER.chars)
