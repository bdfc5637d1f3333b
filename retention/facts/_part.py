"""The settings that every fact source shares: how many facts of each group are drawn, and by which seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from retention.types import Part

YOUNGER = (
    "unknown_targets", "stratified", "revision", "config", "split", "file", "trex", "phrasings", "strict",
    "joint",
)  # fmt: skip


class FactsPart(Part):
    """How many facts of each group a run reads. Drawn by seed; edited facts are never selected for success."""

    lacks: ClassVar[Mapping[str, str]] = {}  # setting -> why this source cannot serve it

    edited: int = Field(50, ge=1, description="facts that are edited, all at once in one run")
    intrinsic: int = Field(
        100, ge=1, description="facts that the base model knows (direct question, every token right)"
    )
    control: int = Field(0, ge=0, description="facts drawn exactly as the edited ones, but left alone, known or not")
    neighbors: int = Field(
        2, ge=0, description="per edit: known facts with the same relation and old object, other subject"
    )
    same_subject: int = Field(2, ge=0, description="per edit: other relations of its subject")
    paraphrases: int = Field(
        2, ge=0, description="per edited, intrinsic and control fact: held-out phrasings asked, at most"
    )
    late: int = Field(
        0,
        ge=0,
        description="facts drawn as the edited ones, with a new object, that are taught by ordinary continued "
        "pretraining just before the edits",
    )
    prefixed: int = Field(
        0,
        ge=0,
        description="per edited, intrinsic, control and late fact: times its direct question is asked after a "
        "statement of another fact that mentions neither subject, answer nor foil",
    )
    specificity: bool = Field(
        False, description="ask each same_subject question once more, against the new object of the edit"
    )
    two_hop: bool = Field(
        False, description="ask what follows from edited and intrinsic facts by one fact more (group two_hop)"
    )
    reversed: bool = Field(
        False, description="ask for the subject of edited and intrinsic facts, given the object (group reversed)"
    )
    intrinsic_relations: Literal["as_edited", "any"] = Field(
        "as_edited",
        description="as_edited: intrinsic facts come from the relations of the edited ones, so that groups compare",
    )
    intrinsic_exposures: Literal["as_edited", "any"] = Field(
        "as_edited",
        description="as_edited: intrinsic facts were stated in pretraining as often as the edited, where known",
    )
    unknown_targets: bool = Field(
        False, description="edit only to objects that the base model does not give already (direct question)"
    )
    stratified: bool = Field(
        False,
        description="draw from the relations in turn, so that each has as many edits, and intrinsic facts, as any",
    )
    seed: int | None = Field(None, description="of the draw; left out, it is the run's own seed")

    @model_serializer(mode="wrap")
    def _without_idle(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without settings that are younger than stored results, where they are at their defaults: keys stay."""
        found: dict[str, Any] = dump(self)
        return {k: v for k, v in found.items() if k not in YOUNGER or v != type(self).model_fields[k].default}

    @model_validator(mode="after")
    def _can(self) -> Self:
        for setting, why in self.lacks.items():
            if getattr(self, setting):
                raise ValueError(f"{setting}: {why}")
        if self.specificity and not self.same_subject:
            raise ValueError("specificity: asks the same_subject questions once more, and same_subject is 0")
        return self

    def files(self) -> list[Path]:
        """The data files that are read: their content is part of every key."""
        return []
