"""The device a script runs on: which one, at what precision, its name, speed, memory and random state."""

import ctypes
import platform
import re
import resource
import sys
import time
from contextlib import nullcontext

import torch

# dense bfloat16 peaks in TFLOP/s, from the cards' data sheets
PEAKS = {'B200': 2250, 'H200': 989, 'H100': 989, 'A100': 312, 'L40S': 362, 'L4': 121, '4090': 165, '3090': 71}


def pick_device(device):
    """'auto' is the first there is of cuda, mps, cpu; anything else must be there."""
    kinds = [kind for kind in ('cuda', 'mps', 'cpu') if getattr(torch, kind).is_available()]
    kind, _, index = device.partition(':')
    if device == 'auto':
        return kinds[0]
    if kind not in kinds or (index and not (index.isdigit() and int(index) < getattr(torch, kind).device_count())):
        raise ValueError(f'device={device!r} is not here: expected auto or {" or ".join(kinds)}')
    return device


def pick_dtype(dtype, device):
    """'auto' is bfloat16 (float16 where the card has none) on CUDA, float32 elsewhere."""
    if dtype == 'auto' and not device.startswith('cuda'):
        return 'float32'
    if dtype == 'auto':
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f'dtype={dtype!r}: expected auto, float32, bfloat16 or float16')
    return dtype


def autocast(device, dtype):
    """The context of mixed precision; none for float32."""
    return nullcontext() if dtype == 'float32' else torch.autocast(device.split(':')[0], getattr(torch, dtype))


def set_up(device, keep=True):
    """What training on the device is fast with: TF32 on CUDA, memory kept on a CPU."""
    if device.startswith('cuda'):
        if ':' in device:  # plain 'cuda' is the current one, and set_device wants an index
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if device == 'cpu' and keep:
        keep_memory()


def keep_memory():
    """Tell glibc to keep what tensors free for the tensors that follow. By default the memory of large ones goes back
    to the system and comes as fresh pages, and to have these cleared takes longer than most layers take to fill them.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets pages of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
    except (OSError, AttributeError):  # no glibc: not Linux, or musl
        pass


def clock(device):
    """Seconds, once the device has done what it was given to do."""
    kind = device.split(':')[0]
    if kind != 'cpu':
        getattr(torch, kind).synchronize()
    return time.perf_counter()


def profile(run, device):
    """[[operator or kernel, how often it ran, its own seconds]] of one run, those that take most first."""
    with torch.profiler.profile() as profiler:
        run()
    kind = 'device' if device.startswith('cuda') else 'cpu'
    events = [event for event in profiler.key_averages() if event.device_type.name in ('CPU', 'CUDA')]
    if kind == 'device':  # the operators that launch kernels have their time, too
        events = [event for event in events if event.device_type.name == 'CUDA' and not event.is_user_annotation]
    measured = [[event.key, event.count, getattr(event, f'self_{kind}_time_total') / 1e6] for event in events]
    return sorted(measured, key=lambda operator: -operator[2])


def device_name(device):
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    n_threads = torch.get_num_threads()
    return f'{cpu_name()}, {n_threads} thread' + 's' * (n_threads > 1)


def cpu_name():
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            return next(line.partition(':')[2].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):  # not Linux
        return platform.processor() or platform.machine()


def flops_promised(device, dtype):
    """The card's peak in FLOP/s; None for cards that are not in the table, and without mixed precision."""
    name = torch.cuda.get_device_name(device) if device.startswith('cuda') and dtype != 'float32' else ''
    words = [] if 'Laptop' in name else re.split(r'\W', name)
    return next((peak * 1e12 for card, peak in PEAKS.items() if card in words), None)


def peak_memory(device):
    """Bytes: of the GPU, else of this process. On Linux getrusage would say that of the process which started this one,
    where that was larger.
    """
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    try:
        with open('/proc/self/status', encoding='utf-8') as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith('VmHWM:'))
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def get_rng(device):
    """The random states that dropout draws from, uint8 tensors: the CPU's, and that of the device in use."""
    kind, state = device.split(':')[0], {'cpu': torch.get_rng_state()}
    if kind != 'cpu':
        state[kind] = getattr(torch, kind).get_rng_state()
    return state


def set_rng(state, device):
    kind = device.split(':')[0]
    torch.set_rng_state(state['cpu'])
    if kind != 'cpu' and kind in state:
        getattr(torch, kind).set_rng_state(state[kind])
