"""Argument checks. They run before any work, and name the argument, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | None] | None = None,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return `value` if it is a tensor of that shape, dtype and device.

    Args:
        name: the argument's name, for the message.
        value: what came.
        shape: expected sizes; None in a place allows any.
        dtype: one dtype, or several of which any will do.
        device: expected device.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if shape is not None and not _same_shape(value.shape, shape):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(value.shape)}")
    if dtype is not None and value.dtype is not dtype:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if value.dtype not in allowed:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(f"{name}: expected dtype {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device and not _same_device(value.device, device):
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    return value


def _same_shape(have: torch.Size, wanted: Sequence[int | None]) -> bool:
    if len(have) != len(wanted):
        return False
    # all() over a generator takes twice as long, and a decode step checks some twenty tensors a layer.
    for size, want in zip(have, wanted, strict=True):  # noqa: SIM110
        if want is not None and size != want:
            return False
    return True


def _same_device(one: torch.device, other: torch.device) -> bool:
    # torch.device("cuda") is not equal to the torch.device("cuda:0") of the tensors made on it.
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


def check_positive(name: str, value: object) -> int:
    """Return `value` if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def check_p(p: object) -> float:
    """Return `p` as a float if it is a mass in (0, 1]."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p: expected a float in (0, 1], got {type(p).__name__}")
    if math.isnan(p) or not 0.0 < p <= 1.0:
        raise ValueError(f"p: expected a float in (0, 1], got {p}")
    return float(p)
