"""Log-probabilities of given tokens from any causal language model, many at a time.

The only file of the probes that knows what a forward pass looks like. Logits are the model's own (soft-capping and
scaling included), taken only where they are wanted, in float32. Knows nothing of questions and facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from retention import models
from retention.hooks import old_cache_name, only_at
from retention.probes._prepared import Prepared
from retention.probes._rows import NEXT, Continuation, Row, batches, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Architectures whose forward honours a 4-D attention mask and position ids exactly, each tested in tests/probes.
# Others are read correctly too, with one row for every continuation: models that know places by the distance in memory
# (alibi), by recurrence, or through kernels that take no mask, must not be given several texts in one row.
BRANCHING = {"falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gptj", "llama", "mistral"}
BRANCHING |= {"olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3"}
LOGITS_PER_TOKEN = 8192  # logits held at once = this times a batch's tokens: bounds memory for large vocabularies
CPU_TOKENS = 512  # in one forward pass on a CPU: fewer or more and what a layer computes leaves the caches, 10 to 20 %
CHUNK = 1 << 20  # logits reduced at once on a CPU: what stays in its cache


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model gives to the wanted tokens of one continuation, in their order."""

    logps: tuple[float, ...]  # log-probability of each token given all before it, nats; NaN where a logit is not finite
    ranks: tuple[int, ...]  # 1 + the number of tokens with a strictly larger logit (1 = argmax, ties included)
    best: tuple[int, ...]  # the most probable token at the place of each; NEXT where a logit is NaN or infinite
    leads: tuple[float, ...]  # logit of each minus the largest of any other token there, nats; >= 0 is rank 1
    gaps: tuple[float, ...] = ()  # lead of the most probable token there; empty unless asked for

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.logps))

    @property
    def logp(self) -> float:
        """Of the whole continuation, nats."""
        return sum(self.logps)


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on leaving, every module's training flag and the RNG are what they were."""
    flags = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    # no_grad, not inference_mode: buffers that a model renews while it runs must stay usable in training.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training


def device_of(model: Any) -> torch.device:
    """Where token ids must go."""
    return model.get_input_embeddings().weight.device


def soft_prompt(model: Any) -> Any | None:
    """The peft configuration of learned virtual tokens in front of the text, if the model has them."""
    active = getattr(model, "active_peft_config", None)
    return active if active is not None and active.is_prompt_learning else None


def max_positions(model: Any) -> int | None:
    """Tokens that a text may have behind the soft prompt, if there is one; None where there is no limit."""
    limit = models.max_positions(model)
    prompt = soft_prompt(model)
    return limit if limit is None or prompt is None else limit - prompt.num_virtual_tokens


def _branches(model: Any, longest: int) -> bool:
    """Whether several texts may share a row: known to be exact, and no sliding window would have cut a text."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return (
        config.model_type in BRANCHING
        and config._attn_implementation in ("eager", "sdpa")
        and not getattr(config, "alibi", False)
        and all(window is None or longest <= window for window in windows)
        and soft_prompt(model) is None
    )


def logits_where(model: Any, wanted: Tensor, **inputs: Any) -> Any:
    """The model's output with `logits` at the wanted places only: [wanted.sum(), vocabulary].

    wanted: [rows, tokens] bool; places count from the first token given, learned virtual tokens before it are skipped.
    """
    prompt = soft_prompt(model)
    if prompt is None:
        return model(**inputs, logits_to_keep=wanted)
    if str(getattr(prompt.peft_type, "value", prompt.peft_type)) != "PREFIX_TUNING":  # whose prefix is no tokens
        virtual = wanted.new_zeros(len(wanted), prompt.num_virtual_tokens)
        wanted = torch.cat([virtual, wanted], dim=1)
    with old_cache_name():
        return model(**inputs, logits_to_keep=wanted)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows as tensors for one forward pass, and the reads in it."""

    ids: Tensor  # [rows, tokens]
    wanted: Tensor  # [rows, tokens] bool: where logits are taken
    visible: Tensor  # [rows, 1, tokens, tokens] bool with branches; [rows, tokens], 1 = no padding, without
    depths: Tensor | None  # [rows, tokens]: each token's position in its own sequence; None without branches
    places: np.ndarray  # [reads], ascending: which of the wanted places each read is at
    tokens: np.ndarray  # [reads]: the token whose log-probability is read, or NEXT


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Continuations made ready to be run, with nothing of the model's weights in it."""

    batches: tuple[_Batch, ...]
    reads: tuple[tuple[int, ...], ...]  # per continuation: its reads in their order, counted over all batches


def _packed(
    continuations: Sequence[Continuation],
    tokens_per_batch: int,
    *,
    branching: bool,
    sharing: bool,
    vocabulary: int,
    device: torch.device,
) -> Packed:
    rows = pack(continuations, branching=branching, sharing=sharing)
    reads_at_once = max(1, tokens_per_batch * LOGITS_PER_TOKEN // vocabulary)
    tokens_at_once = min(tokens_per_batch, CPU_TOKENS) if device.type == "cpu" else tokens_per_batch
    made: list[_Batch] = []
    where: list[list[int]] = [[0] * (len(c.ids) - c.start) for c in continuations]
    total = 0
    for batch in batches(rows, tokens=tokens_at_once, reads=reads_at_once):
        number: dict[tuple[int, int, int], int] = {}  # equal reads are made once
        for i, row in enumerate(batch):
            for read in sorted(row.reads, key=lambda read: read.place):
                known = number.setdefault((i, read.place, read.token), len(number))
                where[read.continuation][read.offset] = total + known
        total += len(number)
        made.append(_batch(batch, list(number), branching=branching, device=device))
    return Packed(batches=tuple(made), reads=tuple(map(tuple, where)))


def _batch(
    batch: Sequence[Row], reads: Sequence[tuple[int, int, int]], *, branching: bool, device: torch.device
) -> _Batch:
    """`reads`: (row, place in it, token), by row and place."""
    length = max(len(row) for row in batch)
    shape = (len(batch), length)
    ids, depths = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    wanted = np.zeros(shape, dtype=bool)
    for i, row in enumerate(batch):
        ids[i, : len(row)], depths[i, : len(row)] = row.tokens, row.depths
    at = np.array([(i, place) for i, place, _ in reads]).reshape(-1, 2)
    wanted[at[:, 0], at[:, 1]] = True
    numbers = wanted.ravel().cumsum().reshape(shape) - 1
    if branching:
        visible = np.stack([row.visible(length) for row in batch])[:, None]
    else:
        # Padding stands on the right, where no causal model looks, so the model's own positions are the right ones.
        visible = (np.arange(length) < np.array([len(row) for row in batch])[:, None]).astype(np.int64)
    return _Batch(
        ids=torch.from_numpy(ids).to(device),
        wanted=torch.from_numpy(wanted).to(device),
        visible=torch.from_numpy(visible).to(device),
        depths=torch.from_numpy(depths).to(device) if branching else None,
        places=numbers[at[:, 0], at[:, 1]],
        tokens=np.array([token for _, _, token in reads], dtype=np.int64),
    )


def _run(model: Any, batch: _Batch) -> Tensor:
    """Logits [places, vocabulary] at the wanted places."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.visible, "use_cache": False}
    if batch.depths is None:
        logits: Tensor = logits_where(model, batch.wanted, **inputs).logits
        return logits
    hidden = torch.zeros((), dtype=model.dtype, device=batch.ids.device)
    inputs["attention_mask"] = torch.where(batch.visible, hidden, torch.finfo(model.dtype).min)
    # After the last attention no place is seen by another: what is not read need not be worked out.
    with only_at(models.last_mlp(model), batch.wanted):
        logits = logits_where(model, batch.wanted, position_ids=batch.depths, **inputs).logits
    return logits


def _reduce(logits: Tensor, places: np.ndarray, tokens: np.ndarray, with_gaps: bool) -> dict[str, Tensor]:
    """Fields of `Scores` for each token at its place in `logits`.

    `places` ascend. For NEXT, the most probable token is the one that is read. A lead is a difference of two logits,
    so the normalising constant and its rounding do not enter.
    """
    rows_at_once = max(1, (CHUNK if logits.device.type == "cpu" else CHUNK << 6) // logits.shape[-1])
    parts: dict[str, list[Tensor]] = {name: [] for name in ("logps", "ranks", "best", "leads", "gaps")}
    for first in range(0, len(logits), rows_at_once):
        chunk = logits[first : first + rows_at_once].float()
        inside = slice(*np.searchsorted(places, [first, first + rows_at_once]))
        place = torch.from_numpy(places[inside] - first).to(chunk.device)
        token = torch.from_numpy(tokens[inside]).to(chunk.device)
        top = chunk.max(-1)  # NaN counts as the largest
        token = torch.where(token == NEXT, top.indices[place], token)
        value = chunk[place, token]
        parts["logps"].append((value - chunk.logsumexp(-1)[place]).double())
        rank = torch.ones_like(token)
        behind = (value < top.values[place]).nonzero()[:, 0]  # only these need to be counted
        rank[behind] += (chunk[place[behind]] > value[behind, None]).sum(-1)
        parts["ranks"].append(rank)
        parts["best"].append(torch.where(top.values.isfinite(), top.indices, NEXT)[place])
        rival = top.values[place]
        leading = (token == top.indices[place]).nonzero()[:, 0]  # only these have another rival than the maximum
        others = chunk[place[leading]].scatter_(1, token[leading, None], -torch.inf)
        rival[leading] = others.max(-1).values
        parts["leads"].append((value - rival).double())
        if with_gaps:
            second = chunk.scatter(1, top.indices[:, None], -torch.inf).max(-1).values
            parts["gaps"].append((top.values - second)[place].double())
    return {name: torch.cat(part) for name, part in parts.items() if part}


def _score(model: Any, packed: Packed, with_gaps: bool) -> list[Scores]:
    found: dict[str, list[Any]] = {}
    for batch in packed.batches:
        for name, values in _reduce(_run(model, batch), batch.places, batch.tokens, with_gaps).items():
            found.setdefault(name, []).extend(values.tolist())
    return [
        Scores(**{name: tuple(values[i] for i in at) for name, values in found.items()})  # type: ignore[arg-type]
        for at in packed.reads
    ]


def token_scores(
    model: PreTrainedModel,
    continuations: Sequence[Continuation],
    tokens_per_batch: int,
    prepared: Prepared | None = None,
    name: str = "rows",
    *,
    with_gaps: bool = False,
) -> list[Scores]:
    """Scores of every continuation, in the order given. None may be longer than `max_positions`.

    A token's log-probability is within 4e-5 nats of a float64 forward, and changes by at most 2e-5 with what else is
    asked in the same call (SmolLM2-135M in float32, 48 continuations of 3 to 30 tokens). Where a logit is not finite,
    the continuation is run once more in a row of its own, since NaN passes through attention masks to whatever shares
    the row. `prepared` keeps the rows under `name` for the next time that the same are asked for.
    """
    wanted = tuple(continuations)
    fixed: dict[str, Any] = {"vocabulary": model.config.get_text_config().vocab_size, "device": device_of(model)}
    branching = _branches(model, max((len(c.inputs) for c in wanted), default=0))
    key = (wanted, tokens_per_batch, branching, fixed)
    with undisturbed(model):
        packed = (Prepared() if prepared is None else prepared).get(
            name, key, lambda: _packed(wanted, tokens_per_batch, branching=branching, sharing=True, **fixed)
        )
        scores = _score(model, packed, with_gaps)
        broken = [i for i, score in enumerate(scores) if not score.finite]
        if broken:
            each = [wanted[i] for i in broken]
            alone = _packed(each, tokens_per_batch, branching=False, sharing=False, **fixed)
            for i, score in zip(broken, _score(model, alone, with_gaps), strict=True):
                scores[i] = score
    return scores
