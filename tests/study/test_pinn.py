"""The study of differential equations: its operator, a real run, and its page from the records."""

import math

import pytest
import torch

from helpers import complaint
from study import pinn
from study.runner import Study, add_run

MARKED = '<!-- study/pinn.py writes this table -->\n{}<!-- until here -->\n'


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(pinn, 'STUDY', Study('pinn', tmp_path))
    return pinn


def test_the_laplacian_is_that_of_the_textbook():
    x = torch.rand(20, 2, dtype=torch.float64) * 2 - 1
    a, b = math.pi * x[:, 0], math.pi * x[:, 1] ** 2
    expected = -(math.pi**2) * (1 + 4 * x[:, 1] ** 2) * a.sin() * b.sin() + 2 * math.pi * a.sin() * b.cos()
    assert torch.allclose(pinn.laplacian(pinn.plate, x), expected)
    assert torch.allclose(pinn.laplacian(pinn.wave, x[:, :1]), -((3.5 * math.pi) ** 2) * pinn.wave(x))


@pytest.mark.parametrize('dimensions, n_boundary', [(1, 2), (2, 4 * 8)])
def test_points(dimensions, n_boundary):
    points, boundary = pinn.make_points(dimensions, 9)
    assert points.shape == (9**dimensions, dimensions) and boundary.shape == (n_boundary, dimensions)
    assert (points.abs() <= 1).all() and (boundary.abs().amax(1) == 1).all()


@pytest.mark.parametrize('network', pinn.NETWORKS)
@pytest.mark.parametrize('problem', pinn.PROBLEMS)
def test_a_run_learns(monkeypatch, one_thread, problem, network):
    if network == 'efficient-kan':
        pytest.importorskip('kan_gpt.efficient_kan.model')
    monkeypatch.setattr(pinn, 'STEPS', 40)
    monkeypatch.setattr(pinn, 'EVERY', 10)
    run = pinn.solve(problem, network, 1)
    first, *_, last = run['log']
    assert last['loss'] < first['loss'] and last['step'] == 40 and 0 < run['error'] == last['error']
    assert (
        0 < first['seconds'] < run['seconds'] and abs(run['parameters'] / {'1-D': 200, '2-D': 300}[problem] - 1) < 0.05
    )


def test_the_error_is_relative_and_on_other_points(monkeypatch):
    """Of a network that gives nothing it is one."""
    met, (solution, dimensions, n) = [], pinn.PROBLEMS['2-D']

    def make_nothing(sizes):
        model = pinn.make_mlp(sizes)
        torch.nn.init.zeros_(model[-1].weight), torch.nn.init.zeros_(model[-1].bias)
        return model

    monkeypatch.setitem(pinn.PROBLEMS, '2-D', (lambda x: met.append(x.detach()) or solution(x), dimensions, n))
    monkeypatch.setitem(pinn.NETWORKS, 'nothing', (make_nothing, {2: [4]}))
    for name, value in dict(STEPS=1, EVERY=1, RATE=0.0).items():
        monkeypatch.setattr(pinn, name, value)
    assert pinn.solve('2-D', 'nothing', 1)['error'] == pytest.approx(1)
    learned, others = ({tuple(point) for point in x.round(decimals=4).tolist()} for x in (met[0], met[-1]))
    assert len(learned) == n * n and len(learned & others) < 0.01 * len(others)


def test_page_is_made_of_the_records(study, capsys):
    for name, (problem, network, seed) in study.list_runs(study.PROBLEMS).items():
        log = [dict(step=i, seconds=i / seed, loss=1 / i, error=1 / i) for i in (1, 2, 3)]
        run = dict(parameters=200, error=0.01 * seed, seconds=study.STEPS * 2e-3, log=log)
        add_run(
            str(study.STUDY.folder / 'runs.jsonl'), dict(run, name=name, problem=problem, network=network, seed=seed)
        )
    page = study.STUDY.folder / 'README.md'
    page.write_text(MARKED.format(''))
    study.STUDY.fill(study.make_table())
    study.draw()
    table = capsys.readouterr().out
    assert table.count('| 200 | 2.00 ± 1.00 | 2.00 ± 0.00 |') == 6 and page.read_text() == MARKED.format(table)
    assert (study.STUDY.folder / 'error.png').stat().st_size > 10_000


def test_times_of_another_machine_are_in_no_table(study):
    study.STUDY.folder.mkdir(parents=True)
    for name in '2-D, MLP, seed=1', '2-D, MLP, seed=2':
        add_run(str(study.STUDY.folder / 'runs.jsonl'), dict(name=name, hardware=f'machine of {name}'))
    with pytest.raises(ValueError, match='times on different machines do not compare: .* of machine of 2-D'):
        study.make_table()


def test_a_missing_record_is_named(study):
    with pytest.raises(FileNotFoundError, match='2-D, MLP, seed=1 is missing: python study/pinn.py solves it'):
        study.read_group('2-D', 'MLP')


def test_page_of_results_is_that_of_its_records():
    assert pinn.STUDY.read().keys() == pinn.list_runs(pinn.PROBLEMS).keys()
    assert MARKED.format(pinn.make_table()) in (pinn.STUDY.folder / 'README.md').read_text()


def test_unknown_problems_are_named(tmp_path):
    assert 'problems: expected any of 1-D, 2-D' in complaint(tmp_path, 'study/pinn.py', '--problems=3-D')
