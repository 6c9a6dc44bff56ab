"""Page scores on the GPU: against the torch twin on the same vectors, and against exact products."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_spgemv_gpu import Paged, pytestmark  # noqa: F401
from twilight import ops

KINDS = [
    pytest.param(("bounds", 8), id="bounds-8"),
    pytest.param(("bounds", None), id="bounds-native"),
    pytest.param(("means", 8), id="means-8"),
    pytest.param(("means", None), id="means-native"),
]


def vectors_of(paged, kind):
    what, bits = kind
    # Every slot holds a key here, those behind a sequence's end too.
    valid = torch.ones(paged.k_pages.shape[0], paged.page, dtype=torch.bool, device="cuda")
    return (ops.page_bounds if what == "bounds" else ops.page_means)(paged.k_pages, valid, bits)


def both(paged, vectors):
    inputs = (paged.q, vectors, paged.table, paged.seq_lens)
    return tuple(ops.page_scores(*inputs, page_size=paged.page, backend=backend) for backend in ("cuda", "torch"))


def assert_close(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype == torch.float32
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    assert torch.equal(got.isnan(), want.isnan())
    real = want.isfinite()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("heads,group", [(8, 4), (1, 1), (2, 2), (4, 8), (6, 3), (3, 16), (16, 7)])
def test_equals_the_twin(kind, dtype, dim, heads, group):
    paged = Paged([1, 54, 0, 97, 530], heads=heads, group=group, dim=dim, dtype=dtype)
    assert_close(*both(paged, vectors_of(paged, kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch,length,page", [(1, 16385, 16), (17, 2048, 16), (2, 131072, 32), (70, 4000, 16)])
def test_many_pages(kind, batch, length, page):
    paged = Paged([length - 37 * row for row in range(batch)], heads=8, page=page)
    assert_close(*both(paged, vectors_of(paged, kind)))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_bounds_every_key(kind):
    paged = Paged([2048, 1003], heads=8)
    got, _ = both(paged, vectors_of(paged, kind))
    exact = ops.exact_logits(paged.q, paged.k_pages, paged.table, paged.seq_lens, max_seq_len=2048, sm_scale=1.0)
    best = exact.unflatten(-1, (-1, 16)).amax(-1)
    assert bool((got >= best - 1e-2).all())
    assert torch.equal(got == -torch.inf, best == -torch.inf)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_mean_is_that_of_the_logits(kind):
    paged = Paged([2048, 1024], heads=8)
    got, _ = both(paged, vectors_of(paged, kind))
    exact = ops.exact_logits(paged.q, paged.k_pages, paged.table, paged.seq_lens, max_seq_len=2048, sm_scale=1.0)
    mean = exact.unflatten(-1, (-1, 16)).mean(-1)
    real = mean.isfinite()
    assert torch.equal(got == -torch.inf, ~real)
    # A channel of a mean in 8 bits is off by a deviation of 0.01 (a spread of 8 in 255 steps, over sqrt(12)), and in
    # bfloat16 by less: five of them.
    slack = paged.q.float().norm(dim=-1).max() * 0.05
    assert bool(((got - mean)[real].abs() <= slack).all())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_with_its_head_and_its_page(kind):
    paged = Paged([64, 64])
    paged.k_pages[int(paged.table[1, 1]), 1, 3, 7] = torch.nan
    paged.q[0, 1, 5] = torch.nan
    got, want = both(paged, vectors_of(paged, kind))
    assert got[0, 1].isnan().all() and got[1, 4:, 1].isnan().all()
    assert got.isnan().sum() == 4 + 4
    assert_close(got, want)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
def test_twenty_runs_are_bitwise_equal(kind):
    paged = Paged([9000, 4097, 1], heads=8)
    vectors = vectors_of(paged, kind)
    first, _ = both(paged, vectors)
    for _ in range(20):
        assert torch.equal(first, both(paged, vectors)[0])
