"""Label top-k: the tokens whose labels score highest (Double Sparsity, arXiv 2408.07092, section 3).

What `label_scores` and `top_k` do one after the other, which is also how the reference is written. The kernel keeps
the scores in shared memory; see raw_kernels/label_top_k.cu.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Literal

import torch

from twilight import kernels
from twilight.checks import check_positive, check_tensor
from twilight.ops.fused_plan import FITTING
from twilight.ops.label_scores import LabelSource, check_labels, is_fast, label_scores, label_source, unsupported_label
from twilight.ops.scratch import max_cluster, shared_memory
from twilight.ops.top_k import top_k
from twilight.selection import Selection
from twilight.selector import REDUCTIONS, check_reduce

_SIZES = (16, 32)
_HEADS = (4, 8)
_THREADS = 512
_STEP = 64
"""Tokens that a warp scores at a time, or twice as many as that."""
_MIN_SLICE = 1024
_MANY_SCORES = 2**25
"""Scores that no L2 cache keeps, so that reading them once more to find their log-sum-exp takes longer than to find it
while they are made: 15 us at b=64, 32k on an H200, where at b=1 it would be 11 the other way."""
_PAD = 32
"""Halves behind the tokens of a slice, so that neighbouring heads begin half of all banks apart."""
_STATIC = 20 * 1024
"""What a block needs beside its scores, rounded up."""


class LabelTopKParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/label_top_k.cu."""

    _fields_ = [
        ("source", LabelSource),
        *((name, ctypes.c_void_p) for name in ("counts", "indices", "lengths")),
        *((name, ctypes.c_int) for name in ("reduce", "force_newest", "capacity", "pitch")),
    ]  # fmt: skip


STRUCTS = (LabelTopKParams,)
INSTANTIATIONS = tuple(
    f"label_top_k<u{bits}, {r}, {heads}>" for bits in (2, 4) for r in _SIZES for heads in _HEADS
)  # fmt: skip


def label_top_k(
    q: torch.Tensor,
    label: Sequence[torch.Tensor],
    channels: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    counts: torch.Tensor,
    *,
    capacity: int,
    reduce: str = "softmax",
    sm_scale: float | None = None,
    force_newest: bool = False,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> Selection:
    """Score every token of every sequence by its label, and select those that score highest in their group.

    Args:
        q: `[b, Hq, d]`.
        label: `(labels,)` or `(codes, params)`, as `label_scores` takes them.
        channels: `[Hkv, r]` int32, which channels a kv head's labels are.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        counts: `[b, Hkv]` int32, how many to take; fewer where fewer are there.
        capacity: tokens a row of the result can hold.
        reduce: how query heads are combined: "softmax", "sum" or "max"; see `twilight.combine_group`.
        sm_scale: the factor of the scores, 1/sqrt(d) by default.
        force_newest: select the newest token whatever its score. It counts towards `counts`.
        backend: which implementation. The kernel takes labels in 2 or 4 bits of 16 or 32 channels, groups of up to 8,
            and as many rows as run at once, on GPUs that have thread block clusters. For the rest "auto" runs the
            kernels of `label_scores` and `top_k` where these can. On a GPU scores are rounded to halves, below the
            error of a label.

    Returns:
        `Selection` of tokens, ascending. Equal scores go to the lower one; NaN counts as larger than anything.

    Raises:
        TypeError, ValueError: shapes and types that do not fit together.
    """
    check_labels(q, label, channels, page_table, seq_lens)
    check_tensor("counts", counts, (seq_lens.shape[0], channels.shape[0]), dtype=torch.int32)
    check_reduce(reduce)
    check_positive("capacity", capacity)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    sources = (q, label, channels, page_table, seq_lens)
    if kernels.use_kernel(backend, q.device, _unsupported(q, label, channels, page_table)):
        return _cuda(*sources, counts, capacity, reduce, scale, force_newest)
    n = page_table.shape[1] * label[0].shape[2]
    scores, lse = label_scores(
        *sources,
        sm_scale=scale,
        out_dtype=torch.float16 if q.is_cuda else torch.float32,
        with_lse=reduce == "softmax" and q.is_cuda and q.shape[0] * q.shape[1] * n >= _MANY_SCORES,
        backend=backend,
    )
    return top_k(
        scores, counts, seq_lens, granularity=1, capacity=capacity, reduce=reduce, lse=lse, force_newest=force_newest,
        backend=backend,
    )  # fmt: skip


def _unsupported(
    q: torch.Tensor, label: Sequence[torch.Tensor], channels: torch.Tensor, page_table: torch.Tensor
) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    if (reason := unsupported_label(q, label, channels)) is not None:
        return reason
    (kv_heads, r), page_size = channels.shape, label[0].shape[2]
    group, n = q.shape[1] // kv_heads, page_table.shape[1] * page_size
    if len(label) == 1 or r not in _SIZES or not is_fast(label, r):
        return f"labels are of {r} channels; the kernel takes 16 and 32 in 2 or 4 bits, of pages of a power of two"
    if group > _HEADS[-1]:
        return f"a group has {group} query heads; the kernel takes up to {_HEADS[-1]}"
    if q.shape[0] * kv_heads > 65535:
        return f"{q.shape[0] * kv_heads} rows are more than a grid's 65535"
    if q.is_cuda:
        if max_cluster(q.get_device()) == 1:
            return "the kernel needs thread block clusters, which came with compute capability 9.0"
        if _team(q.shape[0] * kv_heads, n, group, q.get_device()) is None:
            return f"{q.shape[0] * kv_heads} rows of {n} tokens do not fit the GPU's shared memory at once"
    return None


def _cuda(
    q: torch.Tensor,
    label: Sequence[torch.Tensor],
    channels: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    counts: torch.Tensor,
    capacity: int,
    reduce: str,
    sm_scale: float,
    force_newest: bool,
) -> Selection:
    # Kept until the launch: a copy made here must not be freed and reused before the kernel is in the stream.
    q, channels, page_table, seq_lens, counts = (t.contiguous() for t in (q, channels, page_table, seq_lens, counts))
    b, kv_heads = counts.shape
    source = label_source(q, channels, label, page_table, seq_lens, sm_scale)
    capacity = min(capacity, source.n)
    indices = torch.empty((b, kv_heads, capacity), dtype=torch.int32, device=q.device)
    lengths = torch.empty((b, kv_heads), dtype=torch.int32, device=q.device)
    team = _team(b * kv_heads, source.n, source.group, q.get_device())
    assert team is not None
    blocks, pitch = team
    params = LabelTopKParams(
        source, counts.data_ptr(), indices.data_ptr(), lengths.data_ptr(), REDUCTIONS.index(reduce), force_newest,
        capacity, pitch,
    )  # fmt: skip
    bits = 8 * label[0].shape[-1] // channels.shape[1]
    kernel = _kernel(bits, channels.shape[1], source.group, q.get_device())
    smem = _bytes(source.group, pitch)
    kernel.launch((blocks, b * kv_heads, 1), (_THREADS, 1, 1), params, smem, cluster=blocks)
    return Selection(indices, lengths, 1)


def _bytes(group: int, pitch: int) -> int:
    """Return what the scores of a slice take, in halves, of which keys take the place."""
    return 2 * max(group, 2) * pitch


@functools.lru_cache(maxsize=1024)
def _team(rows: int, n: int, group: int, index: int) -> tuple[int, int] | None:
    """Return the blocks of a row, and tokens that one has room for; None if not all rows fit the GPU at once."""
    limits = {"num_sms": kernels.num_sms(index), "block_limit": shared_memory(index)[0], "most": max_cluster(index)}
    return cut_tokens(rows, n, group, **limits)


def cut_tokens(rows: int, n: int, group: int, *, num_sms: int, block_limit: int, most: int) -> tuple[int, int] | None:
    """Take as many blocks of a row as run at once, up to 8, and no slices that leave threads idle."""
    for blocks in (8, 4, 2, 1):
        pitch = -(-n // (_STEP * blocks)) * _STEP + _PAD
        at_once = blocks <= most and rows * blocks <= int(FITTING[blocks] * num_sms)
        if at_once and (blocks == 1 or n >= blocks * _MIN_SLICE) and _bytes(group, pitch) + _STATIC <= block_limit:
            return blocks, pitch
    return None


@functools.cache
def _kernel(bits: int, r: int, group: int, device: int) -> kernels.Kernel:
    heads = next(h for h in _HEADS if h >= group)
    return kernels.load(
        "label_top_k",
        f"label_top_k<u{bits}, {r}, {heads}>",
        max_dynamic_smem=shared_memory(device)[0] - _STATIC,
        max_cluster=max_cluster(device),
        device=device,
    )
