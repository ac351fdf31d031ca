"""The Triton kernels of learned activations against float64: on a GPU where there is one, else in the interpreter."""

import pytest
import torch
import torch.nn as nn

pytest.importorskip('triton')
from layers import channel
from layers.channel import plain_channel_spline
from layers.spline import name_of
from triton_here import DEVICE, channel_triton, run_here  # noqa: F401, a fixture of all tests

pytestmark = pytest.mark.usefixtures('seed')


def check(k=3, G=4, N=21, C=37, gated=True, irregular=False, activation=nn.SiLU(), dtype=torch.float32):  # noqa: B008
    knots = (0.5 + torch.arange(C).unsqueeze(1) % 3 / 2) * torch.arange(-k, G + k + 1) - 2  # each channel's own
    if irregular:
        knots = (knots + 0.3 * torch.rand_like(knots)).sort(1).values
    x, w, grad = 3 * torch.randn(N, (1 + gated) * C), torch.randn(C, G + k), torch.randn(N, C)
    x, w, knots, grad = (tensor.to(DEVICE) for tensor in (x.to(dtype), w, knots, grad.to(dtype)))
    y = channel_triton.forward(x, w, knots, k, name_of(activation), gated)
    found = (y, *channel_triton.backward(grad, x, w, knots, k, name_of(activation), gated))
    wide = x.double().requires_grad_(), w.double().requires_grad_()
    y = plain_channel_spline(*wide, knots.double(), k, activation, gated)
    tolerance = 2e-6 if dtype == torch.float32 else 0.01
    for a, b in zip(found, (y, *torch.autograd.grad(y, wide, grad.double()))):
        assert a.shape == b.shape and (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max())
    assert (found[0].dtype, found[1].dtype, found[2].dtype) == (dtype, dtype, torch.float32)


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('irregular', [False, True])
@pytest.mark.parametrize('k, G', [(1, 3), (2, 1), (3, 5)])
def test_orders_and_grids(k, G, gated, irregular):
    check(k, G, gated=gated, irregular=irregular, N=9, C=35)


@pytest.mark.parametrize(
    'activation', [nn.GELU(), nn.GELU('tanh'), nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Identity()], ids=str
)
def test_activations(activation):
    check(1, 2, N=9, C=7, activation=activation)


def test_half_precision():
    check(2, 2, N=9, C=7, dtype=torch.float16)


def test_rows_in_several_splits(monkeypatch):
    monkeypatch.setattr(channel_triton, 'splits', lambda x, programs: 3)
    check(1, 2, N=50, C=7)


def test_the_operator_runs_on_them(monkeypatch):
    monkeypatch.setattr(channel, 'BACKEND', 'triton')
    x, w = torch.randn(5, 6, device=DEVICE, requires_grad=True), torch.randn(3, 4, device=DEVICE, requires_grad=True)
    knots = torch.arange(-2.0, 4, device=DEVICE).repeat(3, 1)
    y = channel.channel_spline(x, w, knots, 1, nn.SiLU(), True)
    expected = plain_channel_spline(x, w, knots, 1, nn.SiLU(), True)
    for a, b in zip(
        (y, *torch.autograd.grad(y.sum(), (x, w))), (expected, *torch.autograd.grad(expected.sum(), (x, w)))
    ):
        assert torch.allclose(a, b, atol=1e-5)
