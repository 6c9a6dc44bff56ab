"""From which context length on sparse decoding is faster than dense: a table that a benchmark has measured.

`crossover.json` beside this file holds it, with the GPU and the results that it came from. `python
benchmarks/crossover.py RESULT.json ...` makes it anew; benchmarks/crossover.py says by which rule.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("crossover.json")


@dataclass(frozen=True)
class Crossover:
    """Where sparse decoding of one shape of attention begins to win.

    Attributes:
        kv_rows: sequences times kv heads: what there is to share among the multiprocessors.
        group: query heads of a kv head.
        tokens: the context length up to which dense is as fast.
    """

    kv_rows: int
    group: int
    tokens: int


@functools.cache
def table() -> tuple[Crossover, ...]:
    """Return the measured crossovers."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))["rows"]
    return tuple(Crossover(**row) for row in rows)


@functools.cache
def crossover(kv_rows: int, group: int) -> int:
    """Return the context length up to which decoding should be dense.

    Between what was measured it is taken from the nearest group, and of that from the next smaller number of kv rows,
    because more rows make sparse win earlier. Fewer rows than were measured have so much less to read: the tokens of
    all of them together stay the same.

    Args:
        kv_rows: sequences times kv heads.
        group: query heads of a kv head.
    """
    rows = table()
    nearest = min((row.group for row in rows), key=lambda known: (abs(math.log2(known / group)), known))
    rows = tuple(row for row in rows if row.group == nearest)
    smaller = [row for row in rows if row.kv_rows <= kv_rows]
    if smaller:
        return max(smaller, key=lambda row: row.kv_rows).tokens
    least = min(rows, key=lambda row: row.kv_rows)
    return -(-least.tokens * least.kv_rows // kv_rows)
