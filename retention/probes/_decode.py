"""Greedy continuations of many prompts at once, the same as one at a time.

Rows of different length run in step without padding: all start with the shortest row's tokens, and a longer row is fed
its own next token where a shorter one is fed the token it has just chosen. Position and distance in memory are then the
same for all rows and equal to those of a row alone, whatever the architecture's positions, windows or recurrence.
Knows nothing of questions and facts, and reads neither the generation config nor the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retention.hooks import cache_argument, cache_of
from retention.probes._forward import device_of, logits_where, soft_prompt, undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPACT_AT = 0.25  # finished rows leave the batch when they are this share of it: each time copies the rows' memory


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids to continue."""

    ids: tuple[int, ...]  # at least one
    max_new_tokens: int
    done: Callable[[list[int]], bool]  # whether these new tokens are enough; asked after each


@dataclass(kw_only=True)
class Continued:
    """What the model says after a prompt."""

    ids: list[int] = field(default_factory=list)  # the new tokens; the last is the one at which `done` said yes, if any
    finite: bool = True  # False: a logit was NaN or infinite, and the row stopped there


@dataclass(kw_only=True)
class _Live:
    """A prompt under way."""

    prompt: Prompt
    out: Continued
    finished: bool = False

    def choose(self, token: int, finite: bool) -> None:
        self.out.finite = finite
        if finite:
            self.out.ids.append(token)
            enough = len(self.out.ids) >= self.prompt.max_new_tokens or self.prompt.done(self.out.ids)
        self.finished = not finite or enough

    def token_at(self, place: int) -> int:
        """The token that stands at `place` of prompt and continuation; any, once finished."""
        ids = self.prompt.ids
        if place < len(ids):
            return ids[place]
        return ids[-1] if self.finished else self.out.ids[place - len(ids)]


def greedy(model: PreTrainedModel, prompts: Sequence[Prompt], tokens_per_batch: int) -> list[Continued]:
    """The greedy continuation of every prompt, in order. A batch has about tokens_per_batch places when it is longest.

    Equal to decoding each by itself, unless the two largest logits are closer than float32 rounding, which moves a
    log-probability by up to 2e-5 nats (see `token_scores`).
    """
    results = [Continued() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), prompts[i].ids))
    with undisturbed(model):
        while order:
            batch: list[int] = []
            for i in order:  # ascending in length, so the newest is the longest prompt
                longest = len(prompts[i].ids) + max(prompts[j].max_new_tokens for j in [*batch, i])
                if batch and longest * (len(batch) + 1) > tokens_per_batch:
                    break
                batch.append(i)
            _decode(model, [_Live(prompt=prompts[i], out=results[i]) for i in batch])
            order = order[len(batch) :]
    return results


def _decode(model: Any, rows: list[_Live]) -> None:
    """Continue the rows, shortest first, until all are finished."""
    device = device_of(model)
    # Learned virtual tokens enter with the first pass; later passes go on from the cache, which holds them.
    base = model if soft_prompt(model) is None else model.get_base_model()
    shortest = len(rows[0].prompt.ids)
    inputs = torch.tensor([row.prompt.ids[:shortest] for row in rows], device=device)
    cache, place = None, shortest
    while True:
        choosing = [i for i, row in enumerate(rows) if not row.finished and len(row.prompt.ids) <= place]
        wanted = torch.zeros(inputs.shape, dtype=torch.bool)
        wanted[choosing, -1] = True
        wanted = wanted.to(device)
        reader = model if cache is None else base
        output = logits_where(reader, wanted, input_ids=inputs, use_cache=True, **cache_argument(cache))
        cache = cache_of(output)
        _choose([rows[i] for i in choosing], output.logits)
        unfinished = [i for i, row in enumerate(rows) if not row.finished]
        if not unfinished:
            return
        if len(rows) - len(unfinished) >= COMPACT_AT * len(rows) and _compactable(cache):
            cache.batch_select_indices(torch.tensor(unfinished, device=device))
            rows = [rows[i] for i in unfinished]
        inputs = torch.tensor([[row.token_at(place)] for row in rows], device=device)
        place += 1


def _choose(rows: Sequence[_Live], logits: Tensor) -> None:
    """Give each row its most probable token. logits: [rows, vocabulary]."""
    if not rows:
        return
    best = logits.max(-1)  # NaN counts as the largest
    for row, token, value in zip(rows, best.indices.tolist(), best.values.isfinite().tolist(), strict=True):
        row.choose(token, value)


def _compactable(cache: Any) -> bool:
    """Whether rows can be taken out of this cache; recurrent layers offer no such thing."""
    return all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [object()]))
