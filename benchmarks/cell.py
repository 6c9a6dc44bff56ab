"""One cell: fill a cache, time the dense kernels and every method over it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from twilight import Geometry, Selector
from twilight.graph import StaticCache

from .cells import UNION, Cell
from .dense import measure_dense
from .methods import make, measure_method, methods
from .progress import say_budgets, say_dense, say_method
from .timing import Deadline
from .workload import Workload, make_workload

_CPU_LAYERS = 2
L2_BYTES = 50 << 20
"""Of an H100 or H200, for a torch that does not say."""


@dataclass(frozen=True)
class Options:
    """What is the same for all cells of a call.

    Attributes:
        device: where.
        p: mass to keep.
        repeats: replays of each graph.
        bandwidth: TB/s that floors are counted at.
        say: prints a line.
        selectors: installed ones to time beside the built-in rows, by what reports call them.
    """

    device: torch.device
    p: float = 0.9
    repeats: int = 15
    bandwidth: float = 4.2
    say: Callable[[str], None] = print
    selectors: Mapping[str, Selector] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU; on a CPU, where only the code is tried, float32."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def free_bytes(device: torch.device) -> float:
    """Return the memory that a cell may take: a GPU's free memory but 3 %, 2 GB on a CPU."""
    if device.type != "cuda":
        return 5e9
    gc.collect()
    torch.cuda.empty_cache()
    return 0.97 * torch.cuda.mem_get_info(device)[0]


def l2_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache."""
    if device.type != "cuda":
        return L2_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES))


def fill_cache(cell: Cell, options: Options) -> tuple[Workload, StaticCache]:
    """Return a workload of so many layers that a replay finds none of them in the L2 cache, with Quest's metadata."""
    device = options.device
    torch.manual_seed(0)
    layers = _CPU_LAYERS
    if device.type == "cuda":
        layers = cell.layers(l2_bytes(device), free_bytes(device))
    geometry = Geometry(layers, cell.q_heads, cell.kv_heads, cell.head_dim, cell.page_size, options.dtype, device)
    work = make_workload(geometry, cell.batch, cell.length, make("quest"), cell.length / UNION)
    return work, StaticCache(work.cache, cell.length)


def fill(cell: Cell, options: Options) -> tuple[Workload, StaticCache, dict[str, Any]]:
    """Return a filled cache, and ``us`` and ``kernel`` of the dense kernel that is fastest over it."""
    work, static = fill_cache(cell, options)
    times, _ = measure_dense(work, static, options.repeats, l2_bytes(options.device), Deadline(None))
    best = min(times, key=lambda name: times[name]["us"])
    return work, static, {"us": times[best]["us"], "kernel": best}


def run_cell(cell: Cell, options: Options, deadline: Deadline) -> dict[str, Any]:
    """Measure a cell.

    Raises:
        OutOfTime: the deadline came first; what was measured is lost.
    """
    device, say = options.device, options.say
    quest = make("quest")
    work, static = fill_cache(cell, options)
    layers = len(static.layers)
    say(f"{cell}, {layers} layers, filled in {work.seconds:.1f} s")
    deadline.check()

    result: dict[str, Any] = cell.as_dict() | {
        "p": options.p, "layers": layers, "dtype": str(options.dtype).removeprefix("torch."),
        "repeats": options.repeats, "bandwidth": options.bandwidth, "fill_s": work.seconds,
    }  # fmt: skip
    result["dense"], result["skipped"] = measure_dense(work, static, options.repeats, l2_bytes(device), deadline)
    best = min(result["dense"], key=lambda name: result["dense"][name]["us"])
    result["best_dense"] = best
    dense_us = result["dense"][best]["us"]
    say_dense(result, cell.dense_bytes, say)
    result["methods"] = {}
    for method in methods(work, quest, options.p, options.selectors):
        deadline.check()
        try:
            row = measure_method(method, work, static, cell, options.repeats)
        except torch.OutOfMemoryError as error:
            result["skipped"][method.name] = f"out of memory: {str(error).splitlines()[0][:120]}"
            say(f"  {method.name}: {result['skipped'][method.name]}")
            continue
        total, moved = row["total"]["us"], sum(row["bytes"].values())
        row |= {
            "gbps": moved / total / 1e3, "floor_fraction": moved / total / 1e6 / options.bandwidth,
            "speedup": dense_us / total,
        }  # fmt: skip
        result["methods"][method.name] = row
        say_method(method.name, row, say, head=len(result["methods"]) == 1)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    say_budgets(result, say)
    return result
