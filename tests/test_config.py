"""The command line's configuration: what it becomes, and what is said when it cannot become anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import setup_globals
from omegaconf import DictConfig

from tests.test_registry import BUILTIN
from twilight import (
    AdaBudget,
    BoundedTopP,
    DynamicBudget,
    NoPruning,
    PyramidBudget,
    Selector,
    Threshold,
    TopP,
    UniformBudget,
    config,
    resources,
)
from twilight.errors import UnknownNameError
from twilight.overrides import OverrideError, check, expand_budget
from twilight.parameters import parameter_docs, parameters
from twilight.registry import PluginWarning, registry


@dataclass
class Typed(Selector):
    name: ClassVar[str] = "typed"
    size: int = 4
    mode: Literal["sum", "max"] = "sum"
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None

    def select(self, q: Any, layer: Any, budget: Any) -> Any:
        raise NotImplementedError


def one(*words: str) -> DictConfig:
    """Return the configuration that the words make."""
    (cfg,) = check(expand_budget(words), multirun=False)
    return cfg


def sweep(*words: str) -> list[DictConfig]:
    """Return the configurations that a sweep is checked by."""
    return check(expand_budget(words), multirun=True)


# What the words become.


def test_the_defaults(site):
    cfg = one()
    assert config.build_selector(cfg) == site.registry.create_selector("quest")
    assert config.build_pruner(cfg) == BoundedTopP(0.95, 16, 128, "page_mean", "int8")
    assert config.build_budget(cfg) == UniformBudget(0.25, 64)
    assert cfg.model == {
        "name": "tiny",
        "path": None,
        "dtype": "auto",
        "device": "auto",
        "dense_layers": 2,
        "revision": None,
        "trust_remote_code": False,
    }
    assert cfg.task == {
        "prompt": None,
        "prompt_tokens": 8192,
        "num_facts": 8,
        "max_new_tokens": 64,
        "seed": 0,
        "page_size": 16,
        "min_context": 0,
        "compare_dense": True,
        "json": None,
        "plot": None,
    }


def test_p_reaches_the_pruner_and_the_pruners_own_wins(site):
    assert config.build_pruner(one("p=0.8")) == BoundedTopP(0.8)
    assert config.build_pruner(one("p=0.8", "pruner=top_p")) == TopP(0.8)
    assert config.build_pruner(one("p=1")) == BoundedTopP(1.0)
    assert config.build_pruner(one("p=0.8", "pruner.p=0.7")) == BoundedTopP(0.7)
    assert config.build_pruner(one("pruner=none")) == NoPruning()


@pytest.mark.parametrize(
    ("words", "pruner"),
    [
        (["pruner=bounded_top_p", "p=0.8"], BoundedTopP(0.8)),
        (["pruner=bounded_top_p", "pruner.max_tokens=64"], BoundedTopP(0.95, 16, 64)),
        (["pruner=bounded_top_p", "pruner.max_tokens=null", "pruner.min_tokens=1"], BoundedTopP(0.95, 1, None)),
        (
            ["pruner=bounded_top_p", "pruner.tail=page_mean", "pruner.tail_type=native"],
            BoundedTopP(0.95, tail="page_mean", tail_type="native"),
        ),
        (["pruner=threshold", "pruner.share=0.1", "pruner.tail=mean"], Threshold(0.1, tail="mean")),
        (["pruner=threshold", "pruner.share=0", "pruner.weight=0.002"], Threshold(0.0, 0.002)),
    ],
)
def test_a_pruners_fields_are_typed_options(site, words, pruner):
    assert config.build_pruner(one(*words)) == pruner


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        (["budget=1024"], UniformBudget(1024, 64)),
        (["budget=0.5"], UniformBudget(0.5, 64)),
        (["budget=1.0"], UniformBudget(1.0, 64)),
        (["budget=1"], UniformBudget(1, 64)),
        (["budget=1e-2"], UniformBudget(0.01, 64)),
        (["budget=fixed"], UniformBudget(1024, 1)),
        (["budget=fixed", "budget.value=2048"], UniformBudget(2048, 1)),
        (["budget=fraction", "budget.min_tokens=8"], UniformBudget(0.25, 8)),
        (["budget=pyramid"], PyramidBudget(0.25, 64)),
        (["budget=pyramid", "budget.value=512", "budget.beta=10"], PyramidBudget(512, 64, beta=10)),
        (["budget=ada", "budget.alpha=0.5", "budget.window=16"], AdaBudget(0.25, 64, window=16, alpha=0.5)),
        (["budget=dynamic", "budget.value=0.5"], DynamicBudget(0.5, 64)),
    ],
)
def test_a_budget_is_tokens_or_a_fraction(site, words, budget):
    built = config.build_budget(one(*words))
    assert built == budget
    assert type(built.value) is type(budget.value)


def test_a_selectors_fields_are_typed_options(site):
    site.registry.register(Typed)
    cfg = one("selector=typed", "selector.size=16", "selector.mode=max", "selector.sizes=[3]", "selector.limit=null")
    assert config.build_selector(cfg) == Typed(16, "max", (3,), None)


def test_a_selector_that_went_is_no_choice_any_more(site):
    site.registry.register(Typed)
    one("selector=typed")
    site.registry.unregister("typed")
    with pytest.raises(UnknownNameError, match="no selector 'typed'"):
        one("selector=typed")


def test_a_mapping_can_be_given_to_the_harness(site):
    words = ["task=lm_eval", "task.tasks=[gsm8k]"]

    def given(*more: str) -> Any:
        (cfg,) = check([*words, *more], multirun=False, config_name="run")
        return cfg.task.gen_kwargs

    assert given() is None
    assert given("task.gen_kwargs={max_gen_toks: 64, until: [a, b]}") == {"max_gen_toks": 64, "until": ["a", "b"]}
    assert given("+task.gen_kwargs.max_gen_toks=64") == {"max_gen_toks": 64}
    assert given("task.gen_kwargs={a: 1}", "+task.gen_kwargs.b=2") == {"a": 1, "b": 2}


# What is said when they become nothing.

WRONG = [
    ("selector=qest", "no selector 'qest'. Did you mean 'quest'?", "twilight plugins list"),
    ("budget=fixd", "no budget 'fixd'. Did you mean 'fixed'?", "installed: ada, dynamic, fixed, fraction, pyramid"),
    ("pruner=topp", "no pruner 'topp'. Did you mean 'top_p'?", "twilight decode --help"),
    ("model=hff", "no model 'hff'. Did you mean 'hf'?", "hf, tiny"),
    ("pp=0.9", "no option 'pp'. Did you mean 'p'?", "options: p, selector, budget, pruner, model, task"),
    ("selector.reduc=sum", "no option 'selector.reduc'. Did you mean 'selector.reduce'?", "selector.name"),
    ("task.page_sz=8", "no option 'task.page_sz'. Did you mean 'task.page_size'?", "task.seed"),
    ("page_size=8", "no option 'page_size'. Did you mean 'task.page_size'?", ""),
    ("modl.path=x", "no option 'modl.path'. Did you mean 'model.path'?", ""),
    ("p=1.5", "p: expected a float in (0, 1], got 1.5", ""),
    ("p=0", "p: expected a float in (0, 1], got 0.0", ""),
    ("p=much", "p=much: Value 'much' of type 'str' could not be converted to Float", ""),
    ("budget=0", "budget: expected at least 1, got 0", ""),
    ("budget=pyramide", "no budget 'pyramide'. Did you mean 'pyramid'?", "installed: ada, dynamic, fixed, fraction"),
    ("budget.beta=3", "no option 'budget.beta'.", "options: budget.name, budget.value, budget.min_tokens"),
    ("pruner=bounded", "no pruner 'bounded'. Did you mean 'bounded_top_p'?", "none, threshold, top_p"),
    ("pruner.max_token=99", "no option 'pruner.max_token'.", "options: pruner.name, pruner.p"),
    ("budget=2.5", "budget: expected an int of tokens or a fraction", ""),
    ("budget.value=all", "budget.value=all: Value 'all' of type 'str' is incompatible", ""),
    ("task.seed=x", "task.seed=x: Value 'x' of type 'str' could not be converted to Integer", ""),
    ("selector.reduce=mean", "reduce: expected", "mean"),
    ("selector", "Error parsing override 'selector'", "option=value"),
    ("p=0.8,0.9", "p=0.8,0.9: a list is a sweep; add -m", ""),
    ("~selector", "selector: expected a choice of the group", ""),
]


@pytest.mark.parametrize(("word", "first", "more"), WRONG)
def test_a_wrong_word_is_answered(site, word, first, more):
    with pytest.raises((ValueError, TypeError)) as error:
        one(word)
    assert str(error.value).startswith(first)
    assert more in str(error.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["selector=full,qest"], "no selector 'qest'. Did you mean 'quest'?"),
        (["p=0.8,1.5"], "p: expected a float in (0, 1], got 1.5"),
        (["selector=quest,full", "selector.reduce=sum"], "no option 'selector.reduce' with selector=full."),
        (["selector=glob(zz*)"], "selector=glob(zz*): matches nothing of block_mean, double_sparsity"),
        (["budget=0.25,fixed"], "budget=0.25,fixed: expected numbers or choices, not both"),
        (["pp=0.8,0.9"], "no option 'pp'. Did you mean 'p'?"),
    ],
)
def test_a_sweep_is_checked_to_its_last_value(site, words, text):
    with pytest.raises(ValueError) as error:
        sweep(*words)
    assert text in str(error.value)


def test_an_unknown_parameter_type_is_said_by_name(site):
    site.registry.register(Typed)
    with pytest.raises(OverrideError, match=r"selector\.size=x: Value 'x' of type 'str' could not be converted"):
        one("selector=typed", "selector.size=x")
    with pytest.raises(ValueError, match=r"selector 'typed': mode: expected one of 'sum', 'max', got 'mx'"):
        one("selector=typed", "selector.mode=mx")


def test_every_value_of_a_sweep_is_composed_once(site):
    composed = sweep("selector=glob(*)", "p=0.8,0.9", "budget=0.25,512")
    assert {cfg.selector.name for cfg in composed} == set(site.registry.selectors())
    assert {cfg.p for cfg in composed} == {0.8, 0.9}
    assert {cfg.budget.value for cfg in composed} == {0.25, 512}
    assert len(composed) == 1 + (len(BUILTIN) - 1) + (2 - 1) + (2 - 1)


def test_a_disabled_default_is_named(site, monkeypatch):
    monkeypatch.setenv("TWILIGHT_DISABLE_PLUGINS", "quest")
    with pytest.raises(UnknownNameError, match="no selector 'quest'(?s:.*)disabled by the environment"):
        one()
    assert one("selector=full").selector.name == "full"


def test_a_choice_that_cannot_be_composed_is_answered(site, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "torn.yaml").write_text("name: [1\n")
    with pytest.raises(OverrideError, match=r"no YAML: expected .* in \".*torn\.yaml\", line"):
        check(["model=torn"], multirun=False, folders=[str(tmp_path)])


# What plugins add.

CONFIGS = """
from dataclasses import dataclass
import twilight
from newest import Newest

@dataclass
class Wide:
    name: str = "newest"
    window: int = 512

@twilight.hookimpl
def twilight_register_selectors(register):
    register(Newest)

@twilight.hookimpl
def twilight_register_configs(config_store):
    config_store.store(group="selector", name="newest_wide", node=Wide)

@twilight.hookimpl
def twilight_config_searchpath():
    return ["pkg://twx_conf.conf"]
"""


def install_configs(site: Any, hooks: str = CONFIGS) -> None:
    site.install("twx-conf", {"conf": "twx_conf.hooks"})
    for path, text in {
        "twx_conf/__init__.py": "",
        "twx_conf/hooks.py": hooks,
        "twx_conf/conf/selector/newest_narrow.yaml": "name: newest\nwindow: 2\n",
    }.items():
        (site.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (site.folder / path).write_text(text)


def test_plugins_add_nodes_in_python_and_in_yaml(site):
    install_configs(site)
    windows = {cfg.selector.get("window") for cfg in sweep("selector=glob(newest*)")}
    assert windows == {8, 512, 2}
    with pytest.raises(OverrideError, match="could not be converted to Integer"):
        one("selector=newest_wide", "selector.window=x")


def test_a_plugin_cannot_replace_a_node_of_others(site):
    install_configs(site, CONFIGS.replace('"newest_wide"', '"quest"'))
    with pytest.warns(PluginWarning, match=r"config 'selector/quest' is taken by twilight-attn"):
        cfg = one()
    assert cfg.selector == {"name": "quest", "metadata_type": "int8", "reduce": "softmax"}
    assert one("selector=newest").selector.window == 8


@pytest.mark.parametrize("places", ['"pkg://twx_conf.conf"', '["twx_conf.conf"]', '["pkg://nowhere_at_all"]', "[3]"])
def test_a_wrong_search_path_is_reported_and_the_rest_works(site, places):
    install_configs(site, CONFIGS.replace('["pkg://twx_conf.conf"]', places))
    with pytest.warns(PluginWarning, match="twilight_config_searchpath|nowhere_at_all"):
        assert one("selector=newest_wide").selector.window == 512


def test_other_hydra_apps_of_the_process_do_not_see_plugins_yaml(site, tmp_path):
    install_configs(site)
    assert one("selector=newest_narrow").selector.window == 2
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("a: 1\n")
    setup_globals()
    with initialize_config_dir(str(tmp_path / "theirs"), version_base="1.3"):
        from hydra.core.global_hydra import GlobalHydra

        paths = [each.path for each in GlobalHydra.instance().config_loader().get_search_path().get_path()]
        assert compose("config") == {"a": 1}
    assert not any("twx_conf" in path for path in paths)


def test_every_yaml_of_the_package_is_reached(site):
    folder = resources.folder("conf")
    for file in folder.glob("*/*.yaml"):
        group, choice = Path(file).parent.name, file.stem
        if group == "experiment":  # a choice of sweeps: tests/test_experiments.py
            continue
        assert one(f"{group}={choice}")[group] is not None


def test_what_a_class_says_of_its_parameters():
    class Some:
        """Do something.

        Attributes:
            one: of them,
                in two lines.
            two, three: both
              at once.

        Raises:
            four: no parameter.
        """

    assert parameter_docs(Some) == {"one": "of them, in two lines.", "two": "both at once.", "three": "both at once."}
    assert parameter_docs(type("None_", (), {"__doc__": None})) == {}


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_built_in_selectors_say_what_each_parameter_is(name):
    cls = registry().get_selector(name)
    assert {each.name for each in parameters(cls)} <= set(parameter_docs(cls))
