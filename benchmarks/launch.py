"""Time what the host does for a call: `twilight bench launch`, without an installation. Options: --help."""

from __future__ import annotations

import sys

from twilight.resources import subpackage

if __name__ == "__main__":
    sys.exit(subpackage("benchmarks").main(["launch", *sys.argv[1:]]))
