"""Which page holds which tokens: the host's side of the cache, without any tensor of keys."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from twilight.checks import check_positive
from twilight.errors import OutOfPagesError

NULL_PAGE = 0
"""The page that no sequence owns. Page tables are padded with it, so that a gather past the end stays in bounds."""


@dataclass(frozen=True)
class Extension:
    """What the storage has to do before it writes the new tokens.

    Attributes:
        copies: `(from, to)` pages: a page shared with another row is copied before it is written to.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)


class PageTable:
    """Pages of a number of rows, with sharing.

    A row is a sequence's place in the batch. Rows may share pages (a common prefix); a shared page that is not full is
    copied when one of its owners appends. Pages are handed out lowest number first, so that a run repeats.
    """

    def __init__(self, num_pages: int, page_size: int, num_rows: int) -> None:
        self.page_size = check_positive("page_size", page_size)
        self.num_pages = check_positive("num_pages", num_pages)
        check_positive("num_rows", num_rows)
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self.lengths: list[int] = [0] * num_rows
        self._owners: Counter[int] = Counter()
        self._free = list(range(1, num_pages + 1))

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def owners(self, page: int) -> int:
        """Return how many rows hold `page`."""
        return self._owners[page]

    def grow(self, num_pages: int) -> None:
        """Add pages until there are `num_pages`."""
        for page in range(self.num_pages + 1, num_pages + 1):
            heapq.heappush(self._free, page)
        self.num_pages = max(self.num_pages, num_pages)

    def pages_needed(self, new_tokens: Sequence[int]) -> int:
        """Return the free pages that `extend(new_tokens)` will take, copies included."""
        return sum(map(sum, self._plan(new_tokens)))

    def extend(self, new_tokens: Sequence[int]) -> Extension:
        """Make room for more tokens.

        Args:
            new_tokens: for each row, how many tokens to add; 0 leaves the row alone.

        Raises:
            OutOfPagesError: not enough free pages; nothing has changed.
        """
        plan = self._plan(new_tokens)
        needed = sum(map(sum, plan))
        if needed > self.num_free:
            raise OutOfPagesError(
                f"out of pages: {sum(new_tokens)} new tokens need {needed} pages of {self.page_size} tokens, "
                f"{self.num_free} of {self.num_pages} are free. Free a row, or make the cache with more pages."
            )
        copies = []
        for row, (new, (copied, added)) in enumerate(zip(new_tokens, plan, strict=True)):
            pages = self.rows[row]
            if copied:
                shared = pages[-1]
                pages[-1] = self._take()
                self._drop(shared)
                copies.append((shared, pages[-1]))
            pages.extend(self._take() for _ in range(added))
            self.lengths[row] += new
        return Extension(copies)

    def fork(self, source: int, target: int) -> None:
        """Let row `target`, which is freed first, share all pages of row `source`."""
        self._check_row("source", source)
        self._check_row("target", target)
        if source == target:
            return
        self.free(target)
        self.rows[target] = list(self.rows[source])
        self.lengths[target] = self.lengths[source]
        self._owners.update(self.rows[target])

    def free(self, row: int) -> None:
        """Empty a row; pages that nobody else holds become free."""
        self._check_row("row", row)
        for page in self.rows[row]:
            self._drop(page)
        self.rows[row], self.lengths[row] = [], 0

    def truncate(self, row: int, length: int) -> Extension:
        """Forget the tokens of a row from position `length` on.

        A page cut in the middle while another row holds it is copied, so that what is kept about a page always speaks
        of the same tokens for all its owners.

        Raises:
            OutOfPagesError: no free page for that copy; nothing has changed.
        """
        self._check_row("row", row)
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"length: expected 0 to {self.lengths[row]} for row {row}, got {length}")
        keep = -(-length // self.page_size)
        pages = self.rows[row]
        cut = length % self.page_size and length < self.lengths[row]
        copies = []
        if cut and self._owners[pages[keep - 1]] > 1:
            if not self._free and all(self._owners[p] > 1 for p in pages[keep:]):
                raise OutOfPagesError(f"out of pages: truncating row {row} inside a shared page needs one free page")
            shared = pages[keep - 1]
            for page in pages[keep:]:
                self._drop(page)
            del pages[keep:]
            pages[-1] = self._take()
            self._drop(shared)
            copies.append((shared, pages[-1]))
        for page in pages[keep:]:
            self._drop(page)
        del pages[keep:]
        self.lengths[row] = length
        return Extension(copies)

    def select(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was: reorder, repeat or drop rows. The number of rows may change."""
        for row in rows:
            self._check_row("rows", row)
        old_rows, old_lengths = self.rows, self.lengths
        self.rows = [list(old_rows[row]) for row in rows]
        self.lengths = [old_lengths[row] for row in rows]
        # Count the new owners before the old ones go, or a page kept by a reorder would pass through the free list.
        for pages in self.rows:
            self._owners.update(pages)
        for pages in old_rows:
            for page in pages:
                self._drop(page)

    def _plan(self, new_tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Return for each row (pages to copy, pages to add), with `extend`'s order of rows in mind."""
        if len(new_tokens) != len(self.rows):
            raise ValueError(f"new_tokens: expected {len(self.rows)} counts, one a row, got {len(new_tokens)}")
        left: Counter[int] = Counter()
        plan = []
        for pages, length, new in zip(self.rows, self.lengths, new_tokens, strict=True):
            if isinstance(new, bool) or not isinstance(new, int):
                raise TypeError(f"new_tokens: expected ints, got {type(new).__name__}")
            if new < 0:
                raise ValueError(f"new_tokens: expected counts of at least 0, got {new}")
            copied = 0
            if new and length % self.page_size:
                tail = pages[-1]
                copied = int(self._owners[tail] - left[tail] > 1)
                left[tail] += copied
            added = -(-(length + new) // self.page_size) - len(pages)
            plan.append((copied, added))
        return plan

    def _take(self) -> int:
        page = heapq.heappop(self._free)
        self._owners[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._owners[page] -= 1
        if not self._owners[page]:
            del self._owners[page]
            heapq.heappush(self._free, page)

    def _check_row(self, name: str, row: int) -> None:
        if not 0 <= row < len(self.rows):
            raise ValueError(f"{name}: expected a row from 0 to {len(self.rows) - 1}, got {row}")
