"""What every mitigation tells the harness: where in a run it acts."""

from __future__ import annotations

from typing import ClassVar, Literal

from retention.types import Part


class Mitigation(Part):
    """A remedy against forgetting. One that acts on the edit is part of the edit's key; the others of the run's."""

    acts_on: ClassVar[Literal["edit", "rows", "training", "after"]]
