"""Pruners: which of the candidates, scored, exact attention will read, and what becomes of the others' mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from twilight import ops
from twilight.checks import check_p
from twilight.ops.tail import MeanValues
from twilight.ops.threshold import check_threshold
from twilight.ops.top_p import MassRule, Pruned, check_bounds
from twilight.selection import Selection
from twilight.selector import MetadataSpec

if TYPE_CHECKING:
    from twilight.geometry import Geometry
    from twilight.layer_cache import LayerCache

TAILS = ("none", "mean", "page_mean")
TAIL_TYPES = ("int8", "native")


class Pruner:
    """Cuts candidates down. Subclasses are frozen dataclasses, whose fields become typed options on the command line.

    Like a selector it may keep metadata beside the cache, of the values rather than the keys.

    Class attributes:
        name: what users write after ``pruner=``.
        needs_logits: whether the candidates are to be scored for it.
    """

    name: ClassVar[str] = ""
    needs_logits: ClassVar[bool] = True

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        """Return the tensors to be kept beside the values; none by default.

        Their names must not be a selector's. Of the rules of `MetadataSpec` there are two: ``"summarize"``, and
        ``"mean"``, by which append keeps `ops.page_means` of the values.
        """
        return ()

    def summarize(self, values: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        """Compute the metadata of some pages from their values; see `Selector.summarize`, which does so from keys.

        Args:
            values: `[n, Hkv, P, d]`, in the type of the cache; zeros where not valid.
            valid: `[n, P]` bool, which slots hold a token.
            layer: the model's number of the layer.
        """
        return {}

    def __call__(self, logits: torch.Tensor | None, candidates: Selection, layer: LayerCache) -> Pruned:
        """Return the tokens to keep.

        Args:
            logits: `[b, Hq, capacity * granularity]` estimated logits of the candidates, or None if the pruner does not
                need them.
            candidates: what the selector proposed.
            layer: the layer's cache, with the metadata that was asked for.
        """
        raise NotImplementedError(f"{type(self).__name__}.__call__")

    def mass_rule(self, layer: LayerCache) -> MassRule | None:
        """Say that pruning in this layer is `ops.top_p`, which one kernel can then do together with all other stages.

        None by default. A pruner that returns a rule promises that calling it does just that. One whose class overrides
        `__call__` alone promises nothing any more, and is called. When it is asked the newest token may not have been
        written yet, though lengths count it.
        """
        return None


class MassPruner(Pruner):
    """A pruner with two fields, `p` and `layer_p`, that say which mass to keep: everywhere, or in each sparse layer."""

    p: float
    layer_p: tuple[float, ...] | None

    def p_of(self, layer: LayerCache) -> float:
        """Return the mass to keep in a layer.

        Raises:
            ValueError: there are more or fewer sparse layers than `layer_p` has numbers.
        """
        if self.layer_p is None:
            return self.p
        layers = layer.geometry.layer_ids
        if len(layers) != len(self.layer_p):
            raise ValueError(f"layer_p: expected a p for each of {len(layers)} sparse layers, got {len(self.layer_p)}")
        return self.layer_p[layers.index(layer.index)]

    def _check_p(self) -> None:
        check_p(self.p)
        for p in self.layer_p or ():
            try:
                check_p(p)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer_p: {error}") from error


@dataclass(frozen=True)
class TopP(MassPruner):
    """Keep the smallest set of candidates whose estimated attention mass reaches `p` (Twilight, section 4.2).

    Attributes:
        p: the mass to keep, in (0, 1]; 1 keeps every candidate.
        layer_p: a p for each sparse layer in order, instead of `p`; None for the same everywhere.
    """

    name: ClassVar[str] = "top_p"
    p: float = 0.95
    layer_p: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        self._check_p()

    def mass_rule(self, layer: LayerCache) -> MassRule | None:
        return MassRule(self.p_of(layer))

    def __call__(self, logits: torch.Tensor | None, candidates: Selection, layer: LayerCache) -> Pruned:
        assert logits is not None
        return ops.top_p(logits, candidates, layer.seq_lens, self.p_of(layer))


@dataclass(frozen=True)
class NoPruning(Pruner):
    """Keep every candidate: plain top-k attention, the selector's own."""

    name: ClassVar[str] = "none"
    needs_logits: ClassVar[bool] = False

    def __call__(self, logits: torch.Tensor | None, candidates: Selection, layer: LayerCache) -> Pruned:
        return ops.keep_all(candidates, layer.seq_lens)


class TailedPruner(Pruner):
    """A pruner with two fields, `tail` and `tail_type`, that say what becomes of the pruned mass.

    ``tail="none"`` drops it and renormalises. ``"page_mean"`` gives each page's share of it to the mean value of that
    page, and ``"mean"`` all of it to the mean value of the sequence, as SparQ does; see `twilight.ops.tail`. Both keep
    the mean value of every page: ``tail_type="int8"`` in 8 bits, `d + 4` bytes a page and kv head, ``"native"`` in the
    type of the cache. ``"page_mean"`` reads those of the candidate pages, ``"mean"`` all of them.
    """

    tail: str
    tail_type: str

    def _check_tail(self) -> None:
        if self.tail not in TAILS:
            raise ValueError(f"tail: expected {', '.join(map(repr, TAILS))}, got {self.tail!r}")
        if self.tail_type not in TAIL_TYPES:
            raise ValueError(f"tail_type: expected {', '.join(map(repr, TAIL_TYPES))}, got {self.tail_type!r}")

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        if self.tail == "none":
            return ()
        if self.tail_type == "native":
            return (MetadataSpec("mean_values", (geometry.head_dim,), geometry.dtype, rule="mean"),)
        return (MetadataSpec("mean_value_codes", (geometry.head_dim,), torch.uint8, rule="mean"),
                MetadataSpec("mean_value_params", (2,), torch.float16, rule="mean"))  # fmt: skip

    def summarize(self, values: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        if self.tail_type == "native":
            return {"mean_values": ops.page_means(values, valid)[0]}
        codes, params = ops.page_means(values, valid, 8)
        return {"mean_value_codes": codes, "mean_value_params": params}

    def _means(self, layer: LayerCache) -> MeanValues | None:
        """Return what the operators need to make a tail, or None."""
        if self.tail == "none":
            return None
        values = tuple(layer.metadata(spec.name) for spec in self.metadata(layer.geometry))
        return MeanValues(values, layer.geometry.page_size, layer.page_table.shape[1])

    def _finish(self, pruned: Pruned, layer: LayerCache) -> Pruned:
        if self.tail != "mean" or pruned.tail is None:
            return pruned
        return Pruned(pruned.selection, pruned.per_query_head, pruned.mass, ops.mean_tail(pruned.tail, layer.seq_lens))


@dataclass(frozen=True)
class BoundedTopP(TailedPruner, MassPruner):
    """Top-p with a floor and a ceiling on what a query head keeps, and a tail for what it does not.

    Top-p alone spends its tokens on diffuse heads, where hundreds of small weights average out, and starves focused
    ones, where one of the few tokens that matter may lie beyond p. The floor and the ceiling mend both, and the tail
    gives what the ceiling cuts off its mass. docs/pruning.md has what each costs.

    Attributes:
        p: the mass to keep, in (0, 1]; 1 keeps every candidate, whatever the bounds.
        min_tokens: keep so many of the heaviest candidates even where fewer reach p. As many as `max_tokens` make it
            top-k over the estimates.
        max_tokens: keep no more than so many, but for ties at the threshold; None for no ceiling.
        tail: "none", "page_mean" or "mean".
        tail_type: how the page means are kept, "int8" or "native".
        layer_p: a p for each sparse layer in order, instead of `p`; None for the same everywhere.
    """

    name: ClassVar[str] = "bounded_top_p"
    p: float = 0.95
    min_tokens: int = 16
    max_tokens: int | None = 128
    tail: str = "page_mean"
    tail_type: str = "int8"
    layer_p: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        self._check_p()
        check_bounds(self.min_tokens, self.max_tokens)
        self._check_tail()

    def _rule(self, layer: LayerCache) -> MassRule:
        p = self.p_of(layer)
        if p == 1.0:  # nothing is pruned, and no tail to be read
            return MassRule(p)
        return MassRule(p, self.min_tokens, self.max_tokens, self._means(layer))

    def mass_rule(self, layer: LayerCache) -> MassRule | None:
        # A mean tail reads pages that were no candidates as well.
        return None if self.tail == "mean" else self._rule(layer)

    def __call__(self, logits: torch.Tensor | None, candidates: Selection, layer: LayerCache) -> Pruned:
        assert logits is not None
        rule = self._rule(layer)
        pruned = ops.top_p(
            logits, candidates, layer.seq_lens, rule.p,
            min_tokens=rule.min_tokens, max_tokens=rule.max_tokens, means=rule.means,
        )  # fmt: skip
        return self._finish(pruned, layer)


@dataclass(frozen=True)
class Threshold(TailedPruner):
    """Keep the candidates that weigh enough (A3, arXiv 2002.10941, after scoring; min-p, arXiv 2407.01082).

    Attributes:
        share: of the heaviest candidate's estimated weight, in [0, 1]; 0 does not look at it.
        weight: absolute, in [0, 1], of estimated weights that add up to 1 over the candidates. Both must be reached.
        tail: "none", "page_mean" or "mean".
        tail_type: how the page means are kept, "int8" or "native".
    """

    name: ClassVar[str] = "threshold"
    share: float = 0.01
    weight: float = 0.0
    tail: str = "none"
    tail_type: str = "int8"

    def __post_init__(self) -> None:
        check_threshold(self.share, self.weight)
        self._check_tail()

    def __call__(self, logits: torch.Tensor | None, candidates: Selection, layer: LayerCache) -> Pruned:
        assert logits is not None
        pruned = ops.threshold(
            logits, candidates, layer.seq_lens, share=self.share, weight=self.weight, means=self._means(layer)
        )
        return self._finish(pruned, layer)


PRUNERS: dict[str, type[Pruner]] = {cls.name: cls for cls in (TopP, BoundedTopP, Threshold, NoPruning)}
