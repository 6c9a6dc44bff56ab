"""lm-evaluation-harness over an attached model: a task file of our own, and no download."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="needs the extra 'hf'")
pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
pytest.importorskip("accelerate", reason="needs the extra 'eval'")
pytest.importorskip("datasets", reason="needs the extra 'eval'")

from twilight.evaluation.facts import build_fact_prompt  # noqa: E402
from twilight.tasks.lm_eval import metric_rows  # noqa: E402

GENERATE = """
task: planted_fact
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{code}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 6}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOOSE = """
task: planted_choice
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[code, '000000']}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Task files over three prompts of 1 to 2 KB, so that a batch of two is padded."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "facts.jsonl"
    prompts = [build_fact_prompt(size, 1, seed) for seed, size in enumerate((1000, 1500, 2000))]
    lines = [
        {"text": (prompt.context + prompt.questions[0]).decode(), "code": prompt.answers[0].decode()}
        for prompt in prompts
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "generate.yaml").write_text(GENERATE.format(data=data))
    (tmp_path / "choose.yaml").write_text(CHOOSE.format(data=data))
    return tmp_path


def test_generated_answers_come_through_the_decode_path(run_task, folder):
    words = ("task=lm_eval", f"task.include_path={folder}", "task.tasks=[planted_fact]", "task.batch_size=2", "p=0.9")
    found = run_task(*words, "budget=0.5")
    dense, sparse = found.rows
    for row, method in ((dense, "dense"), (sparse, "twilight")):
        assert (row["method"], row["lm_task"], row["metric"]) == (method, "planted_fact", "exact_match,none")
        assert (row["value"], row["samples"]) == (1.0, 3)
    assert sparse["b1_query"] < 0.2 * sparse["seq_len"] and dense["b1_query"] == dense["seq_len"]
    # What no longer sees the fact cannot answer: the sparse row is not dense in disguise.
    (blind,) = (row for row in run_task(*words, "selector=streaming_llm", "budget=64").rows if row["method"] != "dense")
    assert blind["value"] == 0


def test_loglikelihood_tasks_warn_and_read_nothing_sparsely(run_task, folder):
    with pytest.warns(UserWarning, match="never decodes"):
        found = run_task("task=lm_eval", f"task.include_path={folder}", "task.tasks=[planted_choice]")
    dense, sparse = found.rows
    assert dense["value"] == sparse["value"] == 1.0
    assert sparse["b1_query"] is None and found.tables["budgets"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.tasks=[]"], "task.tasks: needs names"),
        (["task.tasks=[no_such_task]"], "knows no 'no_such_task'"),
        (["task.tasks=[x]", "task.batch_size=0"], "task.batch_size: expected at least 1, got 0"),
        (["task.tasks=[x]", "task.include_path=nowhere"], "task.include_path: no folder 'nowhere'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(run_task, words, message, monkeypatch):
    monkeypatch.setattr("twilight.evaluation.session.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("[", r"\[")):
        run_task("task=lm_eval", *words)


def test_lengths_that_ruler_was_not_asked_for_are_left_out():
    found = {
        "results": {"niah": {"alias": "niah", "4096,none": 0.5, "4096_stderr,none": 0.1, "8192,none": -1, "n": 9}},
        "n-samples": {"niah": {"original": 500, "effective": 9}},
    }  # fmt: skip
    assert metric_rows(found) == [{"lm_task": "niah", "metric": "4096,none", "value": 0.5, "stderr": 0.1, "samples": 9}]
