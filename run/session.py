"""What train.py and finetune.py share around their loops: processes, random states, signals, messages, records."""

import contextlib
import inspect
import math
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from run import records
from run.checkpoint import is_export, save_checkpoint, save_weights, saved_after, set_aside, versions
from run.device import device_name, get_rng, pick_device, pick_dtype, set_rng, set_up
from run.trackers import Trackers


def told_by_torchrun():
    """The environment of one of several processes; {} in a process that runs alone."""
    return os.environ if {'RANK', 'WORLD_SIZE'} <= os.environ.keys() else {}


def progress(items, unit):
    """The items, with a bar on the terminal that goes when all are done. Of several processes the first has one."""
    is_first = int(told_by_torchrun().get('RANK', 0)) == 0
    return tqdm(items, unit=unit, leave=False, disable=None if is_first else True)


class Session:
    """One process of a run, started by torchrun or by hand."""

    def __init__(self, device, dtype):
        told = told_by_torchrun()
        self.ddp = bool(told)
        self.rank, self.local_rank = (int(told.get(name, 0)) for name in ('RANK', 'LOCAL_RANK'))
        self.world_size = int(told.get('WORLD_SIZE', 1))
        self.master = self.rank == 0
        if self.ddp and device == 'auto' and not torch.cuda.is_available():
            device = 'cpu'  # not mps, on which processes cannot talk
        self.device = pick_device(device)
        self.device_type = self.device.split(':')[0]
        if self.ddp and self.device_type == 'cuda':
            self.device = pick_device(f'cuda:{self.local_rank}')
        self.dtype = pick_dtype(dtype, self.device)
        self.signals, self.save_failed = [], False
        self.lock = None  # of the folder of the run
        self.bad_step = None  # the first whose loss or gradient is not finite, on the device; inf where there is none
        self.on_terminal = self.master and sys.stderr.isatty()
        set_up(self.device)

    def micro_steps(self, gradient_accumulation_steps):
        """Micro-batches of this process in a step."""
        k, n = gradient_accumulation_steps, self.world_size
        if k % n:
            nearest = max(1, round(k / n)) * n
            raise ValueError(f'gradient_accumulation_steps={k} cannot be shared by {n} processes; nearest: {nearest}')
        return k // n

    def join(self, backend):
        """Meet the other processes."""
        if self.ddp:
            # the others wait while the first one scores or downloads
            dist.init_process_group(backend if self.device_type == 'cuda' else 'gloo', timeout=timedelta(hours=12))

    def wrap(self, model):
        """The model for the processes together."""
        if not self.ddp:
            return model
        # constant buffers need no exchange; torch 2.13 has another name for that
        known = inspect.signature(DDP).parameters
        exchange = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'
        return DDP(model, device_ids=[self.local_rank] if self.device_type == 'cuda' else None, **{exchange: False})

    def all_reduce(self, *numbers):
        """The sums of the numbers over all processes."""
        if not self.ddp:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """What each of the processes has."""
        values = [value] * self.world_size
        if self.ddp:
            dist.all_gather_object(values, value)
        return values

    def check_same(self, what, value, advice='copy its files from one node to all'):
        """ValueError where the processes have not the same: nodes without a shared disk prepare data of their own."""
        first, *others = self.gather(value)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise ValueError(f'{what} is not the same on process {rank} as on process 0: {advice}')

    def gather_rng(self):
        """The random states of all processes."""
        return self.gather(get_rng(self.device))

    def restore_rng(self, state):
        """Go on from the random state in a checkpoint; without one for as many processes, from the one at hand."""
        if len(state.get('rng', [])) == self.world_size:
            set_rng(state['rng'][self.rank], self.device)
        else:
            n = self.world_size
            self.say(f'warning: no random state for {n} processes in the checkpoint, dropout starts from the seed')

    def update(self, optimizer, scaler, parameters, loss, grad_clip, step):
        """A step of the optimizer on gradients clipped to grad_clip (0: not at all), without waiting for the device.
        Returns the loss, summed over the processes' shares, on the device. From the first step on whose loss or
        gradient is not finite the weights stay as they are (in float16 the scaler skips that one step alone), and
        `settle` then ends the run.
        """
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        loss = loss.detach().float()
        if self.ddp:
            dist.all_reduce(loss)
        # the scaler itself skips steps with gradients that are not finite
        is_usable = loss.isfinite() if scaler.is_enabled() else loss.isfinite() & norm.isfinite()
        if self.bad_step is None:
            self.bad_step = torch.full_like(loss, math.inf)
        self.bad_step = torch.where(is_usable, self.bad_step, self.bad_step.clamp(max=step))
        self.step_unless_bad(optimizer, scaler)
        optimizer.zero_grad(set_to_none=True)
        return loss

    def step_unless_bad(self, optimizer, scaler):
        is_bad = self.bad_step.isfinite()
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        elif getattr(optimizer, '_step_supports_amp_scaling', False):  # fused: it asks on the device, as for a scaler
            optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not is_bad:
            optimizer.step()

    def settle(self, loss, unit):
        """Wait for the device, and return the loss of the last step as a number. Where a step's was not finite, or its
        gradient, the run ends here.
        """
        loss, bad_step = torch.stack([loss, self.bad_step]).tolist()
        if math.isfinite(bad_step):
            self.give_up(f'the loss or its gradient is not finite at {unit} {bad_step:.0f}')
        return loss

    def leave(self):
        if self.ddp:
            dist.barrier()
            dist.destroy_process_group()
        if self.save_failed:
            sys.exit('error: not everything could be saved, see the warnings above; what is saved is whole')

    # signals: the first one is noted and the loop stops at the end of a step; another one ends the process at once,
    # unless it comes within a second: a terminal signals this process, and so does the launcher that it signals too

    def listen(self):
        signal.signal(signal.SIGTERM, self.on_signal)
        signal.signal(signal.SIGINT, self.on_signal)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # of a terminal that is gone; nohup ignores it
            signal.signal(signal.SIGHUP, self.on_signal)

    def on_signal(self, number, frame):
        if self.signals and time.monotonic() - self.signals[0] > 1:
            os._exit(128 + number)
        if not self.signals:
            with contextlib.suppress(OSError):
                os.write(2, b'\nstopping: finishing the step and saving (again to exit at once)\n')
        self.signals.append(time.monotonic())

    def is_stopping(self):
        """Whether any process was told to stop, so that all of them leave the loop together."""
        return self.all_reduce(len(self.signals))[0] > 0

    # what a run says and writes down, by the first process; a full disk is a warning and an exit status at the end

    def say(self, text):
        """Print a line. The run goes on where none can be written: nobody reads any more, as a `| tee` that the same
        Ctrl-C ended, or the disk is full.
        """
        if self.master:
            with contextlib.suppress(OSError):
                if self.on_terminal:
                    tqdm.write(text)
                else:
                    print(text)
                if sys.stdout:  # a daemon may have none
                    sys.stdout.flush()

    def bar(self, total, initial, unit):
        return tqdm(total=total, initial=initial, unit=unit, disable=not self.on_terminal, dynamic_ncols=True)

    def set_later_aside(self, out_dir, iteration):
        """Move aside what is of later iterations than this, from which a run goes on, and a best.pt that cannot be
        read.
        """
        names = saved_after(out_dir, iteration) if self.master else []
        if names:
            shown = ', '.join(names[-3:]) + (f' and {len(names) - 3} more' if names[3:] else '')
            place = set_aside(out_dir, names)
            self.say(f'{shown}: moved to {place}, as later than iteration {iteration} or damaged')

    def has_best(self, out_dir):
        """Whether there is a best.pt, as the first process sees it."""
        return self.all_reduce(self.master and os.path.exists(os.path.join(out_dir, 'best.pt')))[0] > 0

    def save(self, out_dir, checkpoint, is_best, name, again=False):
        """Save a checkpoint; returns, to all processes, whether it is there. `again`: ckpt.pt has this state."""
        lost = f'{name} is not saved, the checkpoint before it stays'
        saved = self.write(lost, save_checkpoint, out_dir, checkpoint, is_best, again)
        if saved:
            self.say(f'saved {out_dir}/ckpt.pt at {name}')
        return self.all_reduce(saved)[0] > 0

    def save_weights(self, out_dir, weights, name):
        self.write(f'the weights of {name} are not kept in {out_dir}/history', save_weights, out_dir, weights)

    def write(self, lost, function, *args):
        """Have the first process write something; returns whether it did. What is `lost` by a failure is a warning."""
        if not self.master:
            return False
        try:
            function(*args)
            return True
        except OSError as error:
            self.save_failed = True
            self.say(f'warning: {lost}: {error}')
            return False

    def begin(self, out_dir, log, resumed_at, config, **fields):
        """Start the record of a run: run.json and log.jsonl in out_dir (None: nowhere), with the lines of `log` so far.
        Where the run is not resumed, the files of an earlier one in out_dir move aside.
        """
        self.out_dir, self.log = out_dir, log
        self.record = dict(config=config, seed=config['seed'], commit=records.commit(), versions=versions())
        self.record.update(device=device_name(self.device), processes=self.world_size, **fields)
        self.record.update(resumed_at=resumed_at, started=records.now())
        if out_dir is not None:
            self.reserve(out_dir, make=True)
        if self.master and out_dir is not None:
            earlier = set_aside(out_dir) if resumed_at is None else None
            if earlier:
                self.say(f'{out_dir} holds an earlier run: its files are moved to {earlier}')
        self.trackers = Trackers(out_dir, self.record, log, self.say)
        if self.master and out_dir is not None:
            try:
                records.write_run(out_dir, self.record, log)
            except OSError as error:  # later that is a warning; now nothing is lost yet
                raise OSError(f'{out_dir} cannot be written: {error}') from None

    def reserve(self, out_dir, make=False):
        """Have out_dir for this run alone, until its first process ends, however it does; with `make` also where it is
        not there yet. ValueError where another run has it. Before a checkpoint is read: that run may write a later one.
        """
        if not out_dir:
            raise ValueError('out_dir is empty: name a folder for the run by --out_dir')
        if is_export(out_dir):
            raise ValueError(f'{out_dir} is a folder of export.py: name another one for the run by --out_dir')
        taken = False
        if make and self.master:
            os.makedirs(out_dir, exist_ok=True)
        if self.master and self.lock is None and os.path.isdir(out_dir):
            self.lock = FileLock(os.path.join(out_dir, 'run.lock'), blocking=False)
            try:
                self.lock.acquire()
            except Timeout:
                taken = True
            except (OSError, NotImplementedError) as error:  # a file system without locks
                self.say(f'warning: {out_dir} cannot be locked against another run: {error}')
        if self.all_reduce(taken)[0]:
            raise ValueError(f'{out_dir} is in use by another run; name another folder by --out_dir')

    def give_up(self, reason):
        """End a run that diverged, before it does harm to what is saved."""
        self.write_record(failed=reason)
        sys.exit(f'error: {reason}; the checkpoints are untouched')

    def write_record(self, **fields):
        """Bring the files of the record up to date."""
        self.record.update(fields)
        if self.out_dir is not None:
            self.write('the run record is not saved', records.write_run, self.out_dir, self.record, self.log)

    def track(self):
        """Show the last line of the log in what log_to names."""
        if self.master:
            self.trackers.show()

    def finish_tracking(self):
        if self.master:
            self.trackers.finish()
