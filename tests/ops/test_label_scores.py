"""Label scores: against a loop over bytes in float64, and what stays in its row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import oracles
from twilight import ops

DIM, PAGE = 24, 4


class Case:
    """Random labels in shuffled pages: any bytes are codes. Slots without a token hold what shows if it is read."""

    def __init__(self, lengths, bits, *, r=8, group=3, heads=2, dtype=torch.float32):
        rng = np.random.default_rng(0)
        self.lengths, self.bits, self.group = lengths, bits, group
        self.table = oracles.page_table(lengths, PAGE)
        shape = (int(self.table.max()) + 1, heads, PAGE)
        owned = torch.zeros(shape, dtype=torch.bool)
        for row, length in enumerate(lengths):
            for position in range(length):
                owned[int(self.table[row, position // PAGE]), :, position % PAGE] = True
        if bits is None:
            self.label = (torch.randn(*shape, r).to(dtype).masked_fill(~owned[..., None], torch.nan),)
        else:
            codes = torch.from_numpy(rng.integers(0, 256, (*shape, r * bits // 8), dtype=np.uint8))
            params = torch.randn(*shape, 2).half().masked_fill(~owned[..., None], torch.nan)
            self.label = (codes, params)
        self.channels = torch.from_numpy(np.stack([rng.permutation(DIM)[:r] for _ in range(heads)])).int()
        self.q = torch.randn(len(lengths), heads * group, DIM).to(dtype)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)

    def scores(self, **options):
        return ops.label_scores(self.q, self.label, self.channels, self.table, self.seq_lens, **options)

    def label_of(self, row, head, position):
        """Return the label of a token, channel by channel."""
        place = int(self.table[row, position // PAGE]), head, position % PAGE
        if self.bits is None:
            return oracles.array(self.label[0][place])
        scale, zero = self.label[1][place].tolist()
        stored, codes = self.label[0][place].tolist(), []
        for c in range(self.channels.shape[1]):
            byte, field = c % len(stored), c // len(stored)
            codes.append((stored[byte] // 2 ** (self.bits * field)) % 2**self.bits)
        return np.array([scale * code + zero for code in codes])


@pytest.mark.parametrize("bits", [2, 4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("r", "group"), [(8, 1), (4, 3), (24, 2)])
def test_equals_the_oracle(bits, dtype, r, group):
    case = Case([13, 0, 1, 8], bits, r=r, group=group, dtype=dtype)
    scores, lse = case.scores(with_lse=True)
    assert scores.shape == (4, 2 * group, case.table.shape[1] * PAGE) and scores.dtype == torch.float32
    for row, length in enumerate(case.lengths):
        for head in range(2 * group):
            query = oracles.array(case.q[row, head])[case.channels[head // group].tolist()]
            want = [float(query @ case.label_of(row, head // group, at)) / math.sqrt(DIM) for at in range(length)]
            assert scores[row, head, :length].tolist() == pytest.approx(want, rel=1e-5, abs=1e-5)
            assert bool((scores[row, head, length:] == -torch.inf).all())
            total = sum(math.exp(score) for score in want)
            assert float(lse[row, head]) == pytest.approx(math.log(total) if total else -math.inf, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 4, None])
def test_scores_what_the_cache_keeps_of_a_key(bits):
    # The labels as they are written, the whole way: quantised, packed, in pages.
    keys = torch.randn(3, 2, PAGE, DIM)
    case = Case([10], bits)
    case.label = ops.key_labels(keys, case.channels, bits)
    case.table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    scores, _ = case.scores(sm_scale=1.0)
    for head in range(6):
        order = case.channels[head // 3].tolist()
        for position in range(10):
            key = keys[int(case.table[0, position // PAGE]), head // 3, position % PAGE, order].numpy()
            if bits == 4:
                read, slack = oracles.dequantize(key), 1e-4
            else:  # half a step of 2 bits, and what rounding the scale to a half adds
                read, slack = key.astype(float), 1e-4 if bits is None else 0.51 * float(np.ptp(key)) / 3 + 2e-3
            query = oracles.array(case.q[0, head])[order]
            assert abs(float(scores[0, head, position]) - float(query @ read)) <= slack * max(1.0, abs(query).sum())


def test_scale_and_the_absence_of_an_lse():
    case = Case([9], 4)
    default, lse = case.scores()
    scaled, _ = case.scores(sm_scale=-0.5)
    assert lse is None
    torch.testing.assert_close(scaled[..., :9], default[..., :9] * (-0.5 * math.sqrt(DIM)))
    assert torch.equal(scaled[..., 9:], default[..., 9:])


@pytest.mark.parametrize("bits", [4, None])
def test_halves_are_clamped_and_infinite_behind_the_end_only(bits):
    case = Case([9], bits)
    exact, lse = case.scores(sm_scale=5e4, with_lse=True)
    halves, of_halves = case.scores(sm_scale=5e4, out_dtype=torch.float16, with_lse=True)
    assert halves.dtype == torch.float16 and exact[..., :9].abs().max() > 65504
    assert torch.equal(halves[..., :9], exact[..., :9].clamp(-65504, 65504).half())
    assert bool((halves[..., 9:] == -torch.inf).all()) and bool(halves[..., :9].isfinite().all())
    assert torch.equal(lse, of_halves)


@pytest.mark.parametrize("bits", [2, 4, None])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_wrong_stays_where_it_is(bits, value):
    case = Case([9, 7], bits)
    clean, clean_lse = case.scores(with_lse=True)
    case.q[0, 1, int(case.channels[0, 3])] = value
    place = int(case.table[1, 1]), 1, 2  # token 6 of the second row, the second kv head
    case.label[-1][place] = value
    dirty, lse = case.scores(with_lse=True)
    assert not dirty[0, 1, :9].isfinite().any() and not dirty[1, 3:, 6].isfinite().any()
    touched = torch.zeros_like(clean, dtype=torch.bool)
    touched[0, 1] = touched[1, 3:, 6] = True
    assert torch.equal(dirty[~touched], clean[~touched])
    heads = touched.any(-1)
    assert torch.equal(lse[~heads], clean_lse[~heads])
    assert not math.isnan(value) or bool(lse[heads].isnan().all())


def test_refuses_what_does_not_fit():
    case = Case([9], 4)
    codes, params = case.label
    for change, message in (
        ({"q": torch.zeros(1, 5, DIM)}, "q: expected a multiple of 2 heads, got 5"),
        ({"channels": case.channels[:1]}, r"label\[0\]: expected shape \[any, 1, any, any\]"),
        ({"label": (codes[..., :3], params)}, r"label\[0\]: 8 channels take 2 bytes in 2 bits and 4 in 4, not 3"),
        ({"label": (codes, params[:, :, :2])}, r"label\[1\]: expected shape"),
        ({"label": (codes, params, params)}, r"label: expected \(labels,\) or \(codes, params\), got 3 tensors"),
        ({"label": (torch.zeros(4, 2, PAGE, 7),)}, r"label\[0\]: expected shape \[any, 2, any, 8\]"),
        ({"page_table": case.table.repeat(2, 1)}, r"page_table: expected shape \[1, any\]"),
    ):
        for name, value in change.items():
            other = Case([9], 4)
            setattr(other, {"page_table": "table"}.get(name, name), value)
            with pytest.raises(ValueError, match=message):
                other.scores()
    with pytest.raises(TypeError, match="out_dtype: expected float32 or float16, got torch.bfloat16"):
        case.scores(out_dtype=torch.bfloat16)
    case.channels = case.channels.long()
    with pytest.raises(TypeError, match="channels: expected dtype int32, got int64"):
        case.scores()
