"""The activations of an MLP by name: each a function of the model's config and the number of channels."""

import torch
import torch.nn as nn
from torch.nn import functional as F


class LearnedSlope(nn.Module):
    """Swish, x sigmoid(a x), with a learned number a for each channel (Ramachandran et al. 2017, arXiv 1710.05941)."""

    def __init__(self, channels):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


class SquaredReLU(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


ACTIVATIONS = {  # of config and the number of channels
    'gelu': lambda config, channels: nn.GELU(approximate=config.gelu),
    'silu': lambda config, channels: nn.SiLU(),
    'relu2': lambda config, channels: SquaredReLU(),
    'identity': lambda config, channels: nn.Identity(),
    'swish': lambda config, channels: LearnedSlope(channels),
}
