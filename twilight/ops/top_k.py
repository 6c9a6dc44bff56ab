"""Top-k: the best pages, or tokens, of each kv head, its query heads combined."""

from __future__ import annotations

import ctypes
import functools
from typing import Literal

import torch

from twilight import kernels
from twilight.checks import check_positive, check_tensor
from twilight.ops import token_top_k
from twilight.selection import Selection
from twilight.selector import REDUCTIONS, check_reduce, combine_group

_LOG2E = 1.4426950408889634
_MAX_ENTRIES = 8192
"""Of a row, for a block to select from by itself. More are for token_top_k.cu."""


class TopKParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/top_k.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "counts", "seq_lens", "indices", "lengths")),
        ("scale_log2e", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "reduce", "force_newest", "kv_heads", "group", "n", "capacity", "granularity"
        )),
    ]  # fmt: skip


STRUCTS = (TopKParams,)
_GROUPS = (1, 2, 4, 8)
# Threads and entries a thread keeps in registers; 0 reads scores twice.
_SHAPES = ((512, 4), (1024, 2), (1024, 8))
INSTANTIATIONS = tuple(
    f"top_k<{threads}, {group}, {entries}>"
    for group in (*_GROUPS, 0)
    for threads, entries in (_SHAPES if group in (1, 2, 4) else ((512, 0),))
)


def top_k(
    scores: torch.Tensor,
    counts: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    granularity: int,
    capacity: int,
    reduce: str = "softmax",
    scale: float = 1.0,
    force_newest: bool = False,
    lse: torch.Tensor | None = None,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> Selection:
    """Combine the query heads of each group, and select the entries that score highest.

    Args:
        scores: `[b, Hq, n]` float32 or float16; `-inf` where there is nothing. Entries behind a sequence's end are not
            looked at.
        counts: `[b, Hkv]` int32, how many to take; fewer where fewer are there.
        seq_lens: `[b]` int32.
        granularity: tokens that an entry of `scores` stands for.
        capacity: entries a row of the result can hold.
        reduce: how to combine: "softmax", "sum" or "max"; see `twilight.combine_group`.
        scale: the factor that makes the scores logits, for "softmax".
        force_newest: select the sequence's last entry whatever its score. It counts towards `counts`.
        lse: `[b, Hq]` float32, the log-sum-exp of each query head's logits if it is known already, which spares reading
            the scores of long rows twice; "softmax" only.
        backend: which implementation. The kernel takes groups of up to 16.

    Returns:
        `Selection`, its indices ascending. Equal scores go to the lower index; NaN counts as larger than anything.
    """
    check_tensor("counts", counts, (scores.shape[0], None), dtype=torch.int32)
    b, kv_heads = counts.shape
    check_tensor("scores", scores, (b, None, None), dtype=(torch.float32, torch.float16))
    check_tensor("seq_lens", seq_lens, (b,), dtype=torch.int32)
    check_reduce(reduce)
    check_positive("granularity", granularity)
    check_positive("capacity", capacity)
    if scores.shape[1] % kv_heads:
        raise ValueError(f"scores: expected a multiple of {kv_heads} heads, got {scores.shape[1]}")
    if lse is not None:
        check_tensor("lse", lse, scores.shape[:2], dtype=torch.float32)
    group = scores.shape[1] // kv_heads
    unsupported = f"a group has {group} query heads; the kernel takes up to 16" if group > 16 else None
    if scores.shape[-1] == 0:
        unsupported = "there are no scores"
    if b * kv_heads > 65535:
        unsupported = f"{b * kv_heads} rows are more than a grid's 65535"
    if kernels.use_kernel(backend, scores.device, unsupported):
        if scores.dtype == torch.float16 or scores.shape[-1] > _MAX_ENTRIES:
            return token_top_k.launch(
                scores, counts, seq_lens, lse, granularity=granularity, capacity=capacity, reduce=reduce, scale=scale,
                force_newest=force_newest,
            )  # fmt: skip
        return _cuda(scores, counts, seq_lens, granularity, capacity, reduce, scale, force_newest)
    entries = (seq_lens + granularity - 1) // granularity
    logical = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill(logical >= entries[:, None, None], -torch.inf)
    combined = combine_group(scores, kv_heads, reduce, scale=scale, lse=lse)
    if force_newest:
        combined = combined.masked_fill(logical == (entries - 1)[:, None, None], torch.inf)
    return Selection.top(combined, counts, capacity=capacity, granularity=granularity)


def _cuda(
    scores: torch.Tensor,
    counts: torch.Tensor,
    seq_lens: torch.Tensor,
    granularity: int,
    capacity: int,
    reduce: str,
    scale: float,
    force_newest: bool,
) -> Selection:
    b, kv_heads = counts.shape
    group, n = scores.shape[1] // kv_heads, scores.shape[2]
    capacity = min(capacity, n)
    scores, counts, seq_lens = scores.contiguous(), counts.contiguous(), seq_lens.contiguous()
    indices = torch.empty((b, kv_heads, capacity), dtype=torch.int32, device=scores.device)
    lengths = torch.empty((b, kv_heads), dtype=torch.int32, device=scores.device)
    threads, entries = _shape(b * kv_heads, group, n)
    kernel = _kernel(threads, group, entries, scores.get_device())
    params = TopKParams(
        scores.data_ptr(), counts.data_ptr(), seq_lens.data_ptr(), indices.data_ptr(), lengths.data_ptr(),
        scale * _LOG2E, REDUCTIONS.index(reduce), force_newest, kv_heads, group, n, capacity, granularity,
    )  # fmt: skip
    kernel.launch((b * kv_heads, 1, 1), (threads, 1, 1), params, 4 * n)
    return Selection(indices, lengths, granularity)


def _shape(rows: int, group: int, n: int) -> tuple[int, int]:
    """Return the threads of a block and the entries that each keeps in registers."""
    if group not in (1, 2, 4):
        return 512, 0
    if n > 2048:
        return 1024, 8
    # Many rows share a multiprocessor; a few are done soonest by many threads each.
    return (512, 4) if rows > 132 else (1024, 2)


@functools.cache
def _kernel(threads: int, group: int, entries: int, device: int) -> kernels.Kernel:
    expression = f"top_k<{threads}, {group if group in _GROUPS else 0}, {entries}>"
    return kernels.load("top_k", expression, device=device)
