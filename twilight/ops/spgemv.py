"""SpGEMV: estimate the logits of the candidates from the 4-bit keys (Twilight, section 4.2)."""

from __future__ import annotations

import ctypes
import functools
from typing import Literal

import torch

from twilight import kernels
from twilight.checks import FLOAT_DTYPES, check_tensor
from twilight.ops.paging import gather_tokens
from twilight.ops.quantize import split_shadow, unpack
from twilight.selection import Selection

_DIMS = (64, 128, 256)
_BLOCKS_PER_SM = 4
_WARPS = 4


class SpgemvParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/spgemv.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "q", "shadow", "page_table", "seq_lens", "indices", "lengths", "log_weight", "out"
        )),
        ("sm_scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "q_is_bf16", "rows", "kv_heads", "group", "capacity", "max_pages", "page_shift", "granularity_shift",
            "even",
        )),
    ]  # fmt: skip


STRUCTS = (SpgemvParams,)
INSTANTIATIONS = tuple(
    f"spgemv<{out}, {dim}, {tiles}, {page}>"
    for out in ("float", "half") for dim in _DIMS for tiles in (1, 2, 4) for page in (0, 16, 32)
)  # fmt: skip


def estimate_scores(
    q: torch.Tensor,
    shadow: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    candidates: Selection,
    *,
    page_size: int,
    sm_scale: float | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> torch.Tensor:
    """Estimate `q . k * sm_scale` for every candidate, for every query head of its group.

    With codes c, scale s and zero z of a key, `q . k ~ s * sum(q_i * c_i) + z * sum(q_i)`: the second sum is taken once
    a query, and the keys are never written out.

    Args:
        q: `[b, Hq, d]`.
        shadow: `[pages, Hkv, P*d/2 + 4*P]` uint8.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        candidates: tokens or pages, rows for Hkv heads. Its `log_weight` is added.
        page_size: P.
        sm_scale: the factor of the logits, 1/sqrt(d) by default.
        out_dtype: float32, or float16, which halves what is written; finite logits are then clamped to +-65504.
        backend: which implementation. The kernel takes half and bfloat16 queries, d of 64, 128 or 256, groups of up to
            16 and pages of a power of two tokens, at least 4. It reads the query as two 8-bit numbers, 16 bits in all.

    Returns:
        `[b, Hq, capacity * granularity]` of `out_dtype`, `-inf` past a row's end.

    Raises:
        TypeError, ValueError: shapes and types that do not fit together.
    """
    check_tensor("q", q, (seq_lens.shape[0], None, None), dtype=FLOAT_DTYPES)
    num_kv_heads, head_dim = shadow.shape[1], q.shape[-1]
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"q: expected a multiple of {num_kv_heads} heads, got {q.shape[1]}")
    check_tensor("shadow", shadow, (None, None, page_size * head_dim // 2 + 4 * page_size), dtype=torch.uint8)
    candidates.check_fits("candidates", seq_lens.shape[0], q.shape[1], num_kv_heads)
    if out_dtype not in (torch.float32, torch.float16):
        raise TypeError(f"out_dtype: expected float32 or float16, got {out_dtype}")
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    if kernels.use_kernel(backend, q.device, _unsupported(q, shadow, candidates, page_size)):
        return _cuda(q, shadow, page_table, seq_lens, candidates, page_size, scale, out_dtype)
    return _torch(q, shadow, page_table, seq_lens, candidates, page_size, scale, out_dtype)


def _torch(
    q: torch.Tensor,
    shadow: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    candidates: Selection,
    page_size: int,
    sm_scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    positions, valid = candidates.positions(seq_lens)
    codes, params = (gather_tokens(part, positions, page_table, page_size) for part in split_shadow(shadow, page_size))
    grouped = q.float().unflatten(1, (shadow.shape[1], -1))
    scale, zero = params.float().unsqueeze(2).unbind(-1)
    dots = grouped @ unpack(codes).float().transpose(-1, -2)
    logits = (scale * dots + zero * grouped.sum(-1, keepdim=True)) * sm_scale
    log_weight = candidates.token_log_weight()
    if log_weight is not None:
        logits = logits + log_weight.unflatten(1, (shadow.shape[1], -1))
    # Masked last: what lies behind a row's end may be anything, the log_weight there too.
    logits = logits.masked_fill(~valid.unsqueeze(2), -torch.inf).flatten(1, 2)
    if out_dtype == torch.float16:
        logits = torch.where(logits.isfinite(), logits.clamp(-65504, 65504), logits)
    return logits.to(out_dtype)


def _unsupported(q: torch.Tensor, shadow: torch.Tensor, candidates: Selection, page_size: int) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}; the kernel reads float16 and bfloat16"
    if q.shape[-1] not in _DIMS:
        return f"head_dim is {q.shape[-1]}; the kernel is made for {', '.join(map(str, _DIMS))}"
    if q.shape[1] // shadow.shape[1] > 16:
        return f"a group has {q.shape[1] // shadow.shape[1]} query heads; the kernel takes up to 16"
    if page_size < 4 or page_size & (page_size - 1) or candidates.granularity not in (1, page_size):
        return f"page_size is {page_size}, granularity {candidates.granularity}; the kernel needs powers of two from 4"
    if not shadow.is_contiguous():
        return "the shadow is not contiguous"
    return None


def _cuda(
    q: torch.Tensor,
    shadow: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    candidates: Selection,
    page_size: int,
    sm_scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    b, q_heads, dim = q.shape
    kv_heads = shadow.shape[1]
    group, granularity = q_heads // kv_heads, candidates.granularity
    slots = candidates.capacity * granularity
    out = torch.empty((b, q_heads, slots), dtype=out_dtype, device=q.device)
    # Kept until the launch: a copy made here must not be freed and reused before the kernel is in the stream.
    q, page_table, seq_lens = q.contiguous(), page_table.contiguous(), seq_lens.contiguous()
    indices, lengths = candidates.indices.contiguous(), candidates.lengths.contiguous()
    log_weight = None if candidates.log_weight is None else candidates.log_weight.contiguous()
    tiles = -(-slots // 16)
    # What fits the GPU at once; a warp for every tile if there are fewer.
    blocks = min(kernels.num_sms(q.get_device()) * _BLOCKS_PER_SM, -(-b * kv_heads * tiles // _WARPS))
    # Tiles of whole pages have no weights: the way that locates tokens one by one has.
    whole = granularity == page_size and page_size in (16, 32) and log_weight is None
    paged = page_size if whole else 0
    kernel = _kernel(out_dtype, dim, group, paged, q.get_device())
    params = SpgemvParams(
        q.data_ptr(), shadow.data_ptr(), page_table.data_ptr(), seq_lens.data_ptr(), indices.data_ptr(),
        lengths.data_ptr(), None if log_weight is None else log_weight.data_ptr(), out.data_ptr(),
        sm_scale, q.dtype == torch.bfloat16, b * kv_heads, kv_heads, group, candidates.capacity, page_table.shape[1],
        page_size.bit_length() - 1, granularity.bit_length() - 1, b == 1,
    )  # fmt: skip
    kernel.launch((blocks, 1, 1), (32 * _WARPS, 1, 1), params)
    return out


@functools.cache
def _kernel(out_dtype: torch.dtype, dim: int, group: int, paged: int, device: int) -> kernels.Kernel:
    kind = "half" if out_dtype == torch.float16 else "float"
    tiles = 1 if group <= 4 else 2 if group <= 8 else 4
    return kernels.load("spgemv", f"spgemv<{kind}, {dim}, {tiles}, {paged}>", device=device)
