"""Benchmarks: one decode step of one layer, one token of a whole model, the host's part, and what reports are made of.

    twilight bench [decode]            one layer, stage by stage, against the dense kernels of the same run
    twilight bench model               one token of a Llama-shaped model
    twilight bench launch              what the host does for a call of each operator
    twilight bench report FILE ...     tables and plots from results

In a checkout `python benchmarks/decode.py`, `benchmarks/model.py` and `benchmarks/launch.py` do the same.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(words: Sequence[str]) -> int:
    """Run ``twilight bench`` with those words; return the exit status."""
    verb, rest = (words[0], words[1:]) if words and not words[0].startswith("-") else ("decode", words)
    if verb == "decode":
        from . import layer_step

        return layer_step.main(rest)
    if verb == "model":
        from . import model_step

        return model_step.main(rest)
    if verb == "launch":
        from . import host_cost

        return host_cost.main(rest)
    if verb == "report":
        from . import report

        return report.main(rest)
    from twilight.errors import unknown_name

    raise unknown_name("benchmark", verb, ["decode", "model", "launch", "report"], see="twilight bench --help")
