"""Append: write new tokens' K, V and 4-bit keys into their pages."""

from __future__ import annotations

import torch

from twilight.ops.paging import locate
from twilight.ops.quantize import quantize, split_shadow
from twilight.pages import NULL_PAGE


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    new_tokens: torch.Tensor,
) -> None:
    """Write the last `new_tokens` tokens of each sequence, in place.

    Args:
        k, v: `[b, n, Hkv, d]`; of row i the first `new_tokens[i]` tokens count.
        k_pages, v_pages: `[pages, Hkv, P, d]`, of the same type.
        shadow: `[pages, Hkv, P*d/2 + 4*P]` uint8, see `twilight.ops.quantize`.
        page_table: `[b, max_pages]` int32, the pages of the new tokens in it.
        seq_lens: `[b]` int32, the new tokens counted.
        new_tokens: `[b]` int32.
    """
    page_size = k_pages.shape[2]
    steps = torch.arange(k.shape[1], device=k.device)
    counts = new_tokens.long()[:, None]
    real = steps < counts
    positions = (seq_lens.long()[:, None] - counts + steps).masked_fill(~real, 0)
    pages, slots = locate(positions, page_table, page_size)
    # What does not count goes to the page that nobody owns, as zeros: no branch, and nothing stray is kept.
    pages = pages.masked_fill(~real, NULL_PAGE)
    k = k.masked_fill(~real[..., None, None], 0)
    v = v.masked_fill(~real[..., None, None], 0)
    k_pages[pages, :, slots] = k
    v_pages[pages, :, slots] = v
    codes, params = quantize(k)
    stored_codes, stored_params = split_shadow(shadow, page_size)
    stored_codes[pages, :, slots] = codes
    stored_params[pages, :, slots] = params
