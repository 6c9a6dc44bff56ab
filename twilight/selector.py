"""Selector: the class that a plugin subclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

if TYPE_CHECKING:
    from twilight.budget import Budget
    from twilight.cache import LayerCache
    from twilight.geometry import Geometry
    from twilight.selection import Selection


@dataclass(frozen=True)
class MetadataSpec:
    """One tensor that a selector keeps beside the keys. It is allocated, updated, shared and freed with the pages.

    Attributes:
        name: how the selector finds it again, `layer.metadata(name)`.
        shape: trailing sizes, of one page or one token of one kv head.
        dtype: its type.
        per: what an entry summarises: ``"page"`` is stored `[pages, Hkv, *shape]`, ``"token"`` is stored
            `[pages, Hkv, P, *shape]`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    per: Literal["page", "token"] = "page"

    def bytes_per_token(self, page_size: int) -> float:
        """Return the bytes of one token of one kv head."""
        entry = torch.empty(0, dtype=self.dtype).element_size()
        for size in self.shape:
            entry *= size
        return entry / page_size if self.per == "page" else float(entry)


class Selector:
    """Proposes B0 candidate tokens for each kv head, generously; a pruner cuts the set down afterwards.

    A subclass sets `name` and writes `select`. Its parameters are dataclass fields, which become its typed options on
    the command line; they must be of types that Hydra's structured configs know. An instance holds parameters and
    calibration only: whatever belongs to a sequence lives in the cache, so that one instance serves any number of them.

    Class attributes:
        name: what users write after ``selector=``.
        paper: where the method comes from.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def prepare(self, geometry: Geometry) -> None:
        """Check the parameters against the model, and load what depends on it. Called before the cache is made.

        Raises:
            ValueError: a parameter that does not fit the geometry.
        """

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        """Return the tensors to be kept beside the keys; none by default."""
        return ()

    def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        """Compute the metadata of some pages from their keys. Called for every page that an append has touched.

        A function of the page's keys alone: appending one by one and all at once then agree, and so do a page and its
        copy.

        Args:
            keys: `[n, Hkv, P, d]`, in the type of the cache; zeros where not valid.
            valid: `[n, P]` bool, which slots hold a token.
            layer: the model's number of the layer.

        Returns:
            For every spec of `metadata`, `[n, Hkv, *shape]` (per page) or `[n, Hkv, P, *shape]` (per token).
        """
        return {}

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        """Propose candidates.

        Args:
            q: `[b, Hq, d]`, the queries of one decode step, rotated as the keys are.
            layer: the layer's cache, the new token already in it.
            budget: tokens that each sequence and kv head may propose.

        Returns:
            A `Selection` of tokens or pages, at most `budget.tokens` tokens a row, rounded up to whole pages.
        """
        raise NotImplementedError(f"{type(self).__name__}.select")

    def bytes_per_token(self, geometry: Geometry) -> float:
        """Return the bytes that `select` reads for each token of the sequence and kv head.

        By default its metadata, all of it. What a report calls "KV bytes read" counts this.
        """
        return sum(spec.bytes_per_token(geometry.page_size) for spec in self.metadata(geometry))


REDUCTIONS = ("softmax", "sum", "max")


def check_reduce(how: str) -> None:
    """Refuse a way of combining query heads that `combine_group` does not know."""
    if how not in REDUCTIONS:
        raise ValueError(f"reduce: expected {', '.join(map(repr, REDUCTIONS))}, got {how!r}")


def combine_group(
    scores: torch.Tensor, num_kv_heads: int, how: str, *, scale: float = 1.0, lse: torch.Tensor | None = None
) -> torch.Tensor:
    """Turn scores of query heads into scores of kv heads.

    Args:
        scores: `[b, Hq, n]` float, `-inf` where there is nothing.
        num_kv_heads: Hkv, divides Hq.
        how: ``"softmax"`` adds up each query head's softmax, which keeps most attention mass at equal budget, and
            returns the log of it; ``"sum"`` adds the scores; ``"max"`` takes the largest.
        scale: the factor that makes the scores logits, used by ``"softmax"`` only.
        lse: `[b, Hq]` float32, the log-sum-exp of each query head's logits if it is known already; likewise.

    Returns:
        `[b, Hkv, n]` float32. An entry that no query head scored stays `-inf`.
    """
    grouped = scores.float().unflatten(1, (num_kv_heads, -1))
    if how == "max":
        return grouped.amax(2)
    if how == "sum":
        return grouped.sum(2)
    check_reduce(how)
    # In logs: a softmax is 0 a hundred below the maximum, and among zeros there is no order to select by.
    logits = grouped * scale
    total = logits.logsumexp(-1) if lse is None else lse.unflatten(1, (num_kv_heads, -1))
    log_mass = logits - total.unsqueeze(-1)
    # A row without scores has no softmax: it is all -inf, and stays so.
    return log_mass.masked_fill(grouped == -torch.inf, -torch.inf).logsumexp(2)
