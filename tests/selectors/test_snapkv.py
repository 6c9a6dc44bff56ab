"""SnapKV: scores by loops over the end of the prompt, whole and in chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import lists
from twilight import Geometry, NoPruning, PagedKVCache, TwilightAttention, UniformBudget
from twilight.graph import StaticCache
from twilight_selectors.snapkv import SnapKV

HEADS, DIM, SCALE = 2, 8, 0.9


def scores(queries: np.ndarray, keys: np.ndarray, window: int, kernel: int, pool: str, reduce: str) -> np.ndarray:
    """Return the pooled scores of the tokens before the window. `queries [n, G, d]`, `keys [n, d]` of one kv head."""
    n = len(keys)
    before = max(0, n - window)
    heads = []
    for head in range(queries.shape[1]):
        total = np.zeros(before)
        for t in range(before, n):
            total += oracles.softmax(keys[: t + 1] @ queries[t, head] * SCALE)[:before]
        heads.append(total)
    combined = np.mean(heads, axis=0) if reduce == "mean" else np.max(heads, axis=0)
    half = kernel // 2
    padded = np.concatenate([np.zeros(half), combined, np.zeros(half)])
    around = [padded[i : i + kernel] for i in range(before)]
    return np.array([part.max() if pool == "max" else part.sum() / kernel for part in around])


def keep(score: np.ndarray, length: int, count: int) -> list[int]:
    """Return what is kept of `length` tokens, of which the first have scores."""
    always = list(range(len(score), length))
    best = sorted(range(len(score)), key=lambda i: -score[i])
    return sorted(always[-count:] + best[: max(0, count - len(always))])


def make(selector: SnapKV, lengths: list[int], group: int, chunk: int, extra: int = 40):
    """Return a cache with prompts of these lengths in it, and the keys and queries of `extra` tokens more."""
    geometry = Geometry(1, HEADS * group, HEADS, DIM, 4, torch.float32, scaling=SCALE)
    longest = max(lengths)
    cache = PagedKVCache(geometry, num_rows=len(lengths), num_pages=1, selector=selector, growable=True)
    keys = 2 * torch.randn(len(lengths), longest + extra, HEADS, DIM)
    queries = torch.randn(len(lengths), longest + extra, HEADS * group, DIM)
    for start in range(0, longest, chunk):
        feed(cache, keys, queries, [start] * len(lengths), [max(0, min(chunk, n - start)) for n in lengths])
    return cache, keys, queries


def feed(cache: PagedKVCache, keys: torch.Tensor, queries: torch.Tensor, starts: list[int], counts: list[int]) -> None:
    """Append and observe tokens `starts[i]` to `starts[i] + counts[i]` of each row; what is not real is NaN."""
    k = torch.full((len(counts), max(1, *counts), *keys.shape[2:]), torch.nan)
    q = torch.full((len(counts), max(1, *counts), *queries.shape[2:]), torch.nan)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        k[row, :count], q[row, :count] = keys[row, start : start + count], queries[row, start : start + count]
    cache.layers[0].append(k, k, counts)
    cache.selector.observe(q, cache.layers[0])


def chosen(cache: PagedKVCache, budget: int | float) -> list[list[list[int]]]:
    layer = cache.layers[0]
    given = UniformBudget(budget, 1).resolve(layer.seq_lens, HEADS, max_seq_len=layer.max_seq_len)
    q = torch.randn(cache.num_rows, layer.geometry.num_q_heads, DIM)
    return lists(cache.selector.select(q, layer, given))


def of(queries: torch.Tensor, row: int, head: int) -> np.ndarray:
    return oracles.array(queries[row]).reshape(queries.shape[1], HEADS, -1, DIM)[:, head]


@pytest.mark.parametrize(("pool", "kernel"), [("max", 7), ("avg", 5), ("avg", 1), ("max", 3)])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(("group", "chunk"), [(1, 50), (3, 50), (2, 1), (2, 3), (2, 11)])
def test_scores_by_loops_however_the_prompt_is_cut(pool: str, kernel: int, reduce: str, group: int, chunk: int) -> None:
    lengths, window = [41, 9, 6, 1, 0], 6
    selector = SnapKV(window, kernel, pool, reduce)
    cache, keys, queries = make(selector, lengths, group, chunk)
    score = cache.layers[0].state("score")
    kept = {budget: chosen(cache, budget) for budget in (3, 6, 15)}
    for row, length in enumerate(lengths):
        for head in range(HEADS):
            wanted = scores(
                of(queries, row, head)[:length], oracles.array(keys[row, :length, head]), window, kernel, pool, reduce
            )
            mine = score[row, head]
            np.testing.assert_allclose(mine[: len(wanted)].numpy(), wanted, atol=1e-5)
            assert (mine[len(wanted) : length] == -2).all() and (mine[length:] == -1).all()
            for budget, lists_ in kept.items():
                assert lists_[row][head] == keep(mine[: len(wanted)].double().numpy(), length, min(budget, length))
                newest = range(max(0, length - min(window, budget)), length)
                assert set(newest) <= set(lists_[row][head])


@pytest.mark.parametrize("static", [False, True])
def test_decoding_changes_no_score_and_the_prompts_part_only_shrinks(static: bool) -> None:
    selector = SnapKV(4, 3)
    cache, keys, queries = make(selector, [30, 13], 2, 50)
    layer = cache.layers[0]
    before = layer.state("score").clone()
    if static:
        held = StaticCache(cache, 60)
        held.set_active([0, 1])
        layer = held.layers[0]
    attention = TwilightAttention(selector, NoPruning(), 12)
    select, seen = selector.select, []
    selector.select = lambda q, layer, budget: seen.append(select(q, layer, budget)) or seen[-1]  # type: ignore
    for step in range(10):
        k = torch.stack([keys[0, 30 + step], keys[1, 13 + step]])
        q = torch.stack([queries[0, 30 + step], queries[1, 13 + step]])
        attention.decode(q, k, k, layer)
    after = layer.state("score")
    assert torch.equal(after[:, :, :30], before) and (after[:, :, 30:] == -1).all()
    for row, prompt in enumerate((30, 13)):
        for head in range(HEADS):
            score = before[row, head, : prompt - 4].double().numpy()
            earlier = set(range(prompt))
            for step, selection in enumerate(seen):
                mine = lists(selection)[row][head]
                assert mine == keep(score, prompt + step + 1, 12)
                left = {token for token in mine if token < prompt}
                assert left <= earlier
                earlier = left


def test_a_second_prompt_scores_by_its_own_end() -> None:
    selector = SnapKV(5, 3)
    cache, keys, queries = make(selector, [20], 2, 50)
    layer = cache.layers[0]
    attention = TwilightAttention(selector, NoPruning(), 12)
    for t in range(20, 23):
        attention.decode(queries[:, t], keys[:, t], keys[:, t], layer)
    feed(cache, keys, queries, [23], [2])
    # Two new queries and the first prompt's last three observe; generated tokens among them are kept.
    score = layer.state("score")
    for head in range(HEADS):
        q, k = of(queries, 0, head), oracles.array(keys[0, :, head])
        total = np.zeros(17)
        for t in (17, 18, 19, 23, 24):
            total += np.mean([oracles.softmax(k[: t + 1] @ q[t, g] * SCALE)[:17] for g in range(2)], axis=0)
        padded = np.concatenate([[0], total, [0]])
        np.testing.assert_allclose(score[0, head, :17], [padded[i : i + 3].max() for i in range(17)], atol=1e-5)
        assert score[0, head, 17:].tolist() == [-2] * 3 + [-1] * 3 + [-2] * 2


def test_queries_of_tokens_that_were_cut_off_no_longer_observe() -> None:
    # Speculation: five tokens a step, of which one is accepted, again and again.
    selector = SnapKV(6, 1)
    cache, keys, queries = make(selector, [20], 1, 50)
    length = 20
    for _ in range(6):
        wrong = 100 * torch.randn_like(queries)
        wrong[:, length] = queries[:, length]
        feed(cache, keys, wrong, [length], [5])
        length += 1
        cache.truncate(0, length)
    feed(cache, keys, queries, [length], [2])
    length += 2
    for head in range(HEADS):
        wanted = scores(of(queries, 0, head)[:length], oracles.array(keys[0, :length, head]), 6, 1, "max", "mean")
        np.testing.assert_allclose(cache.layers[0].state("score")[0, head, : length - 6], wanted, atol=1e-5)
    # A generated token in the place of one that was cut off: the query that stood there is not its own.
    cache.truncate(0, 20)
    attention = TwilightAttention(selector, NoPruning(), 12)
    attention.decode(queries[:, 20], keys[:, 20], keys[:, 20], cache.layers[0])
    attention.decode(queries[:, 21], keys[:, 21], keys[:, 21], cache.layers[0])
    feed(cache, keys, queries, [22], [2])
    assert cache.layers[0].state("score")[0, 0, 20:24].tolist() == [-1, -1, -2, -2]
    assert cache.layers[0].state("places")[0, 0].tolist()[-2:] == [22, 23]
    assert not {20, 21} & set(cache.layers[0].state("places")[0, 0].tolist())


def test_rows_take_their_scores_and_queries_along() -> None:
    selector = SnapKV(5, 3)
    cache, keys, queries = make(selector, [20, 31], 2, 50)
    cache.select_rows([1, 0, 1])
    order = [1, 0, 1]
    feed(cache, keys[order], queries[order], [31, 20, 31], [2, 0, 3])
    for row, (source, length) in enumerate(zip(order, [33, 20, 34], strict=True)):
        wanted = scores(of(queries, source, 0)[:length], oracles.array(keys[source, :length, 0]), 5, 3, "max", "mean")
        np.testing.assert_allclose(cache.layers[0].state("score")[row, 0, : length - 5], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"kernel": 4}, "kernel: expected an odd number, got 4"),
        ({"pool": "mean"}, "pool: expected 'max' or 'avg', got 'mean'"),
        ({"reduce": "sum"}, "reduce: expected 'mean' or 'max', got 'sum'"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapKV(**options)


def test_bytes_are_those_of_the_scores() -> None:
    assert SnapKV().bytes_per_token(Geometry(1, 8, 2, 64)) == 4


def test_rows_that_are_all_empty() -> None:
    cache = PagedKVCache(Geometry(1, 2, HEADS, DIM, 4, torch.float32), num_rows=2, num_pages=2, selector=SnapKV())
    layer = cache.layers[0]
    layer.append(torch.zeros(2, 3, HEADS, DIM), torch.zeros(2, 3, HEADS, DIM), [0, 0])
    cache.selector.observe(torch.zeros(2, 3, 2, DIM), layer)
    assert chosen(cache, 5) == [[[], []]] * 2
