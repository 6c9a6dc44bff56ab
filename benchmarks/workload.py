"""Keys and queries whose attention looks like that of a long prompt: sinks, a local band, a few heavy tokens, a tail.

For each sequence and kv head there is a direction u. Keys are standard normal; the query heads of the group are

    q = tail * n + beta * u        n standard normal, and u of length sqrt(d)

so that a plain token's logit is normal with deviation `tail` (plus what u adds, which is the same for all but noise),
and a token whose key got `h * u / sqrt(d)` more has a logit higher by h * beta. Heavy are

    sinks          the first 4 tokens, 2 nats above the heavy ones
    a local band   the newest tokens, an eighth of the heavy ones
    runs           of 1 to 4 neighbours anywhere, the rest

each with a height that is normal around `delta` with deviation 1. How many there are is log-normal over kv heads, so
budgets
differ by 100x inside one batch, and `delta` is set for each kv head so that they hold a share of 0.95 of the mass:
top-p at 0.9 then keeps most of them and little else. `union` says how many tokens a group should keep on average; the
number of heavy tokens is `heavy_per_union` times that, which was fitted once and is checked by what the benchmark
prints.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from twilight import Geometry, PagedKVCache, Selector, ops
from twilight.ops.quantize import split_shadow


@dataclass(frozen=True)
class Shape:
    """Of the heavy tokens; see above."""

    tail: float = 1.0
    beta: float = 1.0
    spread: float = 1.0
    share: float = 0.95
    sigma: float = 1.2
    heavy_per_union: float = 2.5
    sinks: int = 4


def make_cache(geometry: Geometry, batch: int, length: int, selector: Selector, seed: int = 0) -> PagedKVCache:
    """Return a cache whose rows own `length` tokens each in shuffled pages, nothing written yet."""
    pages = batch * -(-length // geometry.page_size)
    cache = PagedKVCache(geometry, num_rows=batch, num_pages=pages, selector=selector)
    cache.table.extend([length] * batch)
    order = list(range(1, pages + 1))
    random.Random(seed).shuffle(order)
    cache.table.rows = [[order[page - 1] for page in row] for row in cache.table.rows]
    cache._upload()
    return cache


def fill_layer(
    cache: PagedKVCache, index: int, length: int, union: float, shape: Shape = Shape(), seed: int = 0
) -> torch.Tensor:  # noqa: B008
    """Write a layer's keys, values, 4-bit keys and metadata, and return queries `[b, Hq, d]` that go with them."""
    layer, g = cache.layers[index], cache.geometry
    device, batch, size = g.device, cache.num_rows, g.page_size
    generator = torch.Generator(device).manual_seed(seed * 1000 + index)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    for pages in (layer.k_pages, layer.v_pages):
        for chunk in pages.split(8192):
            chunk.normal_(generator=generator)
    direction = normal(batch, g.num_kv_heads, g.head_dim)
    direction /= direction.norm(dim=-1, keepdim=True)

    # How many heavy tokens each kv head has, and how much higher their logits are.
    count = (normal(batch, g.num_kv_heads) * shape.sigma - shape.sigma**2 / 2).exp() * union * shape.heavy_per_union
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
    push = height[row, head, at, None] / shape.beta * direction[row, head]
    keys[line] = (keys[line].float() + push).to(g.dtype)

    codes, params = split_shadow(layer.shadow, size)
    for first in range(0, len(layer.k_pages), 8192):
        part = slice(first, first + 8192)
        codes[part], params[part] = ops.quantize(layer.k_pages[part])
    used = torch.arange(1, len(layer.k_pages), device=device)
    layer._summarize(used, torch.ones(len(used), size, dtype=torch.bool, device=device))

    q = shape.tail * normal(batch, g.num_kv_heads, g.group_size, g.head_dim)
    along = (q * direction[:, :, None]).sum(-1, keepdim=True)
    q += (shape.beta * math.sqrt(g.head_dim) - along) * direction[:, :, None]
    return q.flatten(1, 2).to(g.dtype)
