"""Continued language-model training on plain text (the downstream task of arXiv 2507.14198), by trl's SFTTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from retention.objectives._part import Objective, Row
from retention.texts import join


class Clm(Objective):
    """Cross-entropy on every token of the text. Rows with a prompt and a completion are read as one text.

    With `block`, the texts are put one behind the other, each closed by the end-of-text token, and cut into blocks of
    so many tokens, as in pretraining: what is longer than a block goes on in the next, and within a block a text reads
    those before it. A row of the trainer is then a block.
    """

    trainer: ClassVar[str] = "trl.SFTTrainer"
    config: ClassVar[str] = "trl.SFTConfig"
    needs: ClassVar[tuple[str, ...]] = ()
    learns_tokens: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"truncation_mode": "keep_start", "label_smoothing_factor": 0.0}

    name: Literal["clm"] = "clm"
    block: int | None = Field(
        None, ge=2, description="tokens in a block; left out: each text alone, cut off at tune.trainer.max_length"
    )

    def splits(self) -> bool:
        return True

    def arguments(self) -> dict[str, Any]:
        fixed = {
            "loss_type": "nll",
            "completion_only_loss": False,
            "assistant_only_loss": False,
            "dataset_text_field": "text",
            "packing": self.block is not None,
            "packing_strategy": "wrapped",
            "padding_free": False,
        }
        return fixed if self.block is None else {**fixed, "max_length": self.block}

    def rows_in_step(self, arguments: Mapping[str, Any]) -> float | None:
        return super().rows_in_step(arguments) if self.block is None else None

    def columns(self, row: Row) -> list[dict[str, Any]]:
        return [{"text": row["text"] if "text" in row else join(row["prompt"], row["completion"], row.get("joint"))}]
