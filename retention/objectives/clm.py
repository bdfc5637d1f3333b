"""Continued language-model training on plain text (the downstream task of arXiv 2507.14198), by trl's SFTTrainer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from retention.objectives._part import Objective


class Clm(Objective):
    """Cross-entropy on every token of the text. Rows with a prompt and a completion are read as one text."""

    trainer: ClassVar[str] = "SFTTrainer"
    config: ClassVar[str] = "SFTConfig"
    rows: ClassVar[Literal["prompt_completion", "text"]] = "text"

    name: Literal["clm"] = "clm"

    def arguments(self) -> dict[str, Any]:
        return {"completion_only_loss": False, "dataset_text_field": "text"}
