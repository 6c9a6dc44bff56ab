"""K-means over the keys of a prompt: what clusters and codebooks are made of."""

from __future__ import annotations

import torch

_DISTANCES = 1 << 25
"""Distances held at a time: 128 MB."""


def assign(points: torch.Tensor, centroids: torch.Tensor, exists: torch.Tensor | None = None) -> torch.Tensor:
    """Return the nearest centroid of each point, by Euclidean distance; of equals the first.

    Args:
        points: `[..., n, d]`.
        centroids: `[..., k, d]`.
        exists: `[..., k]` bool, centroids that count; all by default, and if none does the first is returned.

    Returns:
        `[..., n]` int64.
    """
    centroids = centroids.float()
    half = (centroids**2).sum(-1) / 2
    if exists is not None:
        half = half.masked_fill(~exists, torch.inf)
    block = max(1, _DISTANCES // max(1, half.numel()))
    # |p - c|^2 = |p|^2 - 2 (p.c - |c|^2 / 2): the nearest has the largest difference.
    near = [
        (part.float() @ centroids.mT - half.unsqueeze(-2)).argmax(-1) for part in points.split(block, dim=-2)
    ]  # fmt: skip
    return torch.cat(near, dim=-1)


def kmeans(
    points: torch.Tensor,
    valid: torch.Tensor,
    starts: torch.Tensor,
    iterations: int,
    exists: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move centroids to the means of the points nearest to them (Lloyd), a fixed number of times.

    Sums are taken in integers, so that they do not depend on the order in which a GPU adds: the same points give the
    same centroids, bit for bit. A centroid without points stays where it is.

    Args:
        points: `[..., n, d]`, finite where valid.
        valid: `[..., n]` bool, points that count.
        starts: `[..., k]` int64, the points that the centroids start from.
        iterations: how often they move.
        exists: `[..., k]` bool, centroids that count; all by default.

    Returns:
        `[..., k, d]` float32; zeros where a centroid does not exist.
    """
    clusters, dim = starts.shape[-1], points.shape[-1]
    points = points.masked_fill(~valid.unsqueeze(-1), 0)
    centroids = points.gather(-2, starts.unsqueeze(-1).expand(*starts.shape, dim)).float()
    if exists is not None:
        centroids = centroids.masked_fill(~exists.unsqueeze(-1), 0)
    # The largest number of each set takes 40 bits, so that a million of them fit 63.
    largest = points.abs().amax((-1, -2), keepdim=True).double().clamp(min=2.0**-100)
    scale = 2.0 ** (40 - largest.log2().ceil())
    block = max(1, _DISTANCES // max(1, points[..., :1, :].numel()))
    for _ in range(iterations):
        # Points that do not count go to a cluster behind the last.
        labels = assign(points, centroids, exists).masked_fill(~valid, clusters)
        sums = torch.zeros(*starts.shape[:-1], clusters + 1, dim, dtype=torch.int64, device=points.device)
        counts = torch.zeros(*starts.shape[:-1], clusters + 1, dtype=torch.int64, device=points.device)
        counts.scatter_add_(-1, labels, torch.ones_like(labels))
        for part, label in zip(points.split(block, dim=-2), labels.split(block, dim=-1), strict=True):
            whole = (part.double() * scale).round().long()
            sums.scatter_add_(-2, label.unsqueeze(-1).expand_as(whole), whole)
        sums, counts = sums[..., :clusters, :], counts[..., :clusters].unsqueeze(-1)
        means = (sums.double() / scale / counts.clamp(min=1)).float()
        moves = counts > 0 if exists is None else (counts > 0) & exists.unsqueeze(-1)
        centroids = torch.where(moves, means, centroids)
    return centroids
