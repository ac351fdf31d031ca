"""What a run writes down beside its checkpoints, read and written without torch.

run.json    config, commit, versions, device, parameters, data, start, final metrics; last `finished` or `failed`
log.jsonl   one line per evaluation
"""

import functools
import json
import math
import os
import subprocess
from datetime import UTC, datetime

from configurator import ROOT
from run.files import write_file

# settings of train.py that older records do not name, as they were before there was a choice
ADDED = dict(use_graph=False, graph_kind='gat', graph_edges='causal', graph_heads=4, graph_place='after')
ADDED.update(graph_window=8, graph_topk=8, graph_backend='auto', keep_history=False)
ADDED.update(activation='', kan_kind='edge', spline_init_std=0.0, rotary=False, muon=False)


def complete(config):
    """The settings in a record, with those that were not there yet when it was made."""
    return {**ADDED, **config}


def began_with(config):
    """What a run of these settings began with, '' from scratch; older records say resume of all that were resumed."""
    began = config.get('init_from', 'scratch')
    return '' if began in ('scratch', 'resume') else began


def read_record(out_dir):
    """The contents of run.json, {} where there is none; ValueError where it is no JSON, or holds no dict."""
    return read_json(os.path.join(out_dir, 'run.json'), json.load, {})


def write_record(out_dir, record):
    write_file(os.path.join(out_dir, 'run.json'), json.dumps(record, indent=1, allow_nan=False))


def read_log(out_dir):
    """The evaluations of a run, one dict each; a last line cut off by a crash is left out."""
    return read_json(os.path.join(out_dir, 'log.jsonl'), read_whole_lines, [])


def read_whole_lines(f):
    lines = [json.loads(line) for line in f if line.endswith('\n')]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError('expected a dict in each line')
    return lines


def read_json(path, read, nothing):
    """What `read` finds in a file, `nothing` where there is no file; ValueError where it is no JSON, or of another type
    than `nothing`.
    """
    try:
        with open(path, encoding='utf-8') as f:
            found = read(f)
    except (FileNotFoundError, NotADirectoryError):
        return nothing
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged ({error}): move it away') from None
    if type(found) is not type(nothing):
        raise ValueError(f'{path} holds a {type(found).__name__}, expected a {type(nothing).__name__}: move it away')
    return found


def without_nan(value, default=None):
    """A value as JSON holds it: None for NaN and infinities. `default` as in json.dumps."""
    return json.loads(json.dumps(value, default=default), parse_constant=lambda name: None)


def write_log(out_dir, lines):
    write_file(os.path.join(out_dir, 'log.jsonl'), ''.join(json.dumps(line, allow_nan=False) + '\n' for line in lines))


def write_run(out_dir, record, log):
    """Both files, the log first: a run that is `finished` has all of it."""
    write_log(out_dir, log)
    write_record(out_dir, record)


def perplexity(loss):
    """exp of a loss in nats per token, inf beyond the largest float."""
    return math.exp(loss) if loss < 709 else math.inf


def commit():
    """The git commit of the code, with + for uncommitted changes, but for results; None outside a git checkout."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        head = git(['git', 'rev-parse', 'HEAD']).stdout.strip()
        changed = git(['git', 'diff', '--name-only', 'HEAD', '--', '.', ':!results']).stdout
        return head + '+' * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def now():
    return datetime.now(UTC).isoformat(timespec='seconds')
