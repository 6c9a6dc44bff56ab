"""Tactic: clusters, the curve and the mass, against loops over numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import check_rows_alone, fill, lists, observed, uneven_steps
from tests.test_kmeans import lloyd
from twilight import Budget, Geometry, NoPruning, PagedKVCache, TwilightAttention, UniformBudget
from twilight_selectors.tactic import Tactic


def order_of(q: np.ndarray, centroids: np.ndarray, cluster: list[int], tokens: list[int]) -> list[int]:
    """Return the tokens, those of the best cluster first."""
    best = sorted(range(len(centroids)), key=lambda c: -float(centroids[c] @ q))
    return [token for c in best for token in tokens if cluster[token] == c]


def tokens_needed(exact: list[float], mass: float, window: float = 0.0025, narrowest: int = 16) -> int:
    """Return n1 from exp(logit) in order. Reads only the outliers and the two windows."""
    n = len(exact)
    head = math.ceil(0.02 * n)
    width = min(n, max(narrowest, math.ceil(window * n)))
    means = []
    for share in (0.1, 0.6):
        first = max(0, min(int(n * share) - width // 2, n - width))
        means.append(sum(exact[first : first + width]) / width)
    x1, x2 = max(1, 0.1 * n), max(1, 0.6 * n)
    a = (means[0] - means[1]) / max(1e-12, 1 / x1 - 1 / x2)
    b = means[0] - a / x1
    curve = exact[:head] + [max(0.0, a / x + b) for x in range(head + 1, n + 1)]
    total, summed = sum(curve), 0.0
    for x, value in enumerate(curve, 1):
        summed += value
        if summed >= mass * total * (1 - 1e-12):
            return x
    return n


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("windows", [(0.0025, 16), (0.07, 3)])  # as they are; wider ones, each row its own
@pytest.mark.parametrize(("mass", "spread"), [(0.8, 2.5), (0.5, 4.0), (1.0, 1.0)])
def test_by_loops(
    mass: float, spread: float, windows: tuple[float, int], group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("_WINDOW", "_NARROWEST"), windows, strict=True):
        monkeypatch.setattr(f"twilight_selectors.tactic.{name}", value)
    lengths, size, local, rounds = [300, 97, 40, 5, 0], 8, 4, 3
    selector = Tactic(mass, size, rounds, local)
    cache, keys, _ = observed(Geometry(1, 2 * group, 2, 16, 4, torch.float32), lengths, selector)
    layer = cache.layers[0]
    q = spread * torch.randn(5, 2 * group, 16)
    chosen = lists(selector.select(q, layer, layer.budget(UniformBudget(1.0))))
    pruned = 0
    for row, length in enumerate(lengths):
        for head in range(2):
            mine = oracles.array(keys[0][row, :length, head])
            count = -(-length // size)
            assert int(layer.state("clusters")[row, head]) == count
            centroids = oracles.array(layer.state("centroids")[row, head, :count])
            if count:
                starts = [place * length // count for place in range(count)]
                assert centroids == pytest.approx(lloyd(mine, starts, rounds), abs=1e-5)
            cluster = [int(np.argmin([((key - c) ** 2).sum() for c in centroids])) for key in mine]
            assert layer.state("cluster")[row, head, :length].tolist() == cluster
            newest = set(range(max(0, length - local), length))
            want = set(newest)
            for vector in oracles.array(q[row, head * group : (head + 1) * group]):
                order = order_of(vector, centroids, cluster, [t for t in range(length) if t not in newest])
                logits = mine[order] @ vector / 4
                if len(order):
                    want |= set(order[: tokens_needed(np.exp(logits - logits.max()).tolist(), mass, *windows)])
            assert set(chosen[row][head]) == want
            pruned += len(want) < length
    assert pruned >= 2 or mass == 1.0


def _curves(n: int, a: float, b: float, noise: float) -> list[float]:
    rng = np.random.default_rng(0)
    return [(a / x + b) * math.exp(noise * rng.standard_normal()) for x in range(1, n + 1)]


@pytest.mark.parametrize(("a", "b", "mass"), [(5.0, 0.001, 0.9), (1.0, 0.0, 0.7), (2.0, 0.01, 0.5)])
def test_a_curve_of_the_model_is_cut_where_its_mass_is(a: float, b: float, mass: float) -> None:
    """The selector's arithmetic alone: one query head over tokens whose exp(logit) is a/x + b."""
    n = 2000
    exact = _curves(n, a, b, 0.0)
    geometry = Geometry(1, 1, 1, 2, 4, torch.float32, scaling=1.0)
    # Keys on a line, in falling order; each its own cluster, so that the order is the true one.
    k = torch.tensor([[math.log(value), 0.0] for value in exact])[None, :, None]
    selector = Tactic(mass, cluster_size=1, iterations=1, local=1)
    cache = PagedKVCache(geometry, num_rows=1, num_pages=n // 4 + 1, selector=selector)
    last = torch.zeros(1, 1, 1, 2)
    cache.layers[0].append(*[torch.cat([k, last], dim=1)] * 2)
    q = torch.tensor([[[1.0, 0.0]]])
    selector.observe(q[:, None].expand(-1, n + 1, -1, -1), cache.layers[0])
    layer = cache.layers[0]
    tokens = lists(selector.select(q, layer, layer.budget(UniformBudget(1.0))))[0][0][:-1]
    assert tokens == list(range(len(tokens)))
    needed = int((np.cumsum(exact) < mass * sum(exact)).sum()) + 1
    assert len(tokens) == pytest.approx(needed, rel=0.02, abs=2)


def test_most_heads_reach_their_mass() -> None:
    """Clustered keys, eight query heads, three rows: the paper reports 84 to 92 % at 0.9."""
    torch.manual_seed(2)
    centres = 2 * torch.randn(24, 64)
    k = (centres[torch.randint(24, (1, 2000))] + torch.randn(1, 2000, 64)).unsqueeze(2)
    geometry = Geometry(1, 1, 1, 64, 16, torch.float32)
    selector = Tactic(0.9, local=8)
    cache = PagedKVCache(geometry, num_rows=1, num_pages=125, selector=selector)
    layer = cache.layers[0]
    layer.append(k, k)
    selector.observe(torch.zeros(1, 2000, 1, 64), layer)
    reached, read = [], []
    for _ in range(40):
        q = 1.2 * torch.randn(1, 1, 64)
        tokens = lists(selector.select(q, layer, layer.budget(UniformBudget(1.0))))[0][0]
        weights = oracles.softmax(oracles.array(k[0, :, 0]) @ oracles.array(q[0, 0]) / 8)
        reached.append(weights[tokens].sum())
        read.append(len(tokens))
    assert np.mean(reached) > 0.88 and np.mean(np.array(reached) > 0.85) > 0.8
    assert np.mean(read) < 1600


def test_a_union_larger_than_the_budget_loses_its_worst_ranks() -> None:
    selector = Tactic(0.9, 8, 3, local=2)
    cache, keys, _ = observed(Geometry(1, 3, 1, 16, 4, torch.float32), [200], selector)
    layer = cache.layers[0]
    q = torch.randn(1, 3, 16)
    budget = Budget(torch.tensor([[40]], dtype=torch.int32), 40)
    chosen = set(lists(selector.select(q, layer, budget))[0][0])
    centroids = oracles.array(layer.state("centroids")[0, 0, :25])
    cluster = layer.state("cluster")[0, 0].tolist()
    orders = [order_of(vector, centroids, cluster, list(range(198))) for vector in oracles.array(q[0])]
    best = {token: min(order.index(token) for order in orders) for token in range(198)}
    ranked = sorted(best, key=lambda token: (best[token], token))
    assert chosen == {198, 199, *ranked[:38]}
    assert len(chosen) == 40


def test_generated_tokens_join_the_nearest_cluster_and_move_none() -> None:
    selector = Tactic(0.9, 8, 3, local=2)
    cache, _, _ = observed(Geometry(1, 2, 2, 16, 16, torch.float32), [60, 17], selector)
    layer = cache.layers[0]
    before = layer.state("centroids").clone()
    k = torch.randn(10, 2, 2, 16)
    attention = TwilightAttention(selector, NoPruning())
    for step in range(10):
        attention.decode(torch.randn(2, 2, 16), k[step], k[step], layer)
    assert torch.equal(layer.state("centroids")[:, :, : before.shape[2]], before)
    assert layer.state("clusters").tolist() == [[8, 8], [3, 3]]
    for row, (length, count) in enumerate([(60, 8), (17, 3)]):
        for step, head in np.ndindex(10, 2):
            distances = [
                ((oracles.array(k[step, row, head]) - oracles.array(c)) ** 2).sum() for c in before[row, head, :count]
            ]
            assert int(layer.state("cluster")[row, head, length + step]) == int(np.argmin(distances))


@pytest.mark.parametrize("steps", uneven_steps(60))
def test_what_a_row_learns_does_not_depend_on_the_others(steps: list[tuple[int, ...]]) -> None:
    check_rows_alone(Tactic(cluster_size=8, iterations=3), Geometry(1, 4, 2, 16, 16, torch.bfloat16), steps)


def test_without_a_prompt_it_takes_the_newest_tokens() -> None:
    selector = Tactic(0.5, local=2)
    cache, _, _ = fill(Geometry(1, 2, 2, 16, 4, torch.float32), [30, 1, 0], selector)
    layer = cache.layers[0]
    chosen = lists(selector.select(torch.randn(3, 2, 16), layer, layer.budget(UniformBudget(10))))
    assert chosen == [[list(range(20, 30))] * 2, [[0]] * 2, [[]] * 2]


def test_after_a_prompt_too_short_to_cluster_it_takes_the_newest_tokens() -> None:
    """Also where another row of the batch has clusters."""
    selector = Tactic(0.9, 8, 3)
    cache, _, _ = observed(Geometry(1, 2, 2, 16, 16, torch.float32), [54, 64, 150], selector)
    layer, k = cache.layers[0], torch.randn(3, 2, 16)
    assert layer.state("clusters").tolist() == [[0, 0], [0, 0], [19, 19]]
    layer.append(k, k)
    chosen = lists(selector.select(torch.randn(3, 2, 16), layer, layer.budget(UniformBudget(20))))
    assert chosen[:2] == [[list(range(35, 55))] * 2, [list(range(45, 65))] * 2]
    assert all(tokens != list(range(131, 151)) for tokens in chosen[2])


def test_bytes_by_hand() -> None:
    # bf16 keys of 64: 128 / 32 of a centroid, 4 for the cluster, 2.5 % of 128 for each of two query heads.
    assert Tactic().bytes_per_token(Geometry(1, 4, 2, 64)) == pytest.approx(4 + 4 + 0.025 * 128 * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 1.5}, r"p: expected a float in \(0, 1\], got 1.5"),
        ({"cluster_size": 0}, "cluster_size: expected at least 1, got 0"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"local": 0}, "local: expected at least 1, got 0"),
    ],
)
def test_refuses_parameters_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tactic(**options)
