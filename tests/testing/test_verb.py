"""`twilight plugins check`, and the suite as pytest tests."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.testing import broken
from twilight import cli
from twilight.registry import registry
from twilight.testing import CASES


def test_what_passes_is_told_and_the_status_is_0(capsys):
    assert cli.main(["plugins", "check", "streaming_llm", "sinks=2", "--case", "form", "ranking"]) == 0
    said = capsys.readouterr().out
    assert "passed   form" in said
    assert "skipped  ranking" in said
    assert "selector 'streaming_llm': 1 passed, 1 skipped" in said


def test_what_fails_is_told_and_the_status_is_1(capsys):
    assert cli.main(["plugins", "check", "tests.testing.broken:OneMore", "--case", "form", "budget"]) == 1
    said = capsys.readouterr().out
    assert "failed   budget" in said
    assert "over budget: expected at most 1 tokens" in said
    assert "selector 'sound': 1 passed, 1 failed" in said


def test_as_data(capsys):
    assert cli.main(["plugins", "check", "tests.testing.broken:Waits", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["selector"] == "sound"
    assert [case["case"] for case in data["cases"]] == list(CASES)
    assert [case["case"] for case in data["cases"] if case["status"] == "failed"] == ["host"]


def test_options_are_typed_and_sizes_are_those_asked_for(capsys):
    assert cli.main(["plugins", "check", "sparq", "channels=40", "--case", "form"]) == 0
    assert cli.main(["plugins", "check", "sparq", "channels=40", "--head-dim", "32", "--case", "form"]) == 1
    assert "channels: expected at most head_dim=32, got 40" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["qest"], 2, "no selector 'qest'. Did you mean 'quest'?"),
        (["quest", "reduc=sum"], 2, "no parameter 'reduc'"),
        (["quest", "sum"], 1, "sum: expected OPTION=VALUE"),
        (["quest", "reduce=1"], 1, "reduce: expected str, got int 1"),
        (["quest", "--case", "budgt"], 2, "no case 'budgt'. Did you mean 'budget'?"),
        (["tests.testing.broken"], 1, "expected one selector, found tests.testing.broken:Sound"),
        (["double_sparsity"], 1, "twilight calibrate double_sparsity"),
    ],
)
def test_what_is_asked_wrongly_is_explained(words, status, said, capsys):
    assert cli.main(["plugins", "check", *words]) == status
    assert said in capsys.readouterr().err


def test_the_pytest_plugin_makes_a_test_of_each_case(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import pytest\nfrom twilight_selectors.full import Full\n"
        "@pytest.mark.twilight_selector('streaming_llm', sinks=2)\ndef test_named(conformance): conformance()\n"
        "@pytest.mark.twilight_selector(Full, geometry={'head_dim': 32})\ndef test_class(conformance): conformance()\n"
        "@pytest.mark.twilight_selector('streaming_llm', sinks=-1)\ndef test_wrong(conformance): conformance()\n"
        "def test_unmarked(conformance): conformance()\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "--strict-markers", "-p", "twilight.testing.pytest_plugin"]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    for case in CASES:
        for test in ("named", "class", "wrong", "unmarked"):
            assert f"::test_{test}[{case}] " in done.stdout
    assert "test_named[form] PASSED" in done.stdout
    assert "test_named[metadata] SKIPPED" in done.stdout
    assert "test_wrong[form] FAILED" in done.stdout
    assert "sinks: expected at least 0, got -1" in done.stdout
    assert "`conformance` needs a selector" in done.stdout


def test_a_selector_that_was_registered_by_hand_is_found_by_name(site, capsys):
    registry().register(broken.Sound)
    assert cli.main(["plugins", "check", "sound", "--case", "form", "host"]) == 0
