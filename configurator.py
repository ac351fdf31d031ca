"""
Settings for every script. A script lists its defaults as plain variables, then calls

    config = configure(globals())

so that `python train.py config/x.py --key=value` overrides them, left to right.
A config file holds `name = value` lines and may go on from another by `include = 'other.py'`. It is read as data and
never executed.
"""

import ast
import contextlib
import difflib
import functools
import math
import operator
import os
import re
import select
import sys
import time
import traceback
from pathlib import Path

KINDS = (bool, int, float, str)  # a variable of any other type is not a setting, nor is a CONSTANT or a _private one
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
ARITHMETIC |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}
ROOT = os.path.dirname(os.path.realpath(__file__))
PATHS = ('out_dir', 'init_from', 'dataset', 'source', 'adapter', 'root', 'out')  # settings in which ~ is the home
PATHS += ('save', 'folder', 'frozen_cache')
PATIENCE = 3  # seconds that an error of another process than the first waits for that one's
# settings of train.py that may differ between tries of one run: they do not change what it learns
INCIDENTAL = ('out_dir', 'init_from', 'device', 'compile', 'log_interval', 'keep_history')
INCIDENTAL += ('wandb_log', 'wandb_project', 'wandb_run_name', 'wandb_artifact', 'log_to')

SWITCHES = {  # what is off without them: how the names of these settings begin
    'use_kan': ('kan_', 'grid_', 'spline_'),
    'use_lora': ('lora_', 'rs_lora', 'use_dora'),
    'use_graph': ('graph_',),
    'decay_lr': ('warmup_iters', 'lr_decay_iters', 'min_lr'),
}


def configure(variables, argv=None):
    """Override the settings among `variables` in place and return all of them, for the log and the checkpoint."""
    sys.excepthook = report
    for stream in sys.stdout, sys.stderr:  # a character that a terminal does not have ends no run
        with contextlib.suppress(AttributeError, OSError, ValueError):  # none, another put in its place, or closed
            stream.reconfigure(errors='backslashreplace')
    names = [name for name in variables if not name.startswith('_') and not name.isupper()]
    settings = {name: variables[name] for name in names if type(variables[name]) in KINDS}
    argv = sys.argv[1:] if argv is None else argv
    settings = override(settings, [arg for arg in argv if arg not in ('--help', '-h')])
    if '--help' in argv or '-h' in argv:  # the settings this command would run with, so it also checks a config file
        about, script = (variables.get('__doc__') or '').strip(), variables.get('__file__') or os.devnull
        print(about, '', *describe(settings, script), sep='\n', flush=True)
        sys.exit()
    variables.update(settings)
    return settings


def describe(settings, script):
    """A line for each setting: the flag, and what the script says behind it."""
    with open(script, encoding='utf-8') as f:
        lines = [re.match(r'(\w+) = .*?  # (.*)', line) for line in f]
    comments = {line[1]: line[2] for line in reversed(lines) if line}  # the first one of each
    flags = {name: f'--{name}={value!r}' for name, value in settings.items()}
    return [f'{flag:<33}  # {comments[name]}' if name in comments else flag for name, flag in flags.items()]


def flags_of(settings):
    return [f'--{name}={value}' for name, value in settings.items()]


def divide(argv, names):
    """(the flags called `names` and --help, the rest) of a script that hands arguments on to another one."""
    flags = [f'--{name}' for name in names]
    own = [arg for arg in argv if arg in ('--help', '-h') or arg.partition('=')[0] in flags]
    return own, [arg for arg in argv if arg not in own]


def names_of_configs(argv):
    """The config files of a command as parts of a folder's name: config/finetune/kan_lora.py is kan-lora."""
    paths = [arg for arg in argv if not arg.startswith('-')]
    return [os.path.basename(path).removesuffix('.py').replace('_', '-') for path in paths]


def settings_of(script, argv):
    """The settings with which a script of this repository would run under these arguments; nothing is run."""
    path = os.path.join(ROOT, script)
    return override(defaults_in(path, os.stat(path).st_mtime_ns), argv)


@functools.cache
def defaults_in(path, changed_at):
    """The settings that a script lists. Where its file was changed since, they are read again."""
    with open(path, encoding='utf-8') as f:
        lines = ast.parse(f.read()).body
    defaults = {}
    for line in lines:  # plain assignments, up to the call of `configure`
        call = getattr(line, 'value', None)
        if isinstance(call, ast.Call) and getattr(call.func, 'id', '') == 'configure':
            break
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            defaults[line.targets[0].id] = read_value(line.value)
    return defaults


def override(settings, argv):
    """Return a copy of `settings` with the config files and --key=value flags in `argv` applied in order."""
    settings = dict(settings)
    for arg in argv:
        pairs = [read_flag(arg, settings)] if arg.startswith('-') else read_file(arg)
        for name, value, where in pairs:
            value = check(name, value, settings, where)
            settings[name] = os.path.expanduser(value) if name in PATHS else value
    return settings


def read_flag(arg, settings):
    name, equals, text = arg.removeprefix('--').partition('=')
    if not arg.startswith('--') or not equals:
        raise ValueError(f'expected a config file or --key=value, got {arg!r}')
    if isinstance(settings.get(name), str):
        return name, text, arg  # text stays text, so --out_dir=123 works
    try:
        return name, ast.literal_eval(text.capitalize() if text in ('true', 'false') else text), arg
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return name, text, arg


def read_file(path, within=()):
    """The pairs of a config file, after those of the one beside it that a line `include = 'name.py'` begins with."""
    try:
        with open(path, encoding='utf-8-sig') as f:  # a mark of Windows before the text is none of it
            source = f.read()
        body = ast.parse(source, path).body
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f'cannot read config file {path!r}: {error}') from None
    for line in body:
        where, text = f'{path}:{line.lineno}', source.split('\n')[line.lineno - 1].strip()[:80]
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name)):
            advice = 'a config file is read and never run, so leave the line out'
            raise ValueError(f'{where}: only `name = value` lines are allowed, got `{text}`: {advice}')
        try:
            value = read_value(line.value)
        except (TypeError, ArithmeticError, RecursionError):
            wanted = 'a value must be a number, a string, True or False'
            advice = f'write the result, or set it in the shell by --{line.targets[0].id}="$(...)"'
            raise ValueError(f'{where}: {wanted}, got `{text}`: {advice}') from None
        if line.targets[0].id == 'include':
            yield from read_file(included(value, path, where, within), (*within, path))
        else:
            yield line.targets[0].id, value, where


def included(name, path, where, within):
    """The path of the config file `name` beside the one at `path`."""
    if not isinstance(name, str) or os.path.basename(name) != name:
        raise ValueError(f'{where}: include wants the name of a config file in the same folder, got {name!r}')
    other = os.path.join(os.path.dirname(path), name)
    if other in (*within, path):
        raise ValueError(f'{where}: {name} includes itself')
    return other


def read_value(node):
    """A literal, or numbers joined by + - * / //, as in `batch_size = 5 * 8`; TypeError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in KINDS:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -read_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = read_value(node.left), read_value(node.right)
        if not isinstance(left, str) and not isinstance(right, str):
            return ARITHMETIC[type(node.op)](left, right)
    raise TypeError


def check(name, value, settings, where):
    """`value` as the type of the setting's default. Whole floats pass as int (1e3), and ints as float."""
    if name not in settings:
        close = difflib.get_close_matches(name, settings, n=1)
        advice = f'did you mean {close[0]!r}?' if close else 'see --help'
        raise ValueError(f'{where}: unknown setting {name!r}, {advice}')
    kind = type(settings[name])
    expected = f'{where}: {name} is {kind.__name__} (default {settings[name]!r})'
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is int and value.bit_length() > 1023:  # more than a float holds, or than Python prints
        raise ValueError(f'{expected}, got an int of {value.bit_length()} bits')
    if kind is int and type(value) is int and value >= 2**63:
        raise ValueError(f'{where}: {name} must be less than 2**63, got {value}')
    if type(value) is kind:
        if kind is float and not math.isfinite(value):
            raise ValueError(f'{where}: {name} must be finite, got {value!r}')
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise ValueError(f'{expected}, got {type(value).__name__} {value!r}')


def differing(then, now, free):
    """The names of settings that a run had otherwise `then` than `now`, but for those `free`."""
    return [name for name in now if name in then and name not in free and then[name] != now[name]]


def idle_settings(script, settings):
    """Lines that name the settings of a script that differ from their defaults and do nothing."""
    changed = [name for name, value in settings_of(script, []).items() if settings[name] != value]
    if settings.get('activation') == 'swish':  # its slopes learn as splines do, and do not decay
        changed = [name for name in changed if name != 'spline_lr_scale']
    lines = []
    for switch, begins in SWITCHES.items():
        names = [name for name in changed if name.startswith(begins)]
        if names and not settings.get(switch, True):
            lines.append(f'{switch} is off, and without it these do nothing: {", ".join(names)}')
    edges = settings['graph_edges'].split(',')
    for kind in 'window', 'topk':
        if settings['use_graph'] and f'graph_{kind}' in changed and (kind not in edges or 'causal' in edges):
            why = f'holds no {kind}' if kind not in edges else 'holds causal, and with it all earlier tokens'
            lines.append(f'graph_{kind} does nothing: graph_edges={settings["graph_edges"]!r} {why}')
    return lines + (idle_in_finetune(changed, settings) if script == 'finetune.py' else [])


def idle_in_finetune(changed, settings):
    task, kind, n_beams = (settings[name] for name in ('task', 'lora_kind', 'n_beams'))
    drawing, is_certain = ('temperature', 'top_p'), n_beams == 1 and settings['temperature'] == 0
    rules = [  # whether settings are idle, which, and why
        (settings['use_lora'] and kind != 'kan', ('lora_grid_size', 'lora_spline_order'), f'with lora_kind={kind!r}'),
        (task != 'sonnets', (*drawing, 'n_beams', 'best_of'), f'in the task {task}, which writes no text'),
        (task == 'sonnets' and n_beams > 1, drawing, f'with n_beams={n_beams}'),
        (task == 'sonnets' and is_certain, ('top_p', 'best_of'), 'with temperature=0, which takes the likeliest token'),
    ]
    found = [([name for name in names if name in changed], why) for is_idle, names, why in rules if is_idle]
    return [f'these do nothing {why}: {", ".join(names)}' for names, why in found if names]


def check_ranges(settings, at_least_one='', not_negative='', fractions='', shares=''):
    """ValueError for a number out of range. An argument names settings, between spaces; fractions are in [0, 1), shares
    in (0, 1].
    """
    rules = [
        (shares, lambda x: 0 < x <= 1, 'be greater than 0 and at most 1'),
        (at_least_one, lambda x: x >= 1, 'be at least 1'),
        (f'{not_negative} {fractions}', lambda x: x >= 0, 'not be negative'),
        (fractions, lambda x: x < 1, 'be less than 1'),
    ]
    for names, holds, wanted in rules:
        for name in names.split():
            if not holds(settings[name]):
                raise ValueError(f'{name} must {wanted}, got {settings[name]}')


def is_ours(module):
    """Whether a module, by its name, would be one of this repository."""
    first = module.partition('.')[0]
    return Path(ROOT, f'{first}.py').exists() or any(Path(ROOT, first).glob('*.py'))


def nobody_reads():
    """Whether the reader of this process has gone, as `| head` when it has read enough. What is left goes nowhere, or
    Python would complain once more at its end.
    """
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)  # tells of errors alone
        gone = bool(poll.poll(0))
    except (AttributeError, OSError, TypeError, ValueError):  # no file, or a system without poll
        return False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def report(kind, error, trace):
    """
    The excepthook of the scripts: a ValueError or OSError raised by this project's own lines is a mistake of the user's
    or of the world and prints as one line, as do a package that they miss and Ctrl-C; anything else is a fault of the
    program and keeps its traceback.
    """
    if issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
        return
    if issubclass(kind, BrokenPipeError) and nobody_reads():
        return
    files = [frame.filename for frame in traceback.extract_tb(trace) if not frame.filename.startswith('<frozen')]
    last = os.path.realpath(files[-1]) if files else ''
    ours = last.startswith(ROOT + os.sep) and 'site-packages' not in last
    if kind is ModuleNotFoundError and ours and not is_ours(error.name):
        print(f'error: {error}: pip install -r requirements-all.txt', file=sys.stderr)
    elif issubclass(kind, (ValueError, OSError)) and ours:
        # processes of one machine mostly meet the same mistake: torchrun ends the others when the first has said so
        is_first = os.environ.get('LOCAL_RANK', '0') == '0'
        place = '' if is_first else f' on process {os.environ.get("RANK")}'
        time.sleep(0 if is_first else PATIENCE)
        print(f'error{place}: {error}', file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)
