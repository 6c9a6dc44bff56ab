"""Selection: what its lists mean, and the two ways of making one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracles
from twilight import Selection


def _int(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_positions_spell_out_pages_and_cut_the_newest() -> None:
    selection = Selection(_int([[[0, 2, -9]], [[1, 2**30, 2**30]]]), _int([[2], [1]]), 4)
    positions, valid = selection.positions(_int([10, 5]))
    assert positions[0, 0].tolist() == [0, 1, 2, 3, 8, 9, 0, 0, 0, 0, 0, 0]
    assert valid[0, 0].tolist() == [True] * 6 + [False] * 6
    assert positions[1, 0, valid[1, 0]].tolist() == [4]
    assert (positions[~valid] == 0).all()
    assert selection.num_tokens(_int([10, 5])).tolist() == [[6], [1]]
    assert selection.num_tokens(_int([8, 4])).tolist() == [[4], [0]]


def test_log_weight_of_a_page_is_that_of_its_tokens() -> None:
    extra = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert Selection(_int([[[0, 1]]]), _int([[2]])).token_log_weight() is None
    spelled = Selection(_int([[[0, 1]]]), _int([[2]]), 2, extra).token_log_weight()
    assert spelled is not None and spelled.tolist() == [[[1, 1, 2, 2], [3, 3, 4, 4]]]


@pytest.mark.parametrize(("granularity", "tokens"), [(1, 13), (4, 13), (16, 13), (4, 12)])
def test_everything_is_every_token(granularity: int, tokens: int) -> None:
    lens = _int([tokens, 0, 1])
    everything = Selection.everything(lens, 2, max_seq_len=tokens, granularity=granularity)
    positions, valid = everything.positions(lens)
    for row, length in enumerate([tokens, 0, 1]):
        for head in range(2):
            assert positions[row, head, valid[row, head]].tolist() == list(range(length))
    assert everything.lengths.tolist() == [[-(-n // granularity)] * 2 for n in (tokens, 0, 1)]


score = st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.5, 1.0, 3.0, math.inf])


@given(st.lists(score, min_size=1, max_size=20), st.integers(0, 20))
def test_top_takes_the_largest_and_of_equals_the_first(scores: list[float], count: int) -> None:
    ranked = sorted((i for i, s in enumerate(scores) if s != -math.inf), key=lambda i: (-scores[i], i))
    counts = torch.tensor([[count]])
    top = Selection.top(torch.tensor([[scores]]), counts, capacity=20, granularity=4)
    taken = min(count, len(ranked))
    assert top.granularity == 4
    assert top.lengths.tolist() == [[taken]]
    assert top.indices[0, 0, :taken].tolist() == sorted(ranked[:count])
    assert (top.indices[0, 0, taken:] == 0).all()


def test_top_counts_each_row_by_itself() -> None:
    scores = torch.tensor([[[1.0, 5.0, 3.0, 4.0]], [[9.0, 8.0, -math.inf, -math.inf]]])
    top = Selection.top(scores, _int([[3], [4]]), capacity=4, granularity=1)
    assert top.lengths.tolist() == [[3], [2]]
    assert top.indices[0, 0, :3].tolist() == [1, 2, 3] and top.indices[1, 0, :2].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"counts: expected shape \[2, 1\], got \[1, 1\]"):
        Selection.top(scores, _int([[3]]), capacity=4, granularity=1)


@given(st.data())
def test_compact_sorts_what_is_kept_and_carries_log_weight(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    indices = [[data.draw(st.permutations(range(size))) for _ in range(2)]]
    keep = [[data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) for _ in range(2)]]
    extra = torch.arange(4.0 * size).view(1, 4, size)
    packed = Selection.compact(torch.tensor(indices), torch.tensor(keep), granularity=1, log_weight=extra)
    assert packed.log_weight is not None
    for head in range(2):
        pairs = sorted((index, place) for place, index in enumerate(indices[0][head]) if keep[0][head][place])
        count = int(packed.lengths[0, head])
        assert packed.indices[0, head, :count].tolist() == [index for index, _ in pairs]
        assert (packed.indices[0, head, count:] == 0).all()
        for query in (2 * head, 2 * head + 1):
            assert packed.log_weight[0, query, :count].tolist() == [extra[0, query, place] for _, place in pairs]


def test_trimmed_cuts_padding_only() -> None:
    selection = Selection(*oracles.pad([[[1, 4], [2]], [[], [0, 3]]]), 1, torch.randn(2, 4, 4))
    trimmed = selection.trimmed()
    assert trimmed.capacity == 2
    assert selection.log_weight is not None and trimmed.log_weight is not None
    assert torch.equal(trimmed.indices, selection.indices[..., :2])
    assert torch.equal(trimmed.log_weight, selection.log_weight[..., :2])
    assert torch.equal(trimmed.lengths, selection.lengths)
    # Nothing selected at all keeps one slot, so that no shape is zero.
    assert Selection(*oracles.pad([[[]]])).trimmed().capacity == 1


def test_refuses_tensors_that_do_not_fit_together() -> None:
    indices, lengths = torch.zeros(2, 3, 4, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match="indices: expected dtype int32, got int64"):
        Selection(indices.long(), lengths)
    with pytest.raises(ValueError, match=r"indices: expected shape \[any, any, any\], got \[2, 3\]"):
        Selection(lengths, lengths)
    with pytest.raises(ValueError, match=r"lengths: expected shape \[2, 3\], got \[2, 2\]"):
        Selection(indices, lengths[:, :2])
    with pytest.raises(ValueError, match="granularity: expected at least 1, got 0"):
        Selection(indices, lengths, 0)
    with pytest.raises(ValueError, match=r"log_weight: expected shape \[2, any, 4\], got \[2, 6, 5\]"):
        Selection(indices, lengths, log_weight=torch.zeros(2, 6, 5))
    with pytest.raises(TypeError, match="log_weight: expected dtype float32, got float64"):
        Selection(indices, lengths, log_weight=torch.zeros(2, 6, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="lengths: expected device cpu, got meta"):
        Selection(indices, lengths.to("meta"))
    with pytest.raises(ValueError, match="log_weight: expected device cpu, got meta"):
        Selection(indices, lengths, log_weight=torch.zeros(2, 6, 4, device="meta"))


@pytest.mark.parametrize("length", [-1, 4])
def test_lengths_outside_the_capacity_are_refused(length: int) -> None:
    indices = torch.zeros(1, 1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="lengths: expected 0 to 3, the capacity, got"):
        Selection(indices, torch.tensor([[length]], dtype=torch.int32))


def test_mask_lists_what_counts_and_no_padding() -> None:
    indices = torch.tensor([[[1, 4, 4], [0, 9, 9], [9, 9, 9]]], dtype=torch.int32)
    selection = Selection(indices, torch.tensor([[2, 1, 0]], dtype=torch.int32))
    assert selection.mask(5).int().tolist() == [[[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0] * 5]]
