"""Attention weights: those of the attention that gave the lse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill
from twilight import Geometry, Selection, ops


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_by_loops_and_as_the_attention_had_them(granularity: int, weighted: bool) -> None:
    lengths = [23, 9, 0]
    cache, keys, values = fill(Geometry(1, 6, 2, 8, 4, torch.float32, scaling=0.6), lengths)
    layer = cache.layers[0]
    pages = (layer.page_table, layer.seq_lens)
    chosen = oracles.random_lists([-(-length // granularity) for length in lengths], 2)
    indices, counts = oracles.pad(chosen)
    extra = None
    if weighted:
        extra = torch.randn(3, 6, indices.shape[-1])
        extra[0, 2] = -torch.inf
        extra[0, 2, 1] = 0.3
    selection = Selection(indices, counts, granularity, extra)
    q = 2 * torch.randn(3, 6, 8)
    out, lse = ops.sparse_attention(q, layer.k_pages, layer.v_pages, *pages, selection, sm_scale=0.6)
    weights = ops.attention_weights(q, layer.k_pages, *pages, selection, lse, sm_scale=0.6)
    assert weights.shape == (3, 6, indices.shape[-1] * granularity)
    for row, length in enumerate(lengths):
        for head in range(6):
            entries = chosen[row][head // 3]
            tokens = oracles.tokens_of(entries, granularity, length)
            wanted = np.zeros(weights.shape[-1])
            if tokens:
                logits = oracles.array(keys[0][row, tokens, head // 3]) @ oracles.array(q[row, head]) * 0.6
                if extra is not None:
                    own = [float(extra[row, head, entries.index(token // granularity)]) for token in tokens]
                    logits = logits + np.array(own)
                places = [entries.index(t // granularity) * granularity + t % granularity for t in tokens]
                wanted[places] = oracles.softmax(logits)
                v = oracles.array(values[0][row, tokens, head // 3])
                np.testing.assert_allclose(out[row, head].numpy(), wanted[places] @ v, atol=1e-5)
            np.testing.assert_allclose(weights[row, head].numpy(), wanted, atol=1e-6)


def test_a_row_that_attends_to_nothing_weighs_nothing() -> None:
    cache, _, _ = fill(Geometry(1, 2, 1, 8, 4, torch.float32), [5])
    layer = cache.layers[0]
    selection = Selection(torch.zeros(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32))
    lse = torch.full((1, 2), -math.inf)
    arguments = (torch.randn(1, 2, 8), layer.k_pages, layer.page_table, layer.seq_lens, selection, lse)
    assert (ops.attention_weights(*arguments) == 0).all()
