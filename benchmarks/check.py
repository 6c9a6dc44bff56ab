"""Is what was timed right? Asked in the same run, of the first layer's first sequence."""

from __future__ import annotations

import torch

from twilight import Selection, TwilightAttention, ops
from twilight.attention import Step
from twilight.graph import StaticCache
from twilight.ops.tail import Tail
from twilight.ops.top_p import Pruned

from .workload import layers_of

TOLERANCE = 1e-2
"""Relative error of an output in bfloat16: its rounding is 2e-3."""
STAGES_TOLERANCE = 5e-2
"""Likewise, of one kernel against what the stages keep one after another: a token at the threshold, some 0.3 % of the
mass, may be on either side of it, and so may a page at the budget's end."""


class WrongOutput(AssertionError):
    """What was to be timed computes something else."""


def check_close(out: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    """Return the relative error of an output.

    Raises:
        WrongOutput: it is above the tolerance.
    """
    error = float((out.float() - expected.float()).norm() / expected.float().norm())
    if not error <= tolerance:
        raise WrongOutput(f"{what}: the output is {error:.3g} away from the reference")
    return error


def check_step(
    attention: TwilightAttention, static: StaticCache, q: torch.Tensor, kept: Pruned, what: str
) -> dict[str, float]:
    """Compare a step of the first layer with the reference over what it kept, and say what mass that holds.

    Args:
        attention: the method.
        static: the cache.
        q: `[b, Hq, d]`, the first layer's queries.
        kept: what the stages keep for them, one after another.
        what: the method's name.

    Returns:
        ``error_to_reference``, and the share of the exact attention mass in what is kept, mean and least over heads.

    Raises:
        WrongOutput: the output is not that of the tokens which the step says it kept, or far from that of `kept`.
    """
    layer, first = layers_of(static)[0], slice(0, 1)
    lens, table = layer.seq_lens[first], layer.page_table[first]

    def reference(pruned: Pruned) -> torch.Tensor:
        tail = None if pruned.tail is None else Tail(_first_row(pruned.tail.pages), pruned.tail.means)
        pages = (layer.k_pages, layer.v_pages, table, lens)
        scale = static.geometry.sm_scale
        return ops.sparse_attention(
            q[first], *pages, _first_row(pruned.selection), tail=tail, sm_scale=scale, backend="torch"
        )[0]

    out = attention.attend(q, layer)[0][first]
    steps: list[Step] = []
    before, attention.observer = attention.observer, steps.append
    try:
        observed = attention.attend(q, layer)[0][first]
    finally:
        attention.observer = before
    own = steps[0].pruned
    assert own is not None, "a method's own step is sparse"
    expected = reference(own)
    error = max(check_close(out, expected, what), check_close(observed, expected, what))
    check_close(out, reference(kept), f"{what}, beside its stages", STAGES_TOLERANCE)
    selection = _first_row(own.selection)
    logits = ops.exact_logits(q[first], layer.k_pages, table, lens, max_seq_len=layer.max_seq_len)
    weights = logits.softmax(-1).unflatten(1, (static.geometry.num_kv_heads, -1))
    positions, valid = selection.positions(lens)
    at = positions[:, :, None].expand(-1, -1, weights.shape[2], -1)
    mass = weights.gather(-1, at).masked_fill(~valid[:, :, None], 0).sum(-1)
    return {"error_to_reference": error, "true_mass_kept": float(mass.mean()), "true_mass_kept_min": float(mass.min())}


def _first_row(selection: Selection) -> Selection:
    """Return the first sequence's part, without what lies behind its longest list."""
    longest = max(1, int(selection.lengths[0].max()))
    part = Selection(
        selection.indices[:1, :, :longest].contiguous(), selection.lengths[:1].contiguous(), selection.granularity
    )
    weight = None if selection.log_weight is None else selection.log_weight[:1, :, :longest].contiguous()
    return Selection(part.indices.masked_fill(~part.counted(), 0), part.lengths, part.granularity, weight)
