"""Settings are data: what a config file or flag may say, in which order, and how it is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import configurator
from configurator import check_ranges, configure, names_of_configs, override
from helpers import ROOT, run_forked, together

DEFAULTS = dict(batch_size=12, learning_rate=6e-4, use_kan=False, out_dir='out', n_layer=2)


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)


@pytest.fixture
def config(tmp_path):
    """Writes a config file and returns its path."""

    def write(text, name='c.py'):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def settle(*argv, **defaults):
    variables = {**DEFAULTS, **defaults}
    settings = configure(variables, list(argv))
    assert variables == settings
    return settings


def refuse(*argv):
    """The message, one line of it, and no setting changed."""
    variables = dict(DEFAULTS)
    with pytest.raises(ValueError) as error:
        configure(variables, list(argv))
    assert variables == DEFAULTS and '\n' not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


NANOGPT = """# as nanoGPT's config/finetune_shakespeare.py begins
import time

out_dir = 'out-shakespeare'
wandb_run_name = 'ft-' + str(time.time())
"""


def test_what_to_write_in_place_of_code(config):
    never_run = 'only `name = value` lines are allowed, got `import time`: a config file is read and never run'
    assert refuse(config(NANOGPT)).endswith(f'c.py:2: {never_run}, so leave the line out')
    for value in "'ft-' + str(time.time())", "f'ft-{3}'":
        text = NANOGPT.replace('import time\n', '').replace("'ft-' + str(time.time())", value)
        wanted = f'a value must be a number, a string, True or False, got `wandb_run_name = {value}`'
        advice = 'write the result, or set it in the shell by --wandb_run_name="$(...)"'
        assert refuse(config(text)).endswith(f'c.py:4: {wanted}: {advice}')


# order and values


def test_files_and_flags_apply_from_left_to_right(config):
    a, b = config('batch_size = 1\nn_layer = 1', 'a.py'), config('batch_size = 2\nbatch_size = 3', 'b.py')
    assert settle() == DEFAULTS
    assert settle(a, '--batch_size=5')['batch_size'] == 5
    assert settle('--batch_size=5', a)['batch_size'] == 1
    assert settle(a, b, '--out_dir=x') == {**DEFAULTS, 'batch_size': 3, 'n_layer': 1, 'out_dir': 'x'}
    assert settle(b, a)['batch_size'] == 1


def test_a_config_file_of_windows(tmp_path):
    path = tmp_path / 'w.py'
    path.write_bytes(b'\xef\xbb\xbfbatch_size = 7\r\nn_layer = 3\r\n')
    settings = settle(str(path))
    assert (settings['batch_size'], settings['n_layer']) == (7, 3)


def test_the_home_folder_in_paths_and_nowhere_else(config, monkeypatch):
    monkeypatch.setenv('HOME', '/far/away')
    assert settle('--out_dir=~/x')['out_dir'] == settle(config("out_dir = '~/x'"))['out_dir'] == '/far/away/x'
    defaults = {'start': '', 'dataset': 'a'}
    assert override(defaults, ['--start=~/x', '--dataset=~/y']) == {'start': '~/x', 'dataset': '/far/away/y'}


def test_a_config_file_goes_on_from_the_one_it_includes(config, tmp_path, monkeypatch):
    config('batch_size = 1\nn_layer = 1', 'a.py')
    b = config("include = 'a.py'\nn_layer = 2", 'b.py')
    c = config("batch_size = 7\ninclude = 'b.py'\nout_dir = 'c'", 'c.py')
    assert settle(b, '--out_dir=x') == {**DEFAULTS, 'batch_size': 1, 'n_layer': 2, 'out_dir': 'x'}
    assert settle(c) == {**DEFAULTS, 'batch_size': 1, 'n_layer': 2, 'out_dir': 'c'}
    monkeypatch.chdir(tmp_path.parent)
    assert settle(f'{tmp_path.name}/b.py')['batch_size'] == 1


def test_what_cannot_be_included_is_named(config, tmp_path):
    for text in '../a.py', '/etc/a.py', 'd/a.py', 7:
        assert f'c.py:2: include wants the name of a config file in the same folder, got {text!r}' in refuse(
            config(f'n_layer = 1\ninclude = {text!r}')
        )
    assert "cannot read config file '" + str(tmp_path / 'absent.py') in refuse(config("include = 'absent.py'"))
    assert 'c.py:1: c.py includes itself' in refuse(config("include = 'c.py'"))
    config("include = 'c.py'", 'd.py')
    assert 'd.py:1: c.py includes itself' in refuse(config("include = 'd.py'"))
    assert "unknown setting 'include'" in refuse("--include='a.py'")


def test_config_file_holds_docstrings_comments_and_assignments(config):
    path = config(
        '"""What it is.\n\nOn two lines."""\n# a comment\nbatch_size = 7  # another\n\n'
        'use_kan = True; n_layer = 3\n"text"\n'
    )
    assert settle(path) == {**DEFAULTS, 'batch_size': 7, 'use_kan': True, 'n_layer': 3}
    assert settle(config('')) == settle(config('# nothing\n')) == DEFAULTS


@pytest.mark.parametrize(
    'text, value',
    [
        ('5 * 8', 40),
        ('7 // 2', 3),
        ('2 + 3 - 1', 4),
        ('8 / 2', 4),
        ('-(2 - 5)', 3),
        ('1e3', 1000),
        ('2 * (3 + 4)', 14),
        ('-3', -3),
        ('1_000', 1000),
    ],
)
def test_numbers_may_be_joined(config, text, value):
    result = settle(config(f'batch_size = {text}'))['batch_size']
    assert result == value and type(result) is int


@pytest.mark.parametrize(
    'text, value', [('1', 1.0), ('-2', -2.0), ('1e-3', 1e-3), ('.5', 0.5), ('0', 0.0), ('6e4', 6e4)]
)
def test_float_takes_whole_numbers(config, text, value):
    for result in (settle(config(f'learning_rate = {text}')), settle(f'--learning_rate={text}')):
        assert result['learning_rate'] == value and type(result['learning_rate']) is float


@pytest.mark.parametrize('text, value', [('1e3', 1000), ('4.0', 4), ('-4', -4), ('0', 0)])
def test_integer_takes_whole_floats_from_flags(text, value):
    result = settle(f'--batch_size={text}')['batch_size']
    assert result == value and type(result) is int


@pytest.mark.parametrize(
    'text', ['123', '1e-3', 'True', 'a=b', '--x', 'None', '', "'quoted'", 'ROMEO: é\n', '[1]', 'FILE:a b']
)
def test_text_from_flags_stays_text(text):
    assert settle(f'--out_dir={text}')['out_dir'] == text


@pytest.mark.parametrize('text, value', [('true', True), ('True', True), ('false', False), ('False', False)])
def test_flags_take_booleans_in_both_spellings(text, value):
    assert settle(f'--use_kan={text}', use_kan=not value)['use_kan'] is value


def test_underscores_modules_and_other_types_are_no_settings():
    variables = dict(DEFAULTS, _private=1, __name__='x', os=os, path=Path('.'), function=len, numbers=[1], nothing=None)
    before = dict(variables)
    assert configure(variables, ['--n_layer=3']) == {**DEFAULTS, 'n_layer': 3}
    assert variables == {**before, 'n_layer': 3}
    for name in ('_private', 'os', 'path', 'function', 'numbers', 'nothing'):
        with pytest.raises(ValueError, match=f"unknown setting '{name}'"):
            configure(variables, [f'--{name}=1'])


def test_arguments_come_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--n_layer=9'])
    assert configure(dict(DEFAULTS))['n_layer'] == 9
    assert sys.excepthook is configurator.report


def test_an_interrupted_script_says_so_in_a_line(capsys):
    configurator.report(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == 'interrupted\n'


def test_a_package_that_is_missing_is_named_in_a_line(tmp_path):
    script = f'import sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.modules["matplotlib"] = None\nimport configurator\n'
    (tmp_path / 'script.py').write_text(f'{script}configurator.configure(globals())\nimport inside.figures\n')
    done = subprocess.run([sys.executable, tmp_path / 'script.py'], capture_output=True, text=True)
    assert 'matplotlib' in done.stderr and done.stderr.endswith('pip install -r requirements-all.txt\n')
    assert done.stderr.count('\n') == 1


# refusals


def test_unknown_setting_names_the_nearest_and_the_place(config):
    path = config('\n\nbatchsize = 3\n')
    assert refuse(path) == f"{path}:3: unknown setting 'batchsize', did you mean 'batch_size'?"
    assert refuse('--batchsize=3') == "--batchsize=3: unknown setting 'batchsize', did you mean 'batch_size'?"
    assert refuse('--zzz=3') == "--zzz=3: unknown setting 'zzz', see --help"


@pytest.mark.parametrize(
    'name, text, expected',
    [
        ('batch_size', '1.5', 'batch_size is int (default 12), got float 1.5'),
        ('batch_size', 'True', 'batch_size is int (default 12), got bool True'),
        ('batch_size', '"12"', "batch_size is int (default 12), got str '12'"),
        ('batch_size', '1e999', 'batch_size is int (default 12), got float inf'),
        ('learning_rate', '"a"', "learning_rate is float (default 0.0006), got str 'a'"),
        ('learning_rate', 'False', 'learning_rate is float (default 0.0006), got bool False'),
        ('use_kan', '1', 'use_kan is bool (default False), got int 1'),
        ('use_kan', '"True"', "use_kan is bool (default False), got str 'True'"),
        ('out_dir', '12', "out_dir is str (default 'out'), got int 12"),
    ],
)
def test_wrong_type_names_the_right_one_and_the_place(config, name, text, expected):
    path = config(f'# first line\n{name} = {text}')
    assert refuse(path) == f'{path}:2: {expected}'
    if name != 'out_dir':
        assert refuse(f'--{name}={text}') == f'--{name}={text}: {expected}'


@pytest.mark.parametrize(
    'text', ['abc', '5*8', '', '[1]', 'None', '1 2', '__import__("os")', '(' * 5000, '-' * 100000 + '1', '1 if']
)
def test_flag_that_is_no_number_is_refused(text):
    variables = dict(DEFAULTS)
    with pytest.raises(ValueError, match='batch_size is int'):
        configure(variables, [f'--batch_size={text}'])
    assert variables == DEFAULTS


@pytest.mark.parametrize('arg', ['-batch_size=3', '--batch_size', '-n', '--', '--no-use_kan'])
def test_flag_without_a_value_is_refused(arg):
    assert refuse(arg) == f'expected a config file or --key=value, got {arg!r}'


@pytest.mark.parametrize(
    'line',
    [
        'batch_size = open({path!r}, "w").close() or 1',
        'import os; os.mkdir({path!r})',
        'from pathlib import Path',
        'open({path!r}, "w")',
        'batch_size = __import__("os").mkdir({path!r})',
        'out_dir = f"{{open({path!r}, chr(119))}}"',
        'batch_size = [open({path!r}, "w") for _ in "a"]',
        'batch_size = (lambda: open({path!r}, "w"))()',
        'if True: batch_size = 1',
        'def f(): pass',
        'class C: x = open({path!r}, "w")',
        '@open({path!r}, "w")\ndef f(): pass',
        'batch_size: int = 1',
        'batch_size += 1',
        'batch_size = n_layer = 1',
        'batch_size, n_layer = 1, 2',
        'DEFAULTS["a"] = 1',
        'a.b = 1',
        '(batch_size := 1)',
        'batch_size = (n_layer := 1)',
        'batch_size = n_layer',
        'batch_size = "abc"[0]',
        'batch_size = [1][0]',
        'batch_size = 1 if True else 2',
        'batch_size = 2 ** 9',
        'batch_size = 7 % 2',
        'batch_size = 1 << 3',
        'batch_size = 1 // 0',
        'batch_size = 1 / 0.0',
        'batch_size = 1 + None',
        'batch_size = None',
        'batch_size = ...',
        'batch_size = 1j',
        'batch_size = not 1',
        'batch_size = 1 < 2',
        'use_kan = 1 and 2',
        'out_dir = "a" * 3',
        'out_dir = 1000000000 * "a"',
        'out_dir = "a" + "b"',
        'out_dir = -"a"',
        'out_dir = b"a"',
        'out_dir = ["a"]',
        'out_dir = {{}}',
    ],
)
def test_anything_but_literals_and_arithmetic_is_refused_and_never_executed(config, tmp_path, line):
    path = config('n_layer = 5\n' + line.format(path=str(tmp_path / 'made')))
    assert refuse(path).startswith((f'{path}:2: ', f'{path}:3: '))  # the decorated function begins on line 3
    assert os.listdir(tmp_path) == ['c.py']


@pytest.mark.parametrize(
    'text',
    [
        b'out_dir = "\xff"',
        b'out_dir = "a\x00b"',
        b'batch_size = ',
        b'  n_layer = 1',
        b'batch_size = ' + b'9' * 5000,
        b'x = ' + b'(' * 5000,
    ],
)
def test_unreadable_config_file_is_named(config, text):
    path = config(text)
    assert refuse(path).startswith(f'cannot read config file {path!r}: ')


def test_missing_config_file_is_named(tmp_path):
    for path in (str(tmp_path / 'c.py'), str(tmp_path), 'config/nothing', 'a\0b'):
        assert refuse(path).startswith(f'cannot read config file {path!r}: ')


@pytest.mark.parametrize('name', ['learning_rate', 'batch_size', 'out_dir'])
@pytest.mark.parametrize(
    'text',
    ['0x' + 'f' * 5000, '10 * 0x' + 'f' * 5000, '0x' + 'f' * 5000 + ' / 3'],
    ids=['plain', 'product', 'quotient'],
)
def test_number_too_large_to_print_is_refused_with_the_place(config, name, text):
    path = config(f'{name} = {text}')
    assert refuse(path).startswith(f'{path}:1: ')


@pytest.mark.parametrize(
    'text', ['1' + ' + 1' * 2000, '-' * 900 + '1', '(' * 150 + '1' + ')' * 150], ids=['sum', 'signs', 'brackets']
)
def test_deeply_nested_value_is_a_value_or_refused_with_the_place(config, text):
    path = config(f'batch_size = {text}')
    try:
        assert settle(path)['batch_size'] in (1, 2001)
    except ValueError as error:
        assert path in str(error)


def test_huge_integers_do_not_become_floats():
    assert 'learning_rate is float' in refuse('--learning_rate=1' + '0' * 400)
    assert settle('--learning_rate=1' + '0' * 300)['learning_rate'] == 1e300
    for number in '1e300', str(2**63):
        assert 'batch_size must be less than 2**63, got ' in refuse(f'--batch_size={number}')
    assert settle(f'--batch_size={2**63 - 1}')['batch_size'] == 2**63 - 1


# names and ranges


@pytest.mark.parametrize(
    'argv, names',
    [
        ([], []),
        (['--seed=2', '-h'], []),
        (['config/finetune/sst.py', '--seed=2', 'config/finetune/kan_lora.py'], ['sst', 'kan-lora']),
        (['/home/me/my_task.py', '--out_dir=a.py'], ['my-task']),
        (['a.py', 'b.c.py', 'd'], ['a', 'b.c', 'd']),
    ],
)
def test_config_files_name_a_run(argv, names):
    """In their order, without the flags among them; underscores become hyphens."""
    assert names_of_configs(argv) == names


RANGES = dict(at_least_one='n_layer n_embd', not_negative='rate', fractions='dropout beta')
IN_RANGE = dict(n_layer=1, n_embd=1, rate=0.0, dropout=0.0, beta=0.999, other=-5)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(n_layer=0), 'n_layer must be at least 1, got 0'),
        (dict(n_embd=-3), 'n_embd must be at least 1, got -3'),
        (dict(rate=-0.5), 'rate must not be negative, got -0.5'),
        (dict(dropout=-0.5), 'dropout must not be negative, got -0.5'),
        (dict(beta=1.0), 'beta must be less than 1, got 1.0'),
    ],
    ids=str,
)
def test_number_out_of_range_is_named(settings, message):
    check_ranges(IN_RANGE, **RANGES)
    with pytest.raises(ValueError) as error:
        check_ranges({**IN_RANGE, **settings}, **RANGES)
    assert str(error.value) == message


# --help and errors as scripts show them


SCRIPT = '''"""
What it does.

    python script.py --n_layer=3
"""
import json, sys
sys.path.insert(0, {root!r})
import configurator
from run import files
n_layer = 2  # blocks
out_dir = 'out'
_hidden = 1
config = configurator.configure(globals())
n_layer = n_layer + 0  # not what it means
print('went on with', n_layer)
{body}
'''


def write_script(folder, body=''):
    path = folder / 'script.py'
    path.write_text(SCRIPT.format(root=str(ROOT), body=body))
    return path


def run_script(tmp_path, *argv, body=''):
    command = [sys.executable, str(write_script(tmp_path, body)), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_a_reader_that_has_gone_is_no_error(tmp_path, unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, write_script(tmp_path), '--help']
    env = {**os.environ, 'PYTHONUNBUFFERED': unbuffered}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert done.stderr == ''


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_prints_the_resolved_settings_and_exits(tmp_path, flag):
    (tmp_path / 'c.py').write_text('n_layer = 5')
    result = run_script(tmp_path, flag, 'c.py', '--out_dir=a b')
    assert (result.returncode, result.stderr) == (0, '')
    flags = f"{'--n_layer=5':<33}  # blocks\n--out_dir='a b'\n"
    assert result.stdout == 'What it does.\n\n    python script.py --n_layer=3\n\n' + flags


def test_help_checks_the_settings_first(tmp_path):
    result = run_script(tmp_path, '--help', '--n_layers=5')
    assert (result.returncode, result.stdout) == (1, '')
    assert result.stderr == "error: --n_layers=5: unknown setting 'n_layers', did you mean 'n_layer'?\n"


def test_mistakes_of_the_user_are_one_line(tmp_path):
    result = run_script(tmp_path, '--n_layer=a')
    assert (result.returncode, result.stderr) == (1, "error: --n_layer=a: n_layer is int (default 2), got str 'a'\n")
    result = run_script(tmp_path, '--n_layer=3', body='files.sha256_of("nothing")')
    assert (result.returncode, result.stdout) == (1, 'went on with 3\n')
    assert result.stderr.startswith('error: ') and 'nothing' in result.stderr and result.stderr.count('\n') == 1


@pytest.mark.parametrize(
    'body',
    [
        'configurator.check("n_layer", 1, None, "here")',  # a TypeError of the project
        'configurator.override({}, None)',
        'json.loads("{")',  # a ValueError of another's library
        'int("a")',  # a ValueError of a script that is not the project's
        'assert False',
    ],
)
def test_faults_of_the_program_keep_their_traceback(tmp_path, body):
    result = run_script(tmp_path, body=body)
    assert result.returncode == 1 and result.stderr.startswith('Traceback (most recent call last):')


def test_mistake_is_one_line_of_all_processes_and_names_the_process_that_makes_it_alone(tmp_path):
    """Under torchrun, which says on stderr, too, that a process has failed."""
    bodies = {
        'alone': 'import os\nif os.environ["LOCAL_RANK"] == "1": files.sha256_of("nothing")',
        'all': 'files.sha256_of("nothing")',
    }
    for name in bodies:
        (tmp_path / name).mkdir()
        write_script(tmp_path / name, bodies[name])
    done = together(
        *(lambda name=name: run_forked(tmp_path, tmp_path / name / 'script.py', processes=2) for name in bodies)
    )
    alone, all_of_them = ([line for line in each.stderr.splitlines() if line.startswith('error')] for each in done)
    assert len(alone) == 1 and alone[0].startswith('error on process 1: ') and 'nothing' in alone[0]
    assert len(all_of_them) == 1 and all_of_them[0].startswith('error: ') and 'nothing' in all_of_them[0]
    assert done[0].returncode == done[1].returncode == 1


def test_characters_that_a_terminal_lacks_end_nothing(tmp_path):
    """As in a folder of another encoding, or on a terminal of ASCII."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import configure
name = 'a'
configure(globals())
print('R\u00b2 of', name)
raise ValueError(name)
"""
    (tmp_path / 'script.py').write_text(script, encoding='utf-8')
    env = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    command = [sys.executable, tmp_path / 'script.py', b'--name=b\xff']
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout == 'R\\xb2 of b\\udcff\n' and 'b\\udcff' in done.stderr and done.returncode == 1
