"""SpGEMV on the GPU: against its torch twin on the same bytes, tightly, and against exact logits, loosely."""

from __future__ import annotations

import pytest
import torch

from twilight import Selection, kernels, ops
from twilight.ops.quantize import shadow_bytes, split_shadow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))),
        reason="needs an NVIDIA GPU of compute capability 8.0 or more, and CuPy",
    ),
]


class Paged:
    """Random keys in shuffled pages, with their shadow."""

    def __init__(self, lengths, *, heads=2, group=4, dim=128, page=16, dtype=torch.bfloat16, seed=0):
        torch.manual_seed(seed)
        self.lengths, self.page = lengths, page
        self.heads, self.group = heads, group
        width = max(1, -(-max(lengths) // page))
        total = 1 + sum(-(-n // page) for n in lengths)
        self.table = torch.zeros(len(lengths), width, dtype=torch.int32, device="cuda")
        order, used = torch.randperm(total - 1, device="cuda").int() + 1, 0
        for row, n in enumerate(lengths):
            need = -(-n // page)
            self.table[row, :need] = order[used : used + need]
            used += need
        self.k_pages = torch.randn(total, heads, page, dim, device="cuda").to(dtype) + torch.randn(
            dim, device="cuda"
        ).to(dtype)
        self.shadow = torch.zeros(total, heads, shadow_bytes(page, dim), dtype=torch.uint8, device="cuda")
        codes, params = split_shadow(self.shadow, page)
        codes[:], params[:] = ops.quantize(self.k_pages)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.q = torch.randn(len(lengths), heads * group, dim, device="cuda").to(dtype)

    def candidates(self, granularity, *, share=0.5, log_weight=False, pad=3):
        b = len(self.lengths)
        entries = max(1, -(-max(self.lengths) // granularity))
        ends = (self.seq_lens + granularity - 1) // granularity
        keep = torch.rand(b, self.heads, entries, device="cuda") < share
        keep &= torch.arange(entries, device="cuda") < ends[:, None, None]
        everything = torch.arange(entries, device="cuda").expand_as(keep)
        weight = torch.randn(b, self.heads * self.group, entries, device="cuda") if log_weight else None
        found = Selection.compact(everything, keep, granularity=granularity, log_weight=weight)
        # Padding that nothing may read: rubbish in the indices behind the end.
        indices = torch.nn.functional.pad(found.indices, (0, pad))
        indices = torch.where(torch.arange(entries + pad, device="cuda") < found.lengths[..., None], indices, 2**30)
        weight = None if weight is None else torch.nn.functional.pad(found.log_weight, (0, pad), value=torch.nan)
        return Selection(indices.int(), found.lengths, granularity, weight)


def both(paged, candidates, out_dtype=torch.float32):
    inputs = (paged.q, paged.shadow, paged.table, paged.seq_lens, candidates)
    got = ops.estimate_scores(*inputs, page_size=paged.page, out_dtype=out_dtype, backend="cuda")
    # The twin multiplies padding by a mask, so it must not gather from there.
    clean = Selection(
        candidates.indices.masked_fill(~candidates.counted(), 0), candidates.lengths, candidates.granularity,
        candidates.log_weight,
    )  # fmt: skip
    want = ops.estimate_scores(*inputs[:-1], clean, page_size=paged.page, backend="torch")
    return got, want


def assert_close(got, want):
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    assert torch.equal(got.isnan(), want.isnan())
    real = want.isfinite()
    # 16 bits of the query survive; a half has 11.
    rtol = 2e-3 if got.dtype == torch.float16 else 2e-4
    torch.testing.assert_close(got.float()[real], want[real], rtol=rtol, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("page,granularity", [(16, 16), (32, 32), (16, 1), (64, 64), (4, 4)])
def test_equals_the_twin(dtype, dim, group, page, granularity):
    paged = Paged([1, 54, 0, 97, 530], group=group, dim=dim, page=page, dtype=dtype)
    candidates = paged.candidates(granularity, log_weight=group == 3)
    for out_dtype in (torch.float32, torch.float16):
        assert_close(*both(paged, candidates, out_dtype))


@pytest.mark.parametrize("granularity", [1, 16])
@pytest.mark.parametrize("batch,length", [(1, 16385), (17, 2048), (3, 40000)])
def test_many_tokens(batch, length, granularity):
    paged = Paged([length - 37 * row for row in range(batch)], heads=8)
    got, want = both(paged, paged.candidates(granularity, share=0.25))
    assert_close(got, want)


def test_estimates_the_exact_logits():
    paged = Paged([2048, 1000], heads=8)
    everything = Selection.everything(paged.seq_lens, 8, max_seq_len=2048, granularity=16)
    got, _ = both(paged, everything)
    exact = ops.exact_logits(paged.q, paged.k_pages, paged.table, paged.seq_lens, max_seq_len=2048)
    real = exact != -torch.inf
    assert torch.equal(got != -torch.inf, real)
    # Half a step of 15 in about 6 sigma, over 128 channels: about 0.12 rms.
    assert (got - exact)[real].square().mean().sqrt() < 0.2


def test_nan_stays_with_its_head_and_its_key():
    paged = Paged([64, 64])
    candidates = paged.candidates(16, share=1.1)
    _, clean = both(paged, candidates)
    paged.q[0, 1, 5] = torch.nan
    _, params = split_shadow(paged.shadow, 16)
    params[int(paged.table[1, 1]), 1, 3] = torch.nan
    got, want = both(paged, candidates)
    assert got[0, 1].isnan().sum() == 64 and not got[0, [0, 2, 3]].isnan().any()
    assert got[1, 4:, 19].isnan().all() and got[1].isnan().sum() == 4
    assert torch.equal(got.isnan(), want.isnan())
    fine = ~got.isnan() & (clean != -torch.inf)
    torch.testing.assert_close(got[fine], clean[fine], rtol=2e-4, atol=2e-3)


def test_half_output_is_clamped():
    paged = Paged([32])
    paged.q *= 3e4
    got, want = both(paged, paged.candidates(16, share=1.1), torch.float16)
    assert want.abs()[want.isfinite()].max() > 65504
    assert got[want.isfinite()].abs().max() == 65504


def test_twenty_runs_are_bitwise_equal():
    paged = Paged([9000, 4097, 1], heads=8)
    candidates = paged.candidates(16)
    first, _ = both(paged, candidates, torch.float16)
    for _ in range(20):
        again, _ = both(paged, candidates, torch.float16)
        assert torch.equal(first.view(torch.int16), again.view(torch.int16))


def test_says_what_it_cannot_do():
    paged = Paged([32], dim=128)
    paged.q = paged.q.float()
    with pytest.raises(ValueError, match="float16 and bfloat16"):
        both(paged, paged.candidates(16))
