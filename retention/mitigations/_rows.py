"""What the remedies share that mix rows of their own into those of the task: rate, schedule, and how they add up.

Knows nothing of what the rows say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from retention.data._draw import same
from retention.data.mix import mix
from retention.data.statements import Said, statements
from retention.mitigations._part import Mitigation, Place, Row, Scene
from retention.trainer_fields import rows_needed
from retention.types import Fact, UserError


class RowMitigation(Mitigation):
    """Rows mixed into the task's at an exact rate. What it costs: that share of the budget is not spent on the task.

    With a budget in epochs the budget grows instead: all of the task's rows are there. The task's rows come in the
    order in which they were drawn, where a run without such a remedy shuffles them anew.
    """

    acts_on: ClassVar[Place] = "rows"

    rate: float = Field(gt=0, lt=1, description="share of the rows trained on that are its own")
    schedule: Literal["spaced", "massed"] = Field(
        "spaced", description="spaced: evenly among the task's rows; massed: all at one end"
    )
    massed: Literal["start", "end"] = Field(
        "end", description="massed: before the task's rows, or after them (which needs a budget in steps or epochs)"
    )

    @model_validator(mode="after")
    def _scheduled(self) -> RowMitigation:
        if "massed" in self.changed() and self.schedule != "massed":
            raise ValueError(f"`massed` says where massed rows stand; {self.name} is spaced: give schedule: massed")
        return self

    name: str

    def check(self, settings: Any) -> None:
        """Raises UserError if the rates of all such remedies of a run leave no rows of the task."""
        _room([m for m in settings.mitigations if isinstance(m, RowMitigation)])
        for tune in settings.tunes:
            objective = tune.objective or settings.objective
            needed = rows_needed(objective, tune.trainer, tune.steps)
            if self.schedule == "massed" and self.massed == "end" and needed is None and tune.epochs is None:
                raise UserError(
                    f"mitigations: {self.name}: rows massed at the end need to know how many rows training takes, "
                    f"which objective {objective.name} with this budget does not tell; use spaced, massed: start, or "
                    "epochs"
                )
            if needed is not None and round(self.rate * needed) == 0:
                raise UserError(
                    f"mitigations: {self.name}: rate {self.rate:g} of the {needed} rows that training takes is not one "
                    "row; raise it"
                )

    def extra(self, count: int, like: Sequence[Row], scene: Scene) -> list[Row]:
        """Rows of the form of `like` to draw `count` from; each is used equally often, give or take one."""
        raise TypeError(f"{type(self).__name__} must say what it mixes in")

    def rows(self, rows: Sequence[Row], scene: Scene) -> tuple[Row, ...]:
        """The rows in the order in which they are to be trained on: exactly `rate` of them its own, in whole rows.

        With `scene.rows_needed` there are so many in all, the task's rows cut or used over and over; without, all of
        the task's rows are there once. Raises UserError if there is nothing to mix in.
        """
        total = len(rows) / (1 - self.rate) if scene.rows_needed is None else scene.rows_needed
        extra = self.extra(round(self.rate * total), rows, scene)
        try:
            return mix(
                rows, extra, self.rate, spaced=self.schedule == "spaced", seed=scene.seed,
                massed=self.massed, total=scene.rows_needed,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"mitigations: {self.name}: {error}") from None


def mixed_rows(mitigations: Sequence[Mitigation], rows: Sequence[Row], scene: Scene) -> tuple[Row, ...]:
    """The task's rows with those of all `mitigations` (that act on the rows), in the order to be trained on.

    Each rate is a share of all rows that come out, so that the order of the mitigations does not change what any of
    them says. Rows massed at one end by several stand there in the mitigations' order, the first one's innermost.
    """
    chosen = [m for m in mitigations if isinstance(m, RowMitigation)]
    _room(chosen)
    own = 1 - sum(m.rate for m in chosen)
    total = scene.rows_needed
    counts = [round(m.rate * (len(rows) / own if total is None else total)) for m in chosen]
    size = len(rows) if total is None else total - sum(counts)
    found = tuple(rows)
    for mitigation, count in zip(chosen, counts, strict=True):
        if not count:
            continue
        size += count
        share = mitigation.model_copy(update={"rate": count / size})
        found = share.rows(found, replace(scene, rows_needed=size))
    return found


def _room(chosen: Sequence[RowMitigation]) -> None:
    if sum(m.rate for m in chosen) >= 1:
        rates = " + ".join(f"{m.rate:g} ({m.name})" for m in chosen)
        raise UserError(
            f"mitigations: rates add up to 1 or more: {rates}; lower them, so that rows of the task are left"
        )


def said(facts: Sequence[tuple[Fact, str, str | None]], phrasings: int, *, seed: int, name: str) -> list[Said]:
    """(fact, answer, wrong answer) in the direct phrasing and so many others of its own, chosen by seed.

    Never in a phrasing that a probe asks the fact in. Raises UserError if a fact has fewer phrasings.
    """
    found = []
    for fact, answer, rejected in facts:
        others = sorted(set(fact.phrasings) - {fact.prompt} - set(fact.paraphrases))
        if len(others) < phrasings:
            raise UserError(
                f"mitigations: {name}: {phrasings} phrasings besides the direct one were asked for; fact {fact.id} "
                f"({fact.subject}, {fact.kind}) has {len(others)}"
            )
        chosen = random.Random(f"{name} {seed} {fact.id}").sample(others, phrasings)
        found.append(Said(fact=fact, answer=answer, rejected=rejected, phrasings=(fact.prompt, *chosen)))
    return found


def stated(found: Sequence[Said], like: Sequence[Row], scene: Scene, name: str) -> list[Row]:
    """Every fact once in each of its phrasings, in the form of `like`; none that a held-out row asks."""
    if not found:
        return []
    avoid = {same(row, "prompt") for row in scene.heldout}
    times = max(len(one.phrasings) for one in found)
    try:
        return statements(found, times * len(found), like=like, seed=scene.seed, avoid=avoid)
    except UserError as error:
        raise UserError(f"mitigations: {name}: {error}") from None
