"""The cache of what blocks have computed; what a GPT writes with it is tested in test_model.py."""

import pytest
import torch

from layers.generation import KVCache


@pytest.mark.parametrize('first', [1, 40, 70, 200])
def test_the_cache_holds_all_so_far_while_it_grows(first):
    torch.manual_seed(0)
    cache, parts = KVCache(200), []
    for T in [first] + [1] * (200 - first):
        parts.append(torch.randn(2, 3, T, 4))
        assert torch.equal(cache.extend('k', parts[-1]), torch.cat(parts, 2))
        if cache.length in (50, 90):
            cache.select([1, 0, 1])
            parts = [torch.cat(parts, 2)[[1, 0, 1]]]
            cache.select([0, 1])
            parts = [parts[0][:2]]
    assert cache.length == cache.count('k') == 200 and cache.count('v') == 0


def test_the_cache_is_as_large_as_the_text_and_not_the_context():
    cache = KVCache(10**9)
    cache.extend('k', torch.zeros(1, 1, 10, 4))
    cache.extend('k', torch.zeros(1, 1, 1, 4))
    assert cache.kept['k'].numel() < 1000
