"""Time one decode step of one layer: `twilight bench decode`, without an installation. Options: --help."""

from __future__ import annotations

import sys

from twilight.resources import subpackage

if __name__ == "__main__":
    sys.exit(subpackage("benchmarks").main(["decode", *sys.argv[1:]]))
