"""What every fine-tuning objective tells the harness: which trl trainer it is, and the rows that it trains on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from retention.texts import join
from retention.types import Part, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Row = Mapping[str, Any]


class Objective(Part):
    """Names a trl trainer and its data format; holds no training code."""

    name: str

    trainer: ClassVar[str]  # class, as trl's users import it: trl.SFTTrainer
    config: ClassVar[str]  # its configuration class
    needs: ClassVar[tuple[str, ...]]  # keys without which a row cannot be trained on
    trains_rejected: ClassVar[bool] = False  # whether it also trains on a row's rejected completion, where it has one
    defaults: ClassVar[Mapping[str, Any]] = {}  # of this trainer's config alone: every argument that can move a number
    # Who draws the order of rows by the seed: the trainer's sampler; the harness, beforehand, for a trainer that must
    # read them in their order; or the trainer's own field shuffle_dataset.
    shuffled_by: ClassVar[Literal["sampler", "harness", "field"]] = "sampler"

    learns_tokens: ClassVar[bool] = False  # its trainer takes ids and labels, which `training_rows` makes of the rows
    whole: ClassVar[bool] = False  # a row's prompt is trained on as well as its completion
    sequences: ClassVar[int] = 1  # that the model reads for each row of a batch
    fused: ClassVar[bool] = True  # trl computes the loss without holding all logits. For estimates

    def models(self, arguments: Mapping[str, Any]) -> int:
        """Models held in memory while one is fully trained. For estimates."""
        return 1

    def arguments(self) -> dict[str, Any]:
        """Arguments of the trainer's config that this objective fixes; a user sets them here, not in tune.trainer."""
        return {}

    def rows_in_step(self, arguments: Mapping[str, Any]) -> float | None:
        """Rows of the data that one optimizer step takes; None where that depends on the rows."""
        return float(arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"])

    def splits(self) -> bool:
        """Whether a batch cut into parts gives the same gradient, but for rounding: no row's loss knows of another."""
        return False

    def problems(self, arguments: Mapping[str, Any]) -> list[str]:
        """What is wrong with all arguments of the config taken together, that its fields' types do not say."""
        return []

    def columns(self, row: Row) -> list[dict[str, Any]]:
        """One of our rows as rows of the trainer. A completion begins with what parts it from its prompt."""
        raise TypeError(f"{type(self).__name__} must say what its trainer reads")

    def extras(self, model: PreTrainedModel, config: Any, base: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        """Further arguments of the trainer, for the model to be trained and the trainer's config.

        `base` loads the unedited model."""
        return {}

    def check(self, row: Row) -> None:
        """Raises UserError if the row lacks what the objective trains on."""
        missing = next((key for key in self.needs if key not in row), None)
        if missing is not None:
            hint = {
                "prompt": "the data has plain text. Use objective clm, or data with prompts",
                "rejected": "the data has no dispreferred completions. Name their key, or use another objective",
            }.get(missing, f"the data has {', '.join(row)}")
            raise UserError(f"tune.data: objective {self.name} trains on rows with {' and '.join(self.needs)}; {hint}")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises UserError if the objective cannot read its rows with this tokenizer. By default any will do."""


def completion(row: Row, key: str = "completion") -> str:
    """The completion as it follows its prompt, with the space that parts them, if one does."""
    return join(row["prompt"], row[key], row.get("joint"))[len(row["prompt"]) :]


def reference(model: PreTrainedModel, *, once: bool) -> dict[str, Any]:
    """The model before its first step as the trainer's `ref_model`; nothing where it is read `once`, at the start.

    Left alone, trl would load the reference from the folder that the model came from: without the edits. Under an
    adapter it would add a second one; but to begin another adapter may move the weights below it (pissa takes its
    components out of them), and the model that is trained with them. So an adapted model gets a copy of its own, which
    shares all weights that are frozen.
    """
    adapted: Any = model if hasattr(model, "peft_config") else None
    if once and adapted is None:
        return {}
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    copied: Any = copy.deepcopy(model, shared)
    bare = copied if adapted is None else copied.get_base_model()  # trl gives the reference no adapter's wrapping
    return {"ref_model": bare.requires_grad_(False).eval()}
