"""The settings that every fact source shares: how many facts of each group are drawn, and by which seed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from retention.types import Part


class FactsPart(Part):
    """How many facts of each group a run reads. Drawn by seed; edited facts are never selected for success."""

    edited: int = Field(50, ge=1, description="facts that are edited, all at once in one run")
    intrinsic: int = Field(
        100, ge=1, description="facts that the base model knows (direct question, every token right)"
    )
    control: int = Field(0, ge=0, description="facts drawn exactly as the edited ones, but left alone, known or not")
    neighbors: int = Field(2, ge=0, description="per edit: facts with the same relation and old object, other subject")
    same_subject: int = Field(2, ge=0, description="per edit: other relations of its subject")
    paraphrases: int = Field(
        2, ge=0, description="per edited, intrinsic and control fact: held-out phrasings asked, at most"
    )
    intrinsic_relations: Literal["as_edited", "any"] = Field(
        "as_edited",
        description="as_edited: intrinsic facts come from the relations of the edited ones, so that groups compare",
    )
    intrinsic_exposures: Literal["as_edited", "any"] = Field(
        "as_edited",
        description="as_edited: intrinsic facts were stated in pretraining as often as the edited, where known",
    )
    seed: int | None = Field(None, description="of the draw; left out, it is the run's own seed")

    def files(self) -> list[Path]:
        """The data files that are read: their content is part of every key."""
        return []
