"""Quest: the bound, the pages it picks, and metadata that follows the cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import Budget, Geometry, PagedKVCache, UniformBudget, ops
from twilight_selectors.quest import Quest

EXAMPLE = torch.tensor(
    [
        [[1, 0, 2, -1], [0.5, -1, 1, 0], [2, 1, -1, 0.5], [-1, 0.5, 0, 1]],
        [[0, -3, 1, 0], [1, -2, 0, 0.2], [-0.5, -1, 2, -0.3], [0.2, -2.5, -1, 0.1]],
    ]
)


def _select(
    selector: Quest, lengths: list[int], budget: int | float, geometry: Geometry
) -> tuple[list, torch.Tensor, PagedKVCache, torch.Tensor]:
    cache, keys, _ = fill(geometry, lengths, selector)
    layer = cache.layers[0]
    q = torch.randn(len(lengths), geometry.num_q_heads, geometry.head_dim).to(geometry.dtype)
    given = UniformBudget(budget, 1).resolve(layer.seq_lens, geometry.num_kv_heads, max_seq_len=max(lengths))
    return lists(selector.select(q, layer, given)), keys[0], cache, q


def _bounds(q: torch.Tensor, keys: torch.Tensor, length: int, page_size: int, group: int) -> np.ndarray:
    """Return `[Hq, pages]`, one row's bounds channel by channel."""
    bounds = np.zeros((q.shape[0], -(-length // page_size)))
    for head, page in np.ndindex(bounds.shape):
        mine = oracles.array(keys[page * page_size : min(length, (page + 1) * page_size), head // group])
        for channel, value in enumerate(oracles.array(q[head])):
            bounds[head, page] += max(value * mine[:, channel].max(), value * mine[:, channel].min())
    return bounds


def test_worked_example() -> None:
    q = torch.tensor([[[1, -2, 0.5, 3]]])
    page_max, page_min = EXAMPLE.amax(1).unsqueeze(1), EXAMPLE.amin(1).unsqueeze(1)
    assert page_max[:, 0].tolist() == [[2, 1, 2, 1], [1, -1, 2, pytest.approx(0.2)]]
    table, length = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
    bound = ops.page_scores(q, (page_max, page_min), table, length, page_size=4)
    assert bound.flatten().tolist() == pytest.approx([8.0, 8.6])

    # A third page, the newest, is proposed anyway; of the two others B is the better.
    geometry = Geometry(1, 1, 1, 4, 4, torch.float32)
    cache = PagedKVCache(geometry, num_rows=1, num_pages=3, selector=Quest())
    keys = torch.cat([EXAMPLE.flatten(0, 1), torch.zeros(1, 4)])[None, :, None]
    cache.layers[0].append(keys, keys)
    budget = Budget(torch.tensor([[8]], dtype=torch.int32), 8)
    assert lists(cache.selector.select(q, cache.layers[0], budget)) == [[[1, 2]]]


@pytest.mark.parametrize("kind", ["int8", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_bound_is_above_every_dot_and_reached_by_corners(dtype: torch.dtype, sign: int, kind: str) -> None:
    lengths = [37, 16, 3]
    cache, keys, _ = fill(Geometry(1, 6, 2, 16, 4, dtype), lengths, Quest(metadata_type=kind))
    layer = cache.layers[0]
    q = sign * torch.randn(3, 6, 16).to(dtype)
    names = ["bounds", "bounds_params"] if kind == "int8" else ["max", "min"]
    bounds = [layer.metadata(name) for name in names]
    bound = ops.page_scores(q, bounds, layer.page_table, layer.seq_lens, page_size=4)
    assert bound.dtype == torch.float32
    for row, length in enumerate(lengths):
        want = _bounds(q[row], keys[0][row], length, 4, 3)
        mine = bound[row, :, : want.shape[1]].numpy()
        if kind == "native":
            assert mine == pytest.approx(want, rel=1e-5, abs=1e-4)
        else:
            # Each of 16 channels is at most one of 255 steps, about 5 / 255, further out; never further in.
            assert (mine >= want - 1e-4).all()
            assert mine == pytest.approx(want, abs=float(q.abs().sum(-1).max()) * 6 / 255)
        assert bool((bound[row, :, want.shape[1] :] == -torch.inf).all())
        for token in range(length):
            for head in range(6):
                dot = float(oracles.array(q[row, head]) @ oracles.array(keys[0][row, token, head // 3]))
                assert float(bound[row, head, token // 4]) >= dot - 1e-4


def test_proposes_the_pages_with_the_largest_bounds_and_the_newest() -> None:
    lengths, page_size = [61, 64, 30, 4, 0], 4
    chosen, keys, _, q = _select(Quest(metadata_type="native"), lengths, 22, Geometry(1, 2, 2, 8, page_size))
    for row, length in enumerate(lengths):
        pages = -(-length // page_size)
        take = min(-(-22 // page_size), pages)
        for head in range(2):
            if not length:
                assert chosen[row][head] == []
                continue
            bounds = _bounds(q[row], keys[row], length, page_size, 1)[head][: pages - 1]
            best = sorted(range(pages - 1), key=lambda page: -bounds[page])[: take - 1]
            assert chosen[row][head] == sorted([*best, pages - 1])


@pytest.mark.parametrize("budget", [1, 4, 5, 0.3, 1.0])
def test_newest_page_is_always_there_and_the_budget_is_kept(budget: int | float) -> None:
    lengths = [33, 48, 1]
    chosen, _, _, _ = _select(Quest(), lengths, budget, Geometry(1, 4, 2, 8, 4))
    for row, length in enumerate(lengths):
        tokens = max(1, math.ceil(budget * length)) if isinstance(budget, float) else min(budget, length)
        for head in range(2):
            assert chosen[row][head][-1] == (length - 1) // 4
            assert len(chosen[row][head]) == min(-(-tokens // 4), -(-length // 4))


def test_softmax_combines_by_mass_max_by_the_largest_sum_by_the_total() -> None:
    # One channel a page: query head 0 is sharp and wants page 0, head 1 is flat and prefers page 1 a little.
    geometry = Geometry(1, 2, 1, 4, 2, torch.float32)
    keys = torch.zeros(1, 8, 1, 4)
    keys[0, 0, 0, 0], keys[0, 2, 0, 1], keys[0, 4, 0, 2] = 1, 1, 1
    q = torch.tensor([[[9.0, 0, 8.5, 0], [-3.0, 4, 3.0, 0]]])
    # Bounds a page, heads 0 and 1: (9, 0), (0, 4), (8.5, 3), newest.
    want = {"max": 0, "sum": 2}
    for reduce, page in want.items():
        selector = Quest(reduce)
        cache = PagedKVCache(geometry, num_rows=1, num_pages=4, selector=selector)
        cache.layers[0].append(keys, keys)
        budget = Budget(torch.tensor([[4]], dtype=torch.int32), 4)
        assert lists(selector.select(q, cache.layers[0], budget)) == [[[page, 3]]]
    # exp(x / 2) over 9, 0, 8.5, 0 and 0, 4, 3, 0: mass .56 + .08, .01 + .54, .43 + .33, hence page 2.
    selector = Quest()
    assert lists(selector.select(q, cache.layers[0], budget)) == [[[2, 3]]]


def test_pages_far_below_the_best_are_still_told_apart() -> None:
    # A sink a few hundred above everything else: in float32 the softmax of all others is 0.
    geometry = Geometry(1, 1, 1, 4, 1, torch.float32)
    cache = PagedKVCache(geometry, num_rows=1, num_pages=6, selector=Quest())
    keys = torch.tensor([900.0, -50.0, -40.0, 10.0, 20.0, 0.0])[None, :, None, None] * torch.tensor([1.0, 0, 0, 0])
    cache.layers[0].append(keys, keys)
    budget = Budget(torch.tensor([[4]], dtype=torch.int32), 4)
    q = torch.tensor([[[1.0, 0, 0, 0]]])
    assert lists(cache.selector.select(q, cache.layers[0], budget)) == [[[0, 3, 4, 5]]]


def test_metadata_one_by_one_equals_at_once_and_follows_truncation() -> None:
    geometry = Geometry(1, 2, 2, 8, 4)
    keys = torch.randn(2, 10, 2, 8).bfloat16()
    caches = [PagedKVCache(geometry, num_rows=2, num_pages=8, selector=Quest(metadata_type="native")) for _ in range(2)]
    caches[0].layers[0].append(keys, keys, [10, 6])
    for step in range(10):
        caches[1].layers[0].append(keys[:, step : step + 1], keys[:, step : step + 1], [1, int(step < 6)])
    for cache in caches:
        cache.truncate(0, 9)
    for name, extreme in (("max", np.max), ("min", np.min)):
        for cache in caches:
            layer = cache.layers[0]
            for row, length in enumerate([9, 6]):
                for page in range(-(-length // 4)):
                    mine = oracles.array(keys[row, page * 4 : min(length, page * 4 + 4)])
                    stored = oracles.array(layer.metadata(name)[int(layer.page_table[row, page])])
                    assert np.array_equal(stored, extreme(mine, axis=0))


def test_nan_stays_in_its_row() -> None:
    geometry = Geometry(1, 2, 2, 8, 4, torch.float32)
    cache, keys, _ = fill(geometry, [20, 20], Quest())
    layer = cache.layers[0]
    q, budget = torch.randn(2, 2, 8), UniformBudget(8).resolve(layer.seq_lens, 2, max_seq_len=20)
    clean = lists(cache.selector.select(q, layer, budget))
    q[0] = torch.nan
    dirty = lists(cache.selector.select(q, layer, budget))
    assert dirty[1] == clean[1]
    assert all(len(set(pages)) == 2 and set(pages) <= set(range(5)) for pages in dirty[0])


def test_int8_metadata_one_by_one_equals_at_once() -> None:
    geometry = Geometry(1, 2, 2, 8, 4)
    keys = torch.randn(2, 10, 2, 8).bfloat16()
    caches = [PagedKVCache(geometry, num_rows=2, num_pages=8, selector=Quest()) for _ in range(2)]
    caches[0].layers[0].append(keys, keys, [10, 6])
    for step in range(10):
        caches[1].layers[0].append(keys[:, step : step + 1], keys[:, step : step + 1], [1, int(step < 6)])
    for name in ("bounds", "bounds_params"):
        first, second = (cache.layers[0].metadata(name)[cache.layers[0].page_table.long()] for cache in caches)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1, :2], second[1, :2])


def test_reads_two_vectors_a_page() -> None:
    assert Quest(metadata_type="native").bytes_per_token(Geometry(1, 4, 2, 128)) == 2 * 128 * 2 / 16
    assert Quest().bytes_per_token(Geometry(1, 4, 2, 128)) == (2 * 128 + 4) / 16


def test_refuses_an_unknown_metadata_type() -> None:
    with pytest.raises(ValueError, match="metadata_type: expected 'int8' or 'native', got 'int4'"):
        Quest(metadata_type="int4")


def test_refuses_an_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="reduce: expected 'softmax', 'sum', 'max', got 'mean'"):
        Quest("mean")
