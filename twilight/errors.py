"""Errors, all in one style: what is wrong, what there is instead, what to run next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TwilightError(Exception):
    """Base of every error that the package raises on purpose."""


class OutOfPagesError(TwilightError, RuntimeError):
    """The page pool cannot hold what was asked for. The cache is as it was before the call."""


class UnknownNameError(TwilightError, ValueError):
    """A selector, pruner, policy or config group choice that nobody registered."""


class PluginError(TwilightError, RuntimeError):
    """A plugin that could not be loaded; raised only with ``TWILIGHT_STRICT=1``."""


class CalibrationError(TwilightError, ValueError):
    """A calibration file that is missing, malformed or made for another model."""


class UnsupportedModelError(TwilightError, ValueError):
    """A model, cache or mask that the transformers integration cannot serve."""


class KernelError(TwilightError, RuntimeError):
    """A CUDA kernel that does not compile, spills, or has no GPU that could run it."""


class MissingExtraError(TwilightError, ImportError):
    """An optional dependency that is not installed."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'quest'?"`` for the closest of `options`, or an empty string."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown_name(kind: str, name: str, options: Sequence[str], *, see: str) -> UnknownNameError:
    """Build the error for an unregistered `name`.

    Args:
        kind: what was looked up, as a user would call it ("selector").
        name: what was asked for.
        options: the names there are.
        see: the command that lists them.
    """
    there = ", ".join(sorted(options)) or "none"
    return UnknownNameError(f"no {kind} '{name}'.{did_you_mean(name, options)}\n  installed: {there}  ({see})")


def missing_extra(module: str, extra: str, purpose: str) -> MissingExtraError:
    """Build the error for an import that needs an extra of this distribution."""
    return MissingExtraError(f"{purpose} needs '{module}': pip install 'twilight-attn[{extra}]'")
