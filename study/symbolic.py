"""Small KANs learn known functions, and their edges are turned into formulas: by inside/, and by pykan beside it.

    OMP_NUM_THREADS=1 python study/symbolic.py               # what has no record; without pykan, our part alone
    pip install --target=FOLDER --no-deps pykan==0.2.8 pandas
    OMP_NUM_THREADS=1 PYTHONPATH=FOLDER python study/symbolic.py   # pykan's, too: half an hour, less in two shells
    python study/symbolic.py --functions=                    # the page from the records alone

A KAN learns a function that a KAN of its shape can be. The search finds a formula for each edge, the formulas take the
place of the edges, and all their numbers are trained once more, as pykan's tutorials do. The search is timed alone.
pykan answers for a KAN that it trained itself, and for the very edges of ours.
"""

import contextlib
import importlib.machinery
import importlib.metadata
import io
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import sympy
import torch
import torch.nn as nn

from configurator import ROOT, configure
from inside import formulas
from inside.report import look
from kan import KAN
from run.device import device_name
from run.records import commit
from run.tables import markdown_table
from study.runner import Study, check_machine, choose, mean_and_std

STUDY = Study('symbolic')
SEEDS = {'ours': (1, 2, 3), 'pykan': (1,), 'pykan, our edges': (1,)}  # pykan needs half a minute for an edge
ROWS = 1000  # to learn from, and as many to test on: what pykan has by default
GRID, GRIDS = 5, (10, 20)  # intervals at first, and those that follow: a formula is seen in an accurate KAN alone
STARTS, FIRST, STEPS = 6, 5, 50  # starts of FIRST steps, the best of which goes on for STEPS; 20 iterations each
CURVED = dict(scale_noise=1.0, scale_base=0.3)  # edges curved from the start: more of the starts end well
UPDATE = 5  # steps from one update of the grid to the next
RIGHT = 1e-4  # the error of a formula that is called right is less than that share of the function's deviation
EXACT = dict(margin=1e-5, tie=1e-6)  # the usual ones are for edges that learned from noisy data
INSTALL = (
    'no pykan here, so our part alone: pip install --target=FOLDER --no-deps pykan==0.2.8 pandas, PYTHONPATH=FOLDER'
)


@dataclass
class Function:
    """A formula of x_1, x_2 ..., between which bounds these lie, and the layers of a KAN that can be it."""

    text: str
    bounds: tuple
    sizes: tuple

    @property
    def deviation(self):
        """The standard deviation on the rows of a test."""
        return self.rows(0)[1].std().item()

    def rows(self, seed):
        """Rows (2 ROWS, I) and their values (2 ROWS, 1), float32: the first half to learn from."""
        generator = torch.Generator().manual_seed(seed)
        low, high = self.bounds
        x = low + (high - low) * torch.rand(2 * ROWS, self.sizes[0], generator=generator, dtype=torch.float64)
        function = sympy.lambdify(sympy.symbols(f'x_1:{self.sizes[0] + 1}'), sympy.sympify(self.text), 'numpy')
        y = torch.as_tensor(function(*x.numpy().T))
        return x.float(), y.unsqueeze(1).float()


FUNCTIONS = {
    "pykan's tutorial": Function('exp(sin(pi*x_1) + x_2**2)', (-1, 1), (2, 1, 1)),
    'a product': Function('x_1*x_2', (-1, 1), (2, 2, 1)),
    'Feynman I.12.1': Function('x_1*x_2', (1, 5), (2, 1, 1)),
    'Feynman I.6.20a': Function('exp(-x_1**2/2)/sqrt(2*pi)', (-3, 3), (1, 1)),
    'Feynman III.10.19': Function('sqrt(1 + x_1**2 + x_2**2)', (-1, 1), (2, 1, 1)),
    'Feynman I.16.6': Function('(x_1 + x_2)/(1 + x_1*x_2)', (-0.9, 0.9), (2, 1, 1)),
}

# -----------------------------------------------------------------------------
functions = ','.join(FUNCTIONS)
# -----------------------------------------------------------------------------


class Clock:
    """Seconds of named parts: on the wall, and of the processor."""

    def __init__(self):
        self.seconds, self.cpu_seconds = {}, {}

    @contextlib.contextmanager
    def __call__(self, part):
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[part], self.cpu_seconds[part] = time.perf_counter() - wall, time.process_time() - cpu


# ours


def make_lbfgs(model):
    """As pykan has it."""
    settings = dict(history_size=10, line_search_fn='strong_wolfe', tolerance_grad=1e-32, tolerance_change=1e-32)
    return torch.optim.LBFGS(model.parameters(), **settings)


def fit(model, x, y, steps, update=0, scale=1.0):
    """Steps of LBFGS on the loss times `scale`, with new grids every `update` of them; returns the final error."""
    optimizer = make_lbfgs(model)

    def closure():
        optimizer.zero_grad()
        loss = scale * (model(x) - y).square().mean()
        loss.backward()
        return loss

    for step in range(steps):
        if update and step % update == 0:
            model(x, update_grid=True)
            optimizer = make_lbfgs(model)
        optimizer.step(closure)
    return rmse(model, x, y)


@torch.no_grad()
def rmse(model, x, y):
    return (model(x) - y).square().mean().sqrt().item()


def train(function, x, y, seed):
    """A KAN that has learned the rows: the best of some starts, then finer grids."""
    torch.manual_seed(seed)
    started = []
    for _ in range(STARTS):
        model = KAN(function.sizes, grid_size=GRID, grid_range=function.bounds, **CURVED)
        started.append((fit(model, x, y, FIRST, UPDATE), len(started), model))
    model = best_of(started)
    fit(model, x, y, STEPS, UPDATE)
    for grid_size in GRIDS:
        model.refine_grid(grid_size)
        fit(model, x, y, STEPS // 2)
    return model


def best_of(started):
    """The model of the smallest error, of [(error, place, model)] those with a finite one."""
    finite = [start for start in started if math.isfinite(start[0])]
    if not finite:
        raise ValueError(f'none of {len(started)} starts has a finite error')
    return min(finite)[-1]


class FormulaKAN(nn.Module):
    """A KAN whose edges are formulas c f(a x + b) + d, the numbers of which train: (N, I) -> (N, O)."""

    def __init__(self, layers):
        """`layers` are those of inside.report.look, with a formula for every edge."""
        super().__init__()
        self.edges, self.numbers = [], nn.ParameterList()
        for layer in layers:
            found = sorted(zip(layer.pairs, layer.formulas))
            self.edges.append([(o, i, formula.family) for (o, i), formula in found])
            numbers = [(formula.a, formula.b, formula.c, formula.d) for _, formula in found]
            self.numbers.append(nn.Parameter(torch.tensor(numbers)))

    def forward(self, x):
        for edges, numbers in zip(self.edges, self.numbers):
            terms = [[] for _ in range(1 + max(o for o, _, _ in edges))]
            for (o, i, family), (a, b, c, d) in zip(edges, numbers):
                terms[o].append(c * apply(family, a * x[:, i] + b) + d)
            x = torch.stack([sum(added) for added in terms], 1)
        return x

    def expression(self):
        """The output as an expression of x_1, x_2 ..."""
        inputs = None
        for edges, numbers in zip(self.edges, self.numbers):
            if inputs is None:
                inputs = sympy.symbols(f'x_1:{2 + max(i for _, i, _ in edges)}')
            outputs = [sympy.Integer(0)] * (1 + max(o for o, _, _ in edges))
            for (o, i, family), four in zip(edges, numbers.tolist()):
                formula = formulas.Formula(family, *four, 1.0, 0.0, ())
                outputs[o] += formulas.expression(formula, 15, 'z').subs('z', inputs[i])
            inputs = outputs
        return inputs[0]


def apply(family, z):
    """The f of a formula, finite wherever training takes its argument."""
    if family == 'affine':
        return z
    if family == 'constant':
        return 0 * z
    known = formulas.FAMILIES[family]
    if known.kind == 'bounded':  # roots, logarithms, reciprocals
        z = z.clamp_min(1e-6)
    if known.kind == 'within':
        z = z.clamp(-1 + 1e-6, 1 - 1e-6)
    return known.f(z)


def ours(function, seed):
    """The record of our search in our KAN."""
    x, y = function.rows(seed)
    seen, test = (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:])
    clock = Clock()
    with clock('train'):
        model = train(function, *seen, seed)
    formulas.candidates.cache_clear()  # they are made once for all layers of a model: counted here
    with clock('search'):
        layers = look(model, lambda: model(seen[0]), **EXACT)
    found = FormulaKAN(layers)
    errors = dict(kan=rmse(model, *test), formulas=rmse(found, *test))
    with clock('refit'):
        # where the loss is small, torch's LBFGS takes the curvature for rounding and learns no more of it
        fit(found.double(), *(rows.double() for rows in seen), STEPS, scale=1e6)
    errors['refit'] = rmse(found, *(rows.double() for rows in test))
    edges = []
    for layer in layers:
        edges += [[layer.name, i, o, f.family, f.r2] for (o, i), f in sorted(zip(layer.pairs, layer.formulas))]
    return record(clock, errors, edges, found.expression())


# pykan's


def find_pykan():
    """Where pykan's package lies, whose name is that of our kan.py; None where there is none."""
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != Path(ROOT)]
    spec = importlib.machinery.PathFinder.find_spec('kan', elsewhere)
    return spec and spec.submodule_search_locations and Path(spec.origin).parents[1]


@contextlib.contextmanager
def pykan():
    """pykan's package, under its own name as long as the context lasts; what it prints is swallowed."""
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == 'kan'}
    sys.modules.update(pykan.modules)
    sys.path.insert(0, str(find_pykan()))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield importlib.import_module('kan')
    finally:
        sys.path.pop(0)
        pykan.modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == 'kan'}
        sys.modules.update(own)


pykan.modules = {}


def train_theirs(package, function, data, seed):
    """A KAN of pykan that has learned the rows: the best of as many starts as ours, by its own `fit`."""
    started = []
    for start in range(STARTS):
        model = make_theirs(package, function, GRID, 100 * seed + start)
        model.fit(data, opt='LBFGS', steps=FIRST)
        started.append((rmse(model, data['train_input'], data['train_label']), start, model))
    model = best_of(started)
    model.fit(data, opt='LBFGS', steps=STEPS)
    return model


def make_theirs(package, function, grid, seed):
    bounds = list(function.bounds)
    return package.KAN(list(function.sizes), grid=grid, k=3, grid_range=bounds, seed=seed, auto_save=False)


def carry_over(package, function, model):
    """Our KAN as one of pykan's: the same splines on the same knots."""
    theirs = make_theirs(package, function, model.grid_size, 0)
    for ours, layer in zip(model.layers, theirs.act_fun):
        layer.grid.data = ours.grid.clone()
        for name, weight in dict(coef='spline_weight', scale_base='base_weight', scale_sp='spline_scaler').items():
            # LBFGS cannot flatten what is a mere view of another order
            getattr(layer, name).data = getattr(ours, weight).data.transpose(0, 1).contiguous()
    return theirs


def theirs(function, seed, our_edges):
    """The record of pykan's search in its own KAN, or in ours."""
    x, y = function.rows(seed)
    data = dict(train_input=x[:ROWS], train_label=y[:ROWS], test_input=x[ROWS:], test_label=y[ROWS:])
    wide = {name: rows.double() for name, rows in data.items()}
    test, clock = (x[ROWS:], y[ROWS:]), Clock()
    model = train(function, x[:ROWS], y[:ROWS], seed) if our_edges else None
    with pykan() as package:
        with clock('train'):
            model = carry_over(package, function, model) if our_edges else train_theirs(package, function, data, seed)
        errors = dict(kan=rmse(model, *test))
        model(x[:ROWS])  # the search reads the activations of the last call
        with clock('search'):
            model.auto_symbolic(verbose=0)
        errors['formulas'] = rmse(model, *test)
        with clock('refit'):
            model.double().fit(wide, opt='LBFGS', steps=STEPS, update_grid=False)
        errors['refit'] = rmse(model, wide['test_input'], wide['test_label'])
        expression = model.symbolic_formula()[0][0]
        edges = [
            [str(n), i, o, name, None]
            for n, layer in enumerate(model.symbolic_fun)
            for o, names in enumerate(layer.funs_name)
            for i, name in enumerate(names)
        ]
    return {**record(clock, errors, edges, expression), 'pykan': importlib.metadata.version('pykan')}


# records and page


def record(clock, errors, edges, expression):
    """What is the same for all methods. An error that is no number is None."""
    errors = {part: error if math.isfinite(error) else None for part, error in errors.items()}
    machine = dict(hardware=device_name('cpu'), torch=torch.__version__, sympy=sympy.__version__, commit=commit())
    times = dict(seconds=clock.seconds, cpu_seconds=clock.cpu_seconds)
    return dict(formula=sympy.sstr(tidy(expression), full_prec=False), errors=errors, edges=edges, **times, **machine)


def tidy(expression, digits=3):
    """Multiplied out, with no constant left in an exponent or before the terms in a root, and rounded. Numbers that are
    whole but for a rounding become so first: exponents near 1 keep the factors in their logarithms apart.
    """
    expression = sympy.sympify(expression)
    numbers = {number: round(float(number)) for number in expression.atoms(sympy.Float)}
    whole = {number: sympy.Integer(near) for number, near in numbers.items() if is_whole(float(number), near)}
    expanded = multiplied_out(expression.xreplace(whole))
    expanded = expanded.replace(lambda e: isinstance(e, sympy.exp), lambda e: factored(e.args[0]))
    expanded = multiplied_out(expanded.replace(lambda e: e.is_Pow and e.exp == sympy.S.Half, lambda e: unit(e.base)))
    expanded = without_noise(expanded)
    return expanded.xreplace({number: rounded(number, digits) for number in expanded.atoms(sympy.Float)})


def multiplied_out(expression):
    return sympy.expand(expression, power_exp=False, power_base=False, log=False)


def without_noise(expression):
    """Less the terms whose coefficients are below a two thousandth of the largest."""
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(expression)]
    least = max(abs(coefficient) for coefficient, _ in terms) / 2000
    return sympy.Add(*(coefficient * rest for coefficient, rest in terms if abs(coefficient) >= least))


def is_whole(number, near):
    """Whether a fitted number stands for the integer near it. A small one may be what it is; one of 1e-6 is noise."""
    return abs(number - near) < (1e-4 if near else 1e-6)


def rounded(number, digits):
    """To so many decimals, and of a small number to so many digits."""
    zeros = max(0, -math.floor(math.log10(abs(number))) - 1) if number else 0
    value = round(float(number), digits + zeros)
    return sympy.Integer(int(value)) if value == int(value) else sympy.Float(value, 15)


def factored(argument):
    """exp(constant + rest) as a product"""
    constant, rest = argument.as_coeff_Add()
    return sympy.exp(constant) * sympy.exp(rest)


def unit(base):
    """The root of a sum, as a number times the root of the sum whose constant is 1 or -1."""
    size = abs(base.as_coeff_Add()[0])
    return sympy.sqrt(size) * sympy.sqrt(multiplied_out(base / size)) if size else sympy.sqrt(base)


METHODS = {
    'ours': ours,
    'pykan': lambda function, seed: theirs(function, seed, False),
    'pykan, our edges': lambda function, seed: theirs(function, seed, True),
}


def make(name, job, folder):
    """The record of a run."""
    function, method, seed = job
    return dict(function=function, method=method, seed=seed, **METHODS[method](FUNCTIONS[function], seed))


def list_runs(functions, methods):
    """{name: (function, method, seed)}"""
    runs = [(function, method, seed) for method in methods for function in functions for seed in SEEDS[method]]
    return {'{}, {}, seed={}'.format(*run): run for run in runs}


def is_right(run):
    """Whether the formula of a record is the function itself, as far as its error on the test says."""
    error = run['errors']['refit']
    return error is not None and error < RIGHT * FUNCTIONS[run['function']].deviation


def make_table():
    """table.md: how often each method is right, then each run."""
    check_machine(STUDY.read())
    runs = sorted(STUDY.read().values(), key=lambda run: (order_of(run), run['seed']))
    groups = {}
    for run in runs:
        groups.setdefault(order_of(run), []).append(run)
    parts = [make_summary(groups.values()), '### Each run', make_rows(runs)]
    return '\n\n'.join(parts) + '\n'


def order_of(run):
    return list(FUNCTIONS).index(run['function']), list(METHODS).index(run['method'])


def make_summary(groups):
    """A line for each function and method: the seconds are those of the processor."""
    heads = ['function', 'method', 'edges', 'right', 'search, CPU s', 'CPU s / edge', 'training, CPU s']
    rows = []
    for runs in groups:
        one, n_edges = runs[0], len(runs[0]['edges'])
        search, training = ([run['cpu_seconds'][part] for run in runs] for part in ('search', 'train'))
        right = f'{sum(map(is_right, runs))} of {len(runs)}'
        cells = [one['function'], one['method'], n_edges, right, mean_and_std(search, 2)]
        cells += [f'{sum(search) / len(runs) / n_edges:.2f}']
        rows.append([*cells, '–' if one['method'] == 'pykan, our edges' else mean_and_std(training, 1)])
    return '\n'.join(markdown_table(heads, rows, 'llrrrrr'))


def make_rows(runs):
    heads = ['function', 'method', 'seed', 'formula', 'error of the KAN', 'of the formulas', 'trained', 'right']
    heads += ['families of the edges']
    rows = []
    for run in runs:
        errors = [number(run['errors'][part]) for part in ('kan', 'formulas', 'refit')]
        families = ', '.join(edge[3] for edge in run['edges'])
        cells = [run['function'], run['method'], run['seed'], f'`{shortened(run["formula"])}`', *errors]
        rows.append([*cells, 'yes' if is_right(run) else 'no', families])
    return '\n'.join(markdown_table(heads, rows, 'llrlrrrll'))


def number(value):
    return 'none' if value is None else f'{value:.1e}'


def shortened(text, length=160):
    return text if len(text) <= length else f'{text[:length]} …'


def run(functions):
    """Make what has no record: where pykan is missing our part alone, and a line says so."""
    has_pykan = find_pykan() is not None
    if functions and not has_pykan:
        print(INSTALL)
    STUDY.run_all(list_runs(functions, METHODS if has_pykan else ['ours']), make)


if __name__ == '__main__':
    configure(globals())
    run(choose('functions', functions, FUNCTIONS))
    STUDY.show(make_table())
