"""RECT: keep only the entries of an update that are large relative to the weight they change.

Gu et al., "Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue" (2401.04700):
entries are scored by |Delta / W|, the top fraction is kept and the rest set to zero. A post-processor: it knows
nothing of how the update was made, and any weight editor may carry it.

The papers' baselines apply it to one edit at a time; `per_edit` does so for editors whose update is a sum of one
rank-one term per edit, each scored against the weights that already hold the terms before it. Otherwise the total
update of the batch is scored at once, as the MEMIT baseline of AlphaEdit's code does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from retention.types import Delta, LowRank, Part, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rect(Part):
    name: Literal["rect"] = "rect"
    keep: float = Field(
        default=0.4, gt=0, le=1, description="fraction of a matrix's entries kept; the authors kept 0.2"
    )
    per_edit: bool = Field(default=False, description="score each edit's rank-one term by itself, in order")

    @torch.no_grad()
    def process(self, model: PreTrainedModel, delta: Delta, *, rank_one_per_edit: bool = False) -> Delta:
        """The update with all but the largest relative changes zeroed; dense. `model` holds the unedited weights."""
        if self.per_edit and not rank_one_per_edit:
            raise UserError(
                "rect with per_edit needs an update that is one rank-one term per edit (rome); "
                "for this editor leave per_edit out, which scores the total update"
            )
        weights = dict(model.named_parameters())
        kept: dict[str, Tensor | LowRank] = {}
        for name, update in delta.updates.items():
            weight = weights[name].detach().float()
            if self.per_edit:
                assert isinstance(update, LowRank)
                total = torch.zeros_like(weight)
                for left, right in zip(update.left.T, update.right, strict=True):
                    term = torch.outer(left, right).to(weight.device)
                    total += largest_relative(term, weight + total, self.keep)
            else:
                total = largest_relative(delta.dense(name).to(weight.device), weight, self.keep)
            kept[name] = total.cpu()
        return Delta(kept)


def largest_relative(update: Tensor, weight: Tensor, keep: float) -> Tensor:
    """`update` [rows, columns] with the fraction `keep` of largest |update / weight| kept, the rest zero."""
    score = (update / (weight + 1e-8)).abs()  # 1e-8 as in the published code
    n_keep = max(1, round(keep * score.numel()))
    threshold = score.flatten().kthvalue(score.numel() - n_keep + 1).values
    return torch.where(score >= threshold, update, torch.zeros_like(update))
