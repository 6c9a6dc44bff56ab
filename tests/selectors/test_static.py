"""Selectors that keep state or draw: over a `StaticCache`, whose shapes are those of its end, they do what they do over
the cache itself; and so they do replayed from a CUDA graph.
"""

from __future__ import annotations

import pytest
import torch

from tests.caches import observed
from tests.test_graph import DEVICES, GPU
from twilight import Geometry, Selector, TwilightAttention
from twilight.graph import DecodeGraph, StaticCache
from twilight_selectors.magicpig import MagicPIG
from twilight_selectors.nsa import NSA
from twilight_selectors.pqcache import PQCache
from twilight_selectors.tactic import Tactic
from twilight_selectors.vattention import VAttention

SELECTORS = [
    MagicPIG(4, 20, sinks=2, local=8),
    VAttention(sinks=2, local=8, base_rate=0.1),
    VAttention("pqcache", {"bits": 3, "sinks": 2}, sinks=2, local=8),
    PQCache(2, 4, sinks=4),
    Tactic(0.8, 8, 4, local=8),
    NSA(8, 4, 16, 4, 20),
]
LENGTHS = [150, 0, 70]


def two(selector: Selector, device: str) -> tuple:
    """Return two caches of the same prompts, and 12 steps of q, k and v."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    geometry = Geometry(2, 4, 2, 64, dtype=dtype, device=torch.device(device))
    caches = []
    for _ in range(2):
        torch.manual_seed(1)
        caches.append(observed(geometry, LENGTHS, selector, spare=8)[0])
    q, k, v = (torch.randn(12, 2, 3, heads, 64).to(device, dtype) for heads in (4, 2, 2))
    return *caches, q, k, v


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    exact = one.dtype == torch.float32
    torch.testing.assert_close(one.float(), other.float(), atol=1e-5 if exact else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: selector.name)
def test_a_static_cache_decodes_what_the_cache_does(selector: Selector, device: str) -> None:
    plain, other, q, k, v = two(selector, device)
    static = StaticCache(other, 200)
    static.set_active([0, 1, 2])
    attention = TwilightAttention(selector, budget=0.5)
    for step in range(12):
        for layer in range(2):
            want = attention.decode(q[step, layer], k[step, layer], v[step, layer], plain.layers[layer])
            have = attention.decode(q[step, layer], k[step, layer], v[step, layer], static.layers[layer])
            close(have[0], want[0])
            close(have[1], want[1])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: selector.name)
def test_a_captured_step_is_replayed_while_sequences_grow(selector: Selector, device: str) -> None:
    plain, other, q, k, v = two(selector, device)
    static = StaticCache(other, 200)
    static.set_active([0, 1, 2])
    attention = TwilightAttention(selector, budget=0.5)
    here = [torch.empty_like(part[0]) for part in (q, k, v)]
    graph = DecodeGraph(
        static, lambda: [attention.decode(here[0][i], here[1][i], here[2][i], static.layers[i]) for i in range(2)]
    )
    for step in range(12):
        for part, source in zip(here, (q, k, v), strict=True):
            part.copy_(source[step])
        out = graph.replay()
        for layer in range(2):
            want = attention.decode(q[step, layer], k[step, layer], v[step, layer], plain.layers[layer])
            close(out[layer][0], want[0])
    # Nothing depends on the host: two replays from the same state give the same bits.
    static.seq_lens.sub_(1)
    again = [part[0].clone() for part in out]
    graph._graph.replay()
    assert all(part[0].equal(before) for part, before in zip(out, again, strict=True))
