"""The repository as a whole: configs that parse, imports that point one way, and the commands of the README at a tiny size."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import override, read_file, settings_of
from helpers import ENV, ROOMS, ROOT, TINY, copy_code, flags, load, read_log

CONFIGS = sorted(ROOT.glob('config/*.py'))
CODE = sorted([*ROOT.glob('*.py'), *(path for room in ROOMS for path in ROOT.glob(f'{room}/**/*.py'))])
ABOVE = {  # what a module of the root or of a room may import from, besides its own room
    'configurator': set(),
    'layers': set(),
    'kan': {'layers'},
    'model': {'layers', 'kan'},
    'surgery': {'layers', 'kan', 'model'},
    'run': {'configurator', 'layers', 'kan', 'model', 'surgery'},
    'data': {'configurator', 'run'},
    'tasks': {'configurator', 'layers', 'kan', 'model', 'surgery', 'run', 'data'},
}
COMMANDS = {'train', 'sample', 'finetune', 'eval', 'study'}  # they may import from all of these
HEAVY = {
    'matplotlib',
    'wandb',
    'transformers',
    'peft',
    'torch_geometric',
    'tiktoken',
    'datasets',
    'scipy',
    'pytest',
    'plotly',
    'sklearn',
    'sacrebleu',
}


def read_command(config):
    """The script that runs a config file, by the command in its header."""
    text = config.read_text(encoding='utf-8')
    first = next(line.lineno for line in ast.parse(text).body if isinstance(line, ast.Assign))
    header = '\n'.join(text.splitlines()[: first - 1])
    return re.search(rf'(\w+\.py) config/{config.name}\b', header)


def imported(path):
    """The modules that a file imports at its top level or anywhere below."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.')[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split('.')[0]


# config files


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_tells_its_command(config):
    command = read_command(config)
    assert command, f'the header of {config.name} does not say how to run it'
    defaults = settings_of(command[1], [])
    settings = override(defaults, [str(config)])
    changed = {name for name, value in settings.items() if value != defaults[name]}
    assert changed
    assert len(config.read_text(encoding='utf-8').splitlines()) <= 40
    assert settings.get('n_embd', 0) % settings.get('n_head', 1) == 0


def test_configs_name_only_what_differs_from_the_defaults():
    repeated = []
    for config in CONFIGS:
        defaults = settings_of(read_command(config)[1], [])
        for name, value, where in read_file(str(config)):
            if value == defaults[name]:
                repeated.append(f'{Path(where).name} {name}')
    assert not repeated, '\n'.join(repeated)


def test_runs_go_to_folders_of_their_own():
    names = [
        (settings_of('train.py', [str(path)])['out_dir'], path.name)
        for path in CONFIGS
        if path.stem.startswith('train_shake')
    ]
    assert len({out_dir for out_dir, _ in names}) == len(names), names


# imports


def test_imports_point_one_way():
    assert {path.stem for path in ROOT.glob('*.py')} | {*ROOMS} == ABOVE.keys() | COMMANDS
    for path in CODE:
        place = path.relative_to(ROOT).with_suffix('').parts[0]
        allowed = ABOVE.get(place, ABOVE.keys()) | ({place} & {*ROOMS})
        for name in set(imported(path)) & (ABOVE.keys() | COMMANDS):
            assert name in allowed, f'{path.relative_to(ROOT)} imports from {name}'


def test_model_knows_nothing_of_what_acts_on_it():
    assert not re.search('lora|task|plot', (ROOT / 'model.py').read_text(encoding='utf-8'), re.IGNORECASE)


def run_python(source, *args):
    return subprocess.run(
        [sys.executable, '-c', source, *args], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60
    )


def test_kan_needs_torch_alone():
    others = (ABOVE.keys() | COMMANDS) - {'kan', 'layers'}
    source = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {sorted(others)!r}:
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
from kan import KAN
print(KAN([4, 3, 2])(torch.zeros(5, 4)).shape)
"""
    done = run_python(source)
    assert done.stdout == 'torch.Size([5, 2])\n', done.stderr


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_help_shows_the_settings_and_imports_little(script):
    config = [str(path) for path in CONFIGS if read_command(path)[1] == script][:1]
    source = f"""
import atexit, runpy, sys

atexit.register(lambda: print('IMPORTED', *sorted(sys.modules)))
sys.argv = [{script!r}, *sys.argv[1:], '--help']
runpy.run_path({script!r}, run_name='__main__')
"""
    done = run_python(source, *config, '--seed=7')
    assert done.returncode == 0, done.stderr
    shown, _, modules = done.stdout.partition('IMPORTED ')
    settings = settings_of(script, [*config, '--seed=7'])
    assert shown.endswith('\n\n' + ''.join(f'--{name}={value!r}\n' for name, value in settings.items()))
    assert '--seed=7' in shown and f'python {script}' in shown
    assert not HEAVY & {name.split('.')[0] for name in modules.split()}


# the commands of the README, in a copy of the repository

MAKE_TOY = """
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), {tests!r}]
from helpers import write_dataset

write_dataset(Path(__file__).resolve().parent)
"""


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """The scripts and configs beside a data set that is soon made."""
    folder = tmp_path_factory.mktemp('clone')
    copy_code(folder)
    shutil.copytree(ROOT / 'config', folder / 'config')
    toy = folder / 'data' / 'shakespeare_char'
    (toy / 'prepare.py').write_text(MAKE_TOY.format(tests=str(ROOT / 'tests')))
    return folder


def enter(folder, line, **settings):
    """Type a command line, with flags after it that make it tiny."""
    program, *args = line.replace('"', '').split()
    programs = {'python': [sys.executable], 'torchrun': [sys.executable, '-m', 'torch.distributed.run']}
    command = [*programs[program], *args, *flags(**settings)]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = {
    name: TINY[name]
    for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'gradient_accumulation_steps', 'eval_iters')
}


def test_micro_kan_trains_and_goes_on(clone):
    micro = 'python train.py config/train_shakespeare_char_micro_kan.py'
    printed = enter(clone, f'{micro} --max_iters=100 --device=cpu --batch_size=8', **SMALL)
    assert printed.count('preparing it: python data/shakespeare_char/prepare.py') == 1
    assert 'step 0: train loss' in printed and 'step 100: train loss' in printed
    printed = enter(clone, f'{micro} --init_from=resume', **SMALL, device='cpu', batch_size=8, max_iters=102)
    assert 'preparing' not in printed
    out = clone / settings_of('train.py', [str(clone / 'config' / 'train_shakespeare_char_micro_kan.py')])['out_dir']
    assert load(out)['iter_num'] == 102 and load(out)['model_args']['use_kan']
    assert [line['iter'] for line in read_log(out)][-1] == 102


def test_nano_kan_trains_on_two_processes_and_samples(clone):
    nano = 'torchrun --standalone --nproc_per_node=2 train.py config/train_shakespeare_char_nano_kan.py --device=cpu'
    printed = enter(clone, nano, **SMALL, batch_size=2, max_iters=20, eval_interval=10)
    assert '2 process(es)' in printed and 'step 20: train loss' in printed
    sample = 'python sample.py --out_dir=out-shakespeare-char-nano-kan --start="ROMEO:" --num_samples=3 --seed=1'
    printed = enter(clone, sample, max_new_tokens=20, device='cpu')
    assert printed.count('ROMEO:') == 3 and printed.count('\n---------------\n') == 3


def test_every_script_says_how_to_run_it():
    for path in CODE:
        source = path.read_text(encoding='utf-8')
        if path.stem != 'configurator' and 'configure(globals()' in source:
            assert f'python {path.relative_to(ROOT)}' in ast.get_docstring(ast.parse(source)), path.name


def test_main_table_of_the_readme_is_that_of_its_study():
    def read_rows(path):
        lines = [
            line.strip('|').split('|')
            for line in path.read_text(encoding='utf-8').splitlines()
            if line.startswith('| ')
        ]
        return {name.strip('` '): {cell.strip() for cell in cells} for name, *cells in lines}

    rows, measured = read_rows(ROOT / 'README.md'), read_rows(ROOT / 'results/nano/compare.md')
    for name in measured.keys() - {'run', '---'}:
        assert len(rows[name] & measured[name]) >= (5 if name == 'nano_kan' else 6), name


def test_no_text_of_the_repository_names_a_folder_of_one_machine():
    for path in [*CODE, *ROOT.glob('*.md'), *ROOT.glob('config/*'), *ROOT.glob('data/*/*.md')]:
        assert not re.search(r'/(home|root|work|Users)/\w', path.read_text(encoding='utf-8')), path
    assert Path(ROOT, 'README.md').exists()
