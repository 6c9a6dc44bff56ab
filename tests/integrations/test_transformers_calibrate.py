"""Channel orders: the channels that make the logits come first."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

from twilight.integrations.transformers_calibrate import channel_orders  # noqa: E402


@pytest.mark.parametrize(("statistic", "scaled"), [("k", ["k"]), ("q", ["q"]), ("qk", ["q", "k"])])
def test_the_channels_that_are_made_large_come_first(statistic, scaled):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # A pair of channels that rotation mixes, another one for each kv head: 1 and 5, then 2 and 6.
    for layer in model.model.layers:
        for name in scaled:
            weight = getattr(layer.self_attn, f"{name}_proj").weight.data.view(-1, 8, 32)
            heads = weight.shape[0] // 2
            weight[:heads, [1, 5]] *= 50
            weight[heads:, [2, 6]] *= 50
    before = model.config._attn_implementation
    orders = channel_orders(model, torch.randint(0, 50, (1, 40)))
    assert model.config._attn_implementation == before
    assert sorted(orders) == ["k", "q", "qk"] and all(sorted(layers) == [0, 1] for layers in orders.values())
    for order in orders[statistic].values():
        assert order.shape == (2, 8)
        assert set(order[0, :2].tolist()) == {1, 5} and set(order[1, :2].tolist()) == {2, 6}
        assert all(sorted(row) == list(range(8)) for row in order.tolist())
