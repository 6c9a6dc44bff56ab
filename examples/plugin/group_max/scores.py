"""Scores of pages: the largest product of a page's mean key with the query heads of a group."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Literal

import torch

from twilight import kernels
from twilight.checks import check_tensor

KERNELS = Path(__file__).parent / "kernels"
_THREADS, _WARP = 128, 32
_CTYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bf16"}


class GroupMaxParams(ctypes.Structure):
    """Mirror of the kernel's struct: same order, same types."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "means", "page_table", "seq_lens", "scores")),
        *((name, ctypes.c_int) for name in ("max_pages", "kv_heads", "group", "head_dim", "page_size")),
    ]


STRUCTS = (GroupMaxParams,)
INSTANTIATIONS = tuple(f"group_max<{name}, {_THREADS}>" for name in _CTYPES.values())


def group_max(
    q: torch.Tensor,
    means: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> torch.Tensor:
    """Score every page of every sequence.

    Args:
        q: `[b, Hq, d]`.
        means: `[pages, Hkv, d]`, of the same type.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        page_size: tokens of a page.
        backend: which implementation.

    Returns:
        `[b, Hkv, max_pages]` float32, `-inf` past each row's end.
    """
    b, _, d = q.shape
    check_tensor("means", means, (None, None, d), dtype=q.dtype, device=q.device)
    check_tensor("page_table", page_table, (b, None), dtype=torch.int32, device=q.device)
    unsupported = None if q.dtype in _CTYPES else f"q is {q.dtype}"
    if kernels.use_kernel(backend, q.device, unsupported):
        return _cuda(q.contiguous(), means.contiguous(), page_table.contiguous(), seq_lens, page_size)
    grouped = q.float().unflatten(1, (means.shape[1], -1))
    held = means[page_table.long()].transpose(1, 2).float()
    scores = (grouped @ held.mT).amax(2)
    pages = torch.arange(page_table.shape[1], device=q.device)
    return scores.masked_fill(pages * page_size >= seq_lens[:, None, None], -torch.inf)


def _cuda(
    q: torch.Tensor, means: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int
) -> torch.Tensor:
    (b, q_heads, d), kv_heads, pages = q.shape, means.shape[1], page_table.shape[1]
    scores = torch.empty((b, kv_heads, pages), dtype=torch.float32, device=q.device)
    params = GroupMaxParams(
        q.data_ptr(), means.data_ptr(), page_table.data_ptr(), seq_lens.data_ptr(), scores.data_ptr(),
        pages, kv_heads, q_heads // kv_heads, d, page_size,
    )  # fmt: skip
    # Compiled by NVRTC at the first use, and kept on disk. `load` remembers it: this costs a look into a dict.
    kernel = kernels.load(
        "group_max", f"group_max<{_CTYPES[q.dtype]}, {_THREADS}>", structs=STRUCTS, source_folder=KERNELS,
        device=q.device,
    )  # fmt: skip
    warps = _THREADS // _WARP
    kernel.launch((-(-pages // warps), kv_heads, b), (_THREADS, 1, 1), params)  # on torch's current stream
    return scores
