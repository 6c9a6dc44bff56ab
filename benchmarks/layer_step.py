"""Time one decode step of one layer, stage by stage, against the best dense kernel of the same run.

    twilight bench                                                  a few cells, into benchmarks/results/
    twilight bench --cells 64:32k 1:128k --heads 32/8 32/32
    twilight bench --selector mine mine:recent=4                    a plugin's selectors beside the others
    twilight bench --grid --missing --minutes 9                     again and again, until the grid is full

Every number is microseconds a layer from replays of a CUDA graph that goes through so many layers that each finds the
L2 cache full of the others: median over `--repeats`, 10th and 90th percentile. Stages are captured alone, over what the
stage before left. `total` is `TwilightAttention.attend` as it is, `decode` the whole `TwilightAttention.decode`, and
`append` its first line. Budgets do not change between the layers of a step: they are resolved once a step, which is
timed apart, as `budget`.

Bytes are those that a method cannot avoid: metadata, 4-bit keys of the candidates, K and V of what is kept. `floor` is
the share of `--bandwidth` at which they moved. Outputs are compared with the reference in the same run; a wrong one
ends it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from .cell import Options, free_bytes, run_cell
from .cells import GRID_HEADS, make_cells
from .methods import by_name
from .results import Results, default_path, header
from .runs import add_common, check_common, run_all
from .timing import Deadline, copy_bandwidth

_CELLS = ("1:8k", "1:32k", "1:128k", "8:32k", "64:32k")
_CPU_CELLS = ("1:512", "2:1k")
KNOWN_BANDWIDTH = {"H200": 4.2}
"""TB/s by which floors are counted on cards whose copy was measured with care; others are measured in each run."""


def floor_bandwidth(device: torch.device, given: float | None, name: str, say: Callable[[str], None]) -> float:
    """Return the TB/s that floors are counted at."""
    measured = copy_bandwidth(device)
    known = next((value for card, value in KNOWN_BANDWIDTH.items() if card in name), measured)
    chosen = known if given is None else given
    say(f"{name}: a copy moves {measured:.3g} TB/s, floors are counted at {chosen:.3g}")
    return chosen


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line."""
    lines = __doc__.splitlines() if __doc__ else [""]
    parser = argparse.ArgumentParser(
        prog="twilight bench", description=lines[0], epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--cells", nargs="+", metavar="B:N", help=f"batch:length (default {' '.join(_CELLS)})")
    parser.add_argument("--grid", action="store_true", help="all of 1, 8, 32, 64 times 8k, 32k, 128k that fit")
    parser.add_argument("--heads", nargs="+", metavar="Q/KV", help="query/kv heads (default 32/8; --grid also 32/32)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15, help="replays of each graph (default 15)")
    parser.add_argument(
        "--bandwidth",
        type=float,
        help="TB/s that floors are counted at (default: 4.2 on an H200, elsewhere what a copy reaches)",
    )
    parser.add_argument(
        "--selector",
        nargs="+",
        default=[],
        metavar="NAME[:OPTION=VALUE,...]",
        help="installed selectors to time beside the others, such as mine or mine:recent=4",
    )
    add_common(parser)
    args = parser.parse_args(list(words))
    if not args.heads:
        args.heads = list(GRID_HEADS) if args.grid else ["32/8"]
    if not (args.cells or args.grid):
        args.cells = list(_CPU_CELLS if args.device == "cpu" else _CELLS)
    return args


def main(words: Sequence[str], say: Callable[[str], None] = lambda line: print(line, flush=True)) -> int:
    """Run ``twilight bench decode``; return the exit status."""
    args = parse(words)
    if args.bandwidth is not None and not args.bandwidth > 0:
        raise ValueError(f"--bandwidth: expected more than 0 TB/s, got {args.bandwidth}")
    cells = make_cells(args.cells, args.heads, grid=args.grid, head_dim=args.head_dim, page_size=args.page_size)
    device = check_common(args)
    selectors = by_name(args.selector)
    deadline = Deadline(args.minutes)
    head = header("decode", device)
    results = Results(args.out or default_path(head), head)
    bandwidth = floor_bandwidth(device, args.bandwidth, head["gpu"], say)
    options = Options(device, args.p, args.repeats, bandwidth, say, selectors)
    left = run_all(
        cells,
        lambda cell: run_cell(cell, options, deadline),
        lambda cell: cell.fits(free_bytes(device)),
        results,
        lambda cell: cell.as_dict() | {"p": args.p},
        deadline,
        missing=args.missing,
        say=say,
    )
    say(f"{results.path}" + (f": {left} cells are missing, run again with --missing" if left else ""))
    return 0
