"""Quest: pages ranked by an upper bound of their attention logits (Tang et al., arXiv 2406.10774; mit-han-lab/quest).

Each page keeps the channel-wise maximum M and minimum m of its keys. For a query q,

    U(page) = sum_c max(q_c * M_c, q_c * m_c)  >=  q . k   for every key k of the page     (section 3.4, algorithm 1)

As max(q*M, q*m) = relu(q)*M + min(q, 0)*m, U is a plain dot product of length 2d. M and m are kept in 8 bits by
default, M rounded up and m rounded down, so that U stays an upper bound: half the bytes, which are the largest part of
a step. That is (2 d + 4) / P bytes a token of a kv head, with a scale and a zero for each page, 16.25 at d = 128 and
pages of 16; 4 d / P = 32 in bf16, as the official code keeps them.

The newest page is always proposed and counts towards the budget, as in the official CUDA path; the official evaluation
path lets it compete. The official code selects for each query head; here a kv head's query heads are combined, because
the group reads one list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import (
    Budget,
    Geometry,
    LayerCache,
    MetadataSpec,
    PageRanking,
    Selection,
    Selector,
    check_reduce,
    ops,
)


@dataclass
class Quest(Selector):
    """Propose the pages with the largest upper bound.

    Attributes:
        reduce: how the query heads of a group are combined: "softmax", "sum" or "max"; see `combine_group`.
        metadata_type: how M and m are kept: "int8", or "native" for the type of the cache.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774"

    reduce: str = "softmax"
    metadata_type: str = "int8"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)
        if self.metadata_type not in ("int8", "native"):
            raise ValueError(f"metadata_type: expected 'int8' or 'native', got {self.metadata_type!r}")

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        if self.metadata_type == "int8":
            return (MetadataSpec("bounds", (2 * geometry.head_dim,), torch.uint8, rule="bounds"),
                    MetadataSpec("bounds_params", (2,), torch.float16, rule="bounds"))  # fmt: skip
        return (MetadataSpec("max", (geometry.head_dim,), geometry.dtype, rule="bounds"),
                MetadataSpec("min", (geometry.head_dim,), geometry.dtype, rule="bounds"))  # fmt: skip

    def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        if self.metadata_type == "int8":
            return dict(zip(("bounds", "bounds_params"), ops.page_bounds(keys, valid, bits=8), strict=True))
        return dict(zip(("max", "min"), ops.page_bounds(keys, valid), strict=True))

    def ranking(self, layer: LayerCache) -> PageRanking | None:
        if self.metadata_type != "int8":
            return None
        return PageRanking((layer.metadata("bounds"), layer.metadata("bounds_params")), self.reduce)

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g = layer.geometry
        bounds = [layer.metadata(spec.name) for spec in self.metadata(g)]
        scores = ops.page_scores(q, bounds, layer.page_table, layer.seq_lens, page_size=g.page_size)
        return ops.top_k(
            scores,
            budget.pages(g.page_size),
            layer.seq_lens,
            granularity=g.page_size,
            capacity=budget.page_capacity(g.page_size),
            reduce=self.reduce,
            scale=g.sm_scale,
            force_newest=True,
        )
