"""KAN-GPTs written down by PyTorch's exporters, and read again in a process that knows nothing of this repository."""

import pytest
import torch

from helpers import run_forked
from kan import ChannelSpline, KANLinear
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

SIZES = dict(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=12, use_kan=True, kan_targets='attn,mlp,head')
READ = """
import sys
import torch

path = sys.argv[1]
model = torch.jit.load(path) if path == 'traced.pt' else torch.export.load(path).module()
x, y = torch.load('example.pt')
found = model(x)
print(torch.allclose(found[0] if isinstance(found, tuple) else found, y, atol=1e-5))
print(sorted({'kan', 'layers', 'model'} & sys.modules.keys()))
"""


def make_example(name):
    """A module that gives a tensor, and an input."""
    if name == 'layer':
        return KANLinear(5, 3, bias=True).eval(), torch.randn(7, 5)
    if name == 'functions':
        return ChannelSpline(5).eval(), torch.randn(7, 5)
    return GPT(GPTConfig(**SIZES)).eval(), torch.randint(20, (2, 8))


def first(y):
    return y[0] if isinstance(y, tuple) else y


class Logits(torch.nn.Module):
    """A model without its loss: a trace holds tensors alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return first(self.model(x))


@pytest.mark.parametrize('way', ['traced.pt', 'exported.pt2'])
@pytest.mark.parametrize('name', ['layer', 'functions', 'gpt'])
def test_another_process_gets_the_same_outputs(tmp_path, name, way):
    model, x = make_example(name)
    with torch.no_grad():
        torch.save((x, first(model(x))), tmp_path / 'example.pt')
        if way == 'traced.pt':
            torch.jit.trace(Logits(model), x).save(str(tmp_path / way))
        else:
            torch.export.save(torch.export.export(model, (x,)), tmp_path / way)
    (tmp_path / 'read.py').write_text(READ)
    done = run_forked(tmp_path, tmp_path / 'read.py', way)
    assert done.stdout == 'True\n[]\n', done.stderr


def test_onnx_by_a_trace(tmp_path):
    """tests/test_export.py has the other way, torch.export."""
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model, x = make_example('gpt')
    path = str(tmp_path / 'model.onnx')
    with torch.no_grad():
        expected = first(model(x))
        torch.onnx.export(model, (x,), path, dynamo=False, input_names=['idx'])
    found = runtime.InferenceSession(path, providers=['CPUExecutionProvider']).run(None, {'idx': x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), expected, atol=1e-5, rtol=1e-5)


def test_an_exported_layer_can_still_be_differentiated():
    layer, x = KANLinear(5, 3), torch.randn(7, 5, requires_grad=True)
    exported = torch.export.export(layer, (x,)).module()
    (found,), (expected,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (exported, layer))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
