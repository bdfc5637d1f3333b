"""Supervised fine-tuning on prompts and completions, by trl's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from retention.hooks import undisturbed
from retention.objectives._part import Objective, Row, completion
from retention.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Sft(Objective):
    """Cross-entropy on the completion alone, or on prompt and completion; or on the assistant's turns of a chat.

    With `assistant_only` a row is read as a conversation through the tokenizer's chat template: its `messages`, or else
    the prompt as the user's turn and the completion as the assistant's. Probes and the held-out loss still ask in plain
    text; `tune.chat` trains in the same form, and reads the held-out rows in it.

    With `packing` a row of the trainer is several rows one behind the other, up to tune.trainer.max_length tokens; a
    batch, and so a step, then holds more of them, and an epoch has fewer steps. Rows in a pack do not read one another:
    the model is tried first, and refused if they would. Packs are filled by length, so that a mitigation of the rows,
    which decides on their order, excludes packing.
    """

    trainer: ClassVar[str] = "trl.SFTTrainer"
    config: ClassVar[str] = "trl.SFTConfig"
    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    learns_tokens: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"truncation_mode": "keep_start", "label_smoothing_factor": 0.0}

    name: Literal["sft"] = "sft"
    loss: Literal["nll", "dft"] = Field(
        "nll", description="nll, or weighted by the token's own probability (dft, arXiv 2508.05629)"
    )
    completion_only: bool = Field(True, description="loss on the completion's tokens only; false: on the prompt's too")
    assistant_only: bool = Field(False, description="chat rows: loss on the assistant's turns only")
    packing: Literal["bfd", "bfd_split"] | None = Field(
        None, description="several rows in one: bfd cuts rows off at max_length, bfd_split goes on in the next pack"
    )

    @field_validator("packing", mode="before")
    @classmethod
    def _apart(cls, value: Any) -> Any:
        if value == "wrapped":
            raise ValueError(
                "wrapped packs let rows read one another and cut them anywhere; use bfd, or objective clm with "
                "`block`, where that is meant"
            )
        return value

    @model_validator(mode="after")
    def _one_loss(self) -> Sft:
        if self.assistant_only and not self.completion_only:
            raise ValueError("assistant_only is a loss on the assistant's turns alone; leave completion_only: true")
        return self

    def splits(self) -> bool:
        return True

    def arguments(self) -> dict[str, Any]:
        return {
            "loss_type": self.loss,
            "completion_only_loss": self.completion_only,
            "assistant_only_loss": False,  # rows come with labels
            "packing": self.packing is not None,
            "packing_strategy": self.packing or "bfd",
            "padding_free": False,  # by packing only: without it, trl does not cut at max_length
        }

    def rows_in_step(self, arguments: Mapping[str, Any]) -> float | None:
        return super().rows_in_step(arguments) if self.packing is None else None

    def problems(self, arguments: Mapping[str, Any]) -> list[str]:
        if self.packing is not None and arguments["max_length"] is None:
            return ["tune.trainer.max_length: a pack needs a length in tokens; give one, or no packing"]
        return []

    def columns(self, row: Row) -> list[dict[str, Any]]:
        if not self.assistant_only:
            return [{"prompt": row["prompt"], "completion": completion(row)}]
        if "messages" in row:
            tools = {"tools": row["tools"]} if row.get("tools") else {}
            return [{"messages": list(row["messages"]), **tools}]
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        return [{"messages": turns}]

    def check(self, row: Row) -> None:
        if not (self.assistant_only and "messages" in row):
            super().check(row)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if self.assistant_only and not tokenizer.chat_template:
            raise UserError(
                "objective: sft.assistant_only reads rows as a chat, and this model's tokenizer has no chat template; "
                "use assistant_only: false, or a model that was trained to chat"
            )

    def extras(self, model: PreTrainedModel, config: Any, base: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        if self.packing is not None:
            _keeps_apart(model)
        return {}


def _keeps_apart(model: PreTrainedModel) -> None:
    """Raises UserError if what follows in a pack depends on what stands before it.

    A pack is told apart by its positions alone, which start anew with each row. Architectures that work their positions
    out by themselves, or carry a state along, read across; trl does not ask.
    """
    device = next(model.parameters()).device
    head, other, tail = [1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 3]
    positions = torch.tensor([[*range(len(head)), *range(len(tail))]], device=device)
    with undisturbed(model), torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([[*before, *tail]], device=device), position_ids=positions, use_cache=False)
            .logits[0, len(head) :]
            .float()
            for before in (head, other)
        ]
        alone = model(input_ids=torch.tensor([tail], device=device), use_cache=False).logits[0].float()
    scale = float(alone.abs().max())
    if any(float((one - alone).abs().max()) > 1e-3 * scale for one in logits):
        raise UserError(
            f"objective: sft.packing: in this model ({model.config.model_type}, attention "
            f"{model.config._attn_implementation}) rows of one pack would read one another; use packing: null"
        )
