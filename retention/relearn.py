"""Erased, or merely masked? After the last fine-tune, teach the forgotten edits again, beside facts never edited.

A forgotten edit that comes back faster than a fact of the same kind that was never written has left a trace in the
weights. Both are taught in the same steps, in the same batch, by the direct prompt alone; the controls that `prepare`
drew for no edit are taught the object that an edit would have given them. Knows no editor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from retention.adapters import Full
from retention.objectives import Sft
from retention.tune import Budget, Held, fine_tune
from retention.types import Fact, Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from retention.models import Anatomy


class Relearn(BaseModel):
    """A few steps on the forgotten edits, at the end of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(10, ge=1, description="optimizer steps; all facts are in the batch of each")
    learning_rate: float = Field(2.0e-4, gt=0, description="of AdamW")
    most: int = Field(25, ge=1, description="facts of each kind, at most; both kinds are given equally many")


def chosen(
    questions: Sequence[Question],
    facts: Mapping[str, Fact],
    first: Collection[str],
    last: Collection[str],
    most: int,
) -> list[Question]:
    """Equally many forgotten edits and facts never edited, as questions of groups `forgotten` and `never_edited`.

    Forgotten: every token right at step 0, not so at the end. `first` and `last` hold the ids of the questions that
    were right then. In the order of the draw. Empty where there is none of one kind.
    """
    direct = [q for q in questions if q.form == "direct"]
    forgotten = [q for q in direct if q.group == "edited" and q.id in first and q.id not in last]
    # A control is asked for its own object, with the one that an edit would have given it as the foil; one that has no
    # object of its own (an injection) is asked for the new one.
    never = []
    for q in direct:
        if q.group == "control" and not facts[q.fact_id].target:
            never.append(replace(q, group="never_edited"))
        elif q.group == "control" and q.foil is not None:
            never.append(replace(q, group="never_edited", answer=q.foil, foil=q.answer))
    n = min(len(forgotten), len(never), most)
    taught = [replace(q, group="forgotten") for q in forgotten[:n]]
    return taught + never[:n]


def relearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: Relearn,
    questions: Sequence[Question],
    *,
    anatomy: Anatomy,
    seed: int,
    folder: Path,
    read: Callable[[int], Any],
) -> None:
    """Train every weight of `model` on the questions' answers, and call `read` before it and after each step."""
    rows: list[dict[str, Any]] = [{"prompt": q.text, "completion": q.answer, "joint": q.joint} for q in questions]
    model.requires_grad_(True)
    read(0)
    fine_tune(
        model,
        tokenizer,
        rows,
        objective=Sft(),
        adapter=Full(),
        hold=lambda wrapped: Held(),
        anatomy=anatomy,
        budget=Budget(steps=settings.steps),
        trainer={"learning_rate": settings.learning_rate, "per_device_train_batch_size": len(rows)},
        seed=seed,
        at=range(1, settings.steps + 1),
        on_checkpoint=lambda step, tokens, _model: read(step),
        folder=folder,
        base=lambda: model,
    )
