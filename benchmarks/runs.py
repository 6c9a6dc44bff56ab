"""What the benchmarks' command lines share: options, and the loop over cells."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from twilight import kernels
from twilight.checks import check_p

from .results import Results
from .timing import Deadline, OutOfTime


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that all benchmarks have."""
    parser.add_argument("--device", default="cuda", help="'cpu' runs every line on small sizes and times nothing real")
    parser.add_argument("--p", type=float, default=0.9, help="mass that top-p keeps (default 0.9)")
    parser.add_argument("--minutes", type=float, help="end after so many, with what is there by then")
    parser.add_argument("--missing", action="store_true", help="only what the file does not have yet")
    parser.add_argument("--out", type=Path, help="JSON file; cells of the same GPU, versions and kernels are merged")


def check_common(args: argparse.Namespace) -> torch.device:
    """Check the options of `add_common`, and return the device."""
    check_p(args.p)
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes: expected more than 0, got {args.minutes}")
    if args.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {args.repeats}")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cuda, cuda:1 or cpu, got '{args.device}'") from error
    if device.type != "cpu" and not kernels.available(device):
        raise ValueError(
            "--device: benchmarks need an NVIDIA GPU of compute capability 8.0 or more, and CuPy\n"
            "  see what is missing: twilight doctor\n"
            "  try the benchmark's own code: twilight bench --device cpu"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def run_all(
    cells: Sequence[Any], run: Callable[[Any], dict[str, Any]], fits: Callable[[Any], bool], results: Results,
    identify: Callable[[Any], dict[str, Any]], deadline: Deadline, *, missing: bool, say: Callable[[str], None],
) -> int:  # fmt: skip
    """Run cells one after another and keep each; return how many were not run though they were asked for.

    Args:
        cells: what to run; printed by `str`.
        run: measures one.
        fits: whether the memory is enough for it.
        results: where they are kept.
        identify: the fields that tell a cell's result from others.
        deadline: none is begun that would not end in time.
        missing: leave out what `results` has.
        say: prints a line.
    """
    left = 0
    for cell in cells:
        if missing and results.has(identify(cell)):
            say(f"{cell}: there already")
            continue
        if not deadline.begin():
            say(f"{cell}: no time left")
            left += 1
            continue
        if not fits(cell):
            say(f"{cell}: skipped, does not fit this card's memory")
            continue
        try:
            results.add(run(cell))
        except OutOfTime:
            say(f"{cell}: not finished in time")
            left += 1
            continue
        say(f"  {deadline.end():.0f} s in all")
    return left
