"""Log-probabilities of given tokens from any causal language model, many at a time.

The only file of the probes that knows what a forward pass looks like. Logits are the model's own (soft-capping and
scaling included), taken only where they are wanted, in float32. Knows nothing of questions and facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from retention.probes._rows import Continuation, Row, batches, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Architectures whose forward honours a 4-D attention mask and position ids exactly, each tested in tests/probes.
# Others are read correctly too, with one row for every continuation: models that know places by the distance in memory
# (alibi), by recurrence, or through kernels that take no mask, must not be given several texts in one row.
BRANCHING = {"falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gptj", "llama", "mistral"}
BRANCHING |= {"olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3"}
LOGITS_PER_TOKEN = 8192  # logits held at once = this times a batch's tokens: bounds memory for large vocabularies
CHUNK = 1 << 20  # logits reduced at once on a CPU: what stays in its cache


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model gives to the wanted tokens of one continuation, in their order."""

    logps: tuple[float, ...]  # log-probability of each token given all before it, nats; NaN where a logit is not finite
    ranks: tuple[int, ...]  # 1 + the number of tokens with a strictly larger logit (1 = argmax, ties included)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.logps).all())

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
    """Tokens a text may have; None where the architecture has no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
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
    if prompt is not None and str(getattr(prompt.peft_type, "value", prompt.peft_type)) not in ("PREFIX_TUNING",):
        virtual = wanted.new_zeros(len(wanted), prompt.num_virtual_tokens)
        wanted = torch.cat([virtual, wanted], dim=1)
    return model(**inputs, logits_to_keep=wanted)


def _run(model: Any, batch: Sequence[Row], *, branching: bool) -> tuple[Tensor, list[dict[int, int]]]:
    """Logits [places, vocabulary] of a batch, and for each row which of them belongs to which place."""
    length = max(len(row) for row in batch)
    ids = np.zeros((len(batch), length), dtype=np.int64)
    wanted = np.zeros((len(batch), length), dtype=bool)
    where: list[dict[int, int]] = []
    count = 0
    for i, row in enumerate(batch):
        ids[i, : len(row)] = row.tokens
        places = sorted({read.place for read in row.reads})
        wanted[i, places] = True
        where.append({place: count + n for n, place in enumerate(places)})
        count += len(places)
    device = device_of(model)
    inputs = {"input_ids": torch.from_numpy(ids).to(device)}
    if branching:
        depths = np.zeros((len(batch), length), dtype=np.int64)
        for i, row in enumerate(batch):
            depths[i, : len(row)] = row.depths
        seen = torch.from_numpy(np.stack([row.visible(length) for row in batch])[:, None]).to(device)
        hidden = torch.zeros((), dtype=model.dtype, device=device)
        inputs["attention_mask"] = torch.where(seen, hidden, torch.finfo(model.dtype).min)
        inputs["position_ids"] = torch.from_numpy(depths).to(device)
    else:
        # Padding stands on the right, where no causal model looks, so the model's own positions are the right ones.
        real = np.arange(length) < np.array([len(row) for row in batch])[:, None]
        inputs["attention_mask"] = torch.from_numpy(real.astype(np.int64)).to(device)
    output = logits_where(model, torch.from_numpy(wanted).to(device), use_cache=False, **inputs)
    return output.logits, where


def _reduce(logits: Tensor, places: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability (nats, float64) and rank of each token at its place in `logits`. `places` ascend."""
    rows_at_once = max(1, (CHUNK if logits.device.type == "cpu" else CHUNK << 6) // logits.shape[-1])
    logps: list[Tensor] = []
    ranks: list[Tensor] = []
    for first in range(0, len(logits), rows_at_once):
        chunk = logits[first : first + rows_at_once].float()
        inside = slice(*np.searchsorted(places, [first, first + rows_at_once]))
        place = torch.from_numpy(places[inside] - first).to(chunk.device)
        token = torch.from_numpy(tokens[inside]).to(chunk.device)
        value = chunk[place, token]
        logps.append(value - chunk.logsumexp(-1)[place])
        ranks.append((chunk[place] > value[:, None]).sum(-1) + 1)
    return torch.cat(logps).double().cpu().numpy(), torch.cat(ranks).cpu().numpy()


def _score(
    model: Any, continuations: Sequence[Continuation], tokens_per_batch: int, *, branching: bool, sharing: bool
) -> list[Scores]:
    logps = [np.empty(len(c.ids) - c.start) for c in continuations]
    ranks = [np.empty(len(c.ids) - c.start, dtype=np.int64) for c in continuations]
    rows = pack(continuations, branching=branching, sharing=sharing)
    reads_at_once = max(1, tokens_per_batch * LOGITS_PER_TOKEN // model.config.get_text_config().vocab_size)
    for batch in batches(rows, tokens=tokens_per_batch, reads=reads_at_once):
        logits, where = _run(model, batch, branching=branching)
        reads = sorted(
            ((places[read.place], read) for row, places in zip(batch, where, strict=True) for read in row.reads),
            key=lambda pair: pair[0],
        )
        places = np.array([place for place, _ in reads])
        logp, rank = _reduce(logits, places, np.array([read.token for _, read in reads]))
        for i, (_, read) in enumerate(reads):
            logps[read.continuation][read.offset] = logp[i]
            ranks[read.continuation][read.offset] = rank[i]
    return [Scores(logps=tuple(a.tolist()), ranks=tuple(b.tolist())) for a, b in zip(logps, ranks, strict=True)]


def token_scores(model: PreTrainedModel, continuations: Sequence[Continuation], tokens_per_batch: int) -> list[Scores]:
    """Scores of every continuation, in the order given. None may be longer than `max_positions`.

    Each result depends on its own continuation alone (up to rounding, about 1e-6 nats): where a logit is not finite,
    the continuation is run once more in a row of its own, since NaN passes through attention masks to whatever shares
    the row.
    """
    unique = list(dict.fromkeys(continuations))
    with undisturbed(model):
        branching = _branches(model, max((len(c.inputs) for c in unique), default=0))
        scores = _score(model, unique, tokens_per_batch, branching=branching, sharing=True)
        broken = [i for i, score in enumerate(scores) if not score.finite]
        alone = _score(model, [unique[i] for i in broken], tokens_per_batch, branching=False, sharing=False)
        for i, score in zip(broken, alone, strict=True):
            scores[i] = score
    found = dict(zip(unique, scores, strict=True))
    return [found[c] for c in continuations]
