"""Full proposes every token, whatever the budget."""

from __future__ import annotations

import pytest
import torch

from tests.caches import fill
from twilight import Geometry, UniformBudget
from twilight.graph import StaticCache
from twilight_selectors.full import Full


def test_proposes_every_token() -> None:
    lengths = [9, 4, 1, 0]
    cache, _, _ = fill(Geometry(1, 4, 2, 8, 4), lengths)
    layer = cache.layers[0]
    budget = UniformBudget(1).resolve(layer.seq_lens, 2, max_seq_len=9)
    selection = Full().select(torch.randn(4, 4, 8), layer, budget)
    positions, valid = selection.positions(layer.seq_lens)
    for row, length in enumerate(lengths):
        for head in range(2):
            assert positions[row, head, valid[row, head]].tolist() == list(range(length))


@pytest.mark.parametrize("static", [False, True])
def test_layers_of_a_step_share_one_list_that_follows_the_rows(static: bool) -> None:
    cache, _, _ = fill(Geometry(2, 4, 2, 8, 4, torch.float32), [7, 6])
    held = StaticCache(cache, 9) if static else cache
    q, k = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    budget = UniformBudget(1).resolve(held.layers[0].seq_lens, 2, max_seq_len=9)
    selector = Full()
    for lengths in ([2, 2], [2, 2], [3, 2]):
        found = [selector.select(q, layer, budget) for layer in held.layers]
        assert found[0] is found[1]
        assert found[0].lengths.tolist() == [[pages] * 2 for pages in lengths]
        if lengths != [3, 2]:
            for layer in held.layers:
                layer.append(k, k)
    held.free(0)
    assert selector.select(q, held.layers[0], budget).lengths.tolist() == [[0, 0], [2, 2]]


def test_reads_nothing_to_do_so() -> None:
    geometry = Geometry(1, 4, 2, 8)
    assert Full().metadata(geometry) == () and Full().bytes_per_token(geometry) == 0
