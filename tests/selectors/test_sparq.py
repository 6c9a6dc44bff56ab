"""SparQ: scores, reallocation and the mean of the values, by loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import Geometry, NoPruning, PagedKVCache, TopP, TwilightAttention, UniformBudget
from twilight.graph import StaticCache
from twilight_selectors.sparq import SparQ

SCALE = 0.6


def one_head(
    q: np.ndarray, keys: np.ndarray, channels: int, local: int, count: int, reduce: str
) -> tuple[list[int], list[float]]:
    """Return the tokens, and alpha of each query head. `q [G, d]`, `keys [n, d]`."""
    n = len(keys)
    size = np.abs(q).sum(0)
    largest = sorted(range(len(size)), key=lambda c: -size[c])[:channels]
    s = []
    for head in q:
        share = np.abs(head[largest]).sum() / np.abs(head).sum()
        s.append([sum(head[c] * key[c] for c in largest) * SCALE / math.sqrt(share) for key in keys])
    weights = [oracles.softmax(np.array(row)) for row in s]
    total = {"softmax": sum(weights), "sum": np.sum(s, axis=0), "max": np.max(s, axis=0)}[reduce]
    order = sorted(range(n), key=lambda i: (i < n - 1 - local, -i if i >= n - 1 - local else -total[i]))
    taken = sorted(order[: min(count, n)])
    return taken, [float(row[taken].sum()) for row in weights]


@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
@pytest.mark.parametrize(("channels", "local", "count"), [(3, 4, 9), (16, 0, 5), (1, 30, 8), (5, 2, 100)])
def test_selects_by_loops(reduce: str, channels: int, local: int, count: int) -> None:
    lengths, group = [41, 9, 1, 0], 3
    selector = SparQ(channels, local, False, reduce)
    cache, keys, _ = fill(Geometry(1, 2 * group, 2, 16, 4, torch.float32, scaling=SCALE), lengths, selector)
    layer = cache.layers[0]
    q = 2 * torch.randn(4, 2 * group, 16)
    chosen = lists(selector.select(q, layer, UniformBudget(count).resolve(layer.seq_lens, 2, max_seq_len=41)))
    for row, length in enumerate(lengths):
        for head in range(2):
            if length:
                k = oracles.array(keys[0][row, :length, head])
                mine = oracles.array(q[row, group * head : group * (head + 1)])
                assert chosen[row][head] == one_head(mine, k, channels, local, count, reduce)[0]
            else:
                assert chosen[row][head] == []


def test_worked_by_hand() -> None:
    # |q| = 4 and 2 and 1 and 1: two channels hold 6 of 8, so that scores are divided by sqrt(d * 3/4) = sqrt(3).
    selector = SparQ(channels=2, local=0)
    cache = PagedKVCache(Geometry(1, 1, 1, 4, 4, torch.float32), num_rows=1, num_pages=1, selector=selector)
    layer = cache.layers[0]
    keys = torch.tensor([[1, 0, 9, 9], [0, 1, 9, -9], [-1, 0, 0, 0], [0, 0, 5, 5]]).float()
    values = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).float()
    q = torch.tensor([[[4, -2, 1, 1]]]).float()
    layer.append(keys[None, :3, None], values[None, :3, None])
    selector.observe(torch.zeros(1, 3, 1, 4), layer)
    out, lse = TwilightAttention(selector, NoPruning(), 2).decode(q, keys[3, None, None], values[3, None, None], layer)
    s = np.array([4, -2, -4, 0]) / math.sqrt(3)
    alpha = (math.exp(s[0]) + math.exp(s[3])) / sum(map(math.exp, s))
    z = np.array([4 + 9 + 9, 5 + 5]) / 2  # the true logits of tokens 0 and 3
    share = 1 / (1 + math.exp(z[1] - z[0]))
    wanted = (1 - alpha) / 4 * np.ones(4) + alpha * np.array([share, 0, 0, 1 - share])
    assert out.flatten().tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
    assert float(lse) == pytest.approx(np.logaddexp(*z) - math.log(alpha), abs=1e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pruner", [NoPruning(), TopP(0.7)])
@pytest.mark.parametrize("chunk", [400, 37])
def test_the_mean_value_takes_what_was_not_proposed(static: bool, pruner: object, chunk: int) -> None:
    lengths, group, steps = [300, 127, 0], 2, 4
    geometry = Geometry(1, 2 * group, 2, 8, 4, torch.float32, scaling=SCALE)
    selector = SparQ(3, 5)
    plain = SparQ(3, 5, mean_value=False)
    k, v = torch.randn(2, 3, 310, 2, 8) + 1.5
    caches = []
    for one in (selector, plain):
        cache = PagedKVCache(geometry, num_rows=3, num_pages=300, selector=one)
        for start in range(0, 300, chunk):
            counts = [max(0, min(chunk, n - start)) for n in lengths]
            part = slice(start, start + max(counts))
            cache.layers[0].append(k[:, part], v[:, part], counts)
            one.observe(torch.full((3, max(counts), 2 * group, 8), torch.nan), cache.layers[0])
        caches.append(cache)
    layers = [cache.layers[0] for cache in caches]
    if static:
        held = StaticCache(caches[0], 310)
        held.set_active(range(3))
        layers[0] = held.layers[0]
    for step in range(steps):
        at = [n + step for n in lengths]
        q = torch.randn(3, 2 * group, 8)
        new = [torch.stack([part[row, t] for row, t in enumerate(at)]) for part in (k, v)]
        out, lse = TwilightAttention(selector, pruner, 20).decode(q, *new, layers[0])
        bare, bare_lse = TwilightAttention(plain, pruner, 20).decode(q, *new, layers[1])
        for row, t in enumerate(at):
            for head in range(2):
                mine = slice(group * head, group * (head + 1))
                keys = oracles.array(k[row, : t + 1, head])
                alphas = one_head(oracles.array(q[row, mine]), keys, 3, 5, 20, "softmax")[1]
                mean = oracles.array(v[row, : t + 1, head]).mean(0)
                for i, alpha in enumerate(alphas):
                    place = group * head + i
                    wanted = alpha * oracles.array(bare[row, place]) + (1 - alpha) * mean
                    assert out[row, place].tolist() == pytest.approx(wanted.tolist(), abs=2e-5)
                    wanted_lse = float(bare_lse[row, place]) - math.log(alpha)
                    assert float(lse[row, place]) == pytest.approx(wanted_lse, abs=1e-4)


def test_the_mean_follows_forks_and_tokens_that_are_cut_off() -> None:
    geometry = Geometry(1, 1, 1, 8, 4, torch.float32)
    selector = SparQ(3)
    cache = PagedKVCache(geometry, num_rows=2, num_pages=300, selector=selector)
    layer = cache.layers[0]
    v = torch.randn(2, 600, 1, 8)

    def add(start: int, stop: int, counts: list[int]) -> None:
        layer.append(v[:, start:stop], v[:, start:stop], counts)
        selector.observe(torch.zeros(2, stop - start, 1, 8), layer)

    def means() -> list[torch.Tensor]:
        sums = layer.state("value_sums").sum(2)[:, 0]
        return list(sums[:, :-1] / sums[:, -1:])

    add(0, 100, [100, 0])
    add(100, 280, [180, 0])
    torch.testing.assert_close(means()[0], v[0, :280].mean(0)[0])
    cache.fork(0, 1)
    add(280, 300, [20, 3])
    cache.truncate(0, 150)
    add(400, 410, [10, 0])
    torch.testing.assert_close(means()[0], torch.cat([v[0, :150], v[0, 400:410]]).mean(0)[0])
    torch.testing.assert_close(means()[1], torch.cat([v[0, :280], v[1, 280:283]]).mean(0)[0])


def test_nan_stays_in_its_row_and_zero_queries_are_finite() -> None:
    selector = SparQ(3)
    cache, _, _ = fill(Geometry(1, 2, 1, 8, 4, torch.float32), [30, 30], selector)
    layer = cache.layers[0]
    attention = TwilightAttention(selector, NoPruning(), 5)
    k = torch.randn(2, 1, 8)
    out, lse = attention.decode(torch.zeros(2, 2, 8), k, k, layer)
    assert out.isfinite().all() and lse.isfinite().all()
    q = torch.randn(2, 2, 8)
    q[1] = torch.nan
    out, lse = attention.decode(q, k, k, layer)
    assert out[0].isfinite().all() and lse[0].isfinite().all()


def test_bytes_and_refusals() -> None:
    geometry = Geometry(1, 8, 2, 64, dtype=torch.bfloat16)
    assert SparQ(mean_value=False).bytes_per_token(geometry) == 32
    assert SparQ().bytes_per_token(geometry) == 32 + 65 * 4 / 128
    with pytest.raises(ValueError, match="channels: expected at most head_dim=64, got 65"):
        SparQ(65).prepare(geometry)
    for options, message in (({"channels": 0}, "channels: expected"), ({"local": -1}, "local: expected")):
        with pytest.raises(ValueError, match=message):
            SparQ(**options)
