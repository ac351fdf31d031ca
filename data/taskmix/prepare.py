"""The text of the fine-tuning tasks in GPT-2's byte pairs, to pre-train a small GPT on where GPT-2's weights cannot be
had: the sentences of train of SST, CFIMDB and Quora without their labels, the sonnets of train, and tinyshakespeare;
as train.bin, val.bin and meta.json beside this file. Dev and test stay unseen.

$ python data/taskmix/prepare.py
$ python data/taskmix/prepare.py --source=my.txt   # another text in place of tinyshakespeare; plays: the nine plays
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data.loader import write_meta, write_split
from data.script import main
from data.tinyshakespeare import read_text
from data.tokenizer import GPT2Tokenizer
from tasks.prompts import find_task, prepare_task

TASKS = 'sst', 'cfimdb', 'quora', 'sonnets'  # whatever other tasks there are, the text stays the same
source = ''  # a text file, or 'plays' for the nine plays; empty: tinyshakespeare


def read_documents(source):
    """The texts, one after another, and a line that says where they are from."""
    text, description = read_text(source)
    for task in TASKS:
        prepare_task(task)
    rows = [row for task in TASKS for row in find_task(task).read('train')]
    documents = [sentence for _, *sentences, _ in rows for sentence in sentences]
    scenes = text.split('\n\n')  # what one speaker says
    documents += ['\n\n'.join(scenes[i : i + 20]) for i in range(0, len(scenes), 20)]
    return documents, f'train of {", ".join(TASKS)}; {description}'


def prepare(folder, source):
    """Write every twentieth document for validation and the others for training, <|endoftext|> after each."""
    documents, description = read_documents(source)
    tokenizer = GPT2Tokenizer()
    ids = [tokenizer.encode_ordinary(text) + [tokenizer.end_of_text] for text in documents]
    for split, parts in ('val', ids[::20]), ('train', [part for i, part in enumerate(ids) if i % 20]):
        tokens = [token for part in parts for token in part]
        write_split(folder, split, tokens)
        print(f'{split}.bin: {len(parts):,} documents, {len(tokens):,} tokens')
    write_meta(folder, tokenizer, description)


if __name__ == '__main__':
    main(globals())
