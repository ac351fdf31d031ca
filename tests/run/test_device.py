"""device.py where it can be tested without the device."""

import pytest
import torch

from run.device import set_up


@pytest.mark.parametrize('device, index', [('cuda', None), ('cuda:1', 1)])
def test_set_up_takes_a_card_with_or_without_its_number(monkeypatch, device, index):
    """With PyTorch's own reading of the name, which refuses one that has no number."""
    chosen, precision = [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, 'set_device', lambda name: chosen.append(torch.cuda._utils._get_device_index(name)))
    try:
        set_up(device)
        assert torch.get_float32_matmul_precision() == 'high'
    finally:
        torch.set_float32_matmul_precision(precision)
    assert chosen == ([] if index is None else [index])
