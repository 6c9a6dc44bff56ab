"""Append: every token lands where the page table says, and nothing else moves."""

from __future__ import annotations

import torch

from tests import oracles
from twilight import ops

PAGE_SIZE, HEADS, DIM = 4, 2, 8


def _empty(pages: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k_pages, v_pages = (torch.full((pages, HEADS, PAGE_SIZE, DIM), -7.0) for _ in range(2))
    return k_pages, v_pages, torch.full((pages, HEADS, PAGE_SIZE * (DIM // 2 + 4)), 0xFF, dtype=torch.uint8)


def test_ragged_append_writes_the_tokens_that_count_and_nothing_else() -> None:
    before, new = [3, 4, 0, 6], [5, 0, 2, 1]
    lengths = [b + n for b, n in zip(before, new, strict=True)]
    table = oracles.page_table(lengths, PAGE_SIZE)
    k_pages, v_pages, shadow = _empty(int(table.max()) + 1)
    k, v = torch.randn(4, 5, HEADS, DIM), torch.randn(4, 5, HEADS, DIM)
    for row, count in enumerate(new):
        k[row, count:] = v[row, count:] = torch.nan
    counts = torch.tensor(new, dtype=torch.int32)
    ops.append(k, v, k_pages, v_pages, shadow, table, torch.tensor(lengths, dtype=torch.int32), counts)

    written = set()
    for row in range(4):
        for step in range(new[row]):
            position = before[row] + step
            page, slot = int(table[row, position // PAGE_SIZE]), position % PAGE_SIZE
            written.add((page, slot))
            assert torch.equal(k_pages[page, :, slot], k[row, step])
            assert torch.equal(v_pages[page, :, slot], v[row, step])
            for head in range(HEADS):
                codes, _, _ = oracles.quantize(k[row, step, head].numpy())
                half = DIM // 2
                stored = shadow[page, head, slot * half : (slot + 1) * half]
                assert bytes(stored.tolist()) == oracles.pack(codes)
    for page in range(1, len(k_pages)):
        for slot in range(PAGE_SIZE):
            if (page, slot) not in written:
                assert (k_pages[page, :, slot] == -7).all() and (v_pages[page, :, slot] == -7).all()
                params = shadow[page, :, PAGE_SIZE * DIM // 2 :].unflatten(-1, (PAGE_SIZE, 4))
                assert (params[:, slot] == 0xFF).all()
    # The page that nobody owns takes what does not count, and must never hold a NaN: others are padded with it.
    assert not k_pages[0].isnan().any() and not v_pages[0].isnan().any()


def test_one_by_one_equals_at_once_bit_for_bit() -> None:
    lengths = [7, 9]
    table = oracles.page_table(lengths, PAGE_SIZE)
    k, v = torch.randn(2, 9, HEADS, DIM), torch.randn(2, 9, HEADS, DIM)
    once, steps = (_empty(int(table.max()) + 1) for _ in range(2))
    lens = torch.tensor(lengths, dtype=torch.int32)
    ops.append(k, v, *once, table, lens, lens)
    for step in range(9):
        counts = (lens > step).int()
        ops.append(k[:, step : step + 1], v[:, step : step + 1], *steps, table, lens.clamp(max=step + 1), counts)
    for whole, part in zip(once, steps, strict=True):
        assert torch.equal(whole[1:], part[1:])
