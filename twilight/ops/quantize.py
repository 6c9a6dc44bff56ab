"""The 4-bit copy of the keys: one scale and one zero a token and kv head (Twilight, section 4.2).

For one token's key of one kv head, with `min` and `max` over its d channels:

    zero  = fp16(min)
    scale = fp16(max((max - zero) / 15, 2**-14))
    code  = clamp(round((k - zero) / scale), 0, 15)      so that      k ~ scale * code + zero

Codes come from the *rounded* scale and zero, those that will be used to read them. 2**-14 is the smallest normal half:
a constant key would otherwise divide by zero, and a subnormal scale loses the bits that make it useful. Keys beyond the
range of a half, 65504, have no finite zero or scale and read back as NaN.

Layout of one (page, kv head), P*d/2 + 4*P contiguous bytes, 1088 at P=16 and d=128:

    P rows of d/2 bytes      byte j of a row holds the code of channel j (low nibble) and of channel j + d/2 (high)
    P pairs of fp16          (scale, zero) of each row

Halves rather than neighbours share a byte: masking a 32-bit word with 0x0f0f0f0f then yields the codes of four
consecutive channels, the order in which an 8-bit query lies in memory, so neither side needs a shuffle.
"""

from __future__ import annotations

import torch

from twilight.checks import FLOAT_DTYPES, check_tensor

MIN_SCALE = 2.0**-14


def shadow_bytes(page_size: int, head_dim: int) -> int:
    """Return the bytes of one page of one kv head."""
    return page_size * head_dim // 2 + 4 * page_size


def quantize(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise keys to 4 bits.

    Args:
        k: `[..., d]` of any floating point type, d even.

    Returns:
        `(codes, params)`: `[..., d/2]` uint8 packed as above, and `[..., 2]` float16 (scale, zero).
    """
    check_tensor("k", k, dtype=FLOAT_DTYPES)
    if k.shape[-1] % 2:
        raise ValueError(f"k: expected an even head_dim, got {k.shape[-1]}")
    k = k.float()
    zero = k.amin(-1, keepdim=True).half()
    # Divided by a tensor: by a number, torch multiplies with its reciprocal on a GPU, and the bytes would differ.
    spread = k.amax(-1, keepdim=True) - zero.float()
    scale = (spread / torch.full_like(spread, 15)).clamp(min=MIN_SCALE).half()
    # A NaN key has no code, and a cast of NaN to an integer is undefined: its code is 0 and its scale carries the NaN.
    codes = ((k - zero.float()) / scale.float()).round().clamp(0, 15).nan_to_num(0).to(torch.uint8)
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4), torch.cat([scale, zero], dim=-1)


def unpack(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Return the codes `[..., d]` uint8 of packed bytes `[..., d*bits/8]`."""
    return torch.cat([(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)


def dequantize(codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Return the keys `[..., d]` float32 that `codes` and `params` stand for."""
    scale, zero = params.float().unsqueeze(-2).unbind(-1)
    return unpack(codes).float() * scale + zero


def split_shadow(shadow: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """View a shadow as its two parts, without copying.

    Args:
        shadow: `[pages, Hkv, P*d/2 + 4*P]` uint8.
        page_size: P.

    Returns:
        `(codes, params)`: `[pages, Hkv, P, d/2]` uint8 and `[pages, Hkv, P, 2]` float16.
    """
    edge = shadow.shape[-1] - 4 * page_size
    codes = shadow[..., :edge].unflatten(-1, (page_size, -1))
    params = shadow[..., edge:].view(torch.float16).unflatten(-1, (page_size, 2))
    return codes, params
