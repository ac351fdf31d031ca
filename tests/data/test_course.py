"""The rows of the tables and the sonnets of the course, read and refused."""

import pytest

from data import course
from helpers import HEADERS, TITLE, book, sonnet, write_file

HEADER, PAIRS = HEADERS['sst'], HEADERS['quora']

# rows of the tables


def row(task, id='a', text='Good', label='1'):
    """A line of a table; a pair has the same text twice."""
    return '\t'.join(['0', id, *[text] * len(course.COLUMNS[task][0]), label])


@pytest.mark.parametrize('task', ['sst', 'cfimdb'])
def test_rows_are_read_in_lower_case(tmp_path, capsys, task):
    path = write_file(tmp_path, HEADER + '0\ta1\t The Film , Amélie , is GREAT . \t1\n1\tb2\t Bad .\t0\n')
    assert course.read_rows(task, path) == [('a1', 'the film , amélie , is great .', 1), ('b2', 'bad .', 0)]
    unlabelled = [('a1', 'the film , amélie , is great .', None), ('b2', 'bad .', None)]
    assert course.read_rows(task, path, labelled=False) == unlabelled
    assert capsys.readouterr() == ('', '')


def test_pairs_are_read_in_lower_case(tmp_path, capsys):
    path = write_file(tmp_path, PAIRS + '7\ta1\t Who is É ?\tWho? \t1.0\n3\tb2\tHow\tWhy\t0.0\n9\tc3\tHow\tWhy\t1\n')
    assert course.read_rows('quora', path) == [
        ('a1', 'who is é ?', 'who?', 1),
        ('b2', 'how', 'why', 0),
        ('c3', 'how', 'why', 1),
    ]
    assert course.read_rows('quora', path, labelled=False)[0] == ('a1', 'who is é ?', 'who?', None)
    assert capsys.readouterr() == ('', '')


def test_rows_are_found_by_the_names_of_their_columns(tmp_path):
    path = write_file(tmp_path, '0\t\tid\tsentence\n1\t0.0\ta1\tYes\n')  # as in the test file of the course
    assert course.read_rows('sst', path, labelled=False) == [('a1', 'yes', None)]
    path = write_file(tmp_path, '\ufeffsentiment\tsentence\tid\r\n2\tYes\ta1\r\n')  # as Windows saves it
    assert course.read_rows('sst', path) == [('a1', 'yes', 2)]
    path = write_file(tmp_path, 'is_duplicate\tsentence2\tid\tsentence1\n1.0\tB\ta1\tA\n')
    assert course.read_rows('quora', path) == [('a1', 'a', 'b', 1)]


@pytest.mark.parametrize('end', ['\n', '\r\n', '\r', '\r\r\n'])
def test_lines_end_as_they_may(tmp_path, end, capsys):
    """The last as Windows' text mode makes of its own ends."""
    path = tmp_path / 'ends.csv'
    path.write_bytes((HEADER + '0\ta\tYes\t1\n1\tb\tNo\t7\n').replace('\n', end).encode())
    assert course.read_rows('sst', path) == [('a', 'yes', 1)]
    assert capsys.readouterr().err.endswith('with a label other than 0 to 4: line 3\n')


def test_a_cell_may_have_any_length(tmp_path):
    text = 'very ' * 40_000 + 'long'
    assert course.read_rows('sst', write_file(tmp_path, HEADER + f'0\ta\t{text}\t1\n')) == [('a', text, 1)]


@pytest.mark.parametrize('task', HEADERS)
def test_quotation_marks_are_characters(tmp_path, task):
    lines = [row(task, 'a', '"One', '1'), row(task, 'b', 'Two', '0'), row(task, 'c', 'Three"', '1')]
    read = course.read_rows(task, write_file(tmp_path, HEADERS[task] + '\n'.join(lines) + '\n'))
    assert [(id, text, label) for id, text, *_, label in read] == [
        ('a', '"one', 1),
        ('b', 'two', 0),
        ('c', 'three"', 1),
    ]


FAULTY = {  # made of a good line of the task
    'missing': lambda task: [row(task, text=' '), row(task, id=''), '', row(task, '', '', '')],
    'malformed': lambda task: [row(task).rpartition('\t')[0], row(task) + '\t1', 'text'],
    'unlabelled': lambda task: [row(task, label=''), row(task, label=' ')],
    'mislabelled': lambda task: [
        row(task, label=label) for label in (str(course.COLUMNS[task][2]), '-1', '0.5', 'good', '12', '.0')
    ],
}


@pytest.mark.parametrize('task', HEADERS)
@pytest.mark.parametrize('fault', FAULTY)
def test_rows_left_out_are_counted_and_named(tmp_path, capsys, task, fault):
    faulty = FAULTY[fault](task)[:5]
    lines = [part for line in faulty for part in (row(task), line)]
    path = write_file(tmp_path, HEADERS[task] + '\n'.join(lines) + '\n')
    numbers = list(range(3, 3 + len(lines), 2))
    assert [(id, text, label) for id, text, *_, label in course.read_rows(task, path)] == [('a', 'good', 1)] * len(
        numbers
    )
    reason = course.FAULTS[fault].format(course.COLUMNS[task][2] - 1)
    assert (
        capsys.readouterr().err
        == f'{path}: {len(numbers)} row(s) left out, {reason}: line {", ".join(map(str, numbers))}\n'
    )
    expected = {name: numbers if name == fault else [] for name in course.FAULTS}
    assert course.parse_rows(task, path.read_bytes(), path)[1] == expected


def test_a_pair_needs_both_questions(tmp_path, capsys):
    path = write_file(tmp_path, PAIRS + '0\ta\tOne\t \t1.0\n1\tb\t\tTwo\t1.0\n2\tc\tOne\tTwo\t1.0\n')
    assert course.read_rows('quora', path) == [('c', 'one', 'two', 1)]
    assert capsys.readouterr().err == f'{path}: 2 row(s) left out, without an id or a sentence: line 2, 3\n'


def test_rows_left_out_have_a_line_for_each_kind(tmp_path, capsys):
    path = write_file(tmp_path, HEADER + '0\ta\tGood\t3\n' + 'text\n' * 8 + '0\ta\tText\t9\n')
    assert len(course.read_rows('sst', path)) == 1
    malformed, mislabelled = capsys.readouterr().err.splitlines()
    assert malformed.endswith(': line 3, 4, 5, 6, 7 and 3 more') and mislabelled.endswith(': line 11')


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', r'a\.csv has no column id or sentence or sentiment'),
        (b'0\ta\tText\t1\n', 'has no column id or sentence or sentiment: its first line has'),
        (b'id,sentence,sentiment\na,b,1\n', 'has no column id or sentence or sentiment'),
        (b'\tid\tsentence\n0\ta\tText\n', r"has no column sentiment: its first line has \['', 'id', 'sentence'\]"),
        (HEADER.encode(), 'has no row that can be used$'),
        (
            HEADER.encode() + b'text\n0\ta\tText\t7\n',
            'has no row that can be used; 1 row.*columns.*: line 2; 1 row.*label.*: line 3$',
        ),
        (b'\xff\xfe', 'is not UTF-8 text'),
    ],
)
def test_file_of_no_rows_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / 'a.csv').write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        course.read_rows('sst', tmp_path / 'a.csv')
    assert '\n' not in str(error.value)


def test_table_of_another_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match='has no column sentence1 or sentence2 or is_duplicate: its first line has'):
        course.read_rows('quora', write_file(tmp_path, HEADER + '0\ta\tText\t1\n'))


# sonnets


def test_sonnets_are_read_under_their_numbers():
    text = book([14, 12, 14], first=125).replace('Line 2\n', 'Line 2  \n\n').replace('126\n', ' 126 \n')
    expected = [('125', sonnet()), ('126', sonnet(12)), ('127', sonnet())]
    for content in text, text.replace('\n', '\r\n'), '\ufeff' + text.rstrip('\n'):
        assert course.parse_sonnets(content.encode(), 'a.txt') == expected
    assert course.parse_sonnets(book([3, 4], first=145).encode(), 'a.txt', prompts=True) == [
        ('145', sonnet(3)),
        ('146', sonnet(4)),
    ]
    odd = sonnet().replace('Line 2', 'Li\x85ne\u2028 2')
    assert course.parse_sonnets((TITLE + '1\n\n' + odd + '\n').encode(), 'a.txt') == [('1', odd)]


@pytest.mark.parametrize(
    'text, prompts, message',
    [
        (book([14, 11, 14]), False, 'sonnet 2 has fewer than 12 lines'),
        (book([14, 0]), False, 'sonnet 2 has fewer than 12 lines'),
        (book([3, 2]), True, 'sonnet 2 has fewer than 3 lines'),
        (TITLE + sonnet(), False, 'no line is the number of a sonnet'),
        ('', True, 'no line is the number of a sonnet'),
        ('\udcff', False, 'not UTF-8 text'),
    ],
)
def test_file_of_no_sonnets_is_refused_in_one_line(tmp_path, text, prompts, message):
    (tmp_path / 'a.txt').write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(ValueError, match=rf'a\.txt is .*{message}') as error:
        course.read_sonnets(tmp_path / 'a.txt', prompts)
    assert '\n' not in str(error.value)
