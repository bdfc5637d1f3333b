"""Keep parts of the model from moving during fine-tuning (the other remedy of arXiv 2507.14198)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from retention.mitigations._part import Mitigation
from retention.types import Delta, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

What = Literal["edited_layers", "edited_modules", "up_to", "from", "everything_but", "listed"]


class Freeze(Mitigation):
    """Sets requires_grad to False on the chosen parameters, an adapter's within the chosen blocks included.

    edited_layers: the blocks that hold an edited matrix; edited_modules: the edited modules alone; up_to: the embeddings
    and blocks 0 to `layer`; from: blocks `layer` to the last, the final norm and the head (tied embeddings with it);
    everything_but: all but the blocks in `layers` (left out: but the edited ones); listed: the blocks in `layers`.
    """

    acts_on: ClassVar[Literal["edit", "rows", "training", "after"]] = "training"

    name: Literal["freeze"] = "freeze"
    what: What = "edited_layers"
    layer: int | None = Field(None, ge=0, description="for up_to and from: the last or the first block that is frozen")
    layers: tuple[int, ...] | None = Field(None, description="for listed and everything_but: blocks, from 0")

    @model_validator(mode="after")
    def _given(self) -> Freeze:
        needs = {"up_to": "layer", "from": "layer", "listed": "layers"}.get(self.what)
        if needs and getattr(self, needs) is None:
            raise ValueError(f"freeze {self.what} needs `{needs}`")
        if self.layer is not None and self.what not in ("up_to", "from"):
            raise ValueError(f"`layer` is for up_to and from; freeze {self.what} does not use it")
        if self.layers is not None and self.what not in ("listed", "everything_but"):
            raise ValueError(f"`layers` is for listed and everything_but; freeze {self.what} does not use it")
        return self

    def frozen(self, model: PreTrainedModel, block: str, delta: Delta) -> list[str]:
        """Names of the parameters that are to stay as they are.

        `block` is the dotted path of the model's blocks with {} for the index. Names of an adapted model hold the base
        names, so blocks are found anywhere in a name.
        """
        pattern = re.compile(re.escape(block).replace(r"\{\}", r"(\d+)") + r"\.")

        def index(name: str) -> int | None:
            match = pattern.search(name)
            return int(match.group(1)) if match else None

        names = [name for name, _ in model.named_parameters()]
        edited = {i for i in map(index, delta.updates) if i is not None}
        last = max(i for i in map(index, names) if i is not None)
        if self.what == "edited_modules":
            modules = {name.rpartition(".")[0] for name in delta.updates}
            return [n for n in names if any(re.search(rf"(^|\.){re.escape(m)}\.", n) for m in modules)]
        if self.what == "edited_layers":
            return [n for n in names if index(n) in edited]
        if self.what == "listed":
            assert self.layers is not None
            return [n for n in names if index(n) in set(self.layers)]
        if self.what == "everything_but":
            keep = edited if self.layers is None else set(self.layers)
            if not keep:
                raise UserError("mitigations: freeze everything_but: the editor edits no block; give `layers`")
            return [n for n in names if index(n) not in keep]
        assert self.layer is not None
        if self.what == "up_to":
            inputs = self._tensors_of(model, model.get_input_embeddings())
            return [n for n in names if (i := index(n)) is not None and i <= self.layer or self._before(n, names, index, inputs)]
        heads = self._tensors_of(model, model.get_output_embeddings())
        after = self._after(names, index, last)
        return [n for n in names if (i := index(n)) is not None and i >= self.layer or n in heads or n in after]

    @staticmethod
    def _tensors_of(model: PreTrainedModel, module: object) -> set[str]:
        held = {id(p) for p in module.parameters()} if hasattr(module, "parameters") else set()
        return {name for name, p in model.named_parameters() if id(p) in held}

    @staticmethod
    def _before(name: str, names: list[str], index, inputs: set[str]) -> bool:  # type: ignore[no-untyped-def]
        """Whether a parameter outside the blocks is registered before them (token and position embeddings)."""
        first = next(i for i, n in enumerate(names) if index(n) is not None)
        return index(name) is None and (name in inputs or names.index(name) < first)

    @staticmethod
    def _after(names: list[str], index, last: int) -> set[str]:  # type: ignore[no-untyped-def]
        """Parameters outside the blocks that are registered after them (the final norm)."""
        end = max(i for i, n in enumerate(names) if index(n) == last)
        return {n for n in names[end + 1 :] if index(n) is None}


def freeze(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Make the named parameters untrainable. Raises UserError when nothing is left to train."""
    chosen = set(names)
    for name, parameter in model.named_parameters():
        if name in chosen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("mitigations: freeze leaves nothing to train; freeze less")
