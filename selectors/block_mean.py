"""Block means: pages ranked by the product of the query with their mean key.

The selection of NSA (Yuan et al., arXiv 2502.11089, section 3.3.2) without its training: there a learned MLP compresses
each block of keys, here the block is a page and its key the mean. For a query q of each head,

    p = softmax over pages of q . mean(keys of the page)        and the group reads the pages with the largest sum of p

One vector a page is half of what Quest reads: (d + 4) / P bytes a token of a kv head in 8 bits, the default, 8.25 at
d = 128 and pages of 16; 2 d / P = 16 in bf16. A mean is the better guess of a page that matters as a whole, and hides
the lone key that a bound shows.

The newest page is always proposed and counts towards the budget. The paper also forces the first block and the one
before the newest, selects 16 blocks of 64 tokens whatever the length, and scores them by compressed blocks of 32 that
overlap. fla-org/native-sparse-attention is nearer to this: means of 64 tokens without overlap, p added up over the
group, and the current block forced, by a score of 1 for each query head. It adds branches of a trained model: `nsa`.
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
class BlockMean(Selector):
    """Propose the pages whose mean key scores highest.

    Attributes:
        reduce: how the query heads of a group are combined: "softmax", "sum" or "max"; see `combine_group`.
        metadata_type: how the means are kept: "int8", or "native" for the type of the cache.
    """

    name: ClassVar[str] = "block_mean"
    paper: ClassVar[str] = "Native Sparse Attention, its block selection without training, arXiv 2502.11089"

    reduce: str = "softmax"
    metadata_type: str = "int8"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)
        if self.metadata_type not in ("int8", "native"):
            raise ValueError(f"metadata_type: expected 'int8' or 'native', got {self.metadata_type!r}")

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        if self.metadata_type == "int8":
            return (MetadataSpec("mean", (geometry.head_dim,), torch.uint8, rule="mean"),
                    MetadataSpec("mean_params", (2,), torch.float16, rule="mean"))  # fmt: skip
        return (MetadataSpec("mean", (geometry.head_dim,), geometry.dtype, rule="mean"),)

    def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        bits = 8 if self.metadata_type == "int8" else None
        return dict(zip(("mean", "mean_params"), ops.page_means(keys, valid, bits), strict=False))

    def ranking(self, layer: LayerCache) -> PageRanking | None:
        if self.metadata_type != "int8":
            return None
        return PageRanking((layer.metadata("mean"), layer.metadata("mean_params")), self.reduce)

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g = layer.geometry
        means = [layer.metadata(spec.name) for spec in self.metadata(g)]
        scores = ops.page_scores(q, means, layer.page_table, layer.seq_lens, page_size=g.page_size)
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
