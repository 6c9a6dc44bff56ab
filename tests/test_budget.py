"""Budgets: tokens and fractions, their bounds, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twilight import Budget, Geometry, PagedKVCache, TwilightAttention, UniformBudget
from twilight.budget import parse_budget
from twilight_selectors.full import Full


def _resolve(value: int | float, lengths: list[int], min_tokens: int = 64) -> Budget:
    lens = torch.tensor(lengths, dtype=torch.int32)
    return UniformBudget(value, min_tokens).resolve(lens, 3, max_seq_len=max(lengths))


def test_tokens_are_never_more_than_the_sequence_has() -> None:
    budget = _resolve(100, [1000, 100, 7, 0])
    assert budget.tokens.tolist() == [[100] * 3, [100] * 3, [7] * 3, [0] * 3]
    assert budget.tokens.dtype == torch.int32 and budget.capacity == 100
    assert _resolve(100, [40]).capacity == 40


def test_fraction_is_of_each_length_and_has_a_floor() -> None:
    budget = _resolve(0.25, [1000, 257, 256, 100, 7, 0])
    assert budget.tokens[:, 0].tolist() == [250, 65, 64, 64, 7, 0]
    assert budget.capacity == 250
    assert _resolve(0.25, [100]).capacity == 64
    assert _resolve(0.01, [1000], min_tokens=1).tokens[0, 0] == 10


def test_one_is_a_token_and_one_point_zero_is_everything() -> None:
    assert _resolve(1, [500]).tokens.unique().tolist() == [1]
    assert _resolve(1.0, [500]).tokens.unique().tolist() == [500]


@given(st.floats(1e-6, 1.0), st.lists(st.integers(0, 2**26), min_size=1, max_size=4), st.integers(1, 300))
def test_capacity_bounds_the_tokens(value: float, lengths: list[int], least: int) -> None:
    budget = _resolve(value, lengths, least)
    for length, tokens in zip(lengths, budget.tokens[:, 0].tolist(), strict=True):
        assert tokens <= budget.capacity
        assert min(length, 1) <= tokens <= length
        # Exact arithmetic, but for the one rounding of length * value to float64.
        wanted = max(least, math.ceil(Fraction(length) * Fraction(value)))
        assert abs(tokens - min(length, wanted)) <= (1 if wanted > least else 0)


def test_pages_round_up() -> None:
    budget = Budget(torch.tensor([[0, 1, 16, 17]], dtype=torch.int32), 17)
    assert budget.pages(16).tolist() == [[0, 1, 1, 2]] and budget.page_capacity(16) == 2


@pytest.mark.parametrize("value", [0, -5, 0.0, -0.25, 1.0001, math.nan, math.inf])
def test_refuses_values_out_of_range(value: int | float) -> None:
    with pytest.raises(ValueError, match=f"budget: expected .*, got {value}"):
        parse_budget(value)


@pytest.mark.parametrize("value", [True, None, "256", torch.tensor(3)])
def test_refuses_values_of_other_types(value: object) -> None:
    with pytest.raises(TypeError, match=rf"budget: expected tokens \(int\) .*, got {type(value).__name__}"):
        parse_budget(value)  # type: ignore[arg-type]


def test_refuses_a_floor_below_one() -> None:
    with pytest.raises(ValueError, match="min_tokens: expected at least 1, got 0"):
        UniformBudget(0.5, 0)


def test_a_policy_passes_through() -> None:
    policy = UniformBudget(0.5, 8)
    assert parse_budget(policy) is policy


def test_a_budget_above_the_capacity_of_the_cache_is_refused_before_anything_is_written():
    geometry = Geometry(1, 2, 1, 8, dtype=torch.float32)
    cache = PagedKVCache(geometry, num_rows=1, num_pages=4)
    attention = TwilightAttention(Full(), budget=65)
    q, k = torch.randn(1, 2, 8), torch.randn(1, 1, 8)
    with pytest.raises(ValueError, match="budget: 65 tokens are more than the 64 that the cache can hold"):
        attention.decode(q, k, k, cache.layers[0])
    assert cache.table.lengths == [0]
    growing = PagedKVCache(geometry, num_rows=1, num_pages=1, growable=True)
    attention.decode(q, k, k, growing.layers[0])
    assert growing.table.lengths == [1]
