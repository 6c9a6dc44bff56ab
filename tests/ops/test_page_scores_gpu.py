"""Page scores on the GPU: against the torch twin on the same bounds, and as bounds of exact products."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_spgemv_gpu import Paged, pytestmark  # noqa: F401
from twilight import ops


def bounds_of(paged, packed):
    page_max, page_min = paged.k_pages.amax(2), paged.k_pages.amin(2)
    return ops.quantize_bounds(page_max, page_min) if packed else (page_max, page_min)


def both(paged, bounds):
    inputs = (paged.q, bounds, paged.table, paged.seq_lens)
    return tuple(ops.page_scores(*inputs, page_size=paged.page, backend=backend) for backend in ("cuda", "torch"))


def assert_close(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype == torch.float32
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    assert torch.equal(got.isnan(), want.isnan())
    real = want.isfinite()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("heads,group", [(8, 4), (1, 1), (2, 2), (4, 8), (6, 3), (3, 16), (16, 7)])
def test_equals_the_twin(packed, dtype, dim, heads, group):
    paged = Paged([1, 54, 0, 97, 530], heads=heads, group=group, dim=dim, dtype=dtype)
    assert_close(*both(paged, bounds_of(paged, packed)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch,length,page", [(1, 16385, 16), (17, 2048, 16), (2, 131072, 32), (70, 4000, 16)])
def test_many_pages(packed, batch, length, page):
    paged = Paged([length - 37 * row for row in range(batch)], heads=8, page=page)
    assert_close(*both(paged, bounds_of(paged, packed)))


@pytest.mark.parametrize("packed", [True, False])
def test_bounds_every_key(packed):
    paged = Paged([2048, 1003], heads=8)
    got, _ = both(paged, bounds_of(paged, packed))
    exact = ops.exact_logits(paged.q, paged.k_pages, paged.table, paged.seq_lens, max_seq_len=2048, sm_scale=1.0)
    best = exact.unflatten(-1, (-1, 16)).amax(-1)
    assert bool((got >= best - 1e-2).all())
    assert torch.equal(got == -torch.inf, best == -torch.inf)


def test_nan_stays_with_its_head_and_its_page():
    for packed in (True, False):
        paged = Paged([64, 64])
        paged.k_pages[int(paged.table[1, 1]), 1, 3, 7] = torch.nan
        paged.q[0, 1, 5] = torch.nan
        got, want = both(paged, bounds_of(paged, packed))
        assert got[0, 1].isnan().all() and got[1, 4:, 1].isnan().all()
        assert got.isnan().sum() == 4 + 4
        assert_close(got, want)


def test_twenty_runs_are_bitwise_equal():
    paged = Paged([9000, 4097, 1], heads=8)
    bounds = bounds_of(paged, True)
    first, _ = both(paged, bounds)
    for _ in range(20):
        assert torch.equal(first, both(paged, bounds)[0])
