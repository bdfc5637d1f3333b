"""On-policy distillation (Agarwal et al. 2023, arXiv 2306.13649) from the unedited model, by trl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from retention.objectives._part import Objective, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Distill(Objective):
    """The edited model goes on from each prompt, and is drawn towards what the unedited model would have said there.

    The rows' completions are not looked at. Tokens seen are those of prompts and answers, counted when they are drawn.
    A second model, the teacher, is held in memory.
    """

    trainer: ClassVar[str] = "trl.DistillationTrainer"
    config: ClassVar[str] = "trl.DistillationConfig"
    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    shuffled_by: ClassVar[Literal["sampler", "harness", "field"]] = "field"
    defaults: ClassVar[Mapping[str, Any]] = {
        "disable_dropout": False,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "use_vllm": False,
        "remove_unused_columns": False,
    }

    name: Literal["distill"] = "distill"
    divergence: float = Field(
        1.0,
        ge=0,
        le=1,
        description="trl's beta: 0 is the forward divergence (teacher's over the student's), 1 the reverse one",
    )
    max_completion_length: int = Field(16, ge=1, description="tokens of an answer at most")
    temperature: float = Field(1.0, gt=0, description="of the draw of answers, and of both distributions")

    def models(self, arguments: Mapping[str, Any]) -> int:
        return 2

    def arguments(self) -> dict[str, Any]:
        return {
            "beta": self.divergence,
            "max_completion_length": self.max_completion_length,
            "temperature": self.temperature,
        }

    def columns(self, row: Row) -> list[dict[str, Any]]:
        return [{"prompt": row["prompt"]}]

    def extras(self, model: PreTrainedModel, config: Any, base: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        return {"teacher_model": base().requires_grad_(False).eval()}
