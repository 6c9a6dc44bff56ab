"""Top-k: the list, against a sort in Python."""

from __future__ import annotations

import math

import pytest
import torch

from tests.caches import lists
from twilight import combine_group, ops


@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
@pytest.mark.parametrize("force", [True, False])
def test_takes_the_best_in_order(reduce: str, force: bool) -> None:
    scores = torch.randn(3, 4, 30)
    lengths = torch.tensor([120, 50, 0], dtype=torch.int32)
    counts = torch.tensor([[7, 3], [20, 1], [4, 4]], dtype=torch.int32)
    options = {"granularity": 4, "capacity": 20, "reduce": reduce, "scale": 0.7}
    got = lists(ops.top_k(scores, counts, lengths, force_newest=force, **options))
    for row, length in enumerate(lengths.tolist()):
        pages = math.ceil(length / 4)
        if not pages:
            assert got[row] == [[], []]
            continue
        combined = combine_group(scores[row : row + 1, :, :pages], 2, reduce, scale=0.7)[0]
        for head in range(2):
            values = combined[head].tolist()
            values[-1] = math.inf if force else values[-1]
            ranked = sorted(range(pages), key=lambda page: (-values[page], page))
            assert got[row][head] == sorted(ranked[: min(int(counts[row, head]), pages)])


def test_ties_go_to_the_lower_index_and_nothing_is_not_selected() -> None:
    scores = torch.tensor([[[1.0, 2, 1, 2, 1, -math.inf]]])
    lengths = torch.tensor([6], dtype=torch.int32)
    for count, want in ((1, [1]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 4])):
        counts = torch.tensor([[count]], dtype=torch.int32)
        assert lists(ops.top_k(scores, counts, lengths, granularity=1, capacity=6)) == [[want]]


def test_refuses_what_does_not_fit() -> None:
    counts, lengths = torch.ones(1, 2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="scores: expected a multiple of 2 heads, got 3"):
        ops.top_k(torch.zeros(1, 3, 4), counts, lengths, granularity=1, capacity=1)
    with pytest.raises(ValueError, match="reduce: expected"):
        ops.top_k(torch.zeros(1, 2, 4), counts, lengths, granularity=1, capacity=1, reduce="mean")
