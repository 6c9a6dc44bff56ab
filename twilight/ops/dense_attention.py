"""Dense attention over the paged cache: the fallback for short contexts, and steps of several tokens."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from twilight import kernels
from twilight.checks import FLOAT_DTYPES, check_tensor
from twilight.ops.sparse_attention import (
    CONFIGS,
    AttentionParams,
    launch_attention,
    too_many_rows,
    unsupported_attention,
)

STRUCTS = (AttentionParams,)
INSTANTIATIONS = tuple(
    f"dense_attention<{dtype}, {dim}, {warps}, {stages}>"
    for dtype in ("half", "bf16") for dim, configs in CONFIGS.items() for warps, stages in configs
)  # fmt: skip


def gather_dense(pages: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, length: int) -> torch.Tensor:
    """Lay paged rows out side by side: `[b, Hkv, length, d]`, zeros behind each sequence's end; the heads of a sequence
    need not follow each other in memory.
    """
    num_pages = -(-length // pages.shape[2])
    # Indexed with the heads in front, so that one copy does it.
    rows = pages.transpose(0, 1)[:, page_table[:, :num_pages].long()].flatten(2, 3).transpose(0, 1)[:, :, :length]
    # Where lengths are on the host, what is full is left alone.
    full = int(seq_lens.min()) if seq_lens.device.type == "cpu" and len(seq_lens) else 0
    behind = torch.arange(full, rows.shape[2], device=rows.device) >= seq_lens[:, None]
    rows[:, :, full:].masked_fill_(behind[:, None, :, None], 0)
    return rows


def exact_logits(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_seq_len: int,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Return the exact logits of one query a sequence over all of its tokens: what estimates are measured against.

    Args:
        q: `[b, Hq, d]`.
        k_pages: `[pages, Hkv, P, d]`.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        max_seq_len: the longest of `seq_lens`, known on the host.
        sm_scale: the factor of the logits, 1/sqrt(d) by default.

    Returns:
        `[b, Hq, max_seq_len]` float32, `-inf` behind each sequence's end.
    """
    k = gather_dense(k_pages, page_table, seq_lens, max_seq_len).float()
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    logits = (q.float().unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2) * scale).flatten(1, 2)
    past = torch.arange(max_seq_len, device=q.device) >= seq_lens[:, None, None]
    return logits.masked_fill(past, -torch.inf)


def dense_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_seq_len: int,
    new_tokens: torch.Tensor | None = None,
    sm_scale: float | None = None,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend causally to every token of the sequence.

    Args:
        q: `[b, n, Hq, d]`, the queries of each sequence's last tokens, first `new_tokens[i]` of row i real.
        k_pages, v_pages: `[pages, Hkv, P, d]`.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32, the new tokens counted.
        max_seq_len: the longest of `seq_lens`, known on the host.
        new_tokens: `[b]` int32; n for every sequence by default.
        sm_scale: the factor of the logits, 1/sqrt(d) by default.
        backend: which implementation. The kernel takes one query a sequence (n = 1, no `new_tokens`), half or bfloat16,
            and d of 64, 128 or 256; else it is torch's scaled dot product attention.

    Returns:
        `(out, lse)`: `[b, n, Hq, d]` in the type of q, and `[b, n, Hq]` float32. Zeros and `-inf` for an empty
        sequence; a query that is not real gives something finite.
    """
    check_tensor("q", q, (seq_lens.shape[0], None, None, k_pages.shape[-1]), dtype=FLOAT_DTYPES)
    check_tensor("v_pages", v_pages, k_pages.shape, dtype=k_pages.dtype)
    if q.shape[2] % k_pages.shape[1]:
        raise ValueError(f"q: expected a multiple of {k_pages.shape[1]} heads, got {q.shape[2]}")
    steps = q.shape[1]
    if kernels.use_kernel(backend, q.device, _unsupported(q, k_pages, v_pages, new_tokens)):
        scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        return launch_attention(q, k_pages, v_pages, page_table, seq_lens, None, scale)
    if max_seq_len == 0:
        return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=q.device)
    counts = torch.full_like(seq_lens, steps) if new_tokens is None else new_tokens
    k, v = (gather_dense(pages, page_table, seq_lens, max_seq_len) for pages in (k_pages, v_pages))
    last = (seq_lens - counts)[:, None] + torch.arange(steps, device=q.device)
    # A query that is not real sees the first token, so that its softmax is over something.
    last = last.clamp(min=0).minimum((seq_lens - 1).clamp(min=0)[:, None])
    mask = torch.arange(max_seq_len, device=q.device) <= last[:, None, :, None]
    ragged = bool((seq_lens != max_seq_len).any()) if seq_lens.device.type == "cpu" else True
    masked = ragged or steps > 1
    group = q.shape[2] // k.shape[1]
    k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
    queries = q.transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask if masked else None, scale=sm_scale)
    logits = queries.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    lse = logits.masked_fill(~mask, -torch.inf).logsumexp(-1)
    empty = (seq_lens == 0)[:, None, None]
    out = out.transpose(1, 2).masked_fill(empty.unsqueeze(-1), 0).contiguous()
    return out, lse.transpose(1, 2).masked_fill(empty, -torch.inf)


def _unsupported(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, new_tokens: torch.Tensor | None
) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    if q.shape[1] != 1 or new_tokens is not None:
        return f"q has {q.shape[1]} tokens a sequence, or new_tokens is given; the kernel takes one token of each"
    return unsupported_attention(q, k_pages, v_pages) or too_many_rows(q)
