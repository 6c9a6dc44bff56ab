"""`attach` on small random models of every supported architecture, against transformers' own dense decoding."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

import twilight  # noqa: E402
from twilight import BoundedTopP, NoPruning, Selection, Selector, StateSpec, ops  # noqa: E402
from twilight.errors import UnsupportedModelError  # noqa: E402

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ARCHITECTURES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 1, "head_dim": 32}),
}


class Everything(Selector):
    """A selector of the test's own, so that these tests need no installed plugin."""

    name = "everything"

    def select(self, q, layer, budget):
        return Selection.everything(
            layer.seq_lens, layer.geometry.num_kv_heads, max_seq_len=layer.max_seq_len, granularity=1
        )


class Queries(Everything):
    """Keeps every query that it observes, in its token's place."""

    name = "queries"

    def state(self, geometry):
        return (StateSpec("q", (geometry.head_dim,), torch.float32, per="token", heads="query", fill=-9),)

    def observe(self, q, layer):
        where = ops.new_positions(layer.seq_lens, layer.new_tokens, q.shape[1])
        kept = layer.state("q").clone()
        for row, column in (where >= 0).nonzero().tolist():
            kept[row, :, where[row, column]] = q[row, column]
        layer.update_state("q", kept)


class Newest(Selector):
    """The newest tokens only: what it forgets must show."""

    name = "newest"

    def select(self, q, layer, budget):
        slots = torch.arange(budget.capacity)
        tokens = slots + (layer.seq_lens[:, None, None] - budget.tokens.unsqueeze(-1))
        return Selection(tokens.clamp(min=0).to(torch.int32), budget.tokens)


def make(name: str, **more):
    config, extra = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SMALL, **extra, **more})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # sharper logits: greedy choices then do not hang on rounding
    return model


def prompt(rows: int = 2, columns: int = 50, pads: int = 13):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 97, (rows, columns), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, : pads * row], mask[row, : pads * row] = 0, 0
    return ids, mask


GREEDY = {"max_new_tokens": 20, "do_sample": False}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return make(request.param)


@pytest.mark.parametrize("min_context", [0, 1000])
def test_full_with_p_one_generates_what_dense_does(model, min_context):
    ids, mask = prompt()
    padded, single = model.generate(ids, attention_mask=mask, **GREEDY), model.generate(ids[:1], **GREEDY)
    with twilight.attach(model, Everything(), p=1.0, min_context=min_context) as handle:
        assert model.generate(ids, attention_mask=mask, past_key_values=handle.cache(), **GREEDY).equal(padded)
        assert model.generate(ids[:1], past_key_values=handle.cache(), **GREEDY).equal(single)


def test_logits_below_min_context_are_bit_identical_to_dense(model):
    ids, _ = prompt(rows=1)
    with torch.inference_mode():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        dense = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5)]
        with twilight.attach(model, Everything(), min_context=1000, stats=True) as handle:
            cache = handle.cache()
            model(ids, past_key_values=cache)
            for i, expected in enumerate(dense):
                assert model(ids[:, i : i + 1], past_key_values=cache).logits.equal(expected)
            assert all(row["dense_steps"] == 5 for row in handle.stats().summary())


def test_beam_search_reorders_the_pages(model):
    ids, mask = prompt()
    options = {**GREEDY, "num_beams": 3}
    expected = model.generate(ids, attention_mask=mask, **options)
    with twilight.attach(model, Everything(), p=1.0) as handle:
        assert model.generate(ids, attention_mask=mask, past_key_values=handle.cache(), **options).equal(expected)


def test_speculative_verification_matches_dense(model):
    ids, _ = prompt(rows=1)
    ids = torch.cat([ids, ids[:, :30]], dim=1)  # repeats, so that prompt look-up has something to propose
    options = {**GREEDY, "prompt_lookup_num_tokens": 3}
    expected = model.generate(ids, **options)
    with twilight.attach(model, Everything(), p=1.0) as handle:
        cache = handle.cache()
        assert model.generate(ids, past_key_values=cache, **options).equal(expected)
        assert cache.paged.table.lengths == [cache.get_seq_length()]


@pytest.mark.parametrize("chunk", [1, 7, 17, 50])
def test_chunked_prefill_with_left_padding_matches_one_pass(model, chunk):
    ids, mask = prompt(rows=3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode(), twilight.attach(model, Everything(), p=1.0) as handle:
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        cache, parts = handle.cache(), []
        for start in range(0, 50, chunk):
            stop = min(50, start + chunk)
            step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            parts.append(model(ids[:, start:stop], past_key_values=cache, **step).logits)
        assert cache.paged.table.lengths == [50, 37, 24]
    got = torch.cat(parts, dim=1)
    for row, pads in enumerate((0, 13, 26)):
        torch.testing.assert_close(got[row, pads:], whole[row, pads:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_a_selector_observes_each_token_of_a_prompt_once_and_in_its_place(chunk):
    model = make("llama")
    ids, mask = prompt(rows=3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode(), twilight.attach(model, Queries(), min_context=1000) as handle:
        cache = handle.cache()
        for start in range(0, 50, chunk):
            stop = min(50, start + chunk)
            step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            model(ids[:, start:stop], past_key_values=cache, **step)
        cache.batch_select_indices(torch.tensor([2, 0, 1]))
        for row, (first, length) in enumerate([(26, 24), (0, 50), (13, 37)]):
            alone = handle.cache()
            source = (row + 2) % 3
            model(ids[source : source + 1, first:], past_key_values=alone)
            for mine, other in zip(cache.paged.layers[:2], alone.paged.layers[:2], strict=True):
                torch.testing.assert_close(mine.state("q")[row, :, :length], other.state("q")[0], rtol=1e-4, atol=1e-4)
                assert (mine.state("q")[row, :, length:] == -9).all()
                assert (other.state("q") != -9).all()


def test_sparse_steps_are_not_observed_but_finished():
    fed = []

    class Fed(Queries):
        def finish(self, q, layer, kept, out, lse):
            fed.append((layer.index, layer.max_seq_len, kept.lengths.tolist()))
            return out, lse

    model = make("llama")
    ids, _ = prompt(rows=1)
    with torch.inference_mode(), twilight.attach(model, Fed(), p=1.0) as handle:
        cache = handle.cache()
        model(ids, past_key_values=cache)
        assert fed == []
        model(ids[:, :1], past_key_values=cache)
        assert fed == [(2, 51, [[51, 51]]), (3, 51, [[51, 51]])]
        assert (cache.paged.layers[0].state("q")[0, :, 50] == -9).all()
        model(ids[:, :2], past_key_values=cache)
        assert len(fed) == 2 and (cache.paged.layers[0].state("q")[0, :, 51:] != -9).all()


def test_a_selector_that_forgets_changes_the_text():
    model = make("llama")
    ids, _ = prompt(rows=1)
    dense = model.generate(ids, **GREEDY)
    with twilight.attach(model, Newest(), budget=4, dense_layers=0) as handle:
        assert not model.generate(ids, past_key_values=handle.cache(), **GREEDY).equal(dense)


def test_stats_count_what_each_layer_read():
    model = make("llama")
    ids, mask = prompt()
    with twilight.attach(model, Newest(), budget=8, pruner=NoPruning(), dense_layers=1, stats=True) as handle:
        model.generate(ids, attention_mask=mask, past_key_values=handle.cache(), **GREEDY)
        rows = handle.stats().summary()
    assert [row["layer"] for row in rows] == [1, 2, 3]
    for row in rows:
        # The prompt's last token is part of the prefill: 20 new tokens take 19 decode steps.
        assert row["steps"] == 19
        assert row["b0"]["mean"] == row["b1_query"]["mean"] == row["b1_group"]["mean"] == 8
        assert row["seq_len"] == pytest.approx((51 + 38) / 2 + 9)
    handle.stats().clear()
    assert handle.stats().summary() == []


def test_p_can_change_between_runs_without_a_new_handle():
    model = make("llama")
    ids, _ = prompt(rows=1)
    kept = []
    with twilight.attach(model, Everything(), stats=True) as handle:
        for p in (0.5, 0.9, 1.0):
            handle.p = p
            assert handle.attention.pruner == BoundedTopP(p)
            handle.stats().clear()
            model.generate(ids, past_key_values=handle.cache(), **GREEDY)
            kept.append(handle.stats().summary()[0]["b1_query"]["mean"])
        with pytest.raises(ValueError, match="p: expected a float in"):
            handle.p = 1.5
    assert kept[0] < kept[1] < kept[2]


def test_cache_rows_repeat_select_crop_and_reset():
    model = make("llama")
    ids, _ = prompt(rows=1)
    with torch.inference_mode(), twilight.attach(model, Everything(), p=1.0) as handle:
        cache = handle.cache()
        model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        cache.batch_repeat_interleave(3)
        shared = cache.paged.table.num_pages - cache.paged.table.num_free
        assert shared == 4, "three rows of 50 tokens share the four pages of one"
        branched = model(torch.cat([ids[:, :1], ids[:, 1:2], ids[:, :1]]), past_key_values=cache).logits
        torch.testing.assert_close(branched[0], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(branched[2], expected[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(branched[1], expected[0], rtol=1e-4, atol=1e-4)
        cache.batch_select_indices(torch.tensor([2]))
        assert cache.paged.num_rows == 1 and cache.paged.table.lengths == [51]
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.paged is None


def test_detach_restores_the_model():
    model = make("llama")
    ids, _ = prompt(rows=1)
    dense, before = model.generate(ids, **GREEDY), model.config._attn_implementation
    handle = twilight.attach(model, Newest(), budget=4)
    assert model.config._attn_implementation == "twilight"
    with pytest.raises(UnsupportedModelError, match="attached already"):
        twilight.attach(model, Newest())
    handle.detach()
    assert model.config._attn_implementation == before
    assert model.generate(ids, **GREEDY).equal(dense)


def test_explain_says_which_layers_are_dense_and_why():
    handle = twilight.attach(make("llama"), Everything(), dense_layers=1)
    assert handle.explain() == ["dense, one of the first 1: layers 0", "sparse: layers 1, 2, 3"]


def test_sliding_window_layers_are_left_alone():
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    model = make("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=2, layer_types=kinds)
    ids, mask = prompt()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with twilight.attach(model, Everything(), p=1.0, dense_layers=1, stats=True) as handle:
        assert handle.layers[2] == "dense, sliding window of 16 tokens"
        got = model.generate(ids, attention_mask=mask, past_key_values=handle.cache(), **GREEDY)
        assert got.equal(expected)
        assert [row["layer"] for row in handle.stats().summary()] == [1, 3]


def test_two_models_keep_apart():
    first, second = make("llama"), make("qwen2")
    ids, _ = prompt(rows=1)
    expected = first.generate(ids, **GREEDY), second.generate(ids, **GREEDY)
    with twilight.attach(first, Everything(), p=1.0) as one, twilight.attach(second, Everything(), p=1.0) as two:
        caches = one.cache(), two.cache()
        assert first.generate(ids, past_key_values=caches[0], **GREEDY).equal(expected[0])
        assert second.generate(ids, past_key_values=caches[1], **GREEDY).equal(expected[1])


@pytest.mark.parametrize("multiplier", [0.02, 2.0])
def test_a_model_with_a_scale_of_its_own_keeps_its_mass_and_its_logits(multiplier):
    torch.manual_seed(0)
    config = transformers.GraniteConfig(**SMALL, num_key_value_heads=2, attention_multiplier=multiplier)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, _ = prompt(rows=1)
    with torch.inference_mode():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=cache).logits
        with twilight.attach(model, Everything(), p=1.0) as handle:
            assert handle.cache()._geometry.sm_scale == multiplier
            cache = handle.cache()
            model(ids, past_key_values=cache)
            got = model(ids[:, :1], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_frequencies_of_the_rotation_are_found(model):
    with twilight.attach(model, Everything()) as handle:
        dim = handle._geometry.head_dim
        wanted = [10000 ** (-2 * c / dim) for c in range(dim // 2)]
        assert list(handle._geometry.inv_freq) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("scaling", "found"),
    [
        ({"rope_type": "linear", "factor": 4.0}, True),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, True),
        ({"rope_type": "dynamic", "factor": 4.0}, False),
    ],
)
def test_frequencies_that_are_scaled(scaling, found):
    theta = {"rope_theta": 10000.0}
    key = "rope_parameters" if hasattr(transformers.LlamaConfig(), "rope_parameters") else "rope_scaling"
    model = make("llama", **{key: {**scaling, **theta}})
    with twilight.attach(model, Everything()) as handle:
        inv_freq = handle._geometry.inv_freq
    assert bool(inv_freq) == found
    if found:
        assert list(inv_freq) == pytest.approx(model.model.rotary_emb.inv_freq.tolist())
        assert inv_freq[-1] != pytest.approx(10000 ** (-14 / 16), rel=1e-3)


def test_a_model_that_pairs_its_channels_otherwise_is_not_said_to_be_known():
    torch.manual_seed(0)
    config = transformers.CohereConfig(**SMALL, num_key_value_heads=2)
    with twilight.attach(AutoModelForCausalLM.from_config(config).eval(), Everything()) as handle:
        assert handle._geometry.inv_freq == ()


def test_streaming_llm_reindexed_decodes_as_if_the_text_were_sinks_and_window():
    from twilight_selectors.streaming_llm import StreamingLLM

    # One layer: its keys and values are functions of token and position, whatever was attended to.
    model = make("llama", num_hidden_layers=1)
    ids, _ = prompt(rows=1)
    same = []
    with torch.inference_mode():
        wanted = model(torch.cat([ids[:, :4], ids[:, -8:]], dim=1)).logits[:, -1]
        for reindex in (True, False):
            selector = StreamingLLM(4, reindex=reindex)
            with twilight.attach(model, selector, p=1.0, budget=12, dense_layers=0) as handle:
                cache = handle.cache()
                model(ids[:, :-1], past_key_values=cache)
                got = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
            same.append(torch.allclose(got, wanted, rtol=1e-4, atol=1e-4))
    assert same == [True, False]


def test_a_model_that_is_let_go_is_freed():
    model = make("llama")
    handle = twilight.attach(model, Everything())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    handle.detach()


def test_a_forward_pass_without_cache_is_dense(model):
    ids, mask = prompt()
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        with twilight.attach(model, Newest(), budget=4):
            got = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1, 13:], expected[1, 13:])
