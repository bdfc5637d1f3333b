"""How a run's edits are written: all at once, each alone, or in batches one after another. Settings only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from retention.types import Part


class Batch(Part):
    """All edits of a run in one call of the editor."""

    name: Literal["batch"] = "batch"


class Single(Part):
    """Each edit alone, on a fresh model, in a run of its own (arXiv 2507.14198 did so): `facts.edited` runs a cell."""

    name: Literal["single"] = "single"


class Sequential(Part):
    """Batches in order, each written into the model that holds the ones before.

    All questions are read right after each batch (table `sequence`), and once more when all are written (step 0).
    """

    name: Literal["sequential"] = "sequential"
    size: int = Field(1, ge=1, description="edits in a batch")


AnyRegime = Annotated[Batch | Single | Sequential, Field(discriminator="name")]
