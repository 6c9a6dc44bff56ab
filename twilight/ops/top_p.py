"""Top-p: the smallest set of candidates whose mass reaches p, joined over the query heads of a group.

Over one query head's candidates, `w = softmax(logits)`. Kept is `{i : w_i >= t}` for the largest t whose kept mass is
at least p (Twilight, definition 3.3 and section 4.2). Ties at the threshold are all kept, p = 1 keeps every candidate,
at least one is kept. A kv head then keeps what any query head of its group keeps (appendix B.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twilight.checks import FLOAT_DTYPES, check_p, check_tensor
from twilight.selection import Selection


@dataclass(frozen=True)
class Pruned:
    """What is kept, and what each query head asked for.

    Attributes:
        selection: tokens, the union over each group.
        per_query_head: `[b, Hq]` int32, tokens that each query head kept.
        mass: `[b, Hq]` float32, the share of the candidates' estimated mass that the head's own tokens hold.
    """

    selection: Selection
    per_query_head: torch.Tensor
    mass: torch.Tensor


def top_p_mask(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Return which entries of each row top-p keeps.

    Args:
        logits: `[..., n]`, `-inf` where there is no candidate.
        p: mass to keep, in (0, 1].

    Returns:
        `[..., n]` bool. A row without candidates keeps nothing. A row with a NaN or `+inf` keeps all of its candidates,
        so that whatever is wrong with it shows in its own output.
    """
    check_tensor("logits", logits, dtype=FLOAT_DTYPES)
    check_p(p)
    logits = logits.double()
    candidates = logits != -torch.inf
    if p == 1.0:
        return candidates
    weights = torch.softmax(logits, dim=-1)
    descending = weights.sort(dim=-1, descending=True).values
    # The first prefix that reaches p; rounding may leave the last one a hair below, hence the clamp.
    reached = (descending.cumsum(-1) < p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    threshold = descending.gather(-1, reached)
    # Softmax of a row with NaN or +inf is NaN, and so is its threshold; of an empty row too, but it has no candidates.
    return candidates & ((weights >= threshold) | threshold.isnan())


def top_p(logits: torch.Tensor, candidates: Selection, seq_lens: torch.Tensor, p: float) -> Pruned:
    """Prune candidates to the mass p.

    Args:
        logits: `[b, Hq, capacity * granularity]`, `-inf` past a row's end.
        candidates: what the logits are of.
        seq_lens: `[b]` int32.
        p: mass to keep, in (0, 1].
    """
    check_tensor("logits", logits, (candidates.indices.shape[0], None, candidates.capacity * candidates.granularity))
    keep = top_p_mask(logits, p)
    weights = torch.softmax(logits.double(), dim=-1)
    mass = (weights * keep).sum(-1).float()
    return _union(keep, mass.nan_to_num(0.0), candidates, seq_lens)


def keep_all(candidates: Selection, seq_lens: torch.Tensor) -> Pruned:
    """Keep every candidate, as tokens. Query heads are not told apart: counts and mass come a kv head."""
    _, valid = candidates.positions(seq_lens)
    return _union(valid, torch.ones(valid.shape[:2], device=valid.device), candidates, seq_lens)


def _union(keep: torch.Tensor, mass: torch.Tensor, candidates: Selection, seq_lens: torch.Tensor) -> Pruned:
    positions, _ = candidates.positions(seq_lens)
    union = keep.unflatten(1, (positions.shape[1], -1)).any(2)
    selection = Selection.compact(positions, union, granularity=1, log_weight=candidates.token_log_weight())
    if selection.indices.device.type == "cpu":
        # On a GPU the padding stays, so that no length has to reach the host; here it would be read for nothing.
        selection = selection.trimmed()
    return Pruned(selection, keep.sum(-1, dtype=torch.int32), mass)
