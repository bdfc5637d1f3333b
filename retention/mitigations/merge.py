"""Merge the fine-tuned weights with the edited ones once training is over, or with the edit's update (task vectors).

linear: interpolation (WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903). The others put the update of the edit and that
of the fine-tune together on the base model's weights: ties (Yadav et al. 2023, arXiv 2306.01708), dare_linear and
dare_ties (Yu et al. 2024, arXiv 2311.03099), magnitude_prune; their arithmetic is peft's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from retention.mitigations._part import Mitigation, Place, Scene
from retention.mitigations._weights import edited_weights, effective
from retention.types import Guard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


class Merge(Mitigation):
    """Every reading is of the merged weights, as if training had ended there; training goes on from its own.

    linear: edited + weight * (trained - edited): 0 reads the edited model, 1 the trained one, both bit for bit. Else:
    base + method([edit's update, trained - edited], weights [1, weight]), each update cut to `density` first. An
    adapter's update counts as the fine-tune's. Of a list of fine-tunes, all are merged with the edited weights.
    What it costs: a second copy of the weights, and what of the task the merged weights no longer know.
    """

    acts_on: ClassVar[Place] = "after"
    copies: ClassVar[float] = 1

    name: Literal["merge"] = "merge"
    weight: float = Field(0.5, ge=0, le=1, description="of the fine-tune; linear: 0 is the edited model, 1 the trained")
    method: Method = "linear"
    density: float | None = Field(None, gt=0, lt=1, description="share of each update that is kept (not for linear)")

    @model_validator(mode="after")
    def _given(self) -> Merge:
        if self.method == "linear" and self.density is not None:
            raise ValueError("`density` means nothing to a linear merge; leave it out, or use method: ties")
        if self.method != "linear" and self.density is None:
            raise ValueError(f"merge {self.method} needs `density`, the share of each update that is kept (0 to 1)")
        return self

    def guard(self, model: PreTrainedModel, scene: Scene) -> Guard:
        return _Merged(self, model, scene)


class _Merged(Guard):
    def __init__(self, settings: Merge, model: PreTrainedModel, scene: Scene) -> None:
        self.settings, self.model, self.scene = settings, model, scene
        self.edited = edited_weights(model, scene)

    @contextmanager
    def reading(self) -> Iterator[None]:
        with effective(self.model, self.scene) as own:
            devices = sorted({p.device.index or 0 for p in own.values() if p.device.type == "cuda"})
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.scene.seed)  # the same entries are dropped at every reading
                for name, trained in own.items():
                    edited = self.edited[name].to(trained.device)
                    trained.copy_(self._merged(name, edited.float(), trained.float()))
            yield

    def _merged(self, name: str, edited: Tensor, trained: Tensor) -> Tensor:
        """One parameter, float32."""
        weight, method = self.settings.weight, self.settings.method
        if method == "linear":
            return torch.lerp(edited, trained, weight)  # exact at both ends
        from peft.utils import merge_utils

        base, vectors, weights = edited, [trained - edited], [weight]
        if name in self.scene.delta.updates:
            added = self.scene.delta.dense(name).to(edited)
            base, vectors, weights = edited - added, [added, *vectors], [1.0, weight]
        merge = getattr(merge_utils, method)
        merged: Tensor = merge(vectors, torch.tensor(weights).to(edited), self.settings.density)
        return base + merged
