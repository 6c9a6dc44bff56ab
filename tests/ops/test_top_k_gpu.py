"""Top-k on the GPU: the same list as the torch twin where scores are told apart, and the right properties where they
are not.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_spgemv_gpu import pytestmark  # noqa: F401
from twilight import combine_group, ops


def run(scores, counts, lengths, backend, granularity=16, **options):
    return ops.top_k(scores, counts, lengths, granularity=granularity, backend=backend, **options)


def check(scores, counts, lengths, *, granularity=16, exact=False, force_newest=True, reduce="softmax", **options):
    options.update(force_newest=force_newest, reduce=reduce, granularity=granularity)
    options.setdefault("capacity", max(1, int(counts.max())))
    got, want = (run(scores, counts, lengths, backend, **options) for backend in ("cuda", "torch"))
    assert torch.equal(got.lengths, want.lengths)
    mine, theirs = (s.indices.masked_fill(~s.counted(), 0) for s in (got, want))
    if exact:
        assert torch.equal(mine, theirs)
        return got
    if torch.equal(mine, theirs):
        return got
    # Where they differ, the scores at stake differ by rounding only.
    entries = (lengths + granularity - 1) // granularity
    past = torch.arange(scores.shape[-1], device="cuda") >= entries[:, None, None]
    combined = combine_group(
        scores.masked_fill(past, -torch.inf), counts.shape[1], reduce, scale=options.get("scale", 1.0)
    )
    for row, head in (mine != theirs).any(-1).nonzero().tolist():
        count = int(got.lengths[row, head])
        a, b = set(mine[row, head, :count].tolist()), set(theirs[row, head, :count].tolist())
        assert len(a) == count and mine[row, head, :count].tolist() == sorted(a)
        left, right = (sorted(combined[row, head, list(s)].tolist()) for s in (a - b, b - a))
        assert len(left) <= 2 and left == pytest.approx(right, rel=1e-5, abs=2e-5)
    return got


def make(b, heads, group, n, *, kind="gaussian", seed=0):
    torch.manual_seed(seed)
    scores = torch.randn(b, heads * group, n, device="cuda") * 4
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = torch.zeros_like(scores) + 3
    elif kind == "wide":
        scores = scores * 100
    return scores


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("n", [1, 31, 54, 513, 2048, 8192, 40000])
@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
def test_equals_the_twin(group, n, reduce):
    scores = make(3, 2, group, n)
    lengths = torch.tensor([16 * n, 16 * n - 5, max(1, 8 * n)], dtype=torch.int32, device="cuda")
    counts = torch.randint(1, n + 1, (3, 2), dtype=torch.int32, device="cuda").minimum((lengths[:, None] + 15) // 16)
    check(scores, counts, lengths, reduce=reduce, scale=0.3)


@pytest.mark.parametrize("kind", ["ties", "equal", "wide"])
@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
def test_ties_and_wide_ranges(kind, reduce):
    scores = make(4, 2, 1, 3000, kind=kind)
    lengths = torch.tensor([48000, 47990, 20000, 16], dtype=torch.int32, device="cuda")
    counts = torch.tensor([700, 3000, 100, 1], dtype=torch.int32, device="cuda")[:, None].expand(4, 2).contiguous()
    check(scores, counts, lengths, reduce=reduce, exact=kind != "wide")


def test_empty_rows_and_few_scores():
    scores = make(4, 2, 4, 100)
    scores[1, :4] = -torch.inf
    scores[2, :, 10:] = -torch.inf
    scores[3, 1] = -torch.inf  # one query head of four has nothing
    lengths = torch.tensor([0, 1600, 1600, 1600], dtype=torch.int32, device="cuda")
    counts = torch.tensor([0, 20, 20, 20], dtype=torch.int32, device="cuda")[:, None].expand(4, 2).contiguous()
    got = check(scores, counts, lengths)
    assert got.lengths.tolist() == [[0, 0], [1, 20], [11, 11], [20, 20]]
    check(scores, counts, lengths, force_newest=False)


def test_nan_and_infinity_stay_in_their_row():
    scores = make(4, 2, 2, 200)
    clean = check(
        scores,
        torch.full((4, 2), 30, dtype=torch.int32, device="cuda"),
        torch.full((4,), 3200, dtype=torch.int32, device="cuda"),
    )
    scores[0, 0, 7] = torch.nan
    scores[1, 1, 9] = torch.inf
    scores[2, 3] = torch.nan
    counts = torch.full((4, 2), 30, dtype=torch.int32, device="cuda")
    lengths = torch.full((4,), 3200, dtype=torch.int32, device="cuda")
    for reduce in ("softmax", "sum", "max"):
        got = check(scores, counts, lengths, reduce=reduce)
        if reduce == "softmax":
            assert torch.equal(got.indices[3], clean.indices[3])
            assert torch.equal(got.indices[0, 1], clean.indices[0, 1])


@pytest.mark.parametrize("n", [16384, 131072])
def test_tokens(n):
    scores = make(2, 2, 4, n)
    lengths = torch.tensor([n, n - 777], dtype=torch.int32, device="cuda")
    counts = (lengths[:, None] // 4).expand(2, 2).contiguous()
    check(scores, counts, lengths, granularity=1, scale=0.5)


def test_twenty_runs_are_bitwise_equal():
    scores = make(8, 8, 4, 2048, kind="ties")
    lengths = torch.full((8,), 32768, dtype=torch.int32, device="cuda")
    counts = torch.full((8, 8), 512, dtype=torch.int32, device="cuda")
    first = check(scores, counts, lengths)
    for _ in range(20):
        again = run(scores, counts, lengths, "cuda", capacity=512, force_newest=True)
        assert torch.equal(first.indices, again.indices) and torch.equal(first.lengths, again.lengths)
