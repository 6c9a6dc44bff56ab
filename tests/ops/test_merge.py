"""Merging partial attention by log-sum-exp."""

from __future__ import annotations

import math

import pytest
import torch

from twilight import ops


def test_by_hand() -> None:
    # Sums of exponentials 3 and 1: weights 3/4 and 1/4, together log 4.
    outs = torch.tensor([4.0, 8.0]).view(2, 1, 1, 1)
    lses = torch.tensor([math.log(3), 0.0]).view(2, 1, 1)
    out, lse = ops.merge(outs, lses)
    assert out.item() == pytest.approx(5.0) and lse.item() == pytest.approx(math.log(4))


def test_a_part_without_tokens_adds_nothing() -> None:
    outs = torch.stack([torch.randn(2, 3, 4), torch.zeros(2, 3, 4)])
    lses = torch.stack([torch.randn(2, 3), torch.full((2, 3), -torch.inf)])
    lses[0, 1, 2] = -torch.inf
    outs[0, 1, 2] = 0
    out, lse = ops.merge(outs, lses)
    torch.testing.assert_close(out, outs[0])
    torch.testing.assert_close(lse, lses[0])
    assert lse[1, 2] == -torch.inf and (out[1, 2] == 0).all()


def test_large_masses_do_not_overflow() -> None:
    out, lse = ops.merge(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([900.0, 900.0]).view(2, 1, 1))
    assert out.item() == pytest.approx(2.0) and lse.item() == pytest.approx(900 + math.log(2))


def test_keeps_the_type_and_adds_in_float32() -> None:
    outs = torch.full((64, 1, 1, 2), 1.0, dtype=torch.bfloat16)
    out, lse = ops.merge(outs, torch.zeros(64, 1, 1))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert out.unique().tolist() == [1.0]


def test_refuses_parts_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match=r"outs: expected shape \[2, 1, 3, any\], got \[2, 1, 4, 8\]"):
        ops.merge(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 3))
