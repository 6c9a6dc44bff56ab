"""The workload: what its attention looks like, and that what is kept about its keys is true."""

from __future__ import annotations

import math

import pytest
import torch

from twilight import Geometry, TopP, TwilightAttention
from twilight.benchmarks.methods import QUEST, Method, Stages, make
from twilight.benchmarks.workload import (
    Workload,
    channel_orders,
    contiguous,
    make_cache,
    make_workload,
    use_selector,
)
from twilight.graph import StaticCache
from twilight.ops import dequantize, dequantize_bounds
from twilight.ops.quantize import split_shadow


def geometry(group: int, layers: int = 2, kv_heads: int = 8, head_dim: int = 128) -> Geometry:
    return Geometry(layers, group * kv_heads, kv_heads, head_dim, 16, torch.float32)


@pytest.fixture(scope="module")
def work() -> Workload:
    return make_workload(geometry(4, kv_heads=2, head_dim=64), 3, 512, make("quest"), 8, spare=32)


def rows(pages: torch.Tensor, work: Workload) -> torch.Tensor:
    """Lay pages `[pages, H, P, ...]` out as `[b, n, H, ...]`, token by token."""
    table, size = work.cache.table.rows, pages.shape[2]
    return torch.stack([torch.stack([pages[row[n // size], :, n % size] for n in range(work.length)]) for row in table])


@pytest.mark.parametrize("group", [1, 4])
def test_quest_keeps_about_one_token_in_64(group):
    torch.manual_seed(0)
    length = 4096
    work = make_workload(geometry(group, layers=3), 1, length, make("quest"), length / 64)
    stages = Stages(
        Method(QUEST, TwilightAttention(work.cache.selector, TopP(0.9), 0.25)), work, StaticCache(work.cache, length)
    )
    budgets = stages.budgets(length)
    assert budgets["candidates"] == length / 4
    # 24 heads draw their number from a log-normal; it is nearer at the benchmark's lengths.
    assert 0.65 < budgets["union"]["mean"] / (length / 64) < 1.1
    assert budgets["union"]["max"] > 10 * budgets["union"]["min"]


def test_attention_has_sinks_a_band_and_a_tail(work):
    keys = rows(work.cache.layers[0].k_pages, work)  # [b, n, Hkv, d]
    q = work.queries[0].unflatten(1, (2, 4))
    logits = torch.einsum("bhgd,bnhd->bhgn", q, keys) / math.sqrt(64)
    mass = logits.softmax(-1)
    assert (mass[..., :4].sum(-1) > 4 / 512 * 5).all()
    heavy = mass.sort(-1, descending=True).values.cumsum(-1)
    # A tenth of the tokens hold most of the mass, and the tail what is left of it.
    assert (heavy[..., 51] > 0.85).all()
    assert (heavy[..., 51] < 0.999).all()
    deviation = logits.median(-1).values.abs()
    assert (deviation < 1).all()


def test_4_bit_keys_and_bounds_speak_of_the_keys(work):
    for layer in work.cache.layers:
        keys = layer.k_pages
        codes, params = split_shadow(layer.shadow, 16)
        step = params[..., :1].float()
        used = torch.tensor(work.cache.table.rows).flatten()
        assert ((dequantize(codes, params) - keys).abs() <= 0.51 * step + 1e-3)[used].all()
        high, low = dequantize_bounds(layer.metadata("bounds"), layer.metadata("bounds_params"))
        largest, smallest = keys.amax(2), keys.amin(2)
        assert (high >= largest)[used].all()
        assert (low <= smallest)[used].all()
        assert (high - largest < 0.1)[used].all()  # 8 bits of a range of some 10
        assert (smallest - low < 0.1)[used].all()


def test_pages_are_shuffled_and_belong_to_one_row_each(work):
    pages = [page for row in work.cache.table.rows for page in row]
    assert sorted(pages) == list(range(1, 3 * 32 + 1))
    assert pages != sorted(pages)
    assert work.cache.table.num_free == 3 * 2  # spare
    assert torch.equal(work.cache.page_table, torch.tensor(work.cache.table.rows, dtype=torch.int32))


def test_a_second_selector_finds_its_metadata_as_if_it_had_been_there_at_first():
    quest, native = make("quest"), make("quest", metadata_type="native")
    shape = geometry(2, kv_heads=2, head_dim=32)
    changed = make_workload(shape, 2, 128, quest, 4).cache
    use_selector(changed, native)
    fresh = make_workload(shape, 2, 128, native, 4).cache
    assert changed.selector is native
    for one, other in zip(changed.layers, fresh.layers, strict=True):
        assert torch.equal(one.metadata("max"), other.metadata("max"))
        assert torch.equal(one.metadata("min"), other.metadata("min"))
        with pytest.raises(ValueError, match="bounds"):
            one.metadata("bounds")


def test_channels_are_those_of_the_largest_direction(work):
    orders = channel_orders(work)
    assert list(orders) == [0, 1]
    for layer, order in orders.items():
        energy = work.directions[layer].square()
        assert torch.equal(order.sort(-1).values, torch.arange(64).expand(2, 64))
        kept = energy.gather(-1, order)
        assert (kept[:, :-1] >= kept[:, 1:]).all()
        # A quarter of the channels: more than its share, as the docstring says of an eighth.
        assert (kept[:, :16].sum(-1) > 0.5).all()


def test_contiguous_views_are_the_same_memory(work):
    pages = work.cache.layers[0].k_pages
    view = contiguous(pages, 3)
    assert view.shape == (3, 2, 512 + 32, 64)
    assert view.data_ptr() == pages[1].data_ptr()
    assert view.is_contiguous()
    assert view.numel() == pages[1:].numel()


def test_lengths_are_whole_pages():
    with pytest.raises(ValueError, match="whole pages of 16 tokens, got 100 and 0"):
        make_cache(geometry(1), 1, 100, make("quest"))


def test_layers_differ_and_repeat():
    shape = geometry(2, kv_heads=2, head_dim=32)
    first, again = (make_workload(shape, 1, 128, make("quest"), 4) for _ in range(2))
    assert torch.equal(first.queries[1], again.queries[1])
    assert torch.equal(first.cache.layers[1].k_pages, again.cache.layers[1].k_pages)
    assert not torch.equal(first.queries[0], first.queries[1])
