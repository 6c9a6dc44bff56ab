"""Top-k over long rows: the launch of raw_kernels/token_top_k.cu, which `top_k` takes for the scores of tokens."""

from __future__ import annotations

import ctypes
import functools

import torch

from twilight import kernels
from twilight.ops.scratch import counters, max_cluster
from twilight.selection import Selection
from twilight.selector import REDUCTIONS

_LOG2E = 1.4426950408889634
_THREADS = 512
_STATIC_SMEM = 20 * 1024
"""What a block needs beside its keys, rounded up."""
_MIN_SLICE = 1024
"""Entries of a block, below which a row is not split further."""
_MAX_BLOCKS = 16
_EXCHANGE_BYTES = 4 * (2 * 2048 + 2 * 64 + 2 * 16 + 4)
"""What a block lets the others see, struct Exchange of the kernel."""
_PARTS_BYTES = 4 * 2 * 16 * 16
"""Maxima and sums of 16 warps for 16 heads, which lie where keys will."""


class TokenTopKParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/token_top_k.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "scores", "lse", "counts", "seq_lens", "indices", "lengths", "keys", "exchange", "counters"
        )),
        ("scale_log2e", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "reduce", "force_newest", "kv_heads", "group", "n", "capacity", "granularity"
        )),
    ]  # fmt: skip


STRUCTS = (TokenTopKParams,)
INSTANTIATIONS = tuple(
    f"token_top_k<{score}, {apart}, {shared}>"
    for score in ("half", "float") for apart in ("false", "true") for shared in ("true", "false")
)  # fmt: skip


def launch(
    scores: torch.Tensor,
    counts: torch.Tensor,
    seq_lens: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    granularity: int,
    capacity: int,
    reduce: str,
    scale: float,
    force_newest: bool,
    clusters: bool | None = None,
) -> Selection:
    """Select; the arguments are those of `top_k`, checked.

    `clusters` says whether the blocks of a row form a cluster, for which there must be hardware; by default they do if
    there is.
    """
    b, kv_heads = counts.shape
    group, n = scores.shape[1] // kv_heads, scores.shape[2]
    rows, device, index = b * kv_heads, scores.device, scores.get_device()
    capacity = min(capacity, n)
    if clusters is None:
        clusters = torch.cuda.get_device_capability(index) >= (9, 0)
    # Kept until the launch: a copy made here must not be freed and reused before the kernel is in the stream.
    scores, counts, seq_lens = scores.contiguous(), counts.contiguous(), seq_lens.contiguous()
    lse = None if lse is None else lse.contiguous()
    indices = torch.empty((b, kv_heads, capacity), dtype=torch.int32, device=device)
    lengths = torch.empty((b, kv_heads), dtype=torch.int32, device=device)
    keys_limit = kernels.smem_limit(index) - _STATIC_SMEM
    most = max_cluster(index) if clusters else _MAX_BLOCKS
    blocks, slice_keys = _team(rows, n, keys_limit, kernels.num_sms(index), clusters=clusters, most=most)
    shared, apart = 4 * slice_keys <= keys_limit, blocks > 1 and not clusters
    keys = None if shared else torch.empty((rows, -(-n // 8) * 8), dtype=torch.int32, device=device)
    exchange = torch.empty((rows, blocks, _EXCHANGE_BYTES), dtype=torch.uint8, device=device) if apart else None
    kernel = _kernel("half" if scores.dtype == torch.float16 else "float", apart, shared, index)
    params = TokenTopKParams(
        scores.data_ptr(), None if lse is None else lse.data_ptr(), counts.data_ptr(), seq_lens.data_ptr(),
        indices.data_ptr(), lengths.data_ptr(), None if keys is None else keys.data_ptr(),
        None if exchange is None else exchange.data_ptr(), counters(device, 3 * rows).data_ptr() if apart else None,
        scale * _LOG2E, REDUCTIONS.index(reduce), force_newest, kv_heads, group, n, capacity, granularity,
    )  # fmt: skip
    smem = max(4 * slice_keys, _PARTS_BYTES) if shared else 0
    if apart:
        kernel.launch((blocks, rows, 1), (_THREADS, 1, 1), params, smem, cooperative=True)
    else:
        kernel.launch((blocks, rows, 1), (_THREADS, 1, 1), params, smem, cluster=blocks)
    return Selection(indices, lengths, granularity)


@functools.cache
def _kernel(kind: str, apart: bool, shared: bool, device: int) -> kernels.Kernel:
    expression = f"token_top_k<{kind}, {'true' if apart else 'false'}, {'true' if shared else 'false'}>"
    keys_limit = kernels.smem_limit(device) - _STATIC_SMEM
    return kernels.load(
        "token_top_k", expression, max_dynamic_smem=keys_limit, max_cluster=max_cluster(device), device=device
    )


@functools.cache
def _team(rows: int, n: int, keys_limit: int, num_sms: int, *, clusters: bool, most: int) -> tuple[int, int]:
    """Return the blocks of a row, and the entries of a block's slice."""

    def entries(blocks: int) -> int:
        return -(-n // (8 * blocks)) * 8

    if not clusters:
        # They wait for each other, and must all be there: one a multiprocessor.
        blocks = max(1, min(most, num_sms // rows, n // _MIN_SLICE))
        return blocks, entries(blocks)
    sizes = tuple(size for size in (1, 2, 4, 8, _MAX_BLOCKS) if size <= most)
    # A multiprocessor each if rows alone are not enough, and no slices that barriers would take longer than; 16 only
    # where slices of fewer would not lie in one multiprocessor twice. At 32k, H200: 12.6 us with 8 blocks at b=1 (4:
    # 13.6, 16: 16.1), 16.5 with 4 at b=4 (2: 19.9, 8: 22.9), 21.0 with 2 at b=8 (1: 26.6, 4: 26.7).
    few = (size for size in sizes if size <= 8 and rows * size <= num_sms and n >= 2 * size * _MIN_SLICE)
    least = max(few, default=1)
    sizes = tuple(size for size in sizes if size >= least)
    half = (keys_limit + _STATIC_SMEM) // 2 - _STATIC_SMEM
    for limit in (half, keys_limit):
        for blocks in sizes:
            if 4 * entries(blocks) <= limit:
                return blocks, entries(blocks)
    return sizes[-1], entries(sizes[-1])
