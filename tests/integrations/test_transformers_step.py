"""Captured steps of a whole model: what `handle.generate` gives against transformers' own, and rows that come and go.

On a CPU the same steps run over the same static shapes, without a graph.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

from transformers import DynamicCache, LlamaConfig, StoppingCriteria  # noqa: E402

import twilight  # noqa: E402
from tests.integrations.test_transformers import GREEDY, Everything, Newest, make, prompt  # noqa: E402
from tests.test_graph import GPU  # noqa: E402
from twilight.errors import UnsupportedModelError  # noqa: E402
from twilight.integrations import transformers_step  # noqa: E402
from twilight.loading import tiny_path  # noqa: E402

SAMPLED = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5, "top_k": 30}


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture(scope="module")
def tiny():
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()
    text = torch.tensor(list((twilight.__doc__ + transformers_step.__doc__).encode())) + 3
    ids = torch.stack([text[:300], text[200:500], text[100:400]]) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :120] = 0
    return model, {"input_ids": ids, "attention_mask": mask}


def seeded(generate, *args, **options):
    torch.manual_seed(5)
    return generate(*args, **options)


@contextlib.contextmanager
def said(reason: str):
    """Check that a warning says why steps are eager."""
    with pytest.warns(UserWarning, match=f"decodes eagerly, without a captured step: .*{reason}"):
        yield


@pytest.fixture(autouse=True)
def nothing_is_said_unasked():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="twilight decodes eagerly")
        yield


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_everything_kept_generates_what_dense_does(name, options):
    model = make(name)
    ids, mask = prompt(rows=3)
    expected = seeded(model.generate, ids, attention_mask=mask, **options)
    with twilight.attach(model, Everything(), p=1.0, dense_layers=1) as handle:
        got = seeded(handle.generate, ids, attention_mask=mask, **options)
    assert got.equal(expected)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("selector", "p"), [("quest", 0.9), ("streaming_llm", 0.8), ("double_sparsity", 0.9)])
def test_the_small_model_decodes_as_without_static_shapes(tiny, selector, p, options):
    model, batch = tiny
    with twilight.attach(model, selector, p, budget=twilight.UniformBudget(0.25, 16), stats=True) as handle:
        expected = seeded(model.generate, **batch, past_key_values=handle.cache(), **options)
        eager = handle.stats().summary()
        handle.stats().clear()
        assert seeded(handle.generate, **batch, **options).equal(expected)
        captured = handle.stats().summary()
    for before, after in zip(eager, captured, strict=True):
        assert before["b1_group"]["mean"] < before["b0"]["mean"] < before["seq_len"]
        for figure in ("layer", "steps", "dense_steps", "seq_len", "b0", "b1_query", "b1_group", "dense_bytes"):
            assert after[figure] == before[figure]
        assert after["mass"]["mean"] == pytest.approx(before["mass"]["mean"], abs=1e-4)


def test_the_small_model_with_everything_kept_decodes_what_dense_does(tiny):
    model, batch = tiny
    expected = model.generate(**batch, **GREEDY)
    with twilight.attach(model, "full", 1.0) as handle:
        assert handle.generate(**batch, **GREEDY).equal(expected)


def test_rows_end_when_they_say_so(llama):
    ids, mask = prompt(rows=3)
    free = llama.generate(ids, attention_mask=mask, **GREEDY)[:, 50:]
    end = next(int(token) for token in free[0, 4:] if token not in free[0, :4] and token not in free[2, :12])
    options = {**GREEDY, "eos_token_id": end, "attention_mask": mask}
    expected = llama.generate(ids, **options)
    assert (expected[0, 50 + 12 :] == 0).all() and (expected[2, 50:62] != 0).all()
    with twilight.attach(llama, Everything(), p=1.0) as handle:
        assert handle.generate(ids, **options).equal(expected)


def test_processors_criteria_streamers_and_scores_are_transformers_own(llama):
    class Odd(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 63)

    class Heard(list):
        put, end = list.append, lambda self: self.append("end")

    ids, _ = prompt(rows=1)
    options = {
        **GREEDY,
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }

    def run(generate):
        heard = Heard()
        out = generate(ids, stopping_criteria=[Odd()], streamer=heard, **options)
        return out, heard

    expected, said_then = run(llama.generate)
    with twilight.attach(llama, Everything(), p=1.0) as handle:
        got, heard = run(handle.generate)
    assert got.sequences.equal(expected.sequences) and got.sequences.shape[1] == 63
    assert [part if isinstance(part, str) else part.flatten().tolist() for part in heard] == [
        part if isinstance(part, str) else part.flatten().tolist() for part in said_then
    ]
    for mine, other in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert got.past_key_values.get_seq_length() == 62


def test_a_conversation_goes_on_with_the_same_cache(llama):
    ids, mask = prompt()
    more = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    first = llama.generate(ids, attention_mask=mask, **GREEDY)
    both = torch.cat([first, more], dim=1)
    longer = torch.cat([mask, torch.ones(2, 29, dtype=torch.long)], dim=1)
    expected = llama.generate(both, attention_mask=longer, **GREEDY)
    with twilight.attach(llama, Everything(), p=1.0) as handle:
        for second in (handle.generate, llama.generate):
            cache = handle.cache()
            assert handle.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY).equal(first)
            assert cache.paged.table.lengths == [69, 56] and cache.get_seq_length() == 69
            assert cache.real.sum(1).tolist() == [69, 56]
            assert second(both, attention_mask=longer, past_key_values=cache, **GREEDY).equal(expected)
            assert cache.paged.table.lengths == [98, 85]


@pytest.mark.parametrize("steps", [1, 3])
def test_pages_are_reserved_as_often_as_it_takes(llama, monkeypatch, steps):
    monkeypatch.setattr(transformers_step, "STEPS", steps)
    ids, mask = prompt()
    expected = llama.generate(ids, attention_mask=mask, **GREEDY)
    with twilight.attach(llama, Everything(), p=1.0) as handle:
        assert handle.generate(ids, attention_mask=mask, **GREEDY).equal(expected)


def test_room_is_made_with_the_prompt_and_handed_back(llama):
    ids, mask = prompt(rows=3, columns=48)
    with twilight.attach(llama, Everything(), p=1.0) as handle:
        out = handle.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    # 48 columns and 20 new tokens are five pages of 16 a row, and they were enough. What padding left over is free.
    table = out.past_key_values.paged.table
    assert table.num_pages == 15
    assert table.lengths == [67, 54, 41] and table.num_free == 15 - (5 + 4 + 3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 3}, "this is beam search"),
        ({"prompt_lookup_num_tokens": 3}, "this is assisted generation"),
        ({"use_cache": False}, "use_cache=False"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"custom_generate": lambda model, input_ids, **_: input_ids + 1}, "custom_generate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_captured_is_decoded_eagerly_and_said(llama, options, reason):
    ids, _ = prompt(rows=1)
    ids = torch.cat([ids, ids[:, :30]], dim=1)
    options = {**GREEDY, **options}
    expected = llama.generate(ids, **options)
    with twilight.attach(llama, Everything(), p=1.0) as handle:
        with said(reason):
            got = handle.generate(ids, **options)
        if isinstance(got, torch.Tensor):
            assert got.equal(expected)
        else:
            assert got.sequences.equal(expected.sequences) and len(got.hidden_states) == 20


def test_without_capture_it_is_transformers_generate(llama, monkeypatch):
    monkeypatch.setattr(transformers_step, "DecodeStep", lambda *_, **__: pytest.fail("captured"))
    ids, mask = prompt()
    expected = llama.generate(ids, attention_mask=mask, **GREEDY)
    with twilight.attach(llama, Everything(), p=1.0) as handle:
        assert handle.generate(ids, attention_mask=mask, capture=False, **GREEDY).equal(expected)


def test_sliding_windows_are_decoded_eagerly():
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    model = make("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=2, layer_types=kinds)
    ids, mask = prompt()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with twilight.attach(model, Everything(), p=1.0, dense_layers=1) as handle:
        with said("layers 2 attend to a sliding window"):
            assert handle.generate(ids, attention_mask=mask, **GREEDY).equal(expected)
        cache = handle.cache()
        model(ids, past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match="Qwen3ForCausalLM: .* layers 2 attend to a sliding window"):
            handle.capture(cache)


def test_below_min_context_steps_are_dense_to_the_bit_and_say_so(llama):
    ids, mask = prompt()
    runs = []
    # Three dense layers and one below min_context, four below it, and four that are sparse: the first two are alike.
    for dense_layers, min_context in ((3, 70), (0, 70), (0, 60)):
        with twilight.attach(
            llama, Newest(), 0.9, budget=8, dense_layers=dense_layers, min_context=min_context, stats=True
        ) as handle:
            cache = handle.cache()
            llama(ids, attention_mask=mask, past_key_values=cache)
            # 50 tokens and 20 steps: the captured maximum is 70.
            with handle.capture(cache, max_new_tokens=20) as step:
                runs.append(torch.stack([step(ids[:, i]).clone() for i in range(5)]))
            dense = {row["dense_steps"] for row in handle.stats().summary()}
            assert dense == ({5} if min_context == 70 else {0})
    assert runs[0].equal(runs[1])
    assert not runs[1].equal(runs[2])


def test_p_may_change_between_steps(llama):
    ids, _ = prompt(rows=1)
    with twilight.attach(llama, Everything(), 0.5, dense_layers=0, stats=True) as handle:
        cache = handle.cache()
        llama(ids, past_key_values=cache)
        kept = []
        with handle.capture(cache) as step:
            for p in (0.5, 1.0):
                handle.p = p
                step(ids[:, 0])
                kept.append(handle.stats().records[-1].b1_query.float().mean())
    assert kept[0] < kept[1] == 52


def test_a_step_that_is_closed_or_open_guards_its_cache(llama):
    ids, _ = prompt()
    with twilight.attach(llama, Everything(), p=1.0) as handle:
        with pytest.raises(ValueError, match="the cache is empty; run the prompt through the model first"):
            handle.capture(handle.cache())
        cache = handle.cache()
        llama(ids, past_key_values=cache)
        step = handle.capture(cache, max_new_tokens=4)
        for change in (
            lambda: cache.crop(-1),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            cache.reset,
            lambda: handle.capture(cache),
        ):
            with pytest.raises(ValueError, match=r"steps of this cache are captured; close\(\)"):
                change()
        with pytest.raises(ValueError, match=r"input_ids: expected \[2\] or \[2, 1\], got \[1, 1\]"):
            step(ids[:1, :1])
        step(ids[:, :1])
        step.close()
        step.close()
        with pytest.raises(ValueError, match="step: it is closed"):
            step(ids[:, :1])
        cache.crop(-1)
        assert cache.paged.table.lengths == [50, 50] == [cache.get_seq_length()] * 2
    with pytest.raises(UnsupportedModelError, match="this handle is detached"):
        handle.generate(ids, **GREEDY)


def test_a_cache_whose_captured_step_failed_is_not_used_again(llama):
    class Failing(Everything):
        def select(self, q, layer, budget):
            if layer.index == 3 and layer.seq_lens[0] == 52:
                raise RuntimeError("it failed")
            return super().select(q, layer, budget)

    ids, _ = prompt(rows=1)
    with torch.inference_mode(), twilight.attach(llama, Failing(), p=1.0) as handle:
        cache = handle.cache()
        llama(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="it failed"), handle.capture(cache) as step:
            step(ids[:, 0])
            step(ids[:, 0])
        for again in (lambda: llama(ids[:, :1], past_key_values=cache), lambda: handle.capture(cache)):
            with pytest.raises(ValueError, match="an earlier step with this cache failed halfway"):
                again()
        cache.reset()
        llama(ids, past_key_values=cache)


class Alone:
    """A sequence decoded densely on its own by transformers, greedily: what a row of a changing batch must match."""

    def __init__(self, model, ids):
        self.model, self.cache = model, DynamicCache()
        self.logits = model(ids[None], past_key_values=self.cache).logits[:, -1]

    def step(self):
        self.logits = self.model(self.logits.argmax(-1)[:, None], past_key_values=self.cache).logits[:, -1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("expected_steps", [40, 4])
def test_sequences_join_leave_and_grow_while_one_captured_step_is_replayed(device, expected_steps):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=211, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    dense = transformers.LlamaForCausalLM(config).eval().to(device, dtype)
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 211, (n,), generator=generator).to(device) for n in (40, 23, 31, 90, 1)]
    # Logits are of the order of one: bfloat16 rounds them to 1/128.
    near = {"rtol": 1e-4, "atol": 1e-4} if device == "cpu" else {"rtol": 0, "atol": 4e-2}

    with torch.no_grad(), twilight.attach(model, "full", p=1.0, dense_layers=1) as handle:
        alone = [Alone(dense, texts[0]), Alone(dense, texts[1]), Alone(dense, texts[2])]
        ids = torch.nn.utils.rnn.pad_sequence(texts[:3], batch_first=True, padding_side="left")
        mask = torch.arange(40, device=device) >= 40 - torch.tensor([[40], [23], [31]], device=device)
        cache = handle.cache()
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        model(ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache)
        rows: list[Alone | None] = list(alone)
        lengths = [40, 23, 31]
        with handle.capture(cache, max_new_tokens=expected_steps) as step:
            assert (step.eager is None) == (device == "cuda")

            def steps(count):
                for _ in range(count):
                    newest = [torch.zeros(1, device=device) if row is None else row.logits.argmax(-1) for row in rows]
                    logits = step(torch.cat(newest).long())
                    for i, row in enumerate(rows):
                        if row is not None:
                            row.step()
                            lengths[i] += 1
                            torch.testing.assert_close(logits[i : i + 1, -1], row.logits, **near)

            def join(row, text):
                rows[row] = Alone(dense, text)
                lengths[row] = len(text)
                torch.testing.assert_close(step.join(row, text)[:, -1], rows[row].logits, **near)

            steps(6)
            step.leave(1)
            rows[1], lengths[1] = None, 0
            with pytest.raises(ValueError, match=r"row: expected one that holds a sequence, \[0, 2\], got 1"):
                step.leave(1)
            steps(3)
            with pytest.raises(ValueError, match=r"row: expected an empty one, \[1\], got 2"):
                step.join(2, texts[3])
            join(1, texts[3])  # longer than what its row held, and than the others
            steps(5)
            step.leave(0)
            step.leave(2)
            rows[0] = rows[2] = None
            lengths[0] = lengths[2] = 0
            join(2, texts[4])
            steps(8)
        assert cache.paged.table.lengths == lengths == [0, 90 + 13, 1 + 8]
        assert cache.get_seq_length() == 103 and cache.real.sum(1).tolist() == lengths
        # Eagerly, the cache goes on where the captured steps have ended.
        newest = torch.stack([rows[1].logits.argmax(-1), rows[2].logits.argmax(-1)])
        cache.batch_select_indices(torch.tensor([1, 2]))
        mask = torch.cat([cache.real, torch.ones(2, 1, dtype=torch.bool)], dim=1).long().to(device)
        where = torch.tensor([[103], [9]], device=device)
        logits = model(newest, attention_mask=mask, position_ids=where, past_key_values=cache).logits
        for i in (0, 1):
            rows[i + 1].step()
            torch.testing.assert_close(logits[i : i + 1, -1], rows[i + 1].logits, **near)


def on_gpu(**more):
    """A model whose steps the kernels serve."""
    return make("llama", head_dim=64, hidden_size=256, **more).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("selector", ["quest", "full", "streaming_llm"])
@pytest.mark.parametrize("min_context", [0, "auto"])
def test_a_replayed_step_does_what_the_step_does(device, selector, min_context):
    model = on_gpu()
    ids, mask = (part.to(device) for part in prompt(rows=3))
    out = {}
    with twilight.attach(model, selector, 0.9, budget=24, min_context=min_context, stats=True) as handle:
        for graph in (True, False):
            handle.stats().clear()
            cache = handle.cache()
            with torch.no_grad():
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            with handle.capture(cache, max_new_tokens=30, graph=graph) as step:
                assert (step.eager is None) == graph
                steps = []
                for _ in range(30):
                    # The same tokens, whatever rounding would choose.
                    logits = step(ids[:, len(steps)] if steps else logits[:, -1].argmax(-1)).clone()
                    steps.append(logits)
            out[graph] = torch.stack(steps), handle.stats().summary()
    torch.testing.assert_close(out[True][0], out[False][0], rtol=0, atol=2e-2)
    for mine, other in zip(out[True][1], out[False][1], strict=True):
        assert mine["dense_steps"] == other["dense_steps"] == (30 if min_context == "auto" else 0)
        assert mine["seq_len"] == other["seq_len"] == pytest.approx((50 + 37 + 24) / 3 + 15.5)
        assert mine["b0"] == other["b0"]
        assert mine["b1_group"]["mean"] == pytest.approx(other["b1_group"]["mean"], rel=0.02)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_generate_on_a_gpu_replays_and_samples_as_eagerly(device, options, monkeypatch):
    model = on_gpu()
    ids, mask = (part.to(device) for part in prompt(rows=3))
    replays = []
    replay = transformers_step.DecodeGraph.replay
    monkeypatch.setattr(transformers_step.DecodeGraph, "replay", lambda self: (replays.append(self), replay(self))[1])
    # Tokens are drawn from logits that graphs and eager steps round alike: p=1 keeps everything, in one order.
    with twilight.attach(model, "full", 1.0, min_context=0) as handle:
        got = seeded(handle.generate, ids, attention_mask=mask, **options)
        eager = seeded(handle.generate, ids, attention_mask=mask, capture=False, **options)
    assert len(replays) == 19 and len(set(replays)) == 1
    assert got.shape == (3, 70)
    # bfloat16: an eager step's dense layers round otherwise, so a token in twenty may differ, and with it what follows.
    assert (got[:, 50:53] == eager[:, 50:53]).float().mean() > 0.7


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_what_waits_for_the_gpu_is_found_before_a_capture_is_tried(device):
    model = on_gpu()
    ids, _ = prompt(rows=1)
    ids = ids.to(device)

    class Waiting(Everything):
        def select(self, q, layer, budget):
            assert q.abs().max().item() >= 0
            return super().select(q, layer, budget)

    with (
        twilight.attach(model, Waiting(), 1.0, min_context=0) as handle,
        said(r"the step waits for the GPU, .*test_transformers_step\.py:\d+"),
    ):
        handle.generate(ids, **GREEDY)
    # Random numbers are as they were: a capture that fails would have spoilt them.
    torch.randn(3, device=device)
    with twilight.attach(model.float(), Everything(), 1.0) as handle, said("float32"):
        handle.generate(ids, **GREEDY)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_a_graph_is_captured_again_when_p_is_set(device):
    model = on_gpu()
    ids, _ = prompt(rows=1)
    ids = ids.to(device)
    with torch.no_grad(), twilight.attach(model, "full", 0.5, min_context=0, stats=True) as handle:
        cache = handle.cache()
        model(ids, past_key_values=cache)
        kept = []
        with handle.capture(cache) as step:
            for p in (0.5, 1.0):
                handle.p = p
                step(ids[:, 0])
                kept.append(handle.stats().records[-1].b1_query.float().mean().item())
    assert kept[0] < kept[1] == 52
