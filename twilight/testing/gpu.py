"""The cases that need a GPU: a captured step, and both devices."""

from __future__ import annotations

import torch

from twilight.errors import CaptureError
from twilight.graph import DecodeGraph, StaticCache
from twilight.testing.world import LENGTHS, Failure, Subject, World, check_form

_DIFFERENT = 0.02
"""Share of a selection that may differ between devices: sums in another order decide between nearly equal scores."""


def captured(subject: Subject) -> None:
    """Replay a captured step of `select` and `finish`, and compare with steps outside of the graph."""
    geometry = subject.geometry(device="cuda", dtype=torch.bfloat16)
    plain, other = (World(subject.make(), geometry) for _ in range(2))
    static = StaticCache(other.cache, max(LENGTHS) + 40)
    static.set_active(range(len(LENGTHS)))
    other.layers = static.layers
    shapes = {"q": geometry.num_q_heads, "k": geometry.num_kv_heads, "v": geometry.num_kv_heads}
    here = {
        name: torch.zeros(geometry.num_layers, len(LENGTHS), 1, heads, geometry.head_dim,
                          dtype=geometry.dtype, device="cuda")
        for name, heads in shapes.items()
    }  # fmt: skip
    ones = [1] * len(LENGTHS)
    eager = World._next
    # The captured step reads its inputs where the loop below puts them.
    other._next = lambda which, counts, layer: here[which][layer]  # type: ignore[method-assign]
    try:
        graph = DecodeGraph(static, lambda: other.step(20, lambda step: None))
    except CaptureError as error:
        raise Failure(str(error)) from error
    other.done = list(plain.done)
    for _ in range(3):
        for name, held in here.items():
            for layer in range(geometry.num_layers):
                held[layer].copy_(eager(plain, name, ones, layer))
        graph.replay()
        for one, step in zip(plain.step(20), graph.output, strict=True):
            check_form(step)
            if one.lists() != step.lists():
                raise Failure(
                    f"a replayed step should select what it does outside of the graph: layer {one.layer.index}"
                )


def same_on_both(subject: Subject) -> None:
    """Compare the selections of the torch references on the CPU with those of the GPU."""
    worlds = [
        World(subject.make(), subject.geometry(device=device, dtype=torch.bfloat16)) for device in ("cpu", "cuda")
    ]
    for value in (20, 0.5):
        listed = different = 0
        for one, other in zip(*(world.step(value) for world in worlds), strict=True):
            for a, b in zip(one.lists(), other.lists(), strict=True):
                for first, second in zip(a, b, strict=True):
                    listed += len(first)
                    different += len(set(first) - set(second)) + len(set(second) - set(first))
        if different > 2 * _DIFFERENT * listed:
            raise Failure(
                f"CPU and GPU should select the same but for near ties: {different} of {listed} tokens are only in one "
                f"of both, with budget={value}"
            )
