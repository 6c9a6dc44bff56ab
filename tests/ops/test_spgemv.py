"""Estimated logits: tight against the same 4-bit keys, within the bound of the quantisation against the exact dot."""

from __future__ import annotations

import math

import pytest
import torch

from tests import oracles
from twilight import Selection, ops

DIM = 16


def _case(lengths: list[int], page_size: int, group: int, granularity: int, dtype: torch.dtype = torch.float32):
    keys = torch.randn(len(lengths), max(lengths), 2, DIM)
    table = oracles.page_table(lengths, page_size)
    shadow = oracles.lay_out_shadow(keys, lengths, table, page_size)
    q = torch.randn(len(lengths), 2 * group, DIM).to(dtype)
    entries = [-(-length // granularity) for length in lengths]
    lists = oracles.random_lists(entries, 2)
    return keys, table, shadow, q, lists, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(("page_size", "granularity"), [(16, 1), (16, 16), (1, 1), (4, 4)])
def test_both_oracles(page_size: int, granularity: int, group: int, dtype: torch.dtype) -> None:
    lengths = [37, 1, 16, 0, 54]
    keys, table, shadow, q, lists, lens = _case(lengths, page_size, group, granularity, dtype)
    candidates = Selection(*oracles.pad(lists), granularity)
    logits = ops.estimate_scores(q, shadow, table, lens, candidates, page_size=page_size)
    assert logits.dtype == torch.float32
    assert logits.shape == (5, 2 * group, candidates.capacity * granularity)
    for row, length in enumerate(lengths):
        for head in range(2 * group):
            entries = lists[row][head // group]
            query = oracles.array(q[row, head])
            for place in range(logits.shape[-1]):
                entry, offset = divmod(place, granularity)
                got = float(logits[row, head, place])
                token = entries[entry] * granularity + offset if entry < len(entries) else length
                if token >= length:
                    assert got == -math.inf
                    continue
                key = keys[row, token, head // group].numpy()
                read = oracles.dequantize(key)
                assert got == pytest.approx(float(query @ read) / math.sqrt(DIM), abs=1e-5)
                step = oracles.quantize(key)[1]
                exact = float(query @ key.astype("float64")) / math.sqrt(DIM)
                assert abs(got - exact) <= abs(query).sum() / math.sqrt(DIM) * (step * 0.51 + 2e-3)


def test_sm_scale_replaces_the_default() -> None:
    _, table, shadow, q, lists, lens = _case([20], 4, 1, 1)
    candidates = Selection(*oracles.pad(lists))
    default = ops.estimate_scores(q, shadow, table, lens, candidates, page_size=4)
    scaled = ops.estimate_scores(q, shadow, table, lens, candidates, page_size=4, sm_scale=-0.5)
    real = default != -torch.inf
    assert torch.equal(real, scaled != -torch.inf)
    torch.testing.assert_close(scaled[real], default[real] * (-0.5 * math.sqrt(DIM)))


@pytest.mark.parametrize("granularity", [1, 4])
def test_log_weight_is_added_for_its_query_head_alone_and_not_behind_the_end(granularity: int) -> None:
    _, table, shadow, q, lists, lens = _case([18, 7], 4, 3, granularity)
    indices, lengths = oracles.pad(lists)
    extra = torch.randn(2, 6, indices.shape[-1])
    extra[0, 1, 0] = -torch.inf
    for row in range(2):
        for head in range(6):
            extra[row, head, int(lengths[row, head // 3]) :] = torch.nan  # padding: nobody may read it
    bare = ops.estimate_scores(q, shadow, table, lens, Selection(indices, lengths, granularity), page_size=4)
    weighted = Selection(indices, lengths, granularity, extra)
    logits = ops.estimate_scores(q, shadow, table, lens, weighted, page_size=4)
    for row, head, place in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(bare.shape[-1])):
        got, without = float(logits[row, head, place]), float(bare[row, head, place])
        if without == -math.inf:
            assert got == -math.inf
        else:
            assert got == pytest.approx(without + float(extra[row, head, place // granularity]))
    assert logits[0, 1, 0] == -torch.inf


def test_nan_in_a_row_stays_there() -> None:
    keys, table, shadow, q, lists, lens = _case([20, 20], 4, 2, 1)
    candidates = Selection(*oracles.pad(lists))
    clean = ops.estimate_scores(q, shadow, table, lens, candidates, page_size=4)
    shadow[table[0].long(), 0] = 0xFF
    q[0, 3] = torch.nan
    dirty = ops.estimate_scores(q, shadow, table, lens, candidates, page_size=4)
    assert torch.equal(dirty[1], clean[1]) and torch.equal(dirty[0, 2], clean[0, 2])
    assert dirty[0, 0, : len(lists[0][0])].isnan().all() and dirty[0, 3, : len(lists[0][1])].isnan().all()


def test_refuses_what_does_not_fit() -> None:
    _, table, shadow, q, lists, lens = _case([9], 4, 2, 1)
    candidates = Selection(*oracles.pad(lists))

    def estimate(q: torch.Tensor = q, shadow: torch.Tensor = shadow, page_size: int = 4) -> None:
        ops.estimate_scores(q, shadow, table, lens, candidates, page_size=page_size)

    other = Selection(candidates.indices[:, :1].contiguous(), candidates.lengths[:, :1].contiguous())
    with pytest.raises(ValueError, match=r"candidates.indices: expected shape \[1, 2, any\], got \[1, 1, "):
        ops.estimate_scores(q, shadow, table, lens, other, page_size=4)
    with pytest.raises(ValueError, match=r"q: expected a multiple of 2 heads, got 3"):
        estimate(q=torch.zeros(1, 3, DIM))
    with pytest.raises(ValueError, match=r"q: expected shape \[1, any, any\], got \[2, 4, 16\]"):
        estimate(q=torch.zeros(2, 4, DIM))
    with pytest.raises(TypeError, match="q: expected dtype .* got int64"):
        estimate(q=torch.zeros(1, 4, DIM, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shadow: expected shape \[any, any, 96\]"):
        estimate(page_size=8)
    with pytest.raises(TypeError, match="shadow: expected dtype uint8, got int8"):
        estimate(shadow=shadow.view(torch.int8))
