"""Caches full of random tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twilight import Geometry, PagedKVCache, Selector


def fill(
    geometry: Geometry,
    lengths: Sequence[int],
    selector: Selector | None = None,
    spare: int = 1,
    shift: float = 0.0,
) -> tuple[PagedKVCache, list[torch.Tensor], list[torch.Tensor]]:
    """Return a cache and, for each layer, the keys and the values in it, `[b, longest, Hkv, d]`.

    Of row i the first `lengths[i]` count, the others are NaN. There are `spare` pages more for every row. `shift` is
    added to all numbers.
    """
    pages = sum(-(-length // geometry.page_size) for length in lengths)
    cache = PagedKVCache(geometry, num_rows=len(lengths), num_pages=pages + spare * len(lengths), selector=selector)
    shape = (len(lengths), max(lengths), geometry.num_kv_heads, geometry.head_dim)
    past = torch.arange(shape[1]) >= torch.tensor(lengths)[:, None]
    keys, values = [], []
    for layer in cache.layers:
        k, v = ((torch.randn(shape) + shift).masked_fill(past[..., None, None], torch.nan) for _ in range(2))
        keys.append(k.to(geometry.device, geometry.dtype))
        values.append(v.to(geometry.device, geometry.dtype))
        layer.append(keys[-1], values[-1], lengths)
    return cache, keys, values


def observed(
    geometry: Geometry, lengths: Sequence[int], selector: Selector, shift: float = 0.0, spare: int = 1
) -> tuple[PagedKVCache, list[torch.Tensor], list[torch.Tensor]]:
    """Do as `fill`, and show the selector random queries of those tokens, as a prompt would."""
    made = fill(geometry, lengths, selector, spare, shift)
    q = torch.randn(len(lengths), max(lengths), geometry.num_q_heads, geometry.head_dim)
    for layer in made[0].layers:
        selector.observe(q.to(geometry.device, geometry.dtype), layer)
    return made


def lists(selection: object) -> list[list[list[int]]]:
    """Return what a `Selection` holds, for each row and kv head."""
    indices, lengths = selection.indices, selection.lengths  # type: ignore[attr-defined]
    return [[head[:n].tolist() for head, n in zip(*row, strict=True)] for row in zip(indices, lengths, strict=True)]
