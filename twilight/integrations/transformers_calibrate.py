"""Statistics of a model's queries and keys, taken while it reads a text."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "twilight_calibrate"


@torch.inference_mode()
def channel_orders(
    model: PreTrainedModel, input_ids: torch.Tensor, statistic: Literal["qk", "q", "k"] = "qk"
) -> dict[int, torch.Tensor]:
    """Order each kv head's channels by how much they contribute to its logits (Double Sparsity, section 3).

    Statistics are of rotated queries and keys, as labels are; the official code takes q and k before rotation. Query
    heads of a group are added up, so that a kv head has one order.

    Args:
        model: a causal language model that uses transformers' attention interface.
        input_ids: `[1, n]`, the text.
        statistic: mean over tokens of `|q_c * k_c|` of the same token, of `|q_c|`, or of `|k_c|`.

    Returns:
        For each layer, `[Hkv, d]` int64, heaviest channel first.
    """
    orders: dict[int, torch.Tensor] = {}

    def record(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        grouped = query.float().unflatten(1, (key.shape[1], -1))
        keys = key.float().unsqueeze(2)
        weight = {"qk": grouped * keys, "q": grouped, "k": keys}[statistic].abs().mean((0, 3)).sum(1)
        orders[module.layer_idx] = weight.argsort(dim=-1, descending=True, stable=True).cpu()
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
