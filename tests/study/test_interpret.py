"""The page of study/interpret.py is made from its records, and docs/interpret.md says what stands there."""

import re

from helpers import ROOT
from study import interpret


def records():
    return interpret.STUDY.read()


def test_the_page_is_made_from_the_records():
    assert interpret.table(records()) == (interpret.STUDY.folder / 'table.md').read_text(encoding='utf-8')


def test_every_job_has_its_record_and_every_figure_its_file():
    assert records().keys() == interpret.JOBS.keys()
    assert all((interpret.STUDY.folder / f'{name}.png').exists() for name in interpret.FIGURES.values())


def test_the_numbers_of_the_essay_are_those_of_the_records():
    """Losses have four digits behind the point there, shares one and a %."""
    page = (interpret.STUDY.folder / 'table.md').read_text(encoding='utf-8')
    essay = (ROOT / 'docs' / 'interpret.md').read_text(encoding='utf-8')
    losses, shares = re.findall(r'\b[1-5]\.\d{4}\b', essay), re.findall(r'\b\d+\.\d %', essay)
    assert len(losses) > 8 and len(shares) > 8
    assert not [number for number in (*losses, *shares) if number not in page]


def test_a_model_without_records_is_left_out():
    assert interpret.table({}) == ''
    one = {'nano_kan': records()['nano_kan']}
    assert '`nano_kan_mlp`' not in interpret.table(one) and 'pruned' not in interpret.table(one)
