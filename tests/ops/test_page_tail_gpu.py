"""The page tail of candidates that are tokens, on the GPU: the torch twin's pages, and its log weights within 1e-4."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_spgemv_gpu import pytestmark  # noqa: F401
from twilight import Selection, ops
from twilight.ops.tail import MeanValues

RAGGED = (5003, 0, 1, 37, 640, 16)


def make(lengths, *, group=4, page=16, dtype=torch.float16, share=0.4, keep=0.3, heads=2, spare=0, seed=0):
    """Logits, candidates, what is kept of them, lengths and means; rubbish behind the end of every list."""
    torch.manual_seed(seed)
    longest = max(1, *lengths)
    lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    places = torch.arange(longest, device="cuda").expand(len(lengths), heads, longest)
    listed = (torch.rand(places.shape, device="cuda") < share) & (places < lens[:, None, None])
    candidates = spoil(Selection.compact(places, listed, granularity=1))
    kept = spoil(Selection.compact(places, listed & (torch.rand(places.shape, device="cuda") < keep), granularity=1))
    logits = torch.randn(len(lengths), heads * group, candidates.capacity, device="cuda") * 4
    ends = candidates.counted().repeat_interleave(group, 1)
    logits = logits.to(dtype).masked_fill(~ends, -torch.inf)
    pages = -(-longest // page) + spare
    return logits, candidates, kept, lens, MeanValues((torch.randn(2, heads, 8, device="cuda"),), page, pages)


def spoil(selection):
    padded = torch.nn.functional.pad(selection.indices, (0, 3))
    behind = torch.arange(padded.shape[-1], device="cuda") >= selection.lengths.unsqueeze(-1)
    rubbish = torch.randint(-(2**31), 2**31 - 1, padded.shape, dtype=torch.int32, device="cuda")
    return Selection(torch.where(behind, rubbish, padded), selection.lengths)


def check(logits, candidates, kept, lens, means):
    got, want = (
        ops.page_tail(logits, candidates, kept, lens, means, backend=backend).pages for backend in ("cuda", "torch")
    )
    assert got.lengths.equal(want.lengths) and got.capacity == means.max_pages
    counted = want.counted()
    assert got.indices[counted].equal(want.indices[counted])
    wide = counted.repeat_interleave(logits.shape[1] // counted.shape[1], 1)
    torch.testing.assert_close(got.log_weight[wide], want.log_weight[wide], atol=1e-4, rtol=0, equal_nan=True)
    return got


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
def test_equals_the_twin(group, page, dtype, share):
    check(*make(RAGGED, group=group, page=page, dtype=dtype, share=share, spare=5))


@pytest.mark.parametrize("shape", [(1, 1, 200), (1, 8, 30000), (1, 1, 200_000), (5, 8, 8192), (90, 8, 1000)])
def test_every_split_of_a_row(shape):
    rows, heads, n = shape
    check(*make([n] * rows, heads=heads))


@pytest.mark.parametrize("keep", [-1.0, 2.0])
def test_nothing_and_everything_kept(keep):
    got = check(*make(RAGGED, keep=keep))
    assert bool((got.lengths == 0).all()) == (keep > 1)


def test_no_candidates():
    assert check(*make(RAGGED, share=-1.0)).lengths.sum() == 0


@pytest.mark.parametrize("n", [16, 4096, 4097, 16 * 256 * 8 + 1])
def test_the_last_token_of_the_last_page(n):
    logits, _, _, lens, means = make([n])
    last = Selection(torch.full((1, 2, 1), n - 1, dtype=torch.int32, device="cuda"), torch.ones_like(lens).expand(1, 2))
    nothing = Selection(last.indices, torch.zeros_like(last.lengths))
    got = check(logits[..., :1], last, nothing, lens, means)
    assert got.indices[..., 0].tolist() == [[means.max_pages - 1] * 2]
    assert got.log_weight[..., 0].equal(logits[..., 0].float())


def test_tokens_behind_a_sequence_do_not_count():
    logits, candidates, kept, lens, means = make((5003, 640, 90))
    check(logits, candidates, kept, lens - torch.tensor([7, 16, 90], dtype=torch.int32, device="cuda"), means)


def test_a_page_that_is_hidden_from_every_head_is_not_listed():
    logits, candidates, kept, lens, means = make((900,), share=1.0)
    logits[:, :3, :200] = -torch.inf
    logits[:, 3:4, :100] = -torch.inf
    got = check(logits, candidates, kept, lens, means)
    assert got.indices[0, 0, 0] == 6 and got.log_weight[0, 0, 0] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -60000.0, 60000.0])
def test_sick_and_wide_logits(value, dtype):
    logits, candidates, kept, lens, means = make((900, 700), dtype=dtype)
    logits[0, 1, 20:90:7], logits[1, 6, 3] = value, value
    check(logits, candidates, kept, lens, means)
    pruned = ops.top_p(logits, candidates, lens, 0.8, means=means, backend="cuda")
    check(logits, candidates, pruned.selection, lens, means)
    if not abs(value) < torch.inf:
        assert pruned.tail.pages.lengths[0, 0] == 0 and pruned.tail.pages.lengths[1, 1] == 0


def test_twenty_runs_are_bitwise_equal():
    case = make((70000, 3000), group=8)
    first = check(*case)
    counted = first.counted()
    wide = counted.repeat_interleave(8, 1)
    for _ in range(20):
        again = ops.page_tail(*case, backend="cuda").pages
        assert again.lengths.equal(first.lengths) and again.indices[counted].equal(first.indices[counted])
        assert again.log_weight[wide].equal(first.log_weight[wide])


def test_a_replayed_graph_follows_its_inputs():
    logits, candidates, kept, lens, means = make((3000, 700))
    ops.page_tail(logits, candidates, kept, lens, means, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.page_tail(logits, candidates, kept, lens, means, backend="cuda").pages
    for shift in (1.0, -2.0):
        logits += shift
        kept.lengths.sub_(5).clamp_(min=0)
        graph.replay()
        fresh = check(logits, candidates, kept, lens, means)
        counted = fresh.counted()
        wide = counted.repeat_interleave(4, 1)
        assert captured.lengths.equal(fresh.lengths) and captured.indices[counted].equal(fresh.indices[counted])
        assert captured.log_weight[wide].equal(fresh.log_weight[wide])


def test_says_what_it_cannot_take():
    logits, candidates, kept, lens, means = make((100,))
    for other, message in ((logits.bfloat16(), "bfloat16"), (logits.repeat(1, 5, 1), "a group has 20 query heads")):
        with pytest.raises(ValueError, match=message):
            ops.page_tail(other, candidates, kept, lens, means, backend="cuda")
