"""Keep parts of the model from moving during fine-tuning (the other remedy of arXiv 2507.14198)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from retention.mitigations._part import Mitigation, Place
from retention.types import Delta, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from retention.estimate import Shape
    from retention.models import Anatomy

What = Literal["edited_layers", "edited_modules", "up_to", "from", "everything_but", "listed"]


class Freeze(Mitigation):
    """Sets requires_grad to False on the chosen parameters, an adapter's within the chosen blocks included.

    edited_layers: the blocks that hold an edited matrix; edited_modules: the edited modules alone; up_to: embeddings
    and blocks 0 to `layer`; from: blocks `layer` to the last, the final norm and the head (tied embeddings with it);
    everything_but: all but the blocks in `layers` (left out: but the edited ones); listed: the blocks in `layers`.
    """

    acts_on: ClassVar[Place] = "training"

    name: Literal["freeze"] = "freeze"
    what: What = "edited_layers"
    layer: int | None = Field(None, ge=0, description="for up_to and from: the last or the first block that is frozen")
    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="for listed and everything_but: blocks, from 0"
    )

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

    def held(self, shape: Shape, edited: int) -> int:
        """Numbers that stay as they are in a model of this shape with `edited` edited layers."""
        outer = shape.parameters - shape.layers * shape.block
        chosen = edited if self.layers is None else len(self.layers)
        return {
            "edited_layers": edited * shape.block,
            "edited_modules": edited * shape.width * shape.mlp,
            "up_to": outer // (1 if shape.tied else 2) + ((self.layer or 0) + 1) * shape.block,
            "from": outer // (1 if shape.tied else 2) + (shape.layers - (self.layer or 0)) * shape.block,
            "everything_but": shape.parameters - chosen * shape.block,
            "listed": chosen * shape.block,
        }[self.what]

    @property
    def needs_edit(self) -> bool:
        return self.layer is None and self.layers is None

    @property
    def instead(self) -> str:
        return "; `what: listed` with `layers` freezes the same blocks for every editor"

    def check(self, settings: Any) -> None:
        """Raises UserError for everything_but the edited blocks where there are none."""
        if self.what == "everything_but" and self.layers is None and settings.editor.name in ("identity", "ptuning"):
            raise UserError(
                f"mitigations: freeze everything_but: editor {settings.editor.name} edits no block; give `layers`"
            )

    def frozen(self, model: PreTrainedModel, anatomy: Anatomy, delta: Delta) -> list[str]:
        """Names of the parameters that are to stay as they are.

        Names of an adapted model hold the base names, so blocks and modules are found anywhere in a name.
        """
        pattern = re.compile(r"(?:^|\.)" + re.escape(anatomy.block).replace(r"\{\}", r"(\d+)") + r"\.")

        def index(name: str) -> int | None:
            match = pattern.search(name)
            return int(match.group(1)) if match else None

        def within(name: str, module: str | None) -> bool:
            return module is not None and re.search(rf"(^|\.){re.escape(module)}(\.|$)", name) is not None

        blocks = {name: index(name) for name, _ in model.named_parameters()}
        edited = {i for i in map(index, delta.updates) if i is not None}
        if self.what == "edited_modules":
            modules = {name.rpartition(".")[0] for name in delta.updates}
            return [n for n in blocks if any(within(n, m) for m in modules)]
        if self.what == "up_to":
            outputs = (anatomy.final_norm, anatomy.head)
            return [
                n
                for n, i in blocks.items()
                if (not any(within(n, m) for m in outputs) if i is None else i <= self._layer)
            ]
        if self.what == "from":
            head = {id(p) for p in model.get_output_embeddings().parameters()}
            tied = {n for n, p in model.named_parameters() if id(p) in head}
            return [
                n
                for n, i in blocks.items()
                if (n in tied or within(n, anatomy.final_norm) if i is None else i >= self._layer)
            ]
        if self.what == "everything_but":
            keep = edited if self.layers is None else set(self.layers)
            if not keep:
                raise UserError("mitigations: freeze everything_but: the editor edits no block; give `layers`")
            return [n for n, i in blocks.items() if i not in keep]
        chosen = edited if self.what == "edited_layers" else set(self.layers or ())
        return [n for n, i in blocks.items() if i in chosen]

    @property
    def _layer(self) -> int:
        assert self.layer is not None, "checked when the settings were read"
        return self.layer
