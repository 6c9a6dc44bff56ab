"""Keys and queries whose attention looks like that of a long prompt: sinks, a local band, a few heavy tokens, a tail.

Each kv head has a direction u, the same for all sequences, as the heavy channels of a model are. Keys are standard
normal; the query heads of the group are

    q = tail * n + beta * u        n standard normal, and u of length sqrt(d)

so that a plain token's logit is normal with deviation `tail` (plus what u adds, which is the same for all but noise),
and a token whose key got `h * u / sqrt(d)` more has a logit higher by h * beta. Heavy are

    sinks          the first 4 tokens, 2 nats above the heavy ones
    a local band   the newest tokens, an eighth of the heavy ones
    runs           of 1 to 4 neighbours anywhere, the rest

each with a height that is normal around `delta` with deviation 1. How many there are is log-normal over sequences and
kv heads, so budgets differ by 100x inside one batch, and `delta` is set for each so that they hold a share of 0.95 of
the mass: top-p at 0.9 then keeps most of them and little else. `union` says how many tokens a group should keep on
average, of Quest's candidates, a quarter of the length. The number of heavy tokens is `heavy_per_union /
group_size**group_power` times that, fitted once for groups of 1 to 8, because a larger group's union holds more than
each head asks for; what it comes to is printed by the benchmark.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from typing import cast

import torch

from twilight import Geometry, LayerCache, PagedKVCache, Pruner, Selector, ops
from twilight.graph import StaticCache
from twilight.ops.quantize import split_shadow


@dataclass(frozen=True)
class Shape:
    """Of the heavy tokens; see above."""

    tail: float = 1.0
    beta: float = 1.0
    spread: float = 1.0
    share: float = 0.95
    sigma: float = 1.2
    heavy_per_union: float = 4.4
    group_power: float = 0.41
    sinks: int = 4


DEFAULT = Shape()
_CHUNK = 1 << 26
"""Elements drawn and quantised at a time: 256 MB in float32, of which quantising holds some five."""


def make_cache(
    geometry: Geometry, batch: int, length: int, selector: Selector, *, spare: int = 0, seed: int = 0
) -> PagedKVCache:
    """Return a cache whose rows own `length` tokens each in shuffled pages, nothing written yet.

    Args:
        geometry: sizes.
        batch: rows.
        length: tokens of each row, in whole pages.
        selector: whose metadata is kept.
        spare: tokens that each row may grow by, in whole pages.
        seed: of the shuffle.
    """
    size = geometry.page_size
    if length % size or spare % size:
        raise ValueError(f"length, spare: expected whole pages of {size} tokens, got {length} and {spare}")
    pages = batch * length // size
    cache = PagedKVCache(geometry, num_rows=batch, num_pages=pages + batch * spare // size, selector=selector)
    cache.table.extend([length] * batch)
    order = list(range(1, pages + 1))
    random.Random(seed).shuffle(order)
    cache.table.rows = [[order[page - 1] for page in row] for row in cache.table.rows]
    cache._upload()
    return cache


def use_selector(cache: PagedKVCache, selector: Selector, pruner: Pruner | None = None) -> None:
    """Keep the metadata of others beside the same keys and values, computed from them, instead of those before."""
    pruner = Pruner() if pruner is None else pruner
    if cache.selector is selector and cache.pruner_specs == pruner.metadata(cache.geometry):
        return
    cache._keep_for(selector, pruner)
    for layer in cache.layers:
        layer._metadata = {}
    for layer in cache.layers:
        layer._allocate_metadata({}, 0, len(layer.k_pages))
        _summarize(layer)


def _summarize(layer: LayerCache) -> None:
    used = layer.page_table.flatten().long()
    layer._summarize(used, torch.ones(len(used), layer.geometry.page_size, dtype=torch.bool, device=used.device))


def layers_of(static: StaticCache) -> list[LayerCache]:
    """Return a static cache's layers as what they serve as."""
    return cast("list[LayerCache]", static.layers)


def contiguous(pages: torch.Tensor, batch: int) -> torch.Tensor:
    """View pages as `[b, Hkv, n, d]`, as if each sequence lay in one piece: for kernels that know no pages.

    The memory is the same and no token is where it was, which a kernel that reads all of them cannot tell.
    """
    return pages[1:].view(batch, pages.shape[1], -1, pages.shape[3])


def fill_layer(
    cache: PagedKVCache, index: int, length: int, union: float, shape: Shape = DEFAULT, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a layer's keys, values, 4-bit keys and metadata.

    Nothing the size of the layer is made beside it: keys and values are drawn in place, and quantised by the chunk.

    Args:
        cache: from `make_cache`.
        index: which of its layers.
        length: tokens of each row.
        union: tokens that a group should keep on average, at p = 0.9.
        shape: of the heavy tokens.
        seed: draws.

    Returns:
        `(q, u)`: queries `[b, Hq, d]` that go with the keys, and the directions `[Hkv, d]` along which heavy keys lie.
    """
    layer, g = cache.layers[index], cache.geometry
    device, batch, size = g.device, cache.num_rows, g.page_size
    generator = torch.Generator(device).manual_seed(seed * 1000 + index)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    chunk = max(1, _CHUNK // (g.num_kv_heads * size * g.head_dim))
    for pages in (layer.k_pages, layer.v_pages):
        for part in pages.split(chunk):
            part.normal_(generator=generator)
    direction = normal(g.num_kv_heads, g.head_dim)
    direction /= direction.norm(dim=-1, keepdim=True)

    # How many heavy tokens each kv head has, and how much higher their logits are.
    mean = union * shape.heavy_per_union / g.group_size**shape.group_power
    count = (normal(batch, g.num_kv_heads) * shape.sigma - shape.sigma**2 / 2).exp() * mean
    count = count.clamp(8, length // 6).int()
    tail_mass = length * math.exp(shape.tail**2 / 2)
    heavy_mass = count * math.exp(shape.spread**2 / 2 + shape.tail**2 / 2)
    delta = (shape.share / (1 - shape.share) * tail_mass / heavy_mass).log()

    most = int(count.max())
    slot = torch.arange(most, device=device)
    band = (count // 8)[..., None]
    # Sinks, then the band, then runs of 4 that start anywhere and of which the first 1 to 4 are used.
    starts = torch.rand(batch, g.num_kv_heads, -(-most // 4) * 2, generator=generator, device=device)
    starts = (starts * (length // 4)).long() * 4
    run = torch.randint(1, 5, starts.shape, generator=generator, device=device)
    in_run = torch.arange(4, device=device) < run[..., None]
    offered = (starts[..., None] + torch.arange(4, device=device)).masked_fill(~in_run, -1).flatten(-2)
    offered = offered.gather(-1, torch.sort(offered < 0, dim=-1, stable=True).indices)[..., :most]
    position = torch.where(
        slot < shape.sinks, slot, torch.where(slot < shape.sinks + band, length - 1 - (slot - shape.sinks), offered)
    )
    real = (slot < count[..., None]) & (position >= 0) & (position < length)
    height = delta[..., None] + shape.spread * normal(batch, g.num_kv_heads, most) + 2.0 * (slot < shape.sinks)

    row, head, at = real.nonzero(as_tuple=True)
    where = position[row, head, at]
    page = cache.page_table.long()[row, where // size]
    keys = layer.k_pages.view(-1, g.head_dim)
    line = (page * g.num_kv_heads + head) * size + where % size
    # A token named twice is written twice with one of its heights, not with their sum.
    push = height[row, head, at, None] / shape.beta * direction[head]
    keys[line] = (keys[line].float() + push).to(g.dtype)

    codes, params = split_shadow(layer.shadow, size)
    for first in range(0, len(layer.k_pages), chunk):
        chosen = slice(first, first + chunk)
        codes[chosen], params[chosen] = ops.quantize(layer.k_pages[chosen])
    _summarize(layer)

    q = shape.tail * normal(batch, g.num_kv_heads, g.group_size, g.head_dim)
    along = (q * direction[:, None]).sum(-1, keepdim=True)
    q += (shape.beta * math.sqrt(g.head_dim) - along) * direction[:, None]
    return q.flatten(1, 2).to(g.dtype), direction


@dataclass(frozen=True)
class Workload:
    """A filled cache and what goes with it.

    Attributes:
        cache: every row holds `length` tokens.
        length: N.
        queries: for each layer, `[b, Hq, d]`.
        directions: for each layer, `[Hkv, d]`: along these the heavy keys lie.
        seconds: what filling it took.
    """

    cache: PagedKVCache
    length: int
    queries: list[torch.Tensor]
    directions: list[torch.Tensor]
    seconds: float


def make_workload(
    geometry: Geometry, batch: int, length: int, selector: Selector, union: float, *, spare: int = 0
) -> Workload:
    """Make a cache and fill all of its layers; see `make_cache` and `fill_layer`."""
    start = time.perf_counter()
    cache = make_cache(geometry, batch, length, selector, spare=spare)
    filled = [fill_layer(cache, index, length, union) for index in range(geometry.num_layers)]
    if geometry.device.type == "cuda":
        torch.cuda.synchronize(geometry.device)
    queries, directions = (list(each) for each in zip(*filled, strict=True))
    return Workload(cache, length, queries, directions, time.perf_counter() - start)


def channel_orders(workload: Workload) -> dict[int, torch.Tensor]:
    """Return a Double Sparsity calibration of the workload: for each layer `[Hkv, d]`, heaviest channel first.

    What a text would tell, channel by channel, is known here: logits differ along u, so the channels are those with the
    largest |u|. 16 of 128 hold about half of its energy.
    """
    return {
        layer: direction.abs().argsort(dim=-1, descending=True)
        for layer, direction in zip(workload.cache.geometry.layer_ids, workload.directions, strict=True)
    }
