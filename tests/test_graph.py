"""Steps over a `StaticCache`: the same numbers as over the cache itself, eagerly and replayed from a CUDA graph."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from twilight import (
    AdaBudget,
    BoundedTopP,
    Budget,
    Geometry,
    MetadataSpec,
    NoPruning,
    PagedKVCache,
    PyramidBudget,
    Selection,
    Selector,
    Threshold,
    TopP,
    TwilightAttention,
    UniformBudget,
    kernels,
)
from twilight.graph import DecodeGraph, StaticCache
from twilight.registry import create_selector

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))),
        reason="needs an NVIDIA GPU of compute capability 8.0 or more, and CuPy",
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@dataclass
class LargestPages(Selector):
    """Pages by the product of the query with their mean key: needs metadata that follows every append."""

    name = "largest_pages"

    def metadata(self, geometry):
        return (MetadataSpec("mean", (geometry.head_dim,), torch.float32),)

    def summarize(self, keys, valid, layer):
        return {"mean": keys.float().sum(2) / valid.sum(-1).clamp(min=1)[:, None, None]}

    def select(self, q, layer, budget: Budget) -> Selection:
        g = layer.geometry
        mean = layer.metadata("mean")[layer.page_table.long()].transpose(1, 2)
        grouped = q.float().unflatten(1, (g.num_kv_heads, -1)).sum(2)
        scores = (mean @ grouped.unsqueeze(-1)).squeeze(-1)
        logical = torch.arange(scores.shape[-1], device=q.device)
        pages = (layer.seq_lens + g.page_size - 1) // g.page_size
        scores = scores.masked_fill(logical >= pages[:, None, None], -torch.inf)
        return Selection.top(
            scores, budget.pages(g.page_size), capacity=budget.page_capacity(g.page_size), granularity=g.page_size
        )


def caches(device, lengths, layers=2):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    geometry = Geometry(layers, 8, 2, 64, dtype=dtype, device=torch.device(device))
    generator = torch.Generator().manual_seed(0)
    made = []
    prompt = [torch.randn(2, len(lengths), max(lengths), 2, 64, generator=generator) for _ in range(layers)]
    for _ in range(2):
        cache = PagedKVCache(geometry, num_rows=len(lengths), num_pages=200, selector=LargestPages())
        for layer, (k, v) in zip(cache.layers, prompt, strict=True):
            layer.append(k.to(device, dtype), v.to(device, dtype), lengths)
        made.append(cache)
    return made


def step_inputs(cache, steps):
    generator = torch.Generator().manual_seed(1)
    g, b = cache.geometry, cache.num_rows
    shape = (steps, len(cache.layers), b)
    q = torch.randn(*shape, g.num_q_heads, g.head_dim, generator=generator)
    k, v = (torch.randn(*shape, g.num_kv_heads, g.head_dim, generator=generator) for _ in range(2))
    return [part.to(g.device, g.dtype) for part in (q, k, v)]


def close(one, other):
    torch.testing.assert_close(
        one.float(), other.float(), atol=2e-2 if one.dtype == torch.bfloat16 else 1e-5, rtol=1e-2
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_static_cache_decodes_what_the_cache_does(device):
    plain, other = caches(device, [70, 0, 31])
    static = StaticCache(other, 120)
    static.set_active([0, 1, 2])
    attention = TwilightAttention(LargestPages(), budget=0.5)
    q, k, v = step_inputs(plain, 40)
    for step in range(40):
        for layer in range(2):
            want = attention.decode(q[step, layer], k[step, layer], v[step, layer], plain.layers[layer])
            have = attention.decode(q[step, layer], k[step, layer], v[step, layer], static.layers[layer])
            close(have[0], want[0])
            close(have[1], want[1])
    assert static.lengths == plain.table.lengths == static.seq_lens.tolist()
    released = static.release()
    assert released.table.lengths == plain.table.lengths
    assert released.table.num_free == plain.table.num_free
    want, have = (attention.decode(q[0, 0], k[0, 0], v[0, 0], cache.layers[0]) for cache in (plain, released))
    close(have[0], want[0])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_leave_and_join(device):
    plain, other = caches(device, [20, 33])
    static = StaticCache(other, 64)
    attention = TwilightAttention(LargestPages(), budget=0.5)
    q, k, v = step_inputs(plain, 3)
    static.free(0)
    for layer in range(2):
        static.layers[layer].append(k[:2, layer].transpose(0, 1), v[:2, layer].transpose(0, 1), [2, 0])
    plain.free(0)
    for layer in range(2):
        plain.layers[layer].append(k[:2, layer].transpose(0, 1), v[:2, layer].transpose(0, 1), [2, 0])
    static.set_active([0, 1])
    for layer in range(2):
        want = attention.decode(q[2, layer], k[2, layer], v[2, layer], plain.layers[layer])
        have = attention.decode(q[2, layer], k[2, layer], v[2, layer], static.layers[layer])
        close(have[0], want[0])
    assert static.lengths == plain.table.lengths == [3, 34]


def test_what_does_not_fit_is_refused_before_anything_changes():
    plain, other = caches("cpu", [20, 33])
    with pytest.raises(ValueError, match="max_seq_len"):
        StaticCache(other, 32)
    static = StaticCache(other, 33)
    k = torch.zeros(2, 2, 64)
    with pytest.raises(ValueError, match="row 1 holds 33"):
        static.layers[0].append(k, k)
    assert static.seq_lens.tolist() == [20, 33]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("selector", ["largest_pages", "quest", "full", "double_sparsity"])
@pytest.mark.parametrize("pruner", [TopP(), NoPruning()], ids=["top_p", "none"])
def test_a_captured_step_is_replayed_while_sequences_grow(device, selector, pruner, tmp_path):
    lengths = [200, 0, 31]
    geometry = Geometry(2, 8, 2, 128, dtype=torch.bfloat16, device=torch.device(device))
    if selector == "largest_pages":
        chosen = LargestPages()
    elif selector == "double_sparsity":
        orders = tmp_path / "orders.json"
        orders.write_text(json.dumps({"layers": {str(layer): [list(range(128))] * 2 for layer in range(2)}}))
        chosen = create_selector(selector, calibration=str(orders))
    else:
        chosen = create_selector(selector)
    made = []
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.randn(2, 2, 3, max(lengths), 2, 128, generator=generator, device=device).bfloat16()
    for _ in range(2):
        cache = PagedKVCache(geometry, num_rows=3, num_pages=100, selector=chosen)
        for layer in range(2):
            cache.layers[layer].append(*prompt[layer], lengths)
        made.append(cache)
    plain, static = made[0], StaticCache(made[1], 300)
    static.set_active([0, 1, 2])
    attention = TwilightAttention(chosen, pruner, budget=0.5)
    q, k, v = step_inputs(plain, 60)
    here = [torch.empty_like(part[0]) for part in (q, k, v)]

    def step():
        return [attention.decode(here[0][i], here[1][i], here[2][i], static.layers[i]) for i in range(2)]

    graph = DecodeGraph(static, step)
    assert static.seq_lens.tolist() == lengths
    for i in range(60):
        for part, source in zip(here, (q, k, v), strict=True):
            part.copy_(source[i])
        out = graph.replay()
        for layer in range(2):
            want = attention.decode(q[i, layer], k[i, layer], v[i, layer], plain.layers[layer])
            close(out[layer][0], want[0])
            close(out[layer][1], want[1])
    assert static.seq_lens.tolist() == static.lengths == [260, 60, 91]
    # Nothing depends on the host: two replays from the same state give the same bits.
    static.seq_lens.sub_(1)
    again = [part[0].clone() for part in out]
    graph._graph.replay()
    assert all(part[0].equal(before) for part, before in zip(out, again, strict=True))
    with pytest.raises(ValueError, match="row 0 holds"):
        for _ in range(100):
            graph.replay()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {}),
        ("snapkv", {"window": 8}),
        ("sparq", {}),
        ("tidal_decode", {"reselect": 2}),
        ("streaming_llm", {"reindex": True}),
    ],
)
def test_what_selectors_keep_is_replayed_bit_for_bit(device, name, options):
    chosen = create_selector(name, **options)
    lengths, steps = [200, 0, 31], 40
    inv_freq = tuple(10000 ** (-c / 64) for c in range(64))
    geometry = Geometry(3, 8, 2, 128, dtype=torch.bfloat16, device=torch.device(device), inv_freq=inv_freq)
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.randn(3, 2, 3, max(lengths), 2, 128, generator=generator, device=device).bfloat16()
    seen = torch.randn(3, 3, max(lengths), 8, 128, generator=generator, device=device).bfloat16()
    statics = []
    for _ in range(2):
        cache = PagedKVCache(geometry, num_rows=3, num_pages=100, selector=chosen)
        for layer in range(3):
            cache.layers[layer].append(*prompt[layer], lengths)
            chosen.observe(seen[layer], cache.layers[layer])
        statics.append(StaticCache(cache, 260))
        statics[-1].set_active([0, 2])
    attention = TwilightAttention(chosen, budget=0.3)
    q, k, v = step_inputs(cache, steps)
    here = [torch.empty_like(part[0]) for part in (q, k, v)]

    def step(static):
        return [attention.decode(here[0][i], here[1][i], here[2][i], static.layers[i]) for i in range(3)]

    before = [layer.state(spec.name).clone() for layer in statics[1].layers for spec in layer.state_specs]
    graph = DecodeGraph(statics[1], lambda: step(statics[1]))
    after = [layer.state(spec.name) for layer in statics[1].layers for spec in layer.state_specs]
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))  # warming up has changed nothing
    for i in range(steps):
        for part, source in zip(here, (q, k, v), strict=True):
            part.copy_(source[i])
        want, have = step(statics[0]), graph.replay()
        for layer in range(3):
            assert have[layer][0][[0, 2]].equal(want[layer][0][[0, 2]])
            assert have[layer][1][[0, 2]].equal(want[layer][1][[0, 2]])
    for spec in statics[0].layers[0].state_specs:
        for one, other in zip(statics[0].layers, statics[1].layers, strict=True):
            assert one.state(spec.name).equal(other.state(spec.name))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("selector", ["quest", "oracle_topk", "full"])  # candidates are pages, tokens, everything
@pytest.mark.parametrize(
    ("pruner", "budget"),
    [
        (BoundedTopP(0.8, 8, 40, tail="none"), UniformBudget(0.5)),
        (BoundedTopP(0.8, 8, 40, tail="page_mean"), UniformBudget(0.5)),
        (BoundedTopP(0.8, 8, None, tail="mean", tail_type="native"), PyramidBudget(0.3, 16)),
        (Threshold(0.05, tail="page_mean", tail_type="native"), AdaBudget(0.3, 16, window=8)),
    ],
    ids=["bounds", "page_mean", "mean, pyramid", "threshold, ada"],
)
def test_pruners_and_policies_are_replayed_bit_for_bit(device, selector, pruner, budget):
    chosen, lengths, steps = create_selector(selector), [200, 0, 31], 20
    geometry = Geometry(3, 8, 2, 128, dtype=torch.bfloat16, device=torch.device(device))
    attention = TwilightAttention(chosen, pruner, budget)
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.randn(3, 2, 3, max(lengths), 2, 128, generator=generator, device=device).bfloat16()
    seen = torch.randn(3, 3, max(lengths), 8, 128, generator=generator, device=device).bfloat16()
    statics = []
    for _ in range(2):
        cache = PagedKVCache(geometry, num_rows=3, num_pages=100, selector=chosen, pruner=pruner, budget=budget)
        for layer in range(3):
            cache.layers[layer].append(*prompt[layer], lengths)
            attention.observe(seen[layer], cache.layers[layer])
        statics.append(StaticCache(cache, 240))
        statics[-1].set_active([0, 2])
    q, k, v = step_inputs(cache, steps)
    here = [torch.empty_like(part[0]) for part in (q, k, v)]

    def step(static):
        return [attention.decode(here[0][i], here[1][i], here[2][i], static.layers[i]) for i in range(3)]

    graph = DecodeGraph(statics[1], lambda: step(statics[1]))
    for i in range(steps):
        for part, source in zip(here, (q, k, v), strict=True):
            part.copy_(source[i])
        want, have = step(statics[0]), graph.replay()
        for (out, lse), (expected, expected_lse) in zip(have, want, strict=True):
            assert out[[0, 2]].equal(expected[[0, 2]]) and lse[[0, 2]].equal(expected_lse[[0, 2]])
            assert out[[0, 2]].isfinite().all()
