"""Quest: pages ranked by an upper bound of their attention logits (Tang et al., arXiv 2406.10774; mit-han-lab/quest).

Each page keeps the channel-wise maximum M and minimum m of its keys. For a query q,

    U(page) = sum_c max(q_c * M_c, q_c * m_c)  >=  q . k   for every key k of the page     (section 3.4, algorithm 1)

As max(q*M, q*m) = relu(q)*M + min(q, 0)*m, U is a plain dot product of length 2d.

The newest page is always proposed and counts towards the budget, as in the official CUDA path; the official evaluation
path lets it compete. The official code selects for each query head; here a kv head's query heads are combined, because
the group reads one list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Geometry, LayerCache, MetadataSpec, Selection, Selector, check_reduce, combine_group


@dataclass
class Quest(Selector):
    """Propose the pages with the largest upper bound.

    Attributes:
        reduce: how the query heads of a group are combined: "softmax", "sum" or "max"; see `combine_group`.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774"

    reduce: str = "softmax"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        return (MetadataSpec("max", (geometry.head_dim,), geometry.dtype),
                MetadataSpec("min", (geometry.head_dim,), geometry.dtype))  # fmt: skip

    def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        empty = ~valid[:, None, :, None]
        return {
            "max": keys.masked_fill(empty, -torch.inf).amax(2),
            "min": keys.masked_fill(empty, torch.inf).amin(2),
        }

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g = layer.geometry
        num_pages = (layer.seq_lens + g.page_size - 1) // g.page_size
        bound = page_bound(q, layer.metadata("max"), layer.metadata("min"), layer.page_table)
        logical = torch.arange(bound.shape[-1], device=q.device)
        bound = bound.masked_fill(logical >= num_pages[:, None, None], -torch.inf)
        scores = combine_group(bound, g.num_kv_heads, self.reduce, scale=g.sm_scale)
        newest = logical == (num_pages - 1)[:, None, None]
        return Selection.top(
            scores.masked_fill(newest, torch.inf),
            budget.pages(g.page_size),
            capacity=budget.page_capacity(g.page_size),
            granularity=g.page_size,
        )


def page_bound(
    q: torch.Tensor, page_max: torch.Tensor, page_min: torch.Tensor, page_table: torch.Tensor
) -> torch.Tensor:
    """Return `[b, Hq, max_pages]` float32, the largest dot product that a key of each page can have with q.

    Args:
        q: `[b, Hq, d]`.
        page_max, page_min: `[pages, Hkv, d]`.
        page_table: `[b, max_pages]` int32.
    """
    grouped = q.float().unflatten(1, (page_max.shape[1], -1))
    rows = page_table.long()
    # [b, Hkv, d, max_pages]; accumulated in float32, because 128 products of halves overflow one.
    high, low = (part[rows].permute(0, 2, 3, 1).float() for part in (page_max, page_min))
    return (grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low).flatten(1, 2)
