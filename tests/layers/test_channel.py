"""Learned activations: the operator and its passes against the plain formula, the layer, and how a pass is chosen."""

import functools
import math
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import jvp, vmap

from helpers import ROOT, run_forked
from kan import ChannelSpline, KANLinear
from layers import channel, native, spline
from layers.channel import channel_spline, plain_channel_spline

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

needs_compiler = pytest.mark.skipif(not shutil.which('c++'), reason='the passes in C++ need a compiler')
ACTIVATIONS = [nn.SiLU(), nn.GELU(), nn.GELU('tanh'), nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Identity()]


def make(N=37, C=5, k=3, G=4, gated=True, irregular=False, dtype=torch.float32):
    """x, weight, knots, gradient of y. Some inputs are outside the knots, which differ from channel to channel."""
    steps = torch.arange(-k, G + k + 1, dtype=torch.promote_types(dtype, torch.float32))
    knots = torch.stack([-2 - i / 7 + (1.1 + i / 50) * steps for i in range(C)])
    if irregular:
        knots = (knots + 0.3 * torch.rand_like(knots)).sort(1).values
    x, weight, grad = 4 * torch.randn(N, (1 + gated) * C), torch.randn(C, G + k), torch.randn(N, C)
    return x.to(dtype), weight.to(dtype), knots, grad.to(dtype)


def results(function, x, weight, knots, grad, k=3, activation=ACTIVATIONS[0], gated=True):
    """y and the gradients of x and weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight, knots, k, activation, gated)
    return (y.detach(), *torch.autograd.grad(y, [x, weight], grad.to(y.dtype)))


def check(function, x, weight, knots, grad, tolerance=2e-6, **options):
    """The function against the plain formula in float64."""
    wide = (tensor.double() for tensor in (x, weight, knots, grad))
    expected = results(plain_channel_spline, *wide, **options)
    for a, b in zip(results(function, x, weight, knots, grad, **options), expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max())


# passes


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('k, G', [(0, 4), (1, 1), (2, 7), (3, 5), (4, 3)])
@pytest.mark.parametrize('irregular', [False, True])
def test_plain_passes(monkeypatch, k, G, gated, irregular):
    monkeypatch.setattr(channel, 'BACKEND', 'plain')
    monkeypatch.setattr(channel, 'CHUNK', 100)  # of several chunks
    check(channel_spline, *make(k=k, G=G, gated=gated, irregular=irregular), k=k, gated=gated)


@needs_compiler
@pytest.mark.parametrize(  # each is compiled, two seconds long, when a machine runs it for the first time
    'k, G, gated, activation',
    [
        (1, 6, True, nn.GELU()),
        (1, 1, False, nn.ReLU()),
        (2, 3, True, nn.SiLU()),
        (2, 7, False, nn.GELU('tanh')),
        (3, 5, True, nn.SiLU()),
        (3, 5, False, nn.Identity()),
        (3, 5, False, nn.Tanh()),
        (3, 5, False, nn.Sigmoid()),
    ],
)
def test_compiled_passes(monkeypatch, k, G, gated, activation):
    monkeypatch.setattr(channel, 'BACKEND', 'native')
    monkeypatch.setattr(channel, 'ROWS', 16)  # several blocks, and a part of one
    # 256 + 8 + 4 + 1 channels, with knots so far out that places are rounded to 1e-5
    arguments = make(N=70, C=269, k=k, G=G, gated=gated)
    check(channel_spline, *arguments, tolerance=1e-5, k=k, gated=gated, activation=activation)


@needs_compiler
@pytest.mark.parametrize('lacking', [1, 2, 3], ids=['no AVX-512', 'no AVX', 'no vectors'])
def test_processors_of_shorter_vectors(monkeypatch, empty_cache, lacking):
    monkeypatch.setattr(channel, 'BACKEND', 'native')
    monkeypatch.setenv('CXX', ' '.join(['c++', '-U__AVX512F__', '-U__AVX__', '-U__SSE__'][: 1 + lacking]))
    check(channel_spline, *make(N=9, C=29, k=2), k=2)
    assert [*empty_cache.glob('channel-*.so')]


@needs_compiler
@pytest.mark.parametrize('k', [1, 2, 3])
def test_on_a_knot_and_at_the_ends(monkeypatch, k):
    """The slope of order 1 is that to the right of a knot; beyond the last one nothing is left of the splines."""
    monkeypatch.setattr(channel, 'BACKEND', 'native')
    knots = torch.arange(-3.0 - k, 3 + k + 1).unsqueeze(0)
    x = torch.cat([knots[0], torch.tensor([-1e3, -50.0, 50.0, 1e3])]).unsqueeze(1)
    arguments = x, torch.randn(1, 6 + k), knots, torch.ones_like(x)
    activation = {1: nn.ReLU(), 2: nn.GELU('tanh'), 3: nn.Identity()}[k]  # those that are compiled above
    check(channel_spline, *arguments, k=k, gated=False, activation=activation)


@needs_compiler
@pytest.mark.parametrize('low, high, G', [(-1, 1, 7), (-4, 4, 5), (0, 3, 20)])
def test_slopes_of_order_1_on_rounded_knots(monkeypatch, low, high, G):
    """They jump there, and a place in knot spacings may be rounded to the other side."""
    monkeypatch.setattr(channel, 'BACKEND', 'native')
    knots = (torch.arange(-1, G + 2) * ((high - low) / G) + low).unsqueeze(0)
    x = torch.cat([knots[0], *(torch.nextafter(knots[0], torch.tensor(end)) for end in (-9.0, 9.0))]).unsqueeze(1)
    arguments = x, torch.randn(1, G + 1), knots, torch.ones_like(x)
    check(channel_spline, *arguments, tolerance=1e-5, k=1, gated=False, activation=nn.ReLU())


@needs_compiler
def test_several_gradients_at_once():
    """As torch.autograd.functional.jacobian asks for them with vectorize=True."""
    x, weight, knots, grad = make()
    x.requires_grad_()
    y = channel_spline(x, weight.requires_grad_(), knots, 3, nn.SiLU(), True)
    grads = torch.stack([grad, 2 * grad])
    for at_once, one in zip(
        torch.autograd.grad(y, [x, weight], grads, is_grads_batched=True, retain_graph=True),
        torch.autograd.grad(y, [x, weight], grad),
    ):
        torch.testing.assert_close(at_once, torch.stack([one, 2 * one]))


@needs_compiler
def test_a_nan_stays_one_and_spares_its_neighbours(monkeypatch):
    x, weight, knots, grad = make()
    x[3, 2] = torch.nan
    for backend in 'native', 'plain':
        monkeypatch.setattr(channel, 'BACKEND', backend)
        y, dx, dw = results(channel_spline, x, weight, knots, grad)
        assert y.isnan().nonzero().tolist() == [[3, 2]] and dw.isnan().any(1).nonzero().tolist() == [[2]]
        assert dx.isnan().nonzero().tolist() == [[3, 2], [3, 7]]


@pytest.mark.parametrize('backend', ['auto', 'plain'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_input_and_output_alone(monkeypatch, dtype, backend):
    monkeypatch.setattr(channel, 'BACKEND', backend)
    x, weight, knots, grad = make(dtype=dtype)
    for a, b in zip(
        results(channel_spline, x, weight, knots, grad), results(channel_spline, *make_float(x, weight, knots, grad))
    ):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))


def make_float(*tensors):
    return [tensor.float() for tensor in tensors]


def test_what_is_not_contiguous_and_what_is_empty():
    x, weight, knots, grad = make()
    check(channel_spline, x.t().contiguous().t(), weight.t().contiguous().t(), knots, grad.t().contiguous().t())
    y, dx, dw = results(channel_spline, x[:0], weight, knots, grad[:0])
    assert y.shape == (0, 5) and dx.shape == (0, 10) and not dw.any()


@needs_compiler
def test_a_view_whose_numbers_are_yet_to_be_negated():
    """As PyTorch has the imaginary part of a conjugate: its memory holds the opposite."""
    x, weight, knots, grad = make()
    negated, negated_grad = torch._neg_view(-x), torch._neg_view(-grad)
    arguments = weight, knots, 3, 'SiLU()', True
    assert torch.equal(channel.run_forward(negated, *arguments), channel.run_forward(x, *arguments))
    found = channel.run_backward(negated_grad, negated, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, channel.run_backward(grad, x, *arguments)))


def test_the_same_bits_with_any_number_of_threads():
    arguments, outcomes = make(N=900, C=70), []
    for threads in 1, 3, 1:
        torch.set_num_threads(threads)
        outcomes.append(results(channel_spline, *arguments))
    torch.set_num_threads(1)
    for found in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, outcomes[0]))


def test_the_gradient_of_weights_is_as_exact_as_they_are():
    """Also of an input in half precision, as under autocast."""
    x, weight, knots, grad = make(dtype=torch.bfloat16)
    weight = torch.randn(weight.shape)
    for backend in 'auto', 'plain':
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(channel, 'BACKEND', backend)
            _, dx, dw = results(channel_spline, x, weight, knots, grad)
        expected = results(channel_spline, x.double(), weight.double(), knots.double(), grad.double())[2]
        assert (dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(dw.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_weights_in_half_precision_are_rounded_once(monkeypatch):
    """And not for each chunk of rows."""
    monkeypatch.setattr(channel, 'BACKEND', 'plain')
    monkeypatch.setattr(channel, 'CHUNK', 1)
    arguments = make(N=300, dtype=torch.bfloat16)
    found, exact = (results(channel_spline, *given)[2] for given in (arguments, make_float(*arguments)))
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-5)


def test_the_backward_pass_keeps_the_input_alone():
    x, weight, knots, _ = make(N=500)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        channel_spline(x, weight.requires_grad_(), knots, 3, ACTIVATIONS[0], True)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr(), knots.data_ptr()}


# derivatives, compilers, exporters


@pytest.mark.parametrize('irregular', [False, True])
@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('k', [2, 3])
def test_finite_differences(k, gated, irregular):
    x, weight, knots, _ = make(4, 3, k, 2, gated, irregular, torch.float64)
    knots = knots.double()
    x, weight = x.requires_grad_(), weight.requires_grad_()

    def function(x, weight):
        return channel_spline(x, weight, knots, k, ACTIVATIONS[0], gated)

    assert gradcheck(function, (x, weight), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (x, weight), atol=1e-4)


def test_knots_that_train():
    x, weight, knots, _ = make(dtype=torch.float64, irregular=True)
    knots = knots.double().requires_grad_()
    assert gradcheck(lambda knots: channel_spline(x, weight, knots, 3, ACTIVATIONS[0], True), (knots,))


def test_transforms():
    x, weight, knots, grad = make(dtype=torch.float64)
    knots = knots.double()

    def function(x):
        return channel_spline(x, weight, knots, 3, ACTIVATIONS[0], True)

    y, tangent = jvp(function, (x,), (torch.ones_like(x),))
    step = (function(x + 1e-6) - function(x - 1e-6)) / 2e-6
    assert torch.allclose(y, function(x)) and torch.allclose(tangent, step, atol=1e-6)
    assert torch.allclose(vmap(lambda row: function(row.unsqueeze(0))[0])(x), function(x))
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.allclose(forward_ad.unpack_dual(dual).tangent, step, atol=1e-6)


def test_the_operators_pass_pytorchs_own_checks():
    x, weight, knots, _ = make()
    name = channel.name_of(ACTIVATIONS[0])
    arguments = x.requires_grad_(), weight.requires_grad_(), knots, 3, name, True
    torch.library.opcheck(channel.channel_forward, arguments)


def test_a_compiled_model_has_no_graph_break_and_equal_gradients():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.phi, self.last = nn.Linear(4, 12), ChannelSpline(6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.phi(self.first(x), gated=True))

    torch._dynamo.reset()
    model, x, outcomes = Gated(), torch.randn(9, 4), []
    nn.init.normal_(model.phi.spline_weight)
    for module in model, torch.compile(model, fullgraph=True, backend='aot_eager'):
        y = module(x)
        outcomes.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))))
    for a, b in zip(*outcomes):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# which backend


@needs_compiler
def test_the_backend_follows_the_input(monkeypatch):
    x, weight, knots, _ = make()
    choose = functools.partial(channel.choose_backend, gated=True)
    assert choose(x, weight, knots, 3, 'SiLU()') == 'native'
    assert choose(x.double(), weight.double(), knots, 3, 'SiLU()') == 'plain'
    assert choose(x, weight, make(irregular=True)[2], 3, 'SiLU()') == 'plain'
    assert choose(x, weight, knots, 4, 'SiLU()') == choose(x, weight, knots, 3, 'Softplus()') == 'plain'
    monkeypatch.setattr(channel, 'BACKEND', 'plain')
    assert choose(x, weight, knots, 3, 'SiLU()') == 'plain'


WITHOUT_A_COMPILER = """
import torch, warnings
from kan import ChannelSpline
phi, x = ChannelSpline(3), torch.randn(10, 3)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    phi(x).sum().backward()
    assert torch.allclose(phi(x), torch.nn.functional.silu(x), atol=1e-6)
messages = [str(warning.message) for warning in seen if 'C++' in str(warning.message)]
assert len(messages) == 1 and 'C++ cannot be compiled and run here' in messages[0] and chr(10) not in messages[0], messages
"""


@pytest.mark.parametrize('module', [channel, spline])
def test_a_backend_that_is_none_is_named(monkeypatch, module):
    monkeypatch.setattr(module, 'BACKEND', 'tritn')
    layer = ChannelSpline(64) if module is channel else KANLinear(64, 3)
    with pytest.raises(ValueError, match="BACKEND='tritn': expected one of auto, triton, native"):
        layer(torch.randn(1000, 64))


def test_without_a_compiler_the_plain_passes_run_after_one_warning(tmp_path):
    (tmp_path / 'script.py').write_text(WITHOUT_A_COMPILER)
    env = dict(CXX=f'{tmp_path}/no-compiler', XDG_CACHE_HOME=f'{tmp_path}/cache')
    done = run_forked(tmp_path, tmp_path / 'script.py', modules=str(ROOT), env=env)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    native.compile_once.cache_clear()
    yield tmp_path / 'kan-gpt'
    native.compile_once.cache_clear()


def compile_again(*name, **definitions):
    native.compile_once.cache_clear()
    return native.compile(*name, **definitions)


@pytest.fixture
def one(empty_cache, monkeypatch):
    """A file to compile, whose libraries are kept in an empty folder."""
    source = empty_cache.parent / 'one.cpp'
    source.write_text('extern "C" int number() { return NUMBER; }')
    monkeypatch.setattr(native, '__file__', str(empty_cache.parent / 'native.py'))
    return source


@needs_compiler
def test_a_library_is_kept_by_all_that_it_depends_on(empty_cache, one):
    assert native.compile('one.cpp', NUMBER=3).number() == 3
    (kept,) = empty_cache.iterdir()
    written = kept.stat().st_mtime_ns
    assert compile_again('one.cpp', NUMBER=3).number() == 3 and kept.stat().st_mtime_ns == written
    assert native.compile('one.cpp', NUMBER=4).number() == 4 and len(list(empty_cache.iterdir())) == 2
    one.write_text('extern "C" int number() { return 2 * NUMBER; }')
    assert compile_again('one.cpp', NUMBER=3).number() == 6 and len(list(empty_cache.iterdir())) == 3
    assert empty_cache.stat().st_mode & 0o077 == 0


@needs_compiler
def test_a_changed_header_is_compiled_anew(empty_cache, one):
    header = one.with_name('two.h')
    one.write_text('#include "two.h"\nextern "C" int number() { return TWO; }')
    for two in 2, 3:
        header.write_text(f'#define TWO {two}')
        assert compile_again('one.cpp').number() == two


@needs_compiler
def test_another_processor_gets_another_library(empty_cache, one, monkeypatch):
    """A compiler names the processor that it compiles for, on a home folder shared with other machines, too."""
    compiler = empty_cache.parent / 'compiler'
    compiler.write_text('#!/bin/sh\necho for $PROCESSOR >&2\nexec c++ "$@"')
    compiler.chmod(0o700)
    monkeypatch.setenv('CXX', str(compiler))
    for count, processor in (1, 'one'), (1, 'one'), (2, 'another'):
        monkeypatch.setenv('PROCESSOR', processor)
        assert compile_again('one.cpp', NUMBER=3).number() == 3 and len(list(empty_cache.iterdir())) == count


def test_code_that_does_not_compile_is_a_warning_of_one_line(empty_cache, one):
    one.write_text('no code')
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        assert native.compile('one.cpp') is None and native.compile('one.cpp') is None
    (warning,) = seen
    assert 'C++ cannot be compiled and run here' in str(warning.message) and '\n' not in str(warning.message)
    assert not list(empty_cache.iterdir())


# the layer


def test_a_new_layer_is_its_activation(monkeypatch):
    monkeypatch.setattr(channel, 'BACKEND', 'plain')
    x = 5 * torch.randn(3, 7, 4)
    for activation in ACTIVATIONS:
        phi = ChannelSpline(4, base_activation=activation)
        assert torch.allclose(phi(x), activation(x), atol=1e-6)
    gates = 5 * torch.randn(3, 7, 8)
    assert torch.allclose(
        ChannelSpline(4)(gates, gated=True), nn.functional.silu(gates[..., :4]) * gates[..., 4:], atol=1e-6
    )


def test_each_channel_has_its_function():
    """By the bases of the layer, and channels apart."""
    phi, x = ChannelSpline(3, grid_size=5, spline_order=2), 3 * torch.randn(50, 3)
    nn.init.normal_(phi.spline_weight)
    expected = nn.functional.silu(x) + (phi.b_splines(x) * phi.spline_weight).sum(-1)
    assert torch.allclose(phi(x), expected, atol=1e-5)
    moved = x.clone()
    moved[:, 1] += 1
    assert (phi(moved) != phi(x)).any(0).tolist() == [False, True, False]


def test_a_function_that_is_asked_for():
    phi, x = (
        ChannelSpline(2, grid_size=20, base_activation=nn.Identity),
        torch.linspace(-4, 4, 400).unsqueeze(1).expand(-1, 2),
    )
    wanted = torch.stack([torch.sin(x[:, 0]), x[:, 1].abs()], 1)
    with torch.no_grad():
        phi.spline_weight.copy_(phi.curve2coeff(x, (wanted - x).unsqueeze(-1))[0])
    assert (phi(x) - wanted).abs().max() < 0.1 and (phi(x) - wanted)[:, 0].abs().max() < 1e-3


@needs_compiler
@pytest.mark.parametrize('grid_eps', [1.0, 0.02])
def test_update_grid_keeps_the_function_over_the_data(grid_eps):
    phi, x = ChannelSpline(3, grid_eps=grid_eps), 1.5 * torch.randn(2000, 3)
    nn.init.normal_(phi.spline_weight)
    with torch.no_grad():
        before = phi(x)
        phi.update_grid(x)
        assert (phi(x) - before).square().mean() < 0.05 * before.var()
    inside = (phi.grid[:, 3] <= x.amin(0)) & (phi.grid[:, -4] >= x.amax(0))
    assert inside.all()
    even = channel.choose_backend(x, phi.spline_weight, phi.grid, 3, 'SiLU()', False) == 'native'
    assert even == (grid_eps == 1)


def test_refine_grid_keeps_the_function():
    phi, x = ChannelSpline(3, grid_size=4), 2 * torch.randn(100, 3)
    nn.init.normal_(phi.spline_weight)
    with torch.no_grad():
        before = phi(x)
        assert phi.refine_grid(8) < 1e-5 and phi.spline_weight.shape == (3, 11)
        assert torch.allclose(phi(x), before, atol=1e-5)


def test_regularisation():
    phi = ChannelSpline(4)
    assert phi.regularization_loss() == 0
    nn.init.ones_(phi.spline_weight)
    assert phi.regularization_loss(1, 0).item() == pytest.approx(4)
    assert phi.regularization_loss(0, 1).item() == pytest.approx(math.log(4), abs=1e-3)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(in_features=0), 'in_features must be at least 1'),
        (dict(grid_size=0), 'grid_size must be at least 1'),
        (dict(grid_range=(2, 1)), 'grid_range must be'),
        (dict(base_activation=nn.PReLU), 'must have no parameters'),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ChannelSpline(**dict(in_features=3) | settings)


def test_inputs_of_another_width():
    phi = ChannelSpline(3)
    gated = functools.partial(phi, gated=True)
    for call, width, wanted in (phi, 4, 3), (gated, 8, 6), (gated, 7, 6), (gated, 5, 6), (phi.update_grid, 2, 3):
        with pytest.raises(ValueError, match=f'expected {wanted} features'):
            call(torch.randn(5, width))
    for x in torch.randn(5, 4), torch.ones(5, 3, dtype=torch.long):
        with pytest.raises(ValueError, match='expected floating point numbers \\(N, 3\\)'):
            channel_spline(x, phi.spline_weight, phi.grid, 3, nn.SiLU())
    for knots, k in (phi.grid[:1], 3), (phi.grid, 2), (phi.grid[:, 1:], 3):
        with pytest.raises(ValueError, match='expected knots \\(3, '):
            channel_spline(torch.randn(5, 3), phi.spline_weight, knots, k, nn.SiLU())


@needs_compiler
def test_threads_that_ask_at_the_same_time_get_one_library(empty_cache, one):
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: native.compile('one.cpp', NUMBER=3), range(4)))
    assert len(set(map(id, libraries))) == 1 and libraries[0].number() == 3
    assert [path.suffix for path in empty_cache.iterdir()] == ['.so']


@needs_compiler
@pytest.mark.parametrize('size', [0, 0.5])
def test_a_part_of_a_library_is_never_loaded(empty_cache, one, size):
    """Loaded, it would end the process by a signal."""
    native.compile('one.cpp', NUMBER=3)
    (kept,) = empty_cache.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # not written over: this process has it in its memory
    kept.write_bytes(whole[: int(size * len(whole))])
    assert compile_again('one.cpp', NUMBER=3).number() == 3
    assert all(native.digest(path.read_bytes()) in path.name for path in empty_cache.iterdir())


@needs_compiler
def test_where_nothing_can_be_kept_a_library_lives_as_long_as_its_process(one, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    for cache in f'{tmp_path}/file', 'relative':
        monkeypatch.setenv('XDG_CACHE_HOME', cache)
        native.tell_once.cache_clear()
        with pytest.warns(UserWarning, match='compiled C.. is not kept'):
            assert compile_again('one.cpp', NUMBER=3).number() == 3
    assert not (tmp_path / 'kan-gpt').exists()


@needs_compiler
@pytest.mark.filterwarnings('ignore:compiled C')
def test_a_folder_that_others_can_write_to_is_not_trusted(empty_cache, one, monkeypatch):
    """Nor one in whose place they can put another; in a folder like /tmp they cannot."""
    assert native.own_folder() == empty_cache
    empty_cache.chmod(0o755)  # others may read
    assert native.own_folder() == empty_cache
    for folder, mode in (empty_cache, 0o777), (empty_cache.parent, 0o777), (empty_cache.parent, 0o770):
        before = folder.stat().st_mode
        folder.chmod(mode)
        with pytest.raises(OSError, match='others can write into'):
            native.own_folder()
        assert compile_again('one.cpp', NUMBER=4).number() == 4 and not list(empty_cache.iterdir())
        folder.chmod(before)
    empty_cache.parent.chmod(0o1777)
    assert native.own_folder() == empty_cache
    assert not native.is_safe(os.stat_result((0o40755, 0, 0, 0, os.getuid() + 1, 0, 0, 0, 0, 0)))  # another user's
    (empty_cache.parent / 'link').symlink_to(empty_cache.parent)
    monkeypatch.setenv('XDG_CACHE_HOME', str(empty_cache.parent / 'link'))
    assert native.own_folder() == empty_cache  # by a path that has no link to be changed


def test_a_layer_survives_a_copy_and_a_checkpoint(tmp_path):
    phi, x = ChannelSpline(3), torch.randn(5, 3)
    nn.init.normal_(phi.spline_weight)
    torch.save(phi.state_dict(), tmp_path / 'phi.pt')
    other = ChannelSpline(3)
    other.load_state_dict(torch.load(tmp_path / 'phi.pt'))
    assert torch.equal(other(x), phi(x))
