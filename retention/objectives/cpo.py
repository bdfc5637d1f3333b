"""Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417) and SimPO, by an experimental trl trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from retention.objectives._part import Objective, Row, completion
from retention.objectives.orpo import REASON, needs_length


class Cpo(Objective):
    """Raises the completion above the rejected one, without a reference, with cross-entropy on the completion added."""

    trainer: ClassVar[str] = "trl.experimental.cpo.CPOTrainer"
    config: ClassVar[str] = "trl.experimental.cpo.CPOConfig"
    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion", "rejected")
    sequences: ClassVar[int] = 2
    fused: ClassVar[bool] = False
    trains_rejected: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "disable_dropout": True,
        "max_completion_length": None,
        "label_smoothing": 0.0,
        "simpo_gamma": 0.5,
        "alpha": 0.0,
        "remove_unused_columns": False,
    }

    name: Literal["cpo"] = "cpo"
    experimental: bool = Field(False, description="must be true: trl's trainer is experimental")
    loss: Literal["sigmoid", "hinge", "ipo", "simpo"] = Field("sigmoid", description="trl's loss type")
    beta: float = Field(0.1, gt=0, description="steepness of the preference")
    cross_entropy: float = Field(1.0, ge=0, description="weight of the cross-entropy (trl's cpo_alpha); SimPO: 0")

    @model_validator(mode="after")
    def _said(self) -> Cpo:
        if not self.experimental:
            raise ValueError(REASON.format(name=self.name))
        return self

    def arguments(self) -> dict[str, Any]:
        return {"loss_type": self.loss, "beta": self.beta, "cpo_alpha": self.cross_entropy}

    def problems(self, arguments: Mapping[str, Any]) -> list[str]:
        return needs_length(self.name, arguments)

    def columns(self, row: Row) -> list[dict[str, Any]]:
        return [{"prompt": row["prompt"], "chosen": completion(row), "rejected": completion(row, "rejected")}]
