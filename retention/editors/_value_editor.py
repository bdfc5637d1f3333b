"""What the editors that place a v* share: the settings of its search, and what is told of each edit.

Each editor says which settings its paper has; the others are the same in all of them. Knows no closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from retention.editors._base import WeightEditor
from retention.editors._keys import Covariance
from retention.editors._values import Values, ValueSettings

Steps = Annotated[int, Field(ge=1, description="evaluations of v*'s loss")]
Rate = Annotated[float, Field(gt=0, description="of Adam on v*")]
Decay = Annotated[float, Field(ge=0, description="of |delta| / |v0|^2 in v*'s loss")]
Clamp = Annotated[float, Field(gt=0, description="|delta| <= this times |v0|")]


class ValueEditor(WeightEditor):
    """An editor whose update makes one layer, or the last of several, give v* at the subjects."""

    single_mlps: ClassVar[bool] = True

    # None, where an editor allows it: what the model's preset has.
    v_steps: Steps | None
    v_lr: Rate | None
    v_weight_decay: Decay | None
    clamp_norm_factor: Clamp | None
    kl_factor: float = Field(default=0.0625, ge=0, description="weight of the KL divergence at the anchors")
    context_lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(10,) * 5, description="tokens of each generated prefix; [] for none"
    )
    covariance: Covariance = Covariance()
    tokens_per_batch: int | None = Field(
        default=None,
        ge=1,
        description="tokens of all prompts and prefixes that v* is sought for at once; bounds memory and moves the "
        "last digits. None: what fits into the memory that the weights take, at least 4 GiB",
    )

    def search(self) -> ValueSettings:
        """The settings of v*'s search, all of which are known once a preset has filled them in."""
        given = {
            "steps": self.v_steps, "lr": self.v_lr, "weight_decay": self.v_weight_decay,
            "clamp": self.clamp_norm_factor,
        }  # fmt: skip
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        assert settings.keys() == given.keys(), "filled in by a preset"
        return ValueSettings(**settings, kl_factor=self.kl_factor, tokens_per_batch=self.tokens_per_batch)


def diagnosed(values: Values, norms: Sequence[float]) -> tuple[dict[str, Any], ...]:
    """Diagnostics per edit: those of its v*, and the norm of its part of the update."""
    return tuple({**entry, "update_norm": norm} for entry, norm in zip(values.diagnostics, norms, strict=True))
