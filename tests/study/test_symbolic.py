"""The study of formulas: planted ones come back, pykan stands beside our kan.py, the page is that of the records."""

import math
import sys
from types import SimpleNamespace

import pytest
import sympy
import torch

import kan
from helpers import complaint
from inside.formulas import Formula
from kan import KAN
from study import symbolic
from study.runner import Study, add_run

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(symbolic, 'STUDY', Study('symbolic', tmp_path))
    return symbolic


def layer(**edges):
    """As inside.report.look gives it: edges by 'i_o', each a family and its numbers."""
    pairs = [tuple(map(int, reversed(name[1:].split('_')))) for name in edges]
    found = [Formula(family, *numbers, 1.0, 0.0, ()) for family, *numbers in edges.values()]
    return SimpleNamespace(pairs=pairs, formulas=found)


def planted(a=3.0):
    first = layer(e0_0=('sin', a, 0.1, 0.5, 0.2), e1_0=('x^2', 1.0, 0.1, 0.5, 0.0))
    return symbolic.FormulaKAN([first, layer(e0_0=('exp', 1.9, 0.0, 0.7, 0.1))])


def make_run(function, method, seed, error=1e-9):
    errors = dict(kan=1e-3, formulas=1e-2, refit=error)
    seconds = dict(train=10.0 * seed, search=seed / 2, refit=1.0)
    edges = [['0', 0, 0, 'sin', 0.99], ['1', 0, 0, 'exp', 1.0]]
    where = dict(function=function, method=method, seed=seed)
    return dict(where, formula='sin(x_1)', errors=errors, edges=edges, seconds=seconds, cpu_seconds=seconds)


def test_formulas_as_a_network_are_their_expression():
    model, x = planted(), torch.rand(50, 2) * 2 - 1
    function = sympy.lambdify(sympy.symbols('x_1:3'), model.expression(), 'numpy')
    assert torch.allclose(model(x)[:, 0], torch.as_tensor(function(*x.numpy().T)), atol=1e-5)


def test_numbers_train_to_the_function():
    function = symbolic.FUNCTIONS["pykan's tutorial"]
    x, y = (rows.double() for rows in function.rows(1))
    model = planted().double()
    assert symbolic.fit(model, x, y, 8) < symbolic.RIGHT * function.deviation
    assert str(symbolic.tidy(model.expression())) == 'exp(x_2**2 + sin(3.142*x_1))'


@pytest.mark.parametrize(
    'text, expected',
    [
        ('0.25*(x_1 + 0.99999*x_2)**2 - 0.25*(x_1 - x_2)**2', 'x_1*x_2'),
        ('2.0*exp(0.5*x_1 - 0.693147180559945) + 0.0002', 'exp(0.5*x_1)'),
        ('exp(0.0004*x_1) + 0.002', 'exp(0.0004*x_1) + 0.002'),
        ('0.0003*sin(x_1)', '0.0003*sin(x_1)'),
        ('32.1711*exp(log(0.0437*x_1 + 3e-6) + log(0.7113*x_2 - 2e-8))', 'x_1*x_2'),
        ('0.25*(1.5001*x_1 + x_2)**2 - 0.25*(1.5*x_1 - x_2)**2', '1.5*x_1*x_2'),
        ('log(0.0002*x_1 + 0.0001)', 'log(0.0002*x_1 + 0.0001)'),
        # a number within a logarithm is a factor of the whole
        ('32.1711*exp(1.0000001*log(0.0437*x_1 + 1e-8) + 0.9999999*log(0.7113*x_2 - 2e-8)) - 1e-9', 'x_1*x_2'),
        ('52.9436*exp(log(1.2345*x_1) + log(0.0153*x_2))', 'x_1*x_2'),
        ('0.5*sqrt(4.0*x_1**2 + 4.0)', 'sqrt(x_1**2 + 1)'),
        ('0.5*sqrt(4.0*x_1)', '0.5*sqrt(4*x_1)'),
    ],
)
def test_expressions_are_made_plain(text, expected):
    assert sympy.simplify(symbolic.tidy(text) - sympy.sympify(expected)) == 0


def test_root_logarithm_and_reciprocal_stay_finite():
    z = torch.linspace(-1, 1, 21)
    for family in ('sqrt', 'log', '1/x', 'affine', 'constant', 'sin'):
        assert symbolic.apply(family, z).isfinite().all()


@pytest.mark.parametrize('function', symbolic.FUNCTIONS.values(), ids=symbolic.FUNCTIONS)
def test_rows_are_those_of_the_function(function):
    x, y = function.rows(1)
    assert x.shape == (2 * symbolic.ROWS, function.sizes[0]) and y.shape == (2 * symbolic.ROWS, 1)
    assert function.bounds[0] <= x.min() and x.max() <= function.bounds[1] and x.dtype == y.dtype == torch.float32
    first = sympy.sympify(function.text).subs({f'x_{i + 1}': value for i, value in enumerate(x[0].tolist())})
    assert float(first) == pytest.approx(y[0].item(), abs=1e-6)


def test_a_run_finds_the_function(study, monkeypatch):
    for name, value in dict(STARTS=2, FIRST=2, STEPS=6, GRIDS=(10,), ROWS=300).items():
        monkeypatch.setattr(symbolic, name, value)
    study.STUDY.run_all({'one': ('Feynman I.6.20a', 'ours', 1)}, study.make)
    (run,) = study.STUDY.read().values()
    assert study.is_right(run) and run['formula'] == '0.399*exp(-0.5*x_1**2)'
    assert [edge[:4] for edge in run['edges']] == [['0', 0, 0, 'gaussian']] and 'commit' in run
    assert run['errors']['refit'] < run['errors']['formulas'] < 0.01 and run['cpu_seconds'].keys() == {
        'train', 'search', 'refit',
    }  # fmt: skip


def test_errors_are_on_rows_that_were_not_learned_from(monkeypatch):
    function = symbolic.FUNCTIONS['Feynman I.6.20a']
    x, _ = function.rows(1)
    monkeypatch.setattr(symbolic, 'rmse', lambda model, x, y: x[0, 0].item())
    monkeypatch.setattr(symbolic, 'STEPS', 1)
    monkeypatch.setattr(symbolic, 'train', lambda function, x, y, seed: KAN(function.sizes, grid_range=function.bounds))
    run = symbolic.ours(function, 1)
    assert run['errors'] == dict.fromkeys(('kan', 'formulas', 'refit'), pytest.approx(x[symbolic.ROWS, 0].item()))


def test_the_best_of_the_starts_goes_on(monkeypatch):
    met = []

    def fit(model, x, y, steps, update=0):
        met.append((model, steps))
        return [math.nan, 1.0, 2.0][len(met) - 1] if len(met) < 4 else 0.0

    monkeypatch.setattr(symbolic, 'fit', fit)
    monkeypatch.setattr(symbolic, 'STARTS', 3)
    model = symbolic.train(symbolic.FUNCTIONS['a product'], None, None, 1)
    models, steps = zip(*met)
    assert models[3:] == (models[1],) * 3 and model is models[1] and len({*models}) == 3
    assert steps == (symbolic.FIRST,) * 3 + (symbolic.STEPS, symbolic.STEPS // 2, symbolic.STEPS // 2)


def test_another_kan_is_imported_beside_ours(tmp_path, monkeypatch):
    package = tmp_path / 'kan'
    package.mkdir()
    (package / '__init__.py').write_text('from kan.inner import NAME\nprint("hello")\n')
    (package / 'inner.py').write_text('NAME = "theirs"\n')
    monkeypatch.setattr(sys, 'path', [*sys.path, str(tmp_path)])
    monkeypatch.setattr(symbolic.pykan, 'modules', {})
    monkeypatch.setattr(symbolic, 'find_pykan', lambda: tmp_path)
    for _ in range(2):
        with symbolic.pykan() as theirs:
            assert theirs.NAME == 'theirs' and sys.modules['kan'] is theirs
        assert sys.modules['kan'] is kan and 'kan.inner' not in sys.modules


@pytest.mark.skipif(symbolic.find_pykan() is None, reason='pykan is not here')
def test_our_edges_are_the_same_in_pykan():
    function, model = symbolic.FUNCTIONS['a product'], KAN([2, 2, 1], grid_range=(-1, 1))
    x = torch.rand(50, 2) * 2 - 1
    with symbolic.pykan() as package:
        assert torch.allclose(symbolic.carry_over(package, function, model)(x), model(x), atol=1e-5)


def test_without_pykan_a_line_says_how_to_get_it(study, monkeypatch, capsys):
    monkeypatch.setattr(symbolic, 'find_pykan', lambda: None)
    monkeypatch.setattr(symbolic, 'make', lambda name, job, folder: make_run(*job))
    study.run(['a product'])
    printed = capsys.readouterr().out
    assert printed.count('\n') == 1 and 'pip install --target=FOLDER --no-deps pykan==' in printed
    assert {run['method'] for run in study.STUDY.read().values()} == {'ours'}
    study.run([])
    assert capsys.readouterr().out == ''


def test_page_is_made_of_the_records(study, capsys):
    for name, job in study.list_runs(study.FUNCTIONS, study.METHODS).items():
        error = {1: 1e-9, 2: 1.0, 3: None}[job[-1]]
        add_run(str(study.STUDY.folder / 'runs.jsonl'), dict(make_run(*job, error=error), name=name))
    study.STUDY.show(study.make_table())
    table = (study.STUDY.folder / 'table.md').read_text()
    assert capsys.readouterr().out == table
    n = len(study.FUNCTIONS)
    assert table.count('| ours | 2 | 1 of 3 | 1.00 ± 0.50 | 0.50 | 20.0 ± 10.0 |') == n
    assert table.count('| pykan, our edges | 2 | 1 of 1 | 0.50 | 0.25 | – |') == n
    assert table.count('| ours | 3 | `sin(x_1)` | 1.0e-03 | 1.0e-02 | none | no | sin, exp |') == n


def test_page_of_results_is_that_of_its_records():
    assert symbolic.STUDY.read().keys() == symbolic.list_runs(symbolic.FUNCTIONS, symbolic.METHODS).keys()
    assert symbolic.make_table() == (symbolic.STUDY.folder / 'table.md').read_text()


def test_unknown_functions_are_named(tmp_path):
    assert 'functions: expected any of pykan' in complaint(tmp_path, 'study/symbolic.py', '--functions=cubic')


def test_starts_that_all_diverge_are_named():
    with pytest.raises(ValueError, match='none of 2 starts has a finite error'):
        symbolic.best_of([(math.nan, 0, None), (math.inf, 1, None)])
