"""vAttention: who is attended to for sure, how large the sample is, that weights are right and the promise is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists, observed
from tests.test_config import one
from tests.test_draws import by_hand
from twilight import (
    Budget,
    Geometry,
    NoPruning,
    PagedKVCache,
    Selection,
    StateSpec,
    TopP,
    TwilightAttention,
    UniformBudget,
)
from twilight.config import build_selector
from twilight.errors import UnknownNameError
from twilight_selectors.double_sparsity import DoubleSparsity
from twilight_selectors.streaming_llm import StreamingLLM
from twilight_selectors.vattention import VAttention

Z = {0.1: 1.6448536269514722, 0.3: 1.0364333894937898}  # the normal distribution's quantiles at 1 - delta/2


def bounds_of_pages(queries: np.ndarray, keys: np.ndarray, page: int) -> list[float]:
    """Quest's scores of one kv head, its query heads combined by the sum of softmaxes."""
    pages = [keys[first : first + page] for first in range(0, len(keys), page)]
    total = np.zeros(len(pages))
    for q in queries:
        bound = [sum(max(a * b for b in part[:, c]) for c, a in enumerate(q)) for part in pages]
        total += oracles.softmax(np.array(bound) / len(q) ** 0.5)
    return total.tolist()


def by_loops(
    queries: np.ndarray, keys: np.ndarray, budget: int, head: int, page: int, options: dict
) -> tuple[set[int], float, list[int]]:
    """Return (E, the b that is asked for, the others in the order in which they are drawn) of one kv head."""
    length, dim = keys.shape
    sinks, local = options["sinks"], options["local"]
    sure = {t for t in range(length) if t < sinks or t >= length - local}
    share = math.floor(0.5 * (budget - len(sure)))
    if share >= page:
        scores = bounds_of_pages(queries, keys, page)
        newest = len(scores) - 1
        best = sorted(range(newest), key=lambda i: -scores[i])[: share // page - 1]
        sure |= {t for i in [newest, *best] for t in range(i * page, (i + 1) * page) if t < length}
    rest = [t for t in range(length) if t not in sure]

    def order(draw: int) -> list[int]:
        return sorted(rest, key=lambda t: -by_hand(options["seed"], draw, 0, head, length, t))

    first = min(len(rest), max(32, math.ceil(options["base_rate"] * len(rest))))
    asked = 0.0
    for q in queries:
        logit = {t: float(oracles.dequantize(keys[t]) @ q) / dim**0.5 for t in range(length)}
        sample = np.array([math.exp(logit[t]) for t in order(1)[:first]])
        denominator = sum(math.exp(logit[t]) for t in sure) + len(rest) * sample.mean()
        spread = math.sqrt(((sample - sample.mean()) ** 2).sum() / (first - 1))
        asked = max(asked, (Z[options["delta"]] * spread * len(rest) / (options["epsilon"] * denominator)) ** 2)
    return sure, min(len(rest), max(first, asked)), order(2)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("budget", "epsilon", "delta"), [(1.0, 0.3, 0.3), (60, 0.1, 0.1), (1.0, 0.05, 0.1)])
def test_by_loops(budget: float | int, epsilon: float, delta: float, group: int) -> None:
    lengths, page = [150, 121, 64], 4
    options = {"epsilon": epsilon, "delta": delta, "base_rate": 0.1, "sinks": 2, "local": 5, "seed": 3}
    # Quest's metadata in full precision, so that its pages are those of the bounds themselves.
    selector = VAttention(base_options={"metadata_type": "native"}, **options)
    cache, keys, _ = fill(Geometry(1, 2 * group, 2, 16, page, torch.float32), lengths, selector)
    layer = cache.layers[0]
    q = 1.5 * torch.randn(3, 2 * group, 16)
    given = layer.budget(UniformBudget(budget))
    selection = selector.select(q, layer, given)
    cut = 0
    for row, length in enumerate(lengths):
        for head in range(2):
            queries = oracles.array(q[row, head * group : (head + 1) * group])
            tokens = int(given.tokens[row, head])
            mine = oracles.array(keys[0][row, :length, head])
            sure, asked, order = by_loops(queries, mine, tokens, head, page, options)
            count = int(selection.lengths[row, head])
            size = count - len(sure)
            assert count <= tokens
            if asked > tokens - len(sure):
                assert count == tokens
                cut += 1
            else:
                # The next whole number, up to float32 in the logits.
                assert asked * (1 - 1e-4) <= size <= asked * (1 + 1e-4) + 1
            chosen = selection.indices[row, head, :count].tolist()
            assert chosen == sorted(sure | set(order[:size]))
            weight = math.log((length - len(sure)) / size) if size else 0.0
            want = [0.0 if token in sure else weight for token in chosen]
            for query in range(head * group, (head + 1) * group):
                assert selection.log_weight[row, query, :count].tolist() == pytest.approx(want, abs=1e-6)
    assert cut if budget == 60 else cut < 6


def _errors(epsilon: float, delta: float, spread: float, heads: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Return the relative errors of the denominators, `[draws, 2]`, and the tokens read, `[draws]`.

    Every kv head holds the same keys and is asked by the same two queries: each is another draw.
    """
    length, seeds = 1000, 6
    torch.manual_seed(11)
    k, q = torch.randn(1, length, 1, 16), spread * torch.randn(1, 2, 16)
    logits = q[0].double() @ k[0, :, 0].double().T / 4
    selector = VAttention("quest", {}, 0.1, epsilon, delta, base_rate=0.05, sinks=4, local=8)
    cache = PagedKVCache(
        Geometry(1, 2 * heads, heads, 16, 4, torch.float32), num_rows=1, num_pages=250, selector=selector
    )
    layer = cache.layers[0]
    layer.append(*[k.expand(-1, -1, heads, -1).contiguous()] * 2)
    errors, read = [], []
    for seed in range(seeds):
        mine = VAttention("quest", {}, 0.1, epsilon, delta, base_rate=0.05, sinks=4, local=8, seed=seed)
        selection = mine.select(q.repeat(1, heads, 1), layer, layer.budget(UniformBudget(1.0)))
        for head, count in enumerate(selection.lengths[0].tolist()):
            tokens = selection.indices[0, head, :count].long()
            terms = logits[:, tokens] + selection.log_weight[0, 2 * head : 2 * head + 2, :count].double()
            errors.append((terms.exp().sum(1) / logits.exp().sum(1) - 1).tolist())
            read.append(count)
    return np.array(errors), np.array(read)


@pytest.mark.parametrize(("epsilon", "delta", "spread"), [(0.1, 0.1, 0.7), (0.1, 0.3, 1.0), (0.2, 0.1, 1.5)])
def test_the_promise_is_kept_and_the_estimate_unbiased(epsilon: float, delta: float, spread: float) -> None:
    errors, read = _errors(epsilon, delta, spread)
    draws = len(errors)
    for query in range(2):
        missed = (np.abs(errors[:, query]) > epsilon).mean()
        assert missed <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)
        error = errors[:, query].std(ddof=1) / math.sqrt(draws)
        assert error < 0.01 and abs(errors[:, query].mean()) < 3.5 * error
    # Nothing would be shown by a sample of everything, nor by one that is larger than needed.
    assert read.mean() < 800 and np.abs(errors).max() > epsilon / 2


def test_a_looser_promise_reads_less() -> None:
    tight, loose = (_errors(epsilon, 0.1, 1.0, heads=4)[1].mean() for epsilon in (0.05, 0.3))
    assert loose < 0.5 * tight


@pytest.mark.parametrize(("rate", "first"), [(0.05, 32), (0.2, 37)])
def test_equal_keys_need_the_first_sample_only(rate: float, first: int) -> None:
    selector = VAttention(heavy=0.2, base_rate=rate, sinks=1, local=1)
    cache = PagedKVCache(Geometry(1, 2, 1, 16, 4, torch.float32), num_rows=1, num_pages=50, selector=selector)
    k = torch.randn(16).expand(1, 200, 1, 16).contiguous()
    cache.layers[0].append(k, k)
    layer = cache.layers[0]
    selection = selector.select(torch.randn(1, 2, 16), layer, layer.budget(UniformBudget(100)))
    # Quest has 0.2 of the 98 tokens that the ends leave, in whole pages: 16. Of pages that are all as good it takes the
    # first, where the sink is, and the newest, where the newest token is.
    sure = int((selection.log_weight[0, 0, : int(selection.lengths)] == 0).sum())
    assert (sure, int(selection.lengths) - sure) == (16, first)


def test_the_same_bits_again_and_other_ones_at_the_next_step() -> None:
    selector = VAttention(sinks=1, local=1)
    cache, _, _ = fill(Geometry(1, 2, 2, 16, 4, torch.float32), [300], selector)
    layer = cache.layers[0]
    q, k = torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    budget = UniformBudget(40)
    first, again = (selector.select(q, layer, layer.budget(budget)) for _ in range(2))
    assert torch.equal(first.indices, again.indices) and torch.equal(first.log_weight, again.log_weight)
    sampled = {t for t, w in zip(lists(first)[0][0], first.log_weight[0, 0].tolist(), strict=False) if w > 0}
    layer.append(k, k)
    later = set(lists(selector.select(q, layer, layer.budget(budget)))[0][0])
    assert len(sampled) > 15 and len(sampled & later) < 10


@pytest.mark.parametrize(("tokens", "length"), [(1, 50), (3, 50), (7, 9), (2, 2), (1, 1), (0, 0)])
def test_small_budgets_and_short_sequences(tokens: int, length: int) -> None:
    selector = VAttention(sinks=4, local=4)
    cache, _, _ = fill(Geometry(1, 2, 2, 16, 4, torch.float32), [length, 50], selector)
    layer = cache.layers[0]
    budget = Budget(torch.tensor([[tokens] * 2, [20] * 2], dtype=torch.int32), 20)
    selection = selector.select(torch.randn(2, 2, 16), layer, budget)
    for chosen in lists(selection)[0]:
        assert len(chosen) <= tokens and chosen == sorted(set(chosen))
        assert not tokens or chosen[-1] == length - 1
    weights = selection.log_weight[0, :, : int(selection.lengths[0, 0])]
    assert bool(weights.isfinite().all()) and bool((weights >= 0).all())


def test_a_nan_stays_in_its_row() -> None:
    selector = VAttention(sinks=1, local=1)
    cache, _, _ = fill(Geometry(1, 2, 2, 16, 4, torch.float32), [60, 60], selector)
    layer = cache.layers[0]
    q = torch.randn(2, 2, 16)
    alone = selector.select(q, layer, layer.budget(UniformBudget(30)))
    q[0] = torch.nan
    beside = selector.select(q, layer, layer.budget(UniformBudget(30)))
    assert torch.equal(alone.indices[1], beside.indices[1])
    assert torch.equal(alone.log_weight[1], beside.log_weight[1])


@pytest.mark.parametrize("base", ["oracle_topk", "streaming_llm", "full"])
def test_other_bases(base: str) -> None:
    selector = VAttention(base, sinks=1, local=2)
    cache, _, _ = fill(Geometry(1, 4, 2, 16, 4, torch.float32), [90, 20], selector)
    layer = cache.layers[0]
    selection = selector.select(torch.randn(2, 4, 16), layer, layer.budget(UniformBudget(30)))
    if base == "full":
        # It does not look at its budget, and what it proposes is not cut.
        assert lists(selection) == [[list(range(90))] * 2, [list(range(20))] * 2]
    else:
        assert selection.lengths.tolist() == [[30, 30], [20, 20]]
        assert selection.capacity < 90


def test_labels_are_those_of_the_base(tmp_path: Path) -> None:
    path = tmp_path / "double_sparsity.json"
    orders = [torch.randperm(16).tolist() for _ in range(2)]
    path.write_text(json.dumps({"layers": {"0": orders}}))
    options = {"calibration": str(path), "channels": 4}
    geometry = Geometry(1, 2, 2, 16, 4, torch.float32)
    selector = VAttention("double_sparsity", options, sinks=1, local=1)
    cache, keys, _ = fill(geometry, [60], selector)
    base = DoubleSparsity(**options)
    plain = PagedKVCache(geometry, num_rows=1, num_pages=16, selector=base)
    plain.layers[0].append(keys[0], keys[0])
    q = torch.randn(1, 2, 16)
    # Of 40 tokens 2 are the ends; half of the others is the base's, in whole pages of 4: 16.
    best = lists(base.select(q, plain.layers[0], Budget(torch.full((1, 2), 16, dtype=torch.int32), 16)))
    selection = selector.select(q, cache.layers[0], cache.layers[0].budget(UniformBudget(40)))
    for head in range(2):
        weights = selection.log_weight[0, head, : int(selection.lengths[0, head])]
        sure = {t for t, w in zip(lists(selection)[0][head], weights.tolist(), strict=True) if w == 0}
        assert sure == {0, 59, *best[0][head]}


def test_the_base_sees_prompts_and_what_was_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Base(StreamingLLM):
        def state(self, geometry):
            return (StateSpec("count", (), torch.int32),)

        def observe(self, q, layer):
            seen.append(("observe", q.shape[1]))
            layer.update_state("count", layer.state("count") + q.shape[1])

        def finish(self, q, layer, kept, out, lse):
            seen.append(("finish", kept.lengths.tolist()))
            return torch.full_like(out, torch.nan), lse

    monkeypatch.setattr("twilight_selectors.vattention.create_selector", lambda name, **options: Base())
    selector = VAttention("streaming_llm", sinks=1, local=1)
    cache, _, _ = observed(Geometry(1, 2, 2, 16, 4, torch.float32), [30], selector)
    layer = cache.layers[0]
    q = torch.randn(1, 2, 16)
    out, _ = TwilightAttention(selector, NoPruning(), 1.0).decode(q, q, q, layer)
    assert bool(out.isfinite().all())  # a correction for what the base did not read is not wanted
    assert layer.state("count").tolist() == [[30, 30]]
    assert seen == [("observe", 30), ("finish", [[31, 31]])]


@pytest.mark.parametrize("p", [1.0, 0.6])
def test_attention_is_over_the_weighted_tokens(p: float) -> None:
    length = 120
    selector = VAttention(sinks=2, local=3)
    cache, keys, values = fill(Geometry(1, 2, 2, 16, 4, torch.float32), [length], selector)
    layer = cache.layers[0]
    q, k, v = (torch.randn(1, 2, 16) for _ in range(3))
    out, _ = TwilightAttention(selector, TopP(p) if p < 1 else NoPruning(), 60).decode(q, k, v, layer)
    selection: Selection = selector.select(q, layer, layer.budget(UniformBudget(60)))
    for head in range(2):
        count = int(selection.lengths[0, head])
        tokens = selection.indices[0, head, :count].tolist()
        weights = oracles.array(selection.log_weight[0, head, :count])
        mine = np.concatenate([oracles.array(keys[0][0, :, head]), oracles.array(k[:, head])])[tokens]
        theirs = np.concatenate([oracles.array(values[0][0, :, head]), oracles.array(v[:, head])])[tokens]
        vector = oracles.array(q[0, head])
        kept = list(range(count))
        if p < 1:
            read = np.array([oracles.dequantize(key) for key in mine])
            kept = sorted(oracles.top_p(read @ vector / 4 + weights, p))
            assert any(weights[kept] > 0) and len(kept) < count
        want, _ = oracles.attend(vector, mine[kept], theirs[kept], 0.25, weights[kept])
        assert oracles.array(out[0, head]) == pytest.approx(want, abs=1e-4)


def test_bytes_are_those_of_the_base_and_of_the_first_sample() -> None:
    geometry = Geometry(1, 2, 2, 64, 16)
    # Quest in 8 bits: 2 * 64 + 4 bytes for 16 tokens; of 2 % of the tokens 32 + 4 bytes of 4-bit key.
    assert VAttention(base_rate=0.02).bytes_per_token(geometry) == pytest.approx(8.25 + 0.02 * 36)


def test_refuses_what_does_not_fit() -> None:
    for name in ("heavy", "epsilon", "delta", "base_rate"):
        with pytest.raises(ValueError, match=f"{name}: expected a number between 0 and 1, got 1.5"):
            VAttention(**{name: 1.5})
    with pytest.raises(ValueError, match="base: expected another selector than 'vattention'"):
        VAttention("vattention")
    with pytest.raises(UnknownNameError, match="quest"):
        VAttention("qest")
    selector = VAttention("magicpig", sinks=1, local=1)
    cache, _, _ = fill(Geometry(1, 2, 2, 16, 4, torch.float32), [60], selector)
    layer = cache.layers[0]
    with pytest.raises(ValueError, match="base: 'magicpig' weights its tokens"):
        selector.select(torch.randn(1, 2, 16), layer, layer.budget(UniformBudget(30)))


def test_the_base_and_its_options_come_from_the_command_line(site) -> None:
    words = ["selector=vattention", "selector.base=streaming_llm", "+selector.base_options.sinks=2"]
    selector = build_selector(one(*words))
    assert selector == VAttention("streaming_llm", {"sinks": 2})
    assert selector._base == StreamingLLM(2)
    assert build_selector(one("selector=vattention")) == VAttention()
