"""The conformance suite: what every selector is held to, as a function, ``twilight plugins check`` and pytest tests.

    from twilight.testing import check_selector
    check_selector(MySelector, window=16)          # raises ConformanceError, which says what was expected where

As pytest tests, one for each case, with ``-p twilight.testing.pytest_plugin``:

    @pytest.mark.twilight_selector("my_selector", window=16)
    def test_conforms(conformance):
        conformance()
"""

from __future__ import annotations

from twilight.testing.cases import CASES
from twilight.testing.suite import ConformanceError, Outcome, Report, check_case, check_selector, run_suite

__all__ = [
    "CASES",
    "ConformanceError",
    "Outcome",
    "Report",
    "check_case",
    "check_selector",
    "run_suite",
]
