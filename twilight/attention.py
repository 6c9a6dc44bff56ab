"""TwilightAttention: one decode step of one layer, and the stats it leaves."""

from __future__ import annotations

from typing import Literal

import torch

from twilight import kernels, ops
from twilight.budget import UniformBudget, parse_budget
from twilight.cache import LayerCache
from twilight.checks import check_tensor
from twilight.crossover import crossover
from twilight.ops.fused_decode import FusedDecode
from twilight.ops.fused_decode import unsupported as fused_unsupported
from twilight.ops.sparse_attention import unsupported_attention
from twilight.pruner import Pruner, TopP
from twilight.selector import Selector
from twilight.stats import Stats


class TwilightAttention:
    """Select, estimate, prune, attend.

    Args:
        selector: proposes candidates.
        pruner: cuts them down; top-p at 0.95 by default.
        budget: how many candidates: tokens (int), a fraction of the length (float), or a `UniformBudget`.
        min_context: sequences up to this many tokens are attended densely when no longer one is in the batch. "auto" is
            the length up to which dense was measured to be as fast (`twilight.crossover`) where the kernels run, and 0
            elsewhere. Over a `StaticCache` its `max_seq_len` decides, for all of its steps.
        collect_stats: record budgets and mass at every step.
    """

    def __init__(
        self,
        selector: Selector,
        pruner: Pruner | None = None,
        budget: int | float | UniformBudget = 0.25,
        *,
        min_context: int | Literal["auto"] = 0,
        collect_stats: bool = False,
    ) -> None:
        if not isinstance(selector, Selector):
            raise TypeError(f"selector: expected a twilight.Selector, got {type(selector).__name__}")
        if pruner is not None and not (callable(pruner) and hasattr(pruner, "needs_logits")):
            raise TypeError(f"pruner: expected a pruner such as TopP(0.95), got {type(pruner).__name__}")
        whole = isinstance(min_context, int) and not isinstance(min_context, bool) and min_context >= 0
        if not whole and min_context != "auto":
            raise ValueError(f"min_context: expected an int of at least 0 or 'auto', got {min_context!r}")
        self.selector = selector
        self.pruner: Pruner = pruner if pruner is not None else TopP()
        self.budget = parse_budget(budget)
        self.min_context = min_context
        self.stats = Stats(enabled=collect_stats)

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one token a sequence and attend to what matters of the past.

        Args:
            q: `[b, Hq, d]`, rotated.
            k, v: `[b, Hkv, d]` of the same tokens, keys rotated.
            layer: the layer's cache, made for this selector.

        Returns:
            `(out, lse)`: `[b, Hq, d]` in the type of q, and `[b, Hq]` float32.
        """
        check_query(q, layer)
        self._check_selector(layer)
        check_tensor("k", k, (q.shape[0], layer.geometry.num_kv_heads, layer.geometry.head_dim))
        self.budget.check_capacity(layer.capacity)
        layer.append(k, v)
        return self.attend(q, layer)

    def is_dense(self, layer: LayerCache) -> bool:
        """Return whether this step would run densely, because no sequence is longer than `min_context`."""
        least = self.min_context
        if isinstance(least, str):
            g = layer.geometry
            rows = layer.seq_lens.shape[0] * g.num_kv_heads
            least = crossover(rows, g.group_size) if why_reference(layer) is None else 0
        return layer.max_seq_len <= least

    def attend(self, q: torch.Tensor, layer: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the rest of `decode` for tokens that have been appended already."""
        if self.is_dense(layer):
            self.stats.dense(layer)
            self.selector.observe(q.unsqueeze(1), layer)
            return attend_densely(q, layer)

        step = self._one_launch(q, layer)
        if step is not None:
            self.stats.sparse(layer, self.selector, step.candidates, step.pruned, estimated=True)
            return step.out, step.lse
        geometry, table, lens = layer.geometry, layer.page_table, layer.seq_lens
        scale = geometry.sm_scale
        pages = (layer.k_pages, layer.v_pages, table, lens)
        candidates = self.selector.select(q, layer, layer.budget(self.budget))
        logits = None
        if self.pruner.needs_logits:
            # Half the bytes on a GPU, where they are written and read again; below the error of a 4-bit key.
            dtype = torch.float16 if q.is_cuda else torch.float32
            logits = ops.estimate_scores(
                q,
                layer.shadow,
                table,
                lens,
                candidates,
                page_size=geometry.page_size,
                sm_scale=scale,
                out_dtype=dtype,
            )
        kept = self.pruner(logits, candidates, lens)
        self.stats.sparse(layer, self.selector, candidates, kept, estimated=logits is not None)
        out, lse = ops.sparse_attention(q, *pages, kept.selection, sm_scale=scale)
        return self.selector.finish(q, layer, kept.selection, out, lse)

    def _one_launch(self, q: torch.Tensor, layer: LayerCache) -> FusedDecode | None:
        """Do all stages in one kernel, where there is one for what the selector and the pruner do."""
        pruner = self.pruner
        if not q.is_cuda or type(pruner) is not TopP or not kernels.available(q.device):
            return None
        if type(self.selector).finish is not Selector.finish:
            return None
        ranking = self.selector.ranking(layer)
        if ranking is None:
            return None
        budget = layer.budget(self.budget) if ranking.vectors else None
        pages = (layer.k_pages, layer.v_pages, layer.shadow, ranking.vectors, layer.page_table, layer.seq_lens)
        if fused_unsupported(q, *pages, budget) is not None:
            return None
        return ops.fused_decode(
            q,
            *pages,
            budget,
            pruner.p,
            sm_scale=layer.geometry.sm_scale,
            reduce=ranking.reduce,
            lists=self.stats.enabled,
            backend="cuda",
        )

    def _check_selector(self, layer: LayerCache) -> None:
        """Refuse a cache that keeps another selector's data, or the same selector's with other parameters."""
        if layer.selector == self.selector:
            return
        g = layer.geometry
        if layer.specs or layer.state_specs or self.selector.metadata(g) or self.selector.state(g):
            raise ValueError(
                f"layer: its cache was made for {layer.selector!r}, this attention selects with {self.selector!r}\n"
                "  make it with PagedKVCache(..., selector=attention.selector)"
            )


def why_reference(layer: LayerCache) -> str | None:
    """Say why attention over this cache runs the torch reference, or return None: it runs the kernels."""
    device = layer.seq_lens.device
    if not kernels.available(device):
        return f"the kernels do not run on {device} here (twilight doctor says more)"
    return unsupported_attention(layer.k_pages, layer.k_pages, layer.v_pages)  # queries are of the keys' type


def attend_densely(q: torch.Tensor, layer: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to every token of each sequence: what a step below `min_context` does, and so do dense layers.

    Args:
        q: `[b, Hq, d]`, rotated.
        layer: the layer's cache, the new tokens in it.

    Returns:
        `(out, lse)`, as `TwilightAttention.decode`.
    """
    out, lse = ops.dense_attention(
        q.unsqueeze(1),
        layer.k_pages,
        layer.v_pages,
        layer.page_table,
        layer.seq_lens,
        max_seq_len=layer.max_seq_len,
        sm_scale=layer.geometry.sm_scale,
    )
    return out.squeeze(1), lse.squeeze(1)


def check_query(q: torch.Tensor, layer: LayerCache) -> None:
    """Refuse a query that does not fit the cache, before anything is written to it."""
    geometry = layer.geometry
    shape = (layer.seq_lens.shape[0], geometry.num_q_heads, geometry.head_dim)
    check_tensor("q", q, shape, dtype=geometry.dtype, device=geometry.device)
