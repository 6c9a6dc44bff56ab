"""The top-p kernel, by property: enough mass, nothing of the reference's set missing, few tokens too many, in order."""

from __future__ import annotations

import pytest
import torch

from twilight import Selection, kernels, ops
from twilight.ops.tail import MeanValues
from twilight.ops.top_p import top_p_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))),
        reason="needs an NVIDIA GPU of compute capability 8.0 or more, and CuPy",
    ),
]


def make(counts, capacity, *, heads=2, granularity=1, seed=0):
    """Candidates: `counts` entries for each sequence, every third entry of what there is."""
    generator = torch.Generator("cuda").manual_seed(seed)
    b = len(counts)
    steps = torch.randint(1, 4, (b, heads, capacity), generator=generator, device="cuda")
    lengths = torch.tensor(counts, dtype=torch.int32, device="cuda")[:, None].expand(b, heads).contiguous()
    return Selection((steps.cumsum(-1) - 1).to(torch.int32), lengths, granularity)


def logits_for(candidates, group, kind, dtype, *, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    b, heads, capacity = candidates.indices.shape
    n = capacity * candidates.granularity
    noise = torch.randn(b, heads * group, n, generator=generator, device="cuda")
    wide = torch.rand(b, heads * group, 1, generator=generator, device="cuda")
    logits = {
        "gaussian": noise * (0.3 + 4 * wide),
        "flat": noise * 0.02,
        "equal": torch.full_like(noise, 1.25),
        "ties": (noise * 2).round() / 2,
        "peak": noise + 40 * (noise > 3.0),
        "deep": noise * 60 - 200,
    }[kind].to(dtype)
    valid = candidates.counted().repeat_interleave(candidates.granularity, -1).repeat_interleave(group, 1)
    return logits.masked_fill(~valid, -torch.inf)


def check(logits, candidates, p, pruned, **bounds):
    """Check everything that the definition of top-p promises, and return tokens kept per token of the reference."""
    b, heads, _ = candidates.indices.shape
    n = logits.shape[-1]
    seq_lens = torch.full((b,), 2**30, dtype=torch.int32, device="cuda")
    positions, _ = candidates.positions(seq_lens)
    kept, counts = pruned.selection, pruned.selection.lengths
    assert kept.granularity == 1
    lists, counted = kept.indices.long(), kept.counted()
    ascending = (lists[..., 1:] > lists[..., :-1]) | ~counted[..., 1:]
    assert bool(ascending.all())
    # As a mask over candidates: their positions are ascending too, so each kept one is found by bisection.
    order = positions.masked_fill(~candidates.counted().repeat_interleave(candidates.granularity, -1), 2**40)
    at = torch.searchsorted(order, lists.masked_fill(~counted, 0)).clamp(max=n - 1)
    assert bool((order.gather(-1, at) == lists)[counted].all())
    mask = torch.zeros(b, heads, n + 1, dtype=torch.bool, device="cuda")
    mask.scatter_(-1, at.masked_fill(~counted, n), True)
    union = mask[..., :n]
    assert union.sum(-1).equal(counts.long())
    grouped = logits.double().unflatten(1, (heads, -1))
    real = grouped != -torch.inf
    assert not bool((union.unsqueeze(2) & ~real).any())
    weights = torch.softmax(grouped, -1)
    healthy = weights.isfinite().all(-1)
    mass = (weights * union.unsqueeze(2)).sum(-1)
    # The head's own mass and count: as far as the union cannot tell, what is reported.
    own, own_count = pruned.mass.unflatten(1, (heads, -1)), pruned.per_query_head.unflatten(1, (heads, -1))
    if bounds.get("max_tokens") is None:
        assert bool((mass[healthy] >= p - 1e-6).all())
        assert bool((own[healthy] >= min(p, 1 - 1e-6) - 1e-6).all())
    assert bool((own <= 1).all())
    assert bool((own_count <= counts.unsqueeze(-1)).all() and (own_count.amax(2) <= counts).all())
    reference = top_p_mask(logits, p, **bounds).unflatten(1, (heads, -1))
    # Whatever the reference keeps and the kernel does not lies at the reference's threshold, up to rounding.
    missing = reference & ~union.unsqueeze(2)
    threshold = weights.masked_fill(~reference, torch.inf).amin(-1, keepdim=True)
    assert bool((weights <= threshold * (1 + 1e-5))[missing].all())
    wanted = reference.sum(-1)
    assert bool((own_count >= wanted - missing.sum(-1)).all())
    floor = bounds.get("min_tokens", 1)
    assert bool((own_count >= real.sum(-1).clamp(max=floor))[healthy].all())
    if bounds.get("max_tokens") is not None:
        # What a ceiling lets through beyond its number lies within a 16384th of a nat of the token of that rank. Not of
        # the reference's last: the kernel may find p reached a few tokens later, beyond the ceiling, and among ties.
        ranked = top_p_mask(logits, 1.0, **bounds).unflatten(1, (heads, -1))
        cut = grouped.masked_fill(~ranked, torch.inf).amin(-1, keepdim=True)
        near = (real & (grouped >= cut - 1e-4 - 1e-6 * cut.abs())).sum(-1)
        over = own_count > near.clamp(min=bounds["max_tokens"])
        assert not bool(over[healthy].any())
        # The reported mass is that of as many of the heaviest.
        heaviest = weights.sort(-1, descending=True).values.cumsum(-1)
        expected = heaviest.gather(-1, (own_count.long() - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        kept = healthy & (own_count > 0)
        torch.testing.assert_close(own[kept].double(), expected[kept], atol=2e-5, rtol=0)
    return own_count.sum().item() / max(1, wanted.sum().item())


CASES = ["gaussian", "flat", "equal", "ties", "peak", "deep"]


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.99999, 1.0])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n", [1, 54, 97, 2048, 16385])
def test_properties(n, dtype, kind, p):
    candidates = make([n, n // 2, 0, 1], n)
    logits = logits_for(candidates, 4, kind, dtype)
    seq_lens = torch.full((4,), 2**30, dtype=torch.int32, device="cuda")
    over = check(logits, candidates, p, ops.top_p(logits, candidates, seq_lens, p, backend="cuda"))
    if n >= 2048 and kind == "gaussian" and p < 0.9999:  # above, rounding may take what p leaves out
        assert over < 1.06


BOUNDS = [(0.9, 32, 256), (0.5, 300, None), (0.95, 1, 64), (1.0, 1, 50), (0.9999, 700, 700), (0.3, 5000, 9000)]


@pytest.mark.parametrize(("p", "least", "most"), BOUNDS)
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n", [1, 54, 2048, 16385])
def test_bounds(n, dtype, kind, p, least, most):
    candidates = make([n, n // 2, 0, 1], n)
    logits = logits_for(candidates, 4, kind, dtype)
    seq_lens = torch.full((4,), 2**30, dtype=torch.int32, device="cuda")
    bounds = {"min_tokens": least, "max_tokens": most}
    pruned = ops.top_p(logits, candidates, seq_lens, p, **bounds, backend="cuda")
    over = check(logits, candidates, p, pruned, **bounds)
    if kind == "gaussian" and n >= 2048 and (p, most) in ((1.0, 50), (0.9999, 700)):
        assert over < 1.01


def test_bounds_on_every_split_of_a_row():
    for b, heads, n, group in ((1, 8, 30000, 4), (5, 8, 8192, 3), (40, 8, 1000, 16), (1, 1, 200000, 1)):
        for granularity in (1, 16):
            candidates = make([n // granularity] * b, n // granularity, heads=heads, granularity=granularity)
            seq_lens = torch.full((b,), 2**30, dtype=torch.int32, device="cuda")
            for kind in ("gaussian", "deep"):
                logits = logits_for(candidates, group, kind, torch.float16)
                bounds = {"min_tokens": 40, "max_tokens": 128}
                check(
                    logits,
                    candidates,
                    0.9,
                    ops.top_p(logits, candidates, seq_lens, 0.9, **bounds, backend="cuda"),
                    **bounds,
                )


def test_bounds_that_bind_nothing_change_nothing():
    candidates = make([9000, 300], 9000)
    lens = torch.full((2,), 2**30, dtype=torch.int32, device="cuda")
    for kind in CASES:
        logits = logits_for(candidates, 4, kind, torch.float16)
        plain = ops.top_p(logits, candidates, lens, 0.8, backend="cuda")
        loose = ops.top_p(logits, candidates, lens, 0.8, max_tokens=9000, backend="cuda")
        counted = plain.selection.counted()
        assert loose.selection.lengths.equal(plain.selection.lengths)
        assert loose.selection.indices[counted].equal(plain.selection.indices[counted])
        assert loose.per_query_head.equal(plain.per_query_head)


def test_bounds_leave_sick_rows_whole():
    candidates = make([3000, 3000], 3000)
    logits = logits_for(candidates, 2, "gaussian", torch.float32)
    lens = torch.full((2,), 2**30, dtype=torch.int32, device="cuda")
    logits[0, 0, 17], logits[1, 3, 5] = torch.nan, torch.inf
    sick = ops.top_p(logits, candidates, lens, 0.9, max_tokens=100, backend="cuda")
    assert sick.selection.lengths[0, 0] == 3000 and sick.selection.lengths[1, 1] == 3000
    assert sick.selection.lengths[0, 1] <= 200 and sick.mass[0, 0] == 0 and sick.mass[1, 3] == 0


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("granularity", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("kind", ["gaussian", "peak", "equal"])
def test_the_tail_is_what_the_union_leaves(kind, granularity, group):
    page = granularity if granularity > 1 else 16
    for b, n in ((1, 32768), (3, 4096), (30, 2048)):
        candidates = make([n // granularity, 5, 0][:b] + [9] * (b - 3), n // granularity, granularity=granularity)
        logits = logits_for(candidates, group, kind, torch.float16)
        # The last page of each sequence is not full.
        last = candidates.indices.gather(-1, (candidates.lengths.long() - 1).clamp(min=0).unsqueeze(-1)).amax((1, 2))
        lens = (last * granularity + max(1, granularity - 2)).to(torch.int32)
        positions, valid = candidates.positions(lens)
        logits = logits.masked_fill(~valid.repeat_interleave(group, 1), -torch.inf)
        pages = int(lens.max()) // page + 2
        means = MeanValues((torch.randn(8, 2, 64, dtype=torch.float16, device="cuda"),), page, pages)
        for p, bounds in ((0.8, {}), (0.9, {"min_tokens": 8, "max_tokens": 64}), (1.0, {"max_tokens": 20})):
            pruned = ops.top_p(logits, candidates, lens, p, **bounds, means=means, backend="cuda")
            twin = ops.page_tail(logits, candidates, pruned.selection, lens, means, backend="torch")
            mine, expected = pruned.tail.pages, twin.pages
            counted = expected.counted()
            assert mine.lengths.equal(expected.lengths) and mine.indices[counted].equal(expected.indices[counted])
            wide = counted.repeat_interleave(group, 1)
            a, e = mine.log_weight[wide], expected.log_weight[wide]
            # A float exponential of the row's maximum ends at e^-87.
            light = e < (logits.float().amax(-1, keepdim=True) - 80).expand_as(mine.log_weight)[wide]
            torch.testing.assert_close(a[~light], e[~light], atol=2e-4, rtol=1e-5)
            assert bool((a[light] <= e[light] + 1e-2).all())


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1, 8, 30000), (5, 8, 8192), (40, 8, 1000), (1, 1, 200000)])
def test_every_split_of_a_row(shape, group):
    b, heads, n = shape
    for granularity in (1, 16):
        candidates = make([n // granularity] * b, n // granularity, heads=heads, granularity=granularity)
        seq_lens = torch.full((b,), 2**30, dtype=torch.int32, device="cuda")
        logits = logits_for(candidates, group, "gaussian", torch.float16)
        assert check(logits, candidates, 0.9, ops.top_p(logits, candidates, seq_lens, 0.9, backend="cuda")) < 1.05


def test_rows_with_nan_or_infinity_keep_all_of_their_candidates():
    candidates = make([3000, 3000, 2000], 3000)
    logits = logits_for(candidates, 2, "gaussian", torch.float32)
    seq_lens = torch.full((3,), 2**30, dtype=torch.int32, device="cuda")
    well = ops.top_p(logits, candidates, seq_lens, 0.9, backend="cuda")
    logits[0, 0, 17], logits[1, 3, 5] = torch.nan, torch.inf
    sick = ops.top_p(logits, candidates, seq_lens, 0.9, backend="cuda")
    assert sick.selection.lengths[0, 0] == 3000 and sick.selection.lengths[1, 1] == 3000
    assert sick.mass[0, 0] == 0 and sick.mass[1, 3] == 0
    for row, head in ((0, 1), (1, 0), (2, 0), (2, 1)):
        count = int(well.selection.lengths[row, head])
        assert sick.selection.lengths[row, head] == count
        assert sick.selection.indices[row, head, :count].equal(well.selection.indices[row, head, :count])


def test_rows_without_candidates_keep_nothing():
    candidates = make([0, 5], 64)
    logits = logits_for(candidates, 4, "gaussian", torch.float16)
    logits[1] = -torch.inf
    pruned = ops.top_p(logits, candidates, torch.tensor([0, 5], dtype=torch.int32, device="cuda"), 0.9, backend="cuda")
    assert (pruned.selection.lengths == 0).all() and (pruned.per_query_head == 0).all() and (pruned.mass == 0).all()


def test_log_weight_travels_along():
    for granularity in (1, 16):
        candidates = make([500 // granularity, 90 // granularity], 500 // granularity, granularity=granularity)
        weight = torch.randn(2, 8, candidates.capacity, device="cuda")
        candidates = Selection(candidates.indices, candidates.lengths, granularity, weight)
        logits = logits_for(candidates, 4, "equal", torch.float32)
        lens = torch.full((2,), 2**30, dtype=torch.int32, device="cuda")
        mine, twin = (
            ops.top_p(logits, candidates, lens, 0.9, backend=backend).selection for backend in ("cuda", "torch")
        )
        counted = mine.counted()
        assert mine.lengths.equal(twin.lengths)
        assert mine.indices[counted].equal(twin.indices[counted])
        wide = counted.repeat_interleave(4, 1)
        assert mine.log_weight[wide].equal(twin.log_weight[wide])


def test_a_sub_bin_is_enough_where_a_bin_would_keep_five_times_too_many():
    # A flat tail that falls into one bin of 1/16 nat: kept whole, p = 0.5 would keep nearly everything.
    candidates = make([8192], 8192, heads=1)
    tail = torch.linspace(0.0, 0.06, 8192, device="cuda")
    logits = tail[torch.randperm(8192, device="cuda", generator=torch.Generator("cuda").manual_seed(0))].expand(
        1, 4, -1
    )
    logits = logits.contiguous()
    lens = torch.full((1,), 2**30, dtype=torch.int32, device="cuda")
    assert check(logits, candidates, 0.5, ops.top_p(logits, candidates, lens, 0.5, backend="cuda")) < 1.02


def test_twenty_runs_give_the_same_bits():
    for b, n in ((1, 32000), (30, 3000)):
        candidates = make([n] * b, n, heads=8)
        logits = logits_for(candidates, 4, "gaussian", torch.float16)
        lens = torch.full((b,), 2**30, dtype=torch.int32, device="cuda")
        first = ops.top_p(logits, candidates, lens, 0.9, backend="cuda")
        counted = first.selection.counted()
        for _ in range(20):
            again = ops.top_p(logits, candidates, lens, 0.9, backend="cuda")
            assert again.selection.lengths.equal(first.selection.lengths)
            assert again.selection.indices[counted].equal(first.selection.indices[counted])
            assert again.mass.equal(first.mass) and again.per_query_head.equal(first.per_query_head)


def test_twenty_runs_with_bounds_and_tail_give_the_same_bits():
    for b, n in ((1, 32000), (30, 3200)):
        candidates = make([n // 16] * b, n // 16, heads=8, granularity=16)
        logits = logits_for(candidates, 4, "gaussian", torch.float16)
        lens = torch.full((b,), 2**30, dtype=torch.int32, device="cuda")
        means = MeanValues((torch.zeros(1, 8, 64, dtype=torch.float16, device="cuda"),), 16, 3 * n // 16)
        runs = [
            ops.top_p(logits, candidates, lens, 0.9, min_tokens=9, max_tokens=99, means=means, backend="cuda")
            for _ in range(20)
        ]
        counted = runs[0].selection.counted()
        for again in runs[1:]:
            assert again.selection.lengths.equal(runs[0].selection.lengths)
            assert again.selection.indices[counted].equal(runs[0].selection.indices[counted])
            assert again.mass.equal(runs[0].mass)
            assert again.tail.pages.log_weight.equal(runs[0].tail.pages.log_weight)
