"""Top-p: the smallest set that reaches the mass, ties and all, against sort-and-add in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests import oracles
from twilight import Selection, ops
from twilight.ops.top_p import top_p_mask

INF = math.inf


def _kept(weights: list[float], p: float) -> list[int]:
    return top_p_mask(torch.tensor(weights, dtype=torch.float64).log(), p).nonzero().flatten().tolist()


def test_worked_trace_keeps_six_of_nine() -> None:
    weights = [0.30, 0.05, 0.20, 0.02, 0.15, 0.10, 0.08, 0.06, 0.04]
    kept = _kept(weights, 0.85)
    assert kept == [0, 2, 4, 5, 6, 7]
    assert sum(weights[i] for i in kept) == pytest.approx(0.89)


def test_a_mass_that_is_met_exactly_is_enough() -> None:
    assert _kept([0.5, 0.25, 0.125, 0.125], 0.75) == [0, 1]
    assert _kept([0.5, 0.25, 0.125, 0.125], 0.7500001) == [0, 1, 2, 3]
    assert _kept([0.125, 0.25, 0.125, 0.5], 0.5) == [3]


def test_ties_at_the_threshold_are_all_kept() -> None:
    assert _kept([0.25, 0.25, 0.125, 0.125, 0.125, 0.125], 0.6) == [0, 1, 2, 3, 4, 5]
    assert _kept([0.25, 0.25, 0.125, 0.125, 0.125, 0.125], 0.5) == [0, 1]
    assert _kept([0.125] * 8, 0.01) == list(range(8))


def test_one_keeps_every_candidate_however_light() -> None:
    logits = torch.tensor([0.0, -2000.0, -INF, -1e30])
    assert top_p_mask(logits, 1.0).tolist() == [True, True, False, True]
    assert top_p_mask(logits, 1).tolist() == [True, True, False, True]


def test_at_least_one_is_kept() -> None:
    assert top_p_mask(torch.tensor([[3.0, 9.0, 1.0], [-INF, -5.0, -INF]]), 1e-9).tolist() == [
        [False, True, False],
        [False, True, False],
    ]
    assert top_p_mask(torch.tensor([2.0]), 0.5).tolist() == [True]


def test_rows_do_not_know_each_other() -> None:
    # An empty row keeps nothing; a row with NaN or +inf keeps its candidates, so that the fault shows in its output.
    logits = torch.tensor(
        [[-INF, -INF, -INF], [5.0, math.nan, -INF], [1.0, INF, -INF], [4.0, 1.0, 0.0], [math.nan] * 3]
    )
    assert top_p_mask(logits, 0.5).tolist() == [
        [False, False, False],
        [True, True, False],
        [True, True, False],
        [True, False, False],
        [True, True, True],
    ]


def test_the_first_token_is_not_special() -> None:
    # The published kernel starts its search at token 0's weight and prunes nothing where the selector left it out.
    logits = torch.tensor([-INF, 8.0, 1.0, 0.0, 7.0, 1.0])
    assert top_p_mask(logits, 0.9).nonzero().flatten().tolist() == [1, 4]
    logits[0] = -30.0
    assert top_p_mask(logits, 0.9).nonzero().flatten().tolist() == [1, 4]


def test_a_long_flat_row_is_resolved() -> None:
    # An absolute tolerance of 1e-5 on weights keeps a fifth too many here: the mean weight is below it.
    logits = torch.randn(131072, dtype=torch.float64)
    kept = top_p_mask(logits, 0.85)
    assert set(kept.nonzero().flatten().tolist()) == oracles.top_p(logits.tolist(), 0.85)


logit = st.one_of(st.integers(-12, 12).map(lambda n: n / 2), st.floats(-30, 30), st.just(-INF))


@given(st.lists(logit, min_size=1, max_size=40), st.floats(1e-6, 1.0))
@example([0.0] * 7, 3 / 7)
@example([-INF] * 3, 0.5)
@example([0.0, -700.0, -INF], 0.999999)
@example([0.0, 1.1754943508222875e-38], 0.25)
def test_mass_is_reached_and_the_set_is_minimal(logits: list[float], p: float) -> None:
    kept = set(top_p_mask(torch.tensor(logits, dtype=torch.float64), p).nonzero().flatten().tolist())
    candidates = {i for i, value in enumerate(logits) if value != -INF}
    assert kept <= candidates
    if not candidates:
        return
    weights = oracles.softmax(torch.tensor(logits, dtype=torch.float64).numpy())
    lightest = min(weights[i] for i in kept)
    assert sum(weights[i] for i in kept) >= p - 1e-12
    assert kept >= {i for i in candidates if weights[i] > lightest * (1 + 1e-12)}
    assert kept >= {i for i in candidates if logits[i] == min(logits[j] for j in kept)}
    without = sum(weights[i] for i in kept if weights[i] > lightest * (1 + 1e-12))
    if p < 1:
        assert without < p + 1e-12
    prefixes = torch.tensor(sorted(weights, reverse=True)).cumsum(0)
    if (prefixes - p).abs().min() > 1e-9:
        assert kept == oracles.top_p(logits, p)


def _bounded(logits: list[float], p: float, least: int, most: int | None) -> set[int]:
    row = torch.tensor(logits, dtype=torch.float64)
    return set(top_p_mask(row, p, min_tokens=least, max_tokens=most).nonzero().flatten().tolist())


def test_worked_bounds() -> None:
    logits = torch.tensor([0.30, 0.05, 0.20, 0.02, 0.15, 0.10, 0.08, 0.06, 0.04], dtype=torch.float64).log().tolist()
    assert _bounded(logits, 0.85, 1, None) == {0, 2, 4, 5, 6, 7}
    assert _bounded(logits, 0.85, 1, 3) == {0, 2, 4}  # the ceiling cuts
    assert _bounded(logits, 0.25, 3, None) == {0, 2, 4}  # the floor fills up
    assert _bounded(logits, 0.25, 3, 3) == {0, 2, 4}
    assert _bounded(logits, 0.85, 3, 8) == {0, 2, 4, 5, 6, 7}  # neither is met
    assert _bounded(logits, 0.85, 20, None) == set(range(9))  # no more than there are
    assert _bounded(logits, 1.0, 1, 4) == {0, 2, 4, 5}  # p = 1 under a ceiling is top-k


def test_bounds_never_cut_through_a_class_of_ties() -> None:
    ties = [1.0, 0.0, 0.0, 0.0, -1.0, -1.0, -2.0]
    assert _bounded(ties, 0.99, 1, 2) == {0, 1, 2, 3}  # more than the ceiling, but no tie is preferred
    assert _bounded(ties, 0.3, 5, None) == {0, 1, 2, 3, 4, 5}
    assert _bounded([0.5] * 6, 0.9, 1, 1) == set(range(6))


def test_a_ceiling_reaches_candidates_that_weigh_nothing() -> None:
    # Beyond 745 nats a weight is 0 in float64; the order of the logits is still there to cut by.
    assert _bounded([0.0, -1000.0, -3000.0, -2000.0], 1.0, 1, 3) == {0, 1, 3}
    assert _bounded([0.0, -1000.0, -3000.0, -2000.0], 0.5, 2, None) == {0, 1}


@given(
    st.lists(logit, min_size=1, max_size=40),
    st.one_of(st.floats(1e-6, 1.0), st.just(1.0)),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(0, 30)),
)
@example([-INF] * 3, 0.5, 2, None)
def test_bounds_by_loops(logits: list[float], p: float, least: int, more: int | None) -> None:
    most = None if more is None else least + more
    weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1).sort(descending=True).values
    if p < 1 and (weights.cumsum(-1) - p).abs().min() < 1e-9:
        return  # rounding decides
    kept = _bounded(logits, p, least, most)
    assert kept == oracles.bounded_top_p(logits, p, least, most)
    if most is None:
        assert kept >= _bounded(logits, p, 1, None)


def test_a_sick_row_keeps_its_candidates_whatever_the_ceiling() -> None:
    logits = torch.tensor([[1.0, math.nan, -INF, 0.0], [INF, 1.0, -INF, 0.0], [3.0, 1.0, -INF, 0.0]])
    kept = top_p_mask(logits, 0.5, max_tokens=1)
    assert kept.tolist() == [[True, True, False, True], [True, True, False, True], [True, False, False, False]]


@given(st.lists(logit, min_size=1, max_size=30), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_more_mass_never_keeps_less(logits: list[float], p: float, other: float) -> None:
    row = torch.tensor(logits, dtype=torch.float64)
    low, high = (top_p_mask(row, value) for value in sorted((p, other)))
    assert (low <= high).all()


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_a_group_keeps_the_union_of_its_query_heads(group: int, granularity: int) -> None:
    lengths, heads, p = [30, 7, 0, 16], 2, 0.6
    entries = [-(-length // granularity) for length in lengths]
    lists = oracles.random_lists(entries, heads)
    candidates = Selection(*oracles.pad(lists), granularity)
    logits = 2 * torch.randn(4, heads * group, candidates.capacity * granularity)
    spelled = [[oracles.tokens_of(lists[r][h], granularity, lengths[r]) for h in range(heads)] for r in range(4)]
    for row in range(4):
        for head in range(heads * group):
            for place in range(logits.shape[-1]):
                entry, offset = divmod(place, granularity)
                mine = lists[row][head // group]
                if entry >= len(mine) or mine[entry] * granularity + offset >= lengths[row]:
                    logits[row, head, place] = -INF
    pruned = ops.top_p(logits, candidates, torch.tensor(lengths, dtype=torch.int32), p)
    kept = pruned.selection
    assert kept.granularity == 1
    assert pruned.per_query_head.shape == pruned.mass.shape == (4, heads * group)
    for row in range(4):
        for head in range(heads):
            union: set[int] = set()
            for query in range(head * group, (head + 1) * group):
                real = logits[row, query] != -INF
                places = oracles.top_p(logits[row, query][real].double().tolist(), p) if real.any() else set()
                mine = {spelled[row][head][place] for place in places}
                union |= mine
                assert int(pruned.per_query_head[row, query]) == len(mine)
                weights = oracles.softmax(logits[row, query].double().numpy())
                mass = sum(sorted(weights, reverse=True)[: len(mine)])
                assert float(pruned.mass[row, query]) == pytest.approx(mass, abs=1e-6)
                assert not mine or float(pruned.mass[row, query]) >= p - 1e-6
            count = int(kept.lengths[row, head])
            assert kept.indices[row, head, :count].tolist() == sorted(union)
            assert count <= int(pruned.per_query_head[row, head * group : (head + 1) * group].sum())


def test_log_weight_travels_with_its_tokens() -> None:
    candidates = Selection(
        torch.tensor([[[2, 5, 6, 9]]], dtype=torch.int32),
        torch.tensor([[4]], dtype=torch.int32),
        log_weight=torch.tensor([[[0.1, 0.2, 0.3, 0.4], [1.0, -INF, 3.0, 4.0]]]),
    )
    logits = torch.tensor([[[0.0, 9.0, 0.0, 8.5], [0.0, -INF, 0.0, 9.0]]])
    kept = ops.top_p(logits, candidates, torch.tensor([10], dtype=torch.int32), 0.9).selection
    assert kept.indices[0, 0, :2].tolist() == [5, 9] and kept.lengths.tolist() == [[2]]
    assert kept.log_weight is not None
    torch.testing.assert_close(kept.log_weight[0, :, :2], torch.tensor([[0.2, 0.4], [-INF, 4.0]]))


def test_nan_row_keeps_its_candidates_and_claims_no_mass() -> None:
    candidates = Selection(
        torch.tensor([[[0, 3, 7]], [[1, 2, 99]]], dtype=torch.int32), torch.tensor([[3], [2]], dtype=torch.int32)
    )
    logits = torch.tensor([[[9.0, math.nan, 0.0]], [[9.0, 0.0, -INF]]])
    pruned = ops.top_p(logits, candidates, torch.tensor([8, 8], dtype=torch.int32), 0.5)
    assert pruned.selection.lengths.tolist() == [[3], [1]]
    assert pruned.selection.indices[0, 0, :3].tolist() == [0, 3, 7]
    assert pruned.mass.tolist() == [[0.0], [pytest.approx(0.99988, abs=1e-4)]]


def test_keep_all_keeps_what_was_proposed() -> None:
    candidates = Selection(
        torch.tensor([[[0, 2, 77]], [[1, 66, 66]]], dtype=torch.int32), torch.tensor([[2], [1]], dtype=torch.int32), 4
    )
    kept = ops.keep_all(candidates, torch.tensor([10, 5], dtype=torch.int32))
    assert kept.selection.lengths.tolist() == [[6], [1]]
    assert kept.selection.indices[0, 0].tolist() == [0, 1, 2, 3, 8, 9]
    assert kept.selection.indices[1, 0, 0] == 4
    assert kept.mass.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("p", [0.0, -0.5, 1.0001, math.nan, INF])
def test_refuses_a_mass_outside_its_range(p: float) -> None:
    with pytest.raises(ValueError, match=r"p: expected a float in \(0, 1\], got"):
        top_p_mask(torch.zeros(3), p)


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ({"min_tokens": 0}, ValueError, "min_tokens: expected at least 1, got 0"),
        ({"min_tokens": 2.0}, TypeError, "min_tokens: expected an int, got float"),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected at least 1, got 0"),
        ({"min_tokens": 9, "max_tokens": 8}, ValueError, "max_tokens: expected at least min_tokens=9, got 8"),
    ],
)
def test_refuses_bounds_out_of_order(bounds: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        top_p_mask(torch.zeros(3), 0.5, **bounds)
    candidates = Selection(torch.zeros(1, 1, 3, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32))
    with pytest.raises(error, match=message):
        ops.top_p(torch.zeros(1, 1, 3), candidates, torch.tensor([8], dtype=torch.int32), 0.5, **bounds)


def test_refuses_logits_of_other_candidates() -> None:
    candidates = Selection(torch.zeros(1, 1, 3, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32), 2)
    lens = torch.tensor([8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"logits: expected shape \[1, any, 6\], got \[1, 1, 3\]"):
        ops.top_p(torch.zeros(1, 1, 3), candidates, lens, 0.5)
    with pytest.raises(TypeError, match="logits: expected dtype .* got int32"):
        ops.top_p(torch.zeros(1, 1, 6, dtype=torch.int32), candidates, lens, 0.5)
