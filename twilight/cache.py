"""PagedKVCache: keys, values, the 4-bit copy of the keys and the metadata of selector and pruner, in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from twilight.budget import Budget, UniformBudget
from twilight.checks import check_positive
from twilight.errors import OutOfPagesError
from twilight.geometry import Geometry
from twilight.layer_cache import LayerCache
from twilight.pages import Extension, PageTable
from twilight.pruner import Pruner
from twilight.selector import Selector, StateSpec


class PagedKVCache:
    """The KV cache of a model, for a batch of sequences of different lengths.

    All layers share one page table. A row is a sequence's place in the batch; an empty row costs nothing and may stand
    in any batch.

    Args:
        geometry: sizes.
        num_rows: sequences, b.
        num_pages: pages to begin with.
        selector: whose metadata is kept beside the keys, and whose state beside the rows.
        pruner: whose metadata is kept beside the values.
        budget: whose state is kept beside the rows.
        growable: double the pool when it is full instead of raising `OutOfPagesError`.
        max_pages: a bound that a growable pool keeps.
        dense_layers: the model's numbers of further layers, which are only attended to densely. They share the page
            table, and keep K and V alone. In `layers` they come last.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_rows: int,
        num_pages: int,
        selector: Selector | None = None,
        pruner: Pruner | None = None,
        budget: UniformBudget | None = None,
        growable: bool = False,
        max_pages: int | None = None,
        dense_layers: Sequence[int] = (),
    ) -> None:
        twice = sorted(set(dense_layers) & set(geometry.layer_ids))
        if twice:
            raise ValueError(f"dense_layers: layers {twice} are among the geometry's layer_ids already")
        self.geometry = geometry
        self._keep_for(Selector() if selector is None else selector, Pruner() if pruner is None else pruner)
        self.state_specs: tuple[StateSpec, ...] = self.selector.state(geometry)
        self.budget_specs: tuple[StateSpec, ...] = () if budget is None else budget.state(geometry)
        self.table = PageTable(num_pages, geometry.page_size, num_rows)
        self._growable = growable
        self._max_pages = None if max_pages is None else check_positive("max_pages", max_pages)
        self._step = 0
        self._pending: list[int] = []
        self._pages_touched: tuple[torch.Tensor, torch.Tensor] | None = None
        self.new_tokens = torch.zeros(num_rows, dtype=torch.int32, device=geometry.device)
        self.layers = [LayerCache(self, index) for index in geometry.layer_ids]
        self.layers += [LayerCache(self, index, dense=True) for index in dense_layers]
        self._upload()

    def _keep_for(self, selector: Selector, pruner: Pruner) -> None:
        """Say whose metadata layers keep; those that there are allocate it anew."""
        selector.prepare(self.geometry)
        specs, pruner_specs = selector.metadata(self.geometry), pruner.metadata(self.geometry)
        taken = {spec.name for spec in specs} & {spec.name for spec in pruner_specs}
        if taken:
            raise ValueError(
                f"pruner: keeps metadata called '{min(taken)}', and so does the selector '{selector.name}'"
            )
        others = {spec.rule for spec in pruner_specs} - {"summarize", "mean"}
        if others:
            raise ValueError(f"pruner: its metadata may have the rule 'summarize' or 'mean', got {min(others)!r}")
        self.selector, self.specs = selector, specs
        self.pruner, self.pruner_specs = pruner, pruner_specs
        # One launch keeps one rule of the keys; what else there is, the selector summarises.
        rule = next((spec.rule for spec in specs if spec.rule != "summarize"), None)
        self._kept = tuple(spec for spec in specs if spec.rule == rule)
        self._kept_values = tuple(spec for spec in pruner_specs if spec.rule == "mean")
        kept = (*self._kept, *self._kept_values)
        self._summarized = tuple(spec.name for spec in (*specs, *pruner_specs) if spec not in kept)

    @property
    def num_rows(self) -> int:
        """Sequences, b."""
        return len(self.table.rows)

    @property
    def max_seq_len(self) -> int:
        """The longest sequence, known on the host."""
        return max(self.table.lengths)

    @property
    def capacity(self) -> int | None:
        """Tokens that the pool can hold, or None if it grows without bound."""
        pages = self._max_pages if self._growable else self.table.num_pages
        return None if pages is None else pages * self.geometry.page_size

    def abort(self) -> None:
        """Forget a step that not all layers have appended to, as after an error between two layers."""
        if self.unfinished():
            self._abort()

    def _abort(self, failed: LayerCache | None = None) -> None:
        # The layer that failed may have brought a part of its metadata up to date. It comes last: it may fail again.
        done = [layer for layer in self.layers if layer._step == self._step and layer is not failed]
        for row, new in enumerate(self._pending):
            self.table.truncate(row, self.table.lengths[row] - new)
        for layer in self.layers:
            layer._step = self._step
            layer._state.restore()
            for row, length in enumerate(self.table.lengths):
                layer._state.truncate(row, length)
        self._upload()
        for layer in (*done, *([failed] if failed else [])):
            for row, new in enumerate(self._pending):
                if new:
                    self._summarize_last_page(row, [layer])

    def fork(self, source: int, target: int) -> None:
        """Let row `target`, which is freed first, continue row `source` from where it is. Pages are shared."""
        self._check_between_steps()
        self.table.fork(source, target)
        if source != target:
            for layer in self.layers:
                layer._state.fork(source, target)
        self._upload()

    def free(self, row: int) -> None:
        """Forget a row."""
        self._check_between_steps()
        self.table.free(row)
        for layer in self.layers:
            layer._state.free(row)
        self._upload()

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from position `length` on, as after a rejected speculation.

        The state of those tokens is forgotten with them. What their queries have added to that of earlier tokens stays.
        """
        self._check_between_steps()
        shrinks = length < self.table.lengths[row] if 0 <= row < self.num_rows else False
        try:
            extension = self.table.truncate(row, length)
        except OutOfPagesError:
            if not self._growable:
                raise
            self._grow(1)
            extension = self.table.truncate(row, length)
        self._copy_pages(extension)
        self._upload()
        if shrinks:
            self._summarize_last_page(row, self.layers)
            for layer in self.layers:
                layer._state.truncate(row, length)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was: beam reorder, repeat, drop. The number of rows may change."""
        if not len(rows):
            raise ValueError("rows: expected at least one row")
        self._check_between_steps()
        rows = [int(row) for row in rows]
        self.table.select(rows)
        for layer in self.layers:
            layer._state.select(rows)
        self.new_tokens = self.new_tokens[torch.tensor(rows, device=self.geometry.device)]
        self._upload()

    def save_state(self) -> list[Any]:
        """Return copies of what selector and budget keep for rows, for `load_state`."""
        self._check_between_steps()
        return [layer._state.save() for layer in self.layers]

    def load_state(self, saved: Sequence[Any]) -> None:
        """Put back what `save_state` returned, once, after the rows have been made what they were."""
        self._check_between_steps()
        for layer, each in zip(self.layers, saved, strict=True):
            layer._state.load(each)
        self._upload()

    def nbytes(self) -> dict[str, int]:
        """Return bytes held: ``kv``, ``shadow``, ``metadata`` and ``state``."""
        total = {"kv": 0, "shadow": 0, "metadata": 0, "state": 0}
        for layer in self.layers:
            total["kv"] += layer.k_pages.nbytes + layer.v_pages.nbytes
            total["shadow"] += layer.shadow.nbytes
            total["metadata"] += sum(buffer.nbytes for buffer in layer._metadata.values())
            total["state"] += layer._state.nbytes
        return total

    def _begin(self, layer: LayerCache, counts: list[int]) -> None:
        """Make room for a step's tokens if `layer` is the first to append, and check that the others agree."""
        if layer._step < self._step:
            if counts != self._pending:
                raise ValueError(
                    f"new_tokens: layer {layer.index} appends {counts} in a step that began with {self._pending}"
                )
            return
        self._check_between_steps(f"layer {layer.index} appends again")
        needed = self.table.pages_needed(counts)
        if self._growable:
            self._grow(needed - self.table.num_free)
        self._reserve_state(max(old + new for old, new in zip(self.table.lengths, counts, strict=True)))
        self._copy_pages(self.table.extend(counts))
        for each in self.layers:
            each._state.commit()
        self._step += 1
        self._pending = counts
        self._upload()
        # Once a step, not in every layer: each is a copy to the device.
        self.new_tokens = torch.tensor(counts, dtype=torch.int32).to(self.geometry.device)
        self._pages_touched = None

    def _budget(self, policy: UniformBudget) -> Budget:
        if policy not in self._budgets:
            g = self.geometry
            self._budgets[policy] = policy.resolve(
                self.seq_lens, g.num_kv_heads, max_seq_len=self.max_seq_len, page_size=g.page_size
            )
        return self._budgets[policy]

    def _summarize_last_page(self, row: int, layers: Sequence[LayerCache]) -> None:
        """Make the metadata of a shortened row's last page speak of what is left in it."""
        size, device = self.geometry.page_size, self.geometry.device
        left = self.table.lengths[row] % size
        if left:
            page = torch.tensor([self.table.rows[row][-1]], device=device)
            for layer in layers:
                layer._summarize(page, (torch.arange(size, device=device) < left)[None])

    def unfinished(self) -> list[int]:
        """Return the layers that have not appended in the step that others began."""
        return [layer.index for layer in self.layers if layer._step < self._step]

    def _check_between_steps(self, what: str = "rows change") -> None:
        behind = self.unfinished()
        if behind:
            raise ValueError(f"{what} before layers {behind} had their turn in this step; abort() forgets the step")

    def _grow(self, missing: int) -> None:
        if missing <= 0:
            return
        old = self.table.num_pages
        pages = max(old * 2, old + missing)
        if self._max_pages is not None:
            pages = min(pages, self._max_pages)
        if pages < old + missing:
            return  # growing would not be enough: the table will refuse, and the pool stays as it is
        for layer in self.layers:
            layer._allocate(old + 1, pages + 1)
        self.table.grow(pages)

    def _reserve_state(self, tokens: int) -> None:
        for layer in self.layers:
            layer._state.reserve(tokens)

    def _copy_pages(self, extension: Extension) -> None:
        if not extension.copies:
            return
        source, target = torch.tensor(extension.copies, device=self.geometry.device).T
        for layer in self.layers:
            layer._copy(source, target)

    def _touched(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pages that this step's tokens lie in, `[n]`, and which of their slots are filled, `[n, P]`."""
        if self._pages_touched is None:
            self._pages_touched = self._pages_of_last(self._pending)
        return self._pages_touched

    def _pages_of_last(self, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.geometry.page_size
        pages: list[int] = []
        filled: list[int] = []
        for row, length, new in zip(self.table.rows, self.table.lengths, counts, strict=True):
            for logical in range((length - new) // size, len(row) if new else 0):
                pages.append(row[logical])
                filled.append(min(size, length - logical * size))
        device = self.geometry.device
        slots = torch.arange(size, device=device)
        valid = slots < torch.tensor(filled, device=device).unsqueeze(-1)
        return torch.tensor(pages, dtype=torch.long, device=device), valid

    def _upload(self) -> None:
        width = max(1, max(map(len, self.table.rows)))
        padded = [row + [0] * (width - len(row)) for row in self.table.rows]
        self.page_table = torch.tensor(padded, dtype=torch.int32).to(self.geometry.device)
        self.seq_lens = torch.tensor(self.table.lengths, dtype=torch.int32).to(self.geometry.device)
        # What was found out for the rows as they were.
        self._budgets: dict[UniformBudget, Budget] = {}
        self.scratch: dict[str, Any] = {}
