"""TwilightAttention: one decode step of one layer, and the stats it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from twilight import kernels, ops
from twilight.budget import UniformBudget, parse_budget
from twilight.checks import check_tensor
from twilight.crossover import crossover
from twilight.layer_cache import LayerCache
from twilight.ops.fused_decode import FusedDecode, NewTokens
from twilight.ops.fused_decode import unsupported as fused_unsupported
from twilight.ops.sparse_attention import unsupported_attention
from twilight.ops.top_p import Pruned
from twilight.pruner import Pruner, TopP
from twilight.selection import Selection
from twilight.selector import PageRanking, Selector
from twilight.stats import Stats


@dataclass(frozen=True)
class Step:
    """One step of one layer, as an observer of `TwilightAttention` is shown it. Not to be written to, nor kept.

    Attributes:
        q: `[b, Hq, d]`, rotated.
        layer: the layer's cache, the new tokens in it.
        candidates: what the selector proposed; None in a dense step.
        pruned: what was kept of it; None in a dense step.
        logits: `[b, Hq, capacity * granularity]`, the candidates' estimated logits; None where the pruner needs none,
            or where one launch did it all.
        out: `[b, Hq, d]`, the result.
        lse: `[b, Hq]` float32.
        one_launch: one kernel did all stages.
        one_after_select: one kernel did all stages after `select`.
    """

    q: torch.Tensor
    layer: LayerCache
    candidates: Selection | None
    pruned: Pruned | None
    logits: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor
    one_launch: bool = False
    one_after_select: bool = False


class TwilightAttention:
    """Select, estimate, prune, attend.

    Args:
        selector: proposes candidates.
        pruner: cuts them down; by default the paper's top-p at 0.95, which needs no metadata beside the cache. What
            `twilight.attach` and the commands take by default, `BoundedTopP`, does.
        budget: how many candidates: tokens (int), a fraction of the length (float), or a `UniformBudget`.
        min_context: sequences up to this many tokens are attended densely when no longer one is in the batch. "auto" is
            the length up to which dense was measured to be as fast (`twilight.crossover`) where the kernels run, and 0
            elsewhere. Over a `StaticCache` its `max_seq_len` decides, for all of its steps.
        collect_stats: record budgets and mass at every step.

    Attributes:
        observer: called with every `Step` once it is done, to measure what it did; None by default. A step that is
            captured in a CUDA graph shows itself while it is captured, and not when it is replayed.
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
        if pruner is not None and not isinstance(pruner, Pruner):
            raise TypeError(f"pruner: expected a pruner such as TopP(0.95), got {type(pruner).__name__}")
        whole = isinstance(min_context, int) and not isinstance(min_context, bool) and min_context >= 0
        if not whole and min_context != "auto":
            raise ValueError(f"min_context: expected an int of at least 0 or 'auto', got {min_context!r}")
        self.selector = selector
        self.pruner: Pruner = pruner if pruner is not None else TopP()
        self.budget = parse_budget(budget)
        self.min_context = min_context
        self.stats = Stats(enabled=collect_stats)
        self.observer: Callable[[Step], None] | None = None

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
        self._check_cache(layer)
        check_tensor("k", k, (q.shape[0], layer.geometry.num_kv_heads, layer.geometry.head_dim))
        self.budget.check_capacity(layer.capacity)
        step = None
        with layer.appending(k, v):
            # One launch appends as well where nothing else is to be kept: 28 instead of 35 us at b=1 and 32k.
            if not self.is_dense(layer):
                step = self._one_launch(q, layer, NewTokens(k, v, layer.new_tokens))
            if step is None:
                layer.write(k, v)
        return self.attend(q, layer) if step is None else self._record(q, layer, step)

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
            self.observe(q.unsqueeze(1), layer)
            return self._show(Step(q, layer, None, None, None, *attend_densely(q, layer)))

        step = self._one_launch(q, layer)
        if step is not None:
            return self._record(q, layer, step)
        geometry, table, lens = layer.geometry, layer.page_table, layer.seq_lens
        scale = geometry.sm_scale
        pages = (layer.k_pages, layer.v_pages, table, lens)
        candidates = self.selector.select(q, layer, layer.budget(self.budget))
        step = self._one_launch(q, layer, candidates=candidates)
        if step is not None:
            return self._record(q, layer, step, after_select=True)
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
        kept = self.pruner(logits, candidates, layer)
        self.stats.sparse(layer, self.selector, candidates, kept, estimated=logits is not None)
        out, lse = ops.sparse_attention(q, *pages, kept.selection, tail=kept.tail, sm_scale=scale)
        out, lse = self.selector.finish(q, layer, kept.selection, out, lse)
        return self._show(Step(q, layer, candidates, kept, logits, out, lse))

    def _record(
        self, q: torch.Tensor, layer: LayerCache, step: FusedDecode, *, after_select: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.stats.sparse(layer, self.selector, step.candidates, step.pruned, estimated=True)
        how = (not after_select, after_select)
        return self._show(Step(q, layer, step.candidates, step.pruned, None, step.out, step.lse, *how))

    def _show(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        if self.observer is not None:
            self.observer(step)
        return step.out, step.lse

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        """Show the selector and the budget's policy tokens that are attended to densely; see `Selector.observe`."""
        self.selector.observe(q, layer)
        self.budget.observe(q, layer)

    def _one_launch(
        self, q: torch.Tensor, layer: LayerCache, new: NewTokens | None = None, candidates: Selection | None = None
    ) -> FusedDecode | None:
        """Do all stages in one kernel, or those after `select`, where there is one for it."""
        selector, pruner = self.selector, self.pruner
        if not q.is_cuda or not kernels.available(q.device) or type(selector).finish is not Selector.finish:
            return None
        if not _speaks_for(pruner, "mass_rule", "__call__"):
            return None
        ranking: PageRanking | None = PageRanking()
        if candidates is None:
            ranking = selector.ranking(layer) if _speaks_for(selector, "ranking", "select") else None
        elif candidates.granularity not in (1, layer.geometry.page_size) or candidates.log_weight is not None:
            return None
        rule = pruner.mass_rule(layer)
        if ranking is None or rule is None:
            return None
        values = () if rule.means is None else rule.means.values
        if new is not None and not layer.keeps_only(ranking.vectors, values):
            return None
        budget = layer.budget(self.budget) if ranking.vectors else None
        pages = (layer.k_pages, layer.v_pages, layer.shadow, ranking.vectors, layer.page_table, layer.seq_lens)
        if fused_unsupported(q, *pages, budget, rule.means, candidates) is not None:
            return None
        return ops.fused_decode(
            q,
            *pages,
            budget,
            rule.p,
            sm_scale=layer.geometry.sm_scale,
            reduce=ranking.reduce,
            lists=self.stats.enabled or self.observer is not None,
            min_tokens=rule.min_tokens,
            max_tokens=rule.max_tokens,
            means=rule.means,
            new=new,
            candidates=candidates,
            backend="cuda",
        )

    def _check_cache(self, layer: LayerCache) -> None:
        """Refuse a cache that keeps another selector's data, or the same selector's with other parameters.

        A pruner's metadata depends on no more than what it declares, so that p may change between two steps.
        """
        g = layer.geometry
        selects = layer.specs or layer.state_specs or self.selector.metadata(g) or self.selector.state(g)
        if layer.selector != self.selector and selects:
            raise ValueError(
                f"layer: its cache was made for {layer.selector!r}, this attention selects with {self.selector!r}\n"
                "  make it with PagedKVCache(..., selector=attention.selector)"
            )
        if not set(self.pruner.metadata(g)) <= set(layer.pruner_specs):
            raise ValueError(
                f"layer: its cache keeps nothing for {self.pruner!r}\n"
                "  make it with PagedKVCache(..., pruner=attention.pruner)"
            )
        if not set(self.budget.state(g)) <= set(layer.budget_specs):
            raise ValueError(
                f"layer: its cache keeps nothing for {self.budget!r}\n"
                "  make it with PagedKVCache(..., budget=attention.budget)"
            )


def _speaks_for(plugin: Selector | Pruner, promise: str, method: str) -> bool:
    """Return whether what `promise` says is said of `method`: no subclass has overridden that one alone."""
    first = next(cls for cls in type(plugin).__mro__ if promise in vars(cls) or method in vars(cls))
    return promise in vars(first)


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
