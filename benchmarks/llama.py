"""A Llama-shaped decoder, one token a sequence, with the attention left to the caller.

Products are torch's. What lies between them is three functions, which torch.compile makes one kernel each where it is
asked to, as serving engines have them: 8 launches a layer instead of 19, attention not among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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


_EPS = 1e-5


def add_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x + delta`, `[b, hidden]`, and its RMS norm."""
    x = x + delta
    return x, F.rms_norm(x, x.shape[-1:], weight, _EPS)


def rotate(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels of `[b, H, d]` by the cosines and sines `[b, 1, d/2, 2]` of angles."""
    a, b = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(heads.dtype)


def gate(both: torch.Tensor) -> torch.Tensor:
    """Return `silu(first half) * second half` of `[b, 2 * mlp]`."""
    first, second = both.chunk(2, dim=-1)
    return F.silu(first) * second


class Between(NamedTuple):
    """What lies between the products."""

    add_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    rotate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    gate: Callable[[torch.Tensor], torch.Tensor]

    def compiled(self) -> Between:
        """Return the same as a kernel each, made at the first call with each batch size.

        Torch makes 8 of each at most, and goes on without after that, until `torch.compiler.reset`.
        """
        return Between(
            torch.compile(self.add_norm, dynamic=False),
            torch.compile(self.rotate, dynamic=False),
            torch.compile(self.gate, dynamic=False),
        )


PLAIN = Between(add_norm, rotate, gate)


class Block(nn.Module):
    """Attention and MLP, with one matrix for q, k and v and one for both halves of the MLP's input."""

    def __init__(self, shape: LlamaShape, device: torch.device, dtype: torch.dtype, between: Between) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        self.between = between
        self.heads = (shape.q_heads, shape.kv_heads, shape.head_dim)
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden, device=device, dtype=dtype))
        self.qkv = linear(shape.hidden, (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim)
        self.out = linear(shape.q_heads * shape.head_dim, shape.hidden)
        self.mlp_norm = nn.Parameter(torch.ones(shape.hidden, device=device, dtype=dtype))
        self.gate_up = linear(shape.hidden, 2 * shape.mlp)
        self.down = linear(shape.mlp, shape.hidden)

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor, rotation: torch.Tensor, attend: Attend, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next `x` and `delta`, `[b, hidden]`, whose sum goes from block to block."""
        q_heads, kv_heads, dim = self.heads
        x, normed = self.between.add_norm(x, delta, self.attention_norm)
        heads = self.qkv(normed).unflatten(-1, (-1, dim))
        rotated, v = self.between.rotate(heads[:, : q_heads + kv_heads], rotation), heads[:, q_heads + kv_heads :]
        attended = attend(index, rotated[:, :q_heads], rotated[:, q_heads:], v)
        x, normed = self.between.add_norm(x, self.out(attended.flatten(1)), self.mlp_norm)
        return x, self.down(self.between.gate(self.gate_up(normed)))


class Llama(nn.Module):
    """The decoder, its weights normal: each layer's keys have a deviation near 1.

    Args:
        shape: sizes.
        max_tokens: positions that it is asked for.
        device: where.
        dtype: of weights and activations.
        compiled: whether torch.compile makes kernels of what lies between the products.
    """

    def __init__(
        self, shape: LlamaShape, max_tokens: int, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        super().__init__()
        self.between = PLAIN.compiled() if compiled else PLAIN
        self.embedding = nn.Embedding(shape.vocab, shape.hidden, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(Block(shape, device, dtype, self.between) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden, device=device, dtype=dtype))
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False, device=device, dtype=dtype)
        inverse = shape.rope_base ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(max_tokens).float(), inverse)
        self.rotation = torch.stack((angles.cos(), angles.sin()), dim=-1).to(device)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Return the logits `[b, vocab]` of the token after `ids` `[b]`, which stand at `positions` `[b]`."""
        rotation = self.rotation[positions].unsqueeze(1)
        x = self.embedding(ids)
        delta = torch.zeros_like(x)
        for index, block in enumerate(self.blocks):
            x, delta = block(x, delta, rotation, attend, index)
        _, normed = self.between.add_norm(x, delta, self.norm)
        logits: torch.Tensor = self.head(normed)
        return logits
