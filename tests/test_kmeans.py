"""K-means: Lloyd's steps by loops, and centroids that do not depend on the order of the points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from twilight.kmeans import assign, kmeans


def lloyd(points: np.ndarray, starts: list[int], iterations: int) -> np.ndarray:
    """Return the centroids of one set of points."""
    centroids = points[starts].copy()
    for _ in range(iterations):
        nearest = [int(np.argmin([((p - c) ** 2).sum() for c in centroids])) for p in points]
        for cluster in range(len(centroids)):
            mine = [p for p, label in zip(points, nearest, strict=True) if label == cluster]
            if mine:
                centroids[cluster] = np.mean(mine, axis=0)
    return centroids


@pytest.mark.parametrize("block", [None, 1, 40])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_lloyd_by_loops(scale: float, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if block:
        monkeypatch.setattr("twilight.kmeans._DISTANCES", block)
    lengths, k = [[37, 12], [50, 1]], 6
    points = scale * torch.randn(2, 2, 50, 3)
    valid = torch.arange(50) < torch.tensor(lengths).unsqueeze(-1)
    starts = torch.arange(k) * torch.tensor(lengths).unsqueeze(-1) // k
    have = kmeans(points.masked_fill(~valid.unsqueeze(-1), torch.nan), valid, starts, 5)
    for row, head in np.ndindex(2, 2):
        mine = oracles.array(points[row, head, : lengths[row][head]])
        want = lloyd(mine, starts[row, head].tolist(), 5)
        assert oracles.array(have[row, head]) == pytest.approx(want, abs=1e-5 * scale)


def test_only_clusters_that_exist_take_points() -> None:
    points, valid = torch.randn(2, 30, 4), torch.ones(2, 30, dtype=torch.bool)
    exists = torch.tensor([[True, True, False], [False, False, False]])
    starts = torch.tensor([[0, 10, 20]] * 2)
    have = kmeans(points, valid, starts, 3, exists)
    assert oracles.array(have[0, :2]) == pytest.approx(lloyd(oracles.array(points[0]), [0, 10], 3), abs=1e-5)
    assert not have[0, 2].any() and not have[1].any()
    labels = assign(points, have, exists)
    assert labels[0].max() == 1 and not labels[1].any()


def test_an_empty_cluster_stays_where_it_is() -> None:
    points = torch.tensor([[0.0, 0], [0, 0], [8, 8]])
    have = kmeans(points, torch.ones(3, dtype=torch.bool), torch.tensor([0, 1, 2]), 4)
    assert have.tolist() == [[0, 0], [0, 0], [8, 8]]
    assert assign(points, have).tolist() == [0, 0, 2]  # of equals the first


def test_the_order_of_points_changes_no_bit() -> None:
    points, valid = torch.randn(500, 8), torch.ones(500, dtype=torch.bool)
    order = torch.randperm(500)
    one = kmeans(points, valid, torch.arange(7), 6)
    other = kmeans(points[order], valid, order.argsort()[:7], 6)
    assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_each_time() -> None:
    points = torch.randn(4, 5000, 64, device="cuda", dtype=torch.bfloat16)
    valid = torch.ones(4, 5000, dtype=torch.bool, device="cuda")
    starts = (torch.arange(100, device="cuda") * 50).expand(4, -1)
    first = kmeans(points, valid, starts, 5)
    assert all(torch.equal(kmeans(points, valid, starts, 5), first) for _ in range(5))
