"""What became of learned activations: how often each one turns over the inputs that it sees, and which are flat.

    seen = watch(model, lambda: model(tokens))   # {name: Seen} of inside/edges.py
    shapes_of(seen['h.0.mlp.act'])               # Shapes of a ChannelSpline

Legend: C channels; P places; N rows of data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inside.edges import evenly, without_autocast

PLACES = 201
FLAT = 0.1  # a function is flat that varies less than this share of what it began as
TURN = 0.05  # a turn counts that goes back by more than this share of all that the curve spans


@dataclass
class Shapes:
    x: Tensor  # (C, P) even places in the middle 99 % of the inputs of each channel
    learned: Tensor  # (C, P) the functions there
    plain: Tensor  # (C, P) the activation that they began as
    change: Tensor  # (C,) root mean square of the difference over the data, by the plain one's standard deviation
    flat: Tensor  # (C,) bool

    def turns(self):
        """(C,) of the functions, and of the activation over the same inputs."""
        return count_turns(self.learned), count_turns(self.plain)


@without_autocast
@torch.no_grad()
def shapes_of(seen):
    """The Shapes of the Seen of a ChannelSpline."""
    layer, inputs = seen.layer, seen.x
    ends = torch.quantile(inputs, inputs.new_tensor([0.005, 0.995]), dim=0)  # (2, C)
    x = torch.lerp(ends[0], ends[1], evenly(0, 1, PLACES, inputs.device).unsqueeze(1))  # (P, C)
    now, before = layer(inputs), layer.base_activation(inputs)  # (N, C)
    spread = before.std(0).clamp_min(1e-30)
    change = (now - before).square().mean(0).sqrt() / spread
    return Shapes(x.t(), layer(x).t(), layer.base_activation(x).t(), change, now.std(0) < FLAT * spread)


def count_turns(y, least=TURN):
    """How often each curve (C, P) turns from rising to falling or back: (C,). What is less than the share `least` of
    its whole span is no turn.
    """
    step = least * (y.amax(1) - y.amin(1))
    turns, heading = torch.zeros(2, len(y), dtype=torch.long, device=y.device)
    top = bottom = y[:, 0]  # since the last turn
    for now in y.unbind(1):
        top, bottom = torch.maximum(top, now), torch.minimum(bottom, now)
        falls = (now < top - step) & (heading >= 0)
        rises = (now > bottom + step) & (heading <= 0)
        turned = falls | rises
        turns = turns + (turned & (heading != 0))  # setting out is no turn
        heading = torch.where(falls, -1, torch.where(rises, 1, heading))
        top, bottom = torch.where(turned, now, top), torch.where(turned, now, bottom)
    return turns
