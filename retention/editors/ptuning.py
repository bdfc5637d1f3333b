"""P-tuning as an editor: a soft prompt before every text, trained on the edits; no weight changes.

Liu et al. (2103.10385), a baseline of Ge et al. (2406.04496), whose settings for it are not published. peft's prompt
encoder makes the virtual tokens while they are trained; what is kept is the tokens themselves. The result is no weight
edit: its Delta is empty, and `EditResult.soft_prompt` is to be held before every text while the weights are fine-tuned
below it. What is forgotten then is not comparable with edits that live in the weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from retention.editors._base import check_lengths, preserved
from retention.editors._training import Masters, Plan, diagnostics, edit_row, fit, target_losses
from retention.soft_prompt import prompted, wrapped
from retention.types import Delta, Edit, EditResult, Part

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class AfterPrompt(nn.Module):
    """A model behind a soft prompt, called as if it stood before the text alone: positions do not count it."""

    def __init__(self, reader: Any, virtual_tokens: int) -> None:
        super().__init__()
        self.reader, self.virtual_tokens = reader, virtual_tokens

    @property
    def device(self) -> torch.device:
        return self.reader.device

    def forward(self, *, logits_to_keep: torch.Tensor, **inputs: Any) -> Any:
        return self.reader(**inputs, logits_to_keep=logits_to_keep + self.virtual_tokens)


class PTuning(Part):
    name: Literal["ptuning"] = "ptuning"
    virtual_tokens: int = Field(default=20, ge=1)
    encoder: Literal["mlp", "lstm"] = "mlp"  # what makes the virtual tokens while they are trained
    encoder_width: int = Field(default=128, ge=1)
    lr: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=100, ge=1, description="passes over all edits")
    batch_size: int = Field(default=64, ge=1, description="rows of edits a step")
    stop_loss: float = Field(default=1e-2, ge=0, description="mean loss of an epoch that ends training, nats per token")

    @property
    def label(self) -> str:
        return self.name

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        edits: Sequence[Edit],
        *,
        seed: int,
        corpus: Sequence[str] = (),
        cache: Path | None = None,
    ) -> EditResult:
        start = time.perf_counter()
        check_lengths(model, tokenizer, edits, self.virtual_tokens)
        rows = [edit_row(tokenizer, e, phrasing) for e in edits for phrasing in e.prompts]
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            stop_loss=self.stop_loss,
        )
        encoder = {"encoder_reparameterization_type": self.encoder.upper(), "encoder_hidden_size": self.encoder_width}
        with preserved(model, seed):
            with wrapped(model, self.virtual_tokens, **encoder) as reader:
                prompt_encoder = reader.prompt_encoder["default"]
                after = AfterPrompt(reader, self.virtual_tokens)
                masters = Masters(list(prompt_encoder.parameters()))
                fitted = fit(masters, lambda _: rows, lambda batch: target_losses(after, batch), plan, seed)
                with torch.no_grad():
                    soft_prompt = prompt_encoder(torch.arange(self.virtual_tokens, device=model.device)).float().cpu()
            with prompted(model, soft_prompt) as reader:
                records = diagnostics(AfterPrompt(reader, self.virtual_tokens), tokenizer, edits, Delta(), fitted)
        return EditResult(
            delta=Delta(),
            soft_prompt=soft_prompt,
            diagnostics=records,
            seconds=time.perf_counter() - start,
            info={"steps": fitted.steps, "train_loss": fitted.loss, "weight_edit": False},
        )
