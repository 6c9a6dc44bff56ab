"""The doctor: healthy here, and every ailment named with what to run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from twilight import doctor, ops, resources
from twilight.cli import main


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    return {each["name"]: each for each in json.loads(capsys.readouterr().out)}


def test_a_healthy_machine_passes(site, capsys):
    assert main(["doctor", "--json"]) == 0
    found = findings(capsys)
    assert found["torch"]["detail"] == torch.__version__
    assert all(
        found[name]["status"] == "ok" for name in ("python", "twilight-attn", "conf", "plugins", "decode on cpu")
    )
    assert not any(each["status"] == "fail" for each in found.values())
    assert main(["doctor"]) == 0
    assert "decode on cpu" in capsys.readouterr().out


def test_a_missing_gpu_is_no_failure(site, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert main(["doctor", "--json"]) == 0
    assert findings(capsys)["GPU"]["status"] == "absent"


def test_a_gpu_that_torch_cannot_use_is_a_warning(site, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: "NVIDIA H100, 570.1")
    assert main(["doctor", "--json"]) == 0
    found = findings(capsys)["GPU"]
    assert found["status"] == "warn"
    assert "NVIDIA H100" in found["detail"]
    assert found["run"]


def test_broken_plugins_fail_and_say_what_to_run(site, capsys):
    site.install("twx-bad", {"bad": "nowhere_at_all"}, {})
    assert main(["doctor", "--json"]) == 1
    captured = json.loads(capsys.readouterr().out)
    (found,) = [each for each in captured if each["status"] == "fail"]
    assert found["name"] == "plugin bad"
    assert "nowhere_at_all" in found["detail"]
    assert found["run"] == "twilight plugins info bad"


def test_disabled_plugins_are_no_failure(site, monkeypatch, capsys):
    monkeypatch.setenv("TWILIGHT_DISABLE_PLUGINS", "full")
    assert main(["doctor", "--json"]) == 0
    found = findings(capsys)
    assert found["plugin full"]["status"] == "absent"
    assert "full" not in found["plugins"]["detail"]


def test_missing_resources_fail(site, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(resources, "_package", lambda: tmp_path / "twilight")
    assert main(["doctor", "--json"]) == 1
    found = findings(capsys)
    assert found["conf"]["status"] == found["raw_kernels"]["status"] == "fail"
    assert found["conf"]["run"].startswith("pip install")
    assert found["decode on cpu"]["status"] == "ok"


def test_a_decode_that_strays_from_dense_fails(site, monkeypatch, capsys):
    attention = ops.sparse_attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, lse = attention(*args, **kwargs)
        return out * 1.5, lse

    monkeypatch.setattr(ops, "sparse_attention", wrong)
    assert main(["doctor", "--json"]) == 1
    assert findings(capsys)["decode on cpu"]["status"] == "fail"


def test_a_check_that_breaks_is_a_finding(site, monkeypatch, capsys):
    def broken() -> Any:
        raise OSError("disk on fire")

    monkeypatch.setattr(doctor, "_nvidia_smi", broken)
    assert main(["doctor", "--json"]) == 1
    found = findings(capsys)
    assert found["gpu"]["detail"] == "OSError: disk on fire"
    assert found["decode on cpu"]["status"] == "ok"


def test_without_cupy_nothing_is_compiled(site, monkeypatch, capsys):
    real = doctor.importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")
        return real(name, *rest)

    monkeypatch.setattr(doctor.importlib, "import_module", without)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--json"]) == 0
    assert findings(capsys)["CuPy"]["status"] == "absent"


@pytest.mark.gpu
def test_the_compiler_works_on_a_gpu(site):
    pytest.importorskip("cupy", reason="needs the extra 'cuda12' or 'cuda13'")
    (check,) = doctor._compiler()
    assert check.status == "ok", check.detail
