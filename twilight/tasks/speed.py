"""Speed: a decode step of one layer as `twilight bench` times it, for the selector, pruner and budget of the run."""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from twilight import kernels, resources
from twilight.attention import Step, TwilightAttention
from twilight.budget import UniformBudget
from twilight.config import build_budget, build_pruner, build_selector
from twilight.errors import UnsupportedModelError
from twilight.evaluation.reading import Reading
from twilight.evaluation.session import TWILIGHT
from twilight.geometry import Geometry
from twilight.selector import Selector
from twilight.tasks import TaskResult

_STAGES = ("select", "estimate", "prune", "attend")

_FILLED: dict[Any, Any] = {}
"""The last workload and what dense kernels took over it: runs that differ in p share both."""


def run(cfg: DictConfig) -> TaskResult:
    """Time a step; one row.

    Raises:
        ValueError: no GPU, sizes out of range, or a cell that the GPU's memory does not hold.
        UnsupportedModelError: a selector or budget that has to read a prompt first.
    """
    task = cfg.task
    selector, pruner, budget = build_selector(cfg), build_pruner(cfg), build_budget(cfg)
    for name in ("batch", "repeats"):
        if task[name] < 1:
            raise ValueError(f"task.{name}: expected at least 1, got {task[name]}")
    device = _device(cfg)
    bench = resources.subpackage("benchmarks").__name__
    cell_module, cells, methods, steps, workloads = (
        importlib.import_module(f"{bench}.{name}") for name in ("cell", "cells", "methods", "layer_step", "workload")
    )
    cell = cells.Cell(task.batch, task.context, *cells.parse_heads(task.heads), task.head_dim, task.page_size)
    _check_stateless(cfg, selector, budget, cell)
    key = (cell, task.repeats, str(device))
    if key not in _FILLED:
        _FILLED.clear()
        if not cell.fits(cell_module.free_bytes(device)):
            raise ValueError(f"task.context: {cell} does not fit this device's memory")
        options = cell_module.Options(device, repeats=task.repeats, say=lambda line: None)
        _FILLED[key] = cell_module.fill(cell, options)
    work, static, dense = _FILLED[key]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        if is_dataclass(selector) and hasattr(selector, "calibration"):
            path = methods.own_calibration(work, Path(folder))
            selector = replace(selector, calibration=str(path))
        attention = TwilightAttention(selector, pruner, budget)
        method = methods.Method(selector.name, attention)
        timed = methods.measure_method(method, work, static, cell, task.repeats)
    reading, apart = _read(attention, work, workloads.layers_of(static))
    bandwidth = steps.floor_bandwidth(device, task.bandwidth, gpu, lambda line: None)
    total = timed["total"]["us"]
    stages = {f"{name}_us": timed[name]["us"] if name in timed and name in apart else None for name in _STAGES}
    moved = sum(timed["bytes"].values())
    columns = reading.columns(dict.fromkeys(range(len(static.layers)), "sparse"))
    for name in ("kv_bytes", "dense_kv_bytes"):
        columns[name] /= len(static.layers)
    row = {
        "method": TWILIGHT,
        "batch": task.batch,
        "context": task.context,
        "heads": task.heads,
        "head_dim": task.head_dim,
        "gpu": gpu,
        **stages,
        "total_us": total,
        "dense_us": dense["us"],
        "dense_kernel": dense["kernel"],
        "ratio": dense["us"] / total,
        "floor_fraction": moved / total / 1e6 / bandwidth,
        **columns,
        "sparse_layers": 1,
        "dense_layers": 0,
    }
    table = [each for each in reading.table(context=task.context) if each["layer"] == 0]
    return TaskResult([row], {"budgets": table})


def _check_stateless(cfg: DictConfig, selector: Selector, budget: UniformBudget, cell: Any) -> None:
    g = Geometry(1, cell.q_heads, cell.kv_heads, cell.head_dim, cell.page_size)
    if selector.state(g) or budget.state(g):
        what = f"selector '{selector.name}'" if selector.state(g) else f"budget={cfg.budget.name}"
        raise UnsupportedModelError(
            f"speed: {what} goes by what it observed of a prompt, and the benchmark's cache is filled without one"
        )


def _device(cfg: DictConfig) -> torch.device:
    name = cfg.model.device
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if not kernels.available(device) and not cfg.task.allow_cpu:
        raise ValueError(
            "task=speed: times the kernels, which need an NVIDIA GPU of compute capability 8.0 or more, and CuPy\n"
            "  see what is missing: twilight doctor\n"
            "  try the task's own code on a CPU, which times nothing real: task.allow_cpu=true"
        )
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _read(attention: TwilightAttention, work: Any, layers: Any) -> tuple[Reading, tuple[str, ...]]:
    """Do a step of each layer once more, and return what was read and which stages were launches of their own."""
    seen: list[tuple[str, ...]] = []

    def look(step: Step) -> None:
        seen.append(() if step.one_launch else _STAGES[:1] if step.one_after_select else _STAGES)

    attention.stats.enabled, attention.observer = True, look
    for q, layer in zip(work.queries, layers, strict=True):
        attention.attend(q, layer)
    reading = Reading()
    reading.add(attention.stats.records)
    return reading, max(seen, key=len)
