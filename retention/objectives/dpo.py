"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its relatives, by trl's DPOTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from retention.objectives._part import Objective, Row, completion, reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
DIVERGING = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}  # take any divergence


class Dpo(Objective):
    """Raises the completion's log-probability above the rejected one's, relative to the edited model's.

    The reference is the model as it is before the first step: the edited one; in a list of fine-tunes, the one that the
    fine-tune before has left.
    """

    trainer: ClassVar[str] = "trl.DPOTrainer"
    config: ClassVar[str] = "trl.DPOConfig"
    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion", "rejected")
    trains_rejected: ClassVar[bool] = True
    sequences: ClassVar[int] = 2
    defaults: ClassVar[Mapping[str, Any]] = {
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "loss_weights": None,
        "use_weighting": False,
        "discopop_tau": 0.05,
        "disable_dropout": True,
        "truncation_mode": "keep_start",
        # The reference is read once, before the first step: no second copy of the weights is kept.
        "precompute_ref_log_probs": True,
        "sync_ref_model": False,
        "ref_model_mixup_alpha": 0.6,
        "ref_model_sync_steps": 512,
    }

    name: Literal["dpo"] = "dpo"
    loss: tuple[Loss, ...] = Field(("sigmoid",), min_length=1, description="trl's loss types; several are added up")
    beta: float = Field(0.1, gt=0, description="how dear it is to leave the reference")

    def models(self, arguments: Mapping[str, Any]) -> int:
        return 1 if arguments["precompute_ref_log_probs"] else 2

    def arguments(self) -> dict[str, Any]:
        return {"loss_type": list(self.loss), "beta": self.beta}

    def splits(self) -> bool:
        # They sort or average over the pairs of a batch, or count its tokens.
        return not {"aot", "aot_unpaired", "bco_pair", "sft"} & set(self.loss)

    def problems(self, arguments: Mapping[str, Any]) -> list[str]:
        found, smoothing = [], arguments["label_smoothing"]
        if "exo_pair" in self.loss and not smoothing > 0:
            found.append("tune.trainer.label_smoothing: loss exo_pair needs one above 0 (its paper: 0.001), got 0")
        if "robust" in self.loss and not 0 <= smoothing < 0.5:
            found.append(f"tune.trainer.label_smoothing: loss robust needs one from 0 to below 0.5, got {smoothing}")
        if arguments["f_divergence_type"] != "reverse_kl" and (others := set(self.loss) - DIVERGING):
            found.append(
                f"tune.trainer.f_divergence_type: loss {', '.join(sorted(others))} is defined for reverse_kl alone"
            )
        if arguments["use_weighting"] and {"aot", "aot_unpaired"} & set(self.loss):
            found.append("tune.trainer.use_weighting: aot sorts the pairs, which loses their weights; use another loss")
        if arguments["sync_ref_model"] and arguments["precompute_ref_log_probs"]:
            found.append("tune.trainer.sync_ref_model: give precompute_ref_log_probs: false with it")
        return found

    def columns(self, row: Row) -> list[dict[str, Any]]:
        return [{"prompt": row["prompt"], "chosen": completion(row), "rejected": completion(row, "rejected")}]

    def extras(self, model: PreTrainedModel, config: Any, base: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        return reference(model, once=config.precompute_ref_log_probs)
