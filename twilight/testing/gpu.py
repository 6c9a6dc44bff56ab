"""The cases that need a GPU: a captured step, and both devices."""

from __future__ import annotations

import torch

from twilight.errors import CaptureError
from twilight.graph import DecodeGraph, StaticCache
from twilight.testing.world import LENGTHS, Failure, Step, Subject, World, check_form

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
        steps = plain.step(20)
        for step in graph.output:
            check_form(step)
        different, listed = _count(steps, graph.output)
        # Shapes differ, and with them the order of sums.
        if different > 2 * _DIFFERENT * listed:
            raise Failure(
                f"a replayed step should select what it does outside of the graph: {different} of {listed} tokens are "
                "only in one of both"
            )


def same_on_both(subject: Subject) -> None:
    """Compare the selections of the torch references on the CPU with those of the GPU."""
    worlds = [
        World(subject.make(), subject.geometry(device=device, dtype=torch.bfloat16)) for device in ("cpu", "cuda")
    ]
    for value in (20, 0.5):
        different, listed = _count(*(world.step(value) for world in worlds))
        if different > 2 * _DIFFERENT * listed:
            raise Failure(
                f"CPU and GPU should select the same but for near ties: {different} of {listed} tokens are only in one "
                f"of both, with budget={value}"
            )


def _count(one: list[Step], other: list[Step]) -> tuple[int, int]:
    """Return how many tokens are in the lists of one only, and how many there are."""
    different = listed = 0
    for a, b in zip(one, other, strict=True):
        for row, same in zip(a.lists(), b.lists(), strict=True):
            for first, second in zip(row, same, strict=True):
                listed += len(first)
                different += len(set(first) ^ set(second))
    return different, listed
