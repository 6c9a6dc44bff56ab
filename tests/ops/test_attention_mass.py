"""Attention mass: causal softmaxes of many queries, added up."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill
from twilight import Geometry, ops

GEOMETRY = Geometry(1, 4, 2, 4, 4, torch.float32)


def test_by_loops() -> None:
    cache, keys, _ = fill(GEOMETRY, [11, 6, 0])
    layer = cache.layers[0]
    pages = (layer.k_pages, layer.page_table, layer.seq_lens)
    q = torch.randn(3, 5, 4, 4)
    positions = torch.tensor([[0, 10, -1, 3, 7], [5, -1, -1, -1, 2], [-1] * 5])
    q[positions < 0] = torch.nan
    mass = ops.attention_mass(q, positions, *pages, max_seq_len=11, sm_scale=0.7)
    wanted = np.zeros((3, 4, 11))
    for row in range(3):
        for step in range(5):
            for head in range(4):
                seen = int(positions[row, step]) + 1
                if seen:
                    k = oracles.array(keys[0][row, :seen, head // 2])
                    wanted[row, head, :seen] += oracles.softmax(k @ oracles.array(q[row, step, head]) * 0.7)
    np.testing.assert_allclose(mass.numpy(), wanted, atol=1e-6)
    assert ops.new_positions(layer.seq_lens, torch.tensor([3, 0, 0]), 4).tolist() == [
        [8, 9, 10, -1],
        [-1] * 4,
        [-1] * 4,
    ]


def test_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("twilight.ops.attention_mass")
    cache, _, _ = fill(GEOMETRY, [11, 6])
    layer = cache.layers[0]
    q = torch.randn(2, 6, 4, 4)
    arguments = (q, ops.new_positions(layer.seq_lens, torch.tensor([6, 4]), 6), layer.k_pages, layer.page_table)
    whole = ops.attention_mass(*arguments, layer.seq_lens, max_seq_len=11)
    monkeypatch.setattr(module, "_LOGITS", 2 * 2 * 4 * 11)
    torch.testing.assert_close(ops.attention_mass(*arguments, layer.seq_lens, max_seq_len=11), whole)
    assert whole.sum(-1).tolist() == [pytest.approx([6.0] * 4), pytest.approx([4.0] * 4)]
