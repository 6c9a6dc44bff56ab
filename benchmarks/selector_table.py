"""Every selector with and without top-p, in a table: out of the rows of a sweep's report.

    twilight sweep 'selector=glob(*)' pruner=none,top_p p=0.95 task=fidelity,perplexity,facts task.context=8192,16384
    twilight report runs --out report
    python -m benchmarks.selector_table report/rows.csv --contexts 8192 16384 --update docs/selectors.md

The table stands between the marks <!-- selectors --> and <!-- /selectors --> of the document; or it is printed.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .tables import markdown

_MARKED = re.compile(r"(<!-- selectors -->\n).*?(<!-- /selectors -->)", re.S)
_HEAD = (
    "selector", "pruner", "bytes read", "B0", "B1, query head", "B1, kv head", "true mass", "output error",
    "bits per byte, against dense", "facts",
)  # fmt: skip


@dataclass
class Line:
    """What was measured of one selector, pruner and context: sums over rows, and how many there were."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, row: Mapping[str, str], names: Iterable[str]) -> None:
        for name in names:
            if row.get(name):
                self.sums[name] += float(row[name])
                self.rows[name] += 1

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.rows[name] if self.rows[name] else None


_COLUMNS = {
    "fidelity": ("mass", "output_error"),
    "perplexity": ("delta_bits", "delta_stderr", "kv_fraction", "b0", "b1_query", "b1_group"),
    "facts": ("correct", "asked"),
}
"""What is taken from which task: budgets are those of the scored tokens of a text."""


def lines(rows: Iterable[Mapping[str, str]], p: float) -> dict[tuple[str, str, str], Line]:
    """Gather rows of a report by (context, selector, pruner): without a pruner, and with top-p at p."""
    found: dict[tuple[str, str, str], Line] = {}
    for row in rows:
        pruned = row["pruner"] == "top_p" and float(row["p"] or 0) == p
        if row["method"] == "twilight" and row["task"] in _COLUMNS and (pruned or row["pruner"] == "none"):
            line = found.setdefault((row["context"], row["selector"], row["pruner"]), Line())
            line.add(row, _COLUMNS[row["task"]])
    return found


def table(found: Mapping[tuple[str, str, str], Line], context: int) -> str:
    """Return the Markdown table of one context.

    Raises:
        ValueError: there is nothing of that context.
    """
    mine = {key[1:]: line for key, line in found.items() if key[0] and float(key[0]) == context}
    if not mine:
        raise ValueError(f"--contexts: no rows of {context} tokens")
    rows = []
    for (selector, pruner), line in sorted(mine.items()):
        asked = line.sums["asked"]
        rows.append([
            f"`{selector}`", pruner, _said(line.mean("kv_fraction"), ".1%"),
            *(_said(line.mean(name), ".0f") for name in ("b0", "b1_query", "b1_group")),
            _said(line.mean("mass"), ".3f"), _said(line.mean("output_error"), ".3f"),
            f"{_said(line.mean('delta_bits'), '+.4f')} ± {_said(line.mean('delta_stderr'), '.4f')}",
            f"{line.sums['correct']:.0f} of {asked:.0f}" if asked else "",
        ])  # fmt: skip
    return markdown(_HEAD, rows)


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables, or put them into a document."""
    parser = argparse.ArgumentParser("selector_table", description="Selectors with and without top-p, in a table.")
    parser.add_argument("rows", type=Path, help="rows.csv of `twilight report`")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--p", type=float, default=0.95)
    parser.add_argument("--update", type=Path, help="a document with the marks")
    args = parser.parse_args(words)
    with args.rows.open(encoding="utf-8", newline="") as file:
        found = lines(csv.DictReader(file), args.p)
    try:
        text = "\n".join(f"{context} tokens:\n\n{table(found, context)}" for context in args.contexts)
        if args.update is None:
            print(text, end="")
            return 0
        old = args.update.read_text(encoding="utf-8")
        new, count = _MARKED.subn(lambda match: match[1] + text + match[2], old)
        if not count:
            raise ValueError(f"--update: {args.update} has no mark <!-- selectors -->")
        args.update.write_text(new, encoding="utf-8")
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _said(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if form == ".1%" else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
