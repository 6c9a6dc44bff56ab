"""NSA: a small random model with three branches and gates, step by step against the paper's equations in numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists, observed
from twilight import Geometry, NoPruning, PagedKVCache, TopP, TwilightAttention
from twilight_selectors.nsa import NSA

DIM, BLOCK, STRIDE, SELECTED, BLOCKS, WINDOW = 8, 8, 4, 16, 4, 10
OPTIONS = {"block": BLOCK, "stride": STRIDE, "selected": SELECTED, "num_blocks": BLOCKS, "window": WINDOW}


def block_scores(p: np.ndarray, blocks: int, block: int, stride: int, selected: int) -> list[float]:
    """Equation 9 with indices from 1, as printed: p_slc[j] = sum_m sum_n p[(l'/d) j - m - n]."""
    scores = []
    for j in range(1, blocks + 1):
        total = 0.0
        for m in range(selected // stride):
            for n in range(block // stride):
                i = selected // stride * j - m - n
                total += p[i - 1] if 1 <= i <= len(p) else 0.0
        scores.append(total)
    return scores


class Model:
    """One layer: projections of an input, each branch with its own K and V, phi, and gates."""

    def __init__(self, group: int, heads: int = 2, own: bool = True, mlp: bool = True) -> None:
        rng = np.random.default_rng(1)
        self.group, self.heads = group, heads
        self.wq = rng.normal(size=(12, heads * group, DIM))
        self.wk, self.wv = (rng.normal(size=(3, 12, heads, DIM)) / 2 for _ in range(2))
        if not own:
            self.wk[:], self.wv[:] = self.wk[1], self.wv[1]
        self.wg = rng.normal(size=(12, heads * group, 3))
        self.phi = {}
        for which in ("k", "v") if mlp else ():
            self.phi[which] = {
                "position": rng.normal(size=(BLOCK, DIM)) / 2,
                "weight1": rng.normal(size=(11, BLOCK * DIM)) / 6,
                "bias1": rng.normal(size=11) / 3,
                "weight2": rng.normal(size=(DIM, 11)) / 2,
                "bias2": rng.normal(size=DIM) / 3,
            }

    def save(self, path: Path) -> str | None:
        if not self.phi:
            return None
        from safetensors.numpy import save_file

        save_file(
            {f"layers.0.{w}.{k}": v.astype(np.float32) for w, part in self.phi.items() for k, v in part.items()}, path
        )
        return str(path)

    def compress(self, block: np.ndarray, which: str) -> np.ndarray:
        if which not in self.phi:
            return block.mean(0)
        w = self.phi[which]
        hidden = np.maximum(0, w["weight1"] @ (block + w["position"]).reshape(-1) + w["bias1"])
        return w["weight2"] @ hidden + w["bias2"]

    def step(self, x: np.ndarray, p: float | None = None) -> tuple[np.ndarray, list[list[int]]]:
        """Return the output at the last of x `[t, 12]`, `[Hq, d]`, and each kv head's selected blocks."""
        t = len(x)
        q = np.einsum("x,xhd->hd", x[-1], self.wq)
        k, v = (np.einsum("tx,cxhd->cthd", x, w) for w in (self.wk, self.wv))
        gates = 1 / (1 + np.exp(-np.einsum("x,xhc->hc", x[-1], self.wg)))
        out, chosen = np.zeros((len(q), DIM)), []
        for head in range(self.heads):
            starts = [first for first in range(0, t, STRIDE) if first + BLOCK <= t]
            small_k = np.array([self.compress(k[0, s : s + BLOCK, head], "k") for s in starts]).reshape(-1, DIM)
            small_v = np.array([self.compress(v[0, s : s + BLOCK, head], "v") for s in starts]).reshape(-1, DIM)
            mine = range(head * self.group, (head + 1) * self.group)
            blocks = -(-t // SELECTED)
            scores = np.zeros(blocks)
            for h in mine:
                weights = oracles.softmax(small_k @ q[h] / math.sqrt(DIM)) if starts else np.zeros(0)
                out[h] += gates[h, 0] * (weights @ small_v)
                scores += block_scores(weights, blocks, BLOCK, STRIDE, SELECTED)
            forced = {0, blocks - 1, max(0, blocks - 2)}
            others = sorted(set(range(blocks)) - forced, key=lambda j: (-scores[j], j))
            chosen.append(sorted(forced | set(others[: BLOCKS - len(forced)])))
            tokens = [s for j in chosen[-1] for s in range(j * SELECTED, min(t, (j + 1) * SELECTED))]
            if p is not None:
                kept = set()
                for h in mine:
                    read = np.array([oracles.dequantize(key) for key in k[1, tokens, head]])
                    kept |= {tokens[i] for i in oracles.top_p(read @ q[h] / math.sqrt(DIM), p)}
                tokens = sorted(kept)
            near = range(max(0, t - WINDOW), t)
            for h in mine:
                for branch, which in ((1, tokens), (2, near)):
                    part, _ = oracles.attend(q[h], k[branch][which, head], v[branch][which, head], DIM**-0.5)
                    out[h] += gates[h, branch] * part
        return out, chosen

    def tensors(self, x: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return q `[t, Hq, d]`, k and v `[3, t, Hkv, d]`, gates `[t, Hq, 3]`, float32."""
        q = np.einsum("tx,xhd->thd", x, self.wq)
        k, v = (np.einsum("tx,cxhd->cthd", x, w) for w in (self.wk, self.wv))
        gates = 1 / (1 + np.exp(-np.einsum("tx,xhc->thc", x, self.wg)))
        return tuple(torch.tensor(part, dtype=torch.float32) for part in (q, k, v, gates))


@pytest.mark.parametrize("prompt", [[], [40], [5, 33, 20]])
@pytest.mark.parametrize(("group", "own", "mlp", "page", "p"), [
    (1, True, True, 4, None), (3, True, False, 16, None), (2, False, True, 16, 0.7), (2, True, True, 12, None),
])  # fmt: skip
def test_a_model_step_by_step(
    tmp_path: Path, prompt: list[int], group: int, own: bool, mlp: bool, page: int, p: float | None
) -> None:
    """Two rows of different inputs; a prompt in chunks, then 20 steps, through lengths without a complete block."""
    model = Model(group, own=own, mlp=mlp)
    selector = NSA(**OPTIONS, weights=model.save(tmp_path / "phi.safetensors"))
    geometry = Geometry(1, 2 * group, 2, DIM, page, torch.float32)
    total = sum(prompt) + 20
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, total, 12))
    q, k, v, gates = (torch.stack(parts) for parts in zip(*(model.tensors(row) for row in x), strict=True))
    caches = [
        PagedKVCache(
            geometry, num_rows=2, num_pages=2 * (total // page + 1), selector=selector if branch == 1 else None
        )
        for branch in range(3 if own else 2)
    ]
    layers = [cache.layers[0] for cache in caches]
    main = layers[1]
    branches = {"compressed": layers[0], "window": layers[2]} if own else {}
    attention = TwilightAttention(selector, NoPruning() if p is None else TopP(p))

    def append(first: int, last: int) -> None:
        for branch in range(3) if own else (1,):
            layers[branch].append(k[:, branch, first:last], v[:, branch, first:last])
        selector.gate(main, gates[:, last - 1], **branches)

    first = 0
    for size in prompt:
        append(first, first + size)
        selector.observe(q[:, first : first + size], main)
        first += size
    for step in range(first, total):
        append(step, step + 1)
        out, _ = attention.attend(q[:, step], main)
        for row in range(2):
            want, _ = model.step(x[row, : step + 1], p)
            assert oracles.array(out[row]) == pytest.approx(want, abs=2e-4)


def test_scores_of_blocks_are_those_of_the_equation() -> None:
    """With the paper's numbers too: 4 j - 1 to 4 j + 3, the ends once, the others twice."""
    for block, stride, selected in ((32, 16, 64), (8, 4, 16), (64, 64, 64), (16, 16, 64), (64, 16, 64)):
        selector = NSA(block, stride, selected)
        for count in (1, 7, 20):
            p = np.random.default_rng(count).random(count)
            blocks = 6
            want = block_scores(p, blocks, block, stride, selected)
            have = selector._block_scores(torch.tensor(p[None, None]), blocks)
            assert have.flatten().tolist() == pytest.approx(want)
    one = [NSA()._block_scores(torch.eye(12, dtype=torch.float64)[None, :, :], 3)[0, i].tolist() for i in range(12)]
    assert [row[1] for row in one] == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0]
    assert [row[0] for row in one] == [2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_without_gates_it_is_its_selected_branch() -> None:
    model = Model(2, own=False, mlp=False)
    x = np.random.default_rng(3).normal(size=(70, 12))
    q, k, v, _ = model.tensors(x)
    selector = NSA(**OPTIONS)
    cache = PagedKVCache(Geometry(1, 4, 2, DIM, 4, torch.float32), num_rows=1, num_pages=20, selector=selector)
    layer = cache.layers[0]
    layer.append(k[None, 1, :69], v[None, 1, :69])
    selector.observe(q[None, :69], layer)
    out, _ = TwilightAttention(selector, NoPruning()).decode(q[None, 69], k[None, 1, 69], v[None, 1, 69], layer)
    _, chosen = model.step(x)
    for head in range(2):
        tokens = [t for j in chosen[head] for t in range(16 * j, min(70, 16 * j + 16))]
        for h in (2 * head, 2 * head + 1):
            mine, theirs = oracles.array(k[1, tokens, head]), oracles.array(v[1, tokens, head])
            want, _ = oracles.attend(oracles.array(q[69, h]), mine, theirs, DIM**-0.5)
            assert oracles.array(out[0, h]) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("page", [4, 12, 16, 32])
def test_forced_blocks_and_ragged_rows(page: int) -> None:
    lengths = [200, 64, 17, 16, 1, 0]
    selector = NSA(**OPTIONS)
    cache, _, _ = observed(Geometry(1, 2, 2, 12, page, torch.float32), lengths, selector)
    layer = cache.layers[0]
    selection = selector.select(torch.randn(6, 2, 12), layer, layer.budget(TwilightAttention(selector).budget))
    assert selection.granularity == (page if SELECTED % page == 0 else 1)
    for row, length in enumerate(lengths):
        for entries in lists(selection)[row]:
            tokens = oracles.tokens_of(entries, selection.granularity, length)
            blocks = {token // SELECTED for token in tokens}
            assert len(blocks) == min(BLOCKS, -(-length // SELECTED))
            assert blocks >= {0, (length - 1) // SELECTED, max(0, (length - 1) // SELECTED - 1)} or not length
            assert tokens == [t for j in sorted(blocks) for t in range(16 * j, min(length, 16 * j + 16))]


def test_cut_tokens_and_an_aborted_step_leave_no_trace() -> None:
    geometry = Geometry(2, 2, 2, 8, 4, torch.float32)
    selector = NSA(**OPTIONS)
    cache, keys, values = fill(geometry, [30], selector)
    plain, _, _ = fill(geometry, [30], selector)
    for each, chunks in ((cache, [(0, 30)]), (plain, [(0, 23), (23, 30)])):
        each.truncate(0, 0)
        for first, last in chunks:
            for layer, k, v in zip(each.layers, keys, values, strict=True):
                layer.append(k[:, first:last], v[:, first:last])
                selector.observe(torch.zeros(1, last - first, 2, 8), layer)
    cache.truncate(0, 23)
    cache.layers[0].append(-keys[0][:, 23:30], -values[0][:, 23:30])
    selector.observe(torch.zeros(1, 7, 2, 8), cache.layers[0])
    cache.abort()
    for layer, k, v in zip(cache.layers, keys, values, strict=True):
        layer.append(k[:, 23:30], v[:, 23:30])
        selector.observe(torch.zeros(1, 7, 2, 8), layer)
    complete = (30 - BLOCK) // STRIDE + 1
    for one, other in zip(cache.layers, plain.layers, strict=True):
        for name in ("compressed_k", "compressed_v"):
            assert torch.equal(one.state(name)[:, :, :complete], other.state(name)[:, :, :complete])


def test_bytes_by_hand() -> None:
    assert NSA().bytes_per_token(Geometry(1, 2, 2, 128)) == 2 * 256 / 16


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    for options, message in (
        ({"block": 24}, "block: expected a multiple of stride=16, got 24"),
        ({"selected": 40}, "selected: expected a multiple of stride=16, got 40"),
        ({"block": 128}, "selected: expected at least block=128, got 64"),
        ({"num_blocks": 2}, "num_blocks: expected at least the 3 that are forced in, got 2"),
        ({"window": 0}, "window: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            NSA(**options)
    path = Model(1).save(tmp_path / "phi.safetensors")
    with pytest.raises(ValueError, match=r"has no layers\.1\.k\.position; it needs one for every layer"):
        NSA(**OPTIONS, weights=path).prepare(Geometry(2, 2, 2, DIM))
    with pytest.raises(ValueError, match=r"layers\.0\.k\.position: expected shape \[8, 16\], got \[8, 8\]"):
        NSA(**OPTIONS, weights=path).prepare(Geometry(1, 2, 2, 16))
    selector = NSA(**OPTIONS)
    cache, _, _ = fill(Geometry(1, 2, 2, 8, 4, torch.float32), [20], selector)
    with pytest.raises(ValueError, match=r"gates: expected shape \[1, 2, 3\], got \[1, 2, 2\]"):
        selector.gate(cache.layers[0], torch.zeros(1, 2, 2))
