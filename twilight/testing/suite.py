"""Running the cases over a selector: by class, instance, name or module."""

from __future__ import annotations

import copy
import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import twilight
from twilight import parameters
from twilight.errors import TwilightError, unknown_name
from twilight.registry import check_selector_class, registry
from twilight.selector import Selector
from twilight.testing.cases import CASES
from twilight.testing.world import Failure, Skip, Subject


class ConformanceError(TwilightError, AssertionError):
    """A selector that does not do what every selector is expected to do."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: its name.
        status: ``"passed"``, ``"failed"`` or ``"skipped"``.
        about: what was expected.
        detail: what was met instead, or why it was skipped.
    """

    case: str
    status: str
    about: str
    detail: str = ""


@dataclass
class Report:
    """What became of a selector.

    Attributes:
        name: the selector's.
        outcomes: one for each case.
    """

    name: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failures(self) -> list[Outcome]:
        """The cases that failed."""
        return [each for each in self.outcomes if each.status == "failed"]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"selector": self.name, "passed": not self.failures, "cases": [vars(each) for each in self.outcomes]}


def check_selector(
    selector: str | type[Selector] | Selector, /, *, geometry: Mapping[str, int] | None = None, **options: Any
) -> Report:
    """Hold a selector to everything that is expected of one.

    Args:
        selector: a class, an instance, a name that is registered, or ``"module"`` or ``"module:Class"``.
        geometry: sizes of the caches that it is tried on: `num_kv_heads` (2), `head_dim` (64), `num_layers` (2) and
            `page_size` (16), where it is calibrated for others.
        options: its parameters, unless it is an instance.

    Returns:
        What became of each case; some may be skipped, where there is no GPU.

    Raises:
        ConformanceError: what was expected, and what was met instead, for each case that failed.
        ValueError, TypeError: there is no such selector or option, or it does not fit the geometry.
    """
    report = run_suite(selector, geometry=geometry, options=options)
    if report.failures:
        lines = [f"  {each.case}: {each.detail}".replace("\n", "\n  ") for each in report.failures]
        raise ConformanceError(
            f"selector '{report.name}': {len(report.failures)} of {len(report.outcomes)} cases failed\n"
            + "\n".join(lines)
        )
    return report


def check_case(
    case: str,
    selector: str | type[Selector] | Selector,
    /,
    *,
    geometry: Mapping[str, int] | None = None,
    **options: Any,
) -> Outcome:
    """Do as `check_selector` with one case, by name."""
    if case not in CASES:
        raise unknown_name("case", case, list(CASES), see="twilight plugins check --help")
    report = run_suite(selector, geometry=geometry, options=options, cases=[case])
    (outcome,) = report.outcomes
    if outcome.status == "failed":
        raise ConformanceError(f"selector '{report.name}', {case}: {outcome.detail}")
    return outcome


def run_suite(
    selector: str | type[Selector] | Selector,
    *,
    geometry: Mapping[str, int] | None = None,
    options: Mapping[str, Any] | None = None,
    cases: Sequence[str] = (),
    tell: Callable[[Outcome], None] = lambda outcome: None,
) -> Report:
    """Run the cases, or some of them, and return what became of each; `tell` is told at once."""
    name, make = _resolve(selector, options or {})
    known = {"num_kv_heads", "head_dim", "num_layers", "page_size"}
    for key in geometry or {}:
        if key not in known:
            raise unknown_name("size", key, sorted(known), see="twilight plugins check --help")
    subject = Subject(make, **dict(geometry or {}))  # type: ignore[arg-type]
    make().prepare(subject.geometry())  # what does not fit is no failure of a case
    report = Report(name)
    for case in CASES.values():
        if cases and case.name not in cases:
            continue
        status, detail = "passed", ""
        try:
            case.run(subject)
        except Skip as skip:
            status, detail = "skipped", str(skip)
        except Failure as failure:
            status, detail = "failed", str(failure)
        except Exception as error:
            status, detail = "failed", _raised(error)
        report.outcomes.append(Outcome(case.name, status, case.about, detail))
        tell(report.outcomes[-1])
    return report


def _raised(error: Exception) -> str:
    """Say what was raised, and at which line of the selector's."""
    frames = traceback.extract_tb(error.__traceback__)
    known = tuple(str(Path(str(module.__file__)).parent) for module in (twilight, torch))
    outside = [frame for frame in frames if not frame.filename.startswith((*known, "<"))]
    at = (outside or list(frames))[-1]
    return f"raised {type(error).__name__}: {error} ({at.filename}:{at.lineno})"


def _resolve(
    selector: str | type[Selector] | Selector, options: Mapping[str, Any]
) -> tuple[str, Callable[[], Selector]]:
    if isinstance(selector, Selector):
        if options:
            raise TypeError(f"selector: expected a class or a name with options {sorted(options)}, got an instance")
        check_selector_class(type(selector))
        return selector.name, lambda: copy.deepcopy(selector)
    cls = _find(selector) if isinstance(selector, str) else selector
    check_selector_class(cls)

    def make() -> Selector:
        return parameters.create(cls, f"selector '{cls.name}'", options, see=f"twilight plugins info {cls.name}")

    make()  # a wrong option is no failure of a case
    return cls.name, make


def _find(target: str) -> type[Selector]:
    """Return the class that is registered under a name, or that ``module`` or ``module:Class`` names."""
    module, _, attribute = target.partition(":")
    if not attribute and target in registry().selectors():
        return registry().get_selector(target)
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        if not attribute and "." not in target:
            raise registry().unknown_selector(target) from None
        raise ValueError(f"no module '{module}'; is it installed here?  (twilight plugins list)") from None
    found = {
        name: each
        for name, each in vars(loaded).items()
        if isinstance(each, type) and issubclass(each, Selector) and each.__module__ == loaded.__name__ and each.name
    }
    if attribute:
        if attribute not in vars(loaded):
            raise unknown_name(f"class in {module}", attribute, list(found), see=f"python -c 'import {module}'")
        return vars(loaded)[attribute]
    if len(found) != 1:
        there = ", ".join(f"{module}:{name}" for name in found) or "none"
        raise ValueError(f"{module}: expected one selector, found {there}; say which")
    return next(iter(found.values()))
