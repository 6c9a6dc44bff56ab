"""Selector: the class that a plugin subclasses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

if TYPE_CHECKING:
    from twilight.budget import Budget
    from twilight.geometry import Geometry
    from twilight.layer_cache import LayerCache
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
        rule: how it is kept up to date as tokens come. ``"summarize"``: by `Selector.summarize`, for every page that an
            append has touched. The others say that `summarize` computes something that the append kernel knows, and
            writes in the same launch as the keys: ``"bounds"`` is `ops.page_bounds`, ``"mean"`` `ops.page_means`,
            ``"label"`` `ops.key_labels` of the channels that `Selector.label_channels` names. Specs of one rule, in
            this order, are the tensors that its function returns. `summarize` must return the same to the last bit: it
            is called where a page changes otherwise, as when a sequence is cut short. A cache lets append keep one
            rule, the first; specs of another are summarised.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    per: Literal["page", "token"] = "page"
    rule: Literal["summarize", "bounds", "mean", "label"] = "summarize"

    def bytes_per_token(self, page_size: int) -> float:
        """Return the bytes of one token of one kv head."""
        entry = torch.empty(0, dtype=self.dtype).element_size()
        for size in self.shape:
            entry *= size
        return entry / page_size if self.per == "page" else float(entry)


@dataclass(frozen=True)
class PageRanking:
    """How a selector chooses pages, if it does so by a dot product of the query with vectors kept in 8 bits.

    Attributes:
        vectors: `(codes, params)` as `twilight.ops.page_scores` takes them, bounds or means of each page; or nothing,
            if every page is chosen.
        reduce: how the query heads of a group are combined; see `combine_group`.
    """

    vectors: tuple[torch.Tensor, ...] = ()
    reduce: str = "softmax"


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a selector keeps for each row and that is no function of a page's keys.

    Accumulated scores, evicted tokens, centroids, codebooks. Pages may be shared by rows, this never is: it is copied
    when a row is forked, moves with its row, and begins at `fill` when a row is freed.

    Attributes:
        name: how the selector finds it again, `layer.state(name)`.
        shape: trailing sizes, of one entry of one head.
        dtype: its type.
        per: ``"row"`` is one entry a row, `[b, H, *shape]`. ``"token"`` is one for every `stride` tokens,
            `[b, H, ceil(max_seq_len / stride), *shape]`; entries past a row's end hold `fill`, so that a new token
            finds it there, and so does a token that takes the place of one cut off.
        stride: tokens an entry speaks of.
        heads: whether H is ``"kv"`` heads or ``"query"`` heads.
        fill: what entries begin with.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    per: Literal["row", "token"] = "row"
    stride: int = 1
    heads: Literal["kv", "query"] = "kv"
    fill: float = 0

    def bytes_per_token(self, geometry: Geometry) -> float:
        """Return the bytes of one token of one kv head; nothing for what is kept once a row."""
        if self.per == "row":
            return 0.0
        heads = geometry.group_size if self.heads == "query" else 1
        return heads * math.prod(self.shape) * self.dtype.itemsize / self.stride


@dataclass(frozen=True)
class Contract:
    """What holds of a selector's selections. The default is what most promise; a method that cannot says so.

    `twilight.testing.check_selector` holds a selector to it, both ways: an exception that is declared must be seen.

    Attributes:
        budget: at most `budget.tokens` tokens a row, in whole pages rounded up. False: the method has its own size.
        dense: with a budget of everything, everything is proposed, at the weight it has. False: it leaves tokens out,
            or draws them.
        chunks: what is kept does not depend on the pieces in which a prompt comes. False: pieces of a few tokens
            teach it nothing. What is few each row's `new_tokens` say, never the other rows.
        weighted: selections carry `log_weight`.
    """

    budget: bool = True
    dense: bool = True
    chunks: bool = True
    weighted: bool = False


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

    def contract(self) -> Contract:
        """Return what holds of this selector, with its parameters; everything that `Contract` says, by default."""
        return Contract()

    def prepare(self, geometry: Geometry) -> None:
        """Check the parameters against the model, and load what depends on it. Called before the cache is made.

        Raises:
            ValueError: a parameter that does not fit the geometry.
        """

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        """Return the tensors to be kept beside the keys; none by default."""
        return ()

    def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        """Compute the metadata of some pages from their keys.

        Called for every page that an append has touched, unless append keeps them itself; see `MetadataSpec.rule`.

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

    def label_channels(self, layer: int) -> torch.Tensor:
        """Return the channels of a key that make up its label, for metadata whose rule is ``"label"``.

        Args:
            layer: the model's number of the layer.

        Returns:
            `[Hkv, r]` int32, on the device of the geometry that `prepare` was given.
        """
        raise NotImplementedError(f"{type(self).__name__}.label_channels")

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        """Return the tensors to be kept for each row; none by default. Written with `layer.update_state`."""
        return ()

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        """See tokens that are attended to densely: a prompt, a chunk of one, a short or speculative step.

        Called for each layer once the tokens are in the cache. A prompt in chunks is as many calls, each with the
        queries of its chunk; what must not depend on the chunks is carried in the state. One call may bring a row one
        token and another a prompt: n says nothing of a row, but that no row has gained more.

        Args:
            q: `[b, n, Hq, d]`, rotated. Of row i the first `layer.new_tokens[i]` are real, and are its last tokens.
            layer: the layer's cache.
        """

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

    def ranking(self, layer: LayerCache) -> PageRanking | None:
        """Say that `select` is a ranking of pages, which one kernel can then do together with the stages after it.

        None by default. A selector that returns a ranking promises that `select` chooses the same pages: the best
        `budget.pages(P)` of them, the newest always among these. One that overrides `finish` is asked stage by stage;
        of one whose class overrides `select` alone `select` is asked. Of `ranking` it is asked when the newest token
        may not have been written, though lengths count it: name tensors, and leave it to the kernel to read them.
        """
        return None

    def finish(
        self, q: torch.Tensor, layer: LayerCache, kept: Selection, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """End the step that `select` began: see what was attended to, and correct the result where the method does.

        Args:
            q: `[b, Hq, d]`, as in `select`.
            layer: the layer's cache.
            kept: the tokens or pages that were read. `ops.attention_weights` gives what each weighed.
            out: `[b, Hq, d]`, in the type of q.
            lse: `[b, Hq]` float32.

        Returns:
            `(out, lse)` of the step; as they came by default.
        """
        return out, lse

    def bytes_per_token(self, geometry: Geometry) -> float:
        """Return the bytes that `select` reads for each token of the sequence and kv head.

        By default its metadata and its state, all of it. What a report calls "KV bytes read" counts this.
        """
        stored = sum(spec.bytes_per_token(geometry.page_size) for spec in self.metadata(geometry))
        return stored + sum(spec.bytes_per_token(geometry) for spec in self.state(geometry))


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
