"""The editor that changes nothing: the unedited model takes part in every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from retention.types import Delta, Edit, EditResult, Part

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Identity(Part):
    """Writes nothing."""

    name: Literal["identity"] = "identity"

    @property
    def label(self) -> str:
        return self.name

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        edits: Sequence[Edit],
        *,
        seed: int,
        corpus: Sequence[str] = (),
        cache: Path | None = None,
    ) -> EditResult:
        """An empty update, whatever the edits."""
        return EditResult(delta=Delta(), diagnostics=tuple({"fact_id": edit.fact.id} for edit in edits))
