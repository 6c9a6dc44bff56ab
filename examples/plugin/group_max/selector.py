"""Group max: a page scores what the query head that likes it most gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from group_max.scores import group_max
from twilight import Budget, Geometry, LayerCache, MetadataSpec, Selection, Selector, ops


@dataclass
class GroupMax(Selector):
    """Propose the pages whose mean key has the largest product with any query head of the group, and the newest ones.

    Attributes:
        recent: newest pages that are always proposed, as far as the budget goes.
    """

    name: ClassVar[str] = "group_max"

    recent: int = 2

    def __post_init__(self) -> None:
        if self.recent < 1:
            raise ValueError(f"recent: expected at least 1, got {self.recent}")

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        # One vector a page. By its rule it is written in the launch that writes the keys.
        return (MetadataSpec("mean", (geometry.head_dim,), geometry.dtype, rule="mean"),)

    def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        return {"mean": ops.page_means(keys, valid)[0]}

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        size = layer.geometry.page_size
        scores = group_max(q, layer.metadata("mean"), layer.page_table, layer.seq_lens, page_size=size)
        pages = torch.arange(scores.shape[-1], device=q.device)
        end = ((layer.seq_lens + size - 1) // size)[:, None, None]
        count = budget.pages(size)
        newest = (pages < end) & (pages >= end - count.clamp(max=self.recent).unsqueeze(-1))
        scores = scores.masked_fill(newest, torch.inf)
        return Selection.top(scores, count, capacity=budget.page_capacity(size), granularity=size)
