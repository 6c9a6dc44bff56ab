"""The fused kernel over pages or tokens that a selector has chosen in its own way: lists in place of a ranking."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_fused_decode_gpu import BOUNDED, Case, as_mask, check, pytestmark  # noqa: F401
from twilight import Selection, ops


def given_case(lengths, *, share=0.5, tokens=False, **options):
    case = Case(lengths, vectors=0, **options)
    case.given = case.candidates(1 if tokens else case.page, share=share)
    return case


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim,page", [(64, 16), (128, 16), (128, 32), (256, 16)])
@pytest.mark.parametrize("heads,group", [(2, 4), (1, 1), (3, 3), (2, 8)])
def test_pages_that_somebody_has_chosen(dtype, dim, page, heads, group, tail):
    check(
        given_case([1, 54, 0, 97, 2048, 5003], dim=dim, page=page, heads=heads, group=group, dtype=dtype, tail=tail),
        0.9,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim,page", [(64, 16), (64, 32), (128, 16), (128, 32), (256, 16)])
@pytest.mark.parametrize("heads,group", [(2, 4), (1, 1), (3, 3), (2, 8)])
def test_tokens_that_somebody_has_chosen(dtype, dim, page, heads, group):
    lengths = [1, 54, 0, 97, 2048, 5003]
    check(given_case(lengths, dim=dim, page=page, heads=heads, group=group, dtype=dtype, tokens=True), 0.9)


@pytest.mark.parametrize("tokens", [False, True], ids=["pages", "tokens"])
@pytest.mark.parametrize("options", [{}, BOUNDED], ids=["plain", "bounded"])
@pytest.mark.parametrize("share", [0.03, 0.3])
@pytest.mark.parametrize("lengths", [[30000], [131071], [9000, 17, 4097], [3000] * 40, [1000 + i for i in range(70)]])
def test_lists_in_every_size_of_cluster(lengths, share, options, tokens):
    case = given_case(lengths, share=share, heads=8, tail=bool(options) and not tokens, tokens=tokens)
    want = check(case, 0.9, **options)
    got = case.run(0.9, lists=False, **options)
    assert got.candidates.indices.shape[-1] == got.pruned.selection.indices.shape[-1] == 0
    assert torch.equal(got.candidates.lengths, case.given.lengths)
    assert torch.equal(got.pruned.selection.lengths, want.pruned.selection.lengths)
    torch.testing.assert_close(got.out.float(), want.out.float(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("tokens", [False, True], ids=["pages", "tokens"])
def test_rows_for_which_nobody_has_chosen_anything(tokens):
    for lengths in ([20000, 300], [300] * 200):
        case = given_case(lengths, heads=4, tokens=tokens)
        case.given.lengths[0, 1] = case.given.lengths[1] = 0
        got = case.run(0.9)
        kept = got.pruned.selection
        assert torch.equal(kept.lengths == 0, case.given.lengths == 0)
        assert got.lse[1].isneginf().all() and (got.pruned.per_query_head[1] == 0).all()
        listed = Selection(kept.indices.masked_fill(~kept.counted(), 0), kept.lengths)
        out, lse = ops.sparse_attention(
            case.q, case.k_pages, case.v_pages, case.table, case.seq_lens, listed, backend="torch"
        )
        torch.testing.assert_close(got.lse, lse, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got.out.float(), out.float(), rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize("tokens", [False, True], ids=["pages", "tokens"])
def test_what_is_chosen_behind_the_end_holds_no_token(tokens):
    # As `Selection` allows: pages that the row, or even the table, does not have, and tokens of these.
    case = given_case([5000, 100], heads=2, tokens=tokens)
    want = case.run(0.9)
    indices, lengths = case.given.indices.clone(), case.given.lengths.clone()
    for row, head in ((0, 0), (1, 1)):
        n = int(lengths[row, head])
        assert n + 2 <= indices.shape[-1]
        end = int(case.seq_lens[row]) if tokens else case.table.shape[1] - (row == 1)
        behind = [end, 2**20, 2**28, 2**31 - 1, -1][: indices.shape[-1] - n]
        assert len(behind) == 5
        indices[row, head, n : n + 5] = torch.tensor(behind, device="cuda")
        lengths[row, head] = n + 5
    case.given = Selection(indices, lengths, case.given.granularity)
    got = case.run(0.9)
    assert torch.equal(got.pruned.selection.lengths, want.pruned.selection.lengths)
    torch.testing.assert_close(got.out.float(), want.out.float(), rtol=1e-2, atol=2e-3)


def test_pages_chosen_of_a_sequence_without_a_token():
    case = given_case([300, 0], heads=2, tail=True)
    case.given.lengths[1], case.given.indices[1] = 3, 0
    got = case.run(0.9)
    assert (got.candidates.lengths[1] == 0).all() and (got.pruned.tail.pages.lengths[1] == 0).all()
    assert got.lse[1].isneginf().all() and (got.out[1] == 0).all()


@pytest.mark.parametrize("tokens", [False, True], ids=["pages", "tokens"])
def test_replays_follow_what_is_chosen_anew(tokens):
    case = given_case([3000] * 40, heads=8, tokens=tokens)
    case.run(0.9, lists=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.run(0.9, lists=False)
    for share in (0.9, 0.02, 0.4):
        other = case.candidates(case.given.granularity, share=share)
        case.given.indices.copy_(other.indices), case.given.lengths.copy_(other.lengths)
        graph.replay()
        want = case.run(0.9, lists=False)
        assert torch.equal(got.out, want.out) and torch.equal(got.candidates.lengths, other.lengths)


def test_listed_tokens_are_the_pages_that_hold_them():
    # The same candidates, as pages and one by one. Blocks have other shares of them, which moves the cut by a rounding.
    case = given_case([5000, 700, 64], heads=4, page=32)
    want = case.run(0.95)
    positions, valid = case.given.positions(case.seq_lens)
    lengths = valid.sum(-1, dtype=torch.int32)
    order = (~valid).int().argsort(dim=-1, stable=True)
    case.given = Selection(positions.gather(-1, order).int().contiguous(), lengths, 1)
    got = case.run(0.95)
    n = case.table.shape[1] * case.page
    kept, wanted = (as_mask(each.pruned.selection, n) for each in (got, want))
    assert int((kept ^ wanted).sum()) <= 0.002 * int(wanted.sum())
    torch.testing.assert_close(got.pruned.mass, want.pruned.mass, rtol=0, atol=1e-3)
    torch.testing.assert_close(got.out.float(), want.out.float(), rtol=1e-2, atol=2e-3)


def test_reruns_over_listed_tokens_are_the_same_to_the_bit():
    case = given_case([30000, 17, 4097], heads=4, tokens=True)
    want = case.run(0.9)
    for _ in range(20):
        got = case.run(0.9)
        assert got.out.equal(want.out) and got.lse.equal(want.lse) and got.pruned.mass.equal(want.pruned.mass)
