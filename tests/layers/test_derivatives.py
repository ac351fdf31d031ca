"""Derivatives of every mode and order: of the operator, of layers, and of models with KAN adapters."""

import pytest
import torch
import torch.nn as nn
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.func import functional_call, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from kan import KAN, KANLinear
from layers import spline
from layers.spline import plain_spline_linear, spline_linear
from surgery.lora import LoRAConfig, add_lora

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

I, O = 3, 2


def make_layer(k=3, irregular=False, bias=False, grid_size=4):
    """A layer in float64 whose splines weigh as much as its base."""
    layer = KANLinear(I, O, grid_size, k, grid_range=(-1.5, 1.5), bias=bias).double()
    nn.init.normal_(layer.spline_weight)
    if irregular:
        layer.grid.copy_((layer.grid + 0.1 * torch.rand_like(layer.grid)).sort(1).values)
    assert spline.are_uniform(layer.grid) != irregular  # an interval of 0.6 is rounded in float32
    return layer


def reference(layer):
    """The function of a layer by the plain formula, of inputs (..., I)."""

    def function(x):
        weight, k, activation = layer.packed_weight(), layer.spline_order, layer.base_activation
        y = plain_spline_linear(x.reshape(-1, I), weight, layer.grid, k, activation, torch.float64)
        return y.reshape(*x.shape[:-1], O) + (0 if layer.bias is None else layer.bias)

    return function


def inputs(n=5):
    """Rows that reach past the knots on both sides."""
    return 2 * torch.randn(n, I, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('irregular', [False, True], ids=['uniform', 'irregular'])
@pytest.mark.parametrize('k', [2, 3])
@pytest.mark.parametrize('backend', ['plain', 'compiled'])
def test_finite_differences(monkeypatch, backend, k, irregular):
    """Backward, forward and batched, by x and by the weights; then the same of the backward pass itself."""
    monkeypatch.setattr(spline, 'BACKEND', backend)
    if backend == 'compiled':  # what is fused, without the minutes of a C++ compiler
        monkeypatch.setattr(torch, 'compile', lambda function, **options: function)
        spline.compiled.cache_clear()
    layer = make_layer(k, irregular, grid_size=2)

    def function(x, weight):
        return spline_linear(x, weight, layer.grid, k, layer.base_activation, torch.float64)

    arguments = inputs(3).requires_grad_(), layer.packed_weight().detach().requires_grad_()
    assert gradcheck(
        function, arguments, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    if k == 3:  # the second derivative of order 2 jumps at the knots, where finite differences do not tell
        assert gradgradcheck(function, arguments, check_fwd_over_rev=True)
    spline.compiled.cache_clear()


TRANSFORMS = {
    'jvp': lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    'vjp': lambda f, x: vjp(f, x)[1](f(x).detach())[0],
    'jacfwd': lambda f, x: jacfwd(f)(x),
    'jacrev': lambda f, x: jacrev(f)(x),
    'linearize': lambda f, x: linearize(f, x)[1](x.cos()),
    'grad': lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    'hessian': lambda f, x: hessian(lambda x: f(x).square().sum())(x),
    'jacrev of jacrev': lambda f, x: jacrev(jacrev(lambda x: f(x).square().sum()))(x),
    'third order': lambda f, x: jacfwd(hessian(lambda x: f(x).square().sum()))(x[:2]),
    'vmap of grad': lambda f, x: vmap(torch.func.grad(lambda x: f(x).square().sum()))(x),
    'Laplacian': lambda f, x: vmap(lambda row: hessian(lambda x: f(x).sum())(row).trace())(x),
    'vmap': lambda f, x: vmap(f, in_dims=1)(x.expand(4, -1, -1).contiguous()),
}


@pytest.mark.parametrize('trained', [True, False], ids=['trained', 'frozen'])
@pytest.mark.parametrize('irregular', [False, True], ids=['uniform', 'irregular'])
@pytest.mark.parametrize('name', TRANSFORMS)
def test_transforms_of_torch_func(name, irregular, trained):
    """The layer takes the plain formula here, whose derivatives other tests compare with differences."""
    layer, x = make_layer(3, irregular, bias=True).requires_grad_(trained), inputs()
    close(TRANSFORMS[name](layer, x), TRANSFORMS[name](reference(layer), x))


@pytest.mark.parametrize('trained', [True, False], ids=['trained', 'frozen'])
def test_dual_numbers(trained):
    layer, x = make_layer().requires_grad_(trained), inputs()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent
    close(tangent, jvp(reference(layer), (x,), (x.cos(),))[1])


def test_tangents_of_the_weights():
    layer, x = make_layer(), inputs()
    weights = dict(layer.named_parameters())
    tangents = {name: weight.detach().cos() for name, weight in weights.items()}
    found = jvp(lambda weights: functional_call(layer, weights, (x,)), (weights,), (tangents,))[1]
    nearby = [{name: p.detach() + h * tangents[name] for name, p in weights.items()} for h in (1e-6, -1e-6)]
    above, below = (functional_call(layer, moved, (x,)) for moved in nearby)
    close(found, (above - below) / 2e-6, 1e-7)


def test_a_block_around_a_layer():
    """What is lost in a part of a sum looks plausible."""
    layer, mix, x = KANLinear(I, I).double(), nn.Linear(I, I).double().requires_grad_(False), inputs()
    layer.requires_grad_(False)
    found = jvp(lambda x: x + layer(mix(x)), (x,), (x.cos(),))[1]
    above, below = (x + h * x.cos() for h in (1e-6, -1e-6))
    close(found, (above - below + layer(mix(above)) - layer(mix(below))) / 2e-6, 1e-7)


def test_a_model_with_kan_adapters():
    model = nn.Sequential(nn.Linear(I, 4), nn.Tanh(), nn.Linear(4, O)).double()
    add_lora(model, LoRAConfig(kind='kan', rank=2, target_modules=('0', '2')))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    x = inputs()
    for module in model.train(), model.eval().requires_grad_(False):
        for each in module.modules():
            if hasattr(each, 'p'):
                each.p = 0.0
        found = jvp(module, (x,), (x.cos(),))[1]
        above, below = (module(x + h * x.cos()) for h in (1e-6, -1e-6))
        close(found, (above - below).detach() / 2e-6, 1e-6)


def derivatives(function, x, order):
    """[u, u', u'', ...] of the sum of the outputs by each input, with their graph."""
    values = [function(x).sum(-1)]
    for _ in range(order):
        (slope,) = grad(values[-1].sum(), x, create_graph=True)
        values.append(slope.sum(-1))
    return values


@pytest.mark.parametrize('k, order', [(1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize('irregular', [False, True], ids=['uniform', 'irregular'])
@pytest.mark.parametrize('backend', ['auto', 'plain'])
def test_derivatives_one_after_another_and_gradients_of_a_loss_on_them(monkeypatch, backend, k, order, irregular):
    """As in a network that solves a differential equation; of small inputs, and in the operator."""
    monkeypatch.setattr(spline, 'BACKEND', backend)
    layer, x = make_layer(k, irregular), inputs(40).requires_grad_()
    outcomes = []
    for function in layer, reference(layer):
        values = derivatives(function, x, order)
        loss = sum((value**2).mean() for value in values) + (values[0] * values[-1]).mean()
        outcomes.append([*values, *grad(loss, [x, *layer.parameters()])])
    close(*outcomes)


def test_derivatives_at_the_knots_are_those_to_the_right():
    layer = make_layer(3)
    x = layer.grid.t()[3:-3].clone().requires_grad_()
    beside = (x + 1e-9).detach().requires_grad_()
    close(derivatives(layer, x, 3), derivatives(layer, beside, 3), 1e-5)


def test_a_network_of_layers():
    """The second derivative of KAN([1, 4, 1]), beside differences of the first."""
    network = KAN([1, 4, 1], grid_range=(-2, 2)).double()
    x = torch.linspace(-1.7, 1.6, 23, dtype=torch.float64).unsqueeze(1).requires_grad_()
    *_, first, second = derivatives(network, x, 2)
    above, below = (derivatives(network, (x + h).detach().requires_grad_(), 1)[-1] for h in (1e-5, -1e-5))
    close(second, (above - below) / 2e-5, 1e-6)


def test_gradients_of_second_order_keep_no_graph():
    layer, x = make_layer(), inputs().requires_grad_()
    (slope,) = grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert not x.grad.requires_grad and not any(p.grad.requires_grad for p in layer.parameters())


def test_per_sample_gradients():
    layer, x = make_layer(), inputs()

    def loss(weights, row):
        return functional_call(layer, weights, (row,)).square().sum()

    weights = dict(layer.named_parameters())
    found, _ = vmap(grad_and_value(loss), in_dims=(None, 0))(weights, x)
    for i, row in enumerate(x):
        for name, value in zip(weights, grad(loss(weights, row), weights.values())):
            close(found[name][i], value)


def test_ensembles_of_layers_with_grids_of_their_own():
    layers = [make_layer(irregular=irregular) for irregular in (True, False, True)]
    weights, buffers = torch.func.stack_module_state(layers)
    x = inputs()
    found = vmap(lambda *state: functional_call(layers[0], state, (x,)))(weights, buffers)
    close(found, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize('learns', ['x', 'weights'])
def test_batched_gradients_of_one_forward_pass(learns):
    layer, x = make_layer().requires_grad_(learns == 'weights'), inputs().requires_grad_(learns == 'x')
    wanted = [x] if learns == 'x' else list(layer.parameters())
    y = layer(x).flatten()
    rows = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    found = grad(y, wanted, rows, is_grads_batched=True, retain_graph=True)
    expected = [grad(y, wanted, row, retain_graph=True) for row in rows]
    close(found, tuple(torch.stack(gradients) for gradients in zip(*expected)))


def test_batched_gradients_by_torch_func():
    """Of one forward pass outside of the transform, and of its gradient in turn."""
    layer, x = make_layer(), inputs().requires_grad_()
    y = layer(x).flatten()
    (dx,) = grad(y.sum(), x, create_graph=True)
    for value in y, dx.flatten():
        rows = torch.eye(value.numel(), dtype=y.dtype)
        found = vmap(lambda row, value=value: grad(value, x, row, retain_graph=True)[0])(rows)
        close(found, torch.stack([grad(value, x, row, retain_graph=True)[0] for row in rows]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_training_and_inference_take_the_same_bases(dtype):
    """Also where the knots are even in the dtype of the layer alone."""
    layer, x = KANLinear(I, O).to(dtype), torch.randn(50, I, dtype=dtype)
    nn.init.normal_(layer.spline_weight)
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(
        layer(x).detach(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps * expected.abs().max().item()
    )


def test_a_tangent_that_comes_after_the_forward_pass():
    layer, x = make_layer(), inputs().requires_grad_()
    layer.base_activation = nn.Tanh()  # PyTorch has no forward mode of the backward pass of SiLU, and says so
    y = layer(x)
    with forward_ad.dual_level():
        (dx,) = grad(y, x, forward_ad.make_dual(torch.ones_like(y), y.detach().cos()))
        tangent = forward_ad.unpack_dual(dx).tangent
    close(tangent, grad(reference(layer)(x), x, y.detach().cos())[0])


def test_knots_that_train():
    layer, x = make_layer(irregular=True), inputs()
    layer.grid.requires_grad_()
    assert gradcheck(lambda knots: functional_call(layer, {'grid': knots}, (x,)), (layer.grid,))


def test_mixed_precision_in_forward_mode():
    layer, x = KANLinear(I, O), torch.randn(4, I)
    with torch.autocast('cpu', torch.bfloat16):
        y, tangent = jvp(layer, (x,), (x.cos(),))
        expected = layer(x)
    assert y.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(tangent.float(), jvp(layer, (x,), (x.cos(),))[1], rtol=0.02, atol=0.02)


def test_a_compiled_transform_is_the_same():
    layer, x = KANLinear(I, O).requires_grad_(False), torch.randn(4, I)
    compiled = torch.compile(lambda x: jvp(layer, (x,), (x.cos(),))[1], backend='aot_eager')
    torch.testing.assert_close(compiled(x), jvp(layer, (x,), (x.cos(),))[1])
