"""FT: fine-tune one MLP matrix on the edits. FT-L bounds every weight's change, FT-M trains on the target as usual.

FT-L: Zhu et al. (2012.00363) as run by Meng et al. (2202.05262) and in EasyEdit: all target tokens are predicted from
the prompt's last token (no teacher forcing), and after every step each weight is clamped to within `norm_constraint`
of where it started. FT-M (EasyEdit): the ordinary cross-entropy of the target tokens. Both: Adam, lr 5e-4, 25 epochs,
until an epoch's loss is below 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from retention.editors._base import WeightEditor
from retention.editors._training import Plan, train_weights
from retention.models import down_parameter
from retention.types import Edit, EditResult

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from retention.estimate import Shape


class Ft(WeightEditor):
    name: Literal["ft"] = "ft"
    open: ClassVar[frozenset[str]] = frozenset({"layer"})

    variant: Literal["FT-L", "FT-M"] = "FT-L"
    layer: int | None = Field(
        default=None, ge=0, description="block whose MLP's second matrix is trained; None: the preset's"
    )
    norm_constraint: float | None = Field(
        default=None, gt=0, description="largest change of any weight; null: unbounded; omitted: the preset's"
    )
    lr: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=25, ge=1, description="passes over all edits")
    batch_size: int = Field(default=64, ge=1, description="rows of edits a step")
    stop_loss: float = Field(default=1e-2, ge=0, description="mean loss of an epoch that ends training, nats per token")

    @property
    def preset(self) -> str:
        return self.variant.lower()

    @property
    def label(self) -> str:
        return super().label.replace("ft", self.variant.lower(), 1)

    def trained(self, shape: Shape) -> int:
        """Numbers that are trained in a model of this shape."""
        return shape.width * shape.mlp

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
        assert self.layer is not None, "filled in by a preset"
        name, _ = down_parameter(model, self.layer)
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            stop_loss=self.stop_loss,
        )
        read: Literal["each", "prompt_last"] = "prompt_last" if self.variant == "FT-L" else "each"
        return train_weights(model, tokenizer, edits, [name], plan, seed, read=read, bound=self.norm_constraint)
