"""Selectors with one mistake each, all but the first made of the sound one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from twilight import Contract, MetadataSpec, PageRanking, Selection, Selector, StateSpec, ops


@dataclass
class Sound(Selector):
    """The tokens of largest q . k, summed over the group."""

    name = "sound"

    def scores(self, q, layer):
        g = layer.geometry
        logits = ops.exact_logits(q, layer.k_pages, layer.page_table, layer.seq_lens, max_seq_len=layer.max_seq_len)
        return logits.unflatten(1, (g.num_kv_heads, -1)).sum(2)

    def select(self, q, layer, budget):
        return Selection.top(self.scores(q, layer), budget.tokens, capacity=budget.capacity, granularity=1)


class NoSelection(Sound):
    def select(self, q, layer, budget):
        return super().select(q, layer, budget).indices


class QueryHeads(Sound):
    def select(self, q, layer, budget):
        group = layer.geometry.group_size
        found = super().select(q, layer, budget)
        wide = (part.repeat_interleave(group, dim=1) for part in (found.indices, found.lengths))
        return Selection(*wide)


class WrongType(Sound):
    def select(self, q, layer, budget):
        found = super().select(q, layer, budget)
        return Selection(found.indices.long(), found.lengths)


class Granularity(Sound):
    def select(self, q, layer, budget):
        return replace(super().select(q, layer, budget), granularity=2)


class Duplicates(Sound):
    def select(self, q, layer, budget):
        found = super().select(q, layer, budget)
        indices = found.indices.clone()
        indices[..., 1:2] = indices[..., :1]
        return replace(found, indices=indices)


class Unsorted(Sound):
    def select(self, q, layer, budget):
        scores = self.scores(q, layer)
        return Selection(scores.argsort(dim=-1, descending=True)[..., : budget.capacity].int(), budget.tokens)


class IgnoresRagged(Sound):
    """Takes every row to be as long as the longest."""

    def select(self, q, layer, budget):
        end = layer.max_seq_len
        newest = torch.arange(end - budget.capacity, end, dtype=torch.int32).expand(*budget.tokens.shape, -1)
        return Selection(newest.contiguous(), torch.full_like(budget.tokens, budget.capacity))


class Nothing(Sound):
    def select(self, q, layer, budget):
        found = super().select(q, layer, budget)
        return replace(found, lengths=torch.zeros_like(found.lengths))


class OneMore(Sound):
    def select(self, q, layer, budget):
        counts = torch.minimum(budget.tokens + 1, layer.seq_lens[:, None])
        return Selection.top(self.scores(q, layer), counts, capacity=budget.capacity + 1, granularity=1)


class FirstHeadsBudget(Sound):
    """Looks at the first kv head's budget only."""

    def select(self, q, layer, budget):
        counts = budget.tokens[:, -1:].expand_as(budget.tokens)
        return Selection.top(self.scores(q, layer), counts, capacity=budget.capacity, granularity=1)


class ForgetsTail(Sound):
    """Whole pages only, unless there is none."""

    def select(self, q, layer, budget):
        size = layer.geometry.page_size
        full = torch.where(layer.seq_lens < size, 1, layer.seq_lens // size)
        pages = torch.minimum(full[:, None], budget.pages(size))
        scores = torch.arange(layer.page_table.shape[1]).expand(*pages.shape, -1).float()
        scores = scores.masked_fill(scores >= full[:, None, None], -torch.inf)
        return Selection.top(scores, pages, capacity=budget.page_capacity(size), granularity=size)


class Undeclared(Sound):
    def select(self, q, layer, budget):
        found = super().select(q, layer, budget)
        shape = (len(q), layer.geometry.num_q_heads, found.capacity)
        return replace(found, log_weight=torch.zeros(shape))


class WeighsNaN(Undeclared):
    def contract(self):
        return Contract(weighted=True)

    def select(self, q, layer, budget):
        found = super().select(q, layer, budget)
        return replace(found, log_weight=found.log_weight * torch.nan)


class WritesKeys(Sound):
    def select(self, q, layer, budget):
        layer.k_pages[layer.page_table[:, 0].long(), :, 0] = 0
        return super().select(q, layer, budget)


class ScalesQuery(Sound):
    def select(self, q, layer, budget):
        return super().select(q.mul_(0.5), layer, budget)


class Correcting(Sound):
    """Finishes with another result, and does not say so."""

    def finish(self, q, layer, kept, out, lse):
        return out * 0.9, lse


class Random(Sound):
    def scores(self, q, layer):
        scores = super().scores(q, layer)
        return scores + torch.randn_like(scores)


@dataclass
class KeepsRows(Sound):
    """Adds up what a row has scored, in the selector."""

    _past: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def scores(self, q, layer):
        scores = super().scores(q, layer)
        old = self._past.get(layer.index)
        if old is not None and len(old) == len(scores):
            n = min(old.shape[-1], scores.shape[-1])
            scores = torch.cat([scores[..., :n] + old[..., :n].nan_to_num(0, 0, 0), scores[..., n:]], dim=-1)
        self._past[layer.index] = scores
        return scores


class KeepsState(Sound):
    """Counts the pieces of prompts."""

    def state(self, geometry):
        return (StateSpec("pieces", (), torch.float32),)

    def observe(self, q, layer):
        layer.update_state("pieces", layer.state("pieces") + 1)

    def scores(self, q, layer):
        scores, pieces = super().scores(q, layer), layer.state("pieces").unsqueeze(-1)
        return torch.where(scores == -torch.inf, scores, scores * torch.where(pieces > 1, -1, 1))


class CountsPadding(Sound):
    """Adds up the prompt's queries, those that are padding too."""

    def state(self, geometry):
        return (StateSpec("past", (geometry.head_dim,), torch.float32),)

    def observe(self, q, layer):
        summed = q.unflatten(2, (layer.geometry.num_kv_heads, -1)).sum((1, 3))
        layer.update_state("past", layer.state("past") + summed)

    def scores(self, q, layer):
        past = layer.state("past").repeat_interleave(layer.geometry.group_size, dim=1)
        return super().scores(past.contiguous(), layer)


class GoesByTheLongest(Sound):
    """Takes any piece for a prompt, and begins anew, where the longest row's is one."""

    def state(self, geometry):
        return (StateSpec("prompts", (), torch.float32),)

    def observe(self, q, layer):
        if q.shape[1] > 10:
            layer.update_state("prompts", layer.state("prompts") + 1)

    def scores(self, q, layer):
        scores, prompts = super().scores(q, layer), layer.state("prompts").unsqueeze(-1)
        return torch.where(scores == -torch.inf, scores, scores * torch.where(prompts > 1, -1, 1))


class SeesOthers(Sound):
    """Looks at the longest row."""

    def scores(self, q, layer):
        scores = super().scores(q, layer)
        return scores if layer.max_seq_len > 100 else -scores.masked_fill(scores == -torch.inf, torch.inf)


class Means(Sound):
    """Keeps means that count the empty slots of a page as the append kernel does not."""

    def metadata(self, geometry):
        return (MetadataSpec("mean", (geometry.head_dim,), geometry.dtype, rule="mean"),)

    def summarize(self, keys, valid, layer):
        return {"mean": keys.mean(2)}


class ForgetsMetadata(Sound):
    def metadata(self, geometry):
        return (MetadataSpec("mean", (geometry.head_dim,), geometry.dtype),)

    def summarize(self, keys, valid, layer):
        return {"means": keys.mean(2)}


class WrongRanking(Sound):
    """Says that every page is chosen."""

    def ranking(self, layer):
        return PageRanking()


class Waits(Sound):
    def select(self, q, layer, budget):
        found = super().select(q, layer, budget)
        longest = int(found.lengths.max())
        return Selection(found.indices[..., :longest].contiguous(), found.lengths)


class Trims(Sound):
    def select(self, q, layer, budget):
        return super().select(q, layer, budget).trimmed()


class BoundsAreLengths(Sound):
    """Takes bounds that the host knows for the lengths."""

    def scores(self, q, layer):
        scores = super().scores(q, layer)
        return torch.where(torch.arange(scores.shape[-1]) < layer.max_seq_len - 100, scores, scores * 0.5 - 3)


class Exempt(Sound):
    """Declares what it does not need."""

    def contract(self):
        return Contract(budget=False)


class Raises(Sound):
    def select(self, q, layer, budget):
        raise IndexError("too far")
