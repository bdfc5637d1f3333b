"""Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) on answers that can be checked, by trl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from retention.explain import nearest
from retention.objectives._part import Objective, Row, reference
from retention.texts import normalise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")  # trl's, looked at in training only


class Grpo(Objective):
    """The model answers each prompt several times; the reward is 1 for the row's completion and 0 for any other.

    A batch (tune.trainer.per_device_train_batch_size) counts answers, not prompts: it holds batch / num_generations
    prompts. Tokens seen are those of prompts and answers, counted when they are drawn.
    """

    trainer: ClassVar[str] = "trl.GRPOTrainer"
    config: ClassVar[str] = "trl.GRPOConfig"
    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    shuffled_by: ClassVar[Literal["sampler", "harness", "field"]] = "field"
    defaults: ClassVar[Mapping[str, Any]] = {
        "beta": 0.0,  # how dear it is to leave the edited model; above 0 a second model is held in memory
        "sync_ref_model": False,
        "num_iterations": 1,
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "importance_sampling_level": "token",
        "scale_rewards": "group",
        "loss_type": "dapo",
        "mask_truncated_completions": False,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "off_policy_mask_threshold": None,
        "disable_dropout": False,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "use_vllm": False,
        "remove_unused_columns": False,
    }

    name: Literal["grpo"] = "grpo"
    reward: Literal["exact", "contains"] = Field(
        "exact", description="1 if the answer, normalised, is the row's completion; or if it contains it"
    )
    num_generations: int = Field(8, ge=2, description="answers to each prompt, compared with one another")
    max_completion_length: int = Field(16, ge=1, description="tokens of an answer at most")
    temperature: float = Field(1.0, gt=0, description="of the draw of answers")

    def arguments(self) -> dict[str, Any]:
        return {
            "num_generations": self.num_generations,
            "max_completion_length": self.max_completion_length,
            "temperature": self.temperature,
        }

    def rows_in_step(self, arguments: Mapping[str, Any]) -> float | None:
        answers = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        return float(answers / (self.num_generations * arguments["num_iterations"]))

    def problems(self, arguments: Mapping[str, Any]) -> list[str]:
        found = []
        if arguments["loss_type"] not in LOSSES:
            name = arguments["loss_type"]
            found.append(f"tune.trainer.loss_type: unknown {name!r}{nearest(name, LOSSES)}")
        if arguments["beta"] < 0:
            found.append(f"tune.trainer.beta: expected a number that is not negative, got {arguments['beta']!r}")
        if arguments["sync_ref_model"]:
            found.append(
                "tune.trainer.sync_ref_model: grpo's reference is the edited model, and stays so; leave it out"
            )
        return found

    def columns(self, row: Row) -> list[dict[str, Any]]:
        return [{"prompt": row["prompt"], "answer": row["completion"]}]

    def extras(self, model: PreTrainedModel, config: Any, base: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        def reward(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
            return [self.judge(said, wanted) for said, wanted in zip(completions, answer, strict=True)]

        return {"reward_funcs": reward} | (reference(model, once=False) if config.beta else {})

    def judge(self, said: str, wanted: str) -> float:
        """The reward of one answer: 1.0 or 0.0."""
        ours, theirs = normalise(said), normalise(wanted)
        return float(ours == theirs if self.reward == "exact" else f" {theirs} " in f" {ours} ")
