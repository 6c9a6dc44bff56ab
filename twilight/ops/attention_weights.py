"""Attention weights: what each token weighed in a sparse attention that has run."""

from __future__ import annotations

import torch

from twilight.checks import check_tensor
from twilight.ops.paging import gather_tokens
from twilight.selection import Selection


def attention_weights(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selection: Selection,
    lse: torch.Tensor,
    *,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Return the weights of a sparse attention that has run, from its `lse`. Reads the selected keys once more.

    Args:
        q: `[b, Hq, d]`.
        k_pages: `[pages, Hkv, P, d]`.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        selection: what was attended to.
        lse: `[b, Hq]` float32.
        sm_scale: the factor of the logits, 1/sqrt(d) by default.

    Returns:
        `[b, Hq, capacity * granularity]` float32, 0 past a row's end; `Selection.positions` has the tokens.
    """
    check_tensor("lse", lse, q.shape[:2])
    selection.check_fits("selection", seq_lens.shape[0], q.shape[1], k_pages.shape[1])
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    where, valid = selection.positions(seq_lens)
    k = gather_tokens(k_pages, where, page_table, k_pages.shape[2]).float()
    logits = (q.float().unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2) * scale).flatten(1, 2)
    log_weight = selection.token_log_weight()
    if log_weight is not None:
        logits = logits + log_weight
    weights = torch.exp(logits - lse.unsqueeze(-1))
    return weights.masked_fill(~valid.repeat_interleave(q.shape[1] // k.shape[1], dim=1), 0)
