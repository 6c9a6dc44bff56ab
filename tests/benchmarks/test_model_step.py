"""One token of a model: the step itself, the ways to attend, and the numbers made of their times."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.benchmarks.fake_flashinfer import install
from twilight import Geometry, TopP, TwilightAttention, kernels
from twilight.benchmarks import main
from twilight.benchmarks import model_step as bench_model
from twilight.benchmarks.check import WrongOutput
from twilight.benchmarks.llama import SHAPES, Llama, add_norm, gate, rotate
from twilight.benchmarks.methods import make
from twilight.benchmarks.model_step import PAGED, REST, SPARE, Bench, ModelCell, Way, measure_ways, summarise, ways
from twilight.benchmarks.results import load
from twilight.benchmarks.timing import Deadline
from twilight.benchmarks.workload import make_workload
from twilight.graph import StaticCache

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")
LENGTH = 192


@pytest.fixture
def bench() -> Bench:
    g = Geometry(TINY.layers, TINY.q_heads, TINY.kv_heads, TINY.head_dim, 16, torch.float32)
    work = make_workload(g, 2, LENGTH - SPARE, make("quest"), 8, spare=SPARE)
    model = Llama(TINY, LENGTH, CPU, torch.float32).requires_grad_(False)
    return Bench(model, work, StaticCache(work.cache, LENGTH), torch.tensor([3, 5]))


def logits(bench: Bench, way: Way) -> torch.Tensor:
    bench.reset()
    return bench.step(way)


def test_llama_8b_has_its_parameters():
    # Meta says 8.03 billion, norms included: 65 vectors of 4096.
    assert SHAPES["llama-3.1-8b"].parameters + 65 * 4096 == 8_030_261_248


def test_weights_are_as_many_as_counted():
    model = Llama(TINY, 8, CPU, torch.float32)
    assert sum(weight.numel() for weight in model.parameters() if weight.ndim == 2) == TINY.parameters


def test_rotary_turns_pairs_by_position():
    model = Llama(replace(TINY, head_dim=4, rope_base=100.0), 10, CPU, torch.float32)
    heads = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    angles = (3.0, 3.0 / 10)
    expected = [math.cos(angles[0]), math.sin(angles[0]), -2 * math.sin(angles[1]), 2 * math.cos(angles[1])]
    torch.testing.assert_close(rotate(heads, model.rotation[torch.tensor([3])].unsqueeze(1))[0, 0].tolist(), expected)


def test_a_block_is_attention_and_mlp_with_residuals():
    model = Llama(TINY, 8, CPU, torch.float32)
    block = model.blocks[0]
    x = torch.randn(2, TINY.hidden)
    seen = {}

    def attend(index, q, k, v):
        seen[index] = (q, k, v)
        return q

    before = torch.randn(2, TINY.hidden)
    rest, delta = block(before, x - before, model.rotation[torch.tensor([0, 0])].unsqueeze(1), attend, 7)
    out = rest + delta

    def norm(y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    heads = (norm(x) @ block.qkv.weight.T).view(2, -1, TINY.head_dim)
    q, k, v = heads[:, :4], heads[:, 4:6], heads[:, 6:]  # position 0 turns nothing
    for part, expected in zip(seen[7], (q, k, v), strict=True):
        torch.testing.assert_close(part, expected)
    y = x + q.flatten(1) @ block.out.weight.T
    gate, up = (norm(y) @ block.gate_up.weight.T).split(TINY.mlp, dim=-1)
    expected = y + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_logits_are_of_what_the_last_block_returns():
    model = Llama(replace(TINY, layers=1), 8, CPU, torch.float32)
    seen = []
    model.blocks[0].register_forward_hook(lambda block, inputs, output: seen.append(output))
    logits = model(torch.tensor([3, 5]), torch.tensor([0, 0]), lambda i, q, k, v: q)
    x = sum(seen[0])
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() @ model.head.weight.T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_lies_between_products_is_compiled_once_for_all_blocks(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append((function, options)) or function)
    Llama(TINY, 8, CPU, torch.float32)
    assert not made
    Llama(TINY, 8, CPU, torch.float32, compiled=True)
    assert made == [(function, {"dynamic": False}) for function in (add_norm, rotate, gate)]


@pytest.mark.parametrize(
    ("words", "compiled"), [(["--device", "cpu"], False), (["--device", "cuda"], True), (["--plain"], False)]
)
def test_a_gpu_compiles_unless_it_is_told_not_to(words, compiled):
    assert bench_model.parse(words).compiled is compiled


def test_keys_of_the_model_look_like_those_of_the_workload(bench):
    """Of every layer: a deviation near 1, so that what a step appends is a plain token of the cache."""
    seen = []
    bench.model(
        torch.arange(64), torch.arange(64), lambda i, q, k, v: seen.append(float(k.std())) or torch.randn_like(q)
    )
    assert len(seen) == TINY.layers
    assert all(0.8 < deviation < 1.25 for deviation in seen)


def test_ways_differ_in_attention_only(bench):
    found = {way.name: way for way in ways(bench, bench.work.cache.selector, 0.9, {})}
    assert list(found) == [
        "no attention", "quest + top-p", "quest + top-p, first 2 layers dense", "quest top-k, N/8",
        "dense: twilight, paged", "dense: torch math",
    ]  # fmt: skip
    assert [name for name, way in found.items() if way.dense] == ["dense: twilight, paged", "dense: torch math"]
    dense = logits(bench, found[PAGED])
    sparse = logits(bench, found["quest + top-p"])
    assert bench.static.lengths == [LENGTH - SPARE + 1] * 2  # one token more
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert torch.cosine_similarity(sparse, dense, dim=-1).min() > 0.8
    # The same step again gives the same logits: a reset goes back to the first token.
    assert torch.equal(logits(bench, found[PAGED]), dense)


@pytest.mark.parametrize("name", [REST, "quest + top-p", "dense: torch math"])
def test_the_new_token_stands_behind_the_others(bench, name, monkeypatch):
    seen = []
    right = bench.model.forward
    monkeypatch.setattr(
        bench.model, "forward", lambda ids, at, attend: (seen.append(at.tolist()), right(ids, at, attend))[1]
    )
    way = next(way for way in ways(bench, bench.work.cache.selector, 0.9, {}) if way.name == name)
    logits(bench, way)
    assert seen == [[LENGTH - SPARE] * 2]
    # And the next step begins with the token that this one found.
    assert bench.ids.tolist() != [3, 5]


def test_everything_kept_is_dense(bench):
    """Full candidates, p = 1: the path of a sparse step, the numbers of a dense one."""
    quest = bench.work.cache.selector
    everything = TwilightAttention(quest, TopP(1.0), 1.0)
    layers, queries = bench.static.layers, bench.work.queries
    way = Way("x", lambda i, q, k, v: everything.decode(queries[i], k, v, layers[i])[0], grows=True)
    dense = next(way for way in ways(bench, quest, 0.9, {}) if way.name == PAGED)
    torch.testing.assert_close(logits(bench, way), logits(bench, dense), rtol=1e-4, atol=1e-4)


def test_flashinfer_does_the_same_step(bench, monkeypatch):
    install(monkeypatch)
    found = {way.name: way for way in ways(bench, bench.work.cache.selector, 0.9, {})}
    dense = logits(bench, found[PAGED])
    for name in ("dense: flashinfer", "dense: flashinfer, tensor cores"):
        torch.testing.assert_close(logits(bench, found[name]), dense, rtol=1e-4, atol=1e-4)
        assert bench.static.lengths == [LENGTH - SPARE] * 2  # it appends beside the cache


def test_sdpa_is_given_exactly_the_tokens_there_are(bench):
    way = list(ways(bench, bench.work.cache.selector, 0.9, {}))[-1]
    count = LENGTH - SPARE + 1
    layer, q = bench.static.layers[1], bench.work.queries[1]
    k, v = torch.randn(2, 2, 64), torch.randn(2, 2, 64)
    out = way.attend(1, q, k, v)
    keys, values = (bench_model.contiguous(pages, 2) for pages in (layer.k_pages, layer.v_pages))
    assert torch.equal(keys[:, :, count - 1], k)
    assert torch.equal(values[:, :, count - 1], v)
    grouped = q.view(2, 2, 2, 64)
    weights = (grouped @ keys[:, :, :count].transpose(-1, -2) / 8).softmax(-1)
    torch.testing.assert_close(out, (weights @ values[:, :, :count]).flatten(1, 2), rtol=1e-4, atol=1e-5)


def test_dense_ways_that_disagree_end_the_run(bench, monkeypatch):
    right = bench_model.ways

    def with_a_wrong_one(*args):
        yield from right(*args)
        yield Way("dense: broken", lambda i, q, k, v: -q)

    monkeypatch.setattr(bench_model, "ways", with_a_wrong_one)
    with pytest.raises(WrongOutput, match="dense: broken: its logits have a cosine of"):
        measure_ways(bench, bench.work.cache.selector, 0.9, 1, Deadline(None))


def test_a_baseline_that_cannot_run_is_named_and_a_sparse_way_ends_the_run(bench, monkeypatch):
    def fail(*args):
        raise RuntimeError("No available kernel.\nmore")

    right = bench_model.ways

    def broken(name):
        return lambda *args: [*right(*args), Way(name, fail)]

    monkeypatch.setattr(bench_model, "ways", broken("dense: broken"))
    found, skipped = measure_ways(bench, bench.work.cache.selector, 0.9, 1, Deadline(None))
    assert skipped["dense: broken"] == "RuntimeError: No available kernel."
    assert PAGED in found
    monkeypatch.setattr(bench_model, "ways", broken("mine"))
    with pytest.raises(RuntimeError, match="No available kernel"):
        measure_ways(bench, bench.work.cache.selector, 0.9, 1, Deadline(None))


def test_ratios_and_shares():
    timed = {REST: {"ms": 4.0}, "quest + top-p": {"ms": 5.0}, "dense: a": {"ms": 12.0}, "dense: b": {"ms": 10.0}}
    result = {"ways": timed}
    summarise(result)
    assert result["best_dense"] == "dense: b"
    assert timed["quest + top-p"]["ratio"] == 2.0
    assert timed["dense: a"]["ratio"] == pytest.approx(10 / 12)
    assert timed["quest + top-p"]["attention_share"] == pytest.approx(0.2)
    assert timed["dense: b"]["attention_share"] == pytest.approx(0.6)
    assert timed[REST]["attention_share"] == 0


def test_memory_of_the_large_cell():
    """16 GB of weights, 68.7 of K and V, 9.1 of 4-bit keys and some 2 of metadata: an H200, and no H100."""
    cell = ModelCell(SHAPES["llama-3.1-8b"], 16, 32768)
    assert 96e9 < cell.memory() < 103e9
    assert ModelCell(SHAPES["llama-3.1-8b"], 1, 32768).memory() < 30e9


def test_a_run_on_a_cpu_goes_through_everything(tmp_path, capsys):
    out = tmp_path / "x.json"
    words = ["model", "--device", "cpu", "--batches", "1", "2", "--length", "256", "--repeats", "1", "--out", str(out)]
    assert main(words) == 0
    cells = load(out)["cells"]
    assert [(cell["batch"], cell["model"], cell["start"]) for cell in cells] == [(1, "tiny", 192), (2, "tiny", 192)]
    for cell in cells:
        assert cell["ways"]["quest + top-p"]["ms"] > 0
        assert cell["ways"][PAGED]["logits_cosine"] == pytest.approx(1.0)
        assert cell["check"]["error_to_reference"] < 1e-4
        assert 1 <= cell["budgets"]["union"]["mean"] < 48
    said = capsys.readouterr().out
    assert "<- best dense" in said
    assert "dense: flashinfer" in said  # or why not
    assert main([*words, "--missing"]) == 0
    assert capsys.readouterr().out.count("there already") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--repeats", "61"], "--repeats: expected at most 60"), (["--batches", "0"], "--batches: expected at least 1")],
)
def test_a_wrong_command_line_is_told_what_is_wrong(words, message):
    with pytest.raises(ValueError, match=message):
        main(["model", "--device", "cpu", *words])


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))),
    reason="needs an NVIDIA GPU of compute capability 8.0 or more, and CuPy",
)
def test_a_tiny_model_in_graphs(tmp_path):
    out = tmp_path / "x.json"
    words = ["model", "--shape", "tiny", "--batches", "2", "--length", "4k", "--repeats", "3", "--out", str(out)]
    assert main(words) == 0
    (cell,) = load(out)["cells"]
    assert {"quest + top-p", "quest top-k, N/8", PAGED, "dense: cudnn"} <= set(cell["ways"]) | set(cell["skipped"])
    assert cell["ways"]["quest + top-p"]["logits_cosine"] > 0.8
