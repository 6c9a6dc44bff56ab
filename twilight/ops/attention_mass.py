"""Attention mass: how much attention each token receives from many queries of a prompt."""

from __future__ import annotations

import torch

from twilight.checks import FLOAT_DTYPES, check_tensor
from twilight.ops.dense_attention import gather_dense

_LOGITS = 1 << 25
"""Logits that are held at a time: 128 MB. A prompt of 32k tokens of 32 heads then goes in blocks of 32 queries."""


def attention_mass(
    q: torch.Tensor,
    positions: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_seq_len: int,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Add up the attention weights that queries give to each token, the softmax being causal and over all tokens.

    Costs as much as the logits of dense attention, in float32, and never holds more than a block of them.

    Args:
        q: `[b, n, Hq, d]`.
        positions: `[b, n]` int, where each query stands: it sees the tokens up to there. One of -1 is not counted.
        k_pages: `[pages, Hkv, P, d]`.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32, above every position.
        max_seq_len: the longest of `seq_lens`, known on the host.
        sm_scale: the factor of the logits, 1/sqrt(d) by default.

    Returns:
        `[b, Hq, max_seq_len]` float32; each row sums to its number of counted queries.
    """
    check_tensor("q", q, (seq_lens.shape[0], None, None, k_pages.shape[-1]), dtype=FLOAT_DTYPES)
    check_tensor("positions", positions, q.shape[:2])
    b, n, heads, _ = q.shape
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    keys = gather_dense(k_pages, page_table, seq_lens, max_seq_len).float().transpose(-1, -2)
    mass = torch.zeros(b, heads, max_seq_len, device=q.device)
    tokens = torch.arange(max_seq_len, device=q.device)
    block = max(1, _LOGITS // max(1, b * heads * max_seq_len))
    for first in range(0, n, block):
        part, where = q[:, first : first + block].float(), positions[:, first : first + block]
        grouped = part.unflatten(2, (keys.shape[1], -1)).permute(0, 2, 3, 1, 4)  # [b, Hkv, G, n, d]
        logits = (grouped @ keys.unsqueeze(2) * scale).flatten(1, 2)
        hidden = tokens > where[:, None, :, None].clamp(min=0)
        weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)
        mass += weights.masked_fill((where < 0)[:, None, :, None], 0).sum(2)
    return mass
