"""Read an average of the weights over training instead of the last ones (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from retention.mitigations._part import Mitigation, Place, Scene
from retention.mitigations._weights import restored, trainable
from retention.types import Guard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Ema(Mitigation):
    """Every reading is of average <- decay * average + (1 - decay) * weights, taken after each step from the start.

    The average begins with the weights before the first step, without a correction for it: that is what holds it near
    the edited model. Of a list of fine-tunes, the model's own weights are averaged while they are trained, each adapter
    anew: where an adapter follows full fine-tuning, readings go on from the last weights. What it costs: a float32 copy
    of what is trained and a pass over it per step; and a task that lags behind.
    """

    acts_on: ClassVar[Place] = "training"
    copies: ClassVar[float] = 1

    name: Literal["ema"] = "ema"
    decay: float = Field(0.99, gt=0, lt=1, description="share of the average that stays at each step")

    def guard(self, model: PreTrainedModel, scene: Scene) -> Guard:
        return _Average(self, model, scene)


class _Average(Guard):
    def __init__(self, settings: Ema, model: PreTrainedModel, scene: Scene) -> None:
        self.settings, self.model, self.scene = settings, model, scene
        self.moving: dict[str, torch.nn.Parameter] = {}
        self.average: dict[str, Tensor] = {}

    def before_step(self) -> None:
        if not self.moving:  # the first step: now it is known what is frozen
            self.moving = trainable(self.model, self.scene)
            own = self.scene.memory.setdefault("average", {})
            for name, p in self.moving.items():
                start = own[name] if name in own else p.detach().clone().float()
                self.average[name] = start
                if name in self.scene.names:
                    own[name] = start

    @torch.no_grad()
    def after_step(self) -> None:
        for name, p in self.moving.items():
            self.average[name].lerp_(p.float(), 1 - self.settings.decay)

    def state(self) -> dict[str, Tensor]:
        return self.average

    def resume(self, state: dict[str, Tensor]) -> None:
        self.before_step()
        for name, average in self.average.items():  # in place: the next fine-tune of a list has the same tensors
            average.copy_(state[name])

    @contextmanager
    def reading(self) -> Iterator[None]:
        with restored(self.moving):
            with torch.no_grad():
                for name, p in self.moving.items():
                    p.copy_(self.average[name])
            yield
