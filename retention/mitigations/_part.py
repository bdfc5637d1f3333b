"""What every mitigation tells the harness: where in a run it acts, and what it does there.

A mitigation overrides the methods of its place; the others leave things as they are. Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from retention.types import Delta, Edit, Fact, Guard, Part

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from retention.estimate import Shape
    from retention.models import Anatomy

Place = Literal["edit", "rows", "training", "after"]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a mitigation may look at when a fine-tune begins."""

    edits: Sequence[Edit]  # as they were written, phrasings of a mitigation included
    intrinsic: Sequence[Fact]  # the facts that are probed as intrinsic
    corpus: Sequence[str]  # texts like those of pretraining; empty where the model brings none
    seed: int
    tokenizer: PreTrainedTokenizerFast
    anatomy: Anatomy
    delta: Delta  # what the edit added
    rows_needed: int | None  # rows that training will take, where the budget tells; None: for a budget in other units
    names: frozenset[str]  # the model's own parameters, as they were called before an adapter was put around them
    heldout: Sequence[Row] = ()  # the task's held-out rows: nothing that they ask may be trained on
    # What a mitigation keeps from the first fine-tune of a list for the next ones: the edited model's weights, say.
    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


class Mitigation(Part):
    """A remedy against forgetting. One that acts on the edit is part of the edit's key; the others of the run's."""

    acts_on: ClassVar[Place]
    copies: ClassVar[float] = 0  # of the weights that it holds while they are trained. For estimates

    def held(self, shape: Shape, edited: int) -> int:
        """Numbers of a model of this shape that it keeps from moving; edited: layers with an edit. For estimates."""
        return 0

    @property
    def needs_corpus(self) -> bool:
        """Whether it reads `Scene.corpus`, and fails where that is empty."""
        return False

    @property
    def needs_edit(self) -> bool:
        """Whether it does nothing where the edit changed no weight."""
        return False

    @property
    def instead(self) -> str:
        """What else does something there, for a remark; begins with "; "."""
        return ""

    def check(self, settings: Any) -> None:
        """Raises UserError if this remedy cannot work in a run of these settings (`study.Settings`). Loads no model."""

    def files(self) -> list[Path]:
        """The files that it reads: their content is part of a run's key."""
        return []

    def edits(self, edits: Sequence[Edit], seed: int) -> list[Edit]:
        """The edits as they are to be written (acts on the edit)."""
        return list(edits)

    def editor(self, editor: Any) -> Any:
        """The editor with the settings that this remedy changes (acts on the edit). Raises UserError if it has none."""
        return editor

    def delta(self, delta: Delta) -> Delta:
        """What is added to the weights (acts on the edit)."""
        return delta

    def rows(self, rows: Sequence[Row], scene: Scene) -> tuple[Row, ...]:
        """The rows in the order in which they are to be trained on (acts on the rows)."""
        return tuple(rows)

    def frozen(self, model: PreTrainedModel, anatomy: Anatomy, delta: Delta) -> list[str]:
        """Names of the parameters that are to stay as they are (acts on the training)."""
        return []

    def guard(self, model: PreTrainedModel, scene: Scene) -> Guard | None:
        """What acts while `model` (an adapter around it included) is trained, or before it is read."""
        return None
