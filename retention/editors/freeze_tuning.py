"""Freeze tuning: fine-tune some blocks on the edits, everything else frozen.

A baseline of Ge et al. (2406.04496), whose blocks, learning rate and epochs are not published. The default trains the
last two blocks whole, as LLaMA-Factory's `freeze` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from retention.editors._base import WeightEditor
from retention.editors._training import Plan, block_parameters, train_weights
from retention.models import anatomy
from retention.types import Edit, EditResult, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from retention.estimate import Shape


class FreezeTuning(WeightEditor):
    name: Literal["freeze_tuning"] = "freeze_tuning"
    last: int = Field(default=2, ge=1, description="how many of the last blocks are trained")
    layers: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="the blocks that are trained, instead of the last ones"
    )
    what: Literal["all", "mlp", "attention"] = "all"  # every parameter of the blocks, or some of their matrices
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=80, ge=1, description="passes over all edits")
    batch_size: int = Field(default=64, ge=1, description="rows of edits a step")
    stop_loss: float = Field(default=1e-2, ge=0, description="mean loss of an epoch that ends training, nats per token")

    def trained(self, shape: Shape) -> int:
        """Numbers that are trained in a model of this shape."""
        return shape.block * (self.last if self.layers is None else len(self.layers))

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        edits: Sequence[Edit],
        *,
        seed: int,
        corpus: Sequence[str],
        cache: Path | None,
    ) -> EditResult:
        depth = anatomy(model).layers
        if self.layers is None and self.last > depth:
            raise UserError(
                f"freeze_tuning: last: {self.last} blocks of a model that has {depth}; give at most {depth}"
            )
        layers = range(depth - self.last, depth) if self.layers is None else self.layers
        names = block_parameters(model, layers, self.what)
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            stop_loss=self.stop_loss,
        )
        return train_weights(model, tokenizer, edits, names, plan, seed)
