"""``make compat``: the first and the last instantiation of every kernel file, with the oldest supported compiler.

    python tests/compat/nvrtc.py sm_80 sm_90

PTX that a newer compiler takes may be more than CUDA 12.4 knows. Only whether it compiles is looked at: spills are for
the compiler in constraints.txt. Exits with 1 on what does not compile.
"""

from __future__ import annotations

import sys

from twilight import kernels
from twilight.compiling import compile_source
from twilight.errors import KernelError


def main(archs: list[str]) -> int:
    """Compile for `archs` and print a line a file; return the exit status."""
    print(kernels.versions())
    failed = 0
    for stem, expressions in kernels.instantiations():
        ends = tuple(dict.fromkeys((expressions[0], expressions[-1])))
        try:
            for arch in archs:
                compile_source(stem, ends, arch)
        except KernelError as error:
            failed += 1
            print(f"{stem}: {error}")
        else:
            print(f"{stem}: {len(ends)} for {', '.join(archs)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
