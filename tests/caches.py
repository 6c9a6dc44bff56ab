"""Caches full of random tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twilight import Geometry, PagedKVCache, Pruner, Selector
from twilight.testing.host import no_waiting


def fill(
    geometry: Geometry,
    lengths: Sequence[int],
    selector: Selector | None = None,
    spare: int = 1,
    shift: float = 0.0,
    pruner: Pruner | None = None,
) -> tuple[PagedKVCache, list[torch.Tensor], list[torch.Tensor]]:
    """Return a cache and, for each layer, the keys and the values in it, `[b, longest, Hkv, d]`.

    Of row i the first `lengths[i]` count, the others are NaN. There are `spare` pages more for every row. `shift` is
    added to all numbers.
    """
    pages = sum(-(-length // geometry.page_size) for length in lengths)
    cache = PagedKVCache(
        geometry,
        num_rows=len(lengths),
        num_pages=pages + spare * len(lengths),
        selector=selector,
        pruner=pruner,
    )
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


def uneven_steps(short: int) -> list[list[tuple[int, ...]]]:
    """Return tokens of each row in each step, of a selector that learns nothing from up to `short` at once."""
    return [
        [(short, 200)],  # a prompt too short to learn from, beside a long one
        [(150, 90), (1, 200), (1, 1)],  # both have learned, and one learns anew
        [(short, 90, 150, 0), (200, 3, 0, short)],
    ]


def check_rows_alone(selector: Selector, geometry: Geometry, steps: Sequence[Sequence[int]]) -> None:
    """Append so many tokens to each row, step by step, show the selector each step, and compare what it then keeps of a
    row with what it keeps of the row alone. Looks that it does not wait for the GPU, too.
    """
    totals = [sum(counts) for counts in zip(*steps, strict=True)]
    keys = [torch.randn(total, geometry.num_kv_heads, geometry.head_dim) + 1 for total in totals]

    def kept(rows: Sequence[int]) -> PagedKVCache:
        cache = PagedKVCache(geometry, num_rows=len(rows), num_pages=1, selector=selector, growable=True)
        done = [0] * len(rows)
        for step in steps:
            counts = [step[row] for row in rows]
            if not any(counts):
                continue
            k = torch.full((len(rows), max(counts), *keys[0].shape[1:]), torch.nan)
            for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
                k[i, :count] = keys[row][done[i] : done[i] + count]
                done[i] += count
            for layer in cache.layers:
                layer.append(k.to(geometry.dtype), k.to(geometry.dtype), counts)
                with no_waiting():
                    selector.observe(k.nan_to_num(7).repeat_interleave(geometry.group_size, dim=2), layer)
        return cache

    together = kept(range(len(totals))).layers[0]
    for row, total in enumerate(totals):
        alone = kept([row]).layers[0]
        for spec in selector.state(geometry):
            one, other = together.state(spec.name)[row], alone.state(spec.name)[0]
            if spec.per == "token":
                one, other = (each[:, : -(-total // spec.stride)] for each in (one, other))
            assert torch.equal(one, other), f"{spec.name} of row {row}"


def lists(selection: object) -> list[list[list[int]]]:
    """Return what a `Selection` holds, for each row and kv head."""
    indices, lengths = selection.indices, selection.lengths  # type: ignore[attr-defined]
    return [[head[:n].tolist() for head, n in zip(*row, strict=True)] for row in zip(indices, lengths, strict=True)]
