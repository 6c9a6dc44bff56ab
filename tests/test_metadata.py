"""Metadata that append keeps by itself: the same bits as `Selector.summarize`, whatever happens to the pages."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twilight import Geometry, MetadataSpec, PagedKVCache, Selector, kernels, ops
from twilight.graph import StaticCache
from twilight_selectors.block_mean import BlockMean
from twilight_selectors.double_sparsity import DoubleSparsity
from twilight_selectors.quest import Quest

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))),
        reason="needs an NVIDIA GPU of compute capability 8.0 or more, and CuPy",
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
KINDS = ["quest int8", "quest native", "mean int8", "mean native", "label 2", "label 4", "label 16"]
LAYERS, HEADS, DIM = 2, 2, 64


@pytest.fixture
def make(tmp_path):
    """Make a selector of one of `KINDS`."""

    def made(kind: str) -> Selector:
        name, how = kind.split()
        if name == "quest":
            return Quest(metadata_type=how)
        if name == "mean":
            return BlockMean(metadata_type=how)
        orders = {str(layer): [random.Random(layer).sample(range(DIM), DIM) for _ in range(HEADS)] for layer in (2, 8)}
        (tmp_path / "orders.json").write_text(json.dumps({"layers": orders}))
        return DoubleSparsity(str(tmp_path / "orders.json"), channels=16, label_bits=int(how))

    return made


class Summarized(Selector):
    """The same metadata with no rule: summarised, always."""

    def __init__(self, other: Selector) -> None:
        self.other = other

    def prepare(self, geometry):
        self.other.prepare(geometry)

    def metadata(self, geometry):
        return tuple(replace(spec, rule="summarize") for spec in self.other.metadata(geometry))

    def summarize(self, keys, valid, layer):
        return self.other.summarize(keys, valid, layer)


def geometry_of(device: str, page: int = 16) -> Geometry:
    return Geometry(LAYERS, 4, HEADS, DIM, page, torch.bfloat16, torch.device(device), layer_ids=(2, 8))


def tokens(geometry: Geometry, rows: int, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return K and V for every layer, keys of very different size so that the order of a sum shows."""
    shape = (rows, max(1, steps), HEADS, DIM)
    k = [torch.randn(shape) * 10 ** torch.empty(*shape[:2], 1, 1).uniform_(-2, 2) for _ in range(LAYERS)]
    return [(keys.to(geometry.device, geometry.dtype), keys.to(geometry.device, geometry.dtype)) for keys in k]


def assert_same_metadata(one, other) -> None:
    """Compare what belongs to a token, page by page."""
    size = one.geometry.page_size
    assert one.table.lengths == other.table.lengths
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for spec in one.specs:
            for pages, other_pages, length in zip(one.table.rows, other.table.rows, one.table.lengths, strict=True):
                for logical, (page, other_page) in enumerate(zip(pages, other_pages, strict=True)):
                    a, b = mine.metadata(spec.name)[page], theirs.metadata(spec.name)[other_page]
                    if spec.per == "token":
                        a, b = (part[:, : min(size, length - logical * size)] for part in (a, b))
                    assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page", [16, 32])
def test_append_keeps_what_summarize_computes(make, kind, device, page):
    geometry, rng = geometry_of(device, page), random.Random(page)
    selectors = make(kind), Summarized(make(kind))
    caches = [PagedKVCache(geometry, num_rows=3, num_pages=2, selector=s, growable=True) for s in selectors]
    for step in range(40):
        action = rng.choice(["one", "one", "one", "some", "fork", "truncate", "select", "free"]) if step else "some"
        row, other = rng.randrange(3), rng.randrange(3)
        if action in ("one", "some"):
            counts = [rng.randint(0, 1 if action == "one" else 40) for _ in range(3)]
            new = tokens(geometry, 3, max(counts))
            for cache in caches:
                for layer, (k, v) in zip(cache.layers, new, strict=True):
                    layer.append(k, v, counts)
        length = caches[0].table.lengths[row]
        cut = rng.randint(max(0, length - 20), length)
        for cache in caches:
            if action == "fork":
                cache.fork(row, other)
            elif action == "truncate":
                cache.truncate(row, cut)
            elif action == "select":
                cache.select_rows([row, other, row])
            elif action == "free" and step % 5 == 0:
                cache.free(row)
        assert_same_metadata(*caches)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_keeps_the_same(make, kind, device):
    geometry = geometry_of(device)
    lengths, chunk = [37, 0, 16], [3, 0, 17]
    prompt, more = tokens(geometry, 3, 37), tokens(geometry, 3, 17)
    caches = []
    for selector in (make(kind), Summarized(make(kind))):
        cache = PagedKVCache(geometry, num_rows=3, num_pages=20, selector=selector)
        for layer, (k, v) in zip(cache.layers, prompt, strict=True):
            layer.append(k, v, lengths)
        caches.append(cache)
    statics = [StaticCache(cache, 90) for cache in caches]
    for static in statics:
        for layer, (k, v) in zip(static.layers, more, strict=True):
            layer.append(k, v, chunk)
        for step in range(20):
            for layer, (k, v) in zip(static.layers, prompt, strict=True):
                layer.append(k[:, step], v[:, step])
        static.release()
    assert caches[0].table.lengths == [60, 0, 53]
    assert_same_metadata(*caches)


@pytest.mark.parametrize("kind", KINDS)
def test_summarize_is_called_only_where_pages_change_otherwise(make, kind, monkeypatch):
    selector, calls = make(kind), []
    summarize = type(selector).summarize
    monkeypatch.setattr(
        type(selector), "summarize", lambda self, *args: calls.append(args[0].shape[0]) or summarize(self, *args)
    )
    geometry = geometry_of("cpu")
    cache = PagedKVCache(geometry, num_rows=2, num_pages=9, selector=selector)
    for counts in ([33, 5], [1, 1], [0, 1]):
        for layer, (k, v) in zip(cache.layers, tokens(geometry, 2, 33), strict=True):
            layer.append(k, v, counts)
    cache.fork(0, 1)
    assert calls == []
    cache.truncate(0, 20)
    assert calls == [1] * LAYERS


class Ops(TorchDispatchMode):
    """Notes what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_a_step_is_one_launch(make, kind, device, monkeypatch):
    geometry = geometry_of(device)
    cache = PagedKVCache(geometry, num_rows=2, num_pages=40, selector=make(kind))
    launched = []

    def step(layers, counts):
        for layer, (k, v) in zip(layers, tokens(geometry, 2, 1), strict=True):
            k, v = k[:, 0], v[:, 0]
            with Ops() as torch_ops:
                layer.append(k, v, counts)
            yield torch_ops.seen

    list(step(cache.layers, [1, 1]))
    launch = kernels.Kernel.launch
    monkeypatch.setattr(kernels.Kernel, "launch", lambda self, *args: launched.append(self) or launch(self, *args))
    # The first layer of a step uploads the page table, the lengths and the counts; the others do nothing but launch.
    first, *others = step(cache.layers, [1, 1])
    assert first and all(seen == ["unsqueeze", "unsqueeze"] for seen in others)
    assert len(launched) == LAYERS
    static = StaticCache(cache, 64)
    list(step(static.layers, None))
    launched.clear()
    first, *others = step(static.layers, None)
    assert first == ["add_", "unsqueeze", "unsqueeze"] and all(seen == ["unsqueeze", "unsqueeze"] for seen in others)
    assert len(launched) == LAYERS


@dataclass
class Mixed(Selector):
    """What a plugin may do: means that append keeps, something of its own, and a second rule, which is summarised."""

    name = "mixed"

    def metadata(self, geometry):
        return (
            MetadataSpec("largest", (1,), torch.float32),
            MetadataSpec("mean", (geometry.head_dim,), geometry.dtype, rule="mean"),
            MetadataSpec("high", (geometry.head_dim,), geometry.dtype, rule="bounds"),
            MetadataSpec("low", (geometry.head_dim,), geometry.dtype, rule="bounds"),
        )

    def summarize(self, keys, valid, layer):
        assert keys.shape[0]
        high, low = ops.page_bounds(keys, valid)
        (mean,) = ops.page_means(keys, valid)
        return {"largest": keys.abs().amax((2, 3))[..., None] * layer, "mean": mean, "high": high, "low": low}


@pytest.mark.parametrize("device", DEVICES)
def test_one_rule_goes_with_whatever_else_there_is(device):
    geometry = geometry_of(device)
    caches = [PagedKVCache(geometry, num_rows=2, num_pages=20, selector=s) for s in (Mixed(), Summarized(Mixed()))]
    for counts in ([33, 5], [1, 1], [0, 1]):
        new = tokens(geometry, 2, max(counts))
        for cache in caches:
            for layer, (k, v) in zip(cache.layers, new, strict=True):
                layer.append(k, v, counts)
    for cache in caches:
        cache.truncate(0, 20)
    assert_same_metadata(*caches)
    assert caches[0].layers[1].metadata("largest").any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_step_that_fails_after_append_leaves_no_trace_in_what_append_keeps(device, layer, monkeypatch):
    geometry = geometry_of(device)
    caches = [PagedKVCache(geometry, num_rows=2, num_pages=20, selector=Mixed()) for _ in range(2)]
    for cache in caches:
        torch.manual_seed(1)
        for each, (k, v) in zip(cache.layers, tokens(geometry, 2, 21), strict=True):
            each.append(k, v, [21, 16])
    summarize = Mixed.summarize

    def fails(self, keys, valid, index):
        if index == geometry.layer_ids[layer] and valid.sum() > 5:
            raise RuntimeError("plugin")
        return summarize(self, keys, valid, index)

    monkeypatch.setattr(Mixed, "summarize", fails)
    new = tokens(geometry, 2, 3)
    for each, (k, v) in zip(caches[0].layers[:layer], new, strict=False):
        each.append(100 * k, v, [3, 3])
    with pytest.raises(RuntimeError, match="plugin"):
        caches[0].layers[layer].append(100 * new[layer][0], new[layer][1], [3, 3])
    assert caches[0].unfinished() == [] and caches[0].table.num_free == caches[1].table.num_free
    assert_same_metadata(*caches)


@dataclass
class Labelled(Selector):
    """Labels without calibration, of channels that the test gives."""

    name = "labelled"
    channels: object = None

    def metadata(self, geometry):
        return (MetadataSpec("label", (2,), geometry.dtype, per="token", rule="label"),)

    def label_channels(self, layer):
        return super().label_channels(layer) if self.channels is None else self.channels


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        (None, NotImplementedError, "Labelled.label_channels"),
        (torch.zeros(HEADS, 2), TypeError, "channels: expected dtype int32"),
        (torch.zeros(HEADS, 3).int(), ValueError, r"label\[0\]: expected shape \[5, 2, 16, 3\]"),
        (torch.tensor([[0, 1], [2, DIM]]).int(), ValueError, "label_channels: expected channels from 0 to 63"),
        (torch.tensor([[0, 1], [2, -1]]).int(), ValueError, "label_channels: expected channels from 0 to 63"),
    ],
)
def test_channels_that_do_not_fit_are_refused_when_the_cache_is_made(channels, error, message):
    with pytest.raises(error, match=message):
        PagedKVCache(geometry_of("cpu"), num_rows=1, num_pages=4, selector=Labelled(channels))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((MetadataSpec("a", (DIM,), torch.bfloat16, rule="bounds"),), "bounds: expected 2 tensors, got 1"),
        ((MetadataSpec("a", (DIM,), torch.bfloat16, rule="median"),), "rule: expected .*, got 'median'"),
        ((MetadataSpec("a", (DIM,), torch.bfloat16, per="token", rule="mean"),), r"mean\[0\]: expected shape"),
    ],
)
def test_metadata_that_is_not_of_its_rule_is_refused_when_the_cache_is_made(specs, message):
    class Wrong(Selector):
        def metadata(self, geometry):
            return specs

    with pytest.raises(ValueError, match=message):
        PagedKVCache(geometry_of("cpu"), num_rows=1, num_pages=4, selector=Wrong())
