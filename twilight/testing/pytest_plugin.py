"""The conformance suite as pytest tests: ``-p twilight.testing.pytest_plugin``.

    @pytest.mark.twilight_selector("my_selector", window=16)
    def test_conforms(conformance):
        conformance()

is a test for each case, skipped where there is nothing to try. The marker takes what `check_selector` does. It is no
entry point of pytest's own: every test run in the environment would import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from twilight.testing.cases import CASES
from twilight.testing.suite import ConformanceError, run_suite

MARKER = "twilight_selector"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers", f"{MARKER}(selector, *, geometry=None, **options): the selector that `conformance` is held to"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test for each case."""
    if "_twilight_case" in metafunc.fixturenames:
        metafunc.parametrize("_twilight_case", list(CASES))


@pytest.fixture
def conformance(request: pytest.FixtureRequest, _twilight_case: str) -> Callable[[], None]:
    """A function that tries one case on the marker's selector."""
    marker = request.node.get_closest_marker(MARKER)
    if marker is None or len(marker.args) != 1:
        raise pytest.UsageError(
            f"{request.node.name}: `conformance` needs a selector: @pytest.mark.{MARKER}('my_selector')"
        )
    options: dict[str, Any] = dict(marker.kwargs)
    geometry = options.pop("geometry", None)

    def run() -> None:
        report = run_suite(marker.args[0], geometry=geometry, options=options, cases=[_twilight_case])
        (outcome,) = report.outcomes
        if outcome.status == "skipped":
            pytest.skip(outcome.detail)
        if outcome.status == "failed":
            raise ConformanceError(f"selector '{report.name}', {outcome.case}: {outcome.detail}")

    return run
