"""Sparse attention: exact attention of one query a sequence over a list of its tokens."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Literal

import torch

from twilight import kernels
from twilight.checks import FLOAT_DTYPES, check_tensor
from twilight.ops.paging import gather_tokens
from twilight.ops.scratch import counters, shared_memory
from twilight.selection import Selection

HEADS_PER_ROW = 8
"""Query heads that one row of the kernel takes; larger groups make several rows."""

CONFIGS = {64: ((4, 4), (4, 2)), 128: ((4, 3), (4, 2)), 256: ((4, 3), (4, 2), (2, 2))}
"""For each head_dim, (warps, stages of the ring) to choose from: what has most bytes under way wins."""


class AttentionParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/attention.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "q", "k_pages", "v_pages", "page_table", "seq_lens", "indices", "lengths", "log_weight", "out", "lse",
            "partial", "partial_state", "counters",
        )),
        ("scale_log2", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "batch", "num_kv_heads", "group", "page_shift", "max_pages", "capacity", "granularity_shift", "min_tiles",
        )),
    ]  # fmt: skip


STRUCTS = (AttentionParams,)
INSTANTIATIONS = tuple(
    f"sparse_attention<{dtype}, {dim}, {warps}, {stages}, {log_weight}>"
    for dtype in ("half", "bf16") for dim, configs in CONFIGS.items() for warps, stages in configs
    for log_weight in ("false", "true")
)  # fmt: skip


def sparse_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selection: Selection,
    *,
    sm_scale: float | None = None,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the selected tokens, renormalised over them.

    Every query head attends to the whole list of its kv head. Softmax and accumulation are in float32.

    Args:
        q: `[b, Hq, d]`.
        k_pages, v_pages: `[pages, Hkv, P, d]`.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        selection: tokens or pages. Its `log_weight` is added to the logits.
        sm_scale: the factor of the logits, 1/sqrt(d) by default.
        backend: which implementation. The kernel takes half and bfloat16, d of 64, 128 or 256, and pages of a power of
            two tokens.

    Returns:
        `(out, lse)`: `[b, Hq, d]` in the type of q, and `[b, Hq]` float32, the log of the sum of exponentials, with
        which partial results are merged (`ops.merge`). A row that selects nothing gives zeros and `-inf`.
    """
    check_tensor("q", q, (seq_lens.shape[0], None, k_pages.shape[-1]), dtype=FLOAT_DTYPES)
    check_tensor("v_pages", v_pages, k_pages.shape, dtype=k_pages.dtype)
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"q: expected a multiple of {k_pages.shape[1]} heads, got {q.shape[1]}")
    selection.check_fits("selection", seq_lens.shape[0], q.shape[1], k_pages.shape[1])
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    unsupported = unsupported_attention(q, k_pages, v_pages) or _unsupported_selection(selection)
    if kernels.use_kernel(backend, q.device, unsupported):
        return launch_attention(q, k_pages, v_pages, page_table, seq_lens, selection, scale)
    return _torch(q, k_pages, v_pages, page_table, seq_lens, selection, scale)


def _torch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selection: Selection,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    page_size = k_pages.shape[2]
    positions, valid = selection.positions(seq_lens)
    # A padded slot is read at position 0 and weighs nothing. Its value is cleared, because 0 * NaN is NaN.
    k = gather_tokens(k_pages, positions, page_table, page_size).float()
    v = gather_tokens(v_pages, positions, page_table, page_size).float().masked_fill(~valid.unsqueeze(-1), 0)
    grouped = q.float().unflatten(1, (k_pages.shape[1], -1))
    logits = grouped @ k.transpose(-1, -2) * scale
    log_weight = selection.token_log_weight()
    if log_weight is not None:
        logits = logits + log_weight.unflatten(1, (k_pages.shape[1], -1))
    # Masked last: what lies behind a row's end may be anything, the log_weight there too.
    logits = logits.masked_fill(~valid.unsqueeze(2), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.softmax(logits, dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    return (weights @ v).flatten(1, 2).to(q.dtype), lse.flatten(1)


def unsupported_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> str | None:
    """Say why the attention kernels cannot take these, or return None."""
    page_size = k_pages.shape[2]
    if q.dtype not in (torch.float16, torch.bfloat16) or k_pages.dtype != q.dtype:
        return f"q is {q.dtype} and the pages are {k_pages.dtype}; the kernel reads float16 or bfloat16, both alike"
    if q.shape[-1] not in CONFIGS:
        return f"head_dim is {q.shape[-1]}; the kernel is made for {', '.join(map(str, CONFIGS))}"
    if page_size & (page_size - 1):
        return f"page_size is {page_size}; the kernel needs a power of two"
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        return "the pages are not contiguous"
    if k_pages.numel() // k_pages.shape[-1] >= 2**31:
        return "the cache has 2**31 rows or more"
    return None


def _unsupported_selection(selection: Selection) -> str | None:
    if selection.granularity & (selection.granularity - 1):
        return f"the selection's granularity is {selection.granularity}; the kernel needs a power of two"
    return None


@functools.cache
def choose_config(dim: int, index: int) -> tuple[int, int, int]:
    """Return (warps, stages, blocks a multiprocessor) for a head_dim on a device."""
    per_block, total = shared_memory(index)

    def under_way(config: tuple[int, int]) -> int:
        warps, stages = config
        return blocks(config) * warps * (stages - 1)

    def blocks(config: tuple[int, int]) -> int:
        ring = ring_bytes(dim, *config)
        return total // (ring + 2048) if ring + 1024 <= per_block else 0

    best = max(CONFIGS[dim], key=under_way)
    return *best, max(1, blocks(best))


def ring_bytes(dim: int, warps: int, stages: int) -> int:
    """Return the dynamic shared memory of a block: for each warp and stage, 16 tokens of K and V."""
    return warps * stages * 2 * 16 * dim * 2


def launch_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selection: Selection | None,
    scale: float,
    *,
    config: tuple[int, int, int] | None = None,
    min_tiles: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel over `selection`, or over all tokens if it is None. See `sparse_attention`.

    Here q may be `[b, 1, Hq, d]`, and the results are shaped alike.
    """
    b, q_heads, dim = q.shape[0], q.shape[-2], q.shape[-1]
    kv_heads, page_size = k_pages.shape[1:3]
    group = q_heads // kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    warps, stages, per_sm = config or choose_config(dim, q.get_device())
    blocks = kernels.num_sms(q.get_device()) * per_sm
    rows = b * kv_heads * -(-group // HEADS_PER_ROW)
    # Two rows of a block can be shared with others, each with up to 8 heads: O, then (m, l).
    partial = torch.empty(2 * blocks * HEADS_PER_ROW * (dim + 2), dtype=torch.float32, device=q.device)
    state = partial.data_ptr() + 4 * 2 * blocks * HEADS_PER_ROW * dim
    counter = counters(q.device, rows)
    # Kept until the launch: a copy made here must not be freed and reused before the kernel is in the stream.
    q, page_table, seq_lens = q.contiguous(), page_table.contiguous(), seq_lens.contiguous()
    params = AttentionParams(
        q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), page_table.data_ptr(), seq_lens.data_ptr(),
        None, None, None, out.data_ptr(), lse.data_ptr(), partial.data_ptr(), state, counter.data_ptr(),
        scale / math.log(2), b, kv_heads, group, page_size.bit_length() - 1, page_table.shape[1], 0, 0,
        warps if min_tiles is None else min_tiles,
    )  # fmt: skip
    if selection is None:
        kernel = _kernel("dense_attention", q.dtype, dim, warps, stages, "", q.get_device())
    else:
        indices, lengths = selection.indices.contiguous(), selection.lengths.contiguous()
        weights = None if selection.log_weight is None else selection.log_weight.contiguous()
        params.indices, params.lengths = indices.data_ptr(), lengths.data_ptr()
        params.log_weight = None if weights is None else weights.data_ptr()
        params.capacity, params.granularity_shift = selection.capacity, selection.granularity.bit_length() - 1
        weighted = ", false" if weights is None else ", true"
        kernel = _kernel("sparse_attention", q.dtype, dim, warps, stages, weighted, q.get_device())
    kernel.launch((blocks, 1, 1), (32 * warps, 1, 1), params, ring_bytes(dim, warps, stages))
    return out, lse


@functools.cache
def _kernel(
    stem: str, dtype: torch.dtype, dim: int, warps: int, stages: int, weighted: str, device: int
) -> kernels.Kernel:
    kind = "half" if dtype == torch.float16 else "bf16"
    expression = f"{stem}<{kind}, {dim}, {warps}, {stages}{weighted}>"
    return kernels.load(stem, expression, max_dynamic_smem=ring_bytes(dim, warps, stages), device=device)
