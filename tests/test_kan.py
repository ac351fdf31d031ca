"""KAN layers against scipy's B-splines, efficient-kan and numpy's least squares."""

import contextlib
import copy
import functools
import math
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from scipy.interpolate import BSpline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import ROOT, run_group
from kan import KAN, ChannelSpline, KANLinear
from layers import spline
from layers.generation import packed_weights

I, O = 4, 3
NAMES = ['base_weight', 'spline_weight', 'spline_scaler', 'grid']


pytestmark = pytest.mark.usefixtures('one_thread', 'seed')


@pytest.fixture
def peer():
    """efficient-kan's layer."""
    return pytest.importorskip('kan_gpt.efficient_kan.model').KANLinear


def make_knots(kind, k, G=5):
    """(I, G + 2k + 1) in float64, each feature with its own."""
    steps = torch.arange(-k, G + k + 1, dtype=torch.float64)
    knots = torch.stack([-1 - i / 3 + (0.4 + i / 7) * steps for i in range(I)])
    if kind == 'irregular':
        knots = (knots + 0.15 * torch.rand_like(knots)).sort(1).values
    if kind == 'repeated':
        knots[:, k + 2] = knots[:, k + 1]
    return knots


def make_inputs(knots, n=50):
    """Rows inside and outside the knots, and every knot itself; (n + P + 8, I)."""
    spread = (knots.amax(1) - knots.amin(1)) * 1.3
    inside = knots.amin(1) + (torch.rand(n, knots.size(0), dtype=knots.dtype) - 0.12) * spread
    exact = (
        torch.tensor([-1, -0.6, 0.2, 0, 1, -2.2, 2.2, 100], dtype=knots.dtype).unsqueeze(1).expand(-1, knots.size(0))
    )
    return torch.cat([inside, knots.t(), exact])


def make_layer(k, knots=None, dtype=torch.float64, **kwargs):
    """A layer whose three paths are all of order one."""
    layer = KANLinear(I, O, spline_order=k, **kwargs).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        if knots is not None:
            layer.grid.copy_(knots)
    return layer


def scipy_bases(x, knots, k):
    """(N, I), (I, P) -> (N, I, K). Knots added on both sides let scipy know every basis on its whole support."""
    x, knots = x.detach().double().numpy(), knots.double().numpy()
    features = []
    for i in range(x.shape[1]):
        t = np.concatenate([knots[i, 0] - np.arange(k, 0, -1.0), knots[i], knots[i, -1] + np.arange(1.0, k + 1)])
        bases = np.eye(len(t) - 1 - k)[:, k : len(t) - 1 - 2 * k]
        spline = BSpline(t, bases, k, extrapolate=False)(np.clip(x[:, i], t[0], t[-1]))
        inside = (x[:, i] >= knots[i, 0]) & (x[:, i] < knots[i, -1])
        features.append(np.where(inside[:, None], spline, 0))
    return torch.from_numpy(np.stack(features, 1))


def close(a, b, tolerance):
    """Equal up to `tolerance`, absolute below one and relative to the largest value above it."""
    assert a.shape == b.shape
    if a.numel():
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), f'largest difference {(a - b).abs().max():.3g}'


def gradients(layer, x, g):
    """Output, and the gradients of the input and of every parameter under the output gradient g."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return {
        'y': y.detach(),
        **dict(zip(['x', *dict(layer.named_parameters())], torch.autograd.grad(y, [x, *layer.parameters()], g))),
    }


# bases


@pytest.mark.parametrize('kind', ['uniform', 'irregular', 'repeated'])
@pytest.mark.parametrize('k', range(5))
def test_bases_are_those_of_scipy(k, kind):
    knots = make_knots(kind, k)
    x = make_inputs(knots)
    expected = scipy_bases(x, knots, k)
    assert expected.sum() > 50
    close(spline.recursive_bases(x, knots, k).transpose(1, 2), expected, 1e-12)
    close(make_layer(k, knots).b_splines(x), expected, 1e-12)
    if kind == 'uniform':
        close(spline.uniform_bases(x, knots, k).transpose(1, 2), expected, 1e-12)


@pytest.mark.parametrize('k', range(5))
def test_closed_form_in_float32_equals_recursion(k):
    knots = make_knots('uniform', k).float()
    x = make_inputs(knots)
    close(spline.uniform_bases(x, knots, k), spline.recursive_bases(x, knots, k), 2e-6)


@pytest.mark.parametrize('kind', ['uniform', 'irregular'])
@pytest.mark.parametrize('k', range(5))
def test_bases_sum_to_one_on_the_grid_and_to_zero_outside_the_knots(k, kind):
    knots = make_knots(kind, k)
    layer = make_layer(k, knots)
    low, high = knots[:, k], knots[:, -1 - k]
    inside = low + (high - low) * torch.linspace(0, 0.999, 40, dtype=torch.float64).unsqueeze(1)
    close(layer.b_splines(inside).sum(-1), torch.ones(40, I, dtype=torch.float64), 1e-12)
    outside = torch.stack([knots[:, 0] - 1e-9, knots[:, -1] + 1e-9, knots[:, -1] + 1e9])
    close(layer.b_splines(outside), torch.zeros(3, I, layer.grid_size + k, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize('kind', ['uniform', 'irregular'])
def test_uniform_knots_are_recognised(kind):
    for dtype in (torch.float64, torch.float32):
        assert spline.are_uniform(make_knots(kind, 3).to(dtype)) == (kind == 'uniform')
    mixed = make_knots('uniform', 3)
    mixed[-1, 4] += 1e-3
    assert not spline.are_uniform(mixed)
    assert not spline.are_uniform(torch.ones(I, 12))


def test_a_moved_grid_stays_itself_in_half_precision():
    """Its knots are off by a few roundings of bfloat16, which are large parts of their spacing."""
    for G in 5, 20, 40:
        layer = KANLinear(2, 3, grid_size=G)
        assert spline.are_uniform(layer.grid.half()) and (G > 5 or spline.are_uniform(layer.grid.bfloat16()))
        layer.update_grid(2 * torch.rand(5000, 2))
        for dtype in torch.bfloat16, torch.float16:
            assert not spline.are_uniform(layer.grid.to(dtype))


def test_grids_are_moved_whatever_the_default_dtype():
    layer, x = KANLinear(3, 2), torch.randn(1000, 3)
    twin = copy.deepcopy(layer)
    layer.update_grid(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        twin.update_grid(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(layer.grid, twin.grid)


def test_bases_are_of_floating_point_numbers():
    with pytest.raises(ValueError, match='floating point'):
        KANLinear(3, 2).b_splines(torch.ones(5, 3, dtype=torch.long))


def test_no_rows_have_no_bases():
    assert KANLinear(3, 2).b_splines(torch.zeros(2, 0, 3)).shape == (2, 0, 3, 8)


# the layer against references


@pytest.mark.parametrize('kind', ['uniform', 'irregular'])
@pytest.mark.parametrize('k', range(5))
def test_output_is_that_of_scipy_and_numpy(k, kind):
    knots = make_knots(kind, k)
    layer = make_layer(k, knots, bias=True)
    x = make_inputs(knots)
    base, spline, scaler, bias = (
        p.detach().numpy() for p in (layer.base_weight, layer.spline_weight, layer.spline_scaler, layer.bias)
    )
    silu = x.numpy() / (1 + np.exp(-x.numpy()))
    expected = silu @ base.T + np.einsum('nim,oim,oi->no', scipy_bases(x, knots, k).numpy(), spline, scaler) + bias
    close(layer(x), torch.from_numpy(expected), 1e-12)


@pytest.mark.parametrize('kind', ['uniform', 'irregular'])
@pytest.mark.parametrize('k', range(4))
def test_gradients_are_those_of_finite_differences(k, kind):
    knots = make_knots(kind, k)
    layer = make_layer(k, knots, bias=True)
    middles = (knots[:, 1:] + knots[:, :-1]).t() / 2
    x = torch.cat([middles, knots.amin(1) - torch.ones(1, I), knots.amax(1) + torch.ones(1, I)]).requires_grad_()
    names, parameters = zip(*layer.named_parameters())

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize('grid', ['initial', 'uniform', 'updated'])
@pytest.mark.parametrize('k', [1, 2, 3])
def test_output_and_gradients_are_those_of_efficient_kan(peer, k, grid, dtype, tolerance):
    theirs = peer(I, O, spline_order=k).to(dtype)
    ours = make_layer(k, dtype=dtype)
    if grid == 'uniform':  # to the last bit of the dtype: the closed form acts
        ours.grid.copy_(torch.linspace(-1 - 0.4 * k, 1 + 0.4 * k, 6 + 2 * k, dtype=dtype).expand(I, -1))
    if grid == 'updated':
        theirs.update_grid(torch.randn(60, I, dtype=dtype))
        ours.grid.copy_(theirs.grid)
    assert spline.basis_function(ours.grid) is (
        spline.recursive_bases
        if grid == 'updated' or grid + str(dtype) == 'initialtorch.float64'
        else spline.uniform_bases
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = make_inputs(ours.grid)
    g = torch.randn(x.size(0), O, dtype=dtype)
    expected = gradients(theirs, x, g)
    for name, value in gradients(ours, x, g).items():
        close(value, expected[name], tolerance)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_state_dicts_are_those_of_efficient_kan(peer, k):
    ours, theirs = KANLinear(I, O, spline_order=k, grid_range=(-2, 3)), peer(I, O, spline_order=k, grid_range=[-2, 3])
    assert list(ours.state_dict()) == list(theirs.state_dict()) == NAMES
    assert [p.shape for p in ours.state_dict().values()] == [p.shape for p in theirs.state_dict().values()]
    close(ours.grid, theirs.grid, 1e-7)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    x = make_inputs(theirs.grid)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    close(ours(x), theirs(x), 1e-5)
    ours = KANLinear(I, O, spline_order=k, enable_standalone_scale_spline=False)
    theirs = peer(I, O, spline_order=k, enable_standalone_scale_spline=False)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    close(ours(x), theirs(x), 1e-5)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_bases_and_coefficients_are_those_of_efficient_kan(peer, k):
    ours, theirs = make_layer(k), peer(I, O, spline_order=k).double()
    theirs.load_state_dict(ours.state_dict())
    x = make_inputs(ours.grid)
    close(ours.b_splines(x), theirs.b_splines(x), 1e-12)
    close(ours.scaled_spline_weight, theirs.scaled_spline_weight, 1e-12)
    x, y = torch.rand(200, I, dtype=torch.float64) * 2 - 1, torch.randn(200, I, O, dtype=torch.float64)
    close(ours.curve2coeff(x, y), theirs.curve2coeff(x, y), 1e-9)


def test_coefficients_of_too_few_points_go_through_them():
    layer = make_layer(3)
    x, y = torch.rand(4, I, dtype=torch.float64) * 2 - 1, torch.randn(4, I, O, dtype=torch.float64)
    close(torch.einsum('nim,oim->nio', layer.b_splines(x), layer.curve2coeff(x, y)), y, 1e-6)


def test_changing_the_grid_in_place_changes_the_bases():
    layer = make_layer(3, make_knots('uniform', 3))
    x, knots = make_inputs(layer.grid), make_knots('irregular', 3)
    layer(x)
    layer.load_state_dict({**layer.state_dict(), 'grid': knots})
    twin = make_layer(3, knots)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), twin(x))


@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=['deepcopy', 'pickle']
)
def test_copies_of_an_updated_layer_use_its_grid(copied):
    layer, x = make_layer(3, make_knots('uniform', 3)), torch.randn(50, I, dtype=torch.float64)
    layer(x)
    layer.update_grid(x)
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    assert spline.basis_function(twin.grid) is spline.recursive_bases


WAYS = {
    'data': lambda grid, knots: grid.data.copy_(knots),
    'set data': lambda grid, knots: setattr(grid, 'data', knots.clone()),
    'numpy': lambda grid, knots: np.copyto(grid.numpy(), knots.numpy()),
    'a moving average': lambda grid, knots: grid.data.lerp_(knots, 1.0),
    'a view': lambda grid, knots: grid.detach().view(-1).copy_(knots.view(-1)),
}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', ['irregular', 'uniform'])
def test_a_grid_that_is_written_to_in_any_way_is_the_one_that_acts(way, kind):
    """The same state dict gives the same output, forward and backward."""
    other = {'irregular': 'uniform', 'uniform': 'irregular'}[kind]
    layer, knots = make_layer(3, make_knots(other, 3)), make_knots(kind, 3)
    x = make_inputs(layer.grid)
    g = torch.randn(x.size(0), O, dtype=torch.float64)
    gradients(layer, x, g)
    WAYS[way](layer.grid, knots)
    twin = make_layer(3, knots)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.grid, knots)
    found, expected = gradients(layer, x, g), gradients(twin, x, g)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


GRID_OF_ONE_PROCESS = """
import sys
import torch
import torch.distributed as dist
from kan import KANLinear
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group('gloo')
torch.manual_seed(0)
layer, x = DistributedDataParallel(KANLinear(4, 3)), torch.randn(50, 4)
layer(x)
if dist.get_rank() == 0:
    layer.module.update_grid(x)
y, twin = layer(x), KANLinear(4, 3)
twin.load_state_dict(layer.module.state_dict())
torch.save([twin.grid, y, twin(x)], sys.argv[1] + str(dist.get_rank()))
dist.barrier()
"""


def test_a_grid_that_another_process_has_updated(tmp_path):
    """DistributedDataParallel takes the buffers of process 0 to the others."""
    (tmp_path / 'script.py').write_text(GRID_OF_ONE_PROCESS)
    done = run_group(tmp_path, tmp_path / 'script.py', tmp_path / 'y', modules=str(ROOT))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    (grid, *outputs), (other, *others) = (torch.load(tmp_path / f'y{rank}') for rank in range(2))
    assert torch.equal(grid, other) and not torch.equal(grid, KANLinear(4, 3).grid)
    assert torch.equal(*outputs) and torch.equal(*others)


@pytest.mark.parametrize('made_inside', [True, False])
def test_update_grid_in_inference_mode_changes_the_bases(made_inside):
    layer, x = KANLinear(I, O), torch.randn(50, I)
    with torch.inference_mode():
        layer = KANLinear(I, O) if made_inside else layer
        layer(x)
        layer.update_grid(x)
        assert spline.basis_function(layer.grid) is spline.recursive_bases


# shapes, dtypes, arguments


@pytest.mark.parametrize('k', [0, 1, 3])
@pytest.mark.parametrize(
    'x',
    [
        torch.randn(I),
        torch.randn(1, I),
        torch.randn(0, I),
        torch.randn(2, 0, I),
        torch.randn(2, 3, 5, I),
        torch.randn(I, 7).t(),
        torch.randn(5, 2, I).transpose(0, 1),
        torch.randn(6, 2 * I)[:, ::2],
        torch.randn(1, I).expand(9, I),
    ],
    ids=lambda x: f'{tuple(x.shape)}{tuple(x.stride())}',
)
def test_any_shape_gives_the_rows_of_a_matrix(x, k):
    layer, g = make_layer(k, dtype=torch.float32, bias=True), torch.randn(*x.shape[:-1], O)
    actual, expected = gradients(layer, x, g), gradients(layer, x.reshape(-1, I).contiguous(), g.reshape(-1, O))
    assert actual['y'].shape == (*x.shape[:-1], O)
    for name in actual:
        close(actual[name].reshape(expected[name].shape), expected[name], 1e-6)


def test_order_zero_is_steps_and_passes_no_gradient_through_them():
    layer = make_layer(0, base_activation=nn.Identity)
    x = torch.tensor([[-1.0], [-0.61], [-0.59], [0.99], [1.0], [-1.01]], dtype=torch.float64).expand(-1, I)
    bases = layer.b_splines(x)[:, 0]
    assert bases.argmax(-1)[:4].tolist() == [0, 0, 1, 4] and bases.sum(-1).tolist() == [1, 1, 1, 1, 0, 0]
    grads = gradients(layer, x, torch.ones(6, O, dtype=torch.float64))
    close(grads['x'], layer.base_weight.sum(0).expand(6, I), 1e-12)
    assert grads['spline_weight'].abs().sum() > 0


@pytest.mark.parametrize('activation', [nn.Identity, nn.GELU, nn.ReLU])
def test_base_activation_is_the_one_asked_for(activation):
    layer = make_layer(3, base_activation=activation)
    nn.init.zeros_(layer.spline_weight)
    x, g = make_inputs(layer.grid), torch.randn(70, O, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = activation()(leaf) @ layer.base_weight.detach().t()
    actual = gradients(layer, x, g)
    close(actual['y'], y.detach(), 1e-12)
    close(actual['x'], torch.autograd.grad(y, leaf, g)[0], 1e-12)


def test_base_activation_with_parameters_is_refused():
    with pytest.raises(ValueError, match='PReLU'):
        KANLinear(I, O, base_activation=nn.PReLU)


def test_base_activation_that_changes_its_input_is_refused():
    with pytest.raises(ValueError, match='inplace'):
        KANLinear(I, O, base_activation=lambda: nn.SiLU(inplace=True))


def test_bias_is_added_once():
    layer, x = make_layer(3, bias=True), torch.randn(5, I, dtype=torch.float64)
    y = layer(x).detach()
    with torch.no_grad():
        layer.bias += torch.arange(O)
    close(layer(x) - y, torch.arange(O, dtype=torch.float64).expand(5, O), 1e-12)
    assert KANLinear(I, O).bias is None and not KANLinear(I, O, bias=True).bias.any()


def test_autocast_computes_in_bfloat16_close_to_float32():
    layer = make_layer(3, dtype=torch.float32, bias=True)
    x = make_inputs(layer.grid[:, 3:-3])
    g = torch.randn(x.size(0), O)
    expected = gradients(layer, x[:-1], g[:-1])
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        actual = gradients(layer, x[:-1], g[:-1].bfloat16())
    for name in expected:
        assert name == 'y' or actual[name].dtype == torch.float32
        close(actual[name].float(), expected[name], 0.02)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_layer_in_half_precision_is_close_to_float32(dtype, tolerance):
    layer = make_layer(3, dtype=dtype)
    twin = make_layer(3, dtype=torch.float32)
    twin.load_state_dict(layer.state_dict())
    x, g = torch.randn(40, I).to(dtype), torch.randn(40, O).to(dtype)
    expected = gradients(twin, x.float(), g.float())
    for name, value in gradients(layer, x, g).items():
        assert value.dtype == dtype
        close(value.float(), expected[name], tolerance)


def test_bases_in_bfloat16_sum_to_one():
    layer, x = KANLinear(I, O), (torch.rand(100, I) * 2 - 1).bfloat16()
    bases = layer.b_splines(x)
    assert bases.dtype == torch.bfloat16
    rounded_once = layer.b_splines(x.float()).bfloat16()
    assert torch.equal(bases, rounded_once)


def test_wrong_number_of_features_is_named():
    layer = KANLinear(I, O)
    for call in (layer, layer.b_splines, layer.update_grid, lambda x: layer.curve2coeff(x, torch.zeros(2, 5, O))):
        with pytest.raises(ValueError, match=r'expected 4 features .* \(2, 5\)'):
            call(torch.zeros(2, 5))


@pytest.mark.parametrize(
    'kwargs', [dict(grid_size=0), dict(spline_order=-1), dict(grid_range=(1, 1)), dict(grid_range=(2, -2))]
)
def test_impossible_grid_is_refused(kwargs):
    with pytest.raises(ValueError, match=r'grid_(size|range) must be .* got'):
        KANLinear(I, O, **kwargs)


def test_updating_the_grid_without_data_is_refused():
    with pytest.raises(ValueError, match='at least one row'):
        KANLinear(I, O).update_grid(torch.zeros(0, I))


@pytest.mark.parametrize('value, words', [(math.nan, '1 NaN and 0 infinite'), (-math.inf, '0 NaN and 1 infinite')])
def test_updating_the_grid_with_what_is_not_finite_changes_nothing(value, words):
    layer, x = KANLinear(I, O), torch.randn(20, I)
    before = copy.deepcopy(layer.state_dict())
    x[3, 1] = value
    with pytest.raises(ValueError, match=words):
        layer.update_grid(x)
    assert all(torch.equal(p, before[name]) for name, p in layer.state_dict().items())


@pytest.mark.parametrize(
    'given',
    [
        *(nn.GELU, nn.GELU(), torch.nn.functional.gelu, 'gelu', 'GELU', lambda: nn.GELU(), lambda x: nn.GELU()(x)),
        lambda *args, **settings: nn.functional.gelu(*args, **settings),  # as a decorator leaves a function
        lambda *args: nn.functional.gelu(args[0]),
        lambda x=None: x if x is None else nn.functional.gelu(x),
    ],
)
def test_an_activation_is_given_in_any_way(given):
    layer, expected = KANLinear(I, O, base_activation=given), KANLinear(I, O, base_activation=nn.GELU)
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(7, I, requires_grad=True)
    for ours, theirs in zip(
        gradients(layer, x, torch.ones(7, O)).values(), gradients(expected, x, torch.ones(7, O)).values()
    ):
        close(ours, theirs, 1e-6)


@pytest.mark.parametrize(
    'given', ['gleu', 3, None, dict, 'linear', 'threshold', 'MultiheadAttention', 'sequential', nn.Linear]
)
def test_what_is_no_activation_is_named(given):
    with pytest.raises(ValueError, match=re.escape(f'got {given!r}')):
        KANLinear(I, O, base_activation=given)


def test_a_function_that_fails_to_make_an_activation_says_so():
    with pytest.raises(NameError, match='undefined'):
        KANLinear(I, O, base_activation=lambda: nn.Softplus(beta=undefined))  # noqa: F821
    for given in lambda: 3, lambda: nn.functional.gelu:
        with pytest.raises(ValueError, match=r'a name \(.silu.\), got <function'):
            KANLinear(I, O, base_activation=given)
    with pytest.raises(ValueError, match='act on each number by itself, always alike, got <function softmax'):
        KANLinear(I, O, base_activation=nn.functional.softmax)


def test_on_the_meta_device_there_is_nothing_to_set():
    with torch.device('meta'):
        layer = KANLinear(I, O)
    layer.to_empty(device='cpu')
    layer.reset_parameters()
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    expected = KANLinear(I, O)
    assert all(torch.equal(p, q) for p, q in zip(layer.state_dict().values(), expected.state_dict().values()))


def test_activations_are_made_by_functions_and_names():
    make = functools.partial(nn.Sequential, nn.SiLU(), nn.Tanh())
    for given, expected in (make, make()), ('identity', nn.Identity()), (torch.tanh, nn.Tanh()):
        layer, x = KANLinear(I, O, base_activation=given), torch.randn(5, I)
        assert torch.equal(layer.base_activation(x), expected(x))


BY_EXTREMES = (
    lambda x: x / x.max(),
    lambda x: x / x.abs().max(),
    lambda x: x - x.amin(-1, keepdim=True),
    lambda x: x.cummax(-1).values,
)


@pytest.mark.parametrize(
    'given', ['softmax', nn.Softmax(-1), nn.Module, lambda x: x - x.mean(), lambda x: x.sum(), *BY_EXTREMES]
)
def test_an_activation_that_mixes_numbers_is_refused(given):
    with pytest.raises(ValueError, match='base_activation must act on each number by itself'):
        KANLinear(I, O, base_activation=given)


RANDOM = nn.Dropout(0.1).eval(), nn.Sequential(nn.SiLU(), nn.Dropout(0.01)).eval(), nn.RReLU().eval()


@pytest.mark.parametrize('given', [lambda x: x.cumsum(-1), lambda x: x * torch.arange(x.size(-1)), *RANDOM])
def test_an_activation_that_is_random_or_looks_at_places_is_refused(given):
    with pytest.raises(ValueError, match='base_activation must act on each number by itself, always alike'):
        KANLinear(I, O, base_activation=given)


@pytest.mark.parametrize('layer', [KANLinear, ChannelSpline])
@pytest.mark.parametrize(
    'given',
    [
        torch.relu_,
        lambda x: F.silu(x, inplace=True),
        lambda x: x.clamp_(-3, 3),  # which leaves small numbers
        nn.Sequential(nn.ReLU(inplace=True)),
        nn.SiLU(inplace=True),
        nn.Hardtanh(-3, 3, inplace=True),
        nn.Threshold(-5.0, 0.0, inplace=True),
    ],
)
def test_an_activation_that_changes_its_input_is_refused(layer, given):
    with pytest.raises(ValueError, match='base_activation must not change its input'):
        layer(*[I, O][: 2 if layer is KANLinear else 1], base_activation=given)


@pytest.mark.parametrize('kind', [nn.Hardswish, nn.Mish, nn.SiLU])
@pytest.mark.parametrize(
    'make', [lambda kind: KANLinear(I, O, base_activation=kind), lambda kind: ChannelSpline(I, base_activation=kind)]
)
def test_hooks_of_an_activation_are_those_of_its_layer(make, kind):
    layers = [make(kind).double() for _ in range(2)]
    x = torch.randn(10, I, dtype=torch.float64)
    before = [layer(x) for layer in layers]
    for layer in layers:
        handle = layer.base_activation.register_forward_hook(lambda module, args, y: 2 * y)
        found = [each(x) for each in (*layers, make(kind).double())]
        assert [torch.equal(a, b) for a, b in zip(found, before)] == [each is not layer for each in layers]
        handle.remove()


def test_hooks_of_an_activation_count_in_the_gradient_too():
    for layer in KANLinear(2, 3).double(), ChannelSpline(2).double():
        layer.base_activation.register_forward_hook(lambda module, inputs, output: 2 * output)
        x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))
    layer, x = KANLinear(2, 3), torch.randn(20000, 2, requires_grad=True)  # by the operator
    layer.base_activation.register_forward_hook(lambda module, inputs, output: 2 * output)
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    few = x[:100].detach().requires_grad_()
    (expected,) = torch.autograd.grad(layer(few).sum(), few)
    close(found[:100], expected, 1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_shorter_dtype_leaves_the_knots(dtype):
    """Rounded, a third of these would coincide."""
    layer = KANLinear(4, 3, grid_size=50, grid_range=(9, 11))
    layer.base_weight.zero_()
    x = torch.linspace(9, 11, 400).view(-1, 4).to(dtype)
    expected = layer(x.float())
    layer.to(dtype)
    assert layer.grid.dtype == torch.float32 and layer.spline_weight.dtype == dtype and layer(x).dtype == dtype
    assert (layer(x).float() - expected).norm() < 0.01 * expected.norm()
    layer.update_grid(x)
    assert (layer.grid.diff() > 0).all()
    layer.double()
    assert layer.grid.dtype == torch.float64
    again = KANLinear(4, 3, grid_size=50, grid_range=(9, 11)).to(dtype)
    again.load_state_dict(layer.state_dict())
    assert again.grid.dtype == torch.float32


@torch.no_grad()
def test_grids_that_make_no_sense_are_refused():
    for grid_eps in -1, 3.0, math.nan:
        with pytest.raises(ValueError, match='grid_eps must lie between 0 and 1'):
            KANLinear(I, O, grid_eps=grid_eps)
    layer = KANLinear(I, O)
    for margin in -5, math.nan:
        with pytest.raises(ValueError, match='margin must not be negative'):
            layer.update_grid(torch.randn(20, I), margin=margin)
    with pytest.raises(ValueError, match='want knots beyond the numbers of torch.float32'):
        layer.update_grid(torch.cat([torch.full((10, I), -3e38), torch.full((10, I), 3e38)]))
    with pytest.raises(ValueError, match=f'expected {I} features in the last dimension'):
        layer(torch.tensor(1.0))
    with pytest.raises(ValueError, match=f'expected {2 * I} features in the last dimension, gates and values'):
        ChannelSpline(I)(torch.tensor(1.0), gated=True)


@pytest.mark.parametrize('has_scaler', [True, False])
@pytest.mark.parametrize('kind', ['uniform', 'irregular'])
@pytest.mark.parametrize('k', [0, 1, 3])
def test_a_finer_grid_keeps_the_function(k, kind, has_scaler):
    """Also outside the grid, where splines end."""
    layer = make_layer(k, make_knots(kind, k), enable_standalone_scale_spline=has_scaler)
    x = make_inputs(layer.grid)
    before, knots = layer(x), layer.grid.clone()
    layer.spline_weight.requires_grad_(False)
    assert layer.refine_grid(20) < 1e-9
    assert layer.spline_weight.shape == (O, I, 20 + k) and not layer.spline_weight.requires_grad
    assert layer.grid.shape == (I, 21 + 2 * k) and layer.grid.dtype == torch.float64
    for old, new in zip(knots, layer.grid):
        assert torch.isin(old, new).all() and (new.diff() > 0).all()
    close(layer(x), before, 1e-8)
    twin = KANLinear(I, O, grid_size=20, spline_order=k, enable_standalone_scale_spline=has_scaler).double()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


def test_a_grid_that_does_not_nest_has_the_nearest_splines():
    layer = make_layer(3, make_knots('uniform', 3))
    x = torch.rand(2000, I, dtype=torch.float64) * (layer.grid[:, -1] - layer.grid[:, 0]) + layer.grid[:, 0]
    before = copy.deepcopy(layer)
    errors = []
    for G in (7, 13, 29):
        finer = copy.deepcopy(before)
        error = finer.refine_grid(G)
        seen = (layer(x) - finer(x)).abs().max().item()
        assert 0 < seen < 1.2 * I * error
        errors.append(error)
    assert errors[0] > 10 * errors[2]
    with pytest.raises(ValueError, match='grid_size must be at least 1, got 0'):
        before.refine_grid(0)


def test_finer_grids_of_a_network():
    network = KAN([I, 5, O]).double()
    x = torch.randn(30, I, dtype=torch.float64)
    before = network(x)
    assert network.refine_grid(10) < 1e-9 and [layer.grid_size for layer in network.layers] == [10, 10]
    assert all(layer.spline_weight.is_contiguous() for layer in network.layers)  # or LBFGS cannot flatten its gradient
    close(network(x), before, 1e-8)


def test_row_chunks_do_not_change_the_result(monkeypatch):
    layer, x, g = make_layer(3), torch.randn(200, I, dtype=torch.float64), torch.randn(200, O, dtype=torch.float64)
    before = gradients(layer, x, g)
    monkeypatch.setattr(spline, 'CHUNK_BYTES', {'plain': 1})
    assert [(rows.start, rows.stop) for rows in spline.chunks(x, torch.zeros(O, 9 * I), 'plain')] == [
        (0, 50),
        (50, 100),
        (100, 150),
        (150, 200),
    ]
    for name, value in gradients(layer, x, g).items():
        close(value, before[name], 1e-12)


def bytes_saved(layer, x):
    """Size of the storages that the forward pass keeps for the backward pass, each counted once."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(sizes.values())


def test_backward_pass_keeps_the_input_and_no_bases(peer):
    x = torch.randn(2048, 32, requires_grad=True)
    layer = KANLinear(32, 32)
    ours, theirs = bytes_saved(layer, x), bytes_saved(peer(32, 32), x)
    weights = sum(p.numel() * p.element_size() for p in layer.state_dict().values())
    assert ours <= x.numel() * 4 + 3 * weights
    assert ours < theirs / 20


# initial weights, regularization, KAN


@pytest.mark.parametrize('name', ['base_weight', 'spline_weight', 'spline_scaler'])
def test_larger_scale_makes_larger_initial_weights(name):
    option = {'base_weight': 'scale_base', 'spline_weight': 'scale_noise', 'spline_scaler': 'scale_spline'}[name]
    small, large = (getattr(KANLinear(50, 60, **{option: scale}), name).std().item() for scale in (0.5, 2))
    assert large / small == pytest.approx(4, rel=0.1)


def test_scale_of_splines_acts_without_a_scaler():
    small, large = (
        KANLinear(50, 60, scale_spline=s, enable_standalone_scale_spline=False).spline_weight.std().item()
        for s in (0.5, 2)
    )
    assert large / small == pytest.approx(4, rel=0.1)


def test_initial_splines_are_curves_through_small_noise():
    layer = KANLinear(30, 40, scale_noise=0.1, grid_size=5)
    points = layer.grid.t()[3:9]
    curves = torch.einsum('nim,oim->nio', layer.b_splines(points[:-1]), layer.spline_weight)
    assert curves.abs().max() <= 0.1 / 5 / 2 + 1e-5
    assert curves.std().item() == pytest.approx(0.1 / 5 / math.sqrt(12), rel=0.1)


def test_regularization_is_that_of_efficient_kan(peer):
    ours, theirs = make_layer(3), peer(I, O).double()
    theirs.load_state_dict(ours.state_dict())
    for options in ((), (0.3, 2.0), (0.0, 1.0)):
        actual, expected = ours.regularization_loss(*options), theirs.regularization_loss(*options)
        close(actual, expected, 1e-12)
        actual, expected = (
            torch.autograd.grad(loss, layer.spline_weight)[0] for loss, layer in ((actual, ours), (expected, theirs))
        )
        close(actual, expected, 1e-12)


def test_regularization_is_of_the_edges_that_act():
    layer = KANLinear(4, 3, mask=True)
    layer.mask[0] = False
    loss = layer.regularization_loss()
    loss.backward()
    assert not layer.spline_weight.grad[0].any() and layer.spline_weight.grad[1:].any()
    with torch.no_grad():
        layer.spline_weight[0] = 0
    close(layer.regularization_loss(), loss, 1e-6)


def test_double_precision_is_not_cast_by_autocast():
    layer, x = KANLinear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.float64 == nn.Linear(4, 3).double()(x).dtype


@pytest.mark.parametrize('rows', [[0], [0, 1, 2]])
def test_regularization_of_zero_weights_is_finite(rows):
    layer = make_layer(3)
    with torch.no_grad():
        layer.spline_weight[rows] = 0
    loss = layer.regularization_loss()
    loss.backward()
    assert loss.isfinite() and layer.spline_weight.grad.isfinite().all()


def test_kan_is_its_layers_in_a_row():
    model = KAN([I, 6, 5, O], grid_size=4, spline_order=2, grid_range=(-2, 2), base_activation=nn.GELU, bias=True)
    assert [(layer.in_features, layer.out_features) for layer in model.layers] == [(4, 6), (6, 5), (5, 3)]
    assert all(layer.grid.shape[1] == 9 and layer.bias is not None for layer in model.layers)
    x = torch.randn(2, 7, I)
    expected = x
    for layer in model.layers:
        expected = layer(expected)
    assert torch.equal(model(x), expected)
    close(model.regularization_loss(2, 3), sum(layer.regularization_loss(2, 3) for layer in model.layers), 1e-6)


def test_kan_updates_the_grid_of_every_layer_for_the_inputs_it_gets():
    model = KAN([I, 6, O])
    x = torch.randn(300, I)
    before = [layer.grid.clone() for layer in model.layers]
    model(x, update_grid=True)
    assert all((layer.grid != grid).all() for layer, grid in zip(model.layers, before))
    hidden = model.layers[0](x)
    low, high = model.layers[1].grid[:, 3], model.layers[1].grid[:, -4]
    assert (
        (low <= hidden.amin(0)).all()
        and (high >= hidden.amax(0)).all()
        and (high - low <= hidden.amax(0) - hidden.amin(0) + 0.1).all()
    )


# update_grid


def curves(layer, x):
    """What each edge's spline adds, (N, I) -> (N, I, O)."""
    return torch.einsum('nim,oim->nio', layer.b_splines(x), layer.scaled_spline_weight)


@pytest.mark.parametrize('data', ['even', 'normal', 'clustered', 'outliers', 'few', 'discrete'])
@pytest.mark.parametrize('k', range(4))
def test_update_grid_is_the_least_squares_refit(k, data):
    """The residual on the data is near the smallest possible, which the faint pull of the whole grid raises."""
    layer = make_layer(k)
    x = {
        'even': lambda: torch.rand(1500, I) * 2 - 1,
        'normal': lambda: torch.randn(1500, I),
        'clustered': lambda: torch.cat([torch.randn(1500, I) * 0.01 + 0.3, torch.rand(40, I) * 2 - 1]),
        'outliers': lambda: torch.cat([torch.randn(1500, I) * 0.5, 30 * torch.randn(3, I)]),
        'few': lambda: torch.randn(6, I),
        'discrete': lambda: torch.randint(-3, 4, (500, I)) / 3,
    }[data]().double()
    before, coefficients = curves(layer, x).detach(), layer.scaled_spline_weight.detach()
    layer.update_grid(x)
    after, bases = curves(layer, x).detach(), layer.b_splines(x).numpy()
    assert (layer.scaled_spline_weight - coefficients).abs().max() > 0.01
    for i in range(I):
        best = np.linalg.lstsq(bases[:, i], before[:, i].numpy(), rcond=None)[0]
        optimum = np.linalg.norm(bases[:, i] @ best - before[:, i].numpy())
        residual = (after[:, i] - before[:, i]).norm().item()
        # between the others and outliers it would be wild; where rows are few or alike, all can be fitted exactly
        times, share = {'outliers': (1.6, 0.04), 'few': (1, 0.04), 'discrete': (1, 0.04)}.get(data, (1.02, 0.002))
        assert residual <= times * optimum + share * before[:, i].norm().item()


@pytest.mark.parametrize('rows', [6, 150, 1024])
def test_update_grid_keeps_functions_where_data_are_few(rows):
    """Also between the rows: the exact fit of wild functions at 150 rows would be some ten times as high there."""
    layer, x = ChannelSpline(64), 2 * torch.randn(rows, 64)
    torch.nn.init.normal_(layer.spline_weight)
    within = torch.lerp(x.amin(0), x.amax(0), torch.linspace(0, 1, 500).unsqueeze(1))
    before, largest = layer(within).detach(), layer.spline_weight.abs().max()
    layer.update_grid(x)
    assert layer(within).abs().max() < 4 * before.abs().max() and layer.spline_weight.abs().max() < 40 * largest


def test_update_grid_in_float32_is_the_least_squares_refit():
    layer, x = make_layer(3, dtype=torch.float32), torch.randn(2000, I)
    before = curves(layer, x).detach()
    layer.update_grid(x)
    bases, residual = layer.b_splines(x).numpy(), (curves(layer, x) - before).norm().item()
    optimum = [np.linalg.lstsq(bases[:, i].astype(float), before[:, i].numpy(), rcond=None)[1] for i in range(I)]
    assert residual <= 1.01 * math.sqrt(np.sum(optimum))


def test_update_grid_preserves_functions_that_both_grids_hold():
    """A polynomial of the spline's order lies in both spaces (data inside the old grid, where the old spline is it)."""
    layer = make_layer(3)
    points = torch.rand(500, I, dtype=torch.float64) * 2 - 1
    cubic = (points**3 - points + 0.5).unsqueeze(-1) * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    with torch.no_grad():
        layer.spline_weight.copy_(layer.curve2coeff(points, cubic) / layer.spline_scaler.unsqueeze(-1))
    x = points * 0.7 + 0.1
    before, y = curves(layer, x).detach(), layer(x).detach()
    layer.update_grid(x)
    close(curves(layer, x), before, 1e-8)
    close(layer(x), y, 1e-8)


def test_update_grid_leaves_features_whose_grid_stays_bit_identical():
    layer, x = make_layer(3, dtype=torch.float32), torch.randn(400, I)
    layer.update_grid(x)
    state = {name: p.clone() for name, p in layer.state_dict().items()}
    layer.update_grid(x)
    for name, p in layer.state_dict().items():
        assert torch.equal(p, state[name])
    x[:, 1] *= 2
    layer.update_grid(x)
    for name in ('grid', 'spline_weight'):
        p, old = (
            tensor if name == 'grid' else tensor.transpose(0, 1) for tensor in (layer.state_dict()[name], state[name])
        )
        assert [torch.equal(p[i], old[i]) for i in range(I)] == [True, False, True, True]


def test_update_grid_leaves_the_scaler_the_base_path_and_the_bias():
    layer = make_layer(3, bias=True)
    state = {name: p.clone() for name, p in layer.state_dict().items()}
    layer.update_grid(torch.randn(100, I, dtype=torch.float64) * 3)
    assert {name for name, p in layer.state_dict().items() if not torch.equal(p, state[name])} == {
        'grid',
        'spline_weight',
    }


def test_update_grid_puts_the_knots_at_quantiles_and_an_even_grid_as_efficient_kan_does(peer):
    for eps in (0, 0.02, 1):
        ours, theirs = KANLinear(I, O, grid_eps=eps).double(), peer(I, O, grid_eps=eps).double()
        x = torch.randn(300, I, dtype=torch.float64)
        ours.update_grid(x, margin=0.1)
        theirs.update_grid(x, margin=0.1)
        close(ours.grid, theirs.grid, 1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    'x', [torch.full((50, I), 0.3), torch.randn(1, I), torch.full((50, I), 1e4)], ids=['constant', 'row', 'large']
)
def test_update_grid_on_degenerate_data_stays_finite(x, dtype):
    layer, x = make_layer(3, dtype=dtype), x.to(dtype)
    for margin in (0.01, 0):
        layer.update_grid(x, margin)
        grads = gradients(layer, x, torch.ones(x.size(0), O, dtype=dtype))
        assert all(p.isfinite().all() for p in [*layer.state_dict().values(), *grads.values()])


def test_update_grid_takes_any_shape():
    layer, x = make_layer(3), torch.randn(5, 40, I, dtype=torch.float64)
    twin = make_layer(3)
    twin.load_state_dict(layer.state_dict())
    layer.update_grid(x.transpose(0, 1))
    twin.update_grid(x.transpose(0, 1).reshape(-1, I))
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), twin.state_dict().values()))


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_update_grid_needs_memory_in_proportion_to_its_inputs():
    layer, x = KANLinear(16, 512), torch.randn(4000, 16)
    with LargestTensor() as largest:
        layer.update_grid(x)
    assert x.numel() <= largest.numel <= 12 * x.numel()


def test_weights_are_packed_once_inside_packed_weights_and_training_ignores_it():
    model, x = nn.Sequential(nn.Linear(I, I), KAN([I, 5, O])), torch.randn(6, I)
    with torch.no_grad():
        expected = model(x)
    layer = model[1].layers[0]
    with packed_weights(model), torch.no_grad():
        kept = layer.kept_weight()
        assert torch.equal(model(x), expected) and layer.kept_weight() is kept
        with torch.enable_grad():
            assert model(x).requires_grad
        layer.spline_weight.mul_(2)
        assert layer.kept_weight() is None
        changed = model(x)
    assert not torch.allclose(changed, expected) and torch.allclose(model(x), changed, atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16), packed_weights(model):
        assert layer.kept_weight().dtype == torch.bfloat16
        with torch.autocast('cpu', enabled=False):
            assert layer.kept_weight() is None


@torch.no_grad()
def test_an_ensemble_of_layers_by_vmap():
    layers, x = [KANLinear(I, O) for _ in range(3)], torch.randn(6, I)
    state = torch.func.stack_module_state(layers)
    for around in contextlib.nullcontext(), packed_weights(layers[0]):
        with around:
            found = torch.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,)))(*state)
        torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))


@torch.no_grad()
def test_a_copy_packs_its_own_weights():
    layer, x = KANLinear(I, O), torch.randn(6, I)
    with packed_weights(layer):
        twin = copy.deepcopy(layer)
    assert twin.kept_weight() is None
    twin.base_weight.zero_()
    other = KANLinear(I, O)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(twin(x), other(x)) and not torch.allclose(twin(x), layer(x))


@torch.no_grad()
def test_weights_that_are_put_in_place_of_others_are_packed_anew():
    layer, x = KANLinear(I, O), torch.randn(6, I)
    with packed_weights(layer):
        before = layer(x)
        for _ in range(20):  # a new tensor may lie where an old one did
            new = 3 * layer.base_weight
            layer.base_weight = None
            layer.base_weight = nn.Parameter(new)
            assert not torch.allclose(layer(x), before)


def test_a_kan_is_refined_as_a_whole_or_not_at_all():
    model = KAN([2, 3, 1])
    prune.identity(model.layers[1], 'spline_weight')
    with pytest.raises(ValueError, match='spline_weight is computed from other numbers'):
        model.refine_grid(10)
    assert [layer.grid_size for layer in model.layers] == [5, 5]
    for widths in [], [3]:
        with pytest.raises(ValueError, match='layers_hidden must hold two widths at least'):
            KAN(widths)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('scale', torch.tensor(2.0))

    def forward(self, x):
        return torch.sin(self.scale * x)


@pytest.mark.parametrize('again', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize('activation', [Scaled, nn.SiLU])
def test_a_copy_may_be_compiled_before_it_is_called(again, activation, monkeypatch):
    layer, x = KANLinear(I, O, base_activation=activation), torch.randn(5, I)
    content = again(layer)
    monkeypatch.setattr(spline, 'ACTIVATIONS', {})  # as in another process
    twin = again(content)
    torch.testing.assert_close(torch.compile(twin, backend='eager', fullgraph=True)(x), layer(x))


# grids that cannot be


@pytest.mark.parametrize(
    'make', [lambda span: KANLinear(2, 2, grid_range=span), lambda span: ChannelSpline(2, grid_range=span)]
)
@pytest.mark.parametrize('span', [(1e8, 1e8 + 1), (-1e39, 1e39)])
def test_a_grid_finer_than_its_dtype_is_refused(make, span):
    with pytest.raises(ValueError, match='float32 cannot tell the knots of . intervals apart'):
        make(span)


@pytest.mark.parametrize('make', [lambda: KANLinear(4, 3, grid_range=(-2, 2)), lambda: ChannelSpline(4)])
def test_parameters_and_grid_of_a_layer_made_without_memory(make):
    with torch.device('meta'):
        layer = make()
    layer.to_empty(device='cpu')
    layer.grid.fill_(torch.nan)
    layer.reset_parameters()
    assert torch.equal(layer.grid, make().grid) and layer(torch.randn(5, 4)).isfinite().all()


def test_a_mask_made_without_memory():
    with torch.device('meta'):
        layer = KANLinear(I, O, mask=True)
    layer.to_empty(device='cpu').mask.fill_(False)
    layer.reset_parameters()
    assert layer.mask.all() and layer(torch.randn(5, I)).abs().sum() > 0


@pytest.mark.parametrize('make', [lambda: KANLinear(I, O), lambda: ChannelSpline(I)])
@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('rows', [3, 40_000])
def test_weights_without_memory_are_named(make, grad, rows):
    """As accelerate's init_empty_weights leaves a layer whose weights are not loaded yet."""
    layer = make()
    for name, p in [*layer.named_parameters()]:
        setattr(layer, name, nn.Parameter(p.to('meta')))
    with pytest.raises(ValueError, match='expected x, weight and knots on one device, got cpu, meta, cpu'):
        with torch.set_grad_enabled(grad):
            layer(torch.randn(rows, I))


@pytest.mark.parametrize('make', [lambda: KANLinear(I, O), lambda: ChannelSpline(I)])
def test_tensors_that_are_fake(make):
    with FakeTensorMode():
        layer = make()
        y = layer(torch.randn(3, I))
        y.sum().backward()
    assert y.shape[0] == 3 and layer.spline_weight.grad.shape == layer.spline_weight.shape


def test_points_and_values_of_other_shapes_are_refused():
    layer, x = KANLinear(3, 2), torch.rand(20, 3)
    assert layer.curve2coeff(x, torch.rand(20, 3, 2)).shape == (2, 3, 8)
    for points, values in (x, torch.rand(1, 3, 2)), (x, torch.rand(20, 1, 2)), (x[0], torch.rand(3, 2)):
        with pytest.raises(ValueError, match=r'expected x \(N, I\) and y \(N, I, O\), got'):
            layer.curve2coeff(points, values)


def test_a_layer_without_outputs_gets_another_grid():
    layer = KANLinear(3, 0)
    assert layer.refine_grid(10) == 0 and layer.spline_weight.shape == (0, 3, 13)


@pytest.mark.parametrize('fused', [False, True])
def test_packing_ends_where_the_layer_trains(fused):
    layer, x = KANLinear(I, O), torch.randn(7, I)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    with packed_weights(layer):
        with torch.no_grad():
            before = layer(x)
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            after = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), after) and not torch.equal(before, after)


@pytest.mark.parametrize('name', ['base_weight', 'spline_weight'])
@pytest.mark.parametrize(
    'compute',
    [lambda layer, name: prune.l1_unstructured(layer, name, 0.5), nn.utils.weight_norm],
    ids=['prune', 'norm'],
)
def test_weights_that_a_hook_computes_are_not_packed(compute, name):
    layer, x = KANLinear(I, O), torch.randn(7, I)
    compute(layer, name)
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    with torch.no_grad():
        with packed_weights(layer):
            found = layer(x)
        assert torch.equal(found, layer(x))


@pytest.mark.parametrize(
    'make', [lambda act: KANLinear(I, O, base_activation=act), lambda act: ChannelSpline(I, 8, 3, act)]
)
@pytest.mark.parametrize('act', [F.gelu, nn.GELU, nn.LeakyReLU(0.3), torch.sin])
def test_compiled_whole_in_either_mode(make, act):
    torch.compiler.reset()
    layer, x = make(act), torch.randn(7, I)
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    for training in False, True, False:
        layer.train(training)
        close(compiled(x), layer(x), 1e-6)


def test_packed_weights_keep_no_graph():
    layer = KANLinear(I, O)
    layer.keep_packed()
    assert not layer.kept_weight().requires_grad and copy.deepcopy(layer)(torch.randn(2, I)).shape == (2, O)


@pytest.mark.parametrize('compute', [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_grid_is_not_refitted_beneath_computed_weights(compute):
    layer = KANLinear(I, O)
    compute(layer, 'spline_weight')
    before = layer.grid.clone()
    for change in (lambda: layer.update_grid(torch.randn(50, I))), (lambda: layer.refine_grid(10)):
        with pytest.raises(ValueError, match='spline_weight is computed from other numbers'):
            change()
    assert torch.equal(layer.grid, before)


@pytest.mark.parametrize('value, dtype', [(1e6, torch.bfloat16), (1e6, torch.float32)])
@torch.no_grad()
def test_a_constant_feature_keeps_its_grid_where_no_margin_is_left(value, dtype):
    layer = KANLinear(2, O, grid_range=(0.5 * value, 1.5 * value)).to(dtype)
    layer.spline_weight.normal_()
    before, grid = layer(torch.full((1, 2), value, dtype=dtype)), layer.grid.clone()
    x = torch.stack([torch.full((200,), value), torch.linspace(0.6, 1.4, 200) * value], 1).to(dtype)
    layer.update_grid(x)
    assert torch.equal(layer.grid[0], grid[0]) and not torch.equal(layer.grid[1], grid[1])
    after = layer(torch.full((1, 2), value, dtype=dtype))
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


def test_a_kan_hands_its_settings_to_every_layer():
    settings = dict(grid_size=4, spline_order=2, scale_noise=0.3, scale_base=2.0, scale_spline=3.0)
    settings.update(grid_eps=0.5, grid_range=(-2, 3))
    for layer in KAN([2, 3, 1], **settings, mask=True).layers:
        assert {name: getattr(layer, name) for name in settings} == settings and layer.mask is not None


def test_a_network_on_a_finer_grid_tells_its_size_and_the_largest_difference():
    network = KAN([I, 5, O]).double()
    alone = copy.deepcopy(network)
    differences = [layer.refine_grid(7) for layer in alone.layers]
    assert network.refine_grid(7) == max(differences) > min(differences) and network.grid_size == 7


def test_a_layer_trains_also_while_its_weights_are_packed():
    layer, x = KANLinear(I, O), torch.randn(6, I)
    with packed_weights(layer):
        layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_packed_weights_of_another_parameter_with_as_many_changes():
    layer, x = KANLinear(I, O), torch.randn(6, I)
    layer.base_weight = nn.Parameter(layer.base_weight.detach().clone())  # which nothing has changed, as the next one
    with packed_weights(layer), torch.no_grad():
        before = layer(x)
        layer.base_weight = nn.Parameter(3 * layer.base_weight)
        assert not torch.allclose(layer(x), before)


@torch.no_grad()
def test_packed_weights_are_forgotten_in_the_end():
    layer, x = KANLinear(I, O), torch.randn(6, I)
    with packed_weights(layer):
        before = layer(x)
    layer.base_weight.data.mul_(3)  # which leaves no trace
    assert not torch.allclose(layer(x), before)


def test_functions_of_channels_have_an_even_grid_from_minus_four_to_four():
    phi = ChannelSpline(3)
    assert (phi.grid[0, 3], phi.grid[0, -4]) == (-4, 4)
    phi.update_grid(torch.randn(500, 3))
    assert spline.are_uniform(phi.grid)


def test_initial_weights_fill_their_bounds():
    layer = KANLinear(100, 80, scale_base=2.0)
    for p, bound in (layer.base_weight, 0.2), (layer.spline_scaler, 0.1):
        assert 0.98 * bound < p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
