"""Muon for the matrices of a model and AdamW for the rest, as one optimizer. A step that is not finite is found out
before it is taken, for which the training loop waits for a GPU once a step; fused AdamW alone needs no waiting.
"""

import torch


class Joined(torch.optim.Optimizer):
    """Several optimizers as one: their groups in order, and one state for all."""

    def __init__(self, *optimizers):
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self.optimizers = optimizers
        self.share()

    def __getstate__(self):
        return {**super().__getstate__(), 'optimizers': self.optimizers}  # of a copy

    def add_param_group(self, param_group):
        if hasattr(self, 'optimizers'):
            raise ValueError(
                'which of the joined optimizers is it for? add the group to that one before they are joined'
            )
        super().add_param_group(param_group)

    def share(self):
        """Give each optimizer its groups and the state."""
        start = 0
        for each in self.optimizers:
            end = start + len(each.param_groups)
            each.param_groups, each.state = self.param_groups[start:end], self.state
            start = end

    def load_state_dict(self, state_dict):
        """ValueError for the state of other optimizers."""
        ours, theirs = ([*map(is_muons, groups)] for groups in (self.param_groups, state_dict['param_groups']))
        if ours != theirs:
            raise ValueError('the state is of other optimizers than those that are joined here')
        super().load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss


def is_muons(group):
    """Whether a group of parameters is one of Muon's."""
    return 'momentum' in group


def join_muon(adamw, matrices, learning_rate, weight_decay):
    """AdamW joined by Muon (Jordan et al. 2024) for `matrices`, two-dimensional parameters that adamw has not. Updates
    have the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one learning rate suits both.
    ValueError for no matrices.
    """
    if not matrices:
        raise ValueError('Muon wants matrices that train, and no block has one: leave muon out')
    settings = dict(lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw')
    return Joined(adamw, torch.optim.Muon(matrices, **settings))
