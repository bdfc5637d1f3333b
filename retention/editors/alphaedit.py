"""AlphaEdit: MEMIT's least squares within the directions that other keys do not use (Fang et al., arXiv:2410.02355).

P projects onto the eigenvectors of C, the covariance of keys, whose eigenvalues are small; what C's sample says is
then left alone, and no weight lambda is needed. With Kp the keys of earlier batches, the published update X^T solves
(P (K K^T + Kp Kp^T) + ridge I) X = P K R^T, a non-symmetric system of m x m in float32. Here, with Q = [Kp K] and E
the columns of the identity that pick K out of Q, the equal X = P Q (Q^T P Q + ridge I)^-1 E R^T, a symmetric system of
as many rows as there are keys, in float64.

Earlier batches come as an explicit state (`EditResult.state` of the last one), never from a global. Their keys are
read, as published, from the model that holds their edits; the projection stays that of the unedited model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from retention.editors._contexts import sample_prefixes
from retention.editors._keys import KeyWalk, covariances, mean_keys
from retention.editors._rows import statement_rows
from retention.editors._saved import with_cache
from retention.editors._solve import Update
from retention.editors._spread import site_for, spread
from retention.editors._value_editor import Clamp, Decay, Rate, Steps, ValueEditor, diagnosed
from retention.editors._values import target_values
from retention.models import Anatomy, single_mlps
from retention.types import Delta, Edit, EditResult, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Projection:
    """Onto the null space, by whichever of the two complementary bases is smaller."""

    basis: Tensor  # [m, r] orthonormal columns, float64
    complement: bool  # the basis spans what is projected out
    size: int  # dimensions of the null space

    def __call__(self, keys: Tensor) -> Tensor:
        """P k for every key: [n, m] -> [n, m], float64."""
        keys = keys.double()
        inside = (keys @ self.basis) @ self.basis.T
        return keys - inside if self.complement else inside


@dataclass(frozen=True)
class Earlier:
    """What a batch hands to the next one: the projections and the keys of all edits so far, by layer."""

    projections: Mapping[int, Projection]
    keys: Mapping[int, Tensor]  # [edits so far, m], float64
    tokens: int  # of the sample that the covariance was read from


class AlphaEdit(ValueEditor):
    """MEMIT's v* and shares of the layers; each layer's update lies in the null space of its other keys."""

    name: Literal["alphaedit"] = "alphaedit"
    carries_state: ClassVar[bool] = True
    open: ClassVar[frozenset[str]] = frozenset({"layers", "ridge", "v_lr"})
    alternatives: ClassVar[frozenset[str]] = frozenset({"null_below", "null_fraction"})

    layers: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="from 0, the last is where v* is placed; None: the preset's"
    )
    null_below: float | None = Field(
        default=None, gt=0, description="eigenvalues of C below it make the null space; None: the published 0.02"
    )
    null_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="instead: the share of directions, those of the smallest eigenvalues"
    )
    ridge: float | None = Field(default=None, gt=0, description="L2 of the update; None: the preset's")
    v_steps: Steps = 25
    v_lr: Rate | None = Field(default=None, description="of Adam on v*; None: the preset's")
    v_weight_decay: Decay = 0.5
    clamp_norm_factor: Clamp = 0.75

    @model_validator(mode="after")
    def _one_rule(self) -> AlphaEdit:
        if self.null_below is not None and self.null_fraction is not None:
            raise ValueError("give null_below or null_fraction, not both: each decides the null space alone")
        if self.covariance.tokens == 0:
            raise ValueError("alphaedit has no null space without a covariance: give covariance.tokens above 0")
        return self

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        edits: Sequence[Edit],
        *,
        seed: int,
        corpus: Sequence[str],
        cache: Path | None,
        state: Any = None,
    ) -> EditResult:
        """One low-rank update per layer. Diagnostics per edit: see Values, and update_norm.

        state: that of the result of the last batch, whose edits `model` then holds. Raises UserError where the
        threshold makes no direction, or every one, part of the null space.
        """
        places, ridge = single_mlps(model), self.ridge
        assert ridge is not None, "filled in by a preset"
        layers = sorted({places.check(i) for i in self.layers or ()})
        site = site_for(places, layers)
        earlier: Earlier = state or self._start(model, tokenizer, places, layers, corpus, cache)
        settings = self.search()
        prefixes = sample_prefixes(model, tokenizer, self.context_lengths, seed)
        values = target_values(
            model, tokenizer, edits, layer=layers[-1], site=site, settings=settings, prefixes=prefixes, cache=cache
        )

        def update(layer: int, keys: Tensor, residuals: Tensor) -> Update:
            return projected(earlier.projections[layer], ridge, earlier.keys[layer], keys, residuals)

        delta, norms = spread(
            model, tokenizer, edits, places=places, layers=layers, site=site, value=values.value, prefixes=prefixes,
            update=update,
        )  # fmt: skip
        return EditResult(
            delta=delta,
            diagnostics=diagnosed(values, norms),
            info={
                "layers": layers, "ridge": ridge, "site": site, "prefixes": list(prefixes), "fast": values.fast,
                "tokens_per_batch": values.tokens_per_batch,
                "null_space": {str(layer): earlier.projections[layer].size for layer in layers},
                "keys_before": len(earlier.keys[layers[0]]), "covariance_tokens": earlier.tokens,
            },
            state=self._after(model, tokenizer, places, edits, prefixes, delta, earlier),
        )  # fmt: skip

    def _start(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        places: Anatomy,
        layers: Sequence[int],
        corpus: Sequence[str],
        cache: Path | None,
    ) -> Earlier:
        found = covariances(model, tokenizer, layers, corpus, self.covariance, cache)
        projections = {
            layer: null_space(found[layer].to(model.device), self.null_below, self.null_fraction, cache)
            for layer in layers
        }
        none = torch.zeros(0, places.mlp_width, dtype=torch.float64, device=model.device)
        return Earlier(projections, dict.fromkeys(layers, none), found.tokens)

    def _after(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        places: Anatomy,
        edits: Sequence[Edit],
        prefixes: Sequence[str],
        delta: Delta,
        earlier: Earlier,
    ) -> Earlier:
        """The state with these edits' keys, read from the model that holds them."""
        rows = statement_rows(tokenizer, edits, prefixes)
        keys: dict[int, Tensor] = {}
        with ExitStack() as applied:
            applied.enter_context(delta.applied(model))
            walk = KeyWalk(model, places, rows, min(earlier.keys))
            for layer in sorted(earlier.keys):
                walk.up_to(layer)
                new = mean_keys(walk.keys(), rows, len(edits))
                keys[layer] = torch.cat([earlier.keys[layer], new])
        return Earlier(earlier.projections, keys, earlier.tokens)


def null_space(
    covariance: Tensor, below: float | None, fraction: float | None, cache: Path | None = None
) -> Projection:
    """The directions of small eigenvalues of C [m, m]: below a threshold (0.02 if None), or a share of all."""
    digest = hashlib.sha256(covariance.cpu().numpy().tobytes()).hexdigest()

    def compute() -> dict[str, Tensor]:
        values, vectors = torch.linalg.eigh(covariance.double())  # ascending
        return {"values": values, "vectors": vectors.contiguous()}

    found = with_cache(cache, ["eigenvectors", digest], compute)
    values, vectors = found["values"], found["vectors"].to(covariance.device)
    m = len(values)
    threshold = 2e-2 if below is None else below
    size = int((values < threshold).sum()) if fraction is None else round(fraction * m)
    if not 0 < size < m:
        raise UserError(
            f"alphaedit: {'no' if size == 0 else 'every'} direction of the keys is in the null space "
            + (
                f"at null_below {threshold:g}: the covariance has eigenvalues from {float(values[0]):.2g} to "
                f"{float(values[-1]):.2g}, median {float(values.median()):.2g}; give another, or null_fraction: 0.7"
                if fraction is None
                else f"at null_fraction {fraction:g} of {m}; give another"
            )
        )
    complement = size > m - size
    return Projection((vectors[:, size:] if complement else vectors[:, :size]).contiguous(), complement, size)


def projected(projection: Projection, ridge: float, earlier: Tensor, keys: Tensor, residuals: Tensor) -> Update:
    """X^T = R E^T (Q^T P Q + ridge I)^-1 Q^T P; earlier [p, m], keys [n, m], residuals [n, d] as rows, float64."""
    everything = torch.cat([earlier, keys.double()])
    inside = projection(everything)
    gram = everything @ inside.T
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(ridge)
    pick = torch.eye(len(everything), dtype=torch.float64, device=keys.device)[:, len(earlier) :]
    weights = torch.cholesky_solve(pick, torch.linalg.cholesky(gram))  # [p + n, n]
    return Update(residuals.double().T, weights.T @ inside)
