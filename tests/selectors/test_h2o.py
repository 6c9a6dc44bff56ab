"""H2O: a cache that really evicts, step by step, and the marks that stand for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import Geometry, NoPruning, PagedKVCache, TopP, TwilightAttention, UniformBudget
from twilight.graph import StaticCache
from twilight_selectors.h2o import H2O

SCALE = 0.8


class Evicting:
    """One kv head of the real thing: keys, values and scores of what is left, in order."""

    def __init__(self, heavy: int, recent: int, normalise: bool = False) -> None:
        self.heavy, self.recent, self.normalise = heavy, recent, normalise
        self.places: list[int] = []
        self.keys: list[np.ndarray] = []
        self.mass: list[float] = []
        self.length = 0

    def _see(self, queries: np.ndarray, count: int) -> None:
        for q in queries:  # of the group
            weights = oracles.softmax(np.array(self.keys[:count]) @ q * SCALE)
            for i, weight in enumerate(weights):
                self.mass[i] += weight

    def _add(self, key: np.ndarray) -> None:
        self.places.append(self.length)
        self.keys.append(key)
        self.mass.append(0.0)
        self.length += 1

    def prompt(self, queries: np.ndarray, keys: np.ndarray) -> None:
        for t, key in enumerate(keys):
            self._add(key)
            self._see(queries[t], len(self.keys))
        self.evict()

    def step(self, queries: np.ndarray, key: np.ndarray) -> list[int]:
        """Attend, then evict; return what was attended to."""
        self._add(key)
        attended = list(self.places)
        self._see(queries, len(self.keys))
        self.evict()
        return attended

    def evict(self) -> None:
        n = len(self.keys)
        if n <= self.heavy + self.recent:
            return
        old = range(n - self.recent)

        def score(i: int) -> float:
            return self.mass[i] / (self.length - self.places[i]) if self.normalise else self.mass[i]

        best = sorted(sorted(old, key=lambda i: -score(i))[: self.heavy])
        left = best + list(range(n - self.recent, n))
        self.places, self.keys, self.mass = ([part[i] for i in left] for part in (self.places, self.keys, self.mass))


def run(selector: H2O, heavy: int, recent: int, lengths: list[int], steps: int, group: int, chunk: int, static: bool):
    """Decode with budget heavy + recent + 1, and compare what is attended to with `Evicting` at every step."""
    heads = 2
    geometry = Geometry(1, heads * group, heads, 8, 4, torch.float32, scaling=SCALE)
    rows, longest = len(lengths), max(lengths)
    keys = 2 * torch.randn(rows, longest + steps, heads, 8)
    queries = torch.randn(rows, longest + steps, heads * group, 8)
    cache = PagedKVCache(geometry, num_rows=rows, num_pages=rows * (longest + steps), selector=selector)
    layer = cache.layers[0]
    models = [[Evicting(heavy, recent, selector.normalise) for _ in range(heads)] for _ in lengths]
    for start in range(0, longest, chunk):
        counts = [max(0, min(chunk, length - start)) for length in lengths]
        part = slice(start, start + chunk)
        k = keys[:, part].clone()
        q = queries[:, part].clone()
        for row, count in enumerate(counts):
            k[row, count:], q[row, count:] = torch.nan, torch.nan
        layer.append(k, k, counts)
        selector.observe(q, layer)
    split = [oracles.array(q).reshape(-1, heads, group, 8) for q in queries]
    for row, length in enumerate(lengths):
        for head in range(heads):
            models[row][head].prompt(split[row][:length, head], oracles.array(keys[row, :length, head]))
    if static:
        held = StaticCache(cache, longest + steps)
        held.set_active(range(rows))
        layer = held.layers[0]
    attention = TwilightAttention(selector, NoPruning(), heavy + recent + 1)
    seen = []
    selector_select = selector.select
    selector.select = lambda q, layer, budget: seen.append(selector_select(q, layer, budget)) or seen[-1]  # type: ignore
    for step in range(steps):
        at = [length + step for length in lengths]
        k = torch.stack([keys[row, t] for row, t in enumerate(at)])
        q = torch.stack([queries[row, t] for row, t in enumerate(at)])
        attention.decode(q, k, k, layer)
        chosen = lists(seen[-1])
        for row, t in enumerate(at):
            for head in range(heads):
                wanted = models[row][head].step(split[row][t, head], oracles.array(keys[row, t, head]))
                assert chosen[row][head] == wanted, (step, row, head)
                mine = layer.state("mass")[row, head, : t + 1]
                assert mine[models[row][head].places].tolist() == pytest.approx(models[row][head].mass, abs=1e-4)
                assert (mine[[i for i in range(t) if i not in wanted]] == -torch.inf).all()
    del selector.select


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("heavy", "recent"), [(4, 3), (0, 5), (7, 0), (1, 30)])
@pytest.mark.parametrize(("group", "chunk"), [(1, 50), (3, 7)])
def test_marks_are_what_real_eviction_leaves(heavy: int, recent: int, group: int, chunk: int, static: bool) -> None:
    selector = H2O(heavy=(heavy + 0.5) / (heavy + recent + 1))
    run(selector, heavy, recent, [23, 9, 1], 14, group, chunk, static)


def test_normalised_by_the_queries_that_saw_a_token() -> None:
    run(H2O(heavy=4.5 / 8, normalise=True), 4, 3, [23, 9, 2], 12, 2, 50, False)


def test_by_hand() -> None:
    # A scale of 0 weighs everything equally: after a prompt of 5, token i has 1/5 + ... + 1/(i+1).
    geometry = Geometry(1, 1, 1, 8, 4, torch.float32, scaling=0.0)
    selector = H2O(0.5)
    cache, keys, _ = fill(geometry, [5], selector)
    layer = cache.layers[0]
    selector.observe(torch.randn(1, 5, 1, 8), layer)
    wanted = [sum(1 / n for n in range(i, 6)) for i in range(1, 6)]
    assert layer.state("mass").flatten().tolist() == pytest.approx(wanted)
    attention = TwilightAttention(selector, NoPruning(), 4)
    k = torch.randn(1, 1, 8)
    attention.decode(k, k, k, layer)
    # Of 6 tokens the 2 heaviest and the 2 newest, each of which weighs a quarter.
    inf = float("inf")
    wanted = [wanted[0] + 1 / 4, wanted[1] + 1 / 4, -inf, -inf, wanted[4] + 1 / 4, 1 / 4]
    assert layer.state("mass").flatten().tolist() == pytest.approx(wanted)


def test_what_a_pruner_drops_gains_nothing() -> None:
    geometry = Geometry(1, 2, 1, 8, 4, torch.float32)
    selector = H2O(0.5)
    cache, _, _ = fill(geometry, [30], selector)
    layer = cache.layers[0]
    attention = TwilightAttention(selector, TopP(0.3), 20, collect_stats=True)
    k = torch.randn(1, 1, 8)
    attention.decode(3 * torch.randn(1, 2, 8), k, k, layer)
    gained = (layer.state("mass") > 0).sum()
    assert 0 < int(gained) == int(attention.stats.records[0].b1_group) < 20
    assert float(layer.state("mass").clamp(min=0).sum()) == pytest.approx(2, abs=1e-5)


def test_a_fork_goes_its_own_way_and_a_cut_off_token_comes_back_unmarked() -> None:
    geometry = Geometry(1, 2, 1, 8, 4, torch.float32)
    selector = H2O(0.5)
    cache = PagedKVCache(geometry, num_rows=2, num_pages=40, selector=selector)
    layer = cache.layers[0]
    k = torch.randn(2, 12, 1, 8)
    layer.append(k, k, [12, 0])
    selector.observe(torch.randn(2, 12, 2, 8), layer)
    cache.fork(0, 1)
    attention = TwilightAttention(selector, NoPruning(), 6)
    for _ in range(3):
        attention.decode(2 * torch.randn(2, 2, 8), 2 * torch.randn(2, 1, 8), torch.randn(2, 1, 8), layer)
    mine, other = layer.state("mass")
    assert not torch.equal(mine, other)
    assert (mine > -torch.inf).sum() == (other > -torch.inf).sum() == 6
    cache.truncate(0, 3)
    layer.append(k[:, :4], k[:, :4], [4, 0])
    chosen = lists(
        selector.select(torch.randn(2, 2, 8), layer, UniformBudget(7).resolve(layer.seq_lens, 1, max_seq_len=15))
    )
    assert chosen[0][0][-4:] == [3, 4, 5, 6]
    assert all(mine[0, token] > -torch.inf for token in chosen[0][0][:-4])


def test_what_was_dropped_stays_dropped_even_where_the_window_comes_back_to_it() -> None:
    selector = H2O(0.0)
    cache, _, _ = fill(Geometry(1, 2, 1, 8, 4, torch.float32), [15], selector)
    layer = cache.layers[0]
    k = torch.randn(1, 1, 8)
    TwilightAttention(selector, NoPruning(), 6).decode(torch.randn(1, 2, 8), k, k, layer)
    cache.truncate(0, 12)
    layer.append(k, k)
    budget = UniformBudget(6).resolve(layer.seq_lens, 1, max_seq_len=13)
    assert lists(selector.select(torch.randn(1, 2, 8), layer, budget)) == [[[10, 11, 12]]]


def test_normalised_by_hand() -> None:
    selector = H2O(0.5, normalise=True)
    cache, _, _ = fill(Geometry(1, 1, 1, 8, 4, torch.float32), [5], selector)
    layer = cache.layers[0]
    # Seen by 5, 4, ... queries: the second token has gathered more from each.
    layer.update_state("mass", torch.tensor([[[2.5, 2.04, 0.1, 0.1, 0.1]]]))
    layer.append(torch.randn(1, 1, 8), torch.randn(1, 1, 8))
    budget = UniformBudget(2).resolve(layer.seq_lens, 1, max_seq_len=6)
    assert lists(selector.select(torch.randn(1, 1, 8), layer, budget)) == [[[1, 5]]]


@pytest.mark.parametrize("budget", [1, 5, 0.3, 1.0])
def test_budget_is_met_and_the_newest_is_in(budget: int | float) -> None:
    lengths = [37, 6, 1, 0]
    cache, _, _ = fill(Geometry(1, 4, 2, 8, 4), lengths, H2O(1.0))
    layer = cache.layers[0]
    given = UniformBudget(budget, 1).resolve(layer.seq_lens, 2, max_seq_len=37)
    chosen = lists(layer.selector.select(torch.randn(4, 4, 8), layer, given))
    for row, length in enumerate(lengths):
        for head in range(2):
            assert len(chosen[row][head]) == int(given.tokens[row, head]) == len(set(chosen[row][head]))
            assert not length or chosen[row][head][-1] == length - 1


def test_bytes_and_refusals() -> None:
    assert H2O().bytes_per_token(Geometry(1, 8, 2, 64)) == 8  # 4 bytes read and written
    with pytest.raises(ValueError, match=r"heavy: expected a share from 0 to 1, got 1.5"):
        H2O(1.5)
