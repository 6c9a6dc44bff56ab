"""The 4-bit copy of the keys: codes, scale and zero against the definition, packing and layout byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracles
from twilight import ops
from twilight.ops.quantize import shadow_bytes, split_shadow, unpack

OUTLIER = torch.cat([torch.randn(7, 31, generator=torch.Generator().manual_seed(1)), torch.full((7, 1), 40.0)], dim=1)
KEYS = {
    "normal": torch.randn(64, 32, generator=torch.Generator().manual_seed(0)),
    "outlier channel": OUTLIER,
    "negative only": -OUTLIER.abs() - 3,
    "positive only": OUTLIER.abs() + 3,
    "constant": torch.full((3, 32), 1.7),
    "zeros": torch.zeros(3, 32),
    "tiny range": 1e-6 * OUTLIER,
    "large mean, small range": 1000 + 0.01 * OUTLIER,
    "mean far above the range": 4097.3 + 1e-3 * OUTLIER,
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", KEYS)
def test_codes_scale_and_zero_are_those_of_the_definition(name: str, dtype: torch.dtype, bits: int) -> None:
    keys = KEYS[name].to(dtype)
    packed, params = ops.quantize(keys, bits)
    assert packed.dtype == torch.uint8 and params.dtype == torch.float16
    codes = unpack(packed, bits)
    for key, code, stored, (scale, zero) in zip(
        keys.float().numpy(), codes.tolist(), packed.tolist(), params.tolist(), strict=True
    ):
        want = oracles.quantize(key, bits)
        assert (code, scale, zero) == want
        assert bytes(stored) == oracles.pack(want[0], bits)
    read = oracles.array(ops.dequantize(packed, params, bits))
    for key, values in zip(keys.float().numpy(), read, strict=True):
        np.testing.assert_allclose(values, oracles.dequantize(key, bits), rtol=1e-6, atol=1e-6)


def test_worked_example() -> None:
    key = torch.tensor([0.31, 0.42, -0.57, 0.23, -1.79, -2.18, 1.90, 4.32])
    query = torch.tensor([1, -1, 0.5, 2, 0, 1, -0.5, 0.25])
    packed, params = ops.quantize(key)
    assert unpack(packed).tolist() == [6, 6, 4, 6, 1, 0, 9, 15]
    assert packed.tolist() == [0x16, 0x06, 0x94, 0xF6]
    assert params.tolist() == pytest.approx([0.433333, -2.18], rel=2**-11)
    read = ops.dequantize(packed, params)
    assert read.tolist() == pytest.approx([0.42, 0.42, -0.4467, 0.42, -1.7467, -2.18, 1.72, 4.32], abs=3e-3)
    assert float(query @ read) == pytest.approx(-1.3433, abs=2e-3)


@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=8, max_size=8))
def test_error_is_half_a_step_and_the_rounding_of_scale_and_zero(key: list[float]) -> None:
    packed, params = ops.quantize(torch.tensor(key))
    scale, zero = params.tolist()
    lowest = min(np.float32(key))
    rounded = abs(zero - float(lowest)) + 15 * scale * 2.0**-11
    error = np.abs(oracles.array(ops.dequantize(packed, params)) - np.float32(key).astype(np.float64))
    assert abs(zero - float(lowest)) <= max(abs(float(lowest)) * 2.0**-11, 2.0**-25)
    assert error.max() <= scale / 2 + rounded + 1e-6 * max(map(abs, key))


def test_constant_keys_survive() -> None:
    for value in (0.0, 1.5, -3.25, 1e-7, 60000.0):
        packed, params = ops.quantize(torch.full((4,), value))
        assert float(params[0]) == 2.0**-14
        torch.testing.assert_close(ops.dequantize(packed, params), torch.full((4,), value), rtol=2**-11, atol=2**-14)


def test_every_byte_packs_and_unpacks() -> None:
    every = torch.arange(256)
    # With 0 and 15 among its channels a key has zero 0 and scale 1, and its codes are itself.
    keys = torch.stack([every % 16, torch.zeros(256).long(), every // 16, torch.full((256,), 15)], dim=1)
    packed, params = ops.quantize(keys.float())
    assert packed[:, 0].tolist() == every.tolist()
    assert params.unique(dim=0).tolist() == [[1.0, 0.0]]
    assert torch.equal(unpack(packed).long(), keys)


def test_two_bits_by_hand() -> None:
    packed, params = ops.quantize(torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 0]), bits=2)
    # Byte 0 holds channels 0, 2, 4, 6: 0 + 2 * 4 + 3 * 16 + 1 * 64; byte 1 channels 1, 3, 5, 7.
    assert packed.tolist() == [8 + 48 + 64, 1 + 12 + 32 + 0]
    assert params.tolist() == [1.0, 0.0]


def test_shadow_layout_byte_by_byte() -> None:
    page_size, dim = 16, 128
    keys = torch.randn(1, 19, 2, dim)
    table = torch.tensor([[2, 1]], dtype=torch.int32)
    shadow = torch.zeros(3, 2, shadow_bytes(page_size, dim), dtype=torch.uint8)
    pages = torch.zeros(3, 2, page_size, dim)
    length = torch.tensor([19], dtype=torch.int32)
    ops.append(keys, keys, pages, pages.clone(), shadow, table, length, length)
    assert shadow.shape[-1] == 1088
    for head in range(2):
        row = keys[0, :, head].numpy()
        assert bytes(shadow[2, head].tolist()) == oracles.shadow_page(row[:16], page_size, fill=0)
        assert bytes(shadow[1, head].tolist()) == oracles.shadow_page(row[16:], page_size, fill=0)


def test_split_shadow_is_a_view() -> None:
    shadow = torch.zeros(2, 3, shadow_bytes(4, 8), dtype=torch.uint8)
    codes, params = split_shadow(shadow, 4)
    assert (codes.shape, params.shape) == ((2, 3, 4, 4), (2, 3, 4, 2))
    codes[1, 2, 3, 3] = 7
    params[0, 0, 0, 1] = 1.0  # 0x3c00
    assert shadow[1, 2, 15] == 7
    assert shadow[0, 0, 16:20].tolist() == [0, 0, 0x00, 0x3C]


def test_nan_key_reads_back_as_nan_and_touches_no_other() -> None:
    keys = torch.randn(3, 8)
    keys[1, 5] = torch.nan
    packed, params = ops.quantize(keys)
    read = ops.dequantize(packed, params)
    assert read[1].isnan().all()
    for row in (0, 2):
        np.testing.assert_allclose(oracles.array(read[row]), oracles.dequantize(keys[row].numpy()), rtol=1e-6)


def test_refuses_what_it_cannot_pack() -> None:
    with pytest.raises(ValueError, match="k: expected an even head_dim, got 7"):
        ops.quantize(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="k: expected a head_dim that is a multiple of 4, got 6"):
        ops.quantize(torch.zeros(2, 6), bits=2)
    for call in (lambda: ops.quantize(torch.zeros(2, 8), 3), lambda: ops.dequantize(*ops.quantize(torch.zeros(8)), 3)):
        with pytest.raises(ValueError, match="bits: expected 2, 4 or 8, got 3"):
            call()
    with pytest.raises(TypeError, match="k: expected dtype .*float16.* got int32"):
        ops.quantize(torch.zeros(2, 8, dtype=torch.int32))
