"""Page scores: the 8-bit bounds, against their definition in numpy, and the products with bounds and with means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from twilight import ops
from twilight.ops.page_scores import _next_half


def _round(value: float, towards: float) -> np.float16:
    """Round to half towards an infinity, by trying."""
    nearest = np.float16(value)
    wrong = float(nearest) < value if towards > 0 else float(nearest) > value
    return np.nextafter(nearest, np.float16(towards)) if wrong else nearest


def _codes(high: np.ndarray, low: np.ndarray) -> tuple[list[int], list[int], float, float]:
    """Return (codes of the maxima, codes of the minima, scale, zero) of one page, in exact arithmetic."""
    zero = float(_round(low.min(), -np.inf))
    scale = float(_round(max((high.max() - zero) / 255, 2.0**-14), np.inf))
    up = [min(255, max(0, int(np.ceil((value - zero) / scale)))) for value in high]
    down = [min(255, max(0, int(np.floor((value - zero) / scale)))) for value in low]
    return up, down, scale, zero


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1.0, 50.0])
def test_8_bit_bounds_follow_the_definition(dtype: torch.dtype, size: float) -> None:
    keys = (torch.randn(20, 16, 8) * size + size * torch.randn(8)).to(dtype)
    page_max, page_min = keys.amax(1), keys.amin(1)
    codes, params = ops.quantize_bounds(page_max, page_min)
    assert codes.shape == (20, 16) and codes.dtype == torch.uint8
    assert params.shape == (20, 2) and params.dtype == torch.float16
    for page, high, low in zip(range(20), page_max, page_min, strict=True):
        up, down, scale, zero = _codes(oracles.array(high), oracles.array(low))
        assert params[page].tolist() == [scale, zero]
        # Rounding in float32 may cost one code, to the safe side.
        for got, want in zip(codes[page, :8].tolist(), up, strict=True):
            assert got - want in (0, 1)
        for got, want in zip(codes[page, 8:].tolist(), down, strict=True):
            assert want - got in (0, 1)


@pytest.mark.parametrize("seed", range(40))
def test_bounds_hold(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** float(torch.empty(()).uniform_(-6, 4, generator=generator))
    keys = torch.randn(64, 16, 32, generator=generator) * size + size * 3 * torch.randn(32, generator=generator)
    keys = keys.clamp(-6e4, 6e4).to([torch.float16, torch.bfloat16, torch.float32][seed % 3])
    page_max, page_min = keys.amax(1), keys.amin(1)
    high, low = ops.dequantize_bounds(*ops.quantize_bounds(page_max, page_min))
    assert bool((high >= page_max.float()).all()) and bool((low <= page_min.float()).all())
    step = (page_max.float().amax(-1, keepdim=True) - page_min.float().amin(-1, keepdim=True)) / 255 + 2.0**-14
    # Zero and scale are halves: another 2**-10 of either.
    slack = 1.01 * step + 2.0**-9 * keys.float().abs().amax((1, 2))[:, None]
    assert bool((high - page_max.float() <= slack).all()) and bool((page_min.float() - low <= slack).all())


def test_constant_and_nan_pages() -> None:
    high, low = ops.dequantize_bounds(*ops.quantize_bounds(torch.full((1, 4), 3.0), torch.full((1, 4), 3.0)))
    assert torch.equal(high, torch.full((1, 4), 3.0)) and torch.equal(low, high)
    quantized = ops.quantize_bounds(torch.tensor([[1.0, torch.nan]]), torch.tensor([[0.0, torch.nan]]))
    assert ops.dequantize_bounds(*quantized)[0].isnan().all()


def test_next_half_is_numpys() -> None:
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.abs() < 65504]
    for up, towards in ((True, np.inf), (False, -np.inf)):
        assert np.array_equal(_next_half(halves, up=up).numpy(), np.nextafter(halves.numpy(), np.float16(towards)))


def test_scores_of_8_bit_bounds_are_those_of_what_they_stand_for() -> None:
    page_max = torch.randn(6, 2, 8)
    page_min = page_max - torch.rand(6, 2, 8)
    quantized = ops.quantize_bounds(page_max, page_min)
    q = torch.randn(2, 4, 8)
    table = torch.tensor([[1, 3, 5], [2, 0, 0]], dtype=torch.int32)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    got = ops.page_scores(q, quantized, table, lengths, page_size=4)
    want = ops.page_scores(q, ops.dequantize_bounds(*quantized), table, lengths, page_size=4)
    torch.testing.assert_close(got, want)
    for row, head, page in np.ndindex(2, 4, 3):
        if page * 4 >= int(lengths[row]):
            assert float(got[row, head, page]) == -np.inf
            continue
        high, low = (part[int(table[row, page]), head // 2] for part in ops.dequantize_bounds(*quantized))
        exact = float(torch.maximum(q[row, head] * high, q[row, head] * low).sum())
        assert float(got[row, head, page]) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("bits", [8, None])
def test_a_mean_scores_by_the_mean_of_the_logits(bits: int | None) -> None:
    lengths, page_size = [9, 4, 0], 4
    keys = torch.randn(3, 9, 2, 8)
    table = oracles.page_table(lengths, page_size)
    pages = oracles.lay_out(keys, lengths, table, page_size)
    vectors: list[torch.Tensor] = [torch.full((len(pages), 2, 8), torch.nan)]
    if bits:
        vectors = [
            torch.full((len(pages), 2, 8), 7, dtype=torch.uint8),
            torch.full((len(pages), 2, 2), torch.nan).half(),
        ]
    for row, length in enumerate(lengths):
        for logical in range(-(-length // page_size)):
            page, end = int(table[row, logical]), min(length, (logical + 1) * page_size)
            for head in range(2):
                mean = oracles.mean(keys[row, logical * page_size : end, head].numpy())
                if bits:
                    codes, scale, zero = oracles.quantize(mean, bits)
                    vectors[0][page, head] = torch.tensor(codes)
                    vectors[1][page, head] = torch.tensor([scale, zero])
                else:
                    vectors[0][page, head] = torch.tensor(mean)
    q = torch.randn(3, 4, 8)
    got = ops.page_scores(q, vectors, table, torch.tensor(lengths, dtype=torch.int32), page_size=page_size)
    assert got.shape == (3, 4, 3) and got.dtype == torch.float32
    for row, head, logical in np.ndindex(3, 4, 3):
        mine = keys[row, logical * page_size : min(lengths[row], (logical + 1) * page_size), head // 2]
        if not len(mine):
            assert float(got[row, head, logical]) == -np.inf
            continue
        logits = oracles.array(mine) @ oracles.array(q[row, head])
        # A step of a mean in 8 bits is about 3 / 255; half of one in each of 8 channels.
        slack = 1e-5 if bits is None else float(q[row, head].abs().sum()) * 0.01
        assert float(got[row, head, logical]) == pytest.approx(logits.mean(), abs=slack)


def test_refuses_what_does_not_fit() -> None:
    q, table, lengths = torch.randn(1, 2, 8), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    codes, params = torch.zeros(1, 1, 16, dtype=torch.uint8), torch.zeros(1, 1, 2, dtype=torch.float16)
    for few in ((), (codes,), (codes, params, params)):
        with pytest.raises(
            ValueError, match=rf"vectors: expected .means,., .page_max, page_min. or .*got {len(few)} t"
        ):
            ops.page_scores(q, few, table, lengths, page_size=4)
    with pytest.raises(ValueError, match=r"vectors\[0\]: expected shape \[any, any, 16\]"):
        ops.page_scores(q, (codes[..., :9], params), table, lengths, page_size=4)
    with pytest.raises(ValueError, match=r"vectors\[0\]: expected shape \[any, any, 8\]"):
        ops.page_scores(q, (torch.zeros(1, 1, 9),), table, lengths, page_size=4)
    with pytest.raises(ValueError, match=r"vectors\[1\]: expected shape \[1, 1, 2\]"):
        ops.page_scores(q, (codes, params[..., :1]), table, lengths, page_size=4)
    with pytest.raises(ValueError, match="backend: 'cuda' needs CUDA tensors"):
        ops.page_scores(q, (codes, params), table, lengths, page_size=4, backend="cuda")
