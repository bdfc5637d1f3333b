"""Apply the stored edit again once training is over: meant as the upper bound of what a remedy can save.

In results/mitigations it is none: the update stands there twice, and what the model knew breaks under it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from retention.mitigations._part import Mitigation, Place, Scene
from retention.mitigations._weights import effective
from retention.types import Guard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reedit(Mitigation):
    """Every reading is of the trained weights plus `factor` times the edit's update, as if training had ended there.

    What it costs: the update must have been kept. Where training left the edit alone, it stands there twice.
    """

    acts_on: ClassVar[Place] = "after"

    name: Literal["reedit"] = "reedit"
    factor: float = Field(1.0, gt=0, description="of the update that is added again")

    @property
    def needs_edit(self) -> bool:
        return True

    def guard(self, model: PreTrainedModel, scene: Scene) -> Guard:
        return _Again(self, model, scene)


class _Again(Guard):
    def __init__(self, settings: Reedit, model: PreTrainedModel, scene: Scene) -> None:
        self.settings, self.model, self.scene = settings, model, scene
        with effective(model, scene):  # an adapter that cannot be merged is refused before training
            pass

    @contextmanager
    def reading(self) -> Iterator[None]:
        with effective(self.model, self.scene) as own:
            with torch.no_grad():
                for name in self.scene.delta.updates:
                    added = self.settings.factor * self.scene.delta.dense(name).to(own[name].device)
                    own[name].copy_(own[name].float() + added.float())
            yield
