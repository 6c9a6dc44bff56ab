"""Window scores: what the end of a prompt looks at, pooled over neighbours (SnapKV, arXiv 2404.14469, section 4)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from twilight.ops.attention_mass import attention_mass


def window_scores(
    q: torch.Tensor,
    positions: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_seq_len: int,
    kernel: int,
    pool: Literal["max", "avg"],
    reduce: Literal["mean", "max"] = "mean",
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Add up the attention that a window of queries gives to each token before it, and pool it.

    Args:
        q: `[b, w, Hq, d]`, the window's queries.
        positions: `[b, w]` int, where they stand; -1 for one that is not there.
        k_pages: `[pages, Hkv, P, d]`.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32, above every position.
        max_seq_len: the longest of `seq_lens`, known on the host.
        kernel: tokens that pooling joins, an odd number; 1 for none.
        pool: the largest of them, or their average, what lies outside counting as 0.
        reduce: how the query heads of a group are combined, before pooling.
        sm_scale: the factor of the logits, 1/sqrt(d) by default.

    Returns:
        `[b, Hkv, max_seq_len]` float32, `-inf` from the window's first query on.
    """
    mass = attention_mass(
        q, positions, k_pages, page_table, seq_lens, max_seq_len=max_seq_len, sm_scale=sm_scale
    ).unflatten(1, (k_pages.shape[1], -1))
    start = positions.masked_fill(positions < 0, max_seq_len).amin(1)[:, None, None]
    scored = torch.arange(max_seq_len, device=q.device) < start
    combined = (mass.mean(2) if reduce == "mean" else mass.amax(2)).masked_fill(~scored, 0)
    pooled = (F.max_pool1d if pool == "max" else F.avg_pool1d)(combined, kernel, 1, kernel // 2)
    return pooled.masked_fill(~scored, -torch.inf)


def window(
    q: torch.Tensor, seq_lens: torch.Tensor, new_tokens: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last queries of a step, `[b, size, Hq, d]`, and where they stand, `[b, size]`; -1 for one too many.

    Args:
        q: `[b, n, Hq, d]`, of row i the first `new_tokens[i]` count.
        seq_lens, new_tokens: `[b]` int32, the new tokens counted in `seq_lens`.
        size: w.
    """
    which = new_tokens.long()[:, None] + torch.arange(-size, 0, device=q.device)
    taken = which.clamp(0, max(0, q.shape[1] - 1))[..., None, None].expand(-1, -1, *q.shape[2:])
    positions = (seq_lens - new_tokens).long()[:, None] + which
    return q.gather(1, taken), positions.masked_fill(which < 0, -1)
