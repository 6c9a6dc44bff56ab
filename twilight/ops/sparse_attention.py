"""Sparse attention: exact attention of one query a sequence over a list of its tokens."""

from __future__ import annotations

import torch

from twilight.checks import FLOAT_DTYPES, check_tensor
from twilight.ops.paging import gather_tokens
from twilight.selection import Selection


def sparse_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selection: Selection,
    *,
    sm_scale: float | None = None,
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

    Returns:
        `(out, lse)`: `[b, Hq, d]` in the type of q, and `[b, Hq]` float32, the log of the sum of exponentials, with
        which partial results are merged (`ops.merge`). A row that selects nothing gives zeros and `-inf`.
    """
    check_tensor("q", q, (seq_lens.shape[0], None, k_pages.shape[-1]), dtype=FLOAT_DTYPES)
    check_tensor("v_pages", v_pages, k_pages.shape, dtype=k_pages.dtype)
    page_size = k_pages.shape[2]
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"q: expected a multiple of {k_pages.shape[1]} heads, got {q.shape[1]}")
    selection.check_fits("selection", seq_lens.shape[0], q.shape[1], k_pages.shape[1])
    positions, valid = selection.positions(seq_lens)
    # A padded slot is read at position 0 and weighs nothing. Its value is cleared, because 0 * NaN is NaN.
    k = gather_tokens(k_pages, positions, page_table, page_size).float()
    v = gather_tokens(v_pages, positions, page_table, page_size).float().masked_fill(~valid.unsqueeze(-1), 0)
    grouped = q.float().unflatten(1, (k_pages.shape[1], -1))
    logits = grouped @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    log_weight = selection.token_log_weight()
    if log_weight is not None:
        logits = logits + log_weight.unflatten(1, (k_pages.shape[1], -1))
    # Masked last: what lies behind a row's end may be anything, the log_weight there too.
    logits = logits.masked_fill(~valid.unsqueeze(2), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.softmax(logits, dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    return (weights @ v).flatten(1, 2).to(q.dtype), lse.flatten(1)
