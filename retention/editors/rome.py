"""ROME: each fact as a rank-one update of one MLP's second matrix (Meng et al. 2022, arXiv:2202.05262).

`r-rome` (Gupta et al. 2024, arXiv:2403.07175) uses the mean key over all contexts everywhere, and is the default.
`original` takes the direction from the mean key but meets the constraint at the bare prompt's key, as published code
does. `p-rome` uses the bare prompt's key everywhere.

Of several edits published code searches each v* in the model that holds the edits before it. Here every v* comes from
the unedited weights, so that one batch searches them all; `regime: {name: sequential, size: 1}` is the published way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from retention.editors._contexts import sample_prefixes
from retention.editors._keys import metrics
from retention.editors._solve import Metric, rank_one_in_order
from retention.editors._spread import low_rank
from retention.editors._value_editor import Clamp, Decay, Rate, Steps, ValueEditor, diagnosed
from retention.editors._values import target_values
from retention.models import single_mlps
from retention.types import Delta, Edit, EditResult

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Rome(ValueEditor):
    """Every v* from the unedited weights, then rank-one updates in order, each exact against the current weights."""

    name: Literal["rome"] = "rome"
    rank_one_per_edit: ClassVar[bool] = True
    open: ClassVar[frozenset[str]] = frozenset({"layer", "v_steps", "v_weight_decay", "clamp_norm_factor"})

    variant: Literal["r-rome", "original", "p-rome"] = "r-rome"
    layer: int | None = Field(default=None, ge=0, description="from 0; None: the preset's")
    v_steps: Steps | None = Field(default=None, description="evaluations of v*'s loss; None: the preset's")
    v_lr: Rate = 0.5
    v_weight_decay: Decay | None = Field(
        default=None, description="of |delta| / |v0|^2 in v*'s loss; None: the preset's"
    )
    clamp_norm_factor: Clamp | None = Field(default=None, description="|delta| <= this times |v0|; None: the preset's")
    context_lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(5,) * 10 + (10,) * 10, description="tokens of each generated prefix; [] for none"
    )

    @property
    def label(self) -> str:
        bare = super().label
        return bare if self.variant == "r-rome" else bare.replace("rome", f"rome-{self.variant}", 1)

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
        """One LowRank with one term per edit, in order. Diagnostics per edit: see Values, and update_norm."""
        assert self.layer is not None, "filled in by a preset"
        layer = single_mlps(model).check(self.layer)
        metric = metrics(model, tokenizer, [layer], corpus, self.covariance, cache)[layer]
        prefixes = sample_prefixes(model, tokenizer, self.context_lengths, seed)
        return self.write_after(model, tokenizer, edits, layer=layer, metric=metric, prefixes=prefixes, cache=cache)

    def write_after(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        edits: Sequence[Edit],
        *,
        layer: int,
        metric: Metric,
        prefixes: Sequence[str],
        cache: Path | None = None,
    ) -> EditResult:
        """The same with given prefixes and covariance. The model is in eval mode and requires no gradient."""
        places = single_mlps(model)
        values = target_values(
            model, tokenizer, edits, layer=layer, site="mlp", settings=self.search(), prefixes=prefixes, cache=cache
        )
        mean, bare = (keys.to(model.device) for keys in (values.mean_key, values.bare_key))
        direction = bare if self.variant == "p-rome" else mean
        at = mean if self.variant == "r-rome" else bare
        down = places.down_module(model, layer)
        with torch.no_grad():
            weight = down.get_parameter("weight").double()
            given = at @ (weight if places.transposed else weight.T)
            bias = down.get_parameter("bias") if getattr(down, "bias", None) is not None else None
            residuals = values.value.to(given.device).double() - (given if bias is None else given + bias.double())
        update = rank_one_in_order(metric, direction, at, residuals)
        norms = (update.left.norm(dim=0) * update.right.norm(dim=1)).tolist()
        return EditResult(
            delta=Delta({f"{places.down.format(layer)}.weight": low_rank(places, update)}),
            diagnostics=diagnosed(values, norms),
            info={
                "layers": [layer],
                "variant": self.variant,
                "prefixes": list(prefixes),
                "fast": values.fast,
                "tokens_per_batch": values.tokens_per_batch,
                "covariance_tokens": metric.tokens,
            },
        )
