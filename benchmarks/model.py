"""Time one token of a Llama-shaped model: `twilight bench model`, without an installation. Options: --help."""

from __future__ import annotations

import sys

from twilight.resources import subpackage

if __name__ == "__main__":
    sys.exit(subpackage("benchmarks").main(["model", *sys.argv[1:]]))
