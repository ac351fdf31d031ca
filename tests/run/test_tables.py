"""Tables of Markdown."""

import pytest

from run.tables import markdown_table


def test_first_column_left_and_others_right():
    assert markdown_table(['name', 'n', 'loss'], [['a', 1, '0.5'], ['b', 22, '']]) == [
        '| name | n | loss |',
        '|---|--:|--:|',
        '| a | 1 | 0.5 |',
        '| b | 22 |  |',
    ]


def test_sides_are_chosen():
    assert markdown_table(['a', 'b', 'c'], [[1, 2, 3]], 'rlr')[1] == '|--:|---|--:|'


def test_texts_that_would_end_a_cell_or_a_line():
    assert markdown_table(['|x|'], [['a | b'], ['two\nlines']]) == [
        '| \\|x\\| |',
        '|---|',
        '| a \\| b |',
        '| two lines |',
    ]


def test_no_rows_no_table():
    assert markdown_table(['a', 'b'], []) == []


@pytest.mark.parametrize('row', [[1], [1, 2, 3]])
def test_a_row_of_another_length_is_refused(row):
    with pytest.raises(ValueError, match=f'of 2 columns got a row of {len(row)}'):
        markdown_table(['a', 'b'], [[1, 2], row])
