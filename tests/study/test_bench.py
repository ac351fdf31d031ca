"""bench.py end to end, on its smallest cases."""

import json

import pytest

from helpers import complaint, run_forked

PARTS = {
    **dict.fromkeys(('layer', 'activation', 'adapter', 'graph'), {'forward', 'backward', 'total'}),
    **dict.fromkeys(('step', 'mlp'), {'step', 'total'}),
    'sample': {'sample', 'total'},
    'edges': {'edges', 'rest', 'total'},
}


@pytest.mark.parametrize(
    'suite, only',
    [
        ('layer', 'float32 96 384 2048 nn.Linear$'),
        ('activation', 'float32 256 16384 floor$'),
        ('activation', 'float32 512 16384 ChannelSpline, gated$'),
        ('step', 'float32 nano KANLinear, plain passes$'),
        ('mlp', 'float32 0.23M KAN-GLU$'),
        ('sample', 'float32 micro 256 255 cached$'),
        ('adapter', 'float32 768 768 8192 rsLoRA$'),
        ('adapter', 'float32 768 768 8192 DoRA, peft$'),
        ('graph', 'float32 192 6 512 8 GAT, window by list$'),
        ('graph', 'float32 nano topk edges$'),
    ],
)
def test_suite_prints_a_table_and_one_line_of_json(tmp_path, suite, only):
    rounds = 2 if suite == 'layer' else 1  # each in a process of its own
    command = ['study/bench.py', f'--suite={suite}', f'--only={only}', '--device=cpu', '--repeats=2']
    done = run_forked(tmp_path, *command, f'--rounds={rounds}')
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.strip().split('\n')
    report = json.loads(line)
    (row,) = report['rows']
    assert f'{row["dtype"]} {row["where"]} {row["name"]}$' == only and any(
        row['name'] in text and 'MiB' in text for text in table
    )
    assert set(row['seconds']) == PARTS['edges' if 'edges$' in only else suite] and all(
        len(seconds) == 2 * rounds and min(seconds) > 0 for seconds in row['seconds'].values()
    )
    assert row['peak_bytes'] > 1e6 and report['hardware'] and report['versions']['torch']


@pytest.mark.parametrize(
    'flag, message',
    [
        ('--suite=lawyer', 'expected layer, activation, step, mlp, sample, adapter, graph'),
        ('--only=cubic', "e.g., 'float32 192 768 16384 floor'"),
        ('--only=(', 'not a regular expression'),
        ('--dtypes=float8', "'float8': expected auto, float32, bfloat16 or float16"),
    ],
)
def test_mistakes_are_named(tmp_path, flag, message):
    assert message in complaint(tmp_path, 'study/bench.py', flag, '--device=cpu')


def test_operators_are_listed_with_their_times(tmp_path):
    done = run_forked(
        tmp_path,
        'study/bench.py',
        '--only=float32 96 384 2048 nn.Linear$',
        '--device=cpu',
        '--rounds=1',
        '--repeats=1',
        '--operators=3',
    )
    *table, line = done.stdout.strip().split('\n')
    (row,) = json.loads(line)['rows']
    names, counts, seconds = zip(*row['operators'])
    assert 'aten::mm' in names and counts[names.index('aten::mm')] == 3  # forward, and two of the backward pass
    assert (
        len(names) == 3 and sorted(seconds, reverse=True) == list(seconds) and any('aten::mm' in text for text in table)
    )
