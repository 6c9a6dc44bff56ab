"""Make `twilight/crossover.json`, the context lengths up to which `min_context="auto"` decodes densely.

    python benchmarks/crossover.py benchmarks/results/decode-nvidia-h200*.json
    python benchmarks/crossover.py RESULT.json --out -          print it instead

Measured are cells (batch, length, heads) of `benchmarks/decode.py`. Compared are "quest + top-p" and the dense kernel
that would run in its place, over the same pages. In a cell of N tokens where sparse takes s and dense t > s, sparse
wins from N * s / t on at the latest: it takes no longer on a shorter context, and dense at least t/N a token. The
crossover of a shape is the least of these bounds over its cells, but no less than the longest context at which dense
has won; the more lengths were measured, the closer it is. A shape where sparse has never won stays dense up to twice
the longest.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHOD = "quest + top-p"
ROOT = Path(__file__).resolve().parents[1]


def crossovers(results: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Return a row for each number of kv rows and group that `results` have cells of."""
    ratios: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for cell in (cell for result in results for cell in result["cells"]):
        paged = [times for name, times in cell["dense"].items() if name.startswith("twilight") and "paged" in name]
        if METHOD in cell["methods"] and paged:
            ratio = cell["methods"][METHOD]["total"]["us"] / paged[0]["us"]
            lengths = ratios[cell["batch"] * cell["kv_heads"], cell["q_heads"] // cell["kv_heads"]]
            # Cells that differ in what the table does not know of, such as head_dim: the worst counts.
            lengths[cell["length"]] = max(ratio, lengths.get(cell["length"], 0.0))
    rows = []
    for (kv_rows, group), lengths in sorted(ratios.items(), key=lambda item: (item[0][1], item[0][0])):
        won = [math.ceil(length * ratio) for length, ratio in lengths.items() if ratio < 1]
        lost = [length for length, ratio in lengths.items() if ratio >= 1]
        rows.append({"kv_rows": kv_rows, "group": group, "tokens": max([min(won), *lost]) if won else 2 * max(lost)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="what benchmarks/decode.py wrote")
    parser.add_argument("--out", default=str(ROOT / "twilight" / "crossover.json"), help="'-' is standard output")
    args = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    sources = [path.resolve() for path in args.results]
    table = {
        "sources": [
            {"file": path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name}
            | {key: result[key] for key in ("gpu", "raw_kernels")}
            for path, result in zip(sources, results, strict=True)
        ],
        "method": METHOD,
        "rows": crossovers(results),
    }
    text = json.dumps(table, indent=2) + "\n"
    if args.out == "-":
        sys.stdout.write(text)
    else:
        Path(args.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
