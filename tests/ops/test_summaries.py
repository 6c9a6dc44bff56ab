"""Summaries: what is kept about a page's keys, against loops in numpy, bit for bit."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests import oracles
from twilight import ops

PAGE, HEADS, DIM = 16, 2, 8


def _pages(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys of very different size, so that the order of a sum shows, and how full the pages are."""
    keys = torch.randn(40, HEADS, PAGE, DIM) * 10 ** torch.empty(40, HEADS, PAGE, DIM).uniform_(-3, 3)
    valid = torch.arange(PAGE) < torch.randint(1, PAGE + 1, (40, 1))
    return keys.masked_fill(~valid[:, None, :, None], 0).to(dtype), valid


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_mean_is_a_sum_in_the_order_of_the_slots(dtype: torch.dtype, bits: int | None) -> None:
    keys, valid = _pages(dtype)
    found = ops.page_means(keys, valid, bits)
    for page, head in np.ndindex(40, HEADS):
        mean = oracles.mean(keys[page, head, : int(valid[page].sum())].float().numpy())
        if bits is None:
            assert found[0].dtype == dtype
            assert torch.equal(found[0][page, head], torch.tensor(mean).to(dtype))
        else:
            codes, scale, zero = oracles.quantize(mean, 8)
            assert found[0][page, head].tolist() == codes
            assert found[1][page, head].tolist() == [scale, zero]


def test_a_mean_depends_on_that_order() -> None:
    # Otherwise the test above would prove nothing.
    keys, valid = _pages(torch.float32)
    backwards = ops.page_means(keys.flip(2), valid.flip(1))[0]
    assert not torch.equal(backwards, ops.page_means(keys, valid)[0])


@pytest.mark.parametrize("bits", [None, 8])
def test_bounds_are_those_of_the_filled_slots(bits: int | None) -> None:
    keys, valid = _pages(torch.bfloat16)
    found = ops.page_bounds(keys, valid, bits)
    high, low = found if bits is None else ops.dequantize_bounds(*found)
    for page, head in np.ndindex(40, HEADS):
        mine = oracles.array(keys[page, head, : int(valid[page].sum())])
        if bits is None:
            assert np.array_equal(oracles.array(high[page, head]), mine.max(0))
            assert np.array_equal(oracles.array(low[page, head]), mine.min(0))
        else:
            step = (mine.max() - mine.min()) / 255 * 1.01 + 2.0**-14 + 2.0**-9 * np.abs(mine).max()
            assert ((high[page, head].numpy() >= mine.max(0)) & (high[page, head].numpy() <= mine.max(0) + step)).all()
            assert ((low[page, head].numpy() <= mine.min(0)) & (low[page, head].numpy() >= mine.min(0) - step)).all()


@pytest.mark.parametrize("bits", [None, 2, 4])
def test_a_label_is_some_channels_of_its_own_head(bits: int | None) -> None:
    keys, _ = _pages(torch.bfloat16)
    channels = torch.tensor([[3, 0, 7, 1], [6, 2, 5, 4]], dtype=torch.int32)
    found = ops.key_labels(keys, channels, bits)
    assert found[0].shape == (40, HEADS, PAGE, 4 if bits is None else bits // 2)
    for page, head, slot in np.ndindex(40, HEADS, PAGE):
        label = keys[page, head, slot][channels[head].long()]
        if bits is None:
            assert torch.equal(found[0][page, head, slot], label)
        else:
            codes, scale, zero = oracles.quantize(label.float().numpy(), bits)
            assert bytes(found[0][page, head, slot].tolist()) == oracles.pack(codes, bits)
            assert found[1][page, head, slot].tolist() == [scale, zero]


PAGES = torch.zeros(5, HEADS, PAGE, DIM, dtype=torch.bfloat16)
CODES, PARAMS = torch.zeros(5, HEADS, DIM, dtype=torch.uint8), torch.zeros(5, HEADS, 2, dtype=torch.float16)
NATIVE = torch.zeros(5, HEADS, DIM, dtype=torch.bfloat16)
LABEL = torch.zeros(5, HEADS, PAGE, 2, dtype=torch.uint8)
ORDER = torch.zeros(HEADS, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (("median", (NATIVE,)), ValueError, "rule: expected 'bounds', 'mean', 'label', got 'median'"),
        (("mean", ()), ValueError, "mean: expected 1 tensor, got 0"),
        (("mean", (CODES,)), ValueError, "mean: expected 2 tensors, got 1"),
        (("bounds", (NATIVE,)), ValueError, "bounds: expected 2 tensors, got 1"),
        (("mean", (NATIVE,), ORDER), ValueError, "channels: for labels only, the rule is 'mean'"),
        (("label", (NATIVE,)), ValueError, "channels: labels need them"),
        (
            ("label", (LABEL[..., :0], LABEL), ORDER),
            ValueError,
            "label[0]: expected 1 or 2 bytes, 4 channels in 2 or",
        ),
        (("bounds", (CODES, PARAMS)), ValueError, "bounds[0]: expected shape [5, 2, 16], got [5, 2, 8]"),
        (("mean", (CODES, PARAMS.float())), TypeError, "mean[1]: expected dtype float16, got float32"),
        (("mean", (NATIVE.float(),)), TypeError, "mean[0]: expected dtype bfloat16, got float32"),
        (("bounds", (NATIVE, NATIVE[:3])), ValueError, "bounds[1]: expected shape [5, 2, 8], got [3, 2, 8]"),
        (("label", (LABEL, PARAMS), ORDER), ValueError, "label[1]: expected shape [5, 2, 16, 2], got [5, 2, 2]"),
        (("label", (LABEL, PARAMS), ORDER.long()), TypeError, "channels: expected dtype int32, got int64"),
        (("label", (LABEL, PARAMS), ORDER[:1]), ValueError, "channels: expected shape [2, any], got [1, 4]"),
        (("label", (NATIVE,), ORDER[:, :0]), ValueError, "channels: expected 1 to head_dim=8 of them, got 0"),
        (("label", (NATIVE,), ORDER.repeat(1, 3)), ValueError, "channels: expected 1 to head_dim=8 of them, got 12"),
    ],
)
def test_refuses_tensors_of_another_rule(parts: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.Summary(*parts).check(PAGES)


@pytest.mark.parametrize(
    ("parts", "bits"),
    [
        (("bounds", (NATIVE, NATIVE)), None),
        (("bounds", (torch.cat([CODES, CODES], -1), PARAMS)), 8),
        (("mean", (NATIVE,)), None),
        (("mean", (CODES, PARAMS)), 8),
        (("label", (LABEL, torch.zeros(5, HEADS, PAGE, 2, dtype=torch.float16)), ORDER), 4),
        (("label", (LABEL[..., :1], torch.zeros(5, HEADS, PAGE, 2, dtype=torch.float16)), ORDER), 2),
        (("label", (torch.zeros(5, HEADS, PAGE, 4, dtype=torch.bfloat16),), ORDER), None),
    ],
)
def test_the_width_of_codes_is_read_from_the_tensors(parts: tuple, bits: int | None) -> None:
    summary = ops.Summary(*parts)
    summary.check(PAGES)
    assert summary.bits == bits
