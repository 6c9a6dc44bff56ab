"""Decoding on from a cache and coming back: what a branch did is not seen by the next."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

import twilight  # noqa: E402
from twilight.errors import UnsupportedModelError  # noqa: E402

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
STATEFUL = ("quest", "h2o", "snapkv", "tactic")
"""One that keeps nothing for rows, and three that do."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL)).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return made


def read(model, handle, rows=1):
    ids = torch.randint(2, 97, (rows, 90), generator=torch.Generator().manual_seed(rows))
    cache = handle.cache()
    model(ids, past_key_values=cache)
    return cache


def decode(model, cache, tokens, step=None):
    """Feed `[b, n]` tokens one by one; return all logits."""
    out = []
    for place in range(tokens.shape[1]):
        ids = tokens[:, place : place + 1]
        out.append(model(ids, past_key_values=cache).logits[:, -1] if step is None else step(ids[:, 0])[:, -1].clone())
    return torch.stack(out, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("selector", STATEFUL)
@pytest.mark.parametrize("captured", [False, True])
def test_branches_do_not_see_each_other(model, selector, captured):
    tokens = torch.randint(2, 97, (3, 25), generator=torch.Generator().manual_seed(7))
    with twilight.attach(model, selector, p=0.8, budget=0.4, dense_layers=1, min_context=0) as handle:
        # Each from a cache of its own: what no branch can have touched.
        expected = torch.cat([decode(model, read(model, handle), row[None]) for row in tokens])
        cache = read(model, handle)
        for _ in range(2):
            with cache.branch(3):
                if captured:
                    with handle.capture(cache, max_new_tokens=25, graph=False) as step:
                        found = decode(model, cache, tokens, step)
                else:
                    found = decode(model, cache, tokens)
            torch.testing.assert_close(found, expected)
            assert (cache.num_rows, cache.get_seq_length(), cache.paged.table.lengths) == (1, 90, [90])
        # Another length, in between: pages that were full are not.
        with cache.branch():
            torch.testing.assert_close(decode(model, cache, tokens[1:2, :3]), expected[1:2, :3])
        with cache.branch():
            torch.testing.assert_close(decode(model, cache, tokens[2:]), expected[2:])


@torch.no_grad()
def test_a_branch_of_a_batch_keeps_each_sequence(model):
    with twilight.attach(model, "h2o", p=0.8, budget=0.4, dense_layers=1, min_context=0) as handle:
        cache = read(model, handle, rows=2)
        tokens = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(8))
        with cache.branch():
            first = decode(model, cache, tokens)
        with cache.branch(2):
            both = decode(model, cache, tokens.repeat_interleave(2, dim=0))
        torch.testing.assert_close(both[::2], first)
        torch.testing.assert_close(both[1::2], first)
        with cache.branch():
            torch.testing.assert_close(decode(model, cache, tokens), first)


def test_there_is_nothing_to_branch_from_before_a_prompt(model):
    with (
        twilight.attach(model, "quest") as handle,
        pytest.raises(ValueError, match="the cache is empty"),
        handle.cache().branch(),
    ):
        pass


@torch.no_grad()
def test_a_handle_can_be_attached_again(model):
    dense = model(torch.tensor([[5, 6, 7]])).logits
    handle = twilight.attach(model, "quest", p=0.8, budget=0.4, dense_layers=1, min_context=0)
    cache = read(model, handle)
    with cache.branch():
        sparse = decode(model, cache, torch.tensor([[5]]))
    handle.detach()
    assert model(torch.tensor([[5, 6, 7]])).logits.equal(dense)
    with pytest.raises(UnsupportedModelError, match="is detached"):
        handle.capture(cache)
    handle.reattach()
    handle.reattach()
    with cache.branch():
        assert decode(model, cache, torch.tensor([[5]])).equal(sparse)
    handle.detach()
    with twilight.attach(model, "full") as other:
        with pytest.raises(UnsupportedModelError, match="has Twilight attached already"):
            handle.reattach()
        model(torch.tensor([[5, 6, 7]]), past_key_values=other.cache())
    assert model.config._attn_implementation != "twilight"
    handle.reattach()
    handle.detach()
    assert model.config._attn_implementation != "twilight"
