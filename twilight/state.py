"""What a selector keeps for each row of the batch, in one layer: see `StateSpec`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twilight.checks import check_tensor
from twilight.geometry import Geometry
from twilight.selector import StateSpec


class RowState:
    """The tensors of one layer. They have one shape until a row outgrows them, and then a larger one.

    Args:
        specs: what is kept.
        geometry: sizes.
        num_rows: b.
    """

    def __init__(self, specs: Sequence[StateSpec], geometry: Geometry, num_rows: int) -> None:
        self._specs = {spec.name: spec for spec in specs}
        if len(self._specs) < len(specs):
            raise ValueError(f"state: expected different names, got {[spec.name for spec in specs]}")
        self._heads = {"kv": geometry.num_kv_heads, "query": geometry.num_q_heads}
        self._device = geometry.device
        self._tokens = 0
        self._before: list[tuple[str, torch.Tensor | None, torch.Tensor]] = []
        """What the step has replaced, in order: name, which entries (None: all of them), values."""
        self._tensors = {spec.name: self._fresh(spec, num_rows) for spec in specs}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def read(self, name: str, length: int) -> torch.Tensor:
        """Return a tensor, of which entries of the first `length` tokens: a view."""
        if name not in self._specs:
            there = ", ".join(map(repr, self._specs)) or "none"
            raise ValueError(
                f"state: this cache keeps no '{name}' (there is: {there}). "
                "Make it with PagedKVCache(..., selector=...) of the selector that decodes."
            )
        spec, tensor = self._specs[name], self._tensors[name]
        return tensor if spec.per == "row" else tensor[:, :, : -(-length // spec.stride)]

    def write(
        self,
        name: str,
        value: torch.Tensor,
        seq_lens: torch.Tensor,
        new_tokens: torch.Tensor,
        length: int,
        *,
        undo: bool,
        entries: torch.Tensor | None = None,
    ) -> None:
        """Replace what `read` returned, or some entries of it, in rows that have new tokens and up to each row's end.

        Args:
            name: which tensor.
            value: shaped as `read` returned it; `[b, H, m, *shape]` if `entries` are given.
            seq_lens, new_tokens: `[b]` int32.
            length: as for `read`.
            undo: keep what was there, for `restore`.
            entries: `[b, m]` int64, which to replace, none of a row twice; -1 for nothing.
        """
        here = self.read(name, length)
        spec, rows = self._specs[name], len(here)
        if entries is not None:
            self._write_entries(name, value, entries, seq_lens, new_tokens, undo=undo)
            return
        check_tensor(name, value, here.shape)
        if undo and not any(which is None and done == name for done, which, _ in self._before):
            self._before.append((name, None, self._tensors[name].clone()))
        moves = (new_tokens > 0).view(rows, *[1] * (here.ndim - 1))
        if spec.per == "token":
            count = here.shape[2]
            starts = torch.arange(count, device=here.device) * spec.stride
            moves = moves & (starts < seq_lens[:, None]).view(rows, 1, count, *[1] * (here.ndim - 3))
        here.copy_(torch.where(moves, value.to(here.dtype), here))

    def _write_entries(
        self,
        name: str,
        value: torch.Tensor,
        entries: torch.Tensor,
        seq_lens: torch.Tensor,
        new_tokens: torch.Tensor,
        *,
        undo: bool,
    ) -> None:
        spec, tensor = self._specs[name], self._tensors[name]
        if spec.per != "token":
            raise ValueError(f"entries: '{name}' has one entry a row; leave them out")
        check_tensor("entries", entries, (len(tensor), None), dtype=torch.int64)
        check_tensor(name, value, (*tensor.shape[:2], entries.shape[1], *spec.shape))
        moves = (new_tokens > 0)[:, None] & (entries >= 0) & (entries * spec.stride < seq_lens[:, None])
        # What is not to be written goes to the spare entry at the end, which nobody reads.
        target = entries.where(moves, torch.full_like(entries, tensor.shape[2] - 1))
        index = target.view(len(tensor), 1, -1, *[1] * len(spec.shape)).expand(value.shape)
        if undo:
            self._before.append((name, index, tensor.gather(2, index)))
        tensor.scatter_(2, index, value.to(tensor.dtype))

    def commit(self) -> None:
        """Forget what was there before the step."""
        self._before = []

    def restore(self) -> None:
        """Put back what was there before the step, where it was to be kept."""
        for name, index, old in reversed(self._before):
            if index is None:
                self._tensors[name] = old
            else:
                self._tensors[name].scatter_(2, index, old)
        self._before = []

    def save(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Return copies of all tensors, for `load`."""
        return self._tokens, {name: tensor.clone() for name, tensor in self._tensors.items()}

    def load(self, saved: tuple[int, dict[str, torch.Tensor]]) -> None:
        """Be as when `save` returned `saved`, which is used up."""
        self._tokens, self._tensors = saved
        self._before = []

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens."""
        if tokens <= self._tokens:
            return
        old, self._tokens = self._tensors, max(tokens, 2 * self._tokens)
        for name, spec in self._specs.items():
            if spec.per == "token":
                new = self._fresh(spec, old[name].shape[0])
                new[:, :, : old[name].shape[2] - 1] = old[name][:, :, :-1]
                self._tensors[name] = new

    def fork(self, source: int, target: int) -> None:
        """Make row `target` as row `source` is."""
        for tensor in self._tensors.values():
            tensor[target] = tensor[source]

    def free(self, row: int) -> None:
        """Make a row as it was at first."""
        for name, tensor in self._tensors.items():
            tensor[row] = self._specs[name].fill

    def truncate(self, row: int, length: int) -> None:
        """Forget entries of tokens from position `length` on; a row that keeps none begins anew."""
        if length == 0:
            self.free(row)
        for name, spec in self._specs.items():
            if spec.per == "token":
                self._tensors[name][row, :, -(-length // spec.stride) :] = spec.fill

    def select(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was."""
        which = torch.tensor(rows, device=self._device)
        self._tensors = {name: tensor[which] for name, tensor in self._tensors.items()}

    def _fresh(self, spec: StateSpec, rows: int) -> torch.Tensor:
        entries = (-(-self._tokens // spec.stride) + 1,) if spec.per == "token" else ()
        shape = (rows, self._heads[spec.heads], *entries, *spec.shape)
        return torch.full(shape, spec.fill, dtype=spec.dtype, device=self._device)
