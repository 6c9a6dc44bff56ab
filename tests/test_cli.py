"""The command line: verbs, exit statuses, what goes to which stream, and sweeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.test_registry import BUILTIN
from twilight import __version__
from twilight.cli import decode, main
from twilight.errors import CalibrationError


@pytest.fixture
def runs(site, monkeypatch, tmp_path) -> list[dict[str, Any]]:
    """The configurations that decode would have run, in a folder of their own."""
    seen: list[dict[str, Any]] = []

    def run(cfg: Any) -> dict[str, Any]:
        seen.append(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        return {}

    monkeypatch.setattr("twilight.decoding.run", run)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return seen


# Verbs.


def test_help_names_every_verb(site, capsys):
    for words in ([], ["help"], ["--help"], ["-h"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        for verb in ("decode", "plugins", "doctor", "calibrate", "version"):
            assert f"  {verb} " in text


def test_version(capsys):
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_an_unknown_verb_gets_a_hint(site, capsys):
    assert main(["decod"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no verb 'decod'. Did you mean 'decode'?\n")


def test_calibrate_is_handed_the_words(site, monkeypatch):
    seen = []
    monkeypatch.setattr("twilight.calibration.main", lambda words: seen.append(words) or 0)
    assert main(["calibrate", "double_sparsity", "--model", "x"]) == 0
    assert seen == [["double_sparsity", "--model", "x"]]


def test_errors_are_one_line_and_debugging_shows_where(site, monkeypatch, capsys):
    def fail(words: Any) -> int:
        raise CalibrationError("no such file")

    monkeypatch.setattr("twilight.calibration.main", fail)
    assert main(["calibrate"]) == 1
    assert capsys.readouterr().err == "error: no such file\n"
    monkeypatch.setenv("TWILIGHT_DEBUG", "1")
    assert main(["calibrate"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_installed_command_survives_a_broken_plugin(site):
    site.install("twx-bad", {"bad": "nowhere_at_all"}, {})
    command = [str(Path(sys.executable).parent / "twilight"), "decode", "--cfg", "job", "selector=full"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(site.folder), "PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    assert "name: full" in done.stdout
    assert done.stderr.splitlines() == [
        "warning: plugin 'twx-bad 0.2, entry point 'bad'' failed to load: "
        "ModuleNotFoundError: No module named 'nowhere_at_all'  (twilight doctor)"
    ]


# Plugins.


def test_plugins_list_shows_what_loaded_and_what_did_not(site, capsys):
    site.install("twx-bad", {"bad": "nowhere_at_all"}, {})
    site.install("twx-newest", {"newest": "newest:Newest"})
    assert main(["plugins", "list", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = {each["name"]: each for each in json.loads(captured.out)}
    assert found["quest"]["builtin"] is True
    assert found["newest"]["selectors"] == ["newest"]
    assert found["newest"]["distribution"] == "twx-newest"
    assert found["bad"]["status"] == "failed"
    assert "nowhere_at_all" in found["bad"]["problems"][0]
    assert main(["plugins", "list"]) == 0
    text = capsys.readouterr().out
    assert "nowhere_at_all" in text
    assert "twx-newest 0.2" in text


def test_plugins_info_shows_parameters_and_tracebacks(site, capsys):
    site.install("twx-bad", {"bad": "bad"}, {"bad.py": "import nowhere_at_all"})
    site.install("twx-newest", {"newest": "newest:Newest"})
    assert main(["plugins", "info", "newest", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["selectors"][0]["about"] == "Keep the newest tokens."
    assert found["selectors"][0]["parameters"] == [{"name": "window", "type": "int", "default": 8, "about": ""}]
    assert main(["plugins", "info", "newest"]) == 0
    assert "selector.window: int = 8" in capsys.readouterr().out
    assert main(["plugins", "info", "quest"]) == 0
    assert (
        "selector.metadata_type: str = 'int8'\n             how M and m are kept: \"int8\"" in capsys.readouterr().out
    )
    assert main(["plugins", "info", "bad"]) == 0
    assert 'bad.py", line 1' in capsys.readouterr().out
    assert main(["plugins", "info", "newst"]) == 2
    assert "Did you mean 'newest'?" in capsys.readouterr().err


# Decode.


def test_decode_runs_what_the_words_say(runs, capfd):
    assert main(["decode", "selector=streaming_llm", "p=0.9", "budget=512"]) == 0
    (run,) = runs
    assert (run["selector"]["name"], run["pruner"]["p"], run["budget"]["value"]) == ("streaming_llm", 0.9, 512)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert [path.name for path in Path().iterdir()] == ["outputs"]


def test_decode_sweeps_pruners_and_budgets(runs):
    words = ["-m", "pruner=top_p,bounded_top_p", "budget=ada,pyramid", "budget.value=512"]
    assert main(["decode", *words, "hydra.sweep.dir=sweep"]) == 0
    assert [(run["pruner"]["name"], run["budget"]["name"], run["budget"]["value"]) for run in runs] == [
        ("top_p", "ada", 512),
        ("top_p", "pyramid", 512),
        ("bounded_top_p", "ada", 512),
        ("bounded_top_p", "pyramid", 512),
    ]


def test_decode_refuses_bounds_out_of_order_before_it_runs(runs, capsys):
    assert main(["decode", "pruner=bounded_top_p", "pruner.max_tokens=8"]) != 0
    assert "max_tokens: expected at least min_tokens=16, got 8" in capsys.readouterr().err
    assert runs == []


def test_decode_reads_the_command_line_of_a_script(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/decode.py", "p=0.85"])
    assert decode() == 0
    assert runs[0]["p"] == 0.85
    assert sys.argv == ["examples/decode.py", "p=0.85"]


@pytest.mark.parametrize(
    "words", [["selector=qest"], ["selector.reduc=max"], ["pp=0.9"], ["-m", "p=0.8,1.5"], ["--wat"]]
)
def test_nothing_runs_on_a_wrong_command_line(runs, capsys, words):
    try:
        status = main(["decode", *words])
    except SystemExit as stop:  # argparse's way
        status = stop.code
    assert status == 2
    assert runs == []
    assert list(Path().iterdir()) == []
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: " in captured.err
    assert "Traceback" not in captured.err


def test_a_sweep_runs_every_job(runs, site, capfd):
    site.install("twx-newest", {"newest": "newest:Newest"})
    assert main(["decode", "-m", "selector=glob(*)", "p=0.8,0.9"]) == 0
    names = sorted([*BUILTIN, "newest"])
    assert len(runs) == 2 * len(names)
    assert {(run["selector"]["name"], run["p"]) for run in runs} >= {("newest", 0.8), ("quest", 0.9)}
    assert [path.name for path in Path().iterdir()] == ["multirun"]
    told = [line for line in capfd.readouterr().err.splitlines() if line]
    assert told[0] == f"job 0: selector={names[0]} p=0.8"
    assert len(told) == 2 * len(names)


def test_a_failing_job_is_told_at_once_and_the_others_run(runs, monkeypatch, capsys):
    ran = []

    def run(cfg: Any) -> dict[str, Any]:
        ran.append(cfg.p)
        if cfg.p == 0.8:
            raise ValueError("cannot do 0.8")
        if cfg.p == 0.85:
            raise RuntimeError("a bug")
        return {}

    monkeypatch.setattr("twilight.decoding.run", run)
    assert main(["decode", "-m", "p=0.8,0.85,0.9"]) == 1
    assert ran == [0.8, 0.85, 0.9]
    text = capsys.readouterr().err
    assert "error: cannot do 0.8\n" in text
    assert "RuntimeError: a bug" in text
    assert text.index("cannot do") < text.index("a bug")
    assert text.count("Traceback") == 1


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["--json"], "-"),
        (["--json", "p=0.9"], "-"),
        (["--json", "-m"], "-"),
        (["--json", "-"], "-"),
        (["--json", "out.json", "p=0.9"], "out.json"),
        (["p=0.9", "--json=a,b (c)'s.json"], "a,b (c)'s.json"),
    ],
)
def test_json_names_a_file_or_standard_output(runs, words, path):
    assert main(["decode", *words]) == 0
    assert runs[0]["task"]["json"] == path


def test_jobs_of_a_sweep_may_not_write_over_each_other(runs, capsys):
    assert main(["decode", "-m", "p=0.8,0.9", "--json", "out.json"]) == 2
    assert "several jobs of the sweep would write out.json" in capsys.readouterr().err
    assert main(["decode", "-m", "p=0.8,0.9", "task.json=${hydra:runtime.output_dir}/out.json"]) == 0
    assert len({run["task"]["json"] for run in runs}) == 2


def test_decode_help_lists_installed_selectors(site, capfd):
    site.install("twx-newest", {"newest": "newest:Newest"})
    assert main(["decode", "--help"]) == 0
    text = capfd.readouterr().out
    assert f"selector: {', '.join(sorted([*BUILTIN, 'newest']))}" in text
    assert "max_new_tokens: 64" in text


def test_a_pickled_job_is_refused(runs, capsys):
    assert main(["decode", "--experimental-rerun", "job.pickle"]) == 2
    assert "unpickles" in capsys.readouterr().err


def test_a_folder_of_the_users_configs_is_seen(runs, tmp_path):
    (tmp_path / "mine" / "selector").mkdir(parents=True)
    (tmp_path / "mine" / "selector" / "quest_max.yaml").write_text("name: quest\nreduce: max\n")
    assert main(["decode", "--config-dir", str(tmp_path / "mine"), "selector=quest_max"]) == 0
    assert runs[0]["selector"] == {"name": "quest", "reduce": "max"}
