"""Fidelity: what one decode step kept and returned, against exact attention over everything, in float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, fields
from typing import Any

import torch

from twilight import ops
from twilight.attention import Step
from twilight.ops.dense_attention import gather_dense
from twilight.ops.top_p import top_p_mask
from twilight.selection import Selection

BINS = 20
"""Equal parts of the context that positions are counted in."""


@dataclass(frozen=True)
class Fidelity:
    """Measures of a step, each `[b, Hq]` float64.

    The *own* tokens of a query head are those that the pruner kept for it: of the candidates the heaviest by their
    estimated logits. What is *read* is the union over its group, which the whole group attends to.

    Attributes:
        mass: true attention mass of what is read.
        output_error: L2 norm of the output's difference to exact attention, over the norm of the latter.
        overlap_topk: share of the own tokens that are among as many of truly largest weight.
        overlap_topp: share of the oracle's minimal set that is among the own tokens.
        oracle_b1: tokens of the smallest set, by exact weights, that reaches p; ties included.
        b1_query: own tokens.
    """

    mass: torch.Tensor
    output_error: torch.Tensor
    overlap_topk: torch.Tensor
    overlap_topp: torch.Tensor
    oracle_b1: torch.Tensor
    b1_query: torch.Tensor


@dataclass(frozen=True)
class Places:
    """Where a step's tokens lie: counts over `BINS` ages, `[BINS]` float64, age 0 being the newest.

    Attributes:
        top_p: of the own tokens of all query heads; None where nothing was pruned.
        top_k: of as many heaviest candidates for every query head, by the same estimates, as those keep on average.
    """

    top_p: torch.Tensor | None
    top_k: torch.Tensor


class Observer:
    """Measures the steps that it is shown; an `observer` for `TwilightAttention`.

    Args:
        p: the mass that the oracle's minimal set reaches.
        layers: numbers of the layers to look at; None for all.
    """

    def __init__(self, p: float, layers: Container[int] | None = None) -> None:
        self._p, self._layers = p, layers
        self._found: dict[int, list[Fidelity]] = defaultdict(list)
        self._places: dict[tuple[int, str], torch.Tensor] = {}

    def __call__(self, step: Step) -> None:
        index = step.layer.index
        if step.candidates is None or (self._layers is not None and index not in self._layers):
            return
        fidelity, places = measure(step, self._p)
        self._found[index].append(Fidelity(*(getattr(fidelity, f.name).cpu() for f in fields(fidelity))))
        for kind in ("top_p", "top_k"):
            counts = getattr(places, kind)
            if counts is not None:
                key = (index, kind)
                self._places[key] = self._places.get(key, torch.zeros(BINS, dtype=torch.float64)) + counts.cpu()

    def summary(self) -> dict[str, float]:
        """Return means over layers, heads, steps and sequences; of the mass the 5th percentile too."""
        everything = [fidelity for found in self._found.values() for fidelity in found]
        if not everything:
            raise ValueError(
                "fidelity: no sparse step was seen; min_context is above the length, or no layer is chosen"
            )
        values = {f.name: torch.cat([getattr(each, f.name).flatten() for each in everything]) for f in fields(Fidelity)}
        means = {name: float(each.mean()) for name, each in values.items()}
        return {
            "mass": means["mass"],
            "mass_p5": float(torch.quantile(values["mass"], 0.05)),
            **{name: means[name] for name in ("output_error", "overlap_topk", "overlap_topp", "oracle_b1")},
            "excess": means["b1_query"] / means["oracle_b1"],
        }

    def heads(self, **columns: Any) -> list[dict[str, Any]]:
        """Return a row for each layer and query head, `columns` first."""
        rows = []
        for layer, found in sorted(self._found.items()):
            means = {f.name: torch.cat([getattr(each, f.name) for each in found]).mean(0) for f in fields(Fidelity)}
            for head in range(len(means["mass"])):
                values = {name: float(each[head]) for name, each in means.items()}
                rows.append({**columns, "layer": layer, "head": head, **values})
        return rows

    def positions(self, **columns: Any) -> list[dict[str, Any]]:
        """Return a row for each kind, layer and bin of ages, `columns` first."""
        rows = []
        for (layer, kind), counts in sorted(self._places.items()):
            for i, share in enumerate((counts / counts.sum()).tolist()):
                edges = {"bin_low": i / BINS, "bin_high": (i + 1) / BINS}
                rows.append({**columns, "kind": kind, "layer": layer, **edges, "share": share})
        return rows


def measure(step: Step, p: float) -> tuple[Fidelity, Places]:
    """Measure a sparse step. One sequence after another, so that float64 keys of one fit beside the cache.

    Args:
        step: with candidates.
        p: the mass that the oracle's minimal set reaches.
    """
    rows = [_measure_row(step, row, p) for row in range(len(step.q))]
    joined = Fidelity(*(torch.stack([getattr(found, f.name) for found, _ in rows]) for f in fields(Fidelity)))
    kept = [places.top_p for _, places in rows if places.top_p is not None]
    top_k = torch.stack([places.top_k for _, places in rows]).sum(0)
    return joined, Places(torch.stack(kept).sum(0) if kept else None, top_k)


def _measure_row(step: Step, row: int, p: float) -> tuple[Fidelity, Places]:
    assert step.candidates is not None and step.pruned is not None
    layer, one = step.layer, slice(row, row + 1)
    lens, table = layer.seq_lens[one], layer.page_table[one]
    length = int(lens)
    k, v = (gather_dense(pages, table, lens, length)[0].double() for pages in (layer.k_pages, layer.v_pages))
    q = step.q[row].double().unflatten(0, (len(k), -1))
    logits = q @ k.transpose(-1, -2) * layer.geometry.sm_scale
    weights = torch.softmax(logits, dim=-1)
    exact = (weights @ v).flatten(0, 1)
    logits, weights = logits.flatten(0, 1), weights.flatten(0, 1)

    read = _listed(_row(step.pruned.selection, one), lens, len(weights))
    own, ranked = _own(step, one, lens, read)
    count = own.sum(-1)
    order = weights.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=order.device).expand_as(order))
    oracle = top_p_mask(logits, p)
    found = Fidelity(
        mass=(weights * read).sum(-1),
        output_error=(step.out[row].double() - exact).norm(dim=-1) / exact.norm(dim=-1),
        overlap_topk=(own & (rank < count[:, None])).sum(-1) / count.double(),
        overlap_topp=(own & oracle).sum(-1) / oracle.sum(-1).double(),
        oracle_b1=oracle.sum(-1).double(),
        b1_query=count.double(),
    )
    if ranked is None:
        return found, Places(None, _ages(own))
    mean = max(1, round(float(count.double().mean())))
    return found, Places(_ages(own), _ages(ranked < mean))


def _own(step: Step, one: slice, lens: torch.Tensor, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return which tokens are each query head's own, `[Hq, n]` bool, and how all rank by their estimated logits.

    The rank, `[Hq, n]`, is n where a token is no candidate; None where nothing was pruned, and what is read is its own.
    """
    assert step.candidates is not None and step.pruned is not None
    layer, kept = step.layer, step.pruned.per_query_head
    if kept is None or kept.shape[1] < len(read):  # a number for each kv head: its union
        return read, None
    candidates = _row(step.candidates, one)
    if step.logits is None:
        estimates = ops.estimate_scores(
            step.q[one].contiguous(),
            layer.shadow,
            layer.page_table[one].contiguous(),
            lens,
            candidates,
            page_size=layer.geometry.page_size,
            sm_scale=layer.geometry.sm_scale,
            out_dtype=torch.float32,
        )
    else:
        estimates = step.logits[one]
    log_weight = candidates.token_log_weight()
    scores = estimates[0].double() if log_weight is None else (estimates + log_weight)[0].double()
    where, valid = candidates.positions(lens)
    group = len(scores) // where.shape[1]
    where, valid = (each[0].repeat_interleave(group, dim=0) for each in (where, valid))
    scores = scores.masked_fill(~valid, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    length = read.shape[-1]
    ranked = torch.full((len(scores), length + 1), length, dtype=torch.long, device=order.device)
    ranked.scatter_(-1, where.masked_fill(~valid, length), rank.masked_fill(~valid, length))
    ranked = ranked[:, :length]
    return ranked < kept[one][0][:, None], ranked


def _row(selection: Selection, one: slice) -> Selection:
    weight = selection.log_weight
    return Selection(
        selection.indices[one].contiguous(),
        selection.lengths[one].contiguous(),
        selection.granularity,
        None if weight is None else weight[one].contiguous(),
    )


def _listed(selection: Selection, lens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return `[Hq, n]` bool: which tokens each query head reads; those that `log_weight` hides from it are not."""
    where, valid = selection.positions(lens)
    group = num_heads // where.shape[1]
    where, valid = (each[0].repeat_interleave(group, dim=0) for each in (where, valid))
    weight = selection.token_log_weight()
    if weight is not None:
        valid = valid & (weight[0] != -torch.inf)
    length = int(lens)
    listed = torch.zeros((num_heads, length + 1), dtype=torch.bool, device=where.device)
    return listed.scatter_(-1, where.masked_fill(~valid, length), True)[:, :length]


def _ages(mask: torch.Tensor) -> torch.Tensor:
    """Return `[BINS]` float64: how many tokens of a mask `[Hq, n]` are of each age."""
    length = mask.shape[-1]
    age = torch.arange(length - 1, -1, -1, device=mask.device) * BINS // length
    counts = torch.zeros(BINS, dtype=torch.float64, device=mask.device)
    return counts.index_add_(0, age, mask.sum(0).double())
