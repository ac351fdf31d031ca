"""The spline operator and its fused passes against the plain formula, and how it is chosen which of them runs."""

import functools
import importlib.util
import itertools
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from helpers import ENV, ROOT, run_forked
from kan import ChannelSpline, KANLinear
from layers import channel, native, spline
from layers.spline import plain_spline_linear, spline_linear

needs_compiler = pytest.mark.skipif(
    not (shutil.which('c++') or shutil.which('g++')), reason='torch.compile needs a C++ compiler'
)


pytestmark = pytest.mark.usefixtures('one_thread', 'seed')


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def make(N, I, O, k=3, G=5, dtype=torch.float32, irregular=False):
    """x, weight, knots, gradient of y. Some inputs are outside the knots, which differ from feature to feature."""
    steps = torch.arange(-k, G + k + 1.0, dtype=torch.promote_types(dtype, torch.float32))
    knots = torch.stack([-1 - i / 7 + (0.4 + i / 50) * steps for i in range(I)])
    if irregular:
        knots = (knots + 0.1 * torch.rand_like(knots)).sort(1).values
    x, weight, grad = 1.5 * torch.randn(N, I), torch.randn(O, (G + k + 1) * I), torch.randn(N, O)
    return x.to(dtype), weight.to(dtype), knots, grad.to(dtype)


def results(function, x, weight, knots, grad, k=3, activation=nn.SiLU(), dtype=None):  # noqa: B008
    """y and the gradients of x and weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight, knots, k, activation, dtype or x.dtype)
    return (y.detach(), *torch.autograd.grad(y, [x, weight], grad.to(y.dtype)))


def close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert (a.double() - b.double()).abs().max() <= tolerance * max(1, b.abs().max()), (
                (a.double() - b.double()).abs().max()
            )


def in_float64(x, weight, knots, grad, **options):
    return results(plain_spline_linear, x.double(), weight.double(), knots.double(), grad.double(), **options)


# every backend computes the plain formula

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('k, G', [(0, 4), (1, 1), (2, 7), (3, 5), (4, 3)])
@pytest.mark.parametrize('irregular', [False, True])
def test_plain_passes(k, G, dtype, irregular):
    x, weight, knots, grad = make(37, 5, 3, k, G, dtype, irregular)
    close(results(spline_linear, x, weight, knots, grad, k), in_float64(x, weight, knots, grad, k=k), TOLERANCES[dtype])


class Power(nn.Module):
    def __init__(self, exponent):
        super().__init__()
        self.exponent = exponent

    def forward(self, x):
        return x**self.exponent


def trace(monkeypatch):
    """Passes of torch.compile as it traces them, run by PyTorch itself."""
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    monkeypatch.setattr(spline, 'compiled', functools.cache(spline.compiled.__wrapped__))


@needs_compiler
@pytest.mark.parametrize(
    'backend, k, G, dtype, activation',
    [  # native-any is native on irregular knots
        ('native', 1, 6, torch.float32, nn.SiLU()),
        ('native', 2, 1, torch.float32, nn.GELU('tanh')),
        ('native', 3, 5, torch.float32, nn.SiLU()),
        ('native', 3, 5, torch.float32, Power(2)),
        ('native', 1, 6, torch.bfloat16, nn.Identity()),
        ('native', 2, 7, torch.bfloat16, Power(2)),
        ('native', 3, 5, torch.bfloat16, nn.SiLU()),
        ('native-any', 1, 6, torch.float32, nn.SiLU()),
        ('native-any', 2, 1, torch.float32, Power(2)),
        ('native-any', 3, 5, torch.float32, nn.SiLU()),
        ('native-any', 3, 5, torch.bfloat16, nn.SiLU()),
        ('compiled-eager', 2, 1, torch.float32, nn.GELU('tanh')),  # as torch.compile traces it, without a C++ compiler
        ('compiled-eager', 3, 5, torch.float32, nn.SiLU()),
        ('compiled-eager', 3, 5, torch.bfloat16, nn.SiLU()),
        ('compiled', 3, 6, torch.float32, nn.SiLU()),
        ('compiled', 2, 1, torch.float64, nn.GELU('tanh')),
        ('compiled', 3, 5, torch.float16, nn.SiLU()),
    ],
    ids=str,
)
def test_fused_passes(monkeypatch, backend, k, G, dtype, activation):
    backend, _, kind = backend.partition('-')
    irregular = kind == 'any'
    if kind == 'eager':
        trace(monkeypatch)
    monkeypatch.setattr(spline, 'BACKEND', backend)
    monkeypatch.setitem(spline.CHUNK_BYTES, backend, 1)  # chunks of 64 rows and less
    shapes = [(150, 19, 3), (64, 16, 1), (0, 4, 3)]
    if backend == 'native' or kind == 'eager':  # several tiles, and sizes of one
        shapes += [(40, 600, 2), (1, 33, 2), (70, 1, 2)]
    for N, I, O in shapes:
        x, weight, knots, grad = make(N, I, O, k, G, dtype, irregular)
        assert choose(x, knots, k, spline.name_of(activation), dtype) == backend
        actual = results(spline_linear, x, weight, knots, grad, k, activation)
        expected = in_float64(x, weight, knots, grad, k=k, activation=activation)
        close(actual, expected, TOLERANCES[dtype])
        again = results(spline_linear, x, weight, knots, grad, k, activation)
        assert all(torch.equal(a, b) for a, b in zip(actual, again))
    x, before, knots, grad = make(150, 19, 3, k, G, dtype, irregular)
    weight = before.clone()
    weight[0, -1] += 1  # of an activation, in an output of order ten
    with pytest.raises(AssertionError):  # the comparison notices one weight
        actual = results(spline_linear, x, weight, knots, grad, k, activation)
        close(actual, in_float64(x, before, knots, grad, k=k, activation=activation), TOLERANCES[dtype])


@needs_compiler
@pytest.mark.parametrize('irregular', [False, True], ids=['uniform', 'irregular'])
@pytest.mark.parametrize('activation', [*native.ACTIVATIONS, 'Mish()'])
def test_columns_of_every_activation(activation, irregular):
    """Also far outside the knots, at them, at several that coincide, and of what is no number."""
    made = spline.name_of(eval(f'nn.{activation}'))
    knots = torch.arange(-4.0, 9).repeat(8, 1)  # G = 6, k = 3
    if irregular:
        knots[:, 6:8] = knots[:, 5:6]
    x = torch.cat([torch.linspace(-6, 10, 500), torch.tensor([-80.0, -1e6, 1e6, -1e18, 1e18, 1e30, -0.0, -4, 8, 1])])
    x = x.repeat(8, 1).t().contiguous()
    x[3, 2] = torch.nan
    dcolumns = torch.randn(len(x), 10, 8)
    outcomes = []
    for backend in 'native', 'plain':
        make_columns, take_back = spline.passes(backend, knots, 3, made)
        outcomes.append((make_columns(x, torch.float32), take_back(dcolumns, x)))
    for actual, expected in zip(*outcomes):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6, equal_nan=True)


@needs_compiler
def test_bfloat16_is_rounded_to_the_nearest_and_to_even():
    special = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3e38, 3.4e38, 0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([torch.randn(10_000), special]).unsqueeze(1)
    make_columns, _ = spline.passes('native', torch.arange(5.0).unsqueeze(0), 1, spline.name_of(nn.Identity()))
    made, expected = make_columns(x, torch.bfloat16)[:, -1], x.bfloat16()
    assert made[-1].isnan() and torch.equal(made[:-1], expected[:-1])
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32)  # NaN that rounding would make infinite or 0
    assert make_columns(bits.view(torch.float32).unsqueeze(1), torch.bfloat16)[:, -1].isnan().all()


@needs_compiler
@pytest.mark.parametrize('k', [1, 2, 3])
def test_slopes_at_the_knots_are_those_of_the_plain_passes(k):
    """Of order 1 they jump there."""
    for G in range(1, 13):
        layer = KANLinear(32, 1, grid_size=G, spline_order=k)
        x, dcolumns = layer.grid.t().contiguous(), torch.randn(layer.grid.size(1), G + k + 1, 32)
        outcomes = [
            spline.passes(backend, layer.grid, k, spline.name_of(nn.SiLU()))[1](dcolumns, x)
            for backend in ('native', 'plain')
        ]
        torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


def test_tracers_of_real_tensors_see_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, x = KANLinear(4, 3), torch.randn(5, 4)
    traced = make_fx(lambda x: layer(x))(x)
    assert any('spline_linear' in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), layer(x))


@needs_compiler
@pytest.mark.parametrize('irregular', [False, True])
def test_native_passes_give_the_same_bits_on_any_number_of_threads(irregular):
    x, weight, knots, grad = make(150, 19, 3, irregular=irregular)
    make_columns, take_back = spline.passes('native', knots, 3, spline.name_of(nn.SiLU()))
    outcomes = []
    try:
        for threads in 1, 3:
            torch.set_num_threads(threads)
            outcomes.append((make_columns(x, torch.float32), take_back(torch.ones(150, 9, 19), x)))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


@needs_compiler
@pytest.mark.parametrize('x_dtype, dtype', [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_precision(monkeypatch, x_dtype, dtype):
    x, weight, knots, grad = make(100, 12, 5)
    x = x.to(x_dtype)
    expected = in_float64(x, weight, knots, grad)
    trace(monkeypatch)
    for backend in ('plain', 'native', 'compiled'):
        monkeypatch.setattr(spline, 'BACKEND', backend)
        actual = results(spline_linear, x, weight, knots, grad, dtype=dtype)
        assert [tensor.dtype for tensor in actual] == [dtype, x_dtype, torch.float32]
        close(actual, expected, 0.03)


def test_only_the_gradients_asked_for_are_computed():
    x, weight, knots, grad = make(20, 4, 3)
    _, dx, dw = results(spline_linear, x, weight, knots, grad)
    for need_x, need_w in (True, False), (False, True):
        leaves = x.clone().requires_grad_(need_x), weight.clone().requires_grad_(need_w)
        spline_linear(*leaves, knots, 3, nn.SiLU(), torch.float32).backward(grad)
        for leaf, expected, need in zip(leaves, (dx, dw), (need_x, need_w)):
            assert torch.equal(leaf.grad, expected) if need else leaf.grad is None


@needs_compiler
@pytest.mark.parametrize('backend', ['plain', 'native'])
def test_autocast_around_the_operator_changes_nothing(monkeypatch, backend):
    monkeypatch.setattr(spline, 'BACKEND', backend)
    x, weight, knots, grad = make(20, 4, 3)
    expected = results(spline_linear, x, weight, knots, grad)
    with torch.autocast('cpu', torch.bfloat16):
        actual = results(spline_linear, x, weight, knots, grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_activations_that_print_alike_are_not_taken_for_each_other():
    x, weight, knots, grad = make(20, 4, 3)
    square, cube = Power(2), Power(3)
    actual = [results(spline_linear, x, weight, knots, grad, activation=activation) for activation in (square, cube)]
    for result, activation in zip(actual, (square, cube)):
        close(result, in_float64(x, weight, knots, grad, activation=activation), 1e-5)
    assert spline.name_of(nn.SiLU()) == spline.name_of(nn.SiLU()) != spline.name_of(nn.GELU())


def test_an_activation_whose_forward_was_replaced():
    activation, x = nn.SiLU(), torch.randn(9, 4)
    activation.forward = torch.square
    assert spline.name_of(activation) != spline.name_of(nn.SiLU())
    layer = KANLinear(4, 3, base_activation=activation)
    nn.init.zeros_(layer.spline_weight)
    assert torch.allclose(layer(x), x.square() @ layer.base_weight.t(), atol=1e-5)


def test_knots_and_weights_of_other_shapes():
    x, weight, knots, _ = make(5, 4, 3)
    for wrong in (
        (x, weight, knots[:1]),
        (x[:, :3], weight, knots),
        (x, weight[:, :-1], knots),
        (x, weight, knots[:, 1:]),
    ):
        with pytest.raises(ValueError, match='do not fit'):
            spline_linear(*wrong, 3, nn.SiLU(), torch.float32)


def test_an_activation_without_state_is_named_by_its_type_and_settings():
    activations = pytest.importorskip('transformers.activations')
    assert spline.name_of(activations.NewGELUActivation()) == spline.name_of(activations.NewGELUActivation())
    assert spline.name_of(activations.NewGELUActivation()) != spline.name_of(activations.QuickGELUActivation())
    changing, x = Power(2), torch.randn(5)
    old = spline.name_of(changing)
    assert old == spline.name_of(Power(2)) != spline.name_of(Power(3))
    changing.exponent = 3
    assert spline.name_of(changing) == spline.name_of(Power(3))
    assert torch.equal(spline.ACTIVATIONS[old](x), x**2)


class Mode(nn.Module):
    def forward(self, x):
        return 2 * x if self.training else x


def test_an_activation_may_depend_on_the_mode():
    x, weight, knots, grad = make(20, 4, 3)
    for training in True, False:
        activation = Mode().train(training)
        actual = results(spline_linear, x, weight, knots, grad, activation=activation)
        close(actual, in_float64(x, weight, knots, grad, activation=activation), 1e-5)
        assert torch.equal(spline.ACTIVATIONS[spline.name_of(activation)](x), x * (1 + training))


def with_parameter():
    activation = Power(2)
    activation.scale = nn.Parameter(torch.ones(1))
    return activation


def with_buffer():
    activation = Power(2)
    activation.register_buffer('scale', torch.ones(1))
    return activation


def with_module():
    activation = Power(2)
    activation.inner = nn.Tanh()
    return activation


def with_hook():
    activation = nn.Tanh()
    activation.register_forward_hook(lambda module, inputs, output: 2 * output)
    return activation


@pytest.mark.parametrize('make_one', [with_parameter, with_buffer, with_module, with_hook, nn.PReLU])
def test_an_activation_with_state_is_named_by_itself(make_one):
    one, other = make_one(), make_one()
    assert spline.name_of(one) == spline.name_of(one) != spline.name_of(other)
    assert spline.ACTIVATIONS[spline.name_of(one)] is one and spline.ACTIVATIONS[spline.name_of(other)] is other


def test_classes_of_one_name_are_told_apart():
    def make_class(factor):
        class Scaled(nn.Module):
            def forward(self, x):
                return factor * x

        return Scaled

    x, weight, knots, grad = make(20, 4, 3)
    for factor in 2, 3:
        activation = make_class(factor)()
        actual = results(spline_linear, x, weight, knots, grad, activation=activation)
        close(actual, in_float64(x, weight, knots, grad, activation=activation), 1e-5)
        assert torch.equal(spline.ACTIVATIONS[spline.name_of(activation)](x), factor * x)
    assert spline.name_of(make_class(2)()) != spline.name_of(make_class(3)())


def another(name):
    """A copy of a file of layers, as export.py writes one."""
    module = importlib.util.spec_from_file_location(f'elsewhere.{name}', f'{ROOT}/layers/{name}.py')
    copy = importlib.util.module_from_spec(module)
    module.loader.exec_module(copy)
    return copy


def test_another_copy_of_the_file_leaves_the_operators_alone():
    x, weight, knots, _ = make(20, 4, 3)
    for one in spline, another('spline'):
        assert one.spline_linear_forward(x, weight, knots, 3, one.name_of(Power(5)), torch.float32).shape == (20, 3)
    assert another('channel').OPERATORS != channel.OPERATORS


def test_operators_pass_pytorchs_own_checks():
    x, weight, knots, grad = make(9, 4, 3)
    name = spline.name_of(nn.SiLU())
    x.requires_grad_()
    weight.requires_grad_()
    settings = (knots, 3, name, torch.float32)
    torch.library.opcheck(spline.spline_linear_forward, (x, weight, *settings))


def test_more_grids_than_the_compiler_counts(monkeypatch):
    monkeypatch.setattr(spline, 'BACKEND', 'compiled')
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    spline.compiled.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for G, (N, I) in itertools.product(range(1, 5), [(70, 5), (1, 5), (70, 1)]):
            x, weight, knots, grad = make(N, I, 2, k=1, G=G)
            close(results(spline_linear, x, weight, knots, grad, 1), in_float64(x, weight, knots, grad, k=1), 1e-5)
    spline.compiled.cache_clear()


# inside a compiled model


@needs_compiler
@pytest.mark.parametrize('autocast', [False, True])
def test_compiled_model_has_no_graph_break_and_equal_gradients(autocast):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), KANLinear(5, 7, bias=True), KANLinear(7, 2, spline_order=2))
    x, outcomes = torch.randn(11, 6), []
    for module in model, torch.compile(model, fullgraph=True):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = module(x)
        outcomes.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), list(model.parameters()))))
    close(outcomes[1], outcomes[0], 0.02 if autocast else 1e-5)


@needs_compiler
def test_compiled_layer_takes_a_transposed_input_and_compiles_once():
    layer, outcomes = KANLinear(6, 4), []
    compiled, counters = torch.compile(layer, fullgraph=True), torch._dynamo.utils.counters
    counters.clear()
    for module in layer, compiled, compiled:
        x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).t().requires_grad_()
        y = module(x)
        outcomes.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, layer.base_weight])))
    close(outcomes[1], outcomes[0], 1e-5)
    close(outcomes[2], outcomes[0], 1e-5)
    assert counters['stats']['unique_graphs'] == 1


# which backend


def choose(x, knots, k=3, activation='SiLU()', dtype=torch.float32):
    return spline.choose_backend(x, knots, k, activation, dtype)


@needs_compiler
def test_backend_follows_the_input_and_the_override(monkeypatch):
    _, _, knots, _ = make(1, 32, 1)
    small, large = torch.randn(100, 32), torch.randn(4096, 32)
    double, half = make(1, 32, 1, dtype=torch.float64)[2], torch.float16
    assert choose(small, knots) == choose(large, knots, dtype=torch.bfloat16) == 'native'
    assert choose(small, knots, dtype=half) == choose(small.double(), double, dtype=torch.float64) == 'plain'
    assert choose(large, knots, dtype=half) == choose(large.double(), double, dtype=torch.float64) == 'compiled'
    irregular = make(1, 32, 1, irregular=True)[2]
    assert choose(large, irregular) == 'native' and choose(large, irregular, dtype=half) == 'plain'
    assert choose(large, make(1, 32, 1, k=4)[2], k=4) == 'plain'
    assert choose(large, make(1, 32, 1, k=1)[2], k=1, dtype=half) == 'plain'
    monkeypatch.setattr(spline, 'BACKEND', 'plain')
    assert choose(large, knots) == 'plain'
    for backend in 'compiled', 'native':
        monkeypatch.setattr(spline, 'BACKEND', backend)
        assert choose(small, knots) == backend
        assert choose(small, irregular) == ('plain' if backend == 'compiled' else 'native')
    assert choose(large, knots, dtype=half) == choose(large.double(), double, dtype=torch.float64) == 'plain'


def test_triton_by_name_is_for_what_suits_it(monkeypatch):
    _, _, knots, _ = make(1, 32, 1)
    x, double = torch.randn(100, 32), make(1, 32, 1, dtype=torch.float64)[2]
    monkeypatch.setattr(spline, 'BACKEND', 'triton')
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert choose(x, knots) == 'triton' and choose(x.double(), double, dtype=torch.float64) == 'plain'
    assert choose(x, knots, activation='ELU(alpha=1.0)') == 'plain'
    monkeypatch.delenv('TRITON_INTERPRET')
    assert choose(x, knots) == 'plain'  # there is no GPU under x
    monkeypatch.setattr(channel, 'BACKEND', 'triton')
    phi = ChannelSpline(32)
    assert channel.choose_backend(x, phi.spline_weight, phi.grid, 3, 'SiLU()', False) == 'plain'
    assert torch.equal(phi(x), nn.functional.silu(x))


def test_triton_that_fails_is_said_once_and_passed_over(monkeypatch):
    spline_triton = pytest.importorskip('layers.spline_triton', exc_type=ImportError)
    monkeypatch.setattr(spline_triton, 'forward', lambda *arguments: 1 / 0)
    spline.triton_works.cache_clear()
    with pytest.warns(UserWarning, match='Triton kernels do not work here.*ZeroDivisionError') as warned:
        assert not spline.triton_works('SiLU()', torch.device('meta'), torch.float32)
        assert not spline.triton_works('SiLU()', torch.device('meta'), torch.float32)
    assert len(warned) == 1
    assert not spline.triton_works('Softplus()', torch.device('meta'), torch.float32)
    spline.triton_works.cache_clear()


WITHOUT_A_COMPILER = """
import torch, warnings
from kan import KANLinear
from layers import spline
torch.manual_seed(0)
layer, x = KANLinear(64, 3), torch.randn(1024, 64)
for dtype, message in (torch.float32, 'C++ cannot be compiled'), (torch.float16, 'torch.compile does not work here'):
    spline.BACKEND = 'auto'
    with warnings.catch_warnings(record=True) as seen, torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        warnings.simplefilter('always')
        y = layer(x)
        layer(x).sum().backward()
    messages = [str(warning.message) for warning in seen if 'slower' in str(warning.message)]
    assert len(messages) == 1 and message in messages[0] and chr(10) not in messages[0], messages
    spline.BACKEND = 'plain'
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        assert torch.equal(layer(x), y)
"""


def test_without_a_compiler_the_plain_passes_run_after_one_warning(tmp_path):
    (tmp_path / 'script.py').write_text(WITHOUT_A_COMPILER)
    caches = dict(XDG_CACHE_HOME=f'{tmp_path}/cache', TORCHINDUCTOR_CACHE_DIR=f'{tmp_path}/cache')
    env = dict(CXX=f'{tmp_path}/no-compiler', PATH=str(tmp_path), **caches)
    done = run_forked(tmp_path, tmp_path / 'script.py', modules=str(ROOT), env=env)
    assert done.returncode == 0, done.stderr


def test_importing_kernels_imports_neither_triton_nor_the_compiler():
    names = ('triton', 'torch._inductor.compile_fx', 'layers.spline_triton', 'layers.channel_triton')
    code = f'import sys, kan; sys.exit(any(name in sys.modules for name in {names}))'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=ENV).returncode == 0


def test_gradients_of_weights_in_bfloat16_are_added_up_in_float32(monkeypatch):
    monkeypatch.setattr(spline, 'BACKEND', 'plain')
    monkeypatch.setitem(spline.CHUNK_BYTES, 'plain', 1)  # 64 rows at a time
    x, weight, knots, _ = make(12800, 5, 3, dtype=torch.bfloat16)
    found = []
    for function, w in (spline_linear, weight), (plain_spline_linear, weight.double()):
        w.requires_grad_()
        function(x.to(w.dtype), w, knots, 3, nn.SiLU(), w.dtype).sum().backward()
        found.append(w.grad.double())
    assert (found[0] - found[1]).abs().max() < 0.01 * found[1].abs().max()
