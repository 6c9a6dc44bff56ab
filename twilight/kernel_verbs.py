"""``twilight kernels list|compile|warmup|clear``: what there is to compile, and compiling it ahead of its first use."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from twilight import compiling, kernels
from twilight.compiling import Resources, Results
from twilight.errors import KernelError
from twilight.resources import checkout


def main(words: Sequence[str]) -> int:
    """Run the verb and return the exit status."""
    args = _parser().parse_args(words)
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "twilight kernels",
        description="The CUDA kernels. They are compiled at their first use; these verbs look at them, or do it ahead.",
    )
    verbs = parser.add_subparsers(required=True, metavar="list|compile|warmup|clear")

    def verb(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        sub.set_defaults(run=run)
        if name != "clear":
            sub.add_argument(
                "--stem", nargs="+", default=[], metavar="STEM", help="only these files of raw_kernels, such as spgemv"
            )
        return sub

    listed = verb("list", _list, "kernel files, their instantiations, and which of them are compiled for this GPU")
    listed.add_argument("--json", action="store_true", help="as data")
    compiled = verb("compile", _compile, "compile all without a GPU; fail on spills and local memory")
    compiled.add_argument(
        "--arch", nargs="+", metavar="ARCH", help="sm_80, sm_90, ...; by default these two and the newest there is"
    )
    compiled.add_argument("--fresh", action="store_true", help="compile what has been compiled before, too")
    compiled.add_argument("--verbose", action="store_true", help="print every instantiation")
    warm = verb("warmup", _warmup, "compile all for this GPU, into CuPy's disk cache")
    for sub in (compiled, warm):
        sub.add_argument("--jobs", type=_positive, metavar="N", help="processes; one a core by default")
    verb("clear", _clear, "delete the compiled kernels from CuPy's disk cache")
    return parser


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _list(args: argparse.Namespace) -> int:
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    if index is not None and not kernels.available(torch.device("cuda", index)):
        index = None
    files = dict(kernels.instantiations(args.stem))
    cached = {
        stem: [index is not None and kernels.is_cached(stem, each, index) for each in expressions]
        for stem, expressions in files.items()
    }
    if args.json:
        compiled = {stem: None if index is None else marks for stem, marks in cached.items()}
        rows = [{"stem": stem, "instantiations": files[stem], "compiled": compiled[stem]} for stem in files]
        print(json.dumps(rows, indent=2))
        return 0
    console = Console(soft_wrap=True)
    table = Table("file", "instantiations", *([] if index is None else ["compiled"]), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for stem, expressions in files.items():
        counts = [len(expressions)] + ([] if index is None else [sum(cached[stem])])
        table.add_row(f"{stem}.cu", *map(str, counts))
    console.print(table)
    for stem, expressions in files.items() if args.stem else ():
        for expression, mark in zip(expressions, cached[stem], strict=True):
            console.print(f"  {escape(expression)}{'  [green]compiled[/]' if mark else ''}", highlight=False)
    if index is None:
        console.print("no GPU here that the kernels run on", highlight=False)
    else:
        name, arch = torch.cuda.get_device_name(index), kernels.arch_of(index)
        console.print(f"for {name} ({arch}) with {kernels.versions()}, in {kernels.cache_dir()}", highlight=False)
    return 0


def _compile(args: argparse.Namespace) -> int:
    archs = _check_archs(args.arch)
    start = time.perf_counter()
    results = Results(_results_folder())
    before: list[int] = []
    with _progress(f"compiling for {', '.join(archs)}") as tell:

        def progress(done: int, total: int) -> None:
            before.append(done)
            tell(done, total)

        try:
            found = compiling.compile_all(
                archs, args.stem, jobs=args.jobs, results=results, fresh=args.fresh, progress=progress
            )
        finally:
            wall = time.perf_counter() - start
    if args.verbose:
        print(*found, sep="\n")
    _print_summary(found, archs)
    known = before[0]
    print(
        f"{len(found)} instantiations with {kernels.versions()}: {len(found) - known} compiled in {wall:.0f} s, "
        f"{known} known from before"
    )
    wasteful = [each for each in found if each.wasteful]
    if wasteful:
        raise KernelError("kernels use local memory:\n  " + "\n  ".join(map(str, wasteful)))
    return 0


def _check_archs(archs: Sequence[str] | None) -> tuple[str, ...]:
    if not archs:
        return compiling.default_archs()
    there = compiling.supported_archs()
    for arch in archs:
        # sm_90a and sm_100f are of the family of the architecture that they begin with.
        if arch.rstrip("af") not in there:
            raise ValueError(f"--arch: {kernels.versions()} knows {', '.join(there)}, not {arch}")
    return tuple(dict.fromkeys(archs))


def _results_folder() -> Path | None:
    repository = checkout()
    return None if repository is None else repository / ".compiled"


def _print_summary(found: Sequence[Resources], archs: Sequence[str]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    for name in ("instantiations", *archs, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for stem in dict.fromkeys(each.stem for each in found):
        of_file = [each for each in found if each.stem == stem]
        most = [max(each.registers for each in of_file if each.arch == arch) for arch in archs]
        style = "red" if any(each.wasteful for each in of_file) else None
        seconds = sum(each.seconds for each in of_file)
        table.add_row(f"{stem}.cu", str(len(of_file)), *map(str, most), f"{seconds:.1f}", style=style)
    Console().print(table)
    print(f"({', '.join(archs)}: registers of a thread at most; seconds of one core)")


def _warmup(args: argparse.Namespace) -> int:
    with _progress("compiling") as tell:
        count = compiling.warmup(args.stem, jobs=args.jobs, progress=tell)
    print(f"{count} kernels ready in {kernels.cache_dir()}")
    return 0


def _clear(args: argparse.Namespace) -> int:
    print(f"deleted {kernels.clear()} files from {kernels.cache_dir()}")
    return 0


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show one line on stderr: a bar on a terminal, and elsewhere what there is to do and every quarter of it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        told: list[int] = []

        def tell(done: int, total: int) -> None:
            quarter = 4 * done // max(total, 1)
            if done < total and quarter not in told:
                told.append(quarter)
                print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
