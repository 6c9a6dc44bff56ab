"""PQCache: codes, scores and the tokens they choose, against loops over numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import check_rows_alone, fill, lists, observed, uneven_steps
from tests.test_kmeans import lloyd
from twilight import Budget, Geometry, NoPruning, PagedKVCache, TwilightAttention, UniformBudget
from twilight_selectors.pqcache import PQCache


def nearest(vector: np.ndarray, centroids: np.ndarray) -> int:
    return int(np.argmin([((vector - centroid) ** 2).sum() for centroid in centroids]))


def ends_of(length: int, budget: int, sinks: int, recent: float) -> set[int]:
    """Return the tokens that are proposed whatever they score."""
    newest = max(1, int((budget - sinks) * recent))
    first = min(sinks, budget - newest)
    return {token for token in range(length) if token < first or token >= length - newest}


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("parts", "bits"), [(2, 3), (4, 2), (1, 4)])
def test_codes_and_selection_by_loops(parts: int, bits: int, group: int) -> None:
    lengths, sinks, rounds, share = [70, 41, 20, 3, 0], 5, 4, 0.4
    selector = PQCache(parts, bits, iterations=rounds, sinks=sinks, recent=0.3)
    cache, keys, _ = observed(Geometry(1, 2 * group, 2, 16, 4, torch.float32), lengths, selector)
    layer = cache.layers[0]
    q = 2 * torch.randn(5, 2 * group, 16)
    given = layer.budget(UniformBudget(share, 12))
    chosen = lists(selector.select(q, layer, given))
    codes = layer.state("codes")
    books = oracles.array(layer.state("codebooks"))
    wide = 16 // parts
    for row, length in enumerate(lengths):
        for head in range(2):
            mine = oracles.array(keys[0][row, :length, head]).reshape(length, parts, wide)
            count = max(0, length - sinks)
            for part in range(parts) if count else ():
                starts = [place * count // 2**bits for place in range(2**bits)]
                want = lloyd(mine[sinks:, part], starts, rounds)
                assert books[row, head, part] == pytest.approx(want, abs=1e-5)
            for token, part in np.ndindex(length, parts):
                assert int(codes[row, head, token, part]) == nearest(mine[token, part], books[row, head, part])

            budget = int(given.tokens[row, head])
            sure = ends_of(length, budget, sinks, 0.3)
            rest = sorted(set(range(length)) - sure)
            total = np.zeros(len(rest))
            for query in oracles.array(q[row, head * group : (head + 1) * group]):
                read = [
                    np.concatenate([books[row, head, part, int(codes[row, head, t, part])] for part in range(parts)])
                    for t in rest
                ]
                if rest:
                    total += oracles.softmax(np.array(read) @ query / 4)
            if count:
                best = sorted(range(len(rest)), key=lambda i: -total[i])[: budget - len(sure)]
                assert set(chosen[row][head]) == sure | {rest[i] for i in best}
            assert len(chosen[row][head]) == budget


def test_a_generated_token_is_coded_by_the_codebooks_of_its_prompt() -> None:
    selector = PQCache(2, 3, sinks=2)
    cache, _, _ = observed(Geometry(1, 2, 2, 16, 4, torch.float32), [40, 17], selector)
    layer = cache.layers[0]
    books = layer.state("codebooks").clone()
    k = torch.randn(3, 2, 2, 16)
    attention = TwilightAttention(selector, NoPruning())
    for step in range(3):
        attention.decode(torch.randn(2, 2, 16), k[step], k[step], layer)
    assert torch.equal(layer.state("codebooks"), books)
    for row, length in enumerate([40, 17]):
        for step, head, part in np.ndindex(3, 2, 2):
            vector = oracles.array(k[step, row, head, 8 * part : 8 * part + 8])
            want = nearest(vector, oracles.array(books[row, head, part]))
            assert int(layer.state("codes")[row, head, length + step, part]) == want


@pytest.mark.parametrize("chunks", [[90], [60, 30], [25, 40, 25], [40, 5, 45]])
def test_a_prompt_in_chunks_ends_as_one(chunks: list[int]) -> None:
    geometry = Geometry(1, 2, 2, 16, 16, torch.bfloat16)
    selector = PQCache(2, 4, sinks=2)
    keys = torch.randn(1, 90, 2, 16).bfloat16()
    whole, parts = (PagedKVCache(geometry, num_rows=1, num_pages=8, selector=selector) for _ in range(2))
    for cache, sizes in ((whole, [90]), (parts, chunks)):
        first = 0
        for size in sizes:
            cache.layers[0].append(*[keys[:, first : first + size]] * 2)
            selector.observe(torch.zeros(1, size, 2, 16).bfloat16(), cache.layers[0])
            first += size
    for spec in selector.state(geometry):
        assert torch.equal(whole.layers[0].state(spec.name), parts.layers[0].state(spec.name))


@pytest.mark.parametrize("steps", uneven_steps(33))
def test_what_a_row_learns_does_not_depend_on_the_others(steps: list[tuple[int, ...]]) -> None:
    check_rows_alone(PQCache(iterations=3), Geometry(1, 4, 2, 16, 16, torch.bfloat16), steps)


def test_exact_codebooks_rank_as_the_keys_do() -> None:
    """Keys of 16 kinds: 16 centroids are the keys themselves, and the estimate is the logit."""
    geometry = Geometry(1, 2, 1, 16, 4, torch.float32)
    selector = PQCache(1, 4, sinks=0, recent=0.0)
    cache = PagedKVCache(geometry, num_rows=1, num_pages=20, selector=selector)
    k = torch.randn(16, 16).repeat(4, 1)[torch.arange(64)][None, :, None]
    k = k.view(1, 4, 16, 1, 16).transpose(1, 2).reshape(1, 64, 1, 16).contiguous()  # each kind four times in a row
    cache.layers[0].append(k, k)
    q = torch.randn(1, 2, 16)
    selector.observe(q.unsqueeze(1).expand(-1, 64, -1, -1), cache.layers[0])
    budget = Budget(torch.tensor([[9]], dtype=torch.int32), 9)
    chosen = lists(selector.select(q, cache.layers[0], budget))[0][0]
    weights = sum(oracles.softmax(oracles.array(k[0, :63, 0]) @ oracles.array(q[0, h]) / 4) for h in range(2))
    best = sorted(range(63), key=lambda t: (-round(weights[t], 9), t))[:8]
    assert chosen == sorted({*best, 63})


def test_without_a_prompt_the_newest_tokens_are_proposed() -> None:
    selector = PQCache(sinks=2)
    cache, _, _ = fill(Geometry(1, 2, 2, 16, 4, torch.float32), [30], selector)
    layer = cache.layers[0]
    chosen = lists(selector.select(torch.randn(1, 2, 16), layer, layer.budget(UniformBudget(10))))
    assert chosen == [[[0, 1, *range(22, 30)]] * 2]


@pytest.mark.parametrize(("tokens", "want"), [(1, [29]), (2, [0, 29]), (3, [0, 1, 29])])
def test_a_budget_smaller_than_the_sinks(tokens: int, want: list[int]) -> None:
    selector = PQCache(sinks=4)
    cache, _, _ = observed(Geometry(1, 2, 2, 16, 4, torch.float32), [30], selector)
    budget = Budget(torch.full((1, 2), tokens, dtype=torch.int32), tokens)
    assert lists(selector.select(torch.randn(1, 2, 16), cache.layers[0], budget)) == [[want] * 2]


def test_bytes_by_hand() -> None:
    assert PQCache().bytes_per_token(Geometry(1, 2, 2, 64)) == 2
    assert PQCache(parts=8).bytes_per_token(Geometry(1, 2, 2, 64)) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits: expected at most 8, got 9"),
        ({"parts": 0}, "parts: expected at least 1, got 0"),
        ({"parts": 3}, "parts: expected a divisor of head_dim=16, got 3"),
        ({"sinks": -1}, "sinks: expected at least 0, got -1"),
        ({"recent": 1.0}, "recent: expected a share from 0 to below 1, got 1.0"),
        ({"reduce": "mean"}, "reduce: expected"),
    ],
)
def test_refuses_parameters_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PQCache(**options).prepare(Geometry(1, 2, 2, 16))
