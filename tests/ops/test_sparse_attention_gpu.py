"""The attention kernels against their torch twins: every shape, uneven rows, the same bits every time."""

from __future__ import annotations

import pytest
import torch

from twilight import Selection, kernels, ops
from twilight.ops.sparse_attention import launch_attention
from twilight.ops.tail import MeanValues, Tail

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))),
        reason="needs an NVIDIA GPU of compute capability 8.0 or more, and CuPy",
    ),
]

LENGTHS = [1, 54, 0, 97, 2048, 5003]


def make(lengths, *, heads=2, group=4, dim=128, page=16, dtype=torch.bfloat16, seed=0):
    """Random pages in random order. Pages that nobody owns hold NaN: whoever reads one is caught."""
    generator = torch.Generator("cuda").manual_seed(seed)
    b, per_row = len(lengths), max(1, max(-(-n // page) for n in lengths))
    order = torch.randperm(b * per_row, generator=generator, device="cuda") + 1
    table = torch.zeros(b, per_row, dtype=torch.int32, device="cuda")
    used = torch.zeros(b * per_row + 1, dtype=torch.bool, device="cuda")
    for row, n in enumerate(lengths):
        pages = order[row * per_row : row * per_row + -(-n // page)]
        table[row, : len(pages)] = pages.to(torch.int32)
        used[pages] = True
    shape = (b * per_row + 1, heads, page, dim)
    k, v = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2))
    for part in (k, v):
        part[~used] = torch.nan
    q = (2 * torch.randn(b, heads * group, dim, generator=generator, device="cuda")).to(dtype)
    return q, k, v, table, torch.tensor(lengths, dtype=torch.int32, device="cuda")


def uneven(seq_lens, heads, *, granularity=1, seed=0, share=0.3):
    """Select a random, log-normal share of each row, so that neighbours differ by 100x; some rows select nothing."""
    generator = torch.Generator().manual_seed(seed)
    lens = seq_lens.tolist()
    capacity = max(1, -(-max(lens) // granularity))
    indices = torch.zeros(len(lens), heads, capacity, dtype=torch.int32)
    lengths = torch.zeros(len(lens), heads, dtype=torch.int32)
    for b, n in enumerate(lens):
        entries = -(-n // granularity)
        for h in range(heads):
            take = int(min(entries, entries * share * float(torch.randn((), generator=generator).mul(1.5).exp())))
            chosen = torch.randperm(entries, generator=generator)[:take].sort().values
            indices[b, h, :take], lengths[b, h] = chosen.to(torch.int32), take
            indices[b, h, take:] = 2**30  # what lies behind is never read
    return Selection(indices.cuda(), lengths.cuda(), granularity)


def padded(selection):
    """The twin multiplies what lies behind the end by nothing, so there it must be an index that exists."""
    return Selection(
        selection.indices.masked_fill(~selection.counted(), 0),
        selection.lengths,
        selection.granularity,
        selection.log_weight,
    )


def check(out, lse, expected, expected_lse):
    tight = 6e-4 if out.dtype == torch.float16 else 5e-3
    assert lse.isneginf().equal(expected_lse.isneginf())
    assert (out[lse.isneginf()] == 0).all()
    real = ~expected_lse.isneginf()
    torch.testing.assert_close(lse[real], expected_lse[real], atol=1e-3, rtol=1e-4)
    error = (out.float() - expected.float())[real].norm(dim=-1)
    assert bool((error <= tight * expected.float()[real].norm(dim=-1) + 1e-6).all()), (
        error / expected.float()[real].norm(dim=-1)
    ).max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page", [16, 32])
def test_token_and_page_lists(dim, group, page, dtype):
    q, *cache = make(LENGTHS, group=group, dim=dim, page=page, dtype=dtype)
    for granularity in (1, page):
        selection = uneven(cache[-1], 2, granularity=granularity)
        out, lse = ops.sparse_attention(q, *cache, selection, backend="cuda")
        check(out, lse, *ops.sparse_attention(q, *cache, padded(selection), backend="torch"))


@pytest.mark.parametrize(
    "lengths", [[1], [15], [16], [17], [54], [97], [2048], [16385], [3] * 131, [0, 0, 0], [0, 70000, 1]]
)
def test_odd_lengths_in_full_through_both_kernels(lengths):
    q, *cache = make(lengths)
    dense, dense_lse = ops.dense_attention(q.unsqueeze(1), *cache, max_seq_len=max(lengths), backend="cuda")
    for granularity in (1, 16):
        everything = Selection.everything(cache[-1], 2, max_seq_len=max(1, *lengths), granularity=granularity)
        expected = ops.sparse_attention(q, *cache, everything, backend="torch")
        check(*ops.sparse_attention(q, *cache, everything, backend="cuda"), *expected)
        check(dense.squeeze(1), dense_lse.squeeze(1), *expected)


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_row_that_every_block_has_a_part_of(dim, group):
    # 256 parts and more of a row: joined in several batches, and heads in several passes.
    q, *cache = make([120000], heads=1, group=group, dim=dim)
    everything = Selection.everything(cache[-1], 1, max_seq_len=120000, granularity=16)
    expected = ops.sparse_attention(q, *cache, everything, backend="torch")
    check(*ops.sparse_attention(q, *cache, everything, backend="cuda"), *expected)
    dense, lse = ops.dense_attention(q.unsqueeze(1), *cache, max_seq_len=120000, backend="cuda")
    check(dense.squeeze(1), lse.squeeze(1), *expected)


@pytest.mark.parametrize("lengths", [[8192], [8192] * 3, [5000, 8192], [16 * 257] * 2])
@pytest.mark.parametrize("heads", [1, 3, 5, 8])
def test_ranges_that_end_with_a_row_and_ranges_that_do_not(lengths, heads):
    q, *cache = make(lengths, heads=heads)
    everything = Selection.everything(cache[-1], heads, max_seq_len=max(lengths), granularity=16)
    expected = ops.sparse_attention(q, *cache, everything, backend="torch")
    for config in ((4, 3, 2), (4, 2, 3), (4, 2, 1)):
        scale = q.shape[-1] ** -0.5
        check(*launch_attention(q, *cache, everything, scale, config=config), *expected)


def test_log_weight_is_added_and_minus_infinity_hides_a_token_from_one_head():
    q, *cache = make(LENGTHS)
    for granularity in (1, 16):
        selection = padded(uneven(cache[-1], 2, granularity=granularity, share=0.5))
        weight = torch.randn(len(LENGTHS), 8, selection.capacity, device="cuda")
        weight[:, 1, ::3] = -torch.inf
        weight[1, 2] = -torch.inf
        weighted = Selection(selection.indices, selection.lengths, granularity, weight)
        check(
            *ops.sparse_attention(q, *cache, weighted, backend="cuda"),
            *ops.sparse_attention(q, *cache, weighted, backend="torch"),
        )


def tail_of(cache, group, *, packed, seed=3, share=0.4):
    """A tail over a random part of each row's pages, and logits of which some are -inf."""
    k, v, table, lens = cache
    page, heads = k.shape[2], k.shape[1]
    pages = uneven(lens, heads, granularity=page, seed=seed, share=share)
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = 3 * torch.randn(len(lens), heads * group, pages.capacity, generator=generator, device="cuda")
    logits[:, ::2, ::3] = -torch.inf
    means = v.float().mean(2)
    values = ops.quantize(means, 8) if packed else (means.to(v.dtype),)
    return Tail(Selection(pages.indices, pages.lengths, page, logits), MeanValues(values, page, table.shape[1]))


def padded_tail(tail):
    return Tail(padded(tail.pages), tail.means)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page", [8, 16, 32])
def test_a_tail_counts_as_tokens_do(page, dim, group, dtype, packed):
    q, *cache = make(LENGTHS, group=group, dim=dim, page=page, dtype=dtype)
    tail = tail_of(cache, group, packed=packed)
    for granularity in (1, page):
        selection = uneven(cache[-1], 2, granularity=granularity)
        out, lse = ops.sparse_attention(q, *cache, selection, tail=tail, backend="cuda")
        check(out, lse, *ops.sparse_attention(q, *cache, padded(selection), tail=padded_tail(tail), backend="torch"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_tail_beside_rows_that_select_nothing_and_rows_without_a_tail(packed):
    q, *cache = make([300, 40000, 17, 5000], heads=4)
    tail = tail_of(cache, 4, packed=packed)
    selection = uneven(cache[-1], 4)
    for row, head, which in ((0, 1, selection), (1, 2, selection), (1, 3, tail.pages), (3, 0, tail.pages)):
        which.lengths[row, head] = 0
    selection.lengths[2], tail.pages.lengths[2] = 0, 0  # neither
    out, lse = ops.sparse_attention(q, *cache, selection, tail=tail, backend="cuda")
    check(out, lse, *ops.sparse_attention(q, *cache, padded(selection), tail=padded_tail(tail), backend="torch"))
    assert lse[2].isneginf().all()


def test_twenty_runs_with_a_tail_give_the_same_bits():
    q, *cache = make([40000, 3, 0, 900], heads=4)
    for packed in (False, True):
        selection, tail = uneven(cache[-1], 4), tail_of(cache, 4, packed=packed)
        first = ops.sparse_attention(q, *cache, selection, tail=tail, backend="cuda")
        for _ in range(20):
            again = ops.sparse_attention(q, *cache, selection, tail=tail, backend="cuda")
            assert again[0].equal(first[0]) and again[1].equal(first[1])


def test_a_graph_follows_a_tail_that_changes():
    q, *cache = make([4000, 700])
    selection = uneven(cache[-1], 2)
    tails = [tail_of(cache, 4, packed=True, seed=seed, share=share) for seed, share in ((1, 0.05), (2, 0.9))]
    pages = Selection(*(part.clone() for part in (tails[0].pages.indices, tails[0].pages.lengths)), 16,
                      tails[0].pages.log_weight.clone())  # fmt: skip
    live = Tail(pages, tails[0].means)
    ops.sparse_attention(q, *cache, selection, tail=live, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.sparse_attention(q, *cache, selection, tail=live, backend="cuda")
    for tail in reversed(tails):
        pages.indices.copy_(tail.pages.indices)
        pages.lengths.copy_(tail.pages.lengths)
        pages.log_weight.copy_(tail.pages.log_weight)
        graph.replay()
        expected = ops.sparse_attention(q, *cache, selection, tail=tail, backend="cuda")
        assert out.equal(expected[0]) and lse.equal(expected[1])


def test_large_logits_do_not_overflow():
    q, *cache = make(LENGTHS, dtype=torch.float16)
    selection = padded(uneven(cache[-1], 2, share=0.5))
    result = ops.sparse_attention(q * 30, *cache, selection, backend="cuda", sm_scale=1.0)
    check(*result, *ops.sparse_attention(q * 30, *cache, selection, backend="torch", sm_scale=1.0))


def test_nan_stays_in_its_row():
    q, *cache = make(LENGTHS)
    selection = padded(uneven(cache[-1], 2, share=0.9))
    out, lse = ops.sparse_attention(q, *cache, selection, backend="cuda")
    q[5, 3] = torch.nan
    cache[1][cache[2][4, 0], 1, :, 7] = torch.nan
    sick, sick_lse = ops.sparse_attention(q, *cache, selection, backend="cuda")
    assert sick[5, 3].isnan().all() and sick_lse[5, 3].isnan()
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[5, 3], touched[4, 4:, 7] = True, True
    assert sick[~touched].equal(out[~touched])


def test_twenty_runs_give_the_same_bits():
    q, *cache = make([40000, 3, 0, 900], heads=4)
    selection = uneven(cache[-1], 4)
    first = ops.sparse_attention(q, *cache, selection, backend="cuda")
    for _ in range(20):
        again = ops.sparse_attention(q, *cache, selection, backend="cuda")
        assert again[0].equal(first[0]) and again[1].equal(first[1])


def test_a_graph_follows_lengths_that_change():
    q, *cache = make([4000, 700])
    small, large = (uneven(cache[-1], 2, seed=seed, share=share) for seed, share in ((1, 0.05), (2, 0.9)))
    selection = Selection(small.indices.clone(), small.lengths.clone())
    ops.sparse_attention(q, *cache, selection, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.sparse_attention(q, *cache, selection, backend="cuda")
    for source in (large, small):
        selection.indices.copy_(source.indices)
        selection.lengths.copy_(source.lengths)
        graph.replay()
        expected = ops.sparse_attention(q, *cache, source, backend="cuda")
        assert out.equal(expected[0]) and lse.equal(expected[1])


def test_what_the_kernel_cannot_take_is_refused_by_name():
    q, *cache = make([40])
    everything = Selection.everything(cache[-1], 2, max_seq_len=40, granularity=16)
    with pytest.raises(ValueError, match="float32"):
        ops.sparse_attention(q.float(), *cache, everything, backend="cuda")
    with pytest.raises(ValueError, match="not contiguous"):
        k = cache[0].transpose(2, 3).contiguous().transpose(2, 3)
        ops.sparse_attention(q, k, *cache[1:], everything, backend="cuda")
    tail = tail_of(cache, 4, packed=False)
    weighted = Selection(everything.indices, everything.lengths, 16, torch.zeros(1, 8, 3, device="cuda"))
    with pytest.raises(ValueError, match="either that or a tail"):
        ops.sparse_attention(q, *cache, weighted, tail=tail, backend="cuda")
    with pytest.raises(ValueError, match="means are torch.float16"):
        means = MeanValues((tail.means.values[0].half(),), 16, 3)
        ops.sparse_attention(q, *cache, everything, tail=Tail(tail.pages, means), backend="cuda")
    with pytest.raises(ValueError, match="backend"):
        ops.sparse_attention(q, *cache, everything, backend="gpu")
