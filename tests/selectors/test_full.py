"""Full proposes every token, whatever the budget."""

from __future__ import annotations

import torch

from tests.caches import fill
from twilight import Geometry, UniformBudget
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


def test_reads_nothing_to_do_so() -> None:
    geometry = Geometry(1, 4, 2, 8)
    assert Full().metadata(geometry) == () and Full().bytes_per_token(geometry) == 0
