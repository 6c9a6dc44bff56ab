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
from twilight.ops.tail import Tail
from twilight.selection import Selection

HEADS_PER_ROW = 8
"""Query heads that one row of the kernel takes; larger groups make several rows."""

CONFIGS = {64: ((4, 4), (4, 2)), 128: ((4, 3), (4, 2)), 256: ((4, 2), (2, 2))}
"""For each head_dim, (warps, stages of the ring) to choose from, see `choose_config`."""

_MANY_ROWS = 8
"""Blocks a row, at most, where rows are many. On an H200 at d=128, three blocks a multiprocessor with two stages take
17.4 us where two with three take 15.4 at 33 blocks a row, 11.3 for 11.1 at 12, 13.3 for 14.1 at 6, 43.8 for 44.7
at 1."""
_MAX_BLOCKS = 1024
"""The kernel divides numbers of blocks as floats, which is exact for up to 1180."""
_MAX_ROWS = 2**20
"""Likewise rows, which are exact up to 1.4 million."""


class AttentionParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/attention_rows.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "q", "k_pages", "v_pages", "page_table", "seq_lens", "indices", "lengths", "log_weight", "out", "lse",
            "partial", "partial_state", "counters",
        )),
        *((name, ctypes.c_float) for name in ("scale_log2", "per_kv_head")),
        *((name, ctypes.c_int) for name in (
            "batch", "num_kv_heads", "group", "page_shift", "max_pages", "capacity", "granularity_shift", "min_tiles",
            "tail_capacity",
        )),
        *((name, ctypes.c_void_p) for name in (
            "tail_indices", "tail_lengths", "tail_logits", "tail_values", "tail_params",
        )),
    ]  # fmt: skip


STRUCTS = (AttentionParams,)
INSTANTIATIONS = tuple(
    f"sparse_attention<{dtype}, {dim}, {warps}, {stages}, {flags}>"
    for dtype in ("half", "bf16") for dim, configs in CONFIGS.items() for warps, stages in configs
    for flags in ("false", "true", "false, 1", "false, 2")
)  # fmt: skip


def sparse_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selection: Selection,
    *,
    tail: Tail | None = None,
    sm_scale: float | None = None,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the selected tokens, renormalised over them and the tail.

    Every query head attends to the whole list of its kv head. Softmax and accumulation are in float32.

    Args:
        q: `[b, Hq, d]`.
        k_pages, v_pages: `[pages, Hkv, P, d]`.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        selection: tokens or pages. Its `log_weight` is added to the logits.
        tail: pseudo-tokens, logit and value given, that count as tokens do; see `twilight.ops.tail`.
        sm_scale: the factor of the logits, 1/sqrt(d) by default.
        backend: which implementation. The kernel takes half and bfloat16, d of 64, 128 or 256, and pages of a power of
            two tokens; a tail not together with a `log_weight`, and its means in the type of q or in 8 bits.

    Returns:
        `(out, lse)`: `[b, Hq, d]` in the type of q, and `[b, Hq]` float32, the log of the sum of exponentials, with
        which partial results are merged (`ops.merge`). A row that selects nothing gives zeros and `-inf`.
    """
    check_tensor("q", q, (seq_lens.shape[0], None, k_pages.shape[-1]), dtype=FLOAT_DTYPES)
    check_tensor("v_pages", v_pages, k_pages.shape, dtype=k_pages.dtype)
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"q: expected a multiple of {k_pages.shape[1]} heads, got {q.shape[1]}")
    selection.check_fits("selection", seq_lens.shape[0], q.shape[1], k_pages.shape[1])
    if tail is not None:
        tail.pages.check_fits("tail.pages", seq_lens.shape[0], q.shape[1], k_pages.shape[1])
        check_tensor("tail.means.values[0]", tail.means.values[0], (*k_pages.shape[:2], k_pages.shape[3]))
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    unsupported = (
        unsupported_attention(q, k_pages, v_pages) or too_many_rows(q) or _unsupported_lists(selection, tail, k_pages)
    )
    if kernels.use_kernel(backend, q.device, unsupported):
        return launch_attention(q, k_pages, v_pages, page_table, seq_lens, selection, scale, tail=tail)
    return _torch(q, k_pages, v_pages, page_table, seq_lens, selection, scale, tail)


def _torch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selection: Selection,
    scale: float,
    tail: Tail | None,
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
    if tail is not None:
        extra, means = _pseudo_tokens(tail, page_table)
        logits, v = torch.cat([logits, extra], dim=-1), torch.cat([v, means], dim=2)
    lse = logits.logsumexp(-1)
    weights = torch.softmax(logits, dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    return (weights @ v).flatten(1, 2).to(q.dtype), lse.flatten(1)


def _pseudo_tokens(tail: Tail, page_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits `[b, Hkv, G, n]` and values `[b, Hkv, n, d]` of a tail, float32."""
    assert tail.pages.log_weight is not None
    counted = tail.pages.counted()
    logical = tail.pages.indices.long().masked_fill(~counted, 0).clamp(max=page_table.shape[1] - 1)
    pages = page_table.long().gather(1, logical.flatten(1)).view_as(logical)
    logits = tail.pages.log_weight.unflatten(1, (logical.shape[1], -1)).masked_fill(~counted.unsqueeze(2), -torch.inf)
    return logits, tail.means.gather(pages).masked_fill(~counted.unsqueeze(-1), 0)


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


def too_many_rows(q: torch.Tensor) -> str | None:
    """Say that a batch has more rows than the kernel can count, or return None."""
    if q.numel() // q.shape[-1] > _MAX_ROWS:
        return f"there are more than {_MAX_ROWS} query heads of all sequences together"
    return None


def _unsupported_lists(selection: Selection, tail: Tail | None, k_pages: torch.Tensor) -> str | None:
    if selection.granularity & (selection.granularity - 1):
        return f"the selection's granularity is {selection.granularity}; the kernel needs a power of two"
    if tail is None:
        return None
    if selection.log_weight is not None:
        return "the selection has a log_weight; the kernel takes either that or a tail"
    if tail.means.page_size != k_pages.shape[2]:
        return f"the tail's pages have {tail.means.page_size} tokens and the cache's {k_pages.shape[2]}"
    values = tail.means.values
    if len(values) == 1 and values[0].dtype != k_pages.dtype:
        return f"the tail's means are {values[0].dtype} and the pages {k_pages.dtype}"
    if not all(part.is_contiguous() for part in values):
        return "the tail's means are not contiguous"
    return None


@functools.cache
def choose_config(dim: int, rows: int, index: int) -> tuple[int, int, int]:
    """Return (warps, stages, blocks a multiprocessor by shared memory) for a head_dim and some rows on a device.

    Few rows, each cut among many blocks, want the most bytes under way a block: parts are joined at the end, and each
    more costs. Many rows want the most warps, which have less to wait for where a row ends. Two warps a block are for
    GPUs that cannot have four.
    """
    per_block, total = shared_memory(index)
    blocks: dict[tuple[int, int], int] = {
        config: max(1, total // (ring + 2048))
        for config in CONFIGS[dim] if (ring := ring_bytes(dim, *config)) + 1024 <= per_block
    }  # fmt: skip
    few = max(blocks, key=lambda config: (config[0], blocks[config] * config[0] * (config[1] - 1)))
    many = max(blocks, key=lambda config: (config[0], blocks[config] * config[0], config[1]))
    best = many if kernels.num_sms(index) * blocks[many] <= _MANY_ROWS * rows else few
    return *best, blocks[best]


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
    tail: Tail | None = None,
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
    rows, device = b * kv_heads * -(-group // HEADS_PER_ROW), q.get_device()
    warps, stages, per_sm = config or choose_config(dim, rows, device)
    flags = ""
    if selection is not None:
        flags = ", false" if selection.log_weight is None else ", true"
        if tail is not None:
            flags = f", false, {len(tail.means.values)}"
    stem = "dense_attention" if selection is None else "sparse_attention"
    kernel, smem = _kernel(stem, q.dtype, dim, warps, stages, flags, device), ring_bytes(dim, warps, stages)
    # Registers may hold fewer: a block too many would begin when all others have ended.
    per_sm = min(per_sm, kernel.resident(32 * warps, smem))
    blocks = min(kernels.num_sms(device) * per_sm, _MAX_BLOCKS)
    # Two rows of a block can be shared with others, each with up to 8 heads: O, then (m, l).
    partial = torch.empty(2 * blocks * HEADS_PER_ROW * (dim + 2), dtype=torch.float32, device=q.device)
    state = partial.data_ptr() + 4 * 2 * blocks * HEADS_PER_ROW * dim
    counter = counters(q.device, rows)
    # Kept until the launch: a copy made here must not be freed and reused before the kernel is in the stream.
    q, page_table, seq_lens = q.contiguous(), page_table.contiguous(), seq_lens.contiguous()
    params = AttentionParams(
        q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), page_table.data_ptr(), seq_lens.data_ptr(),
        None, None, None, out.data_ptr(), lse.data_ptr(), partial.data_ptr(), state, counter.data_ptr(),
        scale / math.log(2), 1 / kv_heads, b, kv_heads, group, page_size.bit_length() - 1, page_table.shape[1], 0, 0,
        warps if min_tiles is None else min_tiles, 0,
    )  # fmt: skip
    if selection is not None:
        indices, lengths = selection.indices.contiguous(), selection.lengths.contiguous()
        weights = None if selection.log_weight is None else selection.log_weight.contiguous()
        params.indices, params.lengths = indices.data_ptr(), lengths.data_ptr()
        params.log_weight = None if weights is None else weights.data_ptr()
        params.capacity, params.granularity_shift = selection.capacity, selection.granularity.bit_length() - 1
        if tail is not None:
            pages, pseudo_logits = tail.pages, tail.pages.log_weight
            assert pseudo_logits is not None
            listed, counts, pseudo_logits = (
                part.contiguous() for part in (pages.indices, pages.lengths, pseudo_logits)
            )
            params.tail_capacity = pages.capacity
            params.tail_indices, params.tail_lengths = listed.data_ptr(), counts.data_ptr()
            params.tail_logits, params.tail_values = pseudo_logits.data_ptr(), tail.means.values[0].data_ptr()
            params.tail_params = tail.means.values[1].data_ptr() if len(tail.means.values) == 2 else None
    kernel.launch((blocks, 1, 1), (32 * warps, 1, 1), params, smem)
    return out, lse


@functools.cache
def _kernel(
    stem: str, dtype: torch.dtype, dim: int, warps: int, stages: int, flags: str, device: int
) -> kernels.Kernel:
    kind = "half" if dtype == torch.float16 else "bf16"
    expression = f"{stem}<{kind}, {dim}, {warps}, {stages}{flags}>"
    return kernels.load(stem, expression, max_dynamic_smem=ring_bytes(dim, warps, stages), device=device)
