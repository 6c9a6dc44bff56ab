"""Oracle top-p: the smallest set whose true mass reaches p. Reads every key; a yardstick, not a method.

    I = the fewest tokens, largest first, with sum over I of softmax(q . k / sqrt(d)) >= p    (Twilight, definition 3.3)

Ties with the least of them are kept too. It keeps nothing, and reads 2 d bytes a token of a kv head in bf16. The
oracle of xAlg-ai/sparse-attention-hub goes on until the mass is > p, so that at equality it takes one token more; it
counts the mass of what its earlier rules (sinks, newest tokens) have left, and rounds the threshold to the type of the
query, by which bf16 adds or drops ties. So neither set can stand in for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Contract, Geometry, LayerCache, Selection, Selector, ops
from twilight.checks import check_p
from twilight.ops.quantize import check_bits, dequantize, quantize
from twilight.ops.top_p import top_p_mask


@dataclass
class OracleTopP(Selector):
    """Propose what top-p over the true weights keeps, joined over the group (Twilight, definition 3.3).

    The budget is not looked at: p is the budget. Run it with ``pruner=none`` to attend to exactly this set.

    Attributes:
        mass: the attention mass to keep for each query head, in (0, 1].
        bits: choose by keys quantised to 2, 4 or 8 bits a channel, as estimates do (`twilight.ops.quantize`), made anew
            from all keys each step; None is by the keys themselves. What fewer bits lose is Figure 6 of the paper.
    """

    name: ClassVar[str] = "oracle_topp"
    paper: ClassVar[str] = "Twilight, arXiv 2502.02770, definition 3.3"

    mass: float = 0.95
    bits: int | None = None

    def __post_init__(self) -> None:
        check_p(self.mass)
        if self.bits is not None:
            check_bits("bits", self.bits)

    def contract(self) -> Contract:
        return Contract(budget=False, dense=False)

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g = layer.geometry
        keys = layer.k_pages
        if self.bits is not None:
            keys = dequantize(*quantize(keys, self.bits), self.bits)
        logits = ops.exact_logits(
            q, keys, layer.page_table, layer.seq_lens, max_seq_len=layer.max_seq_len, sm_scale=g.sm_scale
        )
        keep = top_p_mask(logits, self.mass).unflatten(1, (g.num_kv_heads, -1)).any(2)
        tokens = torch.arange(keep.shape[-1], device=q.device)
        return Selection.compact(tokens.expand_as(keep), keep, granularity=1)

    def bytes_per_token(self, geometry: Geometry) -> float:
        return geometry.head_dim * torch.empty(0, dtype=geometry.dtype).element_size()
