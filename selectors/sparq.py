"""SparQ: keys scored on the query's largest channels (Ribar et al., arXiv 2312.04985).

Of each kv head the r channels C in which its queries are largest are read, of all keys:

    s_i = q_C . k_{i,C} / sqrt(d * |q_C|_1 / |q|_1)                                   (section 4, algorithm 1)

The k tokens of largest s are attended to, the newest ones always among them. What the others are estimated to weigh
goes to the mean of all values: with alpha = sum of softmax(s) over the k tokens,

    out = alpha * attention over the k tokens + (1 - alpha) * mean V

C is chosen by |q| summed over a group. The official code (graphcore-research/llm-inference-research) then adds the
scores of a group's query heads, which is reduce="sum" here, and takes the newest token beside k, not within.

Keys are stored once, token by token, so that reading r channels of each saves no bytes of memory traffic by itself; the
paper stores them a second time, channel by channel, which this does not. `bytes_per_token` counts the r channels.
Sums of V are kept for every 128 tokens, and that of the newest is computed anew at each step, so that tokens can
be cut off again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Geometry, LayerCache, Selection, Selector, StateSpec, check_reduce, combine_group
from twilight.ops.dense_attention import gather_dense
from twilight.ops.paging import gather_tokens

_BLOCK = 128


@dataclass
class SparQ(Selector):
    """Propose the tokens whose keys score highest on the query's largest channels.

    Attributes:
        channels: r, channels that are read of each key.
        local: tokens before the newest that are always proposed; they count towards the budget, as the newest does.
        mean_value: give the estimated weight of what is not proposed to the mean of all values.
        reduce: how the query heads of a group are combined: "softmax", "sum" or "max"; see `combine_group`.
    """

    name: ClassVar[str] = "sparq"
    paper: ClassVar[str] = "SparQ Attention: Bandwidth-Efficient LLM Inference, arXiv 2312.04985"

    channels: int = 16
    local: int = 16
    mean_value: bool = True
    reduce: str = "softmax"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)
        if self.channels < 1:
            raise ValueError(f"channels: expected at least 1, got {self.channels}")
        if self.local < 0:
            raise ValueError(f"local: expected at least 0, got {self.local}")

    def prepare(self, geometry: Geometry) -> None:
        if self.channels > geometry.head_dim:
            raise ValueError(f"channels: expected at most head_dim={geometry.head_dim}, got {self.channels}")

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        if not self.mean_value:
            return ()
        return (StateSpec("value_sums", (geometry.head_dim + 1,), torch.float32, per="token", stride=_BLOCK),)

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        if self.mean_value:
            self._add_values(layer, q.shape[1])

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g, lens = layer.geometry, layer.seq_lens[:, None]
        scores = self._scores(q, layer)
        tokens = torch.arange(layer.max_seq_len, device=q.device)
        combined = combine_group(scores, g.num_kv_heads, self.reduce)
        local = budget.tokens.clamp(max=self.local + 1)
        combined = combined.masked_fill(tokens >= (lens - local).unsqueeze(-1), torch.inf)
        combined = combined.masked_fill(tokens >= lens.unsqueeze(-1), -torch.inf)
        chosen = Selection.top(combined, budget.tokens, capacity=budget.capacity, granularity=1)
        if self.mean_value:
            self._add_values(layer, 1)
            proposed = chosen.mask(layer.max_seq_len).repeat_interleave(g.group_size, dim=1)
            layer.scratch[self.name] = (torch.softmax(scores, dim=-1) * proposed).sum(-1)
        return chosen

    def finish(
        self, q: torch.Tensor, layer: LayerCache, kept: Selection, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.mean_value:
            return out, lse
        # Rounding may take alpha past 1; an empty row has none.
        alpha = layer.scratch[self.name].nan_to_num(1.0).clamp(1e-30, 1.0)
        sums = layer.state("value_sums").sum(2).repeat_interleave(layer.geometry.group_size, dim=1)
        mean = sums[..., :-1] / sums[..., -1:].clamp(min=1)
        share = alpha.unsqueeze(-1)
        return (share * out.float() + (1 - share) * mean).to(out.dtype), lse - alpha.log()

    def bytes_per_token(self, geometry: Geometry) -> float:
        key = self.channels * torch.empty(0, dtype=geometry.dtype).element_size()
        return key + super().bytes_per_token(geometry)

    def _scores(self, q: torch.Tensor, layer: LayerCache) -> torch.Tensor:
        """Return s, `[b, Hq, n]`, `-inf` past each row's end."""
        g, size = layer.geometry, layer.max_seq_len
        grouped = q.float().unflatten(1, (g.num_kv_heads, -1))
        # Stable, so that of equal channels the first are taken on every device.
        order = grouped.abs().sum(2).sort(dim=-1, descending=True, stable=True).indices
        largest = order[..., : self.channels].unsqueeze(2)
        query = grouped.gather(-1, largest.expand(-1, -1, g.group_size, -1))
        keys = gather_dense(layer.k_pages, layer.page_table, layer.seq_lens, size)
        keys = keys.gather(-1, largest.expand(-1, -1, size, -1)).float()
        share = query.abs().sum(-1, keepdim=True) / grouped.abs().sum(-1, keepdim=True).clamp(min=1e-30)
        scale = g.sm_scale / share.sqrt().clamp(min=1e-30)
        scores = ((query * scale) @ keys.transpose(-1, -2)).flatten(1, 2)
        return scores.masked_fill(torch.arange(size, device=q.device) >= layer.seq_lens[:, None, None], -torch.inf)

    def _add_values(self, layer: LayerCache, steps: int) -> None:
        """Bring the blocks that hold the last `steps` tokens up to date: sums, and behind them the tokens summed."""
        g, sums = layer.geometry, layer.state("value_sums")
        first = (layer.seq_lens - layer.new_tokens).long()[:, None] // _BLOCK
        blocks = first + torch.arange((steps + _BLOCK - 2) // _BLOCK + 1, device=sums.device)
        tokens = (blocks.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=sums.device)).flatten(1)
        past = tokens >= layer.seq_lens[:, None]
        where = tokens.masked_fill(past, 0).unsqueeze(1).expand(-1, g.num_kv_heads, -1)
        values = gather_tokens(layer.v_pages, where, layer.page_table, g.page_size).float()
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        fresh = values.masked_fill(past[:, None, :, None], 0).unflatten(2, (-1, _BLOCK)).sum(3)
        # A block past the row's end goes to a place of its own, which is cut off.
        entries = sums.shape[2]
        place = blocks.clamp(max=entries)[:, None, :, None].expand_as(fresh)
        padded = torch.cat([sums, sums.new_zeros(*sums.shape[:2], 1, sums.shape[3])], dim=2)
        layer.update_state("value_sums", padded.scatter(2, place, fresh)[:, :, :entries])
