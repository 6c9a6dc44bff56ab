"""What decode steps read, added up over a run: the budgets that every task reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from twilight.stats import Record


@dataclass
class _Layer:
    """Sums over the steps of one layer and the sequences in them."""

    steps: int = 0
    seq_len: float = 0.0
    b0: np.ndarray = field(default_factory=lambda: np.zeros(1))
    b1_query: np.ndarray = field(default_factory=lambda: np.zeros(1))
    b1_group: np.ndarray = field(default_factory=lambda: np.zeros(1))
    query_fraction: float = 0.0
    group_fraction: float = 0.0
    kv_bytes: float = 0.0
    dense_bytes: float = 0.0


class Reading:
    """Budgets after pruning, layer by layer. Steps that ran densely count with all that they read."""

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    def add(self, records: Iterable[Record]) -> None:
        """Add records of steps, as `twilight.stats.Stats` keeps them."""
        by_layer: dict[int, list[Record]] = {}
        for record in records:
            by_layer.setdefault(record.layer, []).append(record)
        for index, mine in by_layer.items():
            lens = torch.cat([record.seq_lens for record in mine]).double()
            heads = {name: torch.cat([getattr(r, name) for r in mine]).double() for name in _HEADS}
            per_head = {name: values.sum(0).cpu().numpy() for name, values in heads.items()}
            added = _Layer(
                steps=len(lens),
                seq_len=float(lens.sum()),
                query_fraction=float((heads["b1_query"] / lens[:, None]).mean(1).sum()),
                group_fraction=float((heads["b1_group"] / lens[:, None]).mean(1).sum()),
                kv_bytes=sum(record.kv_bytes() for record in mine),
                dense_bytes=sum(record.dense_bytes() for record in mine),
                **per_head,
            )
            self._add(index, added)

    def merge(self, other: Reading) -> None:
        """Add what another has."""
        for index, layer in other._layers.items():
            self._add(index, layer)

    def columns(self, kinds: Mapping[int, str]) -> dict[str, Any]:
        """Return the columns of a row: means over sparse layers and steps, bytes a decoded token.

        ``kv_fraction_all_layers`` counts the layers that were left dense as read whole. Those with a sliding window are
        in neither of its parts.

        Args:
            kinds: what each layer of the model is, `Handle.layers`.
        """
        sparse = sum(kind == "sparse" for kind in kinds.values())
        windows = sum("sliding" in kind for kind in kinds.values())
        counts = {"sparse_layers": sparse, "dense_layers": len(kinds) - sparse}
        layers = list(self._layers.values())
        if not layers:
            return {**dict.fromkeys(COLUMNS), **counts}
        steps = sum(layer.steps for layer in layers)
        tokens = layers[0].steps
        read, whole = (sum(getattr(layer, name) for layer in layers) / tokens for name in ("kv_bytes", "dense_bytes"))
        beside = whole / sparse * (len(kinds) - sparse - windows)
        means = {name: sum(float(getattr(layer, name).mean()) for layer in layers) / steps for name in _HEADS}
        found: dict[str, Any] = {
            "seq_len": sum(layer.seq_len for layer in layers) / steps,
            **means,
            "b1_query_fraction": sum(layer.query_fraction for layer in layers) / steps,
            "b1_group_fraction": sum(layer.group_fraction for layer in layers) / steps,
            "kv_bytes": read,
            "dense_kv_bytes": whole,
            "kv_fraction": read / whole,
            "kv_fraction_all_layers": (read + beside) / (whole + beside),
        }
        return {**{name: found[name] for name in COLUMNS if name in found}, **counts}

    def table(self, **columns: Any) -> list[dict[str, Any]]:
        """Return a row for each layer and query head, `columns` first: mean tokens a step."""
        rows = []
        for index, layer in sorted(self._layers.items()):
            group = len(layer.b1_query) // len(layer.b1_group)
            for head, kept in enumerate(layer.b1_query):
                rows.append(
                    {
                        **columns,
                        "layer": index,
                        "head": head,
                        "kv_head": head // group,
                        "b1_query": float(kept) / layer.steps,
                        "b0": float(layer.b0[head // group]) / layer.steps,
                        "b1_group": float(layer.b1_group[head // group]) / layer.steps,
                    }
                )
        return rows

    def _add(self, index: int, layer: _Layer) -> None:
        old = self._layers.get(index, _Layer())
        self._layers[index] = _Layer(**{name: getattr(old, name) + getattr(layer, name) for name in vars(layer)})


_HEADS = ("b0", "b1_query", "b1_group")
COLUMNS = (
    "seq_len", *_HEADS, "b1_query_fraction", "b1_group_fraction", "kv_bytes", "dense_kv_bytes", "kv_fraction",
    "kv_fraction_all_layers",
)  # fmt: skip
"""What `Reading.columns` adds to a row, beside the counts of layers."""
