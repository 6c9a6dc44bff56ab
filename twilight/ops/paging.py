"""Where a position of a sequence lies."""

from __future__ import annotations

import torch


def locate(positions: torch.Tensor, page_table: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Translate positions into pages and slots.

    Args:
        positions: `[b, ...]` int64 positions, each below its sequence's length.
        page_table: `[b, max_pages]` int32.
        page_size: P.

    Returns:
        `(pages, slots)`, both int64 and shaped as `positions`.
    """
    flat = (positions // page_size).flatten(1).clamp(max=page_table.shape[1] - 1)
    pages = page_table.long().gather(1, flat).view(positions.shape)
    return pages, positions % page_size


def gather_tokens(
    pages: torch.Tensor, positions: torch.Tensor, page_table: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Gather what is stored for each token.

    Args:
        pages: `[pages, Hkv, P, ...]`.
        positions: `[b, Hkv, n]` int64.
        page_table: `[b, max_pages]` int32.
        page_size: P.

    Returns:
        `[b, Hkv, n, ...]`.
    """
    page, slot = locate(positions, page_table, page_size)
    heads = torch.arange(pages.shape[1], device=pages.device)[None, :, None]
    return pages[page, heads, slot]


def new_positions(seq_lens: torch.Tensor, new_tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """Return `[b, steps]` int64: where the tokens of a step stand, of row i the last `new_tokens[i]`; -1 for the rest.

    Args:
        seq_lens: `[b]` int32, the new tokens counted.
        new_tokens: `[b]` int32.
        steps: n.
    """
    offsets = torch.arange(steps, device=seq_lens.device)
    positions = (seq_lens - new_tokens).long()[:, None] + offsets
    return positions.masked_fill(offsets >= new_tokens[:, None], -1)
