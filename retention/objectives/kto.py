"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306), by trl's KTOTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from retention.objectives._part import Objective, Row, completion, reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Kto(Objective):
    """Raises the probability of desirable completions and lowers that of undesirable ones, each judged alone.

    A row with a rejected completion gives two rows of the trainer: one desirable, one not. A row without gives one:
    desirable, or as its `label` says. The reference is the edited model, as for dpo. Its loss needs batches of
    mismatched prompts and completions in a fixed order, so the rows are shuffled once by the seed, and come in that
    order in each epoch.
    """

    trainer: ClassVar[str] = "trl.KTOTrainer"
    config: ClassVar[str] = "trl.KTOConfig"
    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    trains_rejected: ClassVar[bool] = True
    sequences: ClassVar[int] = 2
    shuffled_by: ClassVar[Literal["sampler", "harness", "field"]] = "harness"
    defaults: ClassVar[Mapping[str, Any]] = {
        "disable_dropout": True,
        "precompute_ref_log_probs": True,
        "sync_ref_model": False,
        "ref_model_mixup_alpha": 0.6,
        "ref_model_sync_steps": 512,
    }

    name: Literal["kto"] = "kto"
    loss: Literal["kto", "apo_zero_unpaired"] = Field("kto", description="trl's loss type")
    beta: float = Field(0.1, gt=0, description="how dear it is to leave the reference")
    desirable_weight: float = Field(1.0, ge=0, description="factor of the loss on desirable completions")
    undesirable_weight: float = Field(1.0, ge=0, description="factor of the loss on undesirable completions")

    def models(self, arguments: Mapping[str, Any]) -> int:
        return 1 if arguments["precompute_ref_log_probs"] else 2

    def arguments(self) -> dict[str, Any]:
        return {
            "loss_type": self.loss,
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }

    def rows_in_step(self, arguments: Mapping[str, Any]) -> float | None:
        return None  # a row gives one row of the trainer or two

    def problems(self, arguments: Mapping[str, Any]) -> list[str]:
        found = []
        size = arguments["per_device_train_batch_size"]
        if self.loss == "kto" and size < 2:
            found.append(
                "tune.trainer.per_device_train_batch_size: "
                f"kto compares rows of a batch; expected 2 or more, not {size}"
            )
        if arguments["sync_ref_model"] and arguments["precompute_ref_log_probs"]:
            found.append("tune.trainer.sync_ref_model: give precompute_ref_log_probs: false with it")
        return found

    def columns(self, row: Row) -> list[dict[str, Any]]:
        said = {"prompt": row["prompt"], "completion": completion(row), "label": bool(row.get("label", True))}
        if "rejected" not in row:
            return [said]
        return [said | {"label": True}, said | {"completion": completion(row, "rejected"), "label": False}]

    def extras(self, model: PreTrainedModel, config: Any, base: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        return reference(model, once=config.precompute_ref_log_probs)
