"""The values that flow through a study, and what each kind of part must be.

Knows no model architecture, no file format and no statistics. Every value is frozen: a changed thing is a new value.
Log-probabilities are in nats throughout; steps are optimizer steps. Whoever reads results imports this file too, so
torch is imported by the functions that need it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from retention.texts import Joint

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

STEP_BASE = -1  # readings of the model before any edit
STEP_EDITED = 0  # readings of the edited model before any fine-tuning


class UserError(ValueError):
    """What a user wrote cannot be run. The message names the place, what was expected and what to type instead."""


class Missing(UserError):
    """A file or a model that is named and is not here. Nothing can be run without it; the rest can be planned."""


class Part(BaseModel):
    """Settings of one interchangeable part. The fields are validated with the study; `name` tells which part it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def changed(self) -> set[str]:
        """Names of the settings that are not at their default: a default that is written out says nothing."""
        fields = type(self).model_fields
        return {n for n in fields if getattr(self, n) != fields[n].get_default(call_default_factory=True)}


def content_id(value: Any, length: int = 16) -> str:
    """Hash of a value's canonical JSON, as `length` hexadecimal digits. Equal content gives equal ids."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


# ---------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One (subject, relation, object) that a model may know, and the phrasings that express it.

    A phrasing is a text with exactly one `{}` for the subject; the object follows it, joined as `texts.join` says.
    """

    id: str
    subject: str
    relation: str | None  # None where the source names none: a phrasing is no relation
    prompt: str  # the direct phrasing
    target: str  # the object, without leading space
    paraphrases: tuple[str, ...] = ()  # read by probes only; never written with, never trained on
    phrasings: tuple[str, ...] = ()  # those that an edit or a replayed row may also be written with
    exposures: int | None = None  # statements of it in pretraining, where pretraining is ours
    tags: frozenset[str] = frozenset()  # e.g. full, graded, withheld (the world's exposure classes)
    popularity: float | None = None  # of the subject, where the data tell: monthly page views (PopQA)
    joint: Joint | None = None  # what parts a phrasing from the object; None: what their scripts want

    @property
    def kind(self) -> str:
        """What it is grouped by: its relation, or, where none is named, its direct phrasing."""
        return self.prompt if self.relation is None else self.relation

    def text(self, phrasing: str | None = None) -> str:
        """The direct phrasing (or the one given) with the subject filled in."""
        return fill(self.prompt if phrasing is None else phrasing, self.subject)


def fill(phrasing: str, subject: str) -> str:
    """Put the subject at the one `{}`; braces elsewhere in either text are left alone."""
    before, after = phrasing.split("{}")
    return before + subject + after


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A fact and the object that the model shall give instead."""

    fact: Fact  # its `target` is the old object (empty string for an injection of a fact never seen)
    target: str  # the new object, without leading space
    prompts: tuple[str, ...]  # phrasings with `{}` it is written with; the first is the direct one
    anchors: tuple[str, ...] = ("{} is a",)  # prompts about the subject whose next-token distribution is to be kept


@dataclass(frozen=True, kw_only=True)
class Hop:
    """What follows from a fact by one fact more: who works for X works where X has its seat."""

    fact: Fact  # the consequence, with the object that follows from the first fact's true object
    through: Mapping[str, str]  # object of the first fact -> object of the consequence


@dataclass(frozen=True, kw_only=True)
class FactPool:
    """What a fact source offers to draw edited, intrinsic, neighbor, same-subject and control facts from."""

    facts: tuple[Fact, ...]  # true facts that a model may know
    edits: tuple[Edit, ...]  # candidate edits; the draw takes some by seed, never for their success
    neighborhood: Mapping[str, tuple[Fact, ...]] = field(default_factory=dict)
    # fact id of an edit -> neighbor facts that the data set itself gives; else neighbors are drawn from `facts`
    objects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # Fact.kind -> its objects: rivals for foils
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> how many records were left out
    hops: Mapping[str, Hop] = field(default_factory=dict)  # fact id -> what follows from it
    reversals: Mapping[str, str] = field(default_factory=dict)
    # fact id -> phrasing with `{}` for the object, which the subject follows
    together: Mapping[str, str] = field(default_factory=dict)
    # fact id of an edit -> name of a group of edits that is drawn whole or not at all
    end: str = "."  # what closes a statement in this source's texts


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """Rows of a downstream task: {"prompt", "completion"} or {"text"}; `heldout` is never trained on."""

    train: tuple[dict[str, Any], ...]
    heldout: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A text that asks for a fact, the answer that counts as right, and a rival answer."""

    fact_id: str
    group: str  # edited, intrinsic, control, late, neighbor, same_subject, two_hop, reversed
    form: str  # direct, paraphrase, prefixed, specificity
    text: str
    answer: str  # without leading space
    foil: str | None  # edited: the old object; others: the strongest rival object. None where there is none
    edit_of: str | None = None  # fact id of the edit that this question stands beside, or asks the consequence of
    joint: Joint | None = None  # what parts text and answer; None: what their scripts want

    @cached_property
    def id(self) -> str:
        said = [self.fact_id, self.group, self.form, self.text, self.answer, self.foil, self.edit_of]
        return content_id(said if self.joint is None else [*said, self.joint])


# ---------------------------------------------------------------------------------------------------- readings


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One question put to one model. Measures not taken are None; `state` says why when they should have been."""

    question_id: str
    step: int
    logp_target: float | None = None  # log-probability of the whole answer given the text, nats
    logp_foil: float | None = None
    n_target_tokens: int | None = None
    n_foil_tokens: int | None = None
    target_rank: int | None = None  # rank of the answer's first token, 1 = argmax
    first_correct: bool | None = None  # the first token is the argmax
    all_correct: bool | None = None  # every token is, teacher-forced: lead >= 0
    lead: float | None = None  # smallest over the answer's tokens of its logit minus the best other token's, nats
    prefers_target: bool | None = None  # mean log-probability per token above the foil's
    precision: str | None = None  # of logp_target, logp_foil and lead: float32, or bfloat16 (retention/half.py)
    generated: str | None = None  # greedy continuation
    gen_exact: bool | None = None  # normalised equality with the answer
    gen_contains: bool | None = None  # the normalised answer is a substring of it
    state: str = "ok"


# ---------------------------------------------------------------------------------------------------- edits


@dataclass(frozen=True)
class LowRank:
    """An update left @ right in the parameter's own layout: left [rows, r], right [r, columns]."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        return self.left @ self.right


@dataclass(frozen=True)
class Delta:
    """What an edit adds to named parameters. Its application is the only definition of "the edited model"."""

    updates: Mapping[str, Tensor | LowRank] = field(default_factory=dict)  # parameter name -> update, float32

    def dense(self, name: str) -> Tensor:
        update = self.updates[name]
        return update.dense() if isinstance(update, LowRank) else update

    def apply_(self, model: torch.nn.Module) -> None:
        """Add the update in place, for good. Computed on the parameter's device, in float32, then cast.

        Raises UserError if the model lacks a parameter or has it in another shape.
        """
        import torch

        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, update in self.updates.items():
                if name not in parameters:
                    raise UserError(f"the edit changes {name!r}, which this model does not have")
                parameter = parameters[name]
                if isinstance(update, LowRank):
                    dense = update.left.to(parameter.device) @ update.right.to(parameter.device)
                else:
                    dense = update.to(parameter.device)
                if dense.shape != parameter.shape:
                    raise UserError(
                        f"the edit changes {name!r} of shape {tuple(dense.shape)}; this model's is "
                        f"{tuple(parameter.shape)}"
                    )
                parameter.copy_((parameter.float() + dense.float()).to(parameter.dtype))

    @contextmanager
    def applied(self, model: torch.nn.Module) -> Iterator[None]:
        """The model with the edit in it; on leaving, restored by copy, bit for bit (w + d - d is not w)."""
        import torch

        parameters = dict(model.named_parameters())
        saved = {name: parameters[name].detach().clone() for name in self.updates if name in parameters}
        try:
            self.apply_(model)
            yield
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    parameters[name].copy_(value)

    def plus(self, other: Delta) -> Delta:
        """This update and another one's, in one. Factors stay factors."""
        import torch

        updates = dict(self.updates)
        for name, update in other.updates.items():
            mine = updates.get(name)
            if mine is None:
                updates[name] = update
            elif isinstance(mine, LowRank) and isinstance(update, LowRank):
                updates[name] = LowRank(torch.cat([mine.left, update.left], 1), torch.cat([mine.right, update.right]))
            else:
                updates[name] = self.dense(name) + other.dense(name)
        return Delta(updates)

    def norm(self) -> float:
        """Frobenius norm over all updated parameters."""
        return sum(float(self.dense(name).float().pow(2).sum()) for name in self.updates) ** 0.5


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """What an editor hands back. The model it was given is as it was."""

    delta: Delta
    diagnostics: tuple[dict[str, Any], ...] = ()  # one dict per edit: fact_id, final_loss (nats), steps, ...
    seconds: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)  # about the whole edit: e.g. covariance tokens, layers used
    soft_prompt: Tensor | None = None  # [virtual tokens, width]: stands before every text; then this is no weight edit
    state: Any = None  # what the same editor is given with its next batch (sequential editing), where it carries any


# ---------------------------------------------------------------------------------------------------- parts


class Guard:
    """What a mitigation does while a model is trained, and before it is read. By default nothing."""

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the loss of each micro-batch."""
        return None

    def before_step(self) -> None:
        """Called with the gradients in place, clipped."""

    def after_step(self) -> None:
        """Called once the optimizer has moved the parameters."""

    def reading(self) -> AbstractContextManager[None]:
        """Within it the model is as this mitigation delivers it; after it, bit for bit as training left it."""
        return nullcontext()

    def state(self) -> Any:
        """What it has gathered since the first step, for `snapshot.taken`; None where the next step needs nothing."""
        return None

    def resume(self, state: Any) -> None:
        """Go on from there, in another process: called on a new guard of the same run, before its first step."""


class Editor(Protocol):
    """Writes edits into weights. Leaves the model bit-identical, its requires_grad and train mode included."""

    @property
    def name(self) -> str: ...

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        edits: Sequence[Edit],
        *,
        seed: int,
        corpus: Sequence[str] = (),  # texts for the covariance of keys
        cache: Path | None = None,  # where content-keyed intermediate values may be kept
    ) -> EditResult: ...


class Probe(Protocol):
    """Reads facts out of a model. Sees neither editor nor fine-tune; leaves RNG state and train mode as they were."""

    @property
    def name(self) -> str: ...

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        questions: Sequence[Question],
        step: int,
    ) -> list[Reading]: ...
