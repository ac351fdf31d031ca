"""Cut edges or whole neurons out of KAN layers. What a cut edge gave on average goes into a bias, so that its output
keeps its mean; of hidden channels between linear layers only where these have a bias.

    mask_edges(layer, keep, lost)      the edges stay in the tensors, as zeros that do not act
    remove_outputs(layer, keep)        smaller tensors: of the layer that makes the neurons
    remove_inputs(layer, keep, lost)   and of the one that reads them
    remove_hidden(mlp, keep, lost)     the same for an MLP of linear layers, with learned activations or fixed ones
    complete(layers)                   what the others need, so that GPTConfig(kan_bias, kan_mask) describes them all

`keep` says what stays, `lost` (O,) is the sum over the cut edges of their means. Which edges do least, and what their
means are, is measured by inside/edges.py. The parameters of a layer that is cut are new ones, so an optimizer is made
after it.
"""

import torch
import torch.nn as nn

from kan import ChannelSpline

PER_EDGE = ('base_weight', 'spline_weight', 'spline_scaler')  # (O, I, ...)


def strongest(activity, share):
    """True for that share of the numbers, the greatest, at least of one where share > 0; a tensor like them."""
    if not 0 <= share <= 1:
        raise ValueError(f'a share to keep must be between 0 and 1, got {share}')
    n = min(activity.numel(), max(1, round(share * activity.numel()))) if share else 0
    kept = torch.zeros(activity.shape, dtype=torch.bool, device=activity.device)
    kept.view(-1)[activity.flatten().argsort(descending=True, stable=True)[:n]] = True
    return kept


@torch.no_grad()
def mask_edges(layer, keep, lost):
    """Cut the edges where keep (O, I) is False, beside those that are cut already."""
    layer.mask = keep.clone() if layer.mask is None else layer.mask & keep
    layer.base_weight *= keep
    layer.spline_weight *= keep.unsqueeze(-1)
    add_bias(layer, lost)


@torch.no_grad()
def remove_outputs(layer, keep):
    """Remove the output neurons where keep (O,) is False."""
    layer.out_features = int(keep.sum())
    cut(layer, (*PER_EDGE, 'mask', 'bias'), keep, dim=0)


@torch.no_grad()
def remove_inputs(layer, keep, lost):
    """Remove the input features where keep (I,) is False."""
    layer.in_features = int(keep.sum())
    cut(layer, (*PER_EDGE, 'mask'), keep, dim=1)
    cut(layer, ('grid',), keep, dim=0)
    add_bias(layer, lost)


@torch.no_grad()
def remove_hidden(mlp, keep, lost):
    """Remove the hidden channels of an MLP or SwiGLU of model.py where keep (H,) is False. Without a bias in c_proj
    nothing takes over what they gave on average.
    """
    n, halves = int(keep.sum()), mlp.c_fc.out_features // len(keep)  # two of SwiGLU: gates and values
    cut(mlp.c_fc, ('weight', 'bias'), keep.repeat(halves), dim=0)
    cut(mlp.c_proj, ('weight',), keep, dim=1)
    mlp.c_fc.out_features, mlp.c_proj.in_features = halves * n, n
    if mlp.c_proj.bias is not None:
        mlp.c_proj.bias += lost
    cut(mlp.act, ('spline_weight', 'grid', 'slope'), keep, dim=0)
    if isinstance(mlp.act, ChannelSpline):
        mlp.act.in_features = n


def complete(layers):
    """Give all KAN layers a bias, and if one has a mask, all: a model is built with one setting for all of its layers.
    Returns whether they have masks.
    """
    has_mask = any(layer.mask is not None for layer in layers)
    for layer in layers:
        if layer.bias is None:
            add_bias(layer, layer.base_weight.new_zeros(layer.out_features))
        if has_mask and layer.mask is None:
            layer.mask = torch.ones_like(layer.base_weight, dtype=torch.bool)
    return has_mask


def cut(layer, names, keep, dim):
    """Keep some slices of those tensors of a layer that it has."""
    at = keep.nonzero().squeeze(1)
    for name in names:
        tensor = getattr(layer, name, None)
        if tensor is None:
            continue
        smaller = tensor.index_select(dim, at)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(layer, name, nn.Parameter(smaller, tensor.requires_grad) if is_parameter else smaller)


def add_bias(layer, lost):
    lost = lost.to(layer.base_weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(lost.clone(), layer.base_weight.requires_grad)
    else:
        layer.bias += lost
