"""The house: what stands where, configs that parse, imports that point one way, commands and links that are right."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import override, read_file, settings_of
from helpers import ENV, ROOMS, ROOT, TINY, copy_code, flags, load, read_log, run_forked

CONFIGS = sorted(ROOT.glob('config/**/*.py'))
PAGES = [
    ROOT / 'README.md',
    *sorted(path for room in ('docs', 'results', 'data') for path in ROOT.glob(f'{room}/**/*.md')),
]
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
    'inside': {'configurator', 'layers', 'kan', 'model', 'surgery', 'run', 'data', 'tasks'},
}
COMMANDS = {'train', 'sample', 'finetune', 'eval', 'interpret', 'export', 'study'}  # they may import from all of these
HEAVY = set('matplotlib wandb tensorboard transformers peft torch_geometric tiktoken datasets'.split())
HEAVY |= set('scipy pytest plotly sklearn sacrebleu lm_eval'.split())
OTHERS = set(
    'kernels evaluate adapters datasets tokenizers accelerate transformers peft diffusers trl'.split()
)  # Hugging Face's


def read_command(config):
    """The script that runs a config file, by the command in its header."""
    text = config.read_text(encoding='utf-8')
    first = next(line.lineno for line in ast.parse(text).body if isinstance(line, ast.Assign))
    header = '\n'.join(text.splitlines()[: first - 1])
    return re.search(rf'(\w+\.py) (config/\S+ )?config/{config.relative_to(ROOT / "config")}\b', header)


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
    assert changed or config.parent.name == 'finetune'  # sst and lora are the defaults
    assert len(config.read_text(encoding='utf-8').splitlines()) <= 40
    assert settings.get('n_embd', 0) % settings.get('n_head', 1) == 0


def test_configs_name_only_what_differs_from_the_defaults():
    repeated = []
    for config in CONFIGS:
        defaults = settings_of(read_command(config)[1], [])
        for name, value, where in read_file(str(config)):
            chosen = config.parent.name == 'finetune' and name in ('task', 'use_lora', 'lora_kind')  # said all the same
            if value == defaults[name] and not chosen:
                repeated.append(f'{Path(where).name} {name}')
    assert not repeated, '\n'.join(repeated)


def test_runs_go_to_folders_of_their_own():
    names = [
        (settings_of('train.py', [str(path)])['out_dir'], path.name)
        for path in CONFIGS
        if path.stem.startswith('train_')
    ]
    assert len({out_dir for out_dir, _ in names}) == len(names), names


# what stands where


def test_the_root_has_what_a_reader_of_nanogpt_looks_for():
    assert {path.stem for path in ROOT.glob('*.py')} == COMMANDS - {'study'} | {'model', 'kan', 'configurator'}
    assert {path.name for path in ROOT.glob('requirements*.txt')} == {'requirements.txt', 'requirements-all.txt'}
    assert all((ROOT / room / '__init__.py').read_text() == '' for room in ROOMS)


def test_no_module_takes_the_name_of_a_package_that_people_have_beside_it():
    names = {path.stem for path in ROOT.glob('*.py')} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not names & OTHERS


def test_pages_and_lines_are_of_a_length_one_reads():
    assert len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines()) <= 150
    long = [
        f'{path.relative_to(ROOT)}:{number}'
        for path in CODE
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1)
        if len(line) > 120
    ]
    assert not long, '\n'.join(long)


@pytest.mark.parametrize('script', ['sample.py', 'study/sweep.py', 'data/sst/prepare.py'])
def test_scripts_run_from_anywhere_and_through_a_link(tmp_path, script):
    (tmp_path / 'house').symlink_to(ROOT)
    (tmp_path / 'link.py').symlink_to(ROOT / script)
    for path in ROOT / script, tmp_path / 'house' / script, tmp_path / 'link.py':
        command = [sys.executable, str(path), '--help']
        done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and f'python {script}' in done.stdout, done.stderr
        done = run_forked(tmp_path, path, '--source=absent' if 'data' in script else '--init_from=absent')
        assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr


def clever_lines(tree):
    """Numbers of lines that are shorter than they are clear."""
    for node in ast.walk(tree):
        inner = [child for child in ast.walk(node) if child is not node]
        is_next = isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'next'
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple):
            yield node.lineno, 'a statement that is a tuple'
        if isinstance(node, ast.IfExp) and any(isinstance(child, ast.IfExp) for child in inner):
            yield node.lineno, 'a conditional within a conditional'
        if is_next and any(isinstance(child, ast.NamedExpr) for child in inner):
            yield node.lineno, 'a walrus within next'


@pytest.mark.parametrize('path', CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_line_holds_one_thought(path):
    assert not list(clever_lines(ast.parse(path.read_text(encoding='utf-8'))))


# imports


def test_imports_point_one_way():
    assert {path.stem for path in ROOT.glob('*.py')} | {*ROOMS} == ABOVE.keys() | COMMANDS
    for path in CODE:
        place = path.relative_to(ROOT).with_suffix('').parts[0]
        place = 'prepare' if path.name == 'prepare.py' and path.parent.parent.name == 'data' else place  # a command
        allowed = ABOVE.get(place, ABOVE.keys()) | ({place} & {*ROOMS})
        for name in set(imported(path)) & (ABOVE.keys() | COMMANDS):
            assert name in allowed, f'{path.relative_to(ROOT)} imports from {name}'


def test_model_knows_nothing_of_what_acts_on_it():
    assert not re.search('lora|task|plot', (ROOT / 'model.py').read_text(encoding='utf-8'), re.IGNORECASE)


def test_kan_needs_torch_alone(tmp_path):
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
    (tmp_path / 'script.py').write_text(source)
    done = run_forked(tmp_path, tmp_path / 'script.py', modules=str(ROOT))
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
    command = [sys.executable, '-c', source, *config, '--seed=7']
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown, _, modules = done.stdout.partition('IMPORTED ')
    settings = settings_of(script, [*config, '--seed=7'])
    blank, *lines = shown.splitlines()[-len(settings) - 1 :]
    shown_flags = [line.partition('  # ')[0].rstrip() for line in lines]
    assert blank == '' and shown_flags == [f'--{name}={value!r}' for name, value in settings.items()]
    assert re.search(r'--dtype=.* # .*bfloat16', shown)
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
    script = args.pop(0) if program == 'python' else ROOT / 'tests/torchrun.py'
    done = run_forked(folder, folder / script, *args, *flags(**settings))
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = {
    name: TINY[name]
    for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'gradient_accumulation_steps', 'eval_iters')
}


def test_micro_kan_trains_and_goes_on(clone):
    micro = 'python train.py config/train_shakespeare_char_micro_kan.py'
    printed = enter(clone, f'{micro} --max_iters=20 --device=cpu --batch_size=8', **SMALL)
    assert printed.count('preparing it: python data/shakespeare_char/prepare.py') == 1
    assert 'step 0: train loss' in printed and 'step 20: train loss' in printed
    printed = enter(clone, f'{micro} --init_from=resume', **SMALL, device='cpu', batch_size=8, max_iters=22)
    assert 'preparing' not in printed
    out = clone / settings_of('train.py', [str(clone / 'config' / 'train_shakespeare_char_micro_kan.py')])['out_dir']
    assert load(out)['iter_num'] == 22 and load(out)['model_args']['use_kan']
    assert [line['iter'] for line in read_log(out)][-1] == 22


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


def test_main_tables_are_those_of_their_studies():
    def read_rows(page, title):
        _, section = (ROOT / 'results/nano' / page).read_text(encoding='utf-8').split(f'\n## {title}\n')
        lines = [line.strip('|').split('|') for line in section.partition('\n## ')[0].splitlines() if line[:2] == '| ']
        return {name.strip('` '): {cell.strip() for cell in cells} for name, *cells in lines}

    for title, baseline, n in ('Comparison', 'nano_kan', 6), ('Graph attention', 'nano', 4), ('Longer', 'nano_kan', 3):
        measured, rows = read_rows('table.md', title), read_rows('README.md', title)
        assert len(measured) > 2
        for name in measured.keys() - {'run'}:
            assert len(rows[name] & measured[name]) >= n - (name == baseline), name


def test_no_text_of_the_repository_names_a_folder_of_one_machine():
    for path in [*CODE, *CONFIGS, *PAGES]:
        assert not re.search(r'/(home|root|work|Users)/\w', path.read_text(encoding='utf-8')), path
    assert Path(ROOT, 'README.md').exists()


# pages


def commands(page):
    """The lines of the code blocks of a page that start a script, as [script, argument, ...]."""
    inside = False
    for line in page.read_text(encoding='utf-8').splitlines():
        if line.startswith('```'):
            inside = not inside
        words = shlex.split(line, comments=True) if inside and re.search(r'(python|torchrun) ', line) else []
        words = words[next((i + 1 for i, word in enumerate(words) if word in ('python', 'torchrun')), len(words)) :]
        words = [word for word in words if word not in ('--standalone',) and not word.startswith('--nproc')]
        if words and words[0].endswith('.py') and '$' not in line:
            yield words


def names_set_in(script):
    """The settings of any script: what it assigns at its top level."""
    lines = ast.parse((ROOT / script).read_text(encoding='utf-8')).body
    return {
        line.targets[0].id for line in lines if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
    }


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page_are_right(page):
    for script, *args in commands(page):
        flags = [arg for arg in args if arg.startswith('--') and '{' not in arg]
        configs = [arg for arg in args if arg.startswith('config/') and not arg.endswith('_mine.py')]
        assert (ROOT / script).exists(), script
        assert all((ROOT / config).exists() for config in configs), configs
        if '/' not in script:
            settings_of(
                script, [str(ROOT / config) for config in configs] + [flag for flag in flags if flag != '--help']
            )
        known = names_set_in(script) | (
            names_set_in('train.py') if script.endswith(('sweep.py', 'balance.py')) else set()
        )
        unknown = {flag[2:].partition('=')[0] for flag in flags} - known - {'help'}
        assert not unknown, (script, unknown)


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding='utf-8')
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', text) if not link.startswith(('http', '#'))]
    for link in links:
        assert (page.parent / link.partition('#')[0]).exists(), link
