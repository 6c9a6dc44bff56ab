"""Append: write new tokens' K, V and 4-bit keys into their pages, and the bounds of the pages they touch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal

import torch

from twilight import kernels
from twilight.ops.page_scores import quantize_bounds
from twilight.ops.paging import locate
from twilight.ops.quantize import quantize, split_shadow
from twilight.pages import NULL_PAGE

_DIMS = (64, 128, 256)
_HALVES = {torch.float16: "half", torch.bfloat16: "bf16"}
_WARPS = 4


class AppendParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/append.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "k", "v", "k_pages", "v_pages", "shadow", "page_table", "seq_lens", "new_tokens", "high", "low"
        )),
        ("k_strides", ctypes.c_longlong * 3),
        ("v_strides", ctypes.c_longlong * 3),
        *((name, ctypes.c_int) for name in ("batch", "kv_heads", "max_pages", "page_size", "pages_per_row")),
    ]  # fmt: skip


STRUCTS = (AppendParams,)
INSTANTIATIONS = tuple(
    f"append<{kind}, {dim}, {bounds}>" for kind in _HALVES.values() for dim in _DIMS for bounds in (0, 1, 2)
)


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    new_tokens: torch.Tensor,
    *,
    bounds: Sequence[torch.Tensor] = (),
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> None:
    """Write the last `new_tokens` tokens of each sequence, in place.

    The pages that they fall into belong to one sequence each, and to nobody else.

    Args:
        k, v: `[b, n, Hkv, d]`; of row i the first `new_tokens[i]` tokens count.
        k_pages, v_pages: `[pages, Hkv, P, d]`, of the same type.
        shadow: `[pages, Hkv, P*d/2 + 4*P]` uint8, see `twilight.ops.quantize`; `[pages, Hkv, 0]` to keep no 4-bit keys.
        page_table: `[b, max_pages]` int32, the pages of the new tokens in it.
        seq_lens: `[b]` int32, the new tokens counted.
        new_tokens: `[b]` int32.
        bounds: channel-wise bounds of each page's keys, to be brought up to date: `(page_max, page_min)` or
            `(codes, params)`, see `twilight.ops.page_scores`; none by default.
        backend: which implementation. The kernel takes half and bfloat16, and d of 64, 128 or 256.
    """
    tensors = (k, v, k_pages, v_pages, shadow, page_table, seq_lens, new_tokens)
    if kernels.use_kernel(backend, k.device, _unsupported(k, k_pages, v_pages, shadow, bounds)):
        _cuda(*tensors, bounds)
    else:
        _torch(*tensors, bounds)


def _torch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    new_tokens: torch.Tensor,
    bounds: Sequence[torch.Tensor],
) -> None:
    page_size = k_pages.shape[2]
    steps = torch.arange(k.shape[1], device=k.device)
    counts = new_tokens.long()[:, None]
    real = steps < counts
    positions = (seq_lens.long()[:, None] - counts + steps).masked_fill(~real, 0)
    pages, slots = locate(positions, page_table, page_size)
    # What does not count goes to the page that nobody owns, as zeros: no branch, and nothing stray is kept.
    pages = pages.masked_fill(~real, NULL_PAGE)
    k = k.masked_fill(~real[..., None, None], 0)
    v = v.masked_fill(~real[..., None, None], 0)
    k_pages[pages, :, slots] = k
    v_pages[pages, :, slots] = v
    if shadow.shape[-1]:
        codes, params = quantize(k)
        stored_codes, stored_params = split_shadow(shadow, page_size)
        stored_codes[pages, :, slots] = codes
        stored_params[pages, :, slots] = params
    if bounds and k.shape[1]:
        _update_bounds(k_pages, page_table, seq_lens, counts, real, bounds)


def _update_bounds(
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    counts: torch.Tensor,
    real: torch.Tensor,
    bounds: Sequence[torch.Tensor],
) -> None:
    page_size = k_pages.shape[2]
    first = (seq_lens.long()[:, None] - counts) // page_size
    logical = first + torch.arange(real.shape[1] // page_size + 2, device=real.device)
    start = logical * page_size
    touched = (start < seq_lens[:, None]) & (counts > 0)
    pages = page_table.long().gather(1, logical.clamp(0, page_table.shape[1] - 1)).masked_fill(~touched, NULL_PAGE)
    filled = start.unsqueeze(-1) + torch.arange(page_size, device=real.device) < seq_lens[:, None, None]
    # The null page is given zeros for bounds: it has no keys.
    keys = k_pages[pages].masked_fill(~touched[:, :, None, None, None], 0)
    filled = (filled | ~touched.unsqueeze(-1))[:, :, None, :, None]
    page_max = keys.masked_fill(~filled, -torch.inf).amax(3)
    page_min = keys.masked_fill(~filled, torch.inf).amin(3)
    packed = bounds[0].dtype == torch.uint8
    bounds[0][pages], bounds[1][pages] = quantize_bounds(page_max, page_min) if packed else (page_max, page_min)


def _unsupported(
    k: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    bounds: Sequence[torch.Tensor],
) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    if k.dtype not in _HALVES or k_pages.dtype != k.dtype:
        return f"k is {k.dtype} in pages of {k_pages.dtype}; the kernel writes float16 and bfloat16"
    if k.shape[-1] not in _DIMS:
        return f"head_dim is {k.shape[-1]}; the kernel is made for {', '.join(map(str, _DIMS))}"
    if k_pages.shape[2] % 4:
        return f"page_size is {k_pages.shape[2]}; the kernel needs a multiple of 4"
    if not all(part.is_contiguous() for part in (k_pages, v_pages, shadow, *bounds)):
        return "pages, shadow or bounds are not contiguous"
    if bounds and bounds[0].dtype not in (torch.uint8, k.dtype):
        return f"bounds are {bounds[0].dtype}, keys {k.dtype}"
    return None


def _cuda(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    new_tokens: torch.Tensor,
    bounds: Sequence[torch.Tensor],
) -> None:
    b, steps, kv_heads, dim = k.shape
    page_size = k_pages.shape[2]
    # A lane reads 16 bytes at a time.
    k, v = (t if t.stride(-1) == 1 and _aligned(t) else t.contiguous() for t in (k, v))
    page_table, seq_lens, new_tokens = page_table.contiguous(), seq_lens.contiguous(), new_tokens.contiguous()
    pages_per_row = (steps + page_size - 2) // page_size + 1
    kind = 0 if not bounds else 2 if bounds[0].dtype == torch.uint8 else 1
    kernel = kernels.load("append", f"append<{_HALVES[k.dtype]}, {dim}, {kind}>", device=k.device)
    places: list[int | None] = [part.data_ptr() for part in bounds] or [None, None]
    params = AppendParams(
        k.data_ptr(), v.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), shadow.data_ptr() or None,
        page_table.data_ptr(), seq_lens.data_ptr(), new_tokens.data_ptr(), *places, k.stride()[:3], v.stride()[:3],
        b, kv_heads, page_table.shape[1], page_size, pages_per_row,
    )  # fmt: skip
    tasks = b * pages_per_row * kv_heads if steps else 0
    kernel.launch((-(-tasks // _WARPS), 1, 1), (32 * _WARPS, 1, 1), params)


def _aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:3])
