"""Block means: the mean, the pages that go with it, and metadata that follows the cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import Budget, Geometry, PagedKVCache, UniformBudget
from twilight_selectors.block_mean import BlockMean


def _keys(pages: list[list[list[float]]]) -> torch.Tensor:
    """Return `[1, n, 1, d]` keys, a page after the other."""
    return torch.tensor(pages).flatten(0, 1)[None, :, None]


def test_worked_example() -> None:
    # Means (1, 1), (2, -1), (0, 0), newest: the second goes best with (1, -1), though the first holds the best key.
    keys = _keys([[[8.0, 0], [-6, 2]], [[2, -2], [2, 0]], [[1, 1], [-1, -1]], [[0, 0], [0, 0]]])
    selector = BlockMean(metadata_type="native")
    cache = PagedKVCache(Geometry(1, 1, 1, 2, 2, torch.float32), num_rows=1, num_pages=4, selector=selector)
    cache.layers[0].append(keys, keys)
    assert cache.layers[0].metadata("mean")[cache.table.rows[0], 0].tolist() == [[1, 1], [2, -1], [0, 0], [0, 0]]
    q = torch.tensor([[[1.0, -1]]])
    for pages, expected in ((1, [3]), (2, [1, 3]), (4, [0, 1, 2, 3])):
        budget = Budget(torch.tensor([[2 * pages]], dtype=torch.int32), 2 * pages)
        assert lists(selector.select(q, cache.layers[0], budget)) == [[expected]]


@pytest.mark.parametrize("kind", ["int8", "native"])
@pytest.mark.parametrize("group", [1, 3])
def test_proposes_the_pages_with_the_most_mass_of_the_means_and_the_newest(kind: str, group: int) -> None:
    lengths, page_size, budget = [61, 64, 30, 4, 0], 4, 22
    geometry = Geometry(1, 2 * group, 2, 8, page_size, torch.float32)
    selector = BlockMean(metadata_type=kind)
    cache, keys, _ = fill(geometry, lengths, selector)
    layer = cache.layers[0]
    q = 2 * torch.randn(5, 2 * group, 8)
    given = UniformBudget(budget, 1).resolve(layer.seq_lens, 2, max_seq_len=64)
    chosen = lists(selector.select(q, layer, given))
    for row, length in enumerate(lengths):
        pages = -(-length // page_size)
        take = min(-(-budget // page_size), pages)
        for head in range(2):
            if not length:
                assert chosen[row][head] == []
                continue
            means = []
            for page in range(pages):
                mean = oracles.mean(keys[0][row, page * page_size : min(length, (page + 1) * page_size), head].numpy())
                means.append(oracles.dequantize(mean, 8) if kind == "int8" else mean.astype(np.float64))
            total = np.zeros(pages)
            for query in range(head * group, (head + 1) * group):
                total += oracles.softmax(np.array(means) @ oracles.array(q[row, query]) / math.sqrt(8))
            best = sorted(range(pages - 1), key=lambda page: -total[page])[: take - 1]
            assert chosen[row][head] == sorted([*best, pages - 1])


@pytest.mark.parametrize("budget", [1, 4, 5, 0.3, 1.0])
def test_newest_page_is_always_there_and_the_budget_is_kept(budget: int | float) -> None:
    lengths = [33, 48, 1]
    cache, _, _ = fill(Geometry(1, 4, 2, 8, 4), lengths, BlockMean())
    layer = cache.layers[0]
    q = torch.randn(3, 4, 8).bfloat16()
    given = UniformBudget(budget, 1).resolve(layer.seq_lens, 2, max_seq_len=48)
    for row, (length, heads) in enumerate(zip(lengths, lists(cache.selector.select(q, layer, given)), strict=True)):
        tokens = max(1, math.ceil(budget * length)) if isinstance(budget, float) else min(budget, length)
        for pages in heads:
            assert pages[-1] == (lengths[row] - 1) // 4
            assert len(pages) == min(-(-tokens // 4), -(-length // 4))


@pytest.mark.parametrize(("reduce", "page"), [("max", 0), ("sum", 2), ("softmax", 2)])
def test_query_heads_are_combined_as_asked(reduce: str, page: int) -> None:
    # Scores a page, heads 0 and 1: (9, 0), (0, 4), (8.5, 3), newest. exp(x / 2) shared out over pages: .56 + .07,
    # .01 + .53, .43 + .32.
    keys = _keys([[[2.0, 0, 0, 0], [0, 0, 0, 0]], [[0, 2, 0, 0], [0] * 4], [[0, 0, 2, 0], [0] * 4], [[0] * 4] * 2])
    q = torch.tensor([[[9.0, 0, 8.5, 0], [0, 4, 3.0, 0]]])
    selector = BlockMean(reduce)
    cache = PagedKVCache(Geometry(1, 2, 1, 4, 2, torch.float32), num_rows=1, num_pages=4, selector=selector)
    cache.layers[0].append(keys, keys)
    budget = Budget(torch.tensor([[4]], dtype=torch.int32), 4)
    assert lists(selector.select(q, cache.layers[0], budget)) == [[[page, 3]]]


@pytest.mark.parametrize("kind", ["int8", "native"])
def test_metadata_one_by_one_equals_at_once_and_follows_truncation(kind: str) -> None:
    geometry = Geometry(1, 2, 2, 8, 4)
    keys = (torch.randn(2, 10, 2, 8) * 10 ** torch.empty(2, 10, 1, 1).uniform_(-2, 2)).bfloat16()
    caches = [PagedKVCache(geometry, num_rows=2, num_pages=8, selector=BlockMean(metadata_type=kind)) for _ in range(2)]
    caches[0].layers[0].append(keys, keys, [10, 6])
    for step in range(10):
        caches[1].layers[0].append(keys[:, step : step + 1], keys[:, step : step + 1], [1, int(step < 6)])
    for cache in caches:
        cache.truncate(0, 9)
    for cache in caches:
        layer = cache.layers[0]
        for row, length in enumerate([9, 6]):
            for page in range(-(-length // 4)):
                where = int(layer.page_table[row, page])
                for head in range(2):
                    mean = oracles.mean(keys[row, page * 4 : min(length, page * 4 + 4), head].float().numpy())
                    if kind == "native":
                        assert torch.equal(layer.metadata("mean")[where, head], torch.tensor(mean).bfloat16())
                    else:
                        codes, scale, zero = oracles.quantize(mean, 8)
                        assert layer.metadata("mean")[where, head].tolist() == codes
                        assert layer.metadata("mean_params")[where, head].tolist() == [scale, zero]


def test_nan_stays_in_its_row() -> None:
    cache, _, _ = fill(Geometry(1, 2, 2, 8, 4, torch.float32), [20, 20], BlockMean())
    layer = cache.layers[0]
    q, budget = torch.randn(2, 2, 8), UniformBudget(8).resolve(layer.seq_lens, 2, max_seq_len=20)
    clean = lists(cache.selector.select(q, layer, budget))
    q[0] = torch.nan
    assert lists(cache.selector.select(q, layer, budget))[1] == clean[1]


def test_reads_one_vector_a_page() -> None:
    assert BlockMean(metadata_type="native").bytes_per_token(Geometry(1, 4, 2, 128)) == 128 * 2 / 16
    assert BlockMean().bytes_per_token(Geometry(1, 4, 2, 128)) == (128 + 4) / 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata_type": "int4"}, "metadata_type: expected 'int8' or 'native', got 'int4'"),
        ({"reduce": "mean"}, "reduce: expected 'softmax', 'sum', 'max', got 'mean'"),
    ],
)
def test_refuses_unknown_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMean(**options)
