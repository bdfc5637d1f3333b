"""A random update of the size of another editor's: the control that says what any change of that size would do.

Runs the editor named by `like` on the same edits and replaces each matrix's update by a Gaussian one of the same shape,
rank and Frobenius norm, or of the same singular values (`spectrum`). It writes no fact; what is lost all the same is
lost to the size of the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, TypeAdapter, field_validator
from torch import Tensor

from retention.editors._base import WeightEditor
from retention.editors._factors import singular_values
from retention.types import Delta, Edit, EditResult, LowRank

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Random(WeightEditor):
    name: Literal["random"] = "random"
    like: dict[str, Any] = Field(description="settings of the weight editor whose update is matched, name included")
    match: Literal["norm", "spectrum"] = "norm"  # per matrix: rank and Frobenius norm, or every singular value

    @field_validator("like")
    @classmethod
    def _valid(cls, value: dict[str, Any]) -> dict[str, Any]:
        reference(value)
        return value

    def settled(self, settle: Callable[[WeightEditor], WeightEditor]) -> Random:
        """With the settings of the editor that it is like filled in by `settle`."""
        return self.model_copy(update={"like": settle(reference(self.like)).model_dump(mode="json")})

    @property
    def label(self) -> str:
        return "+".join([f"random:{reference(self.like).label}", *(part.name for part in self.postprocess)])

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
        matched = reference(self.like).edit(model, tokenizer, edits, seed=seed, corpus=corpus, cache=cache)
        generator = torch.Generator().manual_seed(seed)
        updates: dict[str, Tensor | LowRank] = {
            name: rotated(update, generator) if self.match == "spectrum" else gaussian(update, generator)
            for name, update in matched.delta.updates.items()
        }
        return EditResult(
            delta=Delta(updates),
            diagnostics=tuple({"fact_id": edit.fact.id} for edit in edits),
            info={"matched": reference(self.like).label, "matched_norm": matched.delta.norm()},
        )


def reference(settings: dict[str, Any]) -> WeightEditor:
    """The weight editor with these settings. Raises ValueError for an unknown name or setting."""
    from retention.editors import AnyEditor

    editor: Any = TypeAdapter(AnyEditor).validate_python(settings)
    if not isinstance(editor, WeightEditor) or isinstance(editor, Random):
        raise ValueError(f"{settings.get('name')!r} makes no update of its own to match; name an editor such as memit")
    return editor


def gaussian(update: Tensor | LowRank, generator: torch.Generator) -> Tensor | LowRank:
    """Standard normal entries (of the factors, for a low-rank update), scaled to the same Frobenius norm."""
    if not isinstance(update, LowRank):
        noise = torch.randn(update.shape, generator=generator)
        return noise * (update.norm().cpu() / noise.norm())
    left = torch.randn(update.left.shape, generator=generator)
    right = torch.randn(update.right.shape, generator=generator)
    return LowRank(left * (singular_norm(update) / singular_norm(LowRank(left, right))), right)


def rotated(update: Tensor | LowRank, generator: torch.Generator) -> LowRank:
    """The same singular values between random orthonormal directions."""
    u, s, vh = singular_values(update)
    left = torch.linalg.qr(torch.randn(u.shape, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(vh.T.shape, generator=generator, dtype=torch.float64)).Q
    return LowRank((left * s.cpu()).float(), right.T.float().contiguous())


def singular_norm(update: LowRank) -> float:
    """Frobenius norm of the product, from the factors."""
    return float(singular_values(update)[1].norm())
