"""Rotate: turn queries or keys by a number of positions, as a rotary embedding does (RoPE, arXiv 2104.09864)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


def rotate(x: torch.Tensor, positions: torch.Tensor, inv_freq: Sequence[float]) -> torch.Tensor:
    """Turn each pair of channels (c, c + n) by `positions * inv_freq[c]` radians.

    Rotations add up: a key embedded at position i and rotated by j is the key embedded at i + j. A logit depends on the
    difference of positions alone: rotating the query by -j has the same effect on it.

    Args:
        x: `[..., d]` of any floating point type.
        positions: `[...]` or broadcastable to it, int; may be negative.
        inv_freq: n numbers, at most d/2. Channels from 2n on stay as they are.

    Returns:
        `[..., d]` float32.
    """
    n = len(inv_freq)
    # In float64: a position of 10**6 has no more than 3 digits behind the point in float32.
    angles = positions.double().unsqueeze(-1) * _frequencies(tuple(inv_freq), x.device)
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second, rest = x[..., :n].float(), x[..., n : 2 * n].float(), x[..., 2 * n :].float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*turned, rest.expand(*turned[0].shape[:-1], -1)], dim=-1)


@functools.lru_cache(maxsize=64)
def _frequencies(inv_freq: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Kept: a copy from the host cannot be captured in a CUDA graph.
    return torch.tensor(inv_freq, dtype=torch.float64, device=device)
