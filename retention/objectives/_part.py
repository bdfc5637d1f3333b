"""What every fine-tuning objective tells the harness: which trl trainer it is, and the rows that it trains on."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from retention.types import Part


class Objective(Part):
    """Names a trl trainer and its data format; holds no training code."""

    name: str

    trainer: ClassVar[str]  # class in trl
    config: ClassVar[str]  # its configuration class in trl
    rows: ClassVar[Literal["prompt_completion", "text"]]  # the keys of a row of data

    def arguments(self) -> dict[str, Any]:
        """Arguments of the trainer's config that this objective fixes."""
        raise TypeError(f"{type(self).__name__} must say which trainer arguments it fixes")
