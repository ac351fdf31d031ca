"""
peft_kan.py: PEFT's own checks of its methods, run from PEFT's source distribution, and ours.
PEFT_SOURCE names a folder with that source; without it pip downloads it once, into the cache of pytest.
"""

import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from filelock import FileLock

from helpers import ROOT, run_forked

pytest.importorskip('peft')

from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from surgery import peft_kan
from surgery.lora import LoRAConfig, add_lora, lora_layers
from surgery.peft_kan import KanLoraConfig, KanLoraLinear

pytestmark = pytest.mark.usefixtures('one_thread', 'seed', 'offline')

PEFT_SDIST = 'peft==0.21.2 --hash=sha256:b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e'


@pytest.fixture
def offline(monkeypatch):
    """PEFT asks the hub whether a base model is there."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')


# PEFT's own checks


def download_source(folder):
    """The tests of PEFT's source distribution, unpacked into `folder`; OSError with pip's reason where it fails."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        requirements = Path(aside, 'requirements.txt')
        requirements.write_text(PEFT_SDIST + '\n')
        # pip asks the package for its metadata; with build isolation it would download a setuptools of its own for that
        options = [
            '-q',
            '--retries=1',
            '--no-deps',
            '--no-binary=:all:',
            '--no-build-isolation',
            '--require-hashes',
            '-d',
            aside,
        ]
        pip = [sys.executable, '-m', 'pip', 'download', *options, '-r', str(requirements)]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise OSError((done.stderr.strip().splitlines() or ['pip gives no reason'])[-1])
        with tarfile.open(next(Path(aside).glob('peft-*.tar.gz'))) as archive:
            archive.extractall(aside, [member for member in archive if '/tests/' in member.name], filter='data')
        next(Path(aside).glob('peft-*/')).rename(folder)
    return folder


class ReachedMerging(Exception):
    """A check has come to its part on merging, which PEFT leaves out for methods that cannot merge."""


@pytest.fixture(scope='module')
def suite(request):
    """PEFT's tests/test_custom_models.py as a module."""
    source = os.environ.get('PEFT_SOURCE')
    if not source:
        source = request.config.cache.mkdir('peft') / '0.21.2'
        try:
            with FileLock(f'{source}.lock'):  # tests in several processes: one downloads
                source = source if source.exists() else download_source(source)
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"PEFT's source cannot be had ({error}); PEFT_SOURCE=folder names a copy of it")
    with pytest.MonkeyPatch.context() as patch:
        for name, attribute in (
            ('diffusers', 'StableDiffusionPipeline'),
            ('datasets', 'load_dataset'),
        ):  # imported, and not used here
            stub = types.ModuleType(name)
            setattr(stub, attribute, type(attribute, (), {}))
            patch.setitem(sys.modules, name, stub)
        package = types.ModuleType('peft_tests')
        package.__path__ = [str(Path(source, 'tests'))]
        sys.modules['peft_tests'] = package
        module = importlib.import_module('peft_tests.test_custom_models')

    def stop(*args):
        raise ReachedMerging

    module._skip_if_merging_not_supported = sys.modules['peft_tests.testing_common']._skip_if_merging_not_supported = (
        stop
    )
    return module


def run_check(method, **arguments):
    wanted = inspect.signature(method).parameters
    try:
        method(**{name: value for name, value in arguments.items() if name in wanted})
    except ReachedMerging:
        pass


CASES = {  # the model, by its name in PEFT's tests, and our settings
    'linear': ('MLP', dict(target_modules=['lin0', 'lin1'])),
    'conv1d': ('EmbConv1D', dict(target_modules=['conv1d'], squash='norm', spline_order=3)),
    'dora': ('MLP', dict(target_modules=['lin0'], use_dora=True, use_rslora=True, modules_to_save=['lin1'])),
}
CHECKS = """
    test_active_adapter
    test_adapter_name
    test_adding_multiple_adapters_with_bias_raises
    test_attributes_parametrized
    test_delete_adapter
    test_delete_adapter_properly_cleans_up_after_itself
    test_delete_inactive_adapter
    test_delete_unknown_adapter_raises
    test_disable_adapter_is_reentrant
    test_disable_adapters
    test_disable_adapters_exiting_context_irregular_state
    test_disable_adapters_exiting_context_restores_previous_state
    test_forward_bfloat16
    test_forward_bfloat16_no_autocast
    test_forward_float16
    test_forward_float16_no_autocast
    test_forward_output_finite
    test_from_pretrained_config_construction
    test_get_base_model_state_dict
    test_in_features_out_features_exposed
    test_inference_safetensors
    test_load_model_low_cpu_mem_usage
    test_load_multiple_adapters
    test_only_params_are_updated
    test_parameters_after_loading_model
    test_peft_model_device_map
    test_save_load_roundtrip
    test_save_load_roundtrip_direct_injection
    test_save_pretrained
    test_save_pretrained_adapter_name_substring
    test_save_pretrained_pickle
    test_training_custom_models
""".split()
CHECKS_OF_CONFIGS = """
    test_adapter_name_makes_no_difference
    test_multiple_active_adapters_with_different_modules_to_save_works
    test_multiple_active_adapters_with_overlapping_modules_to_save_raises
    test_multiple_active_adapters_with_same_modules_to_save_raises
    test_multiple_adapters_mixed_modules_to_save
    test_multiple_adapters_mixed_modules_to_save_order_switched
    test_set_adapter_non_overlapping_modules
    test_set_adapter_non_overlapping_modules_to_save
    test_set_requires_grad
""".split()
LEFT_OUT = {
    'merging, which this adapter cannot do: test_merging_is_refused': """
        test_delete_merged_adapter_only_rejects_the_merged_one
        test_delete_merged_adapter_raises_without_mutation
        test_disable_adapters_with_merging
        test_merge_layers
        test_merge_layers_fp16
        test_merge_layers_is_deterministic_in_train_mode
        test_merge_layers_is_idempotent
        test_safe_merge""",
    'PEFT runs it for LoRA and BOFT alone: test_biases_train_if_asked': 'test_disable_adapter_with_bias_warns',
    'add_weighted_adapter, which LoRA and IA3 alone have': 'test_add_weighted_adapter_cat_with_rank_pattern',
    'takes more arguments: test_peft_checks_dtypes': 'test_adapter_dtype_autocast',
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('name', CHECKS)
def test_peft_checks_custom_models(suite, name, case, tmp_path):
    model_id, settings = CASES[case]
    arguments = dict(
        test_name=case, model_id=model_id, config_cls=KanLoraConfig, config_kwargs=dict(settings), tmp_path=tmp_path
    )
    run_check(getattr(suite.TestPeftCustomModel(), name), **arguments)


@pytest.mark.parametrize('case', CASES)
def test_peft_checks_dtypes(suite, case, tmp_path):
    model_id, settings = CASES[case]
    combinations = itertools.product((torch.float16, torch.bfloat16, torch.float32), (True, False), (True, False))
    for i, (dtype, autocast, low_memory) in enumerate(combinations):
        folder = tmp_path / str(i)
        suite.TestPeftCustomModel().test_adapter_dtype_autocast(
            case, model_id, KanLoraConfig, dict(settings), dtype, autocast, low_memory, folder
        )


@pytest.mark.parametrize('name', CHECKS_OF_CONFIGS)
def test_peft_checks_configs(suite, name):
    config = KanLoraConfig(target_modules=['lin0'], init_weights=False)
    run_check(getattr(suite.TestPeftCustomModel(), name), config_cls=KanLoraConfig, config0=config)


def test_every_check_of_peft_is_run_or_left_out_for_a_reason(suite):
    methods = inspect.getmembers(suite.TestPeftCustomModel, inspect.isfunction)
    generic = {
        name for name, method in methods if {'config_cls', 'config0'} & inspect.signature(method).parameters.keys()
    }
    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    assert {name for name in generic if name.startswith('test_')} == {*CHECKS, *CHECKS_OF_CONFIGS} | left_out
    common = {name for name in generic if name.startswith('_test_')}
    assert {name for name in common if not re.search(NOT_OF_TRANSFORMERS, name)} == {*CHECKS_OF_TRANSFORMERS}


@pytest.fixture(scope='module')
def process_group():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != 'linux', reason='PEFT runs them on Linux alone')
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('bias', [None, 'bias_all', 'bias_peft_method_only'])
def test_peft_checks_fsdp(suite, process_group, case, bias):
    checks = suite.TestPeftFsdpStateDict()
    check = (
        checks.test_save_load_roundtrip_fsdp_wrapped_learnable_bias
        if bias
        else checks.test_save_load_roundtrip_fsdp_wrapped
    )
    model_id, settings = CASES[case]
    run_check(
        check, test_name=case, model_id=model_id, config_cls=KanLoraConfig, config_kwargs=dict(settings), bias_arg=bias
    )


@pytest.mark.parametrize('second', ['lin0', 'lin1'])
def test_peft_checks_that_active_adapters_add_up(suite, second):
    settings = [dict(target_modules=[name], init_weights=False) for name in ('lin0', second)]
    check = suite.TestMultipleActiveAdapters().test_multiple_active_adapters_forward
    run_check(
        check,
        test_name='',
        tuner_method='kanlora',
        config_cls=KanLoraConfig,
        config_kwargs_1=settings[0],
        config_kwargs_2=settings[1],
    )


def test_peft_checks_default_targets(suite, monkeypatch):
    cls = suite.TestDefaultTargetModules
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if 'config_cls' in inspect.signature(method).parameters:
            with monkeypatch.context() as patch:
                run_check(getattr(cls(), name), config_cls=KanLoraConfig, monkeypatch=patch)


CHECKS_OF_TRANSFORMERS = """
    _test_adapter_name
    _test_add_adapter_no_autocast_adapter_dtype
    _test_adding_multiple_adapters_with_bias_raises
    _test_delete_adapter
    _test_delete_inactive_adapter
    _test_delete_unknown_adapter_raises
    _test_disable_adapter
    _test_from_pretrained_config_construction
    _test_generate
    _test_generate_half_prec
    _test_generate_pos_args
    _test_get_base_model_state_dict
    _test_inference_safetensors
    _test_load_model_low_cpu_mem_usage
    _test_load_multiple_adapters
    _test_lora_conversion
    _test_model_attr
    _test_passing_input_embeds_works
    _test_peft_model_device_map
    _test_prepare_for_training
    _test_save_pretrained
    _test_save_pretrained_adapter_name_substring
    _test_save_pretrained_selected_adapters
    _test_training
    _test_training_gradient_checkpointing
    _test_training_layer_indexing
    _test_unload_adapter
""".split()
# not on merging, on prompt learning, and on weighted and mixed adapters, which LoRA and IA3 alone have
NOT_OF_TRANSFORMERS = 'merge|prompt_learning|weighted_combination|mixed_adapter'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A folder with a GPT-2 of two layers."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=0)
    folder = tmp_path_factory.mktemp('tiny') / 'model'
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('name', CHECKS_OF_TRANSFORMERS)
def test_peft_checks_transformers(suite, tiny, name):
    class Tester(suite.PeftCommonTester):
        transformers_class = AutoModelForCausalLM

        def prepare_inputs_for_testing(self):
            return {
                'input_ids': torch.tensor([[1, 1, 1], [1, 2, 1]]),
                'attention_mask': torch.tensor([[1, 1, 1], [1, 0, 1]]),
            }

    settings = dict(task_type='CAUSAL_LM', init_weights=False, lora_dropout=0.0)
    arguments = dict(test_name='', model_id=str(tiny), config_cls=KanLoraConfig, config_kwargs=settings)
    run_check(getattr(Tester(), name), **arguments, dtype=torch.bfloat16, raises_err=False)


def test_an_adapter_added_in_eval_mode_draws_no_dropout():
    config, x = KanLoraConfig(r=2, target_modules=['0'], lora_dropout=0.5, init_weights=False), torch.randn(3, 6)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config).eval()
    model.add_adapter('second', config)
    model.set_adapter('second')
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


# the adapter is that of surgery/adapters.py


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def adapted(model, **settings):
    return get_peft_model(model, KanLoraConfig(**{'init_weights': False, 'lora_dropout': 0.0, **settings}))


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, KanLoraLinear)}


def tokens():
    return torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    'options',
    [{}, dict(use_dora=True), dict(use_rslora=True), dict(squash='none', grid_size=7, spline_order=3)],
    ids=str,
)
def test_same_as_lora(tiny, options, dtype):
    model = adapted(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype),
        target_modules=['c_attn', 'c_fc', 'c_proj'],
        r=3,
        **options,
    )
    theirs = {'rs_lora' if name == 'use_rslora' else name: value for name, value in options.items()}
    config = LoRAConfig(kind='kan', rank=3, dropout=0.0, target_modules=('c_attn', 'c_fc', 'c_proj'), **theirs)
    reference = add_lora(AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype), config)
    pairs = list(zip(layers_of(model).values(), lora_layers(reference).values(), strict=True))
    for ours, layer in pairs:
        assert ours.kanlora_adapters['default'].config.scaling == layer.adapter.config.scaling
        layer.adapter.load_state_dict(ours.kanlora_adapters['default'].state_dict())
    results = [m(tokens(), labels=tokens()) for m in (model, reference)]
    assert torch.equal(results[0].logits, results[1].logits)
    for result in results:
        result.loss.backward()
    for ours, layer in pairs:
        for p, q in zip(ours.kanlora_adapters.parameters(), layer.adapter.parameters(), strict=True):
            assert p.dtype == torch.float32 and torch.equal(p.grad, q.grad)


def test_starts_as_the_base_model_and_leaves_it(tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny).eval()
    before = base(tokens()).logits
    model = get_peft_model(base, KanLoraConfig(use_dora=True)).eval()
    assert torch.allclose(model(tokens()).logits, before, atol=1e-6)
    model = adapted(model.unload(), target_modules='all-linear', exclude_modules=['lm_head'], r=2).eval()
    assert {path.rpartition('.')[2] for path in layers_of(model)} == {'c_attn', 'c_proj', 'c_fc'}
    assert not torch.allclose(model(tokens()).logits, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, before)


def test_dora_and_rslora():
    model = adapted(Toy(), target_modules=['first'], use_dora=True, use_rslora=True, r=4, lora_alpha=8)
    layer = layers_of(model)['base_model.model.first'].kanlora_adapters['default']
    assert layer.config.scaling == 4 and layer.magnitude.shape == (8,)
    model(torch.randn(5, 6)).square().sum().backward()
    assert layer.magnitude.grad.abs().min() > 0


def test_active_adapters_add_up_to_the_same_base():
    model = adapted(Toy(), target_modules=['second'], use_dora=True)
    model.add_adapter('other', KanLoraConfig(target_modules=['second'], use_dora=True, init_weights=False))
    model.eval()
    layer, x = layers_of(model)['base_model.model.second'], torch.randn(5, 8)
    for adapter in layer.kanlora_adapters.values():
        nn.init.uniform_(adapter.magnitude, 1, 2)
    outputs = []
    for active in ['default'], ['other'], ['default', 'other']:
        model.base_model.set_adapter(active)
        outputs.append(layer(x) - layer.base_layer(x))
    torch.testing.assert_close(outputs[2], outputs[0] + outputs[1])


def test_merging_is_refused():
    model = adapted(Toy(), target_modules=['first'])
    x = torch.randn(5, 6)
    before = model(x)
    for merge in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
        model.unmerge_adapter,
    ):
        with pytest.raises(NotImplementedError, match='not linear in its input'):
            merge()
    assert torch.equal(model(x), before)


def test_biases_train_if_asked():
    for bias, names in (
        ('none', []),
        ('kanlora_only', ['first.base_layer.bias']),
        ('all', ['first.base_layer.bias', 'other.bias']),
    ):
        toy = Toy()
        toy.other = nn.Linear(1, 1)
        model = adapted(toy, target_modules=['first'], bias=bias)
        assert [name for name, p in toy.named_parameters() if p.requires_grad and 'kanlora_' not in name] == names
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            with model.disable_adapter():
                pass
        assert any('Careful, disabling adapter' in str(warning.message) for warning in caught) == (bias != 'none')


# what it does not take


class Linear8bitLt(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class TorchaoTensor(torch.Tensor):
    """A weight of a class of its own, in a plain nn.Linear."""


def with_weight(weight):
    layer = nn.Linear(6, 8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize(
    'make, named',
    [
        (lambda: Linear8bitLt(6, 8), 'Linear8bitLt'),
        (
            lambda: with_weight(torch.zeros(8, 6, dtype=torch.int8)),
            'Linear with a weight of type Parameter, dtype torch.int8',
        ),
        (
            lambda: with_weight(torch.zeros(8, 6).as_subclass(TorchaoTensor)),
            'Linear with a weight of type TorchaoTensor, dtype torch.float32',
        ),
        (lambda: nn.Embedding(6, 8), 'Embedding'),
        (lambda: nn.Sequential(nn.Linear(6, 8)), 'Sequential with a weight of type NoneType, dtype None'),
    ],
)
def test_other_layers_are_named(make, named):
    toy = Toy()
    toy.first = make()
    with pytest.raises(ValueError, match=rf'^first is a [\w.]*{named}: .* nn.Linear or Conv1D .*quantis'):
        adapted(toy, target_modules=['first'])


def test_a_layer_that_is_read_is_refused():
    sizes = dict(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=20)
    mamba = MambaForCausalLM(MambaConfig(**sizes))
    with pytest.raises(ValueError, match=r'mixer.dt_proj is read by the module around it .*; leave .* out'):
        adapted(mamba, target_modules=['in_proj', 'dt_proj'])
    with pytest.raises(ValueError, match='linear1 is read by the module around it'):
        adapted(nn.Sequential(nn.TransformerEncoderLayer(8, 2)), target_modules=['linear1'])


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(r=0), 'r must be at least 1, got 0'),
        (dict(r=8.0), 'r must be of type int, got 8.0'),
        (dict(lora_alpha=0), 'lora_alpha must be a positive number, got 0.0'),
        (dict(lora_dropout=1), 'lora_dropout must be at least 0 and less than 1, got 1.0'),
        (dict(use_rslora='yes'), "use_rslora must be of type bool, got 'yes'"),
        (dict(use_dora=1), 'use_dora must be of type bool, got 1'),
        (dict(squash='sigmoid'), "squash must be one of none, clamp, tanh, norm, got 'sigmoid'"),
        (dict(grid_size=0), 'grid_size must be at least 1 and spline_order at least 0, got 0 and 1'),
        (dict(grid_range=(1, -1)), 'grid_range must be (low, high) with low < high, got (1.0, -1.0)'),
        (dict(kan_scale_noise=-1.0), 'kan_scale_noise must be a number of at least 0, got -1.0'),
        (dict(bias='lora_only'), "bias must be one of none, all, kanlora_only, got 'lora_only'"),
        (
            dict(target_modules='.*', layers_to_transform=[0]),
            'layers_to_transform needs target_modules as a list of names',
        ),
        (dict(layers_pattern='h'), 'layers_pattern needs layers_to_transform'),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match='^' + re.escape(message)):
        KanLoraConfig(**settings)


# files


def test_grids_are_each_adapters_own_and_saved(tmp_path):
    toy = Toy()
    model = adapted(toy, target_modules=['first'], grid_range=(-2, 2))
    model.add_adapter('other', KanLoraConfig(target_modules=['first'], grid_size=9, init_weights=False))
    first, other = (
        layers_of(model)['base_model.model.first'].kanlora_adapters[name].bottleneck.phi_in
        for name in ('default', 'other')
    )
    first.update_grid(torch.randn(50, 6))
    assert first.grid.shape == (6, 7) and other.grid.shape == (6, 12)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / 'adapter_model.safetensors')
    assert torch.equal(saved['base_model.model.first.kanlora_adapters.bottleneck.phi_in.grid'], first.grid)

    fresh = Toy()
    fresh.load_state_dict(model.unload().state_dict())
    loaded = PeftModel.from_pretrained(fresh, tmp_path, adapter_name='renamed')
    loaded.load_adapter(tmp_path / 'other', 'default')
    adapters = layers_of(loaded)['base_model.model.first'].kanlora_adapters
    for old, new in (first, adapters['renamed'].bottleneck.phi_in), (other, adapters['default'].bottleneck.phi_in):
        assert all(torch.equal(p, q) for p, q in zip(old.state_dict().values(), new.state_dict().values(), strict=True))


def test_config_comes_back(tmp_path):
    config = KanLoraConfig(
        r=3, lora_alpha=5, grid_range=[-3, 3], squash='clamp', use_dora=True, target_modules=['b', 'a'], bias='all'
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert config.grid_range == [-3, 3] and type(config.lora_alpha) is float and config.target_modules == {'a', 'b'}
    assert json.loads((tmp_path / 'adapter_config.json').read_text())['peft_type'] == 'KANLORA'


def test_readme_names_the_import_once(tmp_path):
    model = adapted(Toy(), target_modules=['first'])
    model.add_adapter('other', KanLoraConfig(target_modules=['first']))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    for path in tmp_path / 'README.md', tmp_path / 'other' / 'README.md':
        text = path.read_text()
        assert text.count('\nfrom surgery import peft_kan\n') == 1
        assert text.index('import peft_kan') < text.index('PeftModel.from_pretrained')
        assert text.startswith('---\n') and 'library_name: peft\n' in text
    assert '- PEFT 0.' in (tmp_path / 'README.md').read_text()


def test_classifier_of_bert_is_saved_with_it(tmp_path):
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    base = BertForSequenceClassification(config)
    weights = {name: p.clone() for name, p in base.state_dict().items()}
    model = adapted(base, task_type='SEQ_CLS')
    assert {path.rpartition('.')[2] for path in layers_of(model)} == {'query', 'value'}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens(), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert 'base_model.model.classifier.weight' in load_file(tmp_path / 'adapter_model.safetensors')
    for name, p in model.get_base_model().state_dict().items():
        if 'kanlora_' not in name and 'modules_to_save' not in name:
            assert torch.equal(p, weights[re.sub(r'\.(base_layer|original_module)', '', name)]), name

    fresh = BertForSequenceClassification(config)
    fresh.load_state_dict(weights)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(tokens()).logits, model(tokens()).logits)


SAVE = """
import torch
{example}
for p in model.parameters():
    if p.requires_grad:
        torch.nn.init.normal_(p, std=0.1)
torch.save(model.eval()(torch.arange(12).reshape(2, 6)).logits, 'logits.pt')
model.save_pretrained('my-adapter')
"""
LOAD = """
import importlib
import torch
from peft import PeftModel

try:
    PeftModel.from_pretrained(torch.nn.Linear(1, 1), 'my-adapter')
except KeyError as error:
    print('KeyError', error)
for _ in range(2):
{example}
    print(torch.equal(model(torch.arange(12).reshape(2, 6)).logits, torch.load('logits.pt')))
    importlib.reload(peft_kan)
"""


def test_commands_of_the_docstring_in_two_processes(tiny, tmp_path):
    (tmp_path / 'gpt2').symlink_to(tiny)
    save, load = re.findall(r'(?:^    .*\n|^\n)*^    .*\n', peft_kan.__doc__, re.MULTILINE)
    for script, example, printed in (
        (SAVE, textwrap.dedent(save), 'trainable params: '),
        (LOAD, load, "KeyError 'KANLORA'\nTrue\nTrue\n"),
    ):
        (tmp_path / 'script.py').write_text(script.format(example=example))
        done = run_forked(tmp_path, tmp_path / 'script.py', modules=str(ROOT))
        assert done.returncode == 0 and done.stdout.startswith(printed), done.stdout + done.stderr


# adapters of single rows


@pytest.mark.parametrize('dora', [False, True])
def test_each_row_has_the_adapter_of_its_name(dora):
    model = adapted(Toy(), target_modules=['first', 'second'], use_dora=dora)
    other = KanLoraConfig(target_modules=['second'], init_weights=False, use_dora=dora)
    model.add_adapter('other', other)
    model.eval()
    x, names = torch.randn(5, 6), ['other', '__base__', 'default', 'other', 'default']
    expected = {}
    for name in 'default', 'other':
        model.set_adapter(name)
        expected[name] = model(x)
    with model.disable_adapter():
        expected['__base__'] = model(x)
    y = model(x, adapter_names=names)
    assert all(torch.allclose(y[i], expected[name][i], atol=1e-6) for i, name in enumerate(names))
    assert len({tuple(rows[0].tolist()) for rows in expected.values()}) == 3
    assert torch.equal(model(x), expected['other'])  # the names are of that call alone
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=names), expected['__base__'])


def test_rows_of_a_batch_that_is_generated(tiny):
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny), target_modules=['c_attn'])
    model.eval()
    plain = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    adapted_rows = model.generate(input_ids=tokens(), **plain)
    with model.disable_adapter():
        base_rows = model.generate(input_ids=tokens(), **plain)
    names = ['__base__', 'default']
    for beams in 1, 2:
        mixed = model.generate(input_ids=tokens(), adapter_names=names, num_beams=beams, **plain)
        if beams == 1:
            assert torch.equal(mixed, torch.stack([base_rows[0], adapted_rows[1]]))


def test_a_head_of_its_own_follows_the_name():
    model = adapted(Toy(), target_modules=['first'], modules_to_save=['second'])
    nn.init.normal_(model.base_model.model.second.modules_to_save['default'].weight)
    model.eval()
    x = torch.randn(2, 6)
    with model.disable_adapter():
        base = model(x)
    y = model(x, adapter_names=['default', '__base__'])
    assert torch.allclose(y[0], model(x)[0], atol=1e-6) and torch.allclose(y[1], base[1], atol=1e-6)
    assert not torch.allclose(y[0], base[0])


def test_names_of_rows_that_cannot_be_honoured():
    model, x = adapted(Toy(), target_modules=['first']), torch.randn(2, 6)
    with pytest.raises(ValueError, match='adapter_names is for inference: call model.eval'):
        model(x, adapter_names=['default', 'default'])
    model.eval()
    with pytest.raises(ValueError, match='no adapter called defautl; there is __base__, default'):
        model(x, adapter_names=['default', 'defautl'])
    with pytest.raises(ValueError, match='adapter_names has 1 names for a batch of 2'):
        model(x, adapter_names=['default'])


def test_all_linear_layers_whether_they_have_an_adapter_or_not(tiny):
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny), target_modules=['c_attn'])
    model.add_adapter('all', KanLoraConfig(target_modules='all-linear', init_weights=False))
    plain = adapted(AutoModelForCausalLM.from_pretrained(tiny), target_modules='all-linear')
    found = [name for name, layer in layers_of(model).items() if 'all' in layer.kanlora_adapters]
    assert found == list(layers_of(plain)) and any('c_attn' in name for name in found)


def test_a_merge_that_is_refused_leaves_the_model_as_it_was(tmp_path):
    """Also where a module that is saved whole stands before the first adapted layer."""
    model = adapted(Toy(), target_modules=['second'], modules_to_save=['first'])
    nn.init.normal_(model.base_model.model.first.modules_to_save['default'].weight)
    x, modules = torch.randn(3, 6), [name for name, _ in model.named_modules()]
    y = model(x)
    with pytest.raises(NotImplementedError, match='not linear in its input'):
        model.merge_and_unload()
    assert [name for name, _ in model.named_modules()] == modules and torch.equal(model(x), y)
    model.save_pretrained(tmp_path)
    assert 'base_model.model.first.weight' in load_file(tmp_path / 'adapter_model.safetensors')


def test_the_config_is_what_is_saved(tmp_path):
    config = KanLoraConfig(target_modules=['first'], grid_range=(-2, 2))
    config.save_pretrained(tmp_path)
    saved, given = json.loads((tmp_path / 'adapter_config.json').read_text()), config.to_dict()
    assert saved['grid_range'] == given['grid_range'] == [-2.0, 2.0]
