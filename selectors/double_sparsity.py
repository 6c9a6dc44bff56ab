"""Double Sparsity: tokens ranked on a few heavy channels (Yang et al., arXiv 2408.07092; andy-yang-1/DoubleSparse).

Offline, the channels of each head are ordered by a mean over tokens of |q_c k_c|, |q_c| or |k_c|, and C is the first r.
Online a label of each key, its channels C in 4 or 2 bits, is scored against the same channels of the query,

    s_i = sum over c in C of q_c * label_{i,c} / sqrt(d)                                       (section 3)

and the tokens of largest s, combined over the group, are attended to: no sinks, no newest tokens by force. The append
kernel keeps the labels. A token of a kv head costs r * bits / 8 bytes and 4 for its scale and zero; 12 bytes at the
defaults, r = 16 in 4 bits, and 2 r in 16 bits without these 4.

What the official code does differently:

- Its evaluation takes r = 64 (a `group_factor` of 2) in 2 bits by the statistic "q", which is 20 bytes; here 16 in 4
  bits by "qk". Where it recurses into a model it forgets the number of bits, so that what runs can be 4 in place of 2.
- "q" and "k" are measured before rotation, though labels are of rotated keys, and rotation mixes channels c and
  c + d/2; "qk" is measured after it, but of the last 512 tokens of its text only. Here all three are of rotated
  vectors and of the whole text.
- "q" and "qk" give each query head channels of its own, so that under grouped queries a label has to be stored once a
  query head; here a kv head has one list, ranked over its whole group.
- The query's label is quantised as the key's is, here only the key's. It divides by sqrt(r), which ranks the same for
  one query head; softmax over a group, as here, needs sqrt(d).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from twilight import Budget, Geometry, LayerCache, MetadataSpec, Selection, Selector, check_reduce, ops
from twilight.calibration import load_channels
from twilight.channel_files import STATISTICS


@dataclass
class DoubleSparsity(Selector):
    """Propose the tokens whose labels score highest.

    Attributes:
        calibration: file of channel orders, made by ``twilight calibrate double_sparsity``. By default the
            ``double_sparsity.json`` in the model's folder.
        channels: r, label channels of a kv head; even when `label_bits` is 4, a multiple of 4 when it is 2.
        label_bits: 4, 2, or 16 to keep labels in the type of the cache.
        reduce: how the query heads of a group are combined: "softmax", "sum" or "max"; see `combine_group`.
        statistic: what channels are ranked by, of a file that has several: "qk", "q" or "k". None is the one that the
            file was made for (``twilight calibrate --statistic``, qk by default); of an official file, which does not
            say, the first of qk, q and k with one row a kv head: qk is taken after rotation, as labels are. Under
            grouped queries only k has such rows there.
    """

    name: ClassVar[str] = "double_sparsity"
    paper: ClassVar[str] = "Post-Training Sparse Attention with Double Sparsity, arXiv 2408.07092"

    calibration: str | None = None
    channels: int = 16
    label_bits: int = 4
    reduce: str = "softmax"
    statistic: str | None = None
    _orders: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_reduce(self.reduce)
        if self.statistic not in (None, *STATISTICS):
            raise ValueError(f"statistic: expected 'qk', 'q' or 'k', got {self.statistic!r}")
        if self.label_bits not in (2, 4, 16):
            raise ValueError(f"label_bits: expected 2, 4 or 16, got {self.label_bits}")
        if self.label_bits == 2 and (self.channels < 4 or self.channels % 4):
            raise ValueError(f"channels: expected a multiple of 4 in 2 bits, got {self.channels}")
        if self.channels < 2 or (self.label_bits == 4 and self.channels % 2):
            raise ValueError(f"channels: expected an even number of at least 2, got {self.channels}")

    def prepare(self, geometry: Geometry) -> None:
        if self.channels > geometry.head_dim:
            raise ValueError(f"channels: expected at most head_dim={geometry.head_dim}, got {self.channels}")
        orders = load_channels(self.calibration, geometry, self.statistic)
        self._orders = {layer: order[:, : self.channels].int().contiguous() for layer, order in orders.items()}

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        if self.label_bits == 16:
            return (MetadataSpec("label", (self.channels,), geometry.dtype, per="token", rule="label"),)
        return (
            MetadataSpec("label", (self.channels * self.label_bits // 8,), torch.uint8, per="token", rule="label"),
            MetadataSpec("label_params", (2,), torch.float16, per="token", rule="label"),
        )

    def label_channels(self, layer: int) -> torch.Tensor:
        return self._orders[layer]

    def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        bits = None if self.label_bits == 16 else self.label_bits
        return dict(zip(("label", "label_params"), ops.key_labels(keys, self._orders[layer], bits), strict=False))

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g = layer.geometry
        return ops.label_top_k(
            q,
            [layer.metadata(spec.name) for spec in self.metadata(g)],
            self._orders[layer.index],
            layer.page_table,
            layer.seq_lens,
            budget.tokens,
            capacity=budget.capacity,
            reduce=self.reduce,
            sm_scale=g.sm_scale,
        )
