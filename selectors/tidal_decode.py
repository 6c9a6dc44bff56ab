"""TidalDecode: one layer selects, the next ones read the same tokens (Yang et al., arXiv 2410.05076).

The first sparse layer and one in the middle attend to everything, and hand the tokens of largest q . k on; the layers
after each of them attend to those. With a(l) the last of these two layers up to layer l,

    I_l = the B0 tokens i of largest q_a(l) . k_{a(l), i}
    out_l = Attn(q_l, K_l, V_l) if l = a(l), and Attn(q_l, K_l[I_l], V_l[I_l]) otherwise         (section 3)

Nothing is kept from step to step, 0 bytes a token, only a list from layer to layer; the two layers read every key,
which is 2 * 2 d / L bytes a token of a kv head in bf16, shared out among the L sparse layers.

In the official code (DerrickYLJ/TidalDecode) the middle layer is 13 of 32 for Llama 3, 9 by default, 12 in the CUDA
path and 7 for Llama 2: it is to be chosen for each model. The newest token is always in the list, and counts towards
the budget, as in that CUDA path. Official lists are per query head, here the query heads of a group are combined. The
correction of the paper, a dense prefill of decoded tokens every few steps, is not done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Contract, Geometry, LayerCache, Selection, Selector, check_reduce, ops


@dataclass
class _Scored:
    """What a layer that selects leaves for the next ones."""

    logits: torch.Tensor
    tokens: torch.Tensor | None = None
    chosen: Selection | None = None


@dataclass
class TidalDecode(Selector):
    """Propose everything in two layers, and in the others what scored highest in the nearest of those before.

    Attributes:
        reselect: the model's number of the layer that selects anew. By default the sparse layer nearest to 0.4 of the
            depth, which is layer 13 of 32.
        attend_all: the layers that select attend to everything. If False, to what they select.
        reduce: how the query heads of a group are combined: "softmax", "sum" or "max"; see `combine_group`.
    """

    name: ClassVar[str] = "tidal_decode"
    paper: ClassVar[str] = "TidalDecode: Fast and Accurate LLM Decoding with PPSA, arXiv 2410.05076"

    reselect: int | None = None
    attend_all: bool = True
    reduce: str = "softmax"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)

    def contract(self) -> Contract:
        return Contract(budget=not self.attend_all)

    def prepare(self, geometry: Geometry) -> None:
        if self.reselect is not None and self.reselect not in geometry.layer_ids:
            sparse = ", ".join(map(str, geometry.layer_ids))
            raise ValueError(f"reselect: expected one of the sparse layers, {sparse}, got {self.reselect}")

    def selecting_layers(self, geometry: Geometry) -> set[int]:
        """Return the model's numbers of the layers that select."""
        depth = max(geometry.layer_ids) + 1
        middle = min(geometry.layer_ids, key=lambda layer: abs(layer - 0.4 * depth))
        return {min(geometry.layer_ids), middle if self.reselect is None else self.reselect}

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g, scored = layer.geometry, layer.scratch.get(self.name)
        if scored is None or layer.index in self.selecting_layers(g):
            logits = ops.exact_logits(
                q, layer.k_pages, layer.page_table, layer.seq_lens, max_seq_len=layer.max_seq_len, sm_scale=g.sm_scale
            )
            scored = layer.scratch[self.name] = _Scored(logits)
            if self.attend_all:
                return Selection.everything(
                    layer.seq_lens, g.num_kv_heads, max_seq_len=layer.max_seq_len, granularity=g.page_size
                )
        if scored.chosen is None or scored.tokens is not budget.tokens:
            # Once for all layers whose budget is the same tensor; another budget takes more or less of the same scores.
            scored.tokens = budget.tokens
            scored.chosen = ops.top_k(
                scored.logits,
                budget.tokens,
                layer.seq_lens,
                granularity=1,
                capacity=budget.capacity,
                reduce=self.reduce,
                force_newest=True,
            )
        return scored.chosen

    def bytes_per_token(self, geometry: Geometry) -> float:
        # The keys that the selecting layers score, shared out among all.
        key = geometry.head_dim * torch.empty(0, dtype=geometry.dtype).element_size()
        return key * len(self.selecting_layers(geometry)) / geometry.num_layers
