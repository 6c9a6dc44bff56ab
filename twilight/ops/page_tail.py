"""Page tail: the mass of what was not kept, page by page; `twilight.ops.tail` says what it is for."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from typing import Literal

import torch

from twilight import kernels
from twilight.ops.tail import MeanValues, Tail
from twilight.selection import Selection

_THREADS = 256


class PageTailParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/page_tail.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "logits", "indices", "lengths", "kept", "kept_lengths", "seq_lens", "pages", "counts", "log_weight",
        )),
        *((name, ctypes.c_int) for name in (
            "capacity", "kept_capacity", "max_pages", "page_size", "kv_heads", "group",
        )),
    ]  # fmt: skip


STRUCTS = (PageTailParams,)
INSTANTIATIONS = tuple(
    f"page_tail<{kind}, {_THREADS}, {cluster}, {group}>"
    for kind in ("half", "float") for cluster in (1, 2, 4, 8) for group in (4, 16)
)  # fmt: skip


def page_tail(
    logits: torch.Tensor,
    candidates: Selection,
    kept: Selection,
    seq_lens: torch.Tensor,
    means: MeanValues,
    *,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> Tail:
    """Return the tail of what was not kept, page by page.

    Args:
        logits: `[b, Hq, capacity * granularity]` estimates, `-inf` past a row's end.
        candidates: what they are of: tokens, pages of `means.page_size` tokens, or runs of another length.
        kept: tokens, a subset of the candidates.
        seq_lens: `[b]` int32.
        means: the pages' mean values.
        backend: which implementation. The kernel is for candidates that are tokens; it takes half and float32 logits
            and groups of up to 16.

    Returns:
        A tail over the candidate pages, or, if the candidates are no pages, over those pages where a head of the group
        lost any mass, with a capacity of `means.max_pages` on a GPU.

    Raises:
        ValueError: `backend` is "cuda" and the kernel cannot take these.
    """
    size, group = means.page_size, logits.shape[1] // candidates.indices.shape[1]
    if kernels.use_kernel(backend, logits.device, _unsupported(logits, candidates, kept, means)):
        return _cuda(logits, candidates, kept, seq_lens, means)
    positions, valid = candidates.positions(seq_lens)
    end = means.max_pages * size  # a place of its own for whatever is no token
    taken = torch.zeros((*positions.shape[:2], end + 1), dtype=torch.bool, device=logits.device)
    at, counted = kept.positions(seq_lens)
    taken.scatter_(-1, at.masked_fill(~counted, end), True)
    gone = valid & ~taken.gather(-1, positions)
    left = logits.double().masked_fill(~gone.repeat_interleave(group, dim=1), -torch.inf)
    if candidates.granularity == size:
        mass = left.unflatten(-1, (candidates.capacity, size)).logsumexp(-1).float()
        return Tail(replace(candidates, log_weight=mass), means)
    spread = torch.full((*left.shape[:2], end + 1), -torch.inf, dtype=torch.float64, device=logits.device)
    where = positions.masked_fill(~gone, end).repeat_interleave(group, dim=1)
    spread.scatter_(-1, where, left)  # tokens are unique, so that no two write to one place but the last
    mass = spread[..., :end].unflatten(-1, (means.max_pages, size)).logsumexp(-1).float()
    some = (mass != -torch.inf).unflatten(1, (positions.shape[1], group)).any(2)
    pages = torch.arange(means.max_pages, device=logits.device).expand_as(some)
    listed = Selection.compact(pages, some, granularity=size, log_weight=mass)
    return Tail(listed.trimmed() if logits.device.type == "cpu" else listed, means)


def _unsupported(logits: torch.Tensor, candidates: Selection, kept: Selection, means: MeanValues) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    if candidates.granularity != 1 or kept.granularity != 1:
        return "the candidates, or what is kept, are pages; the kernel is for tokens"
    if logits.dtype not in (torch.float16, torch.float32):
        return f"the logits are {logits.dtype}; the kernel reads float16 and float32"
    group = logits.shape[1] // candidates.indices.shape[1]
    if group > 16:
        return f"a group has {group} query heads; the kernel takes up to 16"
    if candidates.lengths.numel() > 65535:
        return f"{candidates.lengths.numel()} rows are more than a grid's 65535"
    if means.max_pages * means.page_size > 2**30:
        return f"{means.max_pages} pages of {means.page_size} tokens are more than the kernel's 2**30 tokens"
    return None


def _cuda(
    logits: torch.Tensor, candidates: Selection, kept: Selection, seq_lens: torch.Tensor, means: MeanValues
) -> Tail:
    b, q_heads, _ = logits.shape
    kv_heads, device = candidates.indices.shape[1], logits.device
    pages = torch.empty((b, kv_heads, means.max_pages), dtype=torch.int32, device=device)
    counts = torch.empty((b, kv_heads), dtype=torch.int32, device=device)
    mass = torch.empty((b, q_heads, means.max_pages), dtype=torch.float32, device=device)
    # Kept until the launch: a copy made here must not be freed and reused before the kernel is in the stream.
    logits, seq_lens = logits.contiguous(), seq_lens.contiguous()
    lists = [
        part.contiguous() for part in (candidates.indices, candidates.lengths, kept.indices, kept.lengths)
    ]  # fmt: skip
    group, index = q_heads // kv_heads, logits.get_device()
    cluster = _cluster(b * kv_heads, means.max_pages, index)
    params = PageTailParams(
        logits.data_ptr(), *(part.data_ptr() for part in lists), seq_lens.data_ptr(), pages.data_ptr(),
        counts.data_ptr(), mass.data_ptr(), candidates.capacity, kept.capacity, means.max_pages, means.page_size,
        kv_heads, group,
    )  # fmt: skip
    kind = "half" if logits.dtype == torch.float16 else "float"
    kernel = _kernel(kind, cluster, 4 if group <= 4 else 16, index)
    kernel.launch((cluster, b * kv_heads, 1), (_THREADS, 1, 1), params)
    return Tail(Selection(pages, counts, means.page_size, mass), means)


@functools.lru_cache(1024)
def _cluster(rows: int, max_pages: int, index: int) -> int:
    """Return the blocks of a row: no more than have pages, and four a multiprocessor at once."""
    if torch.cuda.get_device_capability(index) < (9, 0):
        return 1
    most = 4 * kernels.num_sms(index)
    return max((c for c in (2, 4, 8) if rows * c <= most and max_pages > c // 2 * _THREADS), default=1)


@functools.cache
def _kernel(kind: str, cluster: int, group: int, device: int) -> kernels.Kernel:
    return kernels.load("page_tail", f"page_tail<{kind}, {_THREADS}, {cluster}, {group}>", device=device)
