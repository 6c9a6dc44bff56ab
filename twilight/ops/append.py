"""Append: write new tokens' K, V and 4-bit keys into their pages, and bring a summary of the keys up to date."""

from __future__ import annotations

import ctypes
import functools
from typing import Literal

import torch

from twilight import kernels
from twilight.ops.paging import locate
from twilight.ops.quantize import quantize, split_shadow
from twilight.ops.summaries import Summary, key_labels, page_bounds, page_means
from twilight.pages import NULL_PAGE

_DIMS = (64, 128, 256)
_HALVES = {torch.float16: "half", torch.bfloat16: "bf16"}
_WARPS = 4
_RULES = (
    None, ("bounds", None), ("bounds", 8), ("mean", None), ("mean", 8), ("label", None), ("label", 2), ("label", 4)
)  # fmt: skip
"""Rule and bits, in the order of the kernel's enum."""


class AppendParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/append.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "k", "v", "k_pages", "v_pages", "shadow", "page_table", "seq_lens", "new_tokens", "first", "second",
            "channels", "value_first", "value_second",
        )),
        ("k_strides", ctypes.c_longlong * 3),
        ("v_strides", ctypes.c_longlong * 3),
        *((name, ctypes.c_int) for name in (
            "batch", "kv_heads", "max_pages", "page_size", "pages_per_row", "label_channels",
        )),
    ]  # fmt: skip


STRUCTS = (AppendParams,)
INSTANTIATIONS = tuple(
    f"append<{kind}, {dim}, {rule}{values}>"
    for values in ("", ", true") for kind in _HALVES.values() for dim in _DIMS for rule in range(len(_RULES))
)  # fmt: skip


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
    summary: Summary | None = None,
    value_summary: Summary | None = None,
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
        summary: metadata of the keys to be brought up to date, of the touched pages or of the new tokens; none by
            default.
        value_summary: metadata of the values, of the rule "mean"; none by default.
        backend: which implementation. The kernel takes half and bfloat16, and d of 64, 128 or 256.
    """
    tensors = (k, v, k_pages, v_pages, shadow, page_table, seq_lens, new_tokens)
    if summary is not None:
        summary.check(k_pages)
    if value_summary is not None:
        if value_summary.rule != "mean":
            raise ValueError(f"value_summary: expected the rule 'mean', got {value_summary.rule!r}")
        value_summary.check(v_pages)
    if kernels.use_kernel(backend, k.device, _unsupported(k, k_pages, v_pages, shadow, summary, value_summary)):
        _cuda(*tensors, summary, value_summary)
    else:
        _torch(*tensors, summary, value_summary)


def _torch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    new_tokens: torch.Tensor,
    summary: Summary | None,
    value_summary: Summary | None,
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
    if not k.shape[1]:
        return
    if summary is not None and summary.rule == "label":
        assert summary.channels is not None
        found = key_labels(k.transpose(1, 2), summary.channels, summary.bits)
        for tensor, part in zip(summary.tensors, found, strict=True):
            tensor[pages, :, slots] = part.transpose(1, 2)
        summary = None
    for of, stored in ((summary, k_pages), (value_summary, v_pages)):
        if of is not None:
            touched, filled = touched_pages(page_table, seq_lens, new_tokens, k.shape[1], page_size)
            found = (page_bounds if of.rule == "bounds" else page_means)(stored[touched], filled, of.bits)
            for tensor, part in zip(of.tensors, found, strict=True):
                tensor[touched] = part


def touched_pages(
    page_table: torch.Tensor, seq_lens: torch.Tensor, new_tokens: torch.Tensor, steps: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pages that the last `new_tokens` tokens of each sequence lie in, without asking the device.

    Args:
        page_table: `[b, max_pages]` int32.
        seq_lens, new_tokens: `[b]` int32.
        steps: an upper bound of `new_tokens`.
        page_size: P.

    Returns:
        `(pages, filled)`: `[n]` int64 and `[n, P]` bool, which of their slots hold a token. Where a sequence touches
        fewer pages than others there stands the page that nobody owns, as if full.
    """
    lens, counts = seq_lens.long()[:, None], new_tokens.long()[:, None]
    logical = (lens - counts) // page_size + torch.arange(steps // page_size + 2, device=lens.device)
    start = logical * page_size
    touched = (start < lens) & (counts > 0)
    pages = page_table.long().gather(1, logical.clamp(0, page_table.shape[1] - 1)).masked_fill(~touched, NULL_PAGE)
    filled = start.unsqueeze(-1) + torch.arange(page_size, device=lens.device) < lens.unsqueeze(-1)
    return pages.flatten(), (filled | ~touched.unsqueeze(-1)).flatten(0, 1)


def _unsupported(
    k: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    summary: Summary | None,
    value_summary: Summary | None,
) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    if k.dtype not in _HALVES or k_pages.dtype != k.dtype:
        return f"k is {k.dtype} in pages of {k_pages.dtype}; the kernel writes float16 and bfloat16"
    if k.shape[-1] not in _DIMS:
        return f"head_dim is {k.shape[-1]}; the kernel is made for {', '.join(map(str, _DIMS))}"
    if k_pages.shape[2] % 4:
        return f"page_size is {k_pages.shape[2]}; the kernel needs a multiple of 4"
    kept = [part for each in (summary, value_summary) if each is not None for part in each.tensors]
    if not all(part.is_contiguous() for part in (k_pages, v_pages, shadow, *kept)):
        return "pages, shadow or a summary are not contiguous"
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
    summary: Summary | None,
    value_summary: Summary | None,
) -> None:
    b, steps, kv_heads, dim = k.shape
    page_size = k_pages.shape[2]
    # A lane reads 16 bytes at a time.
    k, v = (t if aligned(t) else t.contiguous() for t in (k, v))
    page_table, seq_lens, new_tokens = page_table.contiguous(), seq_lens.contiguous(), new_tokens.contiguous()
    pages_per_row = (steps + page_size - 2) // page_size + 1
    rule = _RULES.index(None if summary is None else (summary.rule, summary.bits))
    values = "" if value_summary is None else ", true"
    kernel = _kernel(k.dtype, dim, f"{rule}{values}", k.get_device())
    places, value_places = _places(summary), _places(value_summary)
    channels = None if summary is None or summary.channels is None else summary.channels.contiguous()
    params = AppendParams(
        k.data_ptr(), v.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), shadow.data_ptr() or None,
        page_table.data_ptr(), seq_lens.data_ptr(), new_tokens.data_ptr(), *places,
        None if channels is None else channels.data_ptr(), *value_places,
        k.stride()[:3], v.stride()[:3], b, kv_heads, page_table.shape[1], page_size, pages_per_row,
        0 if channels is None else channels.shape[1],
    )  # fmt: skip
    tasks = b * pages_per_row * kv_heads if steps else 0
    kernel.launch((-(-tasks // _WARPS), 1, 1), (32 * _WARPS, 1, 1), params)


@functools.cache
def _kernel(dtype: torch.dtype, dim: int, rules: str, device: int) -> kernels.Kernel:
    return kernels.load("append", f"append<{_HALVES[dtype]}, {dim}, {rules}>", device=device)


def _places(summary: Summary | None) -> tuple[int | None, int | None]:
    first, second = (*(part.data_ptr() for part in summary.tensors), None)[:2] if summary else (None, None)
    return first, second


def aligned(tensor: torch.Tensor) -> bool:
    """Return whether every row of halves begins at a multiple of 16 bytes, and is contiguous."""
    *outer, channel = tensor.stride()
    return channel == 1 and not any(stride % 8 for stride in outer) and tensor.data_ptr() % 16 == 0
