"""The conformance suite: every selector that is installed passes, and each mistake fails for its own reason."""

from __future__ import annotations

import re

import pytest
import torch

from tests.testing import broken
from twilight import Contract
from twilight.calibration import save_channels
from twilight.errors import UnknownNameError
from twilight.registry import registry
from twilight.testing import CASES, ConformanceError, check_case, check_selector, run_suite

# (selector, the case that it fails, what is said)
BROKEN = [
    ("NoSelection", "form", "expected a twilight.Selection, got Tensor"),
    ("QueryHeads", "form", r"expected indices \[b, Hkv, capacity\] with b=6 and Hkv=2, got \[6, 8, 20\]"),
    ("WrongType", "form", r"raised TypeError: indices: expected dtype int32, got int64 .*broken.py:"),
    ("Granularity", "form", r"granularity: expected 1 \(tokens\) or the page size, 16, got 2"),
    ("Duplicates", "form", r"duplicate: token \d+ is listed twice; row \d \(\d+ tokens\)"),
    ("Unsorted", "form", r"not ascending: token \d+ comes before \d+; row"),
    ("IgnoresRagged", "form", r"out of range: expected tokens 0 to 0, got \d+; row 0 \(1 tokens\).*layer.seq_lens"),
    ("Nothing", "form", "nothing is selected: expected at least one token; row 0"),
    ("Undeclared", "form", r"carries log_weight, which the selector does not declare.*Contract\(weighted=True\)"),
    ("WeighsNaN", "form", "log_weight: expected finite numbers"),
    ("WritesKeys", "form", "k_pages has changed: select and finish only read"),
    ("ScalesQuery", "form", "q has changed"),
    ("OneMore", "budget", r"over budget: expected at most 1 tokens \(budget.tokens is 1\), got 2; row 1"),
    (
        "FirstHeadsBudget",
        "budget",
        r"over budget: expected at most 5 tokens \(budget.tokens is 5\), got 6; row 0",
    ),
    (
        "ForgetsTail",
        "dense",
        r"15 are missing, the first is 16;.*the newest page holds 15 of 16 tokens",
    ),
    ("Correcting", "dense", r"p=1, the output should be dense attention's; it is .* away"),
    ("KeepsState", "chunks", "a prompt appended 1 tokens at a time should be the prompt appended at once"),
    ("CountsPadding", "batch", "a row should select the same whoever else is in the batch"),
    ("SeesOthers", "batch", "a row should select the same whoever else is in the batch"),
    ("GoesByTheLongest", "mixed", r"row should select the same.*row 0 \(152 tokens\).*is layer.new_tokens"),
    ("KeepsRows", "rows", "a row that was freed and used again should select as a new one does"),
    ("Random", "repeat", "random numbers come from twilight.draws"),
    ("KeepsRows", "repeat", "one instance serves any number of caches"),
    ("Means", "metadata", r"metadata 'mean' \(rule 'mean'\) should be what summarize returns, to the last bit"),
    ("ForgetsMetadata", "form", "raised KeyError: 'mean'"),
    ("WrongRanking", "ranking", "select should choose the pages that ranking names"),
    ("Waits", "host", r"__int__ waits for the GPU, which a step in a CUDA graph cannot: .*broken.py:\d+"),
    ("Trims", "host", r"__int__ waits for the GPU.*broken.py:\d+ \(Selection.trimmed\)"),
    ("BoundsAreLengths", "static", "over a StaticCache.*should be the same"),
    ("Exempt", "contract", r"contract\(\) declares budget=False, which was never met here"),
    ("Raises", "form", r"raised IndexError: too far \(.*broken.py:\d+\)"),
]


@pytest.fixture(scope="session")
def calibration(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("calibration") / "double_sparsity.json"
    generator = torch.Generator().manual_seed(0)
    orders = {layer: torch.stack([torch.randperm(64, generator=generator) for _ in range(2)]) for layer in range(2)}
    save_channels(path, {"qk": orders})
    return str(path)


@pytest.mark.parametrize("name", sorted(registry().selectors()))
def test_every_selector_passes(name, calibration):
    options = {"calibration": calibration} if name == "double_sparsity" else {}
    report = check_selector(name, **options)
    skipped = {each.case for each in report.outcomes if each.status == "skipped"}
    gpu = set() if torch.cuda.is_available() else {"capture", "devices"}
    assert skipped <= {"metadata", "ranking"} | gpu


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("streaming_llm", {"reindex": True}),
        ("tidal_decode", {"attend_all": False}),
        ("quest", {"metadata_type": "native"}),
        ("sparq", {"mean_value": False}),
        ("vattention", {"base": "pqcache", "base_options": {"bits": 3, "sinks": 2}, "sinks": 2, "local": 8}),
    ],
)
def test_contracts_follow_the_parameters(name, options):
    check_selector(name, **options)


def test_the_sound_one_passes():
    report = check_selector(broken.Sound)
    assert [each.case for each in report.outcomes] == list(CASES)
    gpu = [] if torch.cuda.is_available() else ["capture", "devices"]
    assert [each.case for each in report.outcomes if each.status == "skipped"] == ["metadata", "ranking", *gpu]


@pytest.mark.parametrize(("name", "case", "said"), BROKEN)
def test_a_mistake_fails_for_its_reason(name, case, said):
    with pytest.raises(ConformanceError) as raised:
        check_case(case, getattr(broken, name))
    assert re.search(said, str(raised.value), re.S), raised.value


def test_every_mistake_is_in_the_table():
    classes = {name for name, each in vars(broken).items() if getattr(each, "__module__", "") == "tests.testing.broken"}
    assert classes - {"Sound"} == {name for name, _, _ in BROKEN}


def test_all_failures_are_told_together():
    with pytest.raises(ConformanceError, match=r"selector 'sound': \d+ of 15 cases failed\n  form: .*\n  budget: "):
        check_selector(broken.Raises)


def test_an_instance_is_copied_and_takes_no_options():
    selector = broken.KeepsRows()
    assert run_suite(selector, cases=["form"]).failures == []
    assert selector._past == {}
    with pytest.raises(TypeError, match="got an instance"):
        check_selector(selector, window=3)


def test_what_is_asked_wrongly_is_no_failure_of_a_case():
    with pytest.raises(UnknownNameError, match="Did you mean 'quest'"):
        check_selector("quset")
    with pytest.raises(UnknownNameError, match="no parameter 'windw'"):
        check_selector("snapkv", windw=3)
    with pytest.raises(ValueError, match="no module 'nowhere.at_all'"):
        check_selector("nowhere.at_all:Mine")
    with pytest.raises(UnknownNameError, match="Did you mean 'Quest'"):
        check_selector("twilight_selectors.quest:Qest")
    with pytest.raises(UnknownNameError, match="no case 'fomr'"):
        check_case("fomr", "quest")
    with pytest.raises(UnknownNameError, match="no size 'heads'"):
        check_selector("quest", geometry={"heads": 3})


def test_the_default_contract_promises_everything():
    assert broken.Sound().contract() == Contract(budget=True, dense=True, chunks=True, weighted=False)
