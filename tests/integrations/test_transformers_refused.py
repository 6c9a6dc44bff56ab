"""What `attach` and an attached model refuse, and that they say why."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

from transformers import AutoModelForCausalLM, DynamicCache, StaticCache  # noqa: E402

import twilight  # noqa: E402
from tests.integrations.test_transformers import GREEDY, SMALL, Everything, make, prompt  # noqa: E402
from twilight.errors import UnsupportedModelError  # noqa: E402


@pytest.mark.parametrize("make_cache", [lambda config: DynamicCache(config=config), lambda config: None, "static"])
def test_a_foreign_cache_is_refused_with_the_way_out(make_cache):
    model = make("llama")
    ids, _ = prompt(rows=1)
    cache = StaticCache(config=model.config, max_cache_len=100) if make_cache == "static" else make_cache(model.config)
    with (
        twilight.attach(model, Everything()),
        pytest.raises(UnsupportedModelError, match=r"past_key_values=handle\.cache\(\)"),
    ):
        model.generate(ids, past_key_values=cache, **GREEDY)


def test_custom_masks_copies_and_batches_of_another_size_are_refused():
    model = make("llama")
    ids, _ = prompt(rows=1)
    handle = twilight.attach(model, Everything(), dense_layers=0)
    with pytest.raises(UnsupportedModelError, match="custom one of 4 dimensions"):
        model(ids, attention_mask=torch.ones(1, 1, 50, 50, dtype=torch.bool), past_key_values=handle.cache())
    with pytest.raises(UnsupportedModelError, match="not attached to"):
        copy.deepcopy(model)(ids)
    cache = handle.cache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 1 sequences, the batch has 2"):
        model(ids.expand(2, -1)[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": 0.0}, ValueError, r"p: expected a float in \(0, 1\], got 0.0"),
        ({"p": 1.5}, ValueError, "got 1.5"),
        ({"p": float("nan")}, ValueError, "got nan"),
        ({"p": "0.9"}, TypeError, "got str"),
        ({"budget": 0}, ValueError, "budget: expected at least 1, got 0"),
        ({"budget": -0.5}, ValueError, "budget: .* got -0.5"),
        ({"budget": 513}, ValueError, "513 tokens are more than the 512 positions"),
        ({"dense_layers": -1}, ValueError, "dense_layers: expected an int of at least 0, got -1"),
        ({"dense_layers": 4}, UnsupportedModelError, "no layer is left to be sparse"),
        ({"page_size": 0}, ValueError, "page_size: expected at least 1, got 0"),
        ({"min_context": -1}, ValueError, "min_context"),
        ({"selector": 3}, TypeError, "selector: expected a twilight.Selector, got int"),
        ({"pruner": "top_p"}, TypeError, "pruner: expected a pruner such as TopP"),
    ],
)
def test_bad_arguments_are_named_and_leave_the_model_alone(arguments, error, message):
    model = make("llama")
    before = model.config._attn_implementation
    with pytest.raises(error, match=message):
        twilight.attach(model, **{"selector": Everything(), **arguments})
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("Gemma2Config", "caps its logits"),
        ("GptOssConfig", "attention sinks that are parameters"),
        ("T5Config", "encoder-decoder"),
        ("BloomConfig", "do not use transformers' attention interface"),
    ],
)
def test_unsupported_architectures_are_refused_with_the_reason(config, reason):
    small = {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    if config == "GptOssConfig":
        small |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    if config == "T5Config":
        small = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    if config == "BloomConfig":
        small = {"vocab_size": 97, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    made = getattr(transformers, config)(**small)
    auto = transformers.AutoModelForSeq2SeqLM if config == "T5Config" else AutoModelForCausalLM
    with pytest.raises(UnsupportedModelError, match=reason):
        twilight.attach(auto.from_config(made), Everything())


def test_a_cache_of_a_detached_handle_is_refused():
    model = make("llama")
    ids, _ = prompt(rows=1)
    handle = twilight.attach(model, Everything(), p=1.0)
    before, used = handle.cache(), handle.cache()
    with torch.inference_mode():
        model(ids, past_key_values=used)
    handle.detach()
    for cache in (before, used):
        with pytest.raises(UnsupportedModelError, match="the handle that made this cache is detached"):
            model(ids, past_key_values=cache)
    with (
        twilight.attach(model, Everything()),
        pytest.raises(UnsupportedModelError, match="the handle that made this cache is detached"),
    ):
        model(ids[:, :1], past_key_values=used)


def test_a_cache_that_another_attention_uses_is_refused():
    model = make("llama")
    ids, _ = prompt(rows=1)
    handle = twilight.attach(model, Everything(), p=1.0)
    cache = handle.cache()
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match="or the model does not attend with it"):
        model.generate(ids, past_key_values=cache, **GREEDY)


def test_a_cache_whose_step_was_refused_is_not_used_again():
    model = make("llama")
    ids, _ = prompt(rows=1)
    with torch.inference_mode(), twilight.attach(model, Everything(), p=1.0) as handle:
        cache = handle.cache()
        model(ids, past_key_values=cache)
        custom = torch.ones(1, 1, 1, 51, dtype=torch.bool)
        with pytest.raises(UnsupportedModelError, match="custom one"):
            model(ids[:, :1], attention_mask=custom, past_key_values=cache)
        with pytest.raises(ValueError, match="an earlier step with this cache failed halfway"):
            model(ids[:, :1], past_key_values=cache)


def test_what_is_not_a_model_is_refused():
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        twilight.attach(torch.nn.Linear(2, 2), Everything())
