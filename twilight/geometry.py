"""The sizes that a cache, a selector and a kernel agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twilight.checks import FLOAT_DTYPES, check_positive


@dataclass(frozen=True)
class Geometry:
    """Sizes of the attention that a cache serves.

    Attributes:
        num_layers: layers that share one page table.
        num_q_heads: query heads of a layer, Hq.
        num_kv_heads: key-value heads of a layer, Hkv; divides Hq.
        head_dim: channels of a head, d; even, because two 4-bit codes share a byte.
        page_size: tokens of a page, P.
        dtype: type of K and V.
        device: where K and V live.
        scaling: the factor of the logits; 1/sqrt(d) by default.
        layer_ids: the model's number of each layer, for selectors that are calibrated by layer; 0, 1, ... by default.
        inv_freq: rotary embedding of queries and keys: of the first 2n channels, the pair (c, c + n) is turned by
            inv_freq[c] radians a position. Empty if there is none, or it is not known.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cpu")
    scaling: float | None = None
    layer_ids: tuple[int, ...] = ()
    inv_freq: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_q_heads", "num_kv_heads", "head_dim", "page_size"):
            check_positive(name, getattr(self, name))
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads: expected a multiple of num_kv_heads={self.num_kv_heads}, got {self.num_q_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        if self.page_size * self.head_dim % 4:
            # The halves behind a page's codes would begin at an odd byte.
            raise ValueError(f"page_size: expected an even number for head_dim={self.head_dim}, got {self.page_size}")
        if self.dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: expected a floating point type, got {self.dtype}")
        object.__setattr__(self, "device", torch.device(self.device))
        object.__setattr__(self, "layer_ids", tuple(self.layer_ids) or tuple(range(self.num_layers)))
        if len(self.layer_ids) != self.num_layers:
            raise ValueError(f"layer_ids: expected {self.num_layers} numbers, got {len(self.layer_ids)}")
        object.__setattr__(self, "inv_freq", tuple(self.inv_freq))
        if 2 * len(self.inv_freq) > self.head_dim:
            raise ValueError(
                f"inv_freq: expected at most head_dim / 2 = {self.head_dim // 2}, got {len(self.inv_freq)}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share a kv head, G."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def sm_scale(self) -> float:
        """The factor of the logits."""
        return self.head_dim**-0.5 if self.scaling is None else self.scaling
