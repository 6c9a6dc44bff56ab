"""A Llama-shaped decoder of plain torch modules, one token a sequence, with the attention left to the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the number of a layer, q `[b, Hq, d]` and the new token's k and v `[b, Hkv, d]`, rotated, to `[b, Hq, d]`."""


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a decoder."""

    name: str
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    rope_base: float = 500_000.0

    @property
    def parameters(self) -> int:
        """Numbers in the weight matrices; the output layer has its own."""
        heads = (2 * self.q_heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.hidden * (heads + 3 * self.mlp) + 2 * self.vocab * self.hidden


SHAPES = {
    shape.name: shape
    for shape in (
        LlamaShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        LlamaShape("tiny", 3, 64, 4, 2, 64, 128, 256),
    )
}


class Block(nn.Module):
    """Attention and MLP, with one matrix for q, k and v and one for both halves of the MLP's input."""

    def __init__(self, shape: LlamaShape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        self.heads = (shape.q_heads, shape.kv_heads, shape.head_dim)
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=1e-5, device=device, dtype=dtype)
        self.qkv = linear(shape.hidden, (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim)
        self.out = linear(shape.q_heads * shape.head_dim, shape.hidden)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=1e-5, device=device, dtype=dtype)
        self.gate_up = linear(shape.hidden, 2 * shape.mlp)
        self.down = linear(shape.mlp, shape.hidden)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor, attend: Attend, index: int) -> torch.Tensor:
        """Return the next `[b, hidden]`."""
        q_heads, kv_heads, dim = self.heads
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, dim))
        rotated, v = rotate(heads[:, : q_heads + kv_heads], rotation), heads[:, q_heads + kv_heads :]
        attended = attend(index, rotated[:, :q_heads], rotated[:, q_heads:], v)
        # addmm adds the residual inside the product.
        x = torch.addmm(x, attended.flatten(1), self.out.weight.t())
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return torch.addmm(x, F.silu(gate) * up, self.down.weight.t())


class Llama(nn.Module):
    """The decoder, its weights normal: each layer's keys have a deviation near 1.

    Args:
        shape: sizes.
        max_tokens: positions that it is asked for.
        device: where.
        dtype: of weights and activations.
    """

    def __init__(self, shape: LlamaShape, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(Block(shape, device, dtype) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5, device=device, dtype=dtype)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False, device=device, dtype=dtype)
        inverse = shape.rope_base ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(max_tokens).float(), inverse)
        self.rotation = torch.polar(torch.ones_like(angles), angles).to(device)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Return the logits `[b, vocab]` of the token after `ids` `[b]`, which stand at `positions` `[b]`."""
        rotation = self.rotation[positions].unsqueeze(1)
        x = self.embedding(ids)
        for index, block in enumerate(self.blocks):
            x = block(x, rotation, attend, index)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def rotate(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels of `[b, H, d]` by `[b, 1, d/2]` complex numbers."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(heads.dtype)
