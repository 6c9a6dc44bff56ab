"""``make sanitize``: every tool of compute-sanitizer over every kernel file, a line each.

    python tests/sanitizer/sweep.py
    python tests/sanitizer/sweep.py --tool racecheck --kernel top_p spgemv

Every pair is a process of its own, so that one that dies takes no other along. Before a tool's turn, a kernel with an
error shows that the tool finds it: a filter that matches nothing would find nothing everywhere. Exits with 1 on
findings; their logs are in outputs/sanitizer.

What is expected of each tool:

- memcheck and initcheck run without torch's caching allocator, whose blocks are larger than what was asked for and have
  been written to by others. Graphs need it, and are replayed under racecheck and synccheck only.
- initcheck is shown pages and list entries that nobody has written, which kernels must not read, and copies every
  output to the host, which must have been written in full. What torch computes on the GPU inside of an operator (a
  budget in pages) comes from kernels that the filter leaves out: a tool that does not follow those gets no filter.
- racecheck looks at shared memory only. What blocks tell each other through global memory is tested by repeating runs
  bit by bit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.sanitizer import cases  # noqa: E402
from tests.sanitizer.run import TOOLS, functions  # noqa: E402

_ERRORS = 86
"""Exit status of compute-sanitizer for findings."""
_TIMEOUT = 124
_NO_CACHING = ("memcheck", "initcheck")
_OPTIONS = {"memcheck": ("--report-api-errors", "no")}  # torch tries what may not be there; ours raise in Python
_PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
_RUN = Path(__file__).with_name("run.py")


class Sanitizer:
    """The program, and where its logs go."""

    def __init__(self, program: str, logs: Path, timeout: float) -> None:
        self.program, self.logs, self.timeout = program, logs, timeout
        text = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
        self.follows_filtered = "initcheck-track-filtered-global-memory" in text
        logs.mkdir(parents=True, exist_ok=True)

    def command(self, tool: str, names: set[str], words: list[str]) -> list[str]:
        """Return the command that runs run.py with `words`, looking at kernels of these names."""
        filters = [word for name in sorted(names) for word in ("--kernel-name", f"kns=_Z{len(name)}{name}")]
        if tool == "initcheck" and not self.follows_filtered:
            filters = []
        options = [
            "--error-exitcode",
            str(_ERRORS),
            "--launch-timeout",
            "120",
            "--target-processes",
            "application-only",
        ]
        options += [*_OPTIONS.get(tool, ()), *filters]
        return [self.program, "--tool", tool, *options, sys.executable, str(_RUN), *words]

    def run(self, tool: str, name: str, names: set[str], words: list[str]) -> tuple[int, str, float]:
        """Run it, and return (exit status, what it printed, seconds)."""
        env = {**os.environ, "TWILIGHT_QUIET": "1"}
        if tool in _NO_CACHING:
            env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        start, log = time.perf_counter(), self.logs / f"{tool}-{name}.log"
        with log.open("w") as out:
            # A group of its own: the program under the tool must end with it.
            process = subprocess.Popen(
                self.command(tool, names, words), env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = _TIMEOUT
        return status, log.read_text(errors="replace"), time.perf_counter() - start


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--kernel", nargs="+", choices=cases.stems(), default=cases.stems(), metavar="STEM")
    parser.add_argument("--sanitizer", default=None, help="the program; looked for on the PATH and in /usr/local/cuda")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one tool and kernel file")
    parser.add_argument("--logs", type=Path, default=Path("outputs/sanitizer"))
    args = parser.parse_args(words)
    if cases.missing():
        print(f"no case in tests/sanitizer/cases.py for: {', '.join(cases.missing())}", file=sys.stderr)
        return 2
    program = args.sanitizer or next(filter(None, map(shutil.which, _PLACES)), None)
    if program is None:
        print("compute-sanitizer is not here: it is part of the CUDA toolkit; --sanitizer PATH", file=sys.stderr)
        return 2
    sanitizer, bad = Sanitizer(program, args.logs, args.timeout), 0
    for tool in args.tool:
        status, output, seconds = sanitizer.run(tool, "canary", {"canary"}, ["--canary", tool])
        # The status alone is not enough: a script that fails for another reason is an error to the tool as well.
        found = status == _ERRORS and re.search(r"^=+ .*\bcanary<", output, re.M) is not None
        print(f"{tool:<10} {'canary':<18} {'found' if found else 'NOT FOUND':<10} {seconds:6.1f} s", flush=True)
        if not found:
            print(f"  {tool} does not see a planted error (status {status}): {args.logs}/{tool}-canary.log", flush=True)
            bad += 1
            continue
        for stem in args.kernel:
            status, output, seconds = sanitizer.run(tool, stem, functions(stem), ["--kernel", stem])
            print(line(tool, stem, status, output, seconds), flush=True)
            bad += status != 0
    return int(bad > 0)


def line(tool: str, stem: str, status: int, output: str, seconds: float) -> str:
    """Say in a line how it went."""
    verdict = {0: "ok", _ERRORS: "FOUND", _TIMEOUT: "TIMEOUT"}.get(status, f"exit {status}")
    launches = re.search(rf"^{stem}: (\d+ launches.*)$", output, re.M)
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.M)
    said = ([launches[1]] if launches else []) + (summary[-1:] if status else [])
    return f"{tool:<10} {stem:<18} {verdict:<10} {seconds:6.1f} s  {'; '.join(said)}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
