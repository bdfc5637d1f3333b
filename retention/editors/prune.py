"""PRUNE: compress those singular values of an update that exceed the largest one of the unedited matrix.

Ma et al., "Perturbation-Restrained Sequential Model Editing" (2405.16821): with the update U diag(s) V^T and s0 the
largest singular value of the unedited weight, every s > s0 becomes log_a(s) - log_a(s0) + s0; the others stay. A
post-processor of the cumulative update of any weight editor.

The compressed update *replaces* the update: W = W0 + U diag(s') V^T. The baseline in AlphaEdit's code adds it on top of
the already edited weight, which applies every edit about twice; that is not reproduced here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from retention.editors._factors import singular_values
from retention.types import Delta, LowRank, Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prune(Part):
    name: Literal["prune"] = "prune"
    base: float = Field(default=1.2, gt=1, description="base a of the logarithm; the paper uses 1.2, 1.5, 2 and e")

    @torch.no_grad()
    def process(self, model: PreTrainedModel, delta: Delta, *, rank_one_per_edit: bool = False) -> Delta:
        """The update with its large singular values compressed, as factors. `model` holds the unedited weights."""
        weights = dict(model.named_parameters())
        compressed: dict[str, Tensor | LowRank] = {}
        for name, update in delta.updates.items():
            limit = float(torch.linalg.matrix_norm(weights[name].detach().double(), 2))
            u, s, vh = singular_values(update)
            over = s > limit
            s = torch.where(over, (s.clamp_min(limit) / limit).log() / math.log(self.base) + limit, s)
            compressed[name] = LowRank((u * s).float(), vh.float())
        return Delta(compressed)
