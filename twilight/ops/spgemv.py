"""SpGEMV: estimate the logits of the candidates from the 4-bit keys (Twilight, section 4.2)."""

from __future__ import annotations

import torch

from twilight.checks import FLOAT_DTYPES, check_tensor
from twilight.ops.paging import gather_tokens
from twilight.ops.quantize import split_shadow, unpack
from twilight.selection import Selection


def estimate_scores(
    q: torch.Tensor,
    shadow: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    candidates: Selection,
    *,
    page_size: int,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Estimate `q . k * sm_scale` for every candidate, for every query head of its group.

    With codes c, scale s and zero z of a key, `q . k ~ s * sum(q_i * c_i) + z * sum(q_i)`: the second sum is taken once
    a query, and the keys are never written out.

    Args:
        q: `[b, Hq, d]`.
        shadow: `[pages, Hkv, P*d/2 + 4*P]` uint8.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        candidates: tokens or pages, rows for Hkv heads. Its `log_weight` is added.
        page_size: P.
        sm_scale: the factor of the logits, 1/sqrt(d) by default.

    Returns:
        `[b, Hq, capacity * granularity]` float32, `-inf` past a row's end.

    Raises:
        TypeError, ValueError: shapes and types that do not fit together.
    """
    check_tensor("q", q, (seq_lens.shape[0], None, None), dtype=FLOAT_DTYPES)
    num_kv_heads, head_dim = shadow.shape[1], q.shape[-1]
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"q: expected a multiple of {num_kv_heads} heads, got {q.shape[1]}")
    check_tensor("shadow", shadow, (None, None, page_size * head_dim // 2 + 4 * page_size), dtype=torch.uint8)
    candidates.check_fits("candidates", seq_lens.shape[0], q.shape[1], num_kv_heads)
    positions, valid = candidates.positions(seq_lens)
    codes, params = (gather_tokens(part, positions, page_table, page_size) for part in split_shadow(shadow, page_size))
    grouped = q.float().unflatten(1, (num_kv_heads, -1))
    scale, zero = params.float().unsqueeze(2).unbind(-1)
    dots = grouped @ unpack(codes).float().transpose(-1, -2)
    logits = (scale * dots + zero * grouped.sum(-1, keepdim=True)) * (head_dim**-0.5 if sm_scale is None else sm_scale)
    log_weight = candidates.token_log_weight()
    if log_weight is not None:
        logits = logits + log_weight.unflatten(1, (num_kv_heads, -1))
    # Masked last: what lies behind a row's end may be anything, the log_weight there too.
    return logits.masked_fill(~valid.unsqueeze(2), -torch.inf).flatten(1, 2)
