"""Makes `twilight.benchmarks` importable where the package runs from a plain checkout."""

from __future__ import annotations

from twilight.resources import subpackage

subpackage("benchmarks")
