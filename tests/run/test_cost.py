"""Counts of a GPT against pen and paper, and the training step that is timed."""

import pytest
import torch

from model import GPT, GPTConfig
from run.cost import count_flops, count_parameters, make_step

SIZES = dict(block_size=32, vocab_size=50, n_layer=3, n_head=2, n_embd=24, bias=True)
C, L, T, V = 24, 3, 32, 50
ATTENTION = 2 * 2 * T * C  # per token and layer: scores, and values summed by them


@pytest.mark.parametrize(
    'settings, products',
    [
        ({}, L * 12 * C * C + V * C),
        (dict(mlp='swiglu', mlp_hidden=2.0), L * (4 + 3 * 2) * C * C + V * C),
        (dict(use_kan=True), L * (4 * C * C + 9 * 8 * C * C) + V * C),
        (dict(use_kan=True, kan_targets='attn,mlp,head', grid_size=3, spline_order=2), 6 * (L * 12 * C * C + V * C)),
        (dict(use_kan=True, kan_kind='channel', kan_targets='attn,mlp,head'), L * 12 * C * C + V * C),
        (dict(use_kan=True, kan_kind='channel', mlp='swiglu', mlp_hidden=2.0), L * (4 + 3 * 2) * C * C + V * C),
        (dict(dropout=0.3), L * 12 * C * C + V * C),
        (dict(use_graph=True), L * (13 * C * C + T * C) + V * C),
        (
            dict(use_graph=True, graph_kind='gatv2', graph_edges='window,topk'),
            L * (14 * C * C + T * C + T * C // 3) + V * C,
        ),  # similarity: forward only
        (dict(use_graph=True, graph_place='attention'), L * (10 * C * C - T * C) + V * C),
    ],
    ids=[
        'vanilla',
        'swiglu',
        'kan mlp',
        'kan everywhere',
        'channel kan everywhere',
        'kan-glu',
        'dropout',
        'gat',
        'gatv2',
        'gat in place of attention',
    ],
)
def test_flops_are_three_times_those_of_the_forward_products(settings, products):
    assert count_flops({**SIZES, **settings}) == 3 * (2 * products + L * ATTENTION)


def test_flops_of_a_single_block():
    assert count_flops({**SIZES, 'n_layer': 1}) == 3 * (2 * (12 * C * C + V * C) + ATTENTION)


@pytest.mark.parametrize(
    'settings',
    [{}, dict(mlp='swiglu'), dict(use_kan=True, kan_targets='attn,mlp,head'), dict(use_graph=True), dict(n_layer=1)],
)
def test_parameters_are_those_of_the_model(settings):
    assert count_parameters({**SIZES, **settings}) == sum(
        p.numel() for p in GPT(GPTConfig(**{**SIZES, **settings})).parameters()
    )


def test_a_step_trains(one_thread, seed):
    model = GPT(GPTConfig(**SIZES))
    before = [p.clone() for p in model.parameters()]
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    step = make_step(model, 2, 3, 'cpu', 'bfloat16')
    assert step() > 0 and len(passes) == 3
    assert all((p != old).any() for p, old in zip(model.parameters(), before) if p.dim() > 1)
    assert all(p.grad is None and torch.isfinite(p).all() for p in model.parameters())


def test_the_step_that_is_timed_has_the_precision_and_the_optimizer_asked_for(one_thread, seed):
    model, dtypes, asked = GPT(GPTConfig(**SIZES)), [], []
    model.lm_head.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    configure = model.configure_optimizers
    model.configure_optimizers = lambda *args, **more: asked.append(more) or configure(*args, **more)
    make_step(model, 1, 1, 'cpu', 'bfloat16', muon=True)()
    assert dtypes == [torch.bfloat16] and asked == [dict(muon=True)]
