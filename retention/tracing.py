"""Causal tracing: which module, layer and token a fact is recalled through (Meng et al. 2022, arXiv:2202.05262).

Noise on the subject's embeddings takes the answer away; a state of the clean run, put back at one token and layer,
brings some of it back. That gain in the probability of the answer's first token is the indirect effect of the state.

Knows no editor. Where we differ from the paper: tokens before the subject are not traced (noise cannot reach them), and
work starts at the restored layer, from states that are kept of one run (the same numbers, up to rounding).

Section 2 of the paper. Shapes: S noise samples, T tokens of the prompt, L layers, d width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from retention.hooks import BlockCalls, dry_run, on_input, on_output, undisturbed
from retention.models import Anatomy, max_positions, single_mlps
from retention.tokens import encode, subject_span
from retention.types import Fact, Part, UserError, content_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Kind = Literal["residual", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("residual", "mlp", "attention")
LAST_SUBJECT = "last subject token"
# A token is of one position only. A subject of one token is its own last; what ends both subject and prompt is too.
POSITIONS = (
    "first subject token",
    "middle subject tokens",
    LAST_SUBJECT,
    "first later token",
    "further tokens",
    "last token",
)
DEEP = 24  # layers from which on the paper's window of ten is taken


class TracingSettings(Part):
    """How facts are traced."""

    noise: float = Field(
        default=3.0, ge=0, description="of the noise, in standard deviations of the subjects' embeddings"
    )
    samples: int = Field(default=10, ge=1, description="of noise for each fact")
    window: int | None = Field(
        default=None,
        ge=1,
        description="layers whose MLP (attention) outputs are restored together; None: 10 from 24 layers on, otherwise "
        "a quarter of the layers",
    )
    seed: int = Field(default=0, description="of the noise; each fact has its own, whichever others are traced")

    def layers_together(self, layers: int) -> int:
        if self.window is not None:
            return self.window
        return 10 if layers >= DEEP else max(1, layers // 4)


@dataclass(frozen=True, kw_only=True)
class FactTrace:
    """What one fact's recall owes to each state."""

    fact_id: str
    clean: float  # probability of the answer's first token
    corrupted: float  # the same with noise on the subject, mean over samples
    positions: tuple[str, ...]  # of each traced token: one of POSITIONS; the subject's first token comes first
    effects: np.ndarray  # [kinds, L, traced tokens] probability restored less corrupted, mean over samples


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """All that was traced."""

    settings: TracingSettings
    window: int  # layers restored together, for MLP and attention
    deviation: float  # standard deviation of the noise, in units of the embeddings
    asked: int  # facts; traced are those of them that the model knows
    traces: tuple[FactTrace, ...]

    @property
    def total_effect(self) -> float:
        """Mean probability that the noise takes away."""
        return float(np.mean([t.clean - t.corrupted for t in self.traces]))


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A fact's prompt as the model sees it."""

    fact: Fact
    ids: tuple[int, ...]
    subject: range  # token indices
    answer: int  # the answer's first token

    @property
    def positions(self) -> tuple[str, ...]:
        """Of each token from the subject's first one on."""
        first, last, end = self.subject[0], self.subject[-1], len(self.ids) - 1
        names = []
        for i in range(first, end + 1):
            if i <= last:
                names.append(POSITIONS[2 if i == last else 0 if i == first else 1])
            else:
                names.append(POSITIONS[5 if i == end else 3 if i == last + 1 else 4])
        return tuple(names)


def _prompt(tokenizer: PreTrainedTokenizerFast, fact: Fact) -> _Prompt:
    text = encode(tokenizer, fact.text(), fact.target, joint=fact.joint)
    if text.answer_start >= len(text.ids):
        raise UserError(f"the answer {fact.target!r} of {fact.id} has no token")
    subject = subject_span(tokenizer, fact.prompt, fact.subject, answer=fact.target, joint=fact.joint)
    ids = text.ids[: text.answer_start]
    if subject[-1] >= len(ids):
        raise UserError(f"{fact.id}: a token holds the end of {fact.subject!r} and the beginning of the answer")
    return _Prompt(fact=fact, ids=ids, subject=subject, answer=text.ids[text.answer_start])


def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: Sequence[Fact],
    settings: TracingSettings | None = None,
    *,
    tokens_per_batch: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> Tracing:
    """Trace the facts whose answer's first token is the model's first choice after the direct prompt.

    tokens_per_batch bounds memory and does not move results beyond rounding. The model and the RNG stay as they were.
    Raises UserError if the model knows none of the facts, or if its blocks cannot be run one by one.
    """
    settings = settings or TracingSettings()
    places = single_mlps(model)
    prompts = [_prompt(tokenizer, fact) for fact in facts]
    limit = max_positions(model)
    for prompt in prompts:
        if limit is not None and len(prompt.ids) > limit:
            raise UserError(f"the fact {prompt.fact.id} has {len(prompt.ids)} tokens; the model has {limit} positions")
    with undisturbed(model), torch.no_grad():
        known = [prompt for prompt in prompts if _knows(model, prompt)]
        if not known:
            raise UserError(
                f"this model knows none of the {len(facts)} facts: no answer's first token is its first choice after "
                "the direct prompt; give facts that it was trained on (`retention probe` tells what it knows)"
            )
        embeddings = torch.cat([_embeddings(model, p).flatten() for p in known])
        deviation = settings.noise * float(embeddings.double().std())
        window = settings.layers_together(places.layers)
        traces = []
        for done, prompt in enumerate(known):
            if progress is not None:
                progress(done, len(known))
            traces.append(_FactRun(model, places, prompt, settings, deviation).trace(window, tokens_per_batch))
    return Tracing(
        settings=settings, window=window, deviation=deviation, asked=len(facts), traces=tuple(traces)
    )  # fmt: skip


def _ids(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([ids], device=next(model.parameters()).device)


def _knows(model: PreTrainedModel, prompt: _Prompt) -> bool:
    logits = model(input_ids=_ids(model, prompt.ids), use_cache=False, logits_to_keep=1).logits
    return int(logits[0, -1].argmax()) == prompt.answer


def _embeddings(model: PreTrainedModel, prompt: _Prompt) -> Tensor:
    """Of the subject's tokens, as the model's embedding module gives them (scaled, where it scales)."""
    out: Tensor = model.get_input_embeddings()(_ids(model, prompt.ids[prompt.subject[0] : prompt.subject[-1] + 1]))
    return out


def unit_noise(seed: int, fact_id: str, shape: Sequence[int]) -> Tensor:
    """Standard normal [S, subject tokens, embedding width], drawn on the CPU: the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(content_id([seed, fact_id], 15), 16)))


class _FactRun:
    """One fact's clean and corrupted states, and runs with some of the clean ones put back."""

    def __init__(
        self, model: PreTrainedModel, places: Anatomy, prompt: _Prompt, settings: TracingSettings, deviation: float
    ) -> None:
        self.model, self.places, self.prompt, self.samples = model, places, prompt, settings.samples
        self.blocks = places.blocks(model)
        self.ids = _ids(model, prompt.ids)
        shape = (settings.samples, *_embeddings(model, prompt).shape[1:])
        self._run(unit_noise(settings.seed, prompt.fact.id, shape) * deviation)

    def _run(self, noise: Tensor) -> None:
        """The clean run as row 0, beside one row for each sample of noise [S, subject tokens, embedding width]."""
        span = slice(self.prompt.subject[0], self.prompt.subject[-1] + 1)
        rows, tokens = 1 + len(noise), len(self.prompt.ids)

        def corrupt(out: Tensor) -> Tensor:
            out = out.clone()
            out[1:, span] += noise.to(out)
            return out

        self.clean_states: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}  # [L][T, d]
        states: list[Tensor] = []  # [L + 1][1 + S, T, d]: inputs of the blocks, and the last one's output

        def keep(kind: Kind) -> Callable[[Tensor], None]:
            # OPT's second matrix sees rows and tokens in one dimension.
            return lambda out: self.clean_states[kind].append(out.view(rows, tokens, -1)[0].clone())

        with ExitStack() as stack:
            stack.enter_context(on_output(self.model.get_input_embeddings(), corrupt))
            stack.enter_context(on_input(self.blocks[0], lambda out: states.append(out.clone())))
            for layer, block in enumerate(self.blocks):
                stack.enter_context(on_output(block, lambda out: states.append(out.clone())))
                for kind in KINDS:
                    stack.enter_context(on_output(self._module(kind, layer), keep(kind)))
            logits = self.model(input_ids=self.ids.expand(rows, tokens), use_cache=False, logits_to_keep=1).logits
        self.inputs = [out[1:] for out in states]
        self.clean, *corrupted = logits[:, -1].float().softmax(-1)[:, self.prompt.answer].tolist()
        self.corrupted = float(np.mean(corrupted))
        self._check(states[0], logits[:, -1])

    def _module(self, kind: Kind, layer: int) -> torch.nn.Module:
        pattern = {"residual": self.places.block, "mlp": self.places.mlp, "attention": self.places.attention}[kind]
        return self.model.get_submodule(pattern.format(layer))

    def _check(self, start: Tensor, logits: Tensor) -> None:
        """Refuse an architecture whose blocks depend on something that their call does not show."""
        again = self.places.logits(self.model, self._calls(len(start)).run(start, 0, len(self.blocks))[:, -1])
        if not torch.allclose(again.float(), logits.float(), rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            raise UserError(
                f"{type(self.model).__name__}: its blocks, run one by one, do not give what the whole model gives, so "
                "its facts cannot be traced"
            )

    def _calls(self, rows: int) -> BlockCalls:
        """How the model calls its blocks on so many rows of this prompt; no work is done in them."""
        with dry_run(self.blocks, tuples=self.places.tuples) as calls:
            self.model.base_model(input_ids=self.ids.expand(rows, -1), use_cache=False)
        return calls

    def restored(self, calls: BlockCalls, kind: Kind, layers: range, sample: Sequence[int], where: Tensor) -> Tensor:
        """Probability [rows] of the answer, each row's noise given by `sample`, with clean states put back.

        layers: whose states of that kind (for the residual stream: the outputs of these blocks). where [rows, T]: bool.
        """
        begin, mask = layers[0], where[..., None]
        hidden = self.inputs[begin][list(sample)]

        def put_back(layer: int) -> Callable[[Tensor], Tensor]:
            clean = self.clean_states[kind][layer]
            return lambda out: torch.where(mask, clean, out.view(*where.shape, -1)).view(out.shape)

        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(on_output(self._module(kind, layer), put_back(layer)))
            if kind == "residual":  # what the first block gives is known
                hidden, begin = put_back(begin)(self.inputs[begin + 1][list(sample)]), begin + 1
            out = calls.run(hidden, begin, len(self.blocks))[:, -1]
        return self.places.logits(self.model, out).float().softmax(-1)[:, self.prompt.answer]

    def trace(self, window: int, tokens_per_batch: int) -> FactTrace:
        """Every kind, layer and token from the subject's first on, each alone (MLP, attention: a window of layers)."""
        layers, tokens = len(self.blocks), len(self.prompt.ids)
        traced = range(self.prompt.subject[0], tokens)
        rows = [(token, sample) for token in traced for sample in range(self.samples)]
        at_once = max(1, tokens_per_batch // tokens)
        effects = np.empty((len(KINDS), layers, len(rows)))
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            calls = self._calls(len(part))
            where = torch.nn.functional.one_hot(torch.tensor([token for token, _ in part]), tokens).bool()
            where = where.to(self.inputs[0].device)
            for i, kind in enumerate(KINDS):
                for layer in range(layers):
                    together = range(layer, layer + 1)
                    if kind != "residual":
                        together = range(max(0, layer - window // 2), min(layers, layer + (window + 1) // 2))
                    found = self.restored(calls, kind, together, [sample for _, sample in part], where)
                    effects[i, layer, first : first + len(part)] = found.double().cpu().numpy()
        effects = effects.reshape(len(KINDS), layers, len(traced), self.samples).mean(axis=-1) - self.corrupted
        return FactTrace(
            fact_id=self.prompt.fact.id,
            clean=self.clean,
            corrupted=self.corrupted,
            positions=self.prompt.positions,
            effects=effects,
        )
