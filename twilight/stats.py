"""What decode steps read: budgets before and after pruning, kept mass, bytes."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from twilight.geometry import Geometry
from twilight.layer_cache import LayerCache
from twilight.ops.quantize import shadow_bytes
from twilight.ops.top_p import Pruned
from twilight.selection import Selection
from twilight.selector import Selector


@dataclass(frozen=True)
class Record:
    """One step of one layer. Tensors stay where they are until somebody asks.

    Attributes:
        layer: index of the layer in the cache.
        geometry: sizes.
        seq_lens: `[b]`, tokens that dense attention would read.
        b0: `[b, Hkv]`, candidates of each kv head; the sequence's length in a dense step.
        b1_query: `[b, Hq]`, tokens that each query head kept.
        b1_group: `[b, Hkv]`, tokens read: the union over the group.
        mass: `[b, Hq]`, share of the candidates' estimated mass that the query head's own tokens hold.
        selector_bytes: bytes that the selector reads for each token of the sequence and kv head.
        tail_pages: `[b, Hkv]`, pages whose mean value is read in place of their pruned tokens.
        tail_bytes: bytes of one such mean.
        estimated: whether the 4-bit keys of the candidates were read.
        dense: the step ran densely.
    """

    layer: int
    geometry: Geometry
    seq_lens: torch.Tensor
    b0: torch.Tensor
    b1_query: torch.Tensor
    b1_group: torch.Tensor
    mass: torch.Tensor
    selector_bytes: float
    tail_pages: torch.Tensor
    tail_bytes: int
    estimated: bool
    dense: bool

    def kv_bytes(self) -> float:
        """Return the bytes read: selector metadata, 4-bit keys of the candidates, K and V of what is kept, the tail."""
        g = self.geometry
        select = 0.0 if self.dense else float(self.seq_lens.sum()) * g.num_kv_heads * self.selector_bytes
        estimate = float(self.b0.sum()) * shadow_bytes(g.page_size, g.head_dim) / g.page_size if self.estimated else 0.0
        tail = float(self.tail_pages.sum()) * self.tail_bytes
        return select + estimate + float(self.b1_group.sum()) * token_bytes(g) + tail

    def dense_bytes(self) -> float:
        """Return the bytes that dense attention reads."""
        return float(self.seq_lens.sum()) * self.geometry.num_kv_heads * token_bytes(self.geometry)


def token_bytes(geometry: Geometry) -> int:
    """Return the bytes of K and V of one token of one kv head."""
    return 2 * geometry.head_dim * torch.empty(0, dtype=geometry.dtype).element_size()


class Stats:
    """Records of decode steps, if enabled; otherwise nothing is computed or kept."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.records: list[Record] = []

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()

    @contextlib.contextmanager
    def aside(self) -> Iterator[list[Record]]:
        """Collect what is recorded meanwhile in a list of its own, for `keep`."""
        before, self.records = self.records, []
        try:
            yield self.records
        finally:
            self.records = before

    def keep(self, records: Sequence[Record]) -> None:
        """Add copies of records whose tensors the next step will overwrite, as a captured step's are.

        A launch or two for all of them.
        """
        names = ("seq_lens", "b0", "b1_query", "b1_group", "mass", "tail_pages")
        tensors = [getattr(record, name) for record in records for name in names]
        copies: list[torch.Tensor] = [*tensors]
        for dtype in {tensor.dtype for tensor in tensors}:
            where = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in where]).split([tensors[i].numel() for i in where])
            for i, copied in zip(where, flat, strict=True):
                copies[i] = copied.view(tensors[i].shape)
        for i, record in enumerate(records):
            fields: dict[str, Any] = dict(zip(names, copies[i * len(names) :], strict=False))
            self.records.append(replace(record, **fields))

    def sparse(
        self, layer: LayerCache, selector: Selector, candidates: Selection, kept: Pruned, *, estimated: bool
    ) -> None:
        """Record a sparse step."""
        if not self.enabled:
            return
        g = layer.geometry
        read = kept.selection.num_tokens(layer.seq_lens)
        counts = read if kept.per_query_head is None else kept.per_query_head
        mass = torch.ones_like(counts, dtype=torch.float32) if kept.mass is None else kept.mass
        per_query = g.num_q_heads // counts.shape[1]
        self.records.append(
            Record(
                layer=layer.index,
                geometry=g,
                seq_lens=layer.seq_lens,
                b0=candidates.num_tokens(layer.seq_lens),
                b1_query=counts.repeat_interleave(per_query, dim=1),
                b1_group=read,
                mass=mass.repeat_interleave(per_query, dim=1),
                selector_bytes=selector.bytes_per_token(g),
                tail_pages=torch.zeros_like(read) if kept.tail is None else kept.tail.pages.lengths,
                tail_bytes=0 if kept.tail is None else kept.tail.means.bytes_per_page,
                estimated=estimated,
                dense=False,
            )
        )

    def dense(self, layer: LayerCache) -> None:
        """Record a step that ran densely."""
        if not self.enabled:
            return
        g, lens = layer.geometry, layer.seq_lens
        heads = lens[:, None].expand(-1, g.num_kv_heads)
        queries = lens[:, None].expand(-1, g.num_q_heads)
        ones = torch.ones_like(queries, dtype=torch.float32)
        none = torch.zeros_like(heads)
        self.records.append(Record(layer.index, g, lens, heads, queries, heads, ones, 0.0, none, 0, False, True))

    def by_layer(self) -> dict[int, list[Record]]:
        """Return the records of each layer, in order."""
        layers: dict[int, list[Record]] = defaultdict(list)
        for record in self.records:
            layers[record.layer].append(record)
        return dict(sorted(layers.items()))

    def __str__(self) -> str:
        """Return `summary` as a table: a line a layer, means over its steps and heads."""
        if not self.enabled:
            return "no stats: attach with stats=True"
        lines = ["layer  steps  dense  tokens       B0  B1 kept  B1 read   mass  KV bytes"]
        for row in self.summary():
            means = (row[name]["mean"] for name in ("b0", "b1_query", "b1_group"))
            lines.append(
                f"{row['layer']:5d}  {row['steps']:5d}  {row['dense_steps']:5d}  {row['seq_len']:6.0f}"
                + "".join(f"  {mean:7.0f}" for mean in means)
                + f"  {row['mass']['mean']:5.3f}  {row['kv_bytes'] / max(row['dense_bytes'], 1):8.1%}"
            )
        return "\n".join(lines) if len(lines) > 1 else "no steps yet"

    def query_heads(self, layer: int) -> np.ndarray:
        """Return `[Hq]` float64: the mean tokens that each query head of a layer kept."""
        lists = [record.b1_query.cpu() for record in self.records if record.layer == layer]
        return torch.cat(lists).double().mean(0).numpy()

    def summary(self) -> list[dict[str, Any]]:
        """Return one row a layer: steps, mean length, B0, B1 and mass with their spread, bytes."""
        rows: list[dict[str, Any]] = []
        for layer, records in self.by_layer().items():
            rows.append(
                {
                    "layer": layer,
                    "steps": len(records),
                    "dense_steps": sum(record.dense for record in records),
                    "seq_len": _mean(record.seq_lens for record in records),
                    "b0": spread(torch.cat([r.b0.flatten() for r in records])),
                    "b1_query": spread(torch.cat([r.b1_query.flatten() for r in records])),
                    "b1_group": spread(torch.cat([r.b1_group.flatten() for r in records])),
                    "mass": spread(torch.cat([r.mass.flatten() for r in records])),
                    "tail_pages": spread(torch.cat([r.tail_pages.flatten() for r in records])),
                    "kv_bytes": sum(record.kv_bytes() for record in records),
                    "dense_bytes": sum(record.dense_bytes() for record in records),
                }
            )
        return rows


def spread(values: torch.Tensor) -> dict[str, float]:
    """Return mean, 5th and 95th percentile."""
    array = values.double().cpu().numpy()
    return {"mean": float(array.mean()), "p5": float(np.percentile(array, 5)), "p95": float(np.percentile(array, 95))}


def _mean(tensors: Iterable[torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).double().mean())
