"""LocFT-BF: fine-tune one located matrix on all edits, epoch by epoch ("breadth first"), targets ended by EOS.

"Fine-tuning Done Right in Model Editing" (2509.22072): fine-tuning fails as an editor because each edit is trained to
convergence before the next; shuffled epochs over all edits in batches of 100, on one matrix, do not. Adam, 25 epochs,
until an epoch's loss is below 0.01; lr 5e-4 on one second MLP matrix, or 5e-5 on a whole block (their Mistral).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from retention.editors._base import WeightEditor
from retention.editors._training import Plan, block_parameters, train_weights
from retention.models import down_parameter
from retention.types import Edit, EditResult

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from retention.estimate import Shape


class LocFt(WeightEditor):
    name: Literal["locft"] = "locft"
    open: ClassVar[frozenset[str]] = frozenset({"layer"})

    layer: int | None = Field(default=None, ge=0, description="None: the preset's")
    what: Literal["down", "block"] = Field(default="down", description="the MLP's second matrix, or the whole block")
    lr: float | None = Field(default=None, gt=0, description="None: 5e-4 for down, 5e-5 for block")
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=25, ge=1, description="passes over all edits")
    batch_size: int = Field(default=100, ge=1, description="rows of edits a step")
    stop_loss: float = Field(default=1e-2, ge=0, description="mean loss of an epoch that ends training, nats per token")
    append_eos: bool = True  # train the end-of-text token after every target

    def trained(self, shape: Shape) -> int:
        """Numbers that are trained in a model of this shape."""
        return shape.width * shape.mlp if self.what == "down" else shape.block

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
        layer, what = self.layer, self.what
        assert layer is not None, "filled in by a preset"
        names = [down_parameter(model, layer)[0]] if what == "down" else block_parameters(model, [layer])
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr or (5e-4 if what == "down" else 5e-5),
            weight_decay=self.weight_decay,
            stop_loss=self.stop_loss,
        )
        return train_weights(model, tokenizer, edits, names, plan, seed, eos=self.append_eos)
