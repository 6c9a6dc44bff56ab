"""The process under compute-sanitizer: run the cases of one kernel file, or of all.

    compute-sanitizer --tool memcheck --kernel-name kns=_Z6spgemv python tests/sanitizer/run.py --kernel spgemv
    python tests/sanitizer/run.py --cpu                    a dry run through the torch references
    python tests/sanitizer/run.py --canary memcheck        a kernel with an error that the tool must find

`make sanitize` runs every tool over every file. Exits with 1 if a file's kernels did not run, and 2 if a file of
raw_kernels has no case.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from tests.sanitizer import cases  # noqa: E402
from twilight import kernels  # noqa: E402
from twilight.errors import unknown_name  # noqa: E402
from twilight.ops import scratch  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
"""In the order of the faults of canary.cu."""
_THREADS = (32, 64, 32, 32)
"""Threads that the faults need."""


class CanaryParams(ctypes.Structure):
    """Mirrors the struct of canary.cu."""

    _fields_ = [("out", ctypes.c_void_p), ("input", ctypes.c_void_p)]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", metavar="STEM", help="only this file; may be repeated")
    parser.add_argument("--cpu", action="store_true", help="run the references instead, which needs no GPU")
    parser.add_argument("--canary", choices=TOOLS, help="make the error that a tool is for")
    args = parser.parse_args(words)
    if args.canary:
        return canary(TOOLS.index(args.canary))
    if cases.missing():
        print(f"no case in tests/sanitizer/cases.py for: {', '.join(cases.missing())}", file=sys.stderr)
        return 2
    stems = args.kernel or cases.stems()
    for stem in stems:
        if stem not in cases.CASES:
            print(unknown_name("case", stem, sorted(cases.CASES), see="tests/sanitizer/cases.py"), file=sys.stderr)
            return 2
    return max(run(stem, "cpu" if args.cpu else "cuda") for stem in stems)


def run(stem: str, device: str) -> int:
    """Run a file's cases, print what was launched, and return the exit status."""
    launched = count_launches()
    if device == "cuda":
        initialise_counters()
    for function in cases.CASES[stem]:
        for made in function(cases.At(device)):
            for tensor in tensors(made):
                tensor.cpu()  # initcheck reports what the kernel has left out
    if device == "cpu":
        print(f"{stem}: {len(cases.CASES[stem])} case(s) through the reference")
        return 0
    torch.cuda.synchronize()
    own = {each: count for each, count in launched.items() if each.partition("<")[0] in functions(stem)}
    print(f"{stem}: {sum(own.values())} launches of {len(own)} instantiations", flush=True)
    if not own:
        print(f"{stem}: none of its kernels ran: {', '.join(launched) or 'nothing did'}", file=sys.stderr)
    return 0 if own else 1


def functions(stem: str) -> set[str]:
    """Return the names of a file's kernels."""
    return {each.partition("<")[0] for _, all_of in kernels.instantiations([stem]) for each in all_of}


def tensors(made: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a result."""
    if isinstance(made, torch.Tensor):
        yield made
    elif isinstance(made, tuple):
        for each in made:
            yield from tensors(each)
    elif made is not None:
        raise TypeError(f"a case yielded {type(made).__name__}: expected tensors that the kernel writes in full")


def count_launches() -> Counter[str]:
    """Count every launch from now on, by instantiation."""
    launched: Counter[str] = Counter()
    launch = kernels.Kernel.launch

    def counted(self: kernels.Kernel, *args: Any, **options: Any) -> None:
        launched[self.expression] += 1
        launch(self, *args, **options)

    kernels.Kernel.launch = counted  # type: ignore[method-assign]
    return launched


def initialise_counters() -> None:
    """Make the counters that kernels share ahead, by a copy: a tool need not see what torch's kernels write."""
    scratch.counters(torch.device("cuda"), 1)
    for slab in scratch._slabs.values():
        slab.copy_(torch.zeros(slab.shape, dtype=slab.dtype))


def canary(fault: int) -> int:
    """Launch the kernel that has an error."""
    kernel = kernels.load("canary", f"canary<{fault}>", structs=(CanaryParams,), source_folder=Path(__file__).parent)
    out, read = (torch.empty(32, dtype=torch.int32, device="cuda") for _ in range(2))
    kernel.launch((1, 1, 1), (_THREADS[fault], 1, 1), CanaryParams(out.data_ptr(), read.data_ptr()))
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
