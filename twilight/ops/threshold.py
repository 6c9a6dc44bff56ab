"""Threshold: the candidates that weigh enough, joined over the query heads of a group.

Over one query head's candidates, `w = softmax(logits)`. Kept is `{i : w_i >= max(share * max w, weight)}`. A share of
the maximum is what A3 prunes by after scoring (Ham et al., HPCA 2020, arXiv 2002.10941) and min-p among the samplers
(Nguyen et al., arXiv 2407.01082); in logits it is a distance, `z_i >= max z + log(share)`, so that it needs neither a
sum nor a sort. An absolute weight is epsilon sampling (Hewitt et al., arXiv 2210.15191). The heaviest candidates are
kept even where they weigh less than `weight`.
"""

from __future__ import annotations

import math

import torch

from twilight.checks import FLOAT_DTYPES, check_tensor
from twilight.ops.tail import MeanValues
from twilight.ops.top_p import Pruned, join_group
from twilight.selection import Selection


def check_threshold(share: object, weight: object) -> None:
    """Refuse shares and weights that are no numbers from 0 to 1, and a pair that would prune nothing."""
    for name, value in (("share", share), ("weight", weight)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float in [0, 1], got {type(value).__name__}")
        if math.isnan(value) or not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: expected a float in [0, 1], got {value}")
    if not share and not weight:
        raise ValueError("share: expected more than 0 where weight is 0, or every candidate would be kept")


def threshold_mask(logits: torch.Tensor, *, share: float = 0.0, weight: float = 0.0) -> torch.Tensor:
    """Return which entries of each row weigh enough.

    Args:
        logits: `[..., n]`, `-inf` where there is no candidate.
        share: of the row's largest weight, in [0, 1].
        weight: absolute, in [0, 1], of a row that adds up to 1.

    Returns:
        `[..., n]` bool. A row without candidates keeps nothing. A row with a NaN or `+inf` keeps all of its candidates.
    """
    check_tensor("logits", logits, dtype=FLOAT_DTYPES)
    check_threshold(share, weight)
    logits = logits.double()
    top = logits.amax(-1, keepdim=True)
    cut = torch.full_like(top, -torch.inf)
    if share:
        cut = top + math.log(share)
    if weight:
        cut = torch.maximum(cut, logits.logsumexp(-1, keepdim=True) + math.log(weight)).minimum(top)
    sick = top.isnan() | (top == torch.inf)
    return (logits != -torch.inf) & ((logits >= cut) | sick)


def threshold(
    logits: torch.Tensor,
    candidates: Selection,
    seq_lens: torch.Tensor,
    *,
    share: float = 0.0,
    weight: float = 0.0,
    means: MeanValues | None = None,
) -> Pruned:
    """Prune the candidates that weigh too little. Runs in torch on any device, but for the tail of tokens.

    Args:
        logits: `[b, Hq, capacity * granularity]`, `-inf` past a row's end.
        candidates: what the logits are of.
        seq_lens: `[b]` int32.
        share, weight: see `threshold_mask`.
        means: the mean value of every page, if what is pruned shall leave a tail (`twilight.ops.tail`).
    """
    check_tensor("logits", logits, (candidates.indices.shape[0], None, candidates.capacity * candidates.granularity))
    if logits.shape[1] % candidates.indices.shape[1]:
        raise ValueError(f"logits: expected a multiple of {candidates.indices.shape[1]} heads, got {logits.shape[1]}")
    keep = threshold_mask(logits, share=share, weight=weight)
    return join_group(keep, logits, candidates, seq_lens, means)
