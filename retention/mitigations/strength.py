"""Scale the edit's update: a stronger edit may last longer, and does more damage besides (cf. arXiv 2506.12384)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from retention.mitigations._part import Mitigation, Place
from retention.types import Delta, LowRank, UserError


class Strength(Mitigation):
    """Adds `factor` times what the editor found, batch by batch in a sequence. What it costs: locality, above 1."""

    acts_on: ClassVar[Place] = "edit"

    name: Literal["strength"] = "strength"
    factor: float = Field(gt=0, description="of the update; 1 is the editor's own")

    @property
    def needs_edit(self) -> bool:
        return True

    def check(self, settings: Any) -> None:
        """Raises UserError for an editor that changes no weight."""
        if settings.editor.name == "ptuning":
            raise UserError("mitigations: strength: ptuning changes no weight that could be scaled; use another editor")

    def delta(self, delta: Delta) -> Delta:
        """The update times the factor; factors stay factors."""
        return Delta(
            {
                name: LowRank(self.factor * update.left, update.right)
                if isinstance(update, LowRank)
                else self.factor * update
                for name, update in delta.updates.items()
            }
        )
