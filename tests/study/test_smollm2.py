"""The study of learned gates in a pretrained Llama, on a small one with random weights."""

from types import SimpleNamespace

import pytest
import torch

from kan import ChannelSpline
from study import smollm2
from study.runner import Study


@pytest.fixture
def llama():
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize('kind, count', [('functions', 2 * 24 * 10), ('LoRA', 2 * 2 * 8 * (16 + 16))])
def test_what_learns_leaves_the_model_as_it_was_and_is_all_that_learns(llama, kind, count):
    batch = torch.randint(40, (2, smollm2.LENGTH + 1), generator=torch.Generator().manual_seed(1))
    before = smollm2.measure(llama, batch)
    learning = smollm2.adapt(llama, kind, batch[:1, :8])
    assert sum(p.numel() for p in learning) == count
    assert smollm2.measure(llama, batch) == pytest.approx(before, abs=1e-5)
    if kind == 'functions':
        functions = [module for module in llama.modules() if isinstance(module, ChannelSpline)]
        assert [id(phi.spline_weight) for phi in functions] == [id(p) for p in learning]
    smollm2.loss_of(llama, batch).backward()
    assert all(p.grad is not None for p in learning)


def test_loss_is_that_of_the_next_token(llama):
    batch = torch.randint(40, (2, smollm2.LENGTH + 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_probs = llama(batch).logits.log_softmax(-1)
    expected = -log_probs[:, :-1].gather(2, batch[:, 1:, None]).mean().item()
    assert smollm2.loss_of(llama, batch).item() == pytest.approx(expected, abs=1e-5)


def test_the_final_runs_take_the_best_rate_and_other_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, 'STUDY', Study('smollm2', tmp_path))
    with pytest.raises(ValueError, match='stage final wants all rates of functions first'):
        smollm2.run(['final'])

    def make(name, job, folder):
        loss = 3 + abs(job['rate'] - 4e-3) if job['kind'] == 'functions' else 3.5 + job['rate']
        losses = dict(choosing=loss, held_out=loss + 1)
        return dict(job, parameters=460800, seconds=60.0, before=dict(choosing=4.0, held_out=5.0), after=losses)

    monkeypatch.setattr(smollm2, 'make', make)
    others = smollm2.jobs_of('search', 'LoRA', [1e-5 * n for n in range(1, 9)])  # of rates that the study has not
    smollm2.STUDY.run_all(others, lambda name, job, folder: dict(make(name, job, folder), after=dict(choosing=0)))
    smollm2.STUDY.run_all(smollm2.jobs_of('search', 'functions', smollm2.RATES['functions']), make)
    with pytest.raises(ValueError, match='stage final wants all rates of LoRA first'):
        smollm2.run(['final'])
    smollm2.run(['search', 'final'])
    assert (smollm2.best_rate('functions'), smollm2.best_rate('LoRA')) == (4e-3, 4e-4)
    assert {run['seed'] for run in smollm2.runs_of('final', 'LoRA')} == set(smollm2.SEEDS['final'])
    page = smollm2.make_table()
    assert (
        '| functions in place of the SiLUs | 460,800 | 0.004 | 5.0000 | 4.0000 ± 0.0000 | 3.0000 ± 0.0000 | 60 |'
        in page
    )
    assert '| LoRA of rank 8 on queries and values | 0.0064 | 3.5064 |' in page


def test_a_run_learns_from_eight_tenths_and_is_measured_on_the_others(llama, monkeypatch, tmp_path):
    """Of a text whose tokens tell to which part they belong."""
    text = torch.cat([torch.arange(800) % 10, 10 + torch.arange(100) % 10, 20 + torch.arange(100) % 10])
    for name, value in dict(STEPS=3, LENGTH=16, WINDOWS=4).items():
        monkeypatch.setattr(smollm2, name, value)
    monkeypatch.setattr(smollm2, 'load', lambda: (lambda words: SimpleNamespace(input_ids=text.tolist()), llama))
    monkeypatch.setattr(smollm2, 'read_plays', lambda: ('',))
    loss_of, learned = smollm2.loss_of, []

    def remember(model, batch):
        if torch.is_grad_enabled():
            learned.append(batch)
        return loss_of(model, batch)

    monkeypatch.setattr(smollm2, 'loss_of', remember)
    run = smollm2.make('any', dict(stage='final', kind='functions', rate=1e-2, seed=1), tmp_path)
    assert torch.cat(learned).shape == (6, 17) and torch.cat(learned).max() < 10
    for part, first in ('choosing', 800), ('held_out', 900):
        batches = smollm2.even_windows(text[first : first + 100])
        assert run['after'][part] == pytest.approx(smollm2.measure(llama, batches)) != run['before'][part]
    assert len(run['losses']) == 3 and run['parameters'] == 2 * 24 * 10


def test_windows_are_even_and_whole():
    tokens = torch.arange(5000)
    found = smollm2.even_windows(tokens)
    assert found.shape == (smollm2.WINDOWS, smollm2.LENGTH + 1)
    assert found[0, 0] == 0 and found[-1, -1] == 4999


def test_the_page_is_made_from_the_records():
    page = (smollm2.STUDY.folder / 'README.md').read_text(encoding='utf-8')
    assert f'<!-- study/smollm2.py writes this table -->\n{smollm2.make_table()}<!-- until here -->\n' in page
