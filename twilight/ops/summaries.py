"""Summaries: what selectors keep about keys that `append` can bring up to date by itself, while it writes the keys.

    rule      of              tensors, `[pages, Hkv, ...]`
    bounds    a page          maxima [d] and minima [d], in the type of the keys; or codes [2*d] uint8 and params [2]
    mean      a page          means [d], in the type of the keys; or codes [d] uint8 and params [2]
    label     each token      r of its channels [P, r], in the type of the keys; or codes [P, r*bits/8] uint8 and
                              params [P, 2], at 2 or 4 bits

Params are (scale, zero) in float16. Bounds are rounded outwards, see `twilight.ops.page_scores`; means and labels to
the nearest code, see `twilight.ops.quantize`.

Every one of them is a function of the page's keys alone, to the last bit, so that appending one by one and all at once
agree, and so do a page and its copy. The largest and the smallest do not depend on the order in which keys are looked
at; a sum of floats does, and means therefore add up in float32 in the order of the slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from twilight.checks import check_tensor
from twilight.ops.page_scores import quantize_bounds
from twilight.ops.quantize import quantize

RULES = ("bounds", "mean", "label")


@dataclass(frozen=True)
class Summary:
    """Metadata that `append` is to bring up to date.

    Attributes:
        rule: "bounds", "mean" or "label".
        tensors: where it is kept, as above.
        channels: of labels, `[Hkv, r]` int32: which channels of a key they are, for each kv head.
        bits: of a code; None where there are none.

    Raises:
        ValueError, TypeError: tensors that are not of that rule.
    """

    rule: str
    tensors: tuple[torch.Tensor, ...]
    channels: torch.Tensor | None = None
    bits: int | None = field(init=False)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: expected {', '.join(map(repr, RULES))}, got {self.rule!r}")
        if self.rule == "label" and self.channels is None:
            raise ValueError("channels: labels need them, [Hkv, r] int32")
        if self.rule != "label" and self.channels is not None:
            raise ValueError(f"channels: for labels only, the rule is {self.rule!r}")
        packed = bool(self.tensors) and self.tensors[0].dtype == torch.uint8
        expected = 2 if packed or self.rule == "bounds" else 1
        if len(self.tensors) != expected:
            raise ValueError(f"{self.rule}: expected {expected} tensor{'s' * (expected > 1)}, got {len(self.tensors)}")
        bits = None if not packed else self._label_bits() if self.rule == "label" else 8
        object.__setattr__(self, "bits", bits)

    def _label_bits(self) -> int:
        assert self.channels is not None
        count, stored = self.channels.shape[-1], self.tensors[0].shape[-1]
        for bits in (2, 4):
            if 8 * stored == count * bits:
                return bits
        raise ValueError(
            f"label[0]: expected {count / 4:g} or {count / 2:g} bytes, {count} channels in 2 or 4 bits, got {stored}"
        )

    def check(self, k_pages: torch.Tensor) -> None:
        """Refuse tensors that do not go with these pages, `[pages, Hkv, P, d]`."""
        pages, heads, size, dim = k_pages.shape
        place = (pages, heads, size) if self.rule == "label" else (pages, heads)
        width = dim
        if self.channels is not None:
            check_tensor("channels", self.channels, (heads, None), dtype=torch.int32, device=k_pages.device)
            width = self.channels.shape[1]
            if not 1 <= width <= dim:
                raise ValueError(f"channels: expected 1 to head_dim={dim} of them, got {width}")
        if self.bits is not None:
            stored = width * self.bits // 8 * (2 if self.rule == "bounds" else 1)
            check_tensor(f"{self.rule}[0]", self.tensors[0], (*place, stored), device=k_pages.device)
            check_tensor(f"{self.rule}[1]", self.tensors[1], (*place, 2), dtype=torch.float16, device=k_pages.device)
            return
        for i, tensor in enumerate(self.tensors):
            check_tensor(f"{self.rule}[{i}]", tensor, (*place, width), dtype=k_pages.dtype, device=k_pages.device)


def page_bounds(keys: torch.Tensor, valid: torch.Tensor, bits: int | None = None) -> tuple[torch.Tensor, ...]:
    """Return the largest and the smallest value of each channel of each page.

    Args:
        keys: `[n, Hkv, P, d]`.
        valid: `[n, P]` bool, which slots hold a token; at least one.
        bits: 8 for codes; None leaves the bounds as they are.

    Returns:
        `(page_max, page_min)`, `[n, Hkv, d]` each, in the type of `keys`; or `(codes, params)`, `[n, Hkv, 2*d]` uint8
        and `[n, Hkv, 2]` float16.
    """
    empty = ~valid[:, None, :, None]
    bounds = keys.masked_fill(empty, -torch.inf).amax(2), keys.masked_fill(empty, torch.inf).amin(2)
    return bounds if bits is None else quantize_bounds(*bounds)


def page_means(keys: torch.Tensor, valid: torch.Tensor, bits: int | None = None) -> tuple[torch.Tensor, ...]:
    """Return the mean key of each page: added up in float32, slot after slot, then divided by their number.

    Args:
        keys: `[n, Hkv, P, d]`.
        valid: `[n, P]` bool, which slots hold a token; at least one.
        bits: 8 for codes; None for the type of `keys`.

    Returns:
        `(means,)`, `[n, Hkv, d]`; or `(codes, params)`, `[n, Hkv, d]` uint8 and `[n, Hkv, 2]` float16.
    """
    total = torch.zeros_like(keys[:, :, 0], dtype=torch.float32)
    for slot, filled in zip(keys.unbind(2), valid.unbind(1), strict=True):
        total += slot.float().masked_fill(~filled[:, None, None], 0)
    # Divided by a tensor of the same shape: by a number, torch multiplies with its reciprocal on a GPU.
    means = total / valid.sum(1)[:, None, None].to(total).expand_as(total)
    return (means.to(keys.dtype),) if bits is None else quantize(means, bits)


def key_labels(keys: torch.Tensor, channels: torch.Tensor, bits: int | None = None) -> tuple[torch.Tensor, ...]:
    """Return some channels of each key.

    Args:
        keys: `[..., Hkv, n, d]`.
        channels: `[Hkv, r]` int32, which channels, for each kv head.
        bits: 2 or 4 for codes; None for the type of `keys`.

    Returns:
        `(labels,)`, `[..., Hkv, n, r]`; or `(codes, params)`, `[..., Hkv, n, r*bits/8]` uint8 and `[..., Hkv, n, 2]`
        float16.
    """
    labels = keys.gather(-1, channels.long()[:, None].expand(*keys.shape[:-1], -1))
    return (labels,) if bits is None else quantize(labels, bits)
