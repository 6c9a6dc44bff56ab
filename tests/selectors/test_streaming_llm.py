"""StreamingLLM: sinks and a window, nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.caches import fill, lists
from twilight import Geometry, UniformBudget
from twilight_selectors.streaming_llm import StreamingLLM


def _select(lengths: list[int], budget: int | float, sinks: int) -> list[list[list[int]]]:
    cache, _, _ = fill(Geometry(1, 4, 2, 8, 4), lengths)
    layer = cache.layers[0]
    given = UniformBudget(budget, 1).resolve(layer.seq_lens, 2, max_seq_len=max(lengths))
    return lists(StreamingLLM(sinks).select(torch.randn(len(lengths), 4, 8), layer, given))


def test_by_hand() -> None:
    assert _select([12], 7, 4) == [[[0, 1, 2, 3, 9, 10, 11]] * 2]
    assert _select([12], 4, 4) == [[[8, 9, 10, 11]] * 2]  # no room for more than the newest
    assert _select([12], 5, 4) == [[[0, 1, 2, 3, 11]] * 2]
    assert _select([12], 3, 0) == [[[9, 10, 11]] * 2]


@pytest.mark.parametrize("budget", [1, 6, 9, 100, 0.4, 1.0])
@pytest.mark.parametrize("sinks", [0, 1, 4, 30])
def test_budget_is_met_exactly_in_every_row(budget: int | float, sinks: int) -> None:
    lengths = [37, 6, 5, 1, 0, 20]
    for length, heads in zip(lengths, _select(lengths, budget, sinks), strict=True):
        wanted = -(-length * 4 // 10) if budget == 0.4 else length if isinstance(budget, float) else budget
        count = min(wanted, length)
        first = sinks if count > sinks else 0
        expected = sorted({*range(first), *range(length - count + first, length)}) if length else []
        assert heads == [expected, expected]
        assert len(expected) == count


def test_refuses_negative_sinks() -> None:
    with pytest.raises(ValueError, match="sinks: expected at least 0, got -1"):
        StreamingLLM(-1)
