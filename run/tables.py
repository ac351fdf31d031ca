"""Tables as Markdown has them. Standard library only."""

MARKS = {'l': '---', 'r': '--:'}


def markdown_table(heads, rows, sides=''):
    """The lines of a table, none where there are no rows; cells are anything that has a text. `sides` has l or r for
    each column, where its texts stand: by default the first column left and the others right. ValueError for a row of
    another length.
    """
    sides = sides or 'l' + 'r' * (len(heads) - 1)
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f'a table of {len(heads)} columns got a row of {len(row)}: {row}')
    lines = [line_of(heads), f'|{"|".join(MARKS[side] for side in sides)}|', *map(line_of, rows)]
    return lines if rows else []


def line_of(cells):
    texts = [str(cell).replace('|', '\\|').replace('\n', ' ') for cell in cells]
    return f'| {" | ".join(texts)} |'
