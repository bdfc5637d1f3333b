"""Odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691), by trl's experimental ORPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from retention.objectives._part import Objective, Row, completion

REASON = (
    "trl calls {name} experimental: it may change or go in any release, and with it the numbers; write `experimental: "
    "true` to use it all the same, or use dpo"
)


def needs_length(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """Refuse max_length: null, which trl's experimental trainers read as 512."""
    told = f"tune.trainer.max_length: objective {name} needs a length in tokens; trl would take 512"
    return [told] if arguments["max_length"] is None else []


class Orpo(Objective):
    """Cross-entropy on the completion, and its odds raised against the rejected one's. Needs no reference."""

    trainer: ClassVar[str] = "trl.experimental.orpo.ORPOTrainer"
    config: ClassVar[str] = "trl.experimental.orpo.ORPOConfig"
    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion", "rejected")
    sequences: ClassVar[int] = 2
    fused: ClassVar[bool] = False
    trains_rejected: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "disable_dropout": True,
        "max_completion_length": None,
        "remove_unused_columns": False,
    }

    name: Literal["orpo"] = "orpo"
    experimental: bool = Field(False, description="must be true: trl's trainer is experimental")
    beta: float = Field(0.1, gt=0, description="weight of the odds ratio (lambda in the paper)")

    @model_validator(mode="after")
    def _said(self) -> Orpo:
        if not self.experimental:
            raise ValueError(REASON.format(name=self.name))
        return self

    def arguments(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def problems(self, arguments: Mapping[str, Any]) -> list[str]:
        return needs_length(self.name, arguments)

    def columns(self, row: Row) -> list[dict[str, Any]]:
        return [{"prompt": row["prompt"], "chosen": completion(row), "rejected": completion(row, "rejected")}]
