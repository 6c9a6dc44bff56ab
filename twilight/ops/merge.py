"""Merge: join attention over disjoint sets of tokens by their log-sum-exp."""

from __future__ import annotations

import torch

from twilight.checks import check_tensor


def merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Join partial results.

    Args:
        outs: `[parts, b, Hq, d]`, attention over each part, renormalised over that part.
        lses: `[parts, b, Hq]` float32, log of each part's sum of exponentials; `-inf` for a part without tokens.

    Returns:
        `(out, lse)`: `[b, Hq, d]` in the type of outs and `[b, Hq]` float32, attention over all parts.
    """
    check_tensor("outs", outs, (*lses.shape, None))
    lse = lses.float().logsumexp(0)
    # Not exp(lses - lse): the rounding of a large lse would leave weights that do not add up to 1.
    weights = torch.softmax(lses.float(), dim=0).masked_fill(lse == -torch.inf, 0)
    return (weights.unsqueeze(-1) * outs.float()).sum(0).to(outs.dtype), lse
