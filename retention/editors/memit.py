"""MEMIT: many facts at once, spread over several MLPs by least squares (Meng et al. 2023, arXiv:2210.07229)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from retention.editors._contexts import sample_prefixes
from retention.editors._keys import metrics
from retention.editors._solve import Metric, Update, least_squares
from retention.editors._spread import site_for, spread
from retention.editors._value_editor import Clamp, Decay, Rate, Steps, ValueEditor, diagnosed
from retention.editors._values import target_values
from retention.models import single_mlps
from retention.types import Edit, EditResult

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Memit(ValueEditor):
    """v* at the last of the layers, reached by updates of all of them, each taking an equal share of what is left."""

    name: Literal["memit"] = "memit"
    open: ClassVar[frozenset[str]] = frozenset(
        {"layers", "covariance_weight", "v_steps", "v_weight_decay", "clamp_norm_factor"}
    )

    layers: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="from 0, the last is where v* is placed; None: the preset's"
    )
    covariance_weight: float | None = Field(
        default=None, gt=0, description="lambda, of the covariance against the edits' keys; None: the preset's"
    )
    v_steps: Steps | None = Field(default=None, description="evaluations of v*'s loss; None: the preset's")
    v_lr: Rate = 0.5
    v_weight_decay: Decay | None = Field(
        default=None, description="of |delta| / |v0|^2 in v*'s loss; None: the preset's"
    )
    clamp_norm_factor: Clamp | None = Field(default=None, description="|delta| <= this times |v0|; None: the preset's")

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
        """One low-rank update per layer. Diagnostics per edit: see Values, and update_norm (its share, all layers)."""
        places = single_mlps(model)
        layers = sorted({places.check(i) for i in self.layers or ()})
        site_for(places, layers)  # refuses before any work
        metric = metrics(model, tokenizer, layers, corpus, self.covariance, cache)
        prefixes = sample_prefixes(model, tokenizer, self.context_lengths, seed)
        return self.write_after(model, tokenizer, edits, metrics=metric, prefixes=prefixes, cache=cache)

    def write_after(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        edits: Sequence[Edit],
        *,
        metrics: Mapping[int, Metric],
        prefixes: Sequence[str],
        cache: Path | None = None,
    ) -> EditResult:
        """The same with given prefixes and covariance of each layer to edit.

        The model is in eval mode and requires no gradient.
        """
        places, layers, weight = single_mlps(model), sorted(metrics), self.covariance_weight
        assert weight is not None, "filled in by a preset"
        site, settings = site_for(places, layers), self.search()
        values = target_values(
            model, tokenizer, edits, layer=layers[-1], site=site, settings=settings, prefixes=prefixes, cache=cache
        )

        def update(layer: int, keys: Tensor, residuals: Tensor) -> Update:
            return least_squares(metrics[layer], weight, keys, residuals)

        delta, norms = spread(
            model, tokenizer, edits, places=places, layers=layers, site=site, value=values.value, prefixes=prefixes,
            update=update,
        )  # fmt: skip
        return EditResult(
            delta=delta,
            diagnostics=diagnosed(values, norms),
            info={
                "layers": layers, "covariance_weight": weight, "site": site, "prefixes": list(prefixes),
                "fast": values.fast, "tokens_per_batch": values.tokens_per_batch,
                "covariance_tokens": max(metric.tokens for metric in metrics.values()),
            },
        )  # fmt: skip
