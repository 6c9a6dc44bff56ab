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


def test_none_all_and_ties_of_halves() -> None:
    # Seven neighbouring halves, thousands of times each.
    scores = (torch.arange(20000) % 7 * 2 + 2048.0).half().expand(1, 1, -1)
    lengths = torch.tensor([19999], dtype=torch.int32)
    ranked = sorted(range(19999), key=lambda token: (-(token % 7), token))
    for count in (0, 1, 3000, 19999):
        counts = torch.tensor([[count]], dtype=torch.int32)
        got = ops.top_k(scores, counts, lengths, granularity=1, capacity=20000)
        assert lists(got) == [[sorted(ranked[:count])]]
    equal = torch.full((1, 1, 9000), -3.0).half()
    counts, lengths = torch.tensor([[4000]], dtype=torch.int32), torch.tensor([9000], dtype=torch.int32)
    assert lists(ops.top_k(equal, counts, lengths, granularity=1, capacity=4000)) == [[list(range(4000))]]


def test_a_given_lse_weights_the_heads() -> None:
    # Two heads that want different tokens: the one whose mass is said to be smaller weighs more.
    scores = torch.tensor([[[5.0, 0, 1], [0, 5.0, 1]]])
    counts, lengths = torch.ones(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    for lse, want in (([5.0, 9.0], [0]), ([9.0, 5.0], [1])):
        got = ops.top_k(scores, counts, lengths, granularity=1, capacity=1, lse=torch.tensor([lse]))
        assert lists(got) == [[want]]
    found = scores.logsumexp(-1)
    for count in (1, 2):
        options = {"granularity": 1, "capacity": 2}
        given = ops.top_k(scores, count * counts, lengths, lse=found, **options)
        assert lists(given) == lists(ops.top_k(scores, count * counts, lengths, **options))


def test_refuses_what_does_not_fit() -> None:
    counts, lengths = torch.ones(1, 2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="scores: expected a multiple of 2 heads, got 3"):
        ops.top_k(torch.zeros(1, 3, 4), counts, lengths, granularity=1, capacity=1)
    with pytest.raises(ValueError, match="reduce: expected"):
        ops.top_k(torch.zeros(1, 2, 4), counts, lengths, granularity=1, capacity=1, reduce="mean")
    with pytest.raises(TypeError, match="scores: expected dtype float32 or float16, got bfloat16"):
        ops.top_k(torch.zeros(1, 2, 4).bfloat16(), counts, lengths, granularity=1, capacity=1)
    with pytest.raises(ValueError, match=r"lse: expected shape \[1, 4\], got \[1, 2\]"):
        ops.top_k(torch.zeros(1, 4, 4), counts, lengths, granularity=1, capacity=1, lse=torch.zeros(1, 2))
