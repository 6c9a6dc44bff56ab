"""Label scores on the GPU: against the torch twin on the same labels."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_spgemv_gpu import pytestmark  # noqa: F401
from twilight import ops

DEVICE = "cuda"


class Labels:
    """Random labels in shuffled pages; those that nobody owns, page 0 among them, are NaN."""

    def __init__(self, lengths, bits, *, r=16, heads=2, group=4, dim=128, page=16, dtype=torch.bfloat16):
        torch.manual_seed(0)
        self.lengths, self.bits = lengths, bits
        width, total = max(1, -(-max(lengths) // page)), 1 + sum(-(-n // page) for n in lengths)
        table, order, used = torch.zeros(len(lengths), width), torch.randperm(total - 1) + 1, 0
        for row, n in enumerate(lengths):
            need = -(-n // page)
            table[row, :need] = order[used : used + need]
            used += need
        self.table = table.int().to(DEVICE)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.q = torch.randn(len(lengths), heads * group, dim, device=DEVICE).to(dtype)
        self.channels = torch.stack([torch.randperm(dim)[:r] for _ in range(heads)]).int().to(DEVICE)
        shape = (total, heads, page)
        if bits is None:
            self.label = (torch.randn(*shape, r, device=DEVICE).to(dtype),)
        else:
            codes = torch.randint(0, 256, (*shape, r * bits // 8), dtype=torch.uint8, device=DEVICE)
            params = torch.randn(*shape, 2, device=DEVICE) * torch.tensor([1 / 2**bits, 1.0], device=DEVICE)
            self.label = (codes, params.half())
        self.label[-1][0] = torch.nan

    def scores(self, backend="cuda", **options):
        inputs = (self.q, self.label, self.channels, self.table, self.seq_lens)
        return ops.label_scores(*inputs, backend=backend, **options)


def check(labels, **options):
    """Compare kernel and twin, scores and log-sum-exp; return what the kernel made."""
    for out_dtype in (torch.float32, torch.float16):
        options = options | {"out_dtype": out_dtype}
        got, lse = labels.scores(with_lse=True, **options)
        want, want_lse = labels.scores("torch", with_lse=True, **options | {"out_dtype": torch.float32})
        alone, none = labels.scores(**options)
        assert none is None and torch.equal(alone.view(torch.uint8), got.view(torch.uint8))
        assert got.dtype == out_dtype and torch.equal(got == -torch.inf, want == -torch.inf)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(lse.isnan(), want_lse.isnan())
        assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
        real = want.isfinite()
        # Of a query that meets codes 16 bits survive; a half has 11. Rows here are a few units wide.
        rtol = 2e-4 if out_dtype == torch.float32 else 2e-3
        torch.testing.assert_close(got.float()[real], want[real], rtol=rtol, atol=2e-3)
        real = want_lse.isfinite()
        torch.testing.assert_close(lse[real], want_lse[real], rtol=1e-4, atol=2e-3)
    return got, lse


@pytest.mark.parametrize("bits", [2, 4, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [8, 16, 32, 64])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 12, 16])
def test_equals_the_twin(bits, dtype, r, group):
    check(Labels([1, 54, 0, 97, 530], bits, r=r, group=group, dtype=dtype))


@pytest.mark.parametrize("bits", [2, 4, None])
@pytest.mark.parametrize("page", [2, 4, 8, 32, 64, 128])
@pytest.mark.parametrize("heads,dim", [(1, 64), (3, 256), (4, 128), (8, 128), (16, 64)])
def test_pages_and_heads(bits, page, heads, dim):
    check(Labels([7, 1, 300, 2 * page], bits, heads=heads, page=page, dim=dim))


@pytest.mark.parametrize(
    "bits,r", [(4, 2), (4, 6), (2, 4), (2, 12), (4, 34), (4, 128), (2, 128), (None, 5), (None, 128)]
)
@pytest.mark.parametrize("page,group", [(16, 4), (6, 3), (1, 1), (16, 20)])
def test_any_size_is_right(bits, r, page, group):
    check(Labels([7, 0, 200], bits, r=r, page=page, group=group, heads=3))


@pytest.mark.parametrize("bits", [2, 4, None])
@pytest.mark.parametrize(
    "lengths",
    [
        [16385], [131072], [40000, 13, 0, 7999], [2048 - 37 * row for row in range(40)], [300] * 200 + [9000],
        [0] * 40 + [5],
    ],
    ids=["16385", "131072", "uneven", "falling", "one long", "one"],
)  # fmt: skip
def test_many_tokens(bits, lengths):
    check(Labels(lengths, bits, heads=8))


def test_nothing_at_all():
    scores, lse = Labels([0, 0], 4).scores(with_lse=True, out_dtype=torch.float16)
    assert bool((scores == -torch.inf).all()) and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("bits", [2, 4, None])
def test_what_is_wrong_stays_where_it_is(bits):
    labels = Labels([70, 64, 33], bits, r=8 if bits is None else 16)
    clean, clean_lse = check(labels)
    labels.q[0, 1, int(labels.channels[0, 5])] = torch.nan
    place = int(labels.table[1, 1]), 1, 3
    labels.label[-1][place] = torch.nan
    got, lse = check(labels)
    touched = torch.zeros_like(clean, dtype=torch.bool)
    touched[0, 1, :70] = touched[1, 4:, 19] = True
    assert torch.equal(got.isnan(), touched)
    assert torch.equal(got[~touched], clean[~touched])
    heads = touched.any(-1)
    assert torch.equal(lse.isnan(), heads) and torch.equal(lse[~heads], clean_lse[~heads])


@pytest.mark.parametrize("bits", [4, None])
def test_an_infinite_query_and_scale_stay_in_their_rows(bits):
    labels = Labels([70, 64], bits)
    clean, _ = labels.scores()
    labels.q[0, 1, int(labels.channels[0, 5])] = torch.inf
    labels.label[-1][int(labels.table[1, 0]), 0, 2] = torch.inf
    got, _ = labels.scores()
    touched = torch.zeros_like(clean, dtype=torch.bool)
    touched[0, 1, :70] = touched[1, :4, 2] = True
    assert not got[touched].isfinite().any() and torch.equal(got[~touched], clean[~touched])


def test_halves_are_clamped():
    labels = Labels([100], 4)
    got, want = (labels.scores(way, sm_scale=2e4, out_dtype=torch.float16)[0][..., :100] for way in ("cuda", "torch"))
    assert got.abs().max() == want.abs().max() == 65504
    torch.testing.assert_close(got, want, rtol=2e-3, atol=40.0)  # 2e-3 of the factor


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_sums_of_wide_rows(scale):
    # Maxima that come late, and rows whose range is far beyond that of exp.
    labels = Labels([5000, 700, 3], 4, heads=8)
    _, lse = labels.scores(sm_scale=scale, out_dtype=torch.float16, with_lse=True)
    _, want = labels.scores("torch", sm_scale=scale, with_lse=True)
    torch.testing.assert_close(lse, want, rtol=2e-4, atol=2e-3 * scale)


@pytest.mark.parametrize("bits", [2, 4, None])
def test_twenty_runs_are_bitwise_equal(bits):
    labels = Labels([9000, 4097, 1, 0], bits, heads=8)
    first = labels.scores(out_dtype=torch.float16, with_lse=True)
    for _ in range(20):
        again = labels.scores(out_dtype=torch.float16, with_lse=True)
        assert all(
            torch.equal(one.view(torch.uint8), two.view(torch.uint8)) for one, two in zip(first, again, strict=True)
        )


def test_says_what_it_cannot_do():
    labels = Labels([32], None)
    labels.q = labels.q.half()
    with pytest.raises(ValueError, match="labels are torch.bfloat16 and q is torch.float16"):
        labels.scores()
    labels.q = labels.q.float()
    with pytest.raises(ValueError, match="float16 and bfloat16"):
        labels.scores()
