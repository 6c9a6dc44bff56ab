"""Tails: what a pruner dropped, put back as one pseudo-token a page.

Let C be a query head's candidates, K those that its kv head keeps, z the exact logits (scaled, `log_weight` added) and
s their estimates from 4-bit keys. Pruning alone gives softmax(z_K) V_K, as if the pruned had no mass. A tail gives page
j the estimated mass of its pruned tokens, on the page's mean value m_j:

    L_j = log sum_{i in C \\ K, i on page j} exp(s_i)
    out = (sum_{i in K} exp(z_i) v_i + sum_j exp(L_j) m_j) / (sum_{i in K} exp(z_i) + sum_j exp(L_j))

which is plain attention over K and one pseudo-token a page, of logit L_j and value m_j. Nothing is rescaled to what was
kept: with z = s the denominator is the mass of all candidates.

Both sums are over plain exponentials of logits on one scale, so the maximum that a softmax subtracts cancels and no
stage has to know another's. What does not cancel is the error of the estimates, s_i = z_i + e_i. It enters the tail
only, because kept tokens count with z. Errors of a page's tokens are nearly independent and average out; what stays is
their mean factor, E exp(e) ~ exp(var(e) / 2), and var(e) ~ |q|^2 scale_i^2 sm_scale^2 / 12: at the 0.1 to 0.3 nat that
4 bits usually cost, a tail is 0.5 to 5 % too heavy, of itself. Anchoring it to the estimated share instead, L_j +
lse(z_K) - lse(s_K), would hand the error of the one or two tokens that dominate K to the whole tail.

Tokens that the selector did not propose have no estimate and no part in a tail. A page's mean is over all of its
tokens, the kept ones included: the mean of the pruned ones alone would need K's values a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from twilight.checks import FLOAT_DTYPES, check_positive, check_tensor
from twilight.ops.quantize import dequantize
from twilight.selection import Selection


@dataclass(frozen=True)
class MeanValues:
    """The mean value of every page of a layer: what tails are made of.

    Attributes:
        values: `(means,)`, `[pages, Hkv, d]` in the type of the cache, or `(codes, params)`, `[pages, Hkv, d]` uint8
            and `[pages, Hkv, 2]` float16 (scale, zero): what `ops.page_means` returns of the values.
        page_size: P.
        max_pages: logical pages that a sequence may have, the width of the page table.
    """

    values: tuple[torch.Tensor, ...]
    page_size: int
    max_pages: int

    def __post_init__(self) -> None:
        check_positive("page_size", self.page_size)
        check_positive("max_pages", self.max_pages)
        if len(self.values) == 1:
            check_tensor("values[0]", self.values[0], (None, None, None), dtype=FLOAT_DTYPES)
        elif len(self.values) == 2:
            codes = check_tensor("values[0]", self.values[0], (None, None, None), dtype=torch.uint8)
            check_tensor("values[1]", self.values[1], (*codes.shape[:2], 2), dtype=torch.float16)
        else:
            raise ValueError(f"values: expected (means,) or (codes, params), got {len(self.values)} tensors")

    @property
    def bytes_per_page(self) -> int:
        """Bytes of the mean of one page of one kv head."""
        return sum(part[0, 0].numel() * part.element_size() for part in self.values)

    def gather(self, pages: torch.Tensor) -> torch.Tensor:
        """Return `[b, Hkv, n, d]` float32: the means of physical pages `[b, Hkv, n]`."""
        heads = torch.arange(pages.shape[1], device=pages.device)[None, :, None]
        parts = [part[pages, heads] for part in self.values]
        return parts[0].float() if len(parts) == 1 else dequantize(parts[0], parts[1], 8)


@dataclass(frozen=True)
class Tail:
    """Pseudo-tokens that attention counts beside a list of tokens.

    Attributes:
        pages: logical pages, granularity P. `log_weight [b, Hq, capacity]` is the pseudo-token's whole logit for each
            query head; `-inf` where the head has nothing there.
        means: their values.
    """

    pages: Selection
    means: MeanValues

    def __post_init__(self) -> None:
        if self.pages.granularity != self.means.page_size:
            raise ValueError(
                f"pages: expected a granularity of page_size={self.means.page_size}, got {self.pages.granularity}"
            )
        if self.pages.log_weight is None:
            raise ValueError("pages: expected a log_weight, the logits of the pseudo-tokens")


def mean_tail(tail: Tail, seq_lens: torch.Tensor) -> Tail:
    """Put all of a tail's mass on the mean value of the sequence instead (SparQ, arXiv 2312.04985).

    The mean over the sequence is the mean of its pages' means, weighted with their tokens n_j of N, so this too is a
    tail over pages: logits `log(sum_j exp(L_j)) + log(n_j / N)` for every page of the sequence.

    Args:
        tail: as `ops.page_tail` returns it.
        seq_lens: `[b]` int32.
    """
    size, log_weight = tail.means.page_size, tail.pages.log_weight
    assert log_weight is not None
    kv_heads = tail.pages.indices.shape[1]
    behind = ~tail.pages.counted().repeat_interleave(log_weight.shape[1] // kv_heads, dim=1)
    total = log_weight.masked_fill(behind, -torch.inf).logsumexp(-1, keepdim=True)
    every = Selection.everything(seq_lens, kv_heads, max_seq_len=tail.means.max_pages * size, granularity=size)
    starts = torch.arange(every.capacity, device=seq_lens.device) * size
    tokens = (seq_lens[:, None] - starts).clamp(0, size)
    share = (tokens / seq_lens.clamp(min=1)[:, None]).log().unsqueeze(1)
    return Tail(replace(every, log_weight=(total + share).float()), tail.means)
