"""Budget policies: shares of layers and heads by the rules of PyramidKV, AdaKV and DynamicKV, against loops."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracles
from tests.caches import fill
from twilight import (
    AdaBudget,
    DynamicBudget,
    Geometry,
    NoPruning,
    PagedKVCache,
    PyramidBudget,
    StateSpec,
    TwilightAttention,
    UniformBudget,
    registry,
)
from twilight.graph import StaticCache
from twilight_selectors.full import Full
from twilight_selectors.quest import Quest

LAYERS, HEADS, GROUP, DIM, PAGE = 3, 2, 2, 8, 4
GEOMETRY = Geometry(LAYERS, HEADS * GROUP, HEADS, DIM, PAGE, torch.float32, layer_ids=(2, 5, 6))
LENGTHS = [61, 40, 9]


def _layer(lengths: list[int], place: int, layers: int) -> Any:
    """What a policy reads of a layer that keeps no state."""
    geometry = Geometry(layers, 2, 1, 8, layer_ids=tuple(range(2, 2 + layers)))
    lens = torch.tensor(lengths, dtype=torch.int32)
    return SimpleNamespace(geometry=geometry, index=2 + place, seq_lens=lens, max_seq_len=max(lengths))


def _for_layer(policy: UniformBudget, layer: Any) -> tuple[list[int], int]:
    mean = policy.resolve(layer.seq_lens, layer.geometry.num_kv_heads, max_seq_len=layer.max_seq_len)
    budget = policy.for_layer(mean, layer)
    assert budget.tokens.dtype == torch.int32 and budget.tokens.shape == mean.tokens.shape
    assert (budget.tokens <= budget.capacity).all() and (budget.tokens <= layer.seq_lens[:, None]).all()
    assert (budget.tokens >= layer.seq_lens[:, None].clamp(max=1)).all()
    return budget.tokens[:, 0].tolist(), budget.capacity


# PyramidKV.


def _pyramid(capacity: int, length: int, place: int, layers: int, beta: int, window: int) -> int:
    if length <= capacity:
        return length
    base = capacity - window
    if base <= 0 or length < 2 * base or layers == 1:
        return capacity
    least = base // beta
    most = 2 * base - least
    if most >= length - window:
        most = length - window
        least = 2 * base - most
    return min(length, window + most - place * ((most - least) // (layers - 1)))


def test_pyramid_worked_example() -> None:
    # C = 512, w = 8, 32 layers: 983, 953, ..., 53 and the window; the mean is 518 where 504 were asked for.
    policy = PyramidBudget(512, 1)
    tokens = [_for_layer(policy, _layer([32768], place, 32))[0][0] for place in range(32)]
    assert tokens == [8 + 983 - 30 * place for place in range(32)]
    assert sum(tokens) / 32 == 8 + 518


def test_pyramid_gives_short_sequences_the_mean() -> None:
    # 900 tokens are fewer than twice 504; 512 and less are kept whole.
    for place in (0, 7, 31):
        assert _for_layer(PyramidBudget(512, 1), _layer([900, 512, 300, 0], place, 32))[0] == [512, 512, 300, 0]


def test_pyramid_is_capped_by_the_length() -> None:
    # base = 100 of a budget of 108: from 195 down to 5, but 193 tokens stand before the window: 193 down to 7.
    tokens = [_for_layer(PyramidBudget(108, 1), _layer([201], place, 5))[0][0] for place in range(5)]
    assert tokens == [201, 155, 109, 63, 17]


@given(
    st.one_of(st.integers(1, 600), st.floats(0.01, 1.0)),
    st.lists(st.integers(0, 3000), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 64),
    st.data(),
)
def test_pyramid_by_hand(value, lengths, layers, beta, window, data) -> None:
    place = data.draw(st.integers(0, layers - 1))
    policy = PyramidBudget(value, 16, beta=beta, window=window)
    layer = _layer(lengths, place, layers)
    tokens, _ = _for_layer(policy, layer)
    mean = policy.resolve(layer.seq_lens, 1, max_seq_len=layer.max_seq_len).tokens[:, 0].tolist()
    for length, capacity, mine in zip(lengths, mean, tokens, strict=True):
        assert mine == _pyramid(capacity, length, place, layers, beta, window)


# AdaKV and DynamicKV.


def _scores(q: np.ndarray, keys: np.ndarray, window: int, kernel: int, pool: str) -> np.ndarray:
    """Return `[Hkv, n - w]` of one row and layer: `q [n, Hq, d]`, `keys [n, Hkv, d]`."""
    n = len(keys)
    found = np.zeros((HEADS, n - window))
    for head in range(HEADS):
        for t in range(n - window, n):
            for query in range(head * GROUP, (head + 1) * GROUP):
                logits = np.array([q[t, query] @ keys[i, head] for i in range(t + 1)]) * DIM**-0.5
                found[head] += oracles.softmax(logits)[: n - window] / GROUP
    half, pooled = kernel // 2, np.zeros_like(found)
    for i in range(n - window):
        near = found[:, max(0, i - half) : i + half + 1]
        pooled[:, i] = near.max(1) if pool == "max" else near.sum(1) / kernel
    return pooled


def _marks(groups: list[np.ndarray], count: int) -> list[int]:
    """Return how many of the `count` largest numbers of all groups lie in each."""
    ranked = sorted(
        ((value, place) for place, group in enumerate(groups) for value in group.flatten()), key=lambda x: -x[0]
    )
    marks = [0] * len(groups)
    for _, place in ranked[:count]:
        marks[place] += 1
    return marks


def _observed(policy: UniformBudget, chunks: list[list[int]] | None = None):
    """Show a policy a prompt, in chunks if given; return the cache, the queries and the keys, a list a layer."""
    torch.manual_seed(0)
    lengths = [sum(row) for row in zip(*chunks, strict=True)] if chunks else LENGTHS
    cache = PagedKVCache(GEOMETRY, num_rows=len(lengths), num_pages=64, budget=policy)
    b, longest = len(lengths), 64  # the same numbers however long the prompt
    keys = [torch.randn(b, longest, HEADS, DIM) * (1 + place) for place in range(LAYERS)]
    queries = [2 * torch.randn(b, longest, HEADS * GROUP, DIM) for _ in range(LAYERS)]
    start = [0] * b
    for counts in chunks or [LENGTHS]:
        for place, layer in enumerate(cache.layers):
            k = torch.zeros(b, max(counts), HEADS, DIM)
            q = torch.full((b, max(counts), HEADS * GROUP, DIM), torch.nan)
            for row, count in enumerate(counts):
                k[row, :count] = keys[place][row, start[row] : start[row] + count]
                q[row, :count] = queries[place][row, start[row] : start[row] + count]
            layer.append(k, k, counts)
            policy.observe(q, layer)
        start = [old + new for old, new in zip(start, counts, strict=True)]
    return cache, queries, keys


def _round(x: float) -> int:
    return int(np.rint(x))  # half to even, as torch rounds


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("value", [20, 0.5])
def test_ada_by_loops(value: int | float, alpha: float) -> None:
    policy = AdaBudget(value, 12, window=5, kernel=3, alpha=alpha)
    cache, queries, keys = _observed(policy)
    for place, layer in enumerate(cache.layers):
        budget = layer.budget(policy)
        for row, length in enumerate(LENGTHS):
            mean = min(length, value if isinstance(value, int) else max(12, math.ceil(value * length)))
            if mean == length:
                assert budget.tokens[row].tolist() == [length] * HEADS
                continue
            q, k = oracles.array(queries[place][row, :length]), oracles.array(keys[place][row, :length])
            base = mean - 5
            marks = _marks(list(_scores(q, k, 5, 3, "max")), base * HEADS)
            assert sum(marks) == base * HEADS
            want = [5 + _round((1 - alpha) * each + alpha * base) for each in marks]
            assert budget.tokens[row].tolist() == [min(length, each) for each in want]
            assert abs(sum(want) - HEADS * mean) <= HEADS / 2
        assert (budget.tokens <= budget.capacity).all()
    if alpha == 0.0:
        assert any(len(set(row)) > 1 for layer in cache.layers for row in layer.budget(policy).tokens.tolist())


@pytest.mark.parametrize("r_max", [1, 10])
@pytest.mark.parametrize("value", [20, 0.5])
def test_dynamic_by_loops(value: int | float, r_max: int) -> None:
    policy = DynamicBudget(value, 12, window=5, kernel=3, r_max=r_max)
    cache, queries, keys = _observed(policy)
    given = [layer.budget(policy).tokens for layer in cache.layers]
    for row, length in enumerate(LENGTHS):
        mean = min(length, value if isinstance(value, int) else max(12, math.ceil(value * length)))
        if mean == length:
            assert all(tokens[row].tolist() == [length] * HEADS for tokens in given)
            continue
        base = mean - 5
        scores = [
            _scores(oracles.array(q[row, :length]), oracles.array(k[row, :length]), 5, 3, "avg")
            for q, k in zip(queries, keys, strict=True)
        ]
        marks = _marks(scores, base * HEADS * LAYERS)
        most = min(r_max * base, length - 5)
        parts = [most * each // sum(marks) for each in marks]
        shares = [each * LAYERS * base // sum(parts) for each in parts]
        shares[-1] += LAYERS * base - sum(shares)
        want = [5 + min(share, most) for share in shares]
        assert [tokens[row].tolist() for tokens in given] == [[each] * HEADS for each in want]
        if r_max == 10:
            assert len(set(want)) > 1 and sum(want) == LAYERS * mean
    for layer in cache.layers:
        assert (layer.budget(policy).tokens <= layer.budget(policy).capacity).all()


@pytest.mark.parametrize("policy", [AdaBudget(20, window=5), DynamicBudget(20, window=5)], ids=lambda p: p.name)
def test_a_prompt_in_chunks_and_a_short_one_after_it(policy: UniformBudget) -> None:
    whole, *_ = _observed(policy, [[50, 40, 30]])
    parts, *_ = _observed(policy, [[20, 30, 6], [13, 5, 14], [17, 5, 10]])
    # A chunk of fewer queries than the window leaves what was seen before.
    trailed, *_ = _observed(policy, [[46, 30, 30], [4, 10, 0]])
    for once, steps, ended in zip(whole.layers, parts.layers, trailed.layers, strict=True):
        torch.testing.assert_close(steps.budget(policy).tokens, once.budget(policy).tokens)
        torch.testing.assert_close(ended.budget(policy).tokens[1:], once.budget(policy).tokens[1:])
    before, *_ = _observed(policy, [[46, 30, 30]])
    kept = [[layer.state(f"{policy.name}_share")[0] for layer in cache.layers] for cache in (before, trailed)]
    assert all(map(torch.equal, *kept)) and any((share != 1).any() for share in kept[0])


@pytest.mark.parametrize("policy", [AdaBudget(20, window=5), DynamicBudget(20, window=5)], ids=lambda p: p.name)
def test_shares_move_with_their_rows(policy: UniformBudget) -> None:
    cache, *_ = _observed(policy)
    before = [layer.budget(policy).tokens.clone() for layer in cache.layers]
    cache.select_rows([1, 0, 1])
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.budget(policy).tokens, old[[1, 0, 1]])
    cache.free(0)
    k = torch.zeros(3, 30, HEADS, DIM)
    for layer in cache.layers:
        layer.append(k, k, [30, 0, 0])
        assert layer.budget(policy).tokens[0].tolist() == [20, 20]  # nobody has looked at this prompt
        assert torch.equal(layer.budget(policy).tokens[1:], before[cache.layers.index(layer)][[0, 1]])


def test_shares_follow_a_budget_that_grows_with_the_text() -> None:
    policy = AdaBudget(0.5, 12, window=5, kernel=3, alpha=0.2)
    cache, *_ = _observed(policy)
    layer = cache.layers[0]
    share = layer.state("ada_share")[0].tolist()
    k = torch.zeros(3, 20, HEADS, DIM)
    for each in cache.layers:
        each.append(k, k, [20, 0, 0])
    base = math.ceil(0.5 * 81) - 5
    want = [5 + _round(0.8 * part * base + 0.2 * base) for part in share]
    assert layer.budget(policy).tokens[0].tolist() == want


POLICIES = [PyramidBudget(24, window=4), AdaBudget(24, window=4), DynamicBudget(24, window=4)]
TAKE_NO_BUDGET = {"full", "oracle_topp", "nsa"}
NEED_A_FILE = {"double_sparsity"}


def _names() -> list[str]:
    return sorted(set(registry.selectors()) - TAKE_NO_BUDGET - NEED_A_FILE)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("name", _names())
def test_every_selector_keeps_to_every_policy(name: str, policy: UniformBudget, static: bool) -> None:
    geometry = Geometry(3, 4, 2, 16, PAGE, torch.float32)
    attention = TwilightAttention(registry.create_selector(name), NoPruning(), policy, collect_stats=True)
    cache = PagedKVCache(geometry, num_rows=2, num_pages=60, selector=attention.selector, budget=policy)
    k = torch.randn(2, 90, 2, 16)
    for layer in cache.layers:
        layer.append(k, k, [90, 70])
        attention.observe(torch.randn(2, 90, 4, 16), layer)
    layers = StaticCache(cache, 120).layers if static else cache.layers
    asked = set()
    for layer in layers:
        attention.decode(torch.randn(2, 4, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16), layer)
        tokens = layer.budget(policy).tokens
        record = attention.stats.records[-1]
        # TidalDecode attends to everything where it chooses.
        all_of_it = name == "tidal_decode" and bool((record.b0 == record.seq_lens[:, None]).all())
        assert all_of_it or (record.b0 <= tokens + PAGE - 1).all()
        assert (record.b0 > 0).all()
        asked.add(tuple(tokens.flatten().tolist()))
    assert len(asked) > 1  # the policy did tell them apart


def test_a_cache_without_the_policys_state_is_refused_before_anything_is_written() -> None:
    attention = TwilightAttention(Full(), NoPruning(), AdaBudget(20))
    cache, _, _ = fill(GEOMETRY, [9], Full())
    with pytest.raises(
        ValueError, match=r"layer: its cache keeps nothing for AdaBudget\(.*\n.*budget=attention.budget"
    ):
        attention.decode(torch.zeros(1, 4, DIM), torch.zeros(1, 2, DIM), torch.zeros(1, 2, DIM), cache.layers[0])
    assert cache.table.lengths == [9]
    # With it, one made for another selector without data of its own still fits, and other parameters do.
    cache = PagedKVCache(GEOMETRY, num_rows=1, num_pages=9, budget=AdaBudget(30, alpha=0.5))
    attention.decode(torch.zeros(1, 4, DIM), torch.zeros(1, 2, DIM), torch.zeros(1, 2, DIM), cache.layers[0])


def test_selector_and_policy_may_not_share_a_name() -> None:
    class Clash(Quest):
        def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
            return (StateSpec("ada_share", (), torch.float32),)

    with pytest.raises(ValueError, match="state: expected different names, got .*ada_share"):
        PagedKVCache(GEOMETRY, num_rows=1, num_pages=1, selector=Clash(), budget=AdaBudget(20))


def test_policies_are_told_apart() -> None:
    assert PyramidBudget(0.5) == PyramidBudget(0.5) != PyramidBudget(0.5, beta=5)
    assert len({UniformBudget(0.5), PyramidBudget(0.5), AdaBudget(0.5), AdaBudget(0.5, alpha=0.3), AdaBudget(0.5)}) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PyramidBudget(0.5, beta=0), "beta: expected at least 1, got 0"),
        (lambda: PyramidBudget(1.5), "budget: expected an int of tokens or a fraction"),
        (lambda: AdaBudget(0.5, alpha=1.5), r"alpha: expected a float in \[0, 1\], got 1.5"),
        (lambda: AdaBudget(0.5, kernel=4), "kernel: expected an odd number, got 4"),
        (lambda: AdaBudget(0.5, pool="sum"), "pool: expected 'max' or 'avg', got 'sum'"),
        (lambda: DynamicBudget(0.5, window=0), "window: expected at least 1, got 0"),
        (lambda: DynamicBudget(0.5, r_max=0), "r_max: expected at least 1, got 0"),
    ],
)
def test_refuses_bad_parameters(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
