"""The two ends of a sequence, which many methods always attend to: attention sinks and the newest tokens."""

from __future__ import annotations

import torch

from twilight.budget import Budget


def ends(budget: Budget, seq_lens: torch.Tensor, num_tokens: int, *, sinks: int, local: int) -> torch.Tensor:
    """Return which tokens are a sequence's first `sinks` or newest `local`.

    A budget smaller than the sequence gives them half of itself at most, so that something is left to select with:
    first the newest token, then the sinks, then the rest of the newest.

    Args:
        budget: what each row may propose; the ends count towards it.
        seq_lens: `[b]` int32.
        num_tokens: n, at least the longest of `seq_lens`.
        sinks: tokens from the start.
        local: tokens from the end, at least 1.

    Returns:
        `[b, Hkv, n]` bool.
    """
    lens = seq_lens[:, None]
    room = torch.where(budget.tokens < lens, (budget.tokens // 2).clamp(min=1), budget.tokens)
    newest = (room - sinks).clamp(min=1, max=local)
    first = (room - newest).clamp(max=sinks)
    tokens = torch.arange(num_tokens, device=seq_lens.device)
    lens, newest, first = lens.unsqueeze(-1), newest.unsqueeze(-1), first.unsqueeze(-1)
    return (tokens < lens) & ((tokens < first) | (tokens >= lens - newest))
