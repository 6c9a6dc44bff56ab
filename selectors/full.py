"""Full: no selection. Every token is a candidate, the pruner alone decides ("Full+Twilight" in the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Contract, LayerCache, PageRanking, Selection, Selector


@dataclass
class Full(Selector):
    """Propose every token. The budget is not looked at."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "Twilight, arXiv 2502.02770, section 5.1"

    def contract(self) -> Contract:
        return Contract(budget=False)

    def ranking(self, layer: LayerCache) -> PageRanking:
        return PageRanking()

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        # One list for all layers of a step. In a CUDA graph its lengths are found anew at every replay, by the first.
        if self.name not in layer.scratch:
            g = layer.geometry
            layer.scratch[self.name] = Selection.everything(
                layer.seq_lens, g.num_kv_heads, max_seq_len=layer.max_seq_len, granularity=g.page_size
            )
        selection: Selection = layer.scratch[self.name]
        return selection
