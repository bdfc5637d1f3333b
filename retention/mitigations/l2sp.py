"""Hold the weights near their starting point (L2-SP: Li, Grandvalet and Davoine 2018, arXiv 1802.01483, equation 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import mse_loss

from retention.mitigations._part import Mitigation, Place, Scene
from retention.mitigations._weights import anchors, trainable
from retention.types import Guard, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class L2Sp(Mitigation):
    """Adds weight / 2 * |w - w_edited|^2 to the loss; the paper's decay of a new head has nothing to act on here.

    An adapter's parameters are held where they start. What it costs: a copy of the weights it holds, a pass over them
    per micro-batch, and a task that is learned less far.
    """

    acts_on: ClassVar[Place] = "training"
    copies: ClassVar[float] = 1

    name: Literal["l2sp"] = "l2sp"
    weight: float = Field(gt=0, description="of half the squared distance, nats")
    what: Literal["trainable", "edited"] = Field(
        "trainable", description="all parameters that are trained, or only the edited ones"
    )

    @property
    def needs_edit(self) -> bool:
        return self.what == "edited"

    def check(self, settings: Any) -> None:
        """Raises UserError for `what: edited` under an adapter, which leaves the edited matrices where they are."""
        for tune in settings.tunes:
            adapter = tune.adapter or settings.adapter
            if self.what == "edited" and adapter.name != "full":
                raise UserError(
                    f"mitigations: l2sp: what: edited holds edited matrices that are trained themselves; with adapter "
                    f"{adapter.name} only the adapter is. Use what: trainable, or adapter: full"
                )

    def guard(self, model: PreTrainedModel, scene: Scene) -> Guard:
        return _Pull(self, model, scene)


class _Pull(Guard):
    def __init__(self, settings: L2Sp, model: PreTrainedModel, scene: Scene) -> None:
        self.settings, self.model, self.scene = settings, model, scene
        self.start = anchors(model, scene)
        self.moving: dict[str, torch.nn.Parameter] | None = None  # known once frozen parameters are

    def penalty(self) -> Tensor | None:
        """Half the weighted squared distance, a float32 scalar; None where nothing is held."""
        if self.moving is None:
            chosen = trainable(self.model, self.scene)
            if self.settings.what == "edited":
                chosen = {name: p for name, p in chosen.items() if name in self.scene.delta.updates}
            self.moving = chosen
        if not self.moving:
            return None
        parts = [
            mse_loss(p.float(), self.start[name].to(p.device, torch.float32), reduction="sum")
            for name, p in self.moving.items()
        ]
        return self.settings.weight / 2 * torch.stack([part.to(parts[0].device) for part in parts]).sum()
