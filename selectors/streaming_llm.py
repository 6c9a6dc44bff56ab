"""StreamingLLM: attention sinks and a recent window (Xiao et al., arXiv 2309.17453; mit-han-lab/streaming-llm).

Nothing is dropped here and positions stay those of the text: this is the method as a mask, the form in which it
composes with a pruner. The official code evicts, caches keys unrotated and rotates them by their place in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, LayerCache, Selection, Selector


@dataclass
class StreamingLLM(Selector):
    """Propose the first `sinks` tokens and the newest ones, `budget` tokens together.

    Attributes:
        sinks: tokens kept from the start; 4 in the paper. A smaller budget keeps the newest only.
    """

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, section 3.2"

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks: expected at least 0, got {self.sinks}")

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        slots = torch.arange(budget.capacity, device=q.device)
        sinks = torch.where(budget.tokens > self.sinks, self.sinks, 0).unsqueeze(-1)
        start = (layer.seq_lens[:, None] - budget.tokens).unsqueeze(-1)
        tokens = torch.where(slots < sinks, slots, slots + start)
        counted = slots < budget.tokens.unsqueeze(-1)
        return Selection(tokens.masked_fill(~counted, 0).to(torch.int32), budget.tokens)
