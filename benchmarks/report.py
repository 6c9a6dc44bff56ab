"""Make tables and plots of results.

twilight bench report benchmarks/results/decode-nvidia-h200.json --table stages --cells 64:32k
twilight bench report benchmarks/results/decode-nvidia-h200.json --plot docs/images
twilight bench report --update README.md docs/kernels.md         what stands between bench marks, written anew
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .plot import save_plots
from .results import load
from .tables import TABLES, render, update


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line."""
    lines = __doc__.splitlines() if __doc__ else [""]
    parser = argparse.ArgumentParser(
        prog="twilight bench report",
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="FILE", help="results to print as a Markdown table")
    parser.add_argument("--table", choices=list(TABLES), help="which (default: speed, model or launch)")
    parser.add_argument("--cells", nargs="+", default=[], metavar="B:N", help="only these")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the results, too, into this folder")
    parser.add_argument("--update", nargs="+", default=[], type=Path, metavar="DOCUMENT", help="write its tables anew")
    args = parser.parse_args(list(words))
    if not (args.results or args.update):
        parser.error("nothing to do: give FILE or --update DOCUMENT")
    return args


def main(words: Sequence[str]) -> int:
    """Run ``twilight bench report``; return the exit status."""
    args = parse(words)
    for path in args.results:
        data = load(path)
        kind = args.table or (data["benchmark"] if data["benchmark"] in TABLES else "speed")
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        print(f"{path}: {data['gpu']}, {versions}, kernels {data['raw_kernels']}\n")
        print(render(kind, data, args.cells))
        if args.plot:
            print(*save_plots(data, args.plot, path.stem), sep="\n")
    for path in args.update:
        print(f"{path}: {'changed' if update(path) else 'as it was'}")
    return 0
