"""device.py where it can be tested without the device."""

import subprocess
import sys

import pytest
import torch

from configurator import ROOT
from run.device import set_up

# a process that holds a GiB starts another one, which says its own peak
LARGE = """
import subprocess, sys
held = b'x' * 2**30
subprocess.run([sys.executable, '-c', "from run.device import peak_memory; print(peak_memory('cpu'))"], check=True)
"""


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


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere the system counts each process by itself')
def test_peak_memory_is_that_of_the_process_itself():
    done = subprocess.run([sys.executable, '-c', LARGE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2**25 < int(done.stdout) < 2**30
