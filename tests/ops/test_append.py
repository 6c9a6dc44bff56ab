"""Append: every token lands where the page table says, and nothing else moves."""

from __future__ import annotations

import numpy as np
import pytest
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


RULES = [("bounds", None), ("bounds", 8), ("mean", None), ("mean", 8), ("label", None), ("label", 2), ("label", 4)]
CHANNELS = torch.tensor([[3, 0, 7, 1], [6, 2, 5, 4]], dtype=torch.int32)
NOTHING = 113
"""What pages hold that no append has touched; no code of these tests is likely to be it in every place."""


def _summary(rule: str, bits: int | None, pages: int) -> ops.Summary:
    place = (pages, HEADS, PAGE_SIZE) if rule == "label" else (pages, HEADS)
    width = 4 if rule == "label" else DIM
    if bits is None:
        tensors = [torch.full((*place, width), float(NOTHING)) for _ in range(1 + (rule == "bounds"))]
    else:
        stored = width * bits // 8 * (1 + (rule == "bounds"))
        tensors = [torch.full((*place, stored), NOTHING, dtype=torch.uint8), torch.full((*place, 2), NOTHING).half()]
    return ops.Summary(rule, tuple(tensors), CHANNELS if rule == "label" else None)


def _expected(rule: str, bits: int | None, head: int, keys: np.ndarray) -> list[list[float]]:
    """Return, for each tensor, what a page with these keys holds, or what one key's slot does."""
    if rule == "label":
        label = keys[0, CHANNELS[head].numpy()]
        if bits is None:
            return [label.tolist()]
        codes, scale, zero = oracles.quantize(label, bits)
        return [list(oracles.pack(codes, bits)), [scale, zero]]
    if rule == "mean":
        mean = oracles.mean(keys)
        if bits is None:
            return [mean.tolist()]
        codes, scale, zero = oracles.quantize(mean, 8)
        return [codes, [scale, zero]]
    if bits is None:
        return [keys.max(0).tolist(), keys.min(0).tolist()]
    quantized = ops.quantize_bounds(torch.tensor(keys.max(0)), torch.tensor(keys.min(0)))
    return [part.tolist() for part in quantized]


@pytest.mark.parametrize("shadow", [True, False])
@pytest.mark.parametrize(("rule", "bits"), RULES)
def test_summaries_follow_ragged_appends(rule: str, bits: int | None, shadow: bool) -> None:
    table = torch.tensor([[5, 2, 9, 1], [4, 7, 3, 6], [8, 10, 11, 12]], dtype=torch.int32)
    (*pools, bytes_), summary = _empty(13), _summary(rule, bits, 13)
    pools.append(bytes_ if shadow else bytes_[..., :0])
    rows: list[list[torch.Tensor]] = [[], [], []]
    # A prompt that ends inside a page, single tokens, nothing, and chunks that begin and end inside pages.
    for counts in ([6, 1, 0], [1, 1, 0], [1, 0, 0], [5, 9, 0], [0, 2, 0]):
        before = [part.clone() for part in summary.tensors]
        touched = set()
        k = torch.randn(3, max(counts), HEADS, DIM) * 10 ** torch.empty(3, max(counts), 1, 1).uniform_(-2, 2)
        for row, count in enumerate(counts):
            touched |= {(row, position // PAGE_SIZE) for position in range(len(rows[row]), len(rows[row]) + count)}
            rows[row] += list(k[row, :count])
            k[row, count:] = torch.nan
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        ops.append(k, k, *pools, table, lengths, torch.tensor(counts, dtype=torch.int32), summary=summary)
        for row, logical in np.ndindex(3, 4):
            page, first = int(table[row, logical]), logical * PAGE_SIZE
            mine = rows[row][first : first + PAGE_SIZE]
            if (row, logical) not in touched:
                assert all(
                    torch.equal(part[page], old[page]) for part, old in zip(summary.tensors, before, strict=True)
                )
                continue
            for head in range(HEADS):
                keys = torch.stack(mine)[:, head].numpy()
                if rule != "label":
                    for part, want in zip(summary.tensors, _expected(rule, bits, head, keys), strict=True):
                        assert part[page, head].tolist() == want
                for slot in range(PAGE_SIZE if rule == "label" else 0):
                    for i, part in enumerate(summary.tensors):
                        if slot < len(mine):
                            assert part[page, head, slot].tolist() == _expected(rule, bits, head, keys[slot:])[i]
                        else:
                            assert (part[page, head, slot] == NOTHING).all()
    # The page that nobody owns stays finite.
    assert all(part[0].float().isfinite().all() for part in summary.tensors)


def test_a_summary_that_does_not_fit_is_refused_before_anything_is_written() -> None:
    table = torch.tensor([[1, 2]], dtype=torch.int32)
    pools = _empty(3)
    before = [part.clone() for part in pools]
    count = torch.tensor([1], dtype=torch.int32)
    k = torch.randn(1, 1, HEADS, DIM)
    with pytest.raises(ValueError, match=r"mean\[0\]: expected shape \[3, 2, 8\], got \[2, 2, 8\]"):
        ops.append(k, k, *pools, table, count, count, summary=ops.Summary("mean", (torch.zeros(2, HEADS, DIM),)))
    assert all(torch.equal(part, old) for part, old in zip(pools, before, strict=True))
