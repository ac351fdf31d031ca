"""What needs a GPU; skipped where there is none."""

import copy
import math

import pytest
import torch

from helpers import SHAPE, TINY, flags, load, run
from kan import KANLinear
from layers import spline
from model import GPT, GPTConfig
from run.session import Session

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')


@pytest.mark.parametrize('spline_order', [0, 1, 2, 3])
def test_layer_equals_the_one_on_the_cpu(spline_order):
    torch.manual_seed(0)
    layer = KANLinear(7, 5, spline_order=spline_order).double()
    twin = KANLinear(7, 5, spline_order=spline_order).double().cuda()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(100, 7, dtype=torch.float64)
    results = []
    for module, rows in (layer, x), (twin, x.cuda()):
        rows.requires_grad_()
        y = module(rows)
        gradients = torch.autograd.grad(y.sin().sum(), [rows, *module.parameters()])
        results.append([tensor.cpu() for tensor in (y, *gradients)])
    for here, there in zip(*results):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings('error:the Triton kernels')
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_layer_that_runs_in_triton_equals_the_one_on_the_cpu(dtype, tolerance):
    pytest.importorskip('triton')
    layer = KANLinear(70, 50)
    twin, x = copy.deepcopy(layer).cuda(), torch.randn(300, 70)
    assert spline.choose_backend(x.cuda(), twin.grid, 3, 'SiLU()', dtype) == 'triton'
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        y = twin(x.cuda())
    y.float().sin().sum().backward()
    expected = layer(x)
    expected.sin().sum().backward()
    torch.testing.assert_close(y.float().cpu(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(twin.base_weight.grad.cpu(), layer.base_weight.grad, rtol=tolerance, atol=30 * tolerance)


@pytest.mark.parametrize('moved', [False, True])
def test_a_step_waits_for_nothing(monkeypatch, moved):
    """Forward, backward and update of a KAN-GPT, its grid moved or not: the loss is read when all is under way."""
    pytest.importorskip('triton')
    monkeypatch.delenv('RANK', raising=False)
    session, scaler = Session('cuda', 'bfloat16'), torch.amp.GradScaler('cuda', enabled=False)
    model = GPT(GPTConfig(use_kan=True, vocab_size=50, **SHAPE)).cuda()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cuda')
    if moved:
        next(layer for layer in model.modules() if isinstance(layer, KANLinear)).grid[:, 3].add_(0.05)
    idx = torch.randint(50, (2, SHAPE['block_size']), device='cuda')

    def step():
        with torch.autocast('cuda', torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
        return session.update(optimizer, scaler, model.parameters(), loss, 1.0, 0)

    step()  # kernels are compiled and tried
    torch.cuda.set_sync_debug_mode('error')
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert math.isfinite(session.settle(loss, 'iteration'))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('use_kan', [False, True])
def test_compiled_run_resumes(tmp_path, dataset, dtype, use_kan):
    settings = {**TINY, 'device': 'cuda', 'dtype': dtype, 'use_kan': use_kan, 'dataset': dataset, 'out_dir': 'out'}
    for max_iters, init_from in (2, 'scratch'), (4, 'resume'):
        done = run(tmp_path, 'train.py', *flags(**{**settings, 'max_iters': max_iters, 'init_from': init_from}))
        assert done.returncode == 0 and 'torch.compile failed' not in done.stdout, done.stderr
    assert load(tmp_path / 'out')['iter_num'] == 4
