"""Append on the GPU: the same bytes as the torch twin."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_spgemv_gpu import pytestmark  # noqa: F401
from twilight import ops
from twilight.ops.quantize import shadow_bytes
from twilight.ops.summaries import RULES

SUMMARIES = [("bounds", None), ("bounds", 8), ("mean", None), ("mean", 8), ("label", None), ("label", 2), ("label", 4)]
ALL = [None, *SUMMARIES]


def names(value):
    if value is None or isinstance(value, tuple) and value[0] in RULES:
        return "none" if value is None else f"{value[0]}-{value[1] or 'native'}"
    return None


def zeros(*shape, dtype):
    return torch.zeros(*shape, dtype=dtype, device="cuda")


def summary_of(what, pages, heads, dim, page, dtype, channels=16):
    """Return the `ops.Summary` of empty pages."""
    if what is None:
        return None
    rule, bits = what
    place = (pages, heads, page) if rule == "label" else (pages, heads)
    width = channels if rule == "label" else dim
    order = None
    if rule == "label":
        order = torch.stack([torch.randperm(dim, device="cuda")[:channels] for _ in range(heads)]).int()
    if bits is None:
        return ops.Summary(rule, tuple(zeros(*place, width, dtype=dtype) for _ in range(1 + (rule == "bounds"))), order)
    stored = width * bits // 8 * (2 if rule == "bounds" else 1)
    codes, params = zeros(*place, stored, dtype=torch.uint8), zeros(*place, 2, dtype=torch.float16)
    return ops.Summary(rule, (codes, params), order)


class Pool:
    """Empty pages for `b` sequences of up to `width` pages each."""

    def __init__(self, b, width, *, heads, dim, page, dtype, summary, channels=16, values=None, shadow=True):
        pages = b * width + 1
        self.k, self.v = (zeros(pages, heads, page, dim, dtype=dtype) for _ in range(2))
        self.shadow = zeros(pages, heads, shadow_bytes(page, dim) if shadow else 0, dtype=torch.uint8)
        torch.manual_seed(1)
        self.summary = summary_of(summary, pages, heads, dim, page, dtype, channels)
        self.values = summary_of(values, pages, heads, dim, page, dtype)
        self.table = (torch.randperm(pages - 1, device="cuda") + 1).view(b, width).int()

    def append(self, k, v, lengths, counts, backend):
        table = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (lengths, counts)]
        ops.append(
            k, v, self.k, self.v, self.shadow, self.table, *table,
            summary=self.summary, value_summary=self.values, backend=backend,
        )  # fmt: skip

    @property
    def kept(self):
        return [part for each in (self.summary, self.values) if each for part in each.tensors]

    def tensors(self):
        # The null page is nobody's: what lies there is left out.
        return [part[1:].view(torch.uint8) for part in (self.k, self.v, self.shadow, *self.kept)]


def assert_same(pools):
    for mine, theirs in zip(*(pool.tensors() for pool in pools), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("summary", ALL, ids=names)
def test_same_bytes_as_the_twin(dtype, dim, page, summary):
    torch.manual_seed(0)
    pools = [Pool(4, 5, heads=3, dim=dim, page=page, dtype=dtype, summary=summary) for _ in range(2)]
    lengths = [0] * 4
    # A prompt, some single tokens, and a chunk that begins and ends inside a page.
    for counts in ([37, 16, 0, 1], [1, 1, 0, 1], [1, 0, 1, 1], [17, 3, 33, 16], [1, 1, 1, 1]):
        k, v = (torch.randn(4, max(counts), 3, dim, device="cuda").to(dtype) * 3 for _ in range(2))
        k[0, 0, 0, 1:] = k[0, 0, 0, 0]  # a constant key
        lengths = [a + b for a, b in zip(lengths, counts, strict=True)]
        pools[0].append(k, v, lengths, counts, "cuda")
        pools[1].append(k, v, lengths, counts, "torch")
        assert_same(pools)


@pytest.mark.parametrize("summary", ALL, ids=names)
def test_without_a_shadow(summary):
    torch.manual_seed(0)
    options = {"heads": 2, "dim": 128, "page": 16, "dtype": torch.bfloat16}
    pools = [Pool(2, 3, summary=summary, shadow=False, **options) for _ in range(2)]
    k, v = (torch.randn(2, 37, 2, 128, device="cuda").bfloat16() for _ in range(2))
    for pool, backend in zip(pools, ("cuda", "torch"), strict=True):
        pool.append(k, v, [37, 20], [37, 20], backend)
    assert_same(pools)
    assert all(part[pools[0].table[0, 0]].any() for part in pools[0].kept)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits,channels", [(2, 4), (2, 12), (4, 2), (4, 6), (None, 5), (2, 0), (4, 0), (None, 0)])
def test_labels_of_any_length(dim, bits, channels):
    # 0: all channels of the head, as many as a lane can take.
    torch.manual_seed(0)
    options = {"heads": 2, "dim": dim, "page": 16, "dtype": torch.bfloat16, "channels": channels or dim}
    pools = [Pool(2, 3, summary=("label", bits), **options) for _ in range(2)]
    k = torch.randn(2, 37, 2, dim, device="cuda").bfloat16()
    for pool, backend in zip(pools, ("cuda", "torch"), strict=True):
        pool.append(k, k, [37, 20], [37, 20], backend)
    assert_same(pools)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("summary", SUMMARIES, ids=names)
def test_one_by_one_equals_at_once(dtype, summary):
    # Keys of very different size, so that the order of a sum shows.
    torch.manual_seed(0)
    pools = [Pool(2, 3, heads=2, dim=128, page=16, dtype=dtype, summary=summary) for _ in range(2)]
    k = (torch.randn(2, 40, 2, 128, device="cuda") * 10 ** torch.empty(2, 40, 1, 1, device="cuda").uniform_(-3, 3)).to(
        dtype
    )
    pools[0].append(k, k, [40, 29], [40, 29], "cuda")
    for step in range(40):
        counts = [1, int(step < 29)]
        here = k[:, step : step + 1]
        pools[1].append(here, here, [step + 1, min(step + 1, 29)], counts, "cuda")
    assert_same(pools)


@pytest.mark.parametrize("summary", [("bounds", 8), ("mean", 8), ("label", 4)], ids=names)
def test_strided_input(summary):
    torch.manual_seed(0)
    pools = [Pool(2, 5, heads=4, dim=128, page=16, dtype=torch.bfloat16, summary=summary) for _ in range(2)]
    k, v = (torch.randn(2, 4, 40, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(2))
    pools[0].append(k, v, [40, 33], [40, 33], "cuda")
    pools[1].append(k.contiguous(), v.contiguous(), [40, 33], [40, 33], "cuda")
    assert_same(pools)


@pytest.mark.parametrize("summary", SUMMARIES, ids=names)
def test_twenty_runs_are_bitwise_equal(summary):
    torch.manual_seed(0)
    k = torch.randn(5, 300, 8, 128, device="cuda").bfloat16()
    pools = [Pool(5, 19, heads=8, dim=128, page=16, dtype=torch.bfloat16, summary=summary) for _ in range(2)]
    for run in range(20):
        pools[min(run, 1)].append(k, k, [300, 1, 17, 299, 160], [300, 1, 17, 299, 160], "cuda")
        if run:
            assert_same(pools)


@pytest.mark.parametrize("summary", SUMMARIES[:4], ids=names)
def test_nan_shows_in_its_own_token_and_page(summary):
    pools = [Pool(1, 4, heads=2, dim=128, page=16, dtype=torch.bfloat16, summary=summary) for _ in range(2)]
    k = torch.randn(1, 40, 2, 128, device="cuda").bfloat16()
    k[0, 5, 1, 9] = torch.nan
    for pool, backend in zip(pools, ("cuda", "torch"), strict=True):
        pool.append(k, k, [40], [40], backend)
    (cuda, twin), nan_page = pools, int(pools[0].table[0, 0])
    rest = [i for i in range(cuda.k.shape[0]) if i not in (0, nan_page)]
    for mine, theirs in zip((cuda.k, cuda.shadow, *cuda.kept), (twin.k, twin.shadow, *twin.kept), strict=True):
        assert torch.equal(mine[rest], theirs[rest])
    q, lengths = torch.randn(1, 8, 128, device="cuda").bfloat16(), torch.tensor([40], dtype=torch.int32, device="cuda")
    scores = ops.page_scores(q, cuda.kept, cuda.table, lengths, page_size=16)
    assert scores[0, 4:, 0].isnan().all() and scores.isnan().sum() == 4


@pytest.mark.parametrize("bits", [2, 4, None])
def test_nan_shows_in_the_labels_that_hold_it(bits):
    pools = [Pool(1, 4, heads=2, dim=128, page=16, dtype=torch.bfloat16, summary=("label", bits)) for _ in range(2)]
    k = torch.randn(1, 40, 2, 128, device="cuda").bfloat16()
    order = pools[0].summary.channels[1].long()
    k[0, 5, 1, order[3]] = torch.nan
    k[0, 6, 1, next(c for c in range(128) if c not in order)] = torch.nan
    for pool, backend in zip(pools, ("cuda", "torch"), strict=True):
        pool.append(k, k, [40], [40], backend)
    read = []
    for pool in pools:
        tensors = [part[pool.table[0].long()] for part in pool.kept]
        read.append(ops.dequantize(*tensors, bits=bits) if bits else tensors[0].float())
    torch.testing.assert_close(read[0], read[1], rtol=0, atol=0, equal_nan=True)
    bad = read[0].isnan().any(-1)
    assert bad[0, 1, 5] and bad.sum() == 1


@pytest.mark.parametrize("summary", SUMMARIES, ids=names)
def test_no_tokens(summary):
    pool = Pool(2, 2, heads=2, dim=64, page=16, dtype=torch.float16, summary=summary)
    k = torch.zeros(2, 0, 2, 64, device="cuda", dtype=torch.float16)
    pool.append(k, k, [0, 0], [0, 0], "cuda")
    assert not any(part.any() for part in pool.tensors())
