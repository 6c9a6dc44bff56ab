"""Threshold: weights that are large enough, against the definition in loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests import oracles
from twilight import Selection, ops
from twilight.ops.threshold import threshold_mask

INF = math.inf


def _kept(weights: list[float], **limits: float) -> list[int]:
    return threshold_mask(torch.tensor(weights, dtype=torch.float64).log(), **limits).nonzero().flatten().tolist()


def test_worked_example() -> None:
    weights = [0.4, 0.04, 0.3, 0.2, 0.06]
    assert _kept(weights, share=0.5) == [0, 2, 3]  # 0.2 is half of 0.4: what reaches the threshold stays
    assert _kept(weights, share=0.51) == [0, 2]
    assert _kept(weights, weight=0.06) == [0, 2, 3, 4]
    assert _kept(weights, share=0.11, weight=0.05) == [0, 2, 3, 4]  # both must be reached
    assert _kept(weights, share=0.5, weight=0.05) == [0, 2, 3]
    assert _kept(weights, share=0.01, weight=0.25) == [0, 2]


def test_the_heaviest_is_kept_where_nothing_weighs_enough() -> None:
    assert _kept([0.2, 0.3, 0.3, 0.2], weight=0.9) == [1, 2]
    assert _kept([0.2, 0.3, 0.3, 0.2], share=1.0) == [1, 2]


def test_weights_are_of_all_candidates() -> None:
    # The threshold is on normalised weights: four of a kind weigh a quarter each, not 1.
    assert threshold_mask(torch.full((4,), 7.0), weight=0.3).tolist() == [True] * 4
    logits = torch.tensor([3.0, 0.0, 0.0])
    assert threshold_mask(logits, weight=0.1).tolist() == [True, False, False]
    assert threshold_mask(logits, weight=0.04).tolist() == [True, True, True]


logit = st.one_of(st.integers(-12, 12).map(lambda n: n / 2), st.floats(-30, 30), st.just(-INF))


@given(st.lists(logit, min_size=1, max_size=30), st.floats(0, 1), st.floats(0, 1))
@example([-INF, -INF], 0.5, 0.5)
@example([0.0, -800.0], 1e-9, 0.0)
def test_by_loops(logits: list[float], share: float, weight: float) -> None:
    if not share and not weight:
        return
    row = torch.tensor(logits, dtype=torch.float64)
    kept = set(threshold_mask(row, share=share, weight=weight).nonzero().flatten().tolist())
    if max(logits) == -INF:
        assert kept == set()
        return
    weights = oracles.softmax(row.numpy())
    for cut in (share * max(weights), weight):
        if any(abs(w - cut) < 1e-9 * max(w, cut) for w in weights):
            return  # rounding decides
    assert kept == oracles.threshold(logits, share, weight)


def test_rows_do_not_know_each_other() -> None:
    logits = torch.tensor([[-INF, -INF, -INF], [5.0, math.nan, -INF], [1.0, INF, -INF], [4.0, 1.0, 0.0]])
    expected = [[False] * 3, [True, True, False], [True, True, False], [True, False, False]]
    assert threshold_mask(logits, share=0.5).tolist() == expected
    assert threshold_mask(logits, weight=0.5).tolist() == expected


def test_a_group_keeps_the_union_and_each_head_is_counted() -> None:
    candidates = Selection(
        torch.tensor([[[0, 2, 3]], [[1, 9, 9]]], dtype=torch.int32), torch.tensor([[3], [1]], dtype=torch.int32), 2
    )
    # Pages of 2: tokens 0, 1, 4, 5, 6 of the first sequence (of 7), tokens 2 and 3 of the second (of 4).
    logits = torch.tensor(
        [[[0.0, 5.0, 0.0, 0.0, 4.9, -INF], [9.0, 0.0, 0.0, 0.0, 0.0, -INF]],
         [[1.0, 1.0, -INF, -INF, -INF, -INF], [1.0, 0.0, -INF, -INF, -INF, -INF]]]
    )  # fmt: skip
    pruned = ops.threshold(logits, candidates, torch.tensor([7, 4], dtype=torch.int32), share=0.5)
    assert pruned.per_query_head is not None and pruned.mass is not None
    assert pruned.per_query_head.tolist() == [[2, 1], [2, 1]]
    assert pruned.selection.lengths.tolist() == [[3], [2]]
    assert pruned.selection.indices[0, 0, :3].tolist() == [0, 1, 6]
    assert pruned.selection.indices[1, 0, :2].tolist() == [2, 3]
    weights = oracles.softmax(logits[0, 0].double().numpy())
    assert float(pruned.mass[0, 0]) == pytest.approx(weights[1] + weights[4], abs=1e-6)


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"share": -0.1}, ValueError, r"share: expected a float in \[0, 1\], got -0.1"),
        ({"share": 1.5}, ValueError, r"share: expected a float in \[0, 1\], got 1.5"),
        ({"weight": math.nan}, ValueError, r"weight: expected a float in \[0, 1\], got nan"),
        ({"weight": True}, TypeError, r"weight: expected a float in \[0, 1\], got bool"),
        ({"share": "0.5"}, TypeError, r"share: expected a float in \[0, 1\], got str"),
        ({}, ValueError, "share: expected more than 0 where weight is 0"),
    ],
)
def test_refuses_what_is_no_share(limits: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        threshold_mask(torch.zeros(3), **limits)
