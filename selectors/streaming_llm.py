"""StreamingLLM: attention sinks and a recent window (Xiao et al., arXiv 2309.17453; mit-han-lab/streaming-llm).

Nothing is dropped here: this is the method as a mask, the form in which it composes with a pruner. Positions stay those
of the text, unless `reindex` asks for those in the cache, as in the paper (section 3.2) and the official code, which
evicts, caches keys unrotated and rotates them by their place in the cache at every step. Only that form keeps distances
within what a model was trained on.

Keys are cached rotated here. Between two tokens of the window the distance is the same either way. The sinks come
nearer by the N - B tokens between them and the window, with N the length and B the budget, and a logit depends on the
difference of positions alone: so a sink's logit is that of the query turned back by N - B positions,

    q' . k_i * sm_scale,    q' = R(-(N - B)) q

and the difference to q . k_i * sm_scale goes into `log_weight`. That is exact up to rounding, reads the sinks' keys
once more, and needs the frequencies of the rotation (`Geometry.inv_freq`; `attach` finds them where it can check them).
It concerns sparse steps: prompts and dense layers attend at the positions of the text. Token i of the cache is taken to
stand at position i, or all of them at the same distance from that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Contract, Geometry, LayerCache, Selection, Selector, ops
from twilight.ops.paging import gather_tokens


@dataclass
class StreamingLLM(Selector):
    """Propose the first `sinks` tokens and the newest ones, `budget` tokens together.

    Attributes:
        sinks: tokens kept from the start; 4 in the paper. A smaller budget keeps the newest only.
        reindex: attend to the sinks as if they stood right before the window.
    """

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, section 3.2"

    sinks: int = 4
    reindex: bool = False

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks: expected at least 0, got {self.sinks}")

    def contract(self) -> Contract:
        return Contract(weighted=self.reindex)

    def prepare(self, geometry: Geometry) -> None:
        if self.reindex and not geometry.inv_freq:
            raise ValueError(
                "reindex: the rotary embedding of this model is not known (Geometry.inv_freq is empty), so its keys "
                "cannot be moved\n  use reindex=False: positions of the text"
            )

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        slots = torch.arange(budget.capacity, device=q.device)
        sinks = torch.where(budget.tokens > self.sinks, self.sinks, 0).unsqueeze(-1)
        start = (layer.seq_lens[:, None] - budget.tokens).unsqueeze(-1)
        tokens = torch.where(slots < sinks, slots, slots + start)
        counted = slots < budget.tokens.unsqueeze(-1)
        shift = self._shift(q, layer, start, budget.capacity) if self.reindex else None
        if shift is not None:
            shift = shift.masked_fill(~(slots < sinks).repeat_interleave(layer.geometry.group_size, dim=1), 0)
        return Selection(tokens.masked_fill(~counted, 0).to(torch.int32), budget.tokens, log_weight=shift)

    def _shift(self, q: torch.Tensor, layer: LayerCache, moved: torch.Tensor, capacity: int) -> torch.Tensor:
        """Return `[b, Hq, capacity]`: what the logits of the first tokens gain when they come nearer by `moved`.

        Args:
            q: `[b, Hq, d]`.
            layer: the layer's cache.
            moved: `[b, Hkv, 1]` int.
            capacity: entries of a row, of which the first `sinks` are worked out.
        """
        g, n = layer.geometry, min(self.sinks, capacity)
        where = torch.arange(n, device=q.device).expand(q.shape[0], g.num_kv_heads, -1)
        keys = gather_tokens(layer.k_pages, where, layer.page_table, g.page_size).float()
        grouped = q.float().unflatten(1, (g.num_kv_heads, -1))
        turned = ops.rotate(grouped, -moved, g.inv_freq)
        gain = ((turned - grouped) @ keys.transpose(-1, -2) * g.sm_scale).flatten(1, 2)
        return torch.cat([gain, gain.new_zeros(*gain.shape[:2], capacity - n)], dim=-1)
