"""Result files: JSON with what was measured, on what, and a list of cells.

Several calls build one file: a cell replaces the one that was measured with the same sizes. A file speaks of one GPU,
one set of versions and one state of the kernels; results of another go to a file beside it.
"""

from __future__ import annotations

import json
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from twilight import __version__, kernels, resources

IDENTITY = ("batch", "length", "q_heads", "kv_heads", "head_dim", "page_size", "p", "model", "compiled")
"""Fields of a cell that tell it from others; those it has not are left out."""
_ORDER = ("kv_heads", "batch", "length", "head_dim", "page_size", "p")
_HEADER = ("benchmark", "gpu", "versions", "raw_kernels")


def header(benchmark: str, device: torch.device) -> dict[str, Any]:
    """Return what all results of a file have in common.

    Args:
        benchmark: ``"decode"``, ``"model"`` or ``"launch"``.
        device: where it ran.
    """
    versions = {"twilight": __version__, "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for name, distributions in (("cupy", ("cupy-cuda13x", "cupy-cuda12x")), ("flashinfer", ("flashinfer-python",))):
        found = [version for version in map(_version, distributions) if version]
        versions[name] = found[0] if found else "none"
    return {
        "benchmark": benchmark,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions,
        "raw_kernels": kernels.source_hash(),
    }


def default_path(head: dict[str, Any]) -> Path:
    """Return where results go by default: ``benchmarks/results`` of a checkout, or the current folder."""
    root = resources.checkout()
    folder = root / "benchmarks" / "results" if root else Path()
    return folder / f"{head['benchmark']}-{head['gpu'].replace(' ', '-').lower()}.json"


class Results:
    """A result file that cells are added to, and that is written after each of them.

    Args:
        path: the file. If one is there that speaks of something else, one beside it is taken, named after the kernels.
        head: from `header`.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.data = _open(path, head)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def has(self, identity: dict[str, Any]) -> bool:
        """Return whether the file has a cell of this identity."""
        return any(_identity(cell) == identity for cell in self.data["cells"])

    def add(self, cell: dict[str, Any]) -> None:
        """Add a cell or replace it, and write the file."""
        new = cell | {"date": time.strftime("%Y-%m-%d")}
        others = [old for old in self.data["cells"] if _identity(old) != _identity(new)]
        self.data["cells"] = sorted([*others, new], key=lambda each: [each[field] for field in _ORDER])
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def load(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not JSON ({error})") from error
    if not (isinstance(data, dict) and isinstance(data.get("cells"), list) and set(_HEADER) <= set(data)):
        raise ValueError(f"'{path}' holds no results of a benchmark\n  make some: twilight bench --out {path}")
    return data


def _open(path: Path, head: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    name = f"{path.stem}-{head['raw_kernels'][:8]}"
    candidates = [path, path.with_stem(name), *(path.with_stem(f"{name}-{n}") for n in range(2, 1000))]
    for candidate in candidates:
        if not candidate.exists():
            return candidate, {**head, "cells": []}
        data = load(candidate)
        if all(data[field] == head[field] for field in _HEADER):
            return candidate, data
    raise ValueError(f"--out: '{path}' and 1000 files beside it speak of other GPUs, versions or kernels")


def _identity(cell: dict[str, Any]) -> dict[str, Any]:
    return {field: cell[field] for field in IDENTITY if field in cell}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
