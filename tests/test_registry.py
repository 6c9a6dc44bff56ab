"""Plugins: what loads, what does not, and that neither takes the other down."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

from twilight import Selector
from twilight.errors import PluginError, UnknownNameError
from twilight.registry import DISTRIBUTION, PluginRecord, PluginWarning, Registry

BUILTIN = [
    "block_mean",
    "double_sparsity",
    "full",
    "h2o",
    "magicpig",
    "nsa",
    "oracle_topk",
    "oracle_topp",
    "pqcache",
    "quest",
    "snapkv",
    "sparq",
    "streaming_llm",
    "tactic",
    "tidal_decode",
    "vattention",
]

HOOKS = """
import twilight
from newest import Newest

@twilight.hookimpl
def twilight_register_selectors(register):
    register(Newest)
"""


def load(registry: Registry) -> list[str]:
    """Load, and return the warnings' texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry.load()
    return [str(each.message) for each in caught if issubclass(each.category, PluginWarning)]


def record_of(registry: Registry, name: str) -> PluginRecord:
    (found,) = [record for record in registry.plugins() if record.name == name and not record.builtin]
    return found


@dataclass
class Typed(Selector):
    name: ClassVar[str] = "typed"
    size: int = 4
    share: float = 0.5
    mode: Literal["sum", "max"] = "sum"
    file: str | None = None
    sizes: list[int] = field(default_factory=list)

    def select(self, q: Any, layer: Any, budget: Any) -> Any:
        raise NotImplementedError


# What loads.


def test_the_built_in_selectors_come_through_entry_points(site):
    assert list(site.registry.selectors()) == BUILTIN
    assert all(record.builtin and record.status == "loaded" for record in site.registry.plugins())
    assert site.registry.get_selector("quest").__module__ == "twilight_selectors.quest"


def test_one_class_and_one_entry_point_make_a_plugin(site):
    site.install("twx-newest", {"newest": "newest:Newest"})
    assert load(site.registry) == []
    assert list(site.registry.selectors()) == sorted([*BUILTIN, "newest"])
    assert site.registry.create_selector("newest", window=3).window == 3
    assert site.registry.origin("newest").label == "twx-newest 0.2, entry point 'newest'"


def test_a_module_of_hooks_makes_a_plugin(site):
    site.install("twx-newest", {"hooks": "hooks"})
    (site.folder / "hooks.py").write_text(HOOKS)
    assert load(site.registry) == []
    assert record_of(site.registry, "hooks").selectors == ["newest"]
    assert record_of(site.registry, "hooks").hooks == ["twilight_register_selectors"]


def test_a_plugin_may_ask_for_selectors_while_it_is_imported(site):
    text = "import twilight.registry as r\nassert 'quest' in r.selectors()\nfrom newest import Newest\n"
    site.install("twx-newest", {"eager": "eager:Newest"})
    (site.folder / "eager.py").write_text(text)
    assert load(site.registry) == []
    assert "newest" in site.registry.selectors()


# What does not load.

BROKEN = {
    "import error": ("bad:Bad", {"bad.py": "import faiss_of_nowhere"}, "ModuleNotFoundError", "faiss_of_nowhere"),
    "missing attribute": ("bad:Bad", {"bad.py": ""}, "AttributeError", "Bad"),
    "syntax error": ("bad:Bad", {"bad.py": "def"}, "SyntaxError", ""),
    "exit at import": ("bad", {"bad.py": "import sys; sys.exit(3)"}, "SystemExit", "3"),
    "not a Selector": ("bad:Bad", {"bad.py": "class Bad: name = 'bad'"}, "subclass of twilight.Selector", "Bad"),
    "no hooks": ("bad", {"bad.py": "x = 1"}, "no Selector subclass", "hookimpl"),
    "no name": (
        "bad:Bad",
        {"bad.py": "import twilight\nclass Bad(twilight.Selector):\n  def select(self, *a): ..."},
        "Bad.name",
        "identifier",
    ),
    "no select": (
        "bad:Bad",
        {"bad.py": "import twilight\nclass Bad(twilight.Selector):\n  name = 'bad'"},
        "Bad",
        "does not define 'select'",
    ),
    "field of a bad type": (
        "bad:Bad",
        {
            "bad.py": """
            from dataclasses import dataclass
            import torch, twilight
            @dataclass
            class Bad(twilight.Selector):
                name = "bad"
                kind: torch.dtype = torch.float16
                def select(self, *a): ...
            """
        },
        "Bad.kind",
        "structured configs",
    ),
    "annotated but no dataclass": (
        "bad:Bad",
        {
            "bad.py": """
            from __future__ import annotations
            import typing
            import twilight
            class Bad(twilight.Selector):
                name: typing.ClassVar[str] = "bad"
                window: int = 3
                def select(self, *a): ...
            """
        },
        "'window'",
        "@dataclass",
    ),
    "misspelt hook": (
        "bad",
        {"bad.py": "import twilight\n@twilight.hookimpl\ndef twilight_register_selector(register): ..."},
        "no hook 'twilight_register_selector'",
        "Did you mean 'twilight_register_selectors'?",
    ),
    "extra hook argument": (
        "bad",
        {"bad.py": "import twilight\n@twilight.hookimpl\ndef twilight_register_selectors(register, model): ..."},
        "PluginValidationError",
        "twilight_register_selectors",
    ),
    "hook that raises": (
        "bad",
        {"bad.py": "import twilight\n@twilight.hookimpl\ndef twilight_register_selectors(register): 1 / 0"},
        "ZeroDivisionError",
        "division",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_and_takes_nothing_down(site, case):
    value, files, *expected = BROKEN[case]
    site.install("twx-bad", {"bad": value}, files, version="1.5")
    site.install("twx-newest", {"newest": "newest:Newest"})
    complaints = load(site.registry)
    assert len(complaints) == 1
    assert complaints[0].startswith("plugin 'twx-bad 1.5, entry point 'bad'' failed to load: ")
    assert complaints[0].endswith("  (twilight doctor)")
    assert "\n" not in complaints[0]
    for text in expected:
        assert text in complaints[0]
    assert list(site.registry.selectors()) == sorted([*BUILTIN, "newest"])
    assert record_of(site.registry, "bad").status == "failed"


def test_a_broken_plugin_is_complained_of_once(site):
    site.install("twx-bad", {"bad": "nowhere_at_all"}, {})
    assert len(load(site.registry)) == 1
    assert load(site.registry) == []


def test_warnings_made_errors_leave_the_registry_loaded(site):
    site.install("twx-bad", {"bad": "nowhere_at_all"}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PluginWarning):
            site.registry.load()
        assert "quest" in site.registry.selectors()


def test_a_built_in_keeps_its_name(site):
    text = "import twilight\nclass Mine(twilight.Selector):\n  name = 'quest'\n  def select(self, *a): ..."
    site.install("aaa-first", {"mine": "mine:Mine"}, {"mine.py": text})
    (complaint,) = load(site.registry)
    assert "'aaa-first 0.2, entry point 'mine''" in complaint
    assert f"'quest' is taken by {DISTRIBUTION} " in complaint
    assert site.registry.get_selector("quest").__module__ == "twilight_selectors.quest"


@pytest.mark.parametrize("installed", [("twx-b", "twx-a"), ("twx-a", "twx-b")])
def test_who_keeps_a_name_does_not_depend_on_who_came_first(site, installed):
    for name in installed:
        module = name.replace("-", "_")
        text = "import twilight\nclass Same(twilight.Selector):\n  name = 'same'\n  def select(self, *a): ..."
        site.install(name, {"same": f"{module}:Same"}, {f"{module}.py": text})
    (complaint,) = load(site.registry)
    assert "plugin 'twx-b 0.2" in complaint
    assert "taken by twx-a 0.2" in complaint
    assert site.registry.get_selector("same").__module__ == "twx_a"


def test_one_refused_class_leaves_the_plugins_others(site):
    text = HOOKS.replace("    register(Newest)", "    register(int)\n    register(Newest)")
    site.install("twx-newest", {"hooks": "hooks"})
    (site.folder / "hooks.py").write_text(text)
    (complaint,) = load(site.registry)
    assert "is loaded in part" in complaint
    assert "newest" in site.registry.selectors()
    assert record_of(site.registry, "hooks").status == "partial"


def test_a_folder_that_is_no_distribution_does_no_harm(site):
    (site.folder / "half-1.0.dist-info").mkdir()
    (site.folder / "half-1.0.dist-info" / "entry_points.txt").write_text("[twilight.plugins]\nhalf = nowhere_at_all\n")
    assert len(load(site.registry)) == 1
    assert list(site.registry.selectors()) == BUILTIN


# The environment.


def test_an_allow_list_is_for_plugins_of_others(site, monkeypatch):
    site.install("twx-newest", {"newest": "newest:Newest"})
    site.install("twx-bad", {"bad": "nowhere_at_all"}, {})
    monkeypatch.setenv("TWILIGHT_PLUGINS", "twx_newest")
    assert load(site.registry) == []
    assert list(site.registry.selectors()) == sorted([*BUILTIN, "newest"])
    assert record_of(site.registry, "bad").status == "disabled"


def test_an_empty_allow_list_allows_none(site, monkeypatch):
    site.install("twx-newest", {"newest": "newest:Newest"})
    monkeypatch.setenv("TWILIGHT_PLUGINS", "")
    assert list(site.registry.selectors()) == BUILTIN
    assert "newest" not in sys.modules


@pytest.mark.parametrize("item", ["bad", "twx-bad", "twx.bad:bad"])
def test_a_plugin_can_be_disabled_by_entry_point_or_distribution(site, monkeypatch, item):
    site.install("twx-bad", {"bad": "nowhere_at_all"}, {})
    monkeypatch.setenv("TWILIGHT_DISABLE_PLUGINS", f"{item}, full")
    assert load(site.registry) == []
    assert list(site.registry.selectors()) == [name for name in BUILTIN if name != "full"]
    with pytest.raises(UnknownNameError, match="'full'(?s:.*)disabled by the environment"):
        site.registry.get_selector("full")


def test_a_name_in_the_environment_that_is_nobodys_is_complained_of(site, monkeypatch):
    monkeypatch.setenv("TWILIGHT_DISABLE_PLUGINS", "qest")
    (complaint,) = load(site.registry)
    assert complaint.startswith("TWILIGHT_DISABLE_PLUGINS: no plugin 'qest'. Did you mean 'quest'?")


def test_strict_raises_every_time_and_names_every_problem(site, monkeypatch):
    site.install("twx-bad", {"bad": "nowhere_at_all"}, {})
    site.install("twx-worse", {"worse": "nowhere_else"}, {})
    monkeypatch.setenv("TWILIGHT_STRICT", "1")
    for _ in range(2):
        with pytest.raises(PluginError, match="twx-bad 0.2(?s:.*)twx-worse 0.2"):
            site.registry.selectors()
    monkeypatch.setenv("TWILIGHT_STRICT", "0")
    assert len(load(site.registry)) == 2


# Looking up and creating.


def test_an_unknown_selector_says_what_there_is_and_what_failed(site):
    site.install("twx-hash", {"hash": "hash_of_nowhere"}, {})
    load(site.registry)
    with pytest.raises(UnknownNameError) as error:
        site.registry.get_selector("qest")
    lines = str(error.value).splitlines()
    assert lines[0] == "no selector 'qest'. Did you mean 'quest'?"
    assert lines[1] == f"  installed: {', '.join(BUILTIN)}  (twilight plugins list)"
    assert lines[2].startswith("  plugin 'twx-hash 0.2, entry point 'hash'' failed to load: ModuleNotFoundError")
    assert len(lines) == 3


def test_an_unknown_parameter_gets_a_hint(site):
    site.registry.register(Typed)
    with pytest.raises(UnknownNameError, match=r"selector 'typed' has no parameter 'sise'\. Did you mean 'size'\?"):
        site.registry.create_selector("typed", sise=3)


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"size": "4"}, TypeError, "size: expected int, got str '4'"),
        ({"size": True}, TypeError, "size: expected int, got bool"),
        ({"size": 4.0}, TypeError, "size: expected int, got float"),
        ({"share": "half"}, TypeError, "share: expected float"),
        ({"file": 3}, TypeError, "file: expected str | None, got int"),
        ({"sizes": [1, "2"]}, TypeError, r"sizes: expected list\[int\]"),
        ({"mode": "mux"}, ValueError, r"mode: expected one of 'sum', 'max', got 'mux'\. Did you mean 'max'\?"),
        ({"mode": 3}, TypeError, "mode: expected"),
    ],
)
def test_a_wrong_value_names_the_parameter(site, values, error, text):
    site.registry.register(Typed)
    with pytest.raises(error, match=text.replace("|", r"\|")):
        site.registry.create_selector("typed", **values)


def test_right_values_arrive(site):
    site.registry.register(Typed)
    made = site.registry.create_selector("typed", size=2, share=1, mode="max", file="x", sizes=[1, 2])
    assert made == Typed(2, 1, "max", "x", [1, 2])


def test_registering_by_hand_replaces_what_was_registered_by_hand_only(site):
    site.registry.register(Typed)
    again = type("Again", (Typed,), {})
    site.registry.register(again)
    assert site.registry.get_selector("typed") is again
    site.registry.unregister("typed")
    with pytest.raises(UnknownNameError):
        site.registry.get_selector("typed")
    assert [record.name for record in site.registry.plugins()] == BUILTIN
    with pytest.raises(ValueError, match=f"'quest' is registered already, by {DISTRIBUTION}"):
        site.registry.register(type("Quest", (Typed,), {"name": "quest"}))


@pytest.mark.parametrize("thing", [3, Typed(), int, torch.nn.Module])
def test_only_selector_classes_can_be_registered(site, thing):
    with pytest.raises(TypeError, match=r"expected a subclass of twilight\.Selector"):
        site.registry.register(thing)


def test_a_package_that_is_not_installed_says_so(tmp_path):
    """A copy of the package on the path, without its metadata: nothing named a selector."""
    import twilight

    (tmp_path / "twilight").symlink_to(Path(twilight.__file__).parent)
    script = (
        "import importlib.metadata as m\n"
        "real = m.entry_points\n"
        "m.entry_points = lambda **k: [e for e in real(**k) if e.dist.name != 'twilight-attn']\n"
        "import twilight.registry as r\n"
        "try: r.get_selector('quest')\n"
        "except ValueError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert "no selector 'quest'." in done.stdout
    assert "twilight-attn is not installed in this environment" in done.stdout
    assert done.stdout.count("pip install -e .") == 1
    assert done.stderr.count("pip install -e .") == 1  # the warning at loading
