"""Top-k over long rows on the GPU, by both kinds of team: the torch twin's list where scores are told apart."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_spgemv_gpu import pytestmark  # noqa: F401
from twilight import combine_group, ops
from twilight.ops import token_top_k

DEVICE = "cuda"
CLUSTERS = pytest.mark.parametrize("clusters", [pytest.param(None, id="clusters"), pytest.param(False, id="apart")])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32])


def select(scores, counts, lengths, *, clusters=None, lse=None, capacity=None, **options):
    options = {"granularity": 1, "reduce": "softmax", "scale": 1.0, "force_newest": False} | options
    options["capacity"] = capacity or max(1, int(counts.max()))
    got = token_top_k.launch(scores, counts, lengths, lse, clusters=clusters, **options)
    return got, ops.top_k(scores, counts, lengths, lse=lse, backend="torch", **options)


def check(scores, counts, lengths, *, tolerance=0.0, **options):
    """Compare with the twin."""
    got, want = select(scores, counts, lengths, **options)
    return compare(got, want, scores, counts, lengths, tolerance=tolerance, **options)


def compare(got, want, scores, counts, lengths, *, tolerance=0.0, **options):
    """Entries that differ must differ in their combined score by no more than `tolerance`; returns `got`."""
    assert torch.equal(got.lengths, want.lengths)
    mine, theirs = (s.indices.masked_fill(~s.counted(), 0) for s in (got, want))
    if torch.equal(mine, theirs):
        return got
    entries = -(-lengths // options.get("granularity", 1))
    past = torch.arange(scores.shape[-1], device=DEVICE) >= entries[:, None, None]
    combined = combine_group(
        scores.float().masked_fill(past, -torch.inf), counts.shape[1], options.get("reduce", "softmax"),
        scale=options.get("scale", 1.0), lse=options.get("lse"),
    )  # fmt: skip
    for row, head in (mine != theirs).any(-1).nonzero().tolist():
        count = int(got.lengths[row, head])
        a, b = (set(s[row, head, :count].tolist()) for s in (mine, theirs))
        assert len(a) == count and mine[row, head, :count].tolist() == sorted(a)
        left, right = (torch.tensor(sorted(combined[row, head, list(s)].tolist())) for s in (a - b, b - a))
        assert len(left) <= 4 and float((left - right).abs().max()) <= tolerance, (row, head, left, right)
    return got


def make(b, heads, group, n, dtype, *, kind="gaussian"):
    torch.manual_seed(0)
    scores = torch.randn(b, heads * group, n, device=DEVICE) * 4
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = torch.zeros_like(scores) + 3
    elif kind == "wide":
        scores = scores * 100
    return scores.to(dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def share(lengths, heads, part):
    return (lengths.float() * part).ceil().int()[:, None].expand(-1, heads).contiguous()


@CLUSTERS
@HALVES
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("n", [1, 54, 513, 2048, 8192, 20001])
def test_equals_the_twin(clusters, dtype, group, n):
    scores, lengths = make(3, 2, group, n, dtype), ints(n, max(1, n // 2 - 3), 0)
    counts = torch.randint(1, n + 1, (3, 2), dtype=torch.int32, device=DEVICE).minimum(lengths[:, None])
    check(scores, counts, lengths, clusters=clusters, scale=0.3, tolerance=2e-5)


@CLUSTERS
@pytest.mark.parametrize(
    "b,heads,n", [(1, 8, 131072), (1, 1, 700_000), (2, 8, 32768), (64, 8, 8192), (9, 8, 40007), (1, 8, 9000)]
)
def test_batches_and_lengths(clusters, b, heads, n):
    lengths = ints(*(n - 37 * row for row in range(b)))
    for dtype in (torch.float16, torch.float32):
        check(make(b, heads, 4, n, dtype), share(lengths, heads, 0.25), lengths, clusters=clusters, tolerance=2e-5)


@CLUSTERS
@HALVES
@pytest.mark.parametrize("kind", ["ties", "equal", "wide"])
@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
@pytest.mark.parametrize("newest", [True, False])
def test_ties_and_wide_ranges(clusters, dtype, kind, reduce, newest):
    scores = make(4, 2, 1 if kind == "equal" else 2, 12000, dtype, kind=kind)
    lengths = ints(12000, 11990, 5000, 1)
    counts = ints(2800, 11990, 400, 1)[:, None].expand(4, 2).contiguous()
    # Equal scores are equal for both; a wide row's log-sum-exp is some thousand, of which a float has 2e-4.
    tolerance = {"ties": 2e-5, "equal": 0.0, "wide": 2e-3}[kind]
    options = {"reduce": reduce, "force_newest": newest, "scale": 0.7}
    check(scores, counts, lengths, clusters=clusters, tolerance=tolerance, **options)


@CLUSTERS
@HALVES
def test_ties_at_the_threshold_go_to_the_lower_index(clusters, dtype):
    # Every score thirty times over, in all slices: the rank falls inside a class of equals.
    scores = (torch.arange(9001, device=DEVICE) % 300).to(dtype).expand(2, 2, -1).contiguous()
    lengths, counts = ints(9001, 8000), ints([1000, 1], [4001, 7999])
    got = check(scores, counts, lengths, clusters=clusters)
    ranked = sorted(range(9001), key=lambda token: (-(token % 300), token))
    assert got.indices[0, 0, :1000].tolist() == sorted(ranked[:1000])


@CLUSTERS
@HALVES
def test_none_all_and_rows_without_scores(clusters, dtype):
    scores = make(5, 2, 4, 9000, dtype)
    scores[1, :4] = -torch.inf
    scores[2, :, 10:] = -torch.inf
    scores[3, 1] = -torch.inf  # one query head of four has nothing
    lengths = ints(0, 9000, 9000, 9000, 9000)
    for newest in (False, True):
        counts = ints([0, 0], [20, 20], [20, 20], [20, 9000], [0, 9000])
        got = check(scores, counts, lengths, clusters=clusters, force_newest=newest, tolerance=2e-5)
        left = 11 if newest else 10
        assert got.lengths.tolist() == [[0, 0], [int(newest), 20], [left, left], [20, 9000], [0, 9000]]
        assert got.indices[4, 1].tolist() == list(range(9000))


@CLUSTERS
@HALVES
def test_nan_and_infinity_stay_in_their_row(clusters, dtype):
    scores, lengths = make(4, 2, 2, 9001, dtype), ints(9001, 9001, 8999, 9001)
    counts = ints(300, 300, 300, 300)[:, None].expand(4, 2).contiguous()
    clean = check(scores, counts, lengths, clusters=clusters, tolerance=2e-5)
    scores[0, 0, 7], scores[1, 1, 9], scores[2, 3] = torch.nan, torch.inf, torch.nan
    for reduce in ("softmax", "sum", "max"):
        for newest in (False, True):
            options = {"clusters": clusters, "reduce": reduce, "force_newest": newest, "tolerance": 2e-5}
            got = check(scores, counts, lengths, **options)
    got = check(scores, counts, lengths, clusters=clusters, tolerance=2e-5)
    for row, head in ((0, 1), (1, 1), (2, 0), (3, 0), (3, 1)):
        assert torch.equal(got.indices[row, head], clean.indices[row, head])


@CLUSTERS
@HALVES
def test_far_below_the_best_tokens_are_told_apart(clusters, dtype):
    # A sink of 900: the softmax of all others is 0, and so is what their sum would be ranked by.
    scores = make(1, 1, 1, 9000, dtype) * 0.1
    scores[0, 0, 0] = 900
    for count in (1, 2, 3000, 9000):
        check(scores, ints([count]), ints(9000), clusters=clusters, tolerance=1e-4)


@CLUSTERS
@HALVES
def test_a_given_lse(clusters, dtype):
    scores, lengths = make(3, 2, 4, 20000, dtype), ints(20000, 19999, 1)
    past = torch.arange(20000, device=DEVICE) >= lengths[:, None, None]
    lse = (scores.float() * 0.5).masked_fill(past, -torch.inf).logsumexp(-1)
    counts = share(lengths, 2, 0.25)
    own = check(scores, counts, lengths, clusters=clusters, scale=0.5, tolerance=2e-5)
    given = check(scores, counts, lengths, clusters=clusters, scale=0.5, lse=lse, tolerance=2e-5)
    assert float((own.indices != given.indices).float().mean()) < 1e-3
    # It is used: with another the heads weigh otherwise.
    lse[:, ::4] += 3
    other = check(scores, counts, lengths, clusters=clusters, scale=0.5, lse=lse, tolerance=2e-5)
    assert not torch.equal(other.indices, given.indices)


@CLUSTERS
@HALVES
def test_keys_that_do_not_fit_shared_memory(clusters, dtype, monkeypatch):
    monkeypatch.setattr(token_top_k.kernels, "smem_limit", lambda index: token_top_k._STATIC_SMEM + 4096)
    token_top_k._kernel.cache_clear()
    lengths = ints(50001, 40000)
    check(make(2, 2, 4, 50001, dtype), share(lengths, 2, 0.3), lengths, clusters=clusters, tolerance=2e-5)
    monkeypatch.undo()
    token_top_k._kernel.cache_clear()


def test_top_k_takes_it_for_halves_and_for_long_rows():
    for n, dtype in ((100, torch.float16), (8192, torch.float32), (8193, torch.float32)):
        scores, lengths = make(2, 2, 4, n, dtype), ints(16 * n, 16 * n - 5)
        counts = share((lengths + 15) // 16, 2, 0.3)
        options = {"granularity": 16, "capacity": n, "force_newest": True}
        got = ops.top_k(scores, counts, lengths, backend="cuda", **options)
        want = ops.top_k(scores, counts, lengths, backend="torch", **options)
        assert torch.equal(got.lengths, want.lengths)
        same = got.indices.masked_fill(~got.counted(), 0) == want.indices.masked_fill(~want.counted(), 0)
        assert float(same.float().mean()) > 0.99


@CLUSTERS
@HALVES
def test_twenty_runs_are_bitwise_equal(clusters, dtype):
    scores, lengths = make(2, 8, 4, 32768, dtype, kind="ties"), ints(32768, 30001)
    counts = share(lengths, 8, 0.25)
    first, _ = select(scores, counts, lengths, clusters=clusters)
    for _ in range(20):
        again, _ = select(scores, counts, lengths, clusters=clusters)
        assert torch.equal(first.indices, again.indices) and torch.equal(first.lengths, again.lengths)


@CLUSTERS
def test_a_capture_is_replayed_while_rows_grow(clusters):
    scores, lengths, counts = make(2, 2, 4, 20000, torch.float16), ints(9000, 100), ints([2000, 2000], [10, 100])
    options = {"granularity": 1, "reduce": "softmax", "scale": 1.0, "force_newest": False, "capacity": 5000}

    def step():
        return token_top_k.launch(scores, counts, lengths, None, clusters=clusters, **options)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for length, count in ((9001, 2001), (20000, 5000), (1, 1)):
        lengths.fill_(length)
        counts.fill_(count)
        graph.replay()
        want = ops.top_k(scores, counts, lengths, granularity=1, capacity=5000, backend="torch")
        assert torch.equal(got.lengths, want.lengths)
        mine, theirs = (s.indices.masked_fill(~s.counted(), 0) for s in (got, want))
        assert float((mine == theirs).float().mean()) > 0.999


@HALVES
@CLUSTERS
@pytest.mark.parametrize("reduce", ["softmax", "max"])
def test_ties_go_on_where_a_warp_has_more_than_it_takes_at_a_time(dtype, clusters, reduce):
    # A block for each of 160 rows: 1250 entries a warp, 256 at a time.
    scores = make(20, 8, 2, 20000, dtype, kind="equal")
    scores[..., 7::1000] += 1
    counts = torch.randint(100, 20000, (20, 8), dtype=torch.int32, device=DEVICE)
    got = check(scores, counts, ints(*[20000 - row for row in range(20)]), clusters=clusters, reduce=reduce)
    # The better ones, and the first of all others.
    count = int(got.lengths[3, 5])
    others = [i for i in range(20000) if i % 1000 != 7][: count - 20]
    assert got.indices[3, 5, :count].tolist() == sorted(others + list(range(7, 20000, 1000)))


@CLUSTERS
def test_scores_that_are_hardly_numbers(clusters):
    """Masks of the lowest float, an infinite score, and a count below 0: lists end where the twin's do."""
    scores = make(4, 2, 1, 12001, torch.float32)
    lowest = torch.finfo(torch.float32).min
    scores[0, :, ::2], scores[1], scores[2, 0, 5], scores[3, 1] = lowest, lowest, torch.inf, torch.nan
    counts = ints([9000, 12001], [100, 7000], [40, -5], [-1, 12001])
    got = check(scores, counts, ints(12001, 12001, 12001, 9001), clusters=clusters, capacity=12001)
    assert got.lengths.tolist() == [[9000, 12001], [100, 7000], [1, 0], [0, 9001]]
    # Behind the end of a row of NaN there is nothing, and the newest entry comes after all that are NaN.
    got = check(scores, counts, ints(12001, 12001, 12001, 9001), clusters=clusters, capacity=12001, force_newest=True)
    assert got.indices[3, 1, 9000] == 9000


@CLUSTERS
def test_a_log_sum_exp_of_other_roundings(clusters):
    """Sums of softmaxes are at most the group's size, but for scores of some thousand, whose halves are 8 apart."""
    scores = torch.full((2, 8, 12000), 12200.0, device=DEVICE)
    scores[:, :, 700] = 12284.1
    lse = scores.logsumexp(-1)
    counts = ints([4] * 8, [9000] * 8)
    got = check(scores.half(), counts, ints(12000, 9001), clusters=clusters, lse=lse, capacity=9000)
    assert got.indices[0, 0, :4].tolist() == [0, 1, 2, 700] and got.lengths[0].tolist() == [4] * 8
