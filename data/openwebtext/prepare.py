"""OpenWebText in GPT-2's byte pairs, as train.bin and val.bin (uint16) and meta.json beside this file.
Started again after an interruption, it goes on from what the cache of `datasets` holds.

$ pip install datasets
$ python data/openwebtext/prepare.py --num_proc=8
$ python data/openwebtext/prepare.py --source=my_folder   # your own .parquet, .jsonl or .txt files
"""

import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data.loader import write_meta
from data.script import main
from data.tokenizer import GPT2Tokenizer
from layers.pretrained import one_line
from run.files import write_atomically

READERS = {'.parquet': ('parquet', {}), '.jsonl': ('json', {}), '.txt': ('text', {'sample_by': 'document'})}
get_tokenizer = cache(GPT2Tokenizer)  # one for each process

source = ''  # a file of documents or a folder of them, with the text in a column `text`; empty: OpenWebText
num_proc = 4  # processes; half the number of cores is a good choice


def prepare(folder, source, num_proc):
    """Write 0.05 % of the documents for validation and the others for training, <|endoftext|> after each."""
    if num_proc < 1:
        raise ValueError(f'num_proc must be 1 or more, got {num_proc}')
    documents, description = load_documents(folder, source, num_proc)
    from datasets import Features, List, Value  # whose absence load_documents explains

    features = Features({'ids': List(Value('uint16'))})  # 2 bytes per token in the cache; the default takes 8
    tokenizer = get_tokenizer()  # caches its files before the processes start
    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for split, part in ('train', splits['train']), ('val', splits['test']):
        options = dict(remove_columns=part.column_names, features=features, num_proc=min(num_proc, len(part)))
        write_tokens(folder / f'{split}.bin.part', part.map(tokenize, **options))
    write_meta(folder, tokenizer, f'{len(documents)} documents of {description}')


def load_documents(folder, source, num_proc):
    """A `datasets.Dataset` with a column `text`, and where it is from; ValueError for a `source` of another kind."""
    try:
        from datasets import config, load_dataset
    except ImportError:
        raise OSError('it needs the package datasets: pip install datasets') from None
    if not source:
        check_disk(folder, Path(config.HF_CACHE_HOME))
        documents = load_dataset('Skylion007/openwebtext', split='train', num_proc=num_proc)
        return documents, 'Skylion007/openwebtext, Hugging Face'
    path = Path(source)
    paths = sorted(p for p in path.rglob('*') if p.suffix in READERS) if path.is_dir() else [path]
    kinds = {p.suffix for p in paths}
    if len(kinds) != 1 or not kinds <= READERS.keys():
        raise ValueError(f'--source={source} must be of one kind out of {", ".join(READERS)}, got {sorted(kinds)}')
    reader, options = READERS[kinds.pop()]
    with one_line(source):
        documents = load_dataset(reader, data_files=[str(p) for p in paths], split='train', **options)
    kind = getattr(documents.features.get('text'), 'dtype', None)
    if kind not in ('string', 'large_string'):
        raise ValueError(f'--source={source} must hold texts in a column text, got {documents.features}')
    n_all, documents = len(documents), documents.filter(has_text, input_columns='text')
    if len(documents) < n_all:
        print(f'{n_all - len(documents)} of {n_all} documents have no text and are left out')
    if len(documents) < 2:
        raise ValueError(f'--source={source} must hold two documents or more, got {len(documents)}')
    return documents, source


def has_text(text):
    return text is not None


def check_disk(folder, cache_folder):
    """OSError where a disk lacks the room. The hub lists 80 parquet files of 0.31 GB and 39.8 GB of text that
    `datasets` unpacks; nanoGPT counted 9.04 billion tokens, of 2 bytes each in the cache, and again in the .bin
    files.
    """
    cached = [p for p in cache_folder.glob('*/*Skylion007*openwebtext/**/*') if p.is_file() and not p.is_symlink()]
    cache_gb, bin_gb = 24 + 40 + 18 - sum(p.stat().st_size for p in cached) / 1e9, 18
    cache_folder = next(p for p in [cache_folder, *cache_folder.parents] if p.exists())
    needs = {cache_folder: cache_gb, folder: bin_gb}
    if cache_folder.stat().st_dev == folder.stat().st_dev:
        needs = {folder: cache_gb + bin_gb}
    for place, need in needs.items():
        free = shutil.disk_usage(place).free / 1e9
        if free < need:
            free_here = f'free are {free:.0f} GB'
            raise OSError(f'OpenWebText needs {need:.0f} GB at {place}, {free_here}; HF_HOME moves its cache')


def tokenize(document):
    tokenizer = get_tokenizer()
    return {'ids': tokenizer.encode_ordinary(document['text'].removeprefix('\ufeff')) + [tokenizer.end_of_text]}


def write_tokens(path, documents):
    """Write the token ids of all documents to `path`, which appears when it is complete."""
    count = 0
    with write_atomically(path) as f:
        for batch in documents.with_format('numpy').iter(batch_size=1000):
            ids = np.concatenate(batch['ids']).astype(np.uint16)
            f.write(ids.tobytes())
            count += len(ids)
    print(f'{path.stem}: {count:,} tokens of {len(documents):,} documents')


if __name__ == '__main__':
    main(globals())
