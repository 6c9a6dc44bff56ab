"""Append on the GPU: the same bytes as the torch twin."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_spgemv_gpu import pytestmark  # noqa: F401
from twilight import ops
from twilight.ops.quantize import shadow_bytes


class Pool:
    """Empty pages for `b` sequences of up to `width` pages each."""

    def __init__(self, b, width, *, heads, dim, page, dtype, bounds):
        pages = b * width + 1
        self.k, self.v = (torch.zeros(pages, heads, page, dim, dtype=dtype, device="cuda") for _ in range(2))
        self.shadow = torch.zeros(pages, heads, shadow_bytes(page, dim), dtype=torch.uint8, device="cuda")
        self.bounds = {
            "none": (),
            "native": tuple(torch.zeros(pages, heads, dim, dtype=dtype, device="cuda") for _ in range(2)),
            "int8": (
                torch.zeros(pages, heads, 2 * dim, dtype=torch.uint8, device="cuda"),
                torch.zeros(pages, heads, 2, dtype=torch.float16, device="cuda"),
            ),
        }[bounds]
        torch.manual_seed(1)
        self.table = (torch.randperm(pages - 1, device="cuda") + 1).view(b, width).int()

    def append(self, k, v, lengths, counts, backend):
        table = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (lengths, counts)]
        ops.append(k, v, self.k, self.v, self.shadow, self.table, *table, bounds=self.bounds, backend=backend)

    def tensors(self):
        # The null page is nobody's: what lies there is left out.
        return [part[1:].view(torch.uint8) for part in (self.k, self.v, self.shadow, *self.bounds)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("bounds", ["none", "native", "int8"])
def test_same_bytes_as_the_twin(dtype, dim, page, bounds):
    torch.manual_seed(0)
    pools = [Pool(4, 5, heads=3, dim=dim, page=page, dtype=dtype, bounds=bounds) for _ in range(2)]
    lengths = [0] * 4
    # A prompt, some single tokens, and a chunk that begins and ends inside a page.
    for counts in ([37, 16, 0, 1], [1, 1, 0, 1], [1, 0, 1, 1], [17, 3, 33, 16], [1, 1, 1, 1]):
        k, v = (torch.randn(4, max(counts), 3, dim, device="cuda").to(dtype) * 3 for _ in range(2))
        k[0, 0, 0, 1:] = k[0, 0, 0, 0]  # a constant key
        lengths = [a + b for a, b in zip(lengths, counts, strict=True)]
        pools[0].append(k, v, lengths, counts, "cuda")
        pools[1].append(k, v, lengths, counts, "torch")
        for mine, theirs in zip(*(pool.tensors() for pool in pools), strict=True):
            assert torch.equal(mine, theirs)


def test_strided_input():
    torch.manual_seed(0)
    pools = [Pool(2, 5, heads=4, dim=128, page=16, dtype=torch.bfloat16, bounds="int8") for _ in range(2)]
    k, v = (torch.randn(2, 4, 40, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(2))
    pools[0].append(k, v, [40, 33], [40, 33], "cuda")
    pools[1].append(k.contiguous(), v.contiguous(), [40, 33], [40, 33], "cuda")
    for mine, theirs in zip(*(pool.tensors() for pool in pools), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bounds", ["native", "int8"])
def test_nan_shows_in_its_own_token_and_page(bounds):
    pools = [Pool(1, 4, heads=2, dim=128, page=16, dtype=torch.bfloat16, bounds=bounds) for _ in range(2)]
    k = torch.randn(1, 40, 2, 128, device="cuda").bfloat16()
    k[0, 5, 1, 9] = torch.nan
    for pool, backend in zip(pools, ("cuda", "torch"), strict=True):
        pool.append(k, k, [40], [40], backend)
    (cuda, twin), nan_page = pools, int(pools[0].table[0, 0])
    rest = [i for i in range(cuda.k.shape[0]) if i not in (0, nan_page)]
    for mine, theirs in zip((cuda.k, cuda.shadow, *cuda.bounds), (twin.k, twin.shadow, *twin.bounds), strict=True):
        assert torch.equal(mine[rest], theirs[rest])
    q, lengths = torch.randn(1, 8, 128, device="cuda").bfloat16(), torch.tensor([40], dtype=torch.int32, device="cuda")
    scores = ops.page_scores(q, cuda.bounds, cuda.table, lengths, page_size=16)
    assert scores[0, 4:, 0].isnan().all() and scores.isnan().sum() == 4


def test_no_tokens():
    pool = Pool(2, 2, heads=2, dim=64, page=16, dtype=torch.float16, bounds="int8")
    k = torch.zeros(2, 0, 2, 64, device="cuda", dtype=torch.float16)
    pool.append(k, k, [0, 0], [0, 0], "cuda")
    assert not any(part.any() for part in pool.tensors())
