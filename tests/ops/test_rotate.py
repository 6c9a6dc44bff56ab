"""Rotate: what a rotary embedding does, by complex numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from twilight import ops

FREQUENCIES = (1.0, 0.25, 0.01)


@pytest.mark.parametrize("dim", [6, 10])
def test_pairs_turn_as_complex_numbers_do_and_the_rest_stays(dim: int) -> None:
    x = torch.randn(2, 3, dim)
    positions = torch.tensor([[0, 1, 1_000_003], [-7, 12, 5]])
    turned = oracles.array(ops.rotate(x, positions, FREQUENCIES))
    for row in range(2):
        for column in range(3):
            given = oracles.array(x[row, column])
            pairs = given[:3] + 1j * given[3:6]
            pairs = pairs * np.exp(1j * int(positions[row, column]) * np.array(FREQUENCIES))
            wanted = np.concatenate([pairs.real, pairs.imag, given[6:]])
            np.testing.assert_allclose(turned[row, column], wanted, atol=2e-6)


def test_a_logit_depends_on_the_difference_of_positions() -> None:
    q, k = torch.randn(2, 6)
    logits = [
        float(ops.rotate(q, torch.tensor(at + 40), FREQUENCIES) @ ops.rotate(k, torch.tensor(at), FREQUENCIES))
        for at in (0, 3, 1000)
    ]
    moved = ops.rotate(ops.rotate(q, torch.tensor(90), FREQUENCIES), torch.tensor(-50), FREQUENCIES)
    assert [*logits, float(moved @ k)] == pytest.approx([logits[0]] * 4, abs=1e-5)
