"""Oracle top-k: the tokens with the largest true weights. Reads every key; a yardstick, not a method.

    I = the B0 tokens i of largest q . k_i                                               (Twilight, definition 3.2)

It keeps nothing, and reads 2 d bytes a token of a kv head in bf16. The official code (tsinghua-ideal/Twilight) has a
list for each query head; here the query heads of a group are combined, because the group reads one list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Geometry, LayerCache, Selection, Selector, check_reduce, combine_group, ops


@dataclass
class OracleTopK(Selector):
    """Propose the `budget` tokens with the largest true attention weights (Twilight, definition 3.2).

    Attributes:
        reduce: how the query heads of a group are combined: "softmax", "sum" or "max"; see `combine_group`.
    """

    name: ClassVar[str] = "oracle_topk"
    paper: ClassVar[str] = "Twilight, arXiv 2502.02770, definition 3.2"

    reduce: str = "softmax"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g = layer.geometry
        logits = ops.exact_logits(
            q, layer.k_pages, layer.page_table, layer.seq_lens, max_seq_len=layer.max_seq_len, sm_scale=g.sm_scale
        )
        scores = combine_group(logits, g.num_kv_heads, self.reduce)
        return Selection.top(scores, budget.tokens, capacity=budget.capacity, granularity=1)

    def bytes_per_token(self, geometry: Geometry) -> float:
        return geometry.head_dim * torch.empty(0, dtype=geometry.dtype).element_size()
