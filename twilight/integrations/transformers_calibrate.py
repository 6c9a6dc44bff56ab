"""Statistics of a model's queries and keys, taken while it reads a text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "twilight_calibrate"


@torch.inference_mode()
def channel_orders(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, dict[int, torch.Tensor]]:
    """Order each kv head's channels by how much they contribute to its logits (Double Sparsity, section 3).

    Statistics are of rotated queries and keys, as labels are; the official code takes q and k before rotation. Query
    heads of a group are added up, so that a kv head has one order.

    Args:
        model: a causal language model that uses transformers' attention interface.
        input_ids: `[1, n]`, the text.

    Returns:
        For each statistic and layer, `[Hkv, d]` int64, heaviest channel first. The statistics are means over tokens: of
        `|q_c * k_c|` of the same token, "qk", of `|q_c|`, "q", and of `|k_c|`, "k".
    """
    orders: dict[str, dict[int, torch.Tensor]] = {"qk": {}, "q": {}, "k": {}}

    def record(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        grouped = query.float().unflatten(1, (key.shape[1], -1))
        keys = key.float().unsqueeze(2)
        for statistic, values in (("qk", grouped * keys), ("q", grouped), ("k", keys)):
            weight = values.abs().mean((0, 3)).sum(1)
            orders[statistic][module.layer_idx] = weight.argsort(dim=-1, descending=True, stable=True).cpu()
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, record)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        model(input_ids, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    return orders
