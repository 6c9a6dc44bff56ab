"""Two traps of the layout: `selectors/` is also a standard module, and two folders of the package lie beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from twilight import resources

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "twilight", "selectors", "conf", "raw_kernels", "benchmarks")
DEFAULTS = {key: value for key, value in os.environ.items() if not key.startswith(("TWILIGHT_", "PYTHON"))}

LOOK = """
import json, selectors, sysconfig, twilight
from twilight import resources
conf = resources.folder("conf")
print(json.dumps({
    "package": twilight.__file__,
    "conf": str(conf),
    "yaml": sorted(path.relative_to(conf).as_posix() for path in conf.rglob("*.yaml")),
    "raw_kernels": str(resources.folder("raw_kernels")),
    "benchmarks": resources.subpackage("benchmarks").__file__,
    "checkout": str(resources.checkout()),
    "standard": selectors.__file__.startswith(sysconfig.get_path("stdlib")),
}))
"""

DECODE = """
import torch, twilight
from twilight import Geometry, PagedKVCache, TopP, TwilightAttention, registry
torch.manual_seed(0)
quest = registry.create_selector("quest")
cache = PagedKVCache(Geometry(1, 4, 2, 32, dtype=torch.float32), num_rows=1, num_pages=16, selector=quest)
k = torch.randn(1, 100, 2, 32)
cache.layers[0].append(k, torch.randn_like(k))
attention = TwilightAttention(quest, TopP(0.9), budget=0.5)
out, lse = attention.decode(torch.randn(1, 4, 32), torch.randn(1, 2, 32), torch.randn(1, 2, 32), cache.layers[0])
assert out.shape == (1, 4, 32) and torch.isfinite(out).all() and torch.isfinite(lse).all()
from twilight.doctor import decode_error
assert decode_error("full", 1.0) < 1e-5
print(type(quest).__module__, __import__("twilight_selectors.quest").quest.__file__)
"""


@dataclass
class Place:
    """An environment of its own, and a folder outside of the repository to run it in."""

    python: Path
    folder: Path
    source: Path
    pythonpath: str = ""

    def run(self, script: str) -> str:
        """Run a script, and return what it prints."""
        env = {**DEFAULTS, "PYTHONPATH": self.pythonpath, "PYTHONWARNINGS": "error::UserWarning:twilight"}
        done = subprocess.run(
            [self.python, "-c", script], cwd=self.folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def site(self) -> Path:
        """Its site-packages."""
        return next(self.python.parents[1].glob("lib*/python*/site-packages"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a distribution is made of: building leaves files beside it."""
    copy = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist), str(source))
    (found,) = dist.glob("*.whl")
    return found


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=DEFAULTS, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", params=["checkout", "editable", "wheel"])
def place(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An environment that has nothing of twilight's but what the parameter says."""
    folder = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=120)
    made = Place(folder / "venv" / "bin" / "python", folder, source)
    # torch and the other dependencies are seen where they are. A plain path: the outer environment's own .pth files,
    # and so its editable install, are not followed.
    (made.site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["--python", str(made.python), "install", "--no-deps", "--force-reinstall", "--no-build-isolation"]
    if request.param == "checkout":
        made.pythonpath = str(source)
    elif request.param == "editable":
        pip(*install, "--editable", str(source))
    else:
        pip(*install, str(request.getfixturevalue("wheel")))
    return made


@pytest.mark.slow
def test_every_way_to_install_finds_its_files(place, request):
    found = json.loads(place.run(LOOK))
    kind = request.node.callspec.params["place"]
    inside = place.site / "twilight" if kind == "wheel" else place.source
    package = place.site if kind == "wheel" else place.source
    assert found["package"] == str(package / "twilight" / "__init__.py")
    assert found["conf"] == str(inside / "conf")
    assert found["raw_kernels"] == str(inside / "raw_kernels")
    assert found["benchmarks"] == str(inside / "benchmarks" / "__init__.py")
    assert found["checkout"] == str(None if kind == "wheel" else place.source)
    assert found["yaml"] == sorted(p.relative_to(ROOT / "conf").as_posix() for p in (ROOT / "conf").rglob("*.yaml"))
    assert found["standard"]


@pytest.mark.slow
def test_every_installation_decodes_and_composes(place, request):
    if request.node.callspec.params["place"] == "checkout":
        script = "import twilight.registry as r, twilight.errors as e\ntry: r.get_selector('quest')\n"
        script += "except e.UnknownNameError as error: print(error)"
        # Only its metadata may be there, of the environment behind: its selectors are not.
        place.run("from twilight.doctor import diagnose")
        said = place.run("import warnings\nwarnings.simplefilter('ignore')\n" + script)
        assert "pip install -e ." in said
        return
    module, file = place.run(DECODE).split()
    assert module == "twilight_selectors.quest"
    wheel = request.node.callspec.params["place"] == "wheel"
    assert file == str(place.site / "twilight_selectors" / "quest.py" if wheel else place.source / "selectors/quest.py")
    composed = place.run(
        "from twilight.cli import main\nmain(['decode', '--cfg', 'job', 'selector=full', 'budget=512'])"
    )
    assert "name: full" in composed
    assert "value: 512" in composed


@pytest.mark.slow
def test_every_installation_benchmarks(place, request):
    words = ["--device", "cpu", "--heads", "2/1", "--head-dim", "32", "--cells", "1:64", "--repeats", "1"]
    said = place.run(f"from twilight.cli import main\nassert main(['bench', *{words}]) == 0")
    wheel = request.node.callspec.params["place"] == "wheel"
    out = (place.folder if wheel else place.source / "benchmarks" / "results") / "decode-cpu.json"
    assert len(json.loads(out.read_text())["cells"]) == 1
    assert said.splitlines()[-1] == ("decode-cpu.json" if wheel else str(out))
    out.unlink()


@pytest.mark.slow
def test_the_wheel_has_every_file_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "twilight").rglob("*.py")}
    expected |= {"twilight/py.typed", "twilight/crossover.json"}
    expected |= {f"twilight/templates/plugin/{path.name}" for path in (ROOT / "twilight/templates/plugin").iterdir()}
    expected |= {f"twilight/benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    expected |= {f"twilight_selectors/{path.name}" for path in (ROOT / "selectors").glob("*.py")}
    expected |= {f"twilight/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    kernels = [path for path in (ROOT / "raw_kernels").iterdir() if path.suffix in (".cu", ".cuh", ".md")]
    expected |= {f"twilight/raw_kernels/{path.name}" for path in kernels}
    assert packed == expected


def test_the_standard_selectors_are_not_shadowed_from_the_repository():
    script = (
        "import asyncio, selectors, subprocess, sys, sysconfig\n"
        "assert selectors.__file__.startswith(sysconfig.get_path('stdlib')), selectors.__file__\n"
        "assert asyncio.run(asyncio.sleep(0, 'slept')) == 'slept'\n"
        "print(subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True, text=True).stdout)\n"
    )
    # `-c` puts the working directory first on sys.path, and PYTHONPATH does it again.
    for path in ("", str(ROOT), str(ROOT / "tests")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**DEFAULTS, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "1"


def test_the_standard_selectors_are_not_shadowed_under_pytest():
    import asyncio
    import selectors

    assert selectors.__file__.startswith(sysconfig.get_path("stdlib"))
    assert asyncio.run(asyncio.sleep(0, "slept")) == "slept"


@pytest.mark.parametrize("folder", ["selectors", "tests/selectors", "conf", "raw_kernels"])
def test_folders_that_are_no_packages_stay_none(folder):
    # With an __init__.py, `import selectors` from the repository's root would find the folder.
    assert not (ROOT / folder / "__init__.py").exists()


def test_a_missing_folder_says_where_it_was_looked_for(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(resources, "_package", lambda: tmp_path / "twilight")
    assert resources.checkout() == tmp_path
    with pytest.raises(FileNotFoundError, match=r"no folder 'conf' of twilight: looked for .*twilight/conf or .*/conf"):
        resources.folder("conf")
    (tmp_path / "conf").mkdir()
    assert resources.folder("conf") == tmp_path / "conf"
    (tmp_path / "twilight" / "conf").mkdir(parents=True)
    assert resources.folder("conf") == tmp_path / "twilight" / "conf"


def test_a_folder_beside_a_package_that_is_no_checkout_is_not_ours(monkeypatch, tmp_path):
    (tmp_path / "conf").mkdir()  # some other distribution's, in site-packages
    monkeypatch.setattr(resources, "_package", lambda: tmp_path / "twilight")
    with pytest.raises(FileNotFoundError):
        resources.folder("conf")
