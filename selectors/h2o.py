"""H2O: tokens that have gathered most attention, and a recent window (Zhang et al., arXiv 2306.14048; FMInference/H2O).

    A_i = sum over all queries t seen so far of softmax(q_t K^T)_i                 (section 4, algorithm 1)

Kept are the tokens of largest A and the newest ones; what is dropped is dropped for good, and A of the others goes on
to grow by what they weigh among those kept. Nothing is freed here: a dropped token is marked, and never proposed again.

A is summed over the query heads of a group and kept for each kv head, 4 bytes a token, read and written at every step.
It begins with the column sums of the whole prompt, which cost as much as the prompt's logits. What a token weighed in a
step is taken from the exact keys of the tokens that were attended to, which are read once more. Under a pruner only
those gain that it kept.

The official code drops tokens after a step, here it is done before the next: with a budget of heavy + recent + 1 the
sets are the same, as the newest token is in the budget here and beside it there. Its budgets are shares of the prompt's
length, fixed when decoding begins; here `budget` says (an int for a constant one). It has no grouped queries. Tokens of
a later prompt, and those below `min_context`, attend to everything, dropped or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Geometry, LayerCache, Selection, Selector, StateSpec, ops


@dataclass
class H2O(Selector):
    """Propose the tokens that have gathered most attention, and the newest ones.

    Attributes:
        heavy: share of the budget that goes to the former; the newest token is in any case among the latter.
        normalise: divide what a token has gathered by the number of queries that saw it, as kvpress does. Sums favour
            early tokens.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference, arXiv 2306.14048"

    heavy: float = 0.5
    normalise: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.heavy <= 1:
            raise ValueError(f"heavy: expected a share from 0 to 1, got {self.heavy}")

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        # -inf marks a token that has been dropped.
        return (StateSpec("mass", (), torch.float32, per="token"),)

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        g = layer.geometry
        mass = ops.attention_mass(
            q,
            ops.new_positions(layer.seq_lens, layer.new_tokens, q.shape[1]),
            layer.k_pages,
            layer.page_table,
            layer.seq_lens,
            max_seq_len=layer.max_seq_len,
            sm_scale=g.sm_scale,
        )
        layer.update_state("mass", layer.state("mass") + mass.unflatten(1, (g.num_kv_heads, -1)).sum(2))

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        mass, end = layer.state("mass"), layer.seq_lens[:, None, None]
        tokens = torch.arange(layer.max_seq_len, device=q.device)
        heavy = (budget.tokens * self.heavy).int().minimum(budget.tokens - 1).unsqueeze(-1)
        recent = tokens >= end - (budget.tokens.unsqueeze(-1) - heavy)
        scores = mass / (end - 1 - tokens).clamp(min=1) if self.normalise else mass
        gone = (mass == -torch.inf) | (tokens >= end)
        scores = scores.masked_fill(recent, torch.inf).masked_fill(gone, -torch.inf)
        chosen = Selection.top(scores, budget.tokens, capacity=budget.capacity, granularity=1)
        layer.update_state("mass", mass.masked_fill(~chosen.mask(layer.max_seq_len), -torch.inf))
        return chosen

    def finish(
        self, q: torch.Tensor, layer: LayerCache, kept: Selection, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = layer.geometry
        weights = ops.attention_weights(
            q, layer.k_pages, layer.page_table, layer.seq_lens, kept, lse, sm_scale=g.sm_scale
        )
        positions, _ = kept.positions(layer.seq_lens)  # what is not valid stands at 0 and weighs 0
        gained = weights.unflatten(1, (g.num_kv_heads, -1)).sum(2)
        layer.update_state("mass", layer.state("mass").scatter_add(-1, positions, gained))
        return out, lse

    def bytes_per_token(self, geometry: Geometry) -> float:
        return 2 * super().bytes_per_token(geometry)
