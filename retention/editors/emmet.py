"""EMMET: ROME for many facts at once, every key held to its value (Gupta et al. 2024, arXiv:2403.14236).

The smallest change of what W does to all other keys under the constraints (W + Delta) k_i = v_i:
Delta = R (K^T C^-1 K + relax I)^-1 K^T C^-1. As in the published code R is MEMIT's: what the bare prompt lacks of v*,
while K are mean keys over the contexts. Without contexts, one edit without relaxation is r-ROME's update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from retention.editors._contexts import sample_prefixes
from retention.editors._keys import metrics
from retention.editors._solve import Metric, Update
from retention.editors._spread import site_for, spread
from retention.editors._value_editor import Clamp, Decay, Rate, Steps, ValueEditor, diagnosed
from retention.editors._values import target_values
from retention.models import single_mlps
from retention.types import Edit, EditResult, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Emmet(ValueEditor):
    """v* at one layer's output, reached by one update of its MLP's second matrix."""

    name: Literal["emmet"] = "emmet"
    open: ClassVar[frozenset[str]] = frozenset({"layer", "covariance_weight"})

    layer: int | None = Field(default=None, ge=0, description="from 0; None: the preset's")
    covariance_weight: float | None = Field(
        default=None, gt=0, description="factor of C, which only matters against relax; None: the preset's"
    )
    relax: float = Field(
        default=0.1,
        ge=0,
        description="added to the diagonal of the keys' Gram matrix where there is more than one edit",
    )
    v_steps: Steps = 20
    v_lr: Rate = 0.5
    v_weight_decay: Decay = 0.5
    clamp_norm_factor: Clamp = 0.75

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
        """One low-rank update. Diagnostics per edit: see Values, and update_norm."""
        places = single_mlps(model)
        weight = self.covariance_weight
        assert self.layer is not None, "filled in by a preset"
        assert weight is not None, "filled in by a preset"
        layer = places.check(self.layer)
        site = site_for(places, [layer])
        metric = metrics(model, tokenizer, [layer], corpus, self.covariance, cache)[layer]
        prefixes = sample_prefixes(model, tokenizer, self.context_lengths, seed)
        values = target_values(
            model, tokenizer, edits, layer=layer, site=site, settings=self.search(), prefixes=prefixes, cache=cache
        )
        relax = self.relax if len(edits) > 1 else 0.0

        def update(_layer: int, keys: Tensor, residuals: Tensor) -> Update:
            return constrained(metric, weight, relax, keys, residuals)

        delta, norms = spread(
            model, tokenizer, edits, places=places, layers=[layer], site=site, value=values.value, prefixes=prefixes,
            update=update,
        )  # fmt: skip
        return EditResult(
            delta=delta,
            diagnostics=diagnosed(values, norms),
            info={
                "layers": [layer], "covariance_weight": weight, "relax": relax, "site": site,
                "prefixes": list(prefixes), "fast": values.fast, "tokens_per_batch": values.tokens_per_batch,
                "covariance_tokens": metric.tokens,
            },
        )  # fmt: skip


def constrained(metric: Metric, weight: float, relax: float, keys: Tensor, residuals: Tensor) -> Update:
    """R (K^T A K + relax I)^-1 K^T A with A = (weight C)^-1; keys [n, m] and residuals [n, d] as rows, float64.

    Raises UserError where equal keys leave the system without a solution.
    """
    keys = keys.double()
    solved = metric.solve(keys) / weight
    gram = keys @ solved.T
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(relax)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        raise UserError("emmet: two edits share their key, and no matrix gives two values for one; give relax above 0")
    return Update(residuals.double().T, torch.cholesky_solve(solved, factor))
