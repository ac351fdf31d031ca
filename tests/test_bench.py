"""bench.py end to end, on its smallest cases."""

import json

import pytest
from helpers import complaint, run

PARTS = {'layer': {'forward', 'backward', 'total'}, 'step': {'step', 'total'}, 'sample': {'sample', 'total'}}


@pytest.mark.parametrize(
    'suite, only',
    [
        ('layer', 'float32 96 384 2048 nn.Linear$'),
        ('step', 'float32 nano KANLinear, plain passes$'),
        ('sample', 'float32 micro 256 255 cached$'),
    ],
)
def test_suite_prints_a_table_and_one_line_of_json(tmp_path, suite, only):
    done = run(tmp_path, 'bench.py', f'--suite={suite}', f'--only={only}', '--device=cpu', '--rounds=2', '--repeats=2')
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.strip().split('\n')
    report = json.loads(line)
    (row,) = report['rows']
    assert f'{row["dtype"]} {row["where"]} {row["name"]}$' == only and any(row['name'] in text and 'MiB' in text for text in table)
    assert set(row['seconds']) == PARTS[suite] and all(len(seconds) == 4 and min(seconds) > 0 for seconds in row['seconds'].values())
    assert row['peak_bytes'] > 1e6 and report['hardware'] and report['versions']['torch']


def test_unknown_suite_is_named(tmp_path):
    assert 'expected layer, step or sample' in complaint(tmp_path, 'bench.py', '--suite=lawyer', '--device=cpu')
