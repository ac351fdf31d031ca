"""Several optimizers as one: what each does alone, and what is saved of them."""

import copy

import pytest
import torch
import torch.nn as nn

from layers.muon import Joined, join_muon


def make(model):
    adamw = torch.optim.AdamW([model.bias], lr=0.1)
    return join_muon(adamw, [model.weight], 0.1, weight_decay=0.2)


def step(model, *optimizers, seed=0):
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    for optimizer in optimizers:
        optimizer.step()


def test_without_matrices_there_is_nothing_for_muon():
    with pytest.raises(ValueError, match='Muon wants matrices that train, and no block has one: leave muon out'):
        join_muon(torch.optim.AdamW([nn.Linear(4, 3).bias]), [], 0.1, weight_decay=0.2)


def test_joined_optimizers_do_what_each_does_alone():
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    settings = dict(lr=0.1, weight_decay=0.2, adjust_lr_fn='match_rms_adamw')
    alone = torch.optim.AdamW([theirs.bias], lr=0.1), torch.optim.Muon([theirs.weight], **settings)
    joined = make(ours)
    for seed in range(3):
        for group in (group for each in (joined, *alone) for group in each.param_groups):
            group['lr'] = 0.1 / (seed + 1)  # as a schedule does
        step(ours, joined, seed=seed)
        step(theirs, *alone, seed=seed)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_joined_optimizers_go_on_from_what_was_saved():
    model = nn.Linear(4, 3)
    optimizer = make(model)
    step(model, optimizer)
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = model.weight.clone()
    for group in (*optimizer.param_groups, *resumed.param_groups):
        group['lr'] = 0.01  # reaches the optimizers, also after loading
    step(model, optimizer, seed=1)
    step(other, resumed, seed=1)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    assert 0 < (model.weight - before).abs().max() < 0.02


def test_joined_optimizers_are_copied_whole_and_get_no_more_groups():
    model = nn.Linear(4, 3)
    optimizer = make(model)
    step(model, optimizer)
    twin = copy.deepcopy((model, optimizer))
    step(model, optimizer, seed=1)
    step(*twin, seed=1)
    assert torch.equal(model.weight, twin[0].weight) and torch.equal(model.bias, twin[0].bias)
    with pytest.raises(ValueError, match='before they are joined'):
        optimizer.add_param_group({'params': [nn.Parameter(torch.zeros(3))]})


def test_the_state_of_another_optimizer_is_refused():
    model = nn.Linear(4, 3)
    other = torch.optim.AdamW([{'params': [model.bias]}, {'params': [model.weight]}])
    with pytest.raises(ValueError, match='the state is of other optimizers'):
        make(model).load_state_dict(other.state_dict())


def test_step_calls_a_closure_and_gives_its_loss():
    model = nn.Linear(2, 1)
    x = torch.ones(3, 2)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer = make(model)
    assert isinstance(optimizer, Joined)
    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
