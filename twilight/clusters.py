"""Launching thread block clusters whose size is known at the launch only, which CuPy's driver bindings do not offer.

`cuLaunchKernelEx` of the CUDA driver, called directly; the structs are those of cuda.h, unchanged since CUDA 12.0.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_CLUSTER_DIMENSION = 4
"""CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION."""
_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14
"""CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "smem")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: {(text.value or b'unknown error').decode()} (CUDA driver error {status})")


@functools.cache
def _attribute(cluster: int) -> Any:
    attribute = _Attribute(_CLUSTER_DIMENSION)
    attribute.value[0], attribute.value[1], attribute.value[2] = cluster, 1, 1
    return ctypes.pointer(attribute)


def _config(grid: tuple[int, int, int], block: tuple[int, int, int], smem: int, stream: int, cluster: int) -> _Config:
    return _Config(*grid, *block, smem, stream, _attribute(cluster), 1)


def launch(
    function: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    smem: int,
    stream: int,
    params: ctypes.c_void_p,
    cluster: int,
) -> None:
    """Launch `function` in clusters of `cluster` blocks along x; `params` points to its one parameter."""
    config = _config(grid, block, smem, stream, cluster)
    status = _driver().cuLaunchKernelEx(
        ctypes.byref(config), ctypes.c_void_p(function), ctypes.byref(params), None
    )  # fmt: skip
    _check(status, f"launch of {grid} blocks in clusters of {cluster}")


def allow_large(function: int) -> None:
    """Let launches of `function` ask for more than 8 blocks a cluster."""
    status = _driver().cuFuncSetAttribute(ctypes.c_void_p(function), _NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    _check(status, "clusters of more than 8 blocks")


def max_active(function: int, threads: int, smem: int, cluster: int) -> int:
    """Return how many clusters of `cluster` blocks fit the GPU at once."""
    found = ctypes.c_int()
    config = _config((cluster, 1, 1), (threads, 1, 1), smem, 0, cluster)
    status = _driver().cuOccupancyMaxActiveClusters(
        ctypes.byref(found), ctypes.c_void_p(function), ctypes.byref(config)
    )
    _check(status, f"occupancy of clusters of {cluster}")
    return found.value
