"""The top-p kernel, by property: enough mass, nothing of the reference's set missing, few tokens too many, in order."""

from __future__ import annotations

import pytest
import torch

from twilight import Selection, kernels, ops
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


def check(logits, candidates, p, pruned):
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
    assert bool((mass[healthy] >= p - 1e-6).all())
    # The head's own mass and count: as far as the union cannot tell, what is reported.
    own, own_count = pruned.mass.unflatten(1, (heads, -1)), pruned.per_query_head.unflatten(1, (heads, -1))
    assert bool((own[healthy] >= min(p, 1 - 1e-6) - 1e-6).all() and (own <= 1).all())
    assert bool((own_count <= counts.unsqueeze(-1)).all() and (own_count.amax(2) <= counts).all())
    reference = top_p_mask(logits, p).unflatten(1, (heads, -1))
    # Whatever the reference keeps and the kernel does not lies at the reference's threshold, up to rounding.
    missing = reference & ~union.unsqueeze(2)
    threshold = weights.masked_fill(~reference, torch.inf).amin(-1, keepdim=True)
    assert bool((weights <= threshold * (1 + 1e-5))[missing].all())
    wanted = reference.sum(-1)
    assert bool((own_count >= wanted - missing.sum(-1)).all())
    return own_count.sum().item() / max(1, wanted.sum().item())


CASES = ["gaussian", "flat", "equal", "ties", "peak", "deep"]


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n", [1, 54, 97, 2048, 16385])
def test_properties(n, dtype, kind, p):
    candidates = make([n, n // 2, 0, 1], n)
    logits = logits_for(candidates, 4, kind, dtype)
    seq_lens = torch.full((4,), 2**30, dtype=torch.int32, device="cuda")
    over = check(logits, candidates, p, ops.top_p(logits, candidates, seq_lens, p, backend="cuda"))
    if n >= 2048 and kind == "gaussian" and p < 1:
        assert over < 1.06


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
