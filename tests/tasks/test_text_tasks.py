"""Perplexity and fidelity on the small model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="needs the extra 'hf'")

from transformers import AutoModelForCausalLM  # noqa: E402

from twilight.evaluation.corpus import heldout_text  # noqa: E402
from twilight.loading import tiny_path  # noqa: E402

SIZE = ("task.context=600", "task.windows=2")


@pytest.fixture(scope="module")
def plain():
    """Nats of each scored token by one forward of transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()
    ids = torch.tensor(list(heldout_text(2 * 621 * 2, 0)))[: 2 * 621].view(2, 621)
    with torch.no_grad():
        logits = model(ids).logits.double()
    return F.cross_entropy(logits[:, 600:620].flatten(0, 1), ids[:, 601:].flatten(), reduction="none")


def test_perplexity_is_that_of_a_whole_forward(run_task, plain):
    words = ("task=perplexity", *SIZE, "task.positions=20")
    dense, everything = run_task(*words, "selector=full", "p=1", "budget=1.0").rows
    assert dense["method"] == "dense" and everything["method"] == "twilight"
    for row in (dense, everything):
        assert row["nll"] == pytest.approx(float(plain.mean()), abs=1e-4)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        # A token is a byte.
        assert row["bits_per_byte"] == pytest.approx(row["nll"] / math.log(2))
        assert (row["scored_tokens"], row["context"]) == (40, 600)
    assert dense["delta_bits"] is None and dense["kv_fraction"] == 1
    assert everything["delta_bits"] == pytest.approx(0, abs=1e-4)

    _, narrow = run_task(*words, "selector=streaming_llm", "pruner=none", "budget=32").rows
    assert narrow["b0"] == narrow["b1_query"] == 32
    assert narrow["delta_bits"] == pytest.approx(narrow["bits_per_byte"] - dense["bits_per_byte"])
    assert 0 < narrow["delta_stderr"] < 0.5
    assert narrow["text"] == dense["text"]


def test_a_text_of_ones_own(run_task, tmp_path):
    file = tmp_path / "text.py"
    file.write_text("def add(a, b):\n    return a + b\n\n\n" * 60)
    found = run_task("task=perplexity", f"task.text={file}", "task.context=1000", "task.windows=1", "task.positions=30",
                     "task.compare_dense=false")  # fmt: skip
    (row,) = found.rows
    assert row["text"].startswith("text.py ") and row["delta_bits"] is None
    assert row["bits_per_byte"] < 0.1  # it has seen it thirty times
    assert {each["layer"] for each in found.tables["budgets"]} == {2, 3, 4, 5, 6}


def test_fidelity_of_everything_is_perfect_and_of_less_is_less(run_task):
    words = ("task=fidelity", *SIZE, "task.steps=6", "task.every=3")
    (exact,) = run_task(*words, "selector=full", "p=1", "budget=1.0").rows
    assert exact["mass"] == pytest.approx(1) and exact["output_error"] < 1e-5
    assert exact["overlap_topk"] == exact["overlap_topp"] == exact["excess"] == 1
    assert exact["oracle_b1"] == pytest.approx((603 + 606) / 2)

    found = run_task(*words, "selector=quest", "p=0.8", "task.layers=[3,5]")
    (row,) = found.rows
    assert row["method"] == "twilight" and row["oracle_p"] == 0.8
    assert 0.2 < row["mass_p5"] < row["mass"] < 1 and 0 < row["output_error"] < 1
    assert 0.2 < row["overlap_topk"] < 1 and row["b1_query"] < row["b0"] < row["seq_len"]
    heads = found.tables["fidelity_heads"]
    assert [(each["layer"], each["head"]) for each in heads] == [(layer, h) for layer in (3, 5) for h in range(6)]
    assert row["mass"] == pytest.approx(sum(each["mass"] for each in heads) / 12)
    positions = found.tables["positions"]
    assert {(each["kind"], each["layer"]) for each in positions} == {(k, n) for k in ("top_p", "top_k") for n in (3, 5)}
    # Budgets are of all steps and layers, measured or not.
    assert len(found.tables["budgets"]) == 30

    (oracle,) = run_task(*words, "selector=oracle_topp", "selector.mass=0.8", "pruner=none", "budget=1.0",
                         "task.oracle_p=0.8").rows  # fmt: skip
    assert oracle["mass"] >= 0.8 and oracle["overlap_topp"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=perplexity", "task.positions=0"], "task.positions: expected at least 1, got 0"),
        (["task=perplexity", "task.context=40000"], "more than the 32768 positions"),
        (["task=perplexity", "task.text=nowhere.txt"], "task.text: no file 'nowhere.txt'"),
        (["task=fidelity", "task.every=40"], "task.every: expected at most task.steps=32"),
        (["task=fidelity", "task.layers=[0,3]"], r"task.layers: expected some of the sparse layers, \[2, 3, 4, 5, 6\]"),
        (["task=fidelity", "task.min_context=9000", "task.context=500", "task.windows=1"], "no sparse step was seen"),
    ],
)
def test_bad_input_is_told(run_task, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_task(*words)


@pytest.mark.gpu
def test_captured_steps_on_a_gpu_score_as_dense_does(run_task):
    words = ("task=perplexity", "task.context=4096", "task.windows=2", "task.positions=64", "budget=0.5")
    dense, sparse = run_task(*words, "p=0.98").rows
    assert abs(sparse["delta_bits"]) < 0.05 and sparse["kv_fraction"] < 0.7 and dense["kv_fraction"] == 1
    run_task(*words, "p=0.5")
    assert run_task(*words, "p=0.98").rows == [dense, sparse]
