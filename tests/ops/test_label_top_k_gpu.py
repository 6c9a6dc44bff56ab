"""Label top-k on the GPU: the lists that the torch twin makes of the scores that `label_scores` gives."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_label_scores_gpu import Labels
from tests.ops.test_spgemv_gpu import pytestmark  # noqa: F401
from tests.ops.test_token_top_k_gpu import compare, ints
from twilight import ops

CLUSTERS = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs thread block clusters"
)


def select(labels, counts, *, capacity=None, backend="cuda", **options):
    inputs = (labels.q, labels.label, labels.channels, labels.table, labels.seq_lens, counts)
    capacity = capacity or max(1, int(counts.max()))
    return ops.label_top_k(*inputs, capacity=capacity, backend=backend, **options)


def share(labels, part):
    counts = (labels.seq_lens.double() * part).ceil().int()
    return counts[:, None].expand(-1, len(labels.channels)).contiguous()


def check(labels, counts, *, sm_scale=None, tolerance=2e-5, **options):
    """Compare with the twin's list of the very scores that the kernel keeps; its log-sum-exp may differ by rounding."""
    got = select(labels, counts, sm_scale=sm_scale, **options)
    scores, lse = labels.scores(out_dtype=torch.float16, with_lse=True, sm_scale=sm_scale)
    reduce = options.get("reduce", "softmax")
    options = options | {"granularity": 1, "reduce": reduce, "lse": lse if reduce == "softmax" else None}
    options["capacity"] = options.get("capacity") or max(1, int(counts.max()))
    want = ops.top_k(scores, counts, labels.seq_lens, backend="torch", **options)
    tolerance = tolerance if reduce == "softmax" else 0.0
    return compare(got, want, scores, counts, labels.seq_lens, tolerance=tolerance, **options)


@CLUSTERS
@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("r", [16, 32])
@pytest.mark.parametrize(
    "group,dtype", [(1, torch.bfloat16), (3, torch.float16), (4, torch.bfloat16), (8, torch.float16)]
)
def test_lists_what_the_twin_lists(reduce, bits, r, group, dtype):
    labels = Labels([1, 54, 0, 97, 530, 5003], bits, r=r, group=group, dtype=dtype)
    check(labels, share(labels, 0.25), reduce=reduce)
    check(labels, share(labels, 0.25), reduce=reduce, force_newest=True)


@CLUSTERS
@pytest.mark.parametrize("page,dim", [(2, 64), (16, 256), (32, 128), (128, 64)])
@pytest.mark.parametrize(
    "lengths", [[131071], [70000, 3], [9000, 17, 4097], [3000] * 40, [1000 + i for i in range(44)]]
)
def test_rows_in_every_size_of_cluster(lengths, page, dim):
    labels = Labels(lengths, 4, heads=3, page=page, dim=dim)
    for part in (0.02, 0.25):
        check(labels, share(labels, part))


@CLUSTERS
def test_counts_and_capacity_at_their_edges():
    labels = Labels([5000, 40, 0], 4)
    got = check(labels, ints([0, 5000], [41, 1], [3, 0]))
    assert got.lengths.tolist() == [[0, 5000], [40, 1], [0, 0]]
    got = check(labels, ints([300, 5000], [41, 1], [3, 0]), capacity=30)
    assert got.lengths.tolist() == [[30, 30], [30, 1], [0, 0]]
    # Behind a row's end there are zeros, which are positions.
    assert not got.indices[2].any() and not got.indices[1, 1, 1:].any()


@CLUSTERS
@pytest.mark.parametrize("group", [1, 4])
def test_ranks_where_sums_of_softmaxes_are_zero(group):
    """Some heads reach 85 nats: the slice is scored again, and keys are made from logarithms."""
    labels = Labels([9000, 300, 70000], 4, group=group)
    for part in (0.1, 0.9):
        check(labels, share(labels, part), sm_scale=20.0, tolerance=1e-4)


@CLUSTERS
@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
def test_equal_scores_go_to_the_lower_token(reduce):
    labels = Labels([9000, 300], 4)
    labels.label[0].fill_(0x55), labels.label[1].fill_(0.5)
    got = check(labels, ints([70, 8000], [299, 1]), reduce=reduce)
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        n = int(got.lengths[row, head])
        assert got.indices[row, head, :n].tolist() == list(range(n))


@CLUSTERS
def test_ties_go_on_where_a_warp_has_more_than_it_takes_at_a_time():
    # Blocks of 9000 tokens: 563 a warp, 256 at a time.
    labels = Labels([9000] * 40, 4)
    labels.label[0].fill_(0x55), labels.label[1].fill_(0.5)
    got = check(labels, ints(*[[8000, 4000 + row] for row in range(40)]))
    assert got.indices[39, 1, :4039].tolist() == list(range(4039))


@CLUSTERS
@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
def test_nan_and_infinite_labels(reduce):
    labels = Labels([9000, 300], 4)
    page, slot = int(labels.table[0, 100]), 5
    labels.label[1][page, :, slot] = torch.nan
    labels.label[1][int(labels.table[1, 3]), :, 2, 0] = torch.inf
    got = check(labels, share(labels, 0.1), reduce=reduce)
    # By softmax a NaN is one of all tokens, none of which is better than another.
    assert all((1605 in got.indices[0, head].tolist()) == (reduce != "softmax") for head in range(2))


@CLUSTERS
def test_a_query_that_is_nan_or_zero():
    labels = Labels([9000, 300, 64], 4)
    labels.q[0, 1], labels.q[1] = torch.nan, 0
    got = select(labels, share(labels, 0.1))
    # Of a NaN no token is better than another, and neither is of nothing: the first ones.
    assert got.indices[0, 0].tolist() == list(range(900)) and got.indices[1, 0, :30].tolist() == list(range(30))
    check(Labels([64], 4), ints([7, 64]))


@CLUSTERS
def test_reruns_are_the_same_to_the_bit_and_replays_follow():
    labels = Labels([30000, 17, 4097], 4)
    counts = share(labels, 0.25)
    want = select(labels, counts)
    for _ in range(20):
        got = select(labels, counts)
        assert got.indices.equal(want.indices) and got.lengths.equal(want.lengths)
    capacity = int(counts.max())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = select(labels, counts, capacity=capacity)
    for part in (0.1, 0.2):
        counts.copy_(share(labels, part)), labels.q.normal_()
        graph.replay()
        want = select(labels, counts, capacity=capacity)
        assert got.indices.equal(want.indices) and got.lengths.equal(want.lengths)


@pytest.mark.parametrize("bits,r,group", [(4, 8, 4), (None, 16, 4), (2, 64, 4), (4, 16, 12)])
def test_what_the_kernel_does_not_take_goes_by_two(bits, r, group):
    labels = Labels([900, 54], bits, r=r, group=group)
    counts = share(labels, 0.3)
    got = select(labels, counts, backend="auto")
    scores, lse = labels.scores(out_dtype=torch.float16, with_lse=True)
    want = ops.top_k(
        scores, counts, labels.seq_lens, granularity=1, capacity=int(counts.max()), lse=lse, backend="torch"
    )
    compare(got, want, scores, counts, labels.seq_lens, tolerance=2e-5, lse=lse)
    with pytest.raises(ValueError, match="backend: 'cuda' cannot run this"):
        select(labels, counts)
