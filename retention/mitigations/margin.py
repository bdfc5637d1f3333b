"""Optimise v* until the new object has a given probability, more or less than the editor's paper asks for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from retention.mitigations._part import Mitigation, Place
from retention.types import UserError


class Margin(Mitigation):
    """Ends the search for an edit's v* once its loss is below -log(probability) nats, in place of 0.05 (p = 0.951).

    The loss is ROME's whole one: the mean NLL of the target over the edit's prompts with the penalties added, so at
    the end the target has at least that probability on (geometric) average, unless the editor's `v_steps` ran out
    first (each edit's `final_loss` and `target_probability` are recorded). What it costs: steps of the search, and a
    larger update.
    """

    acts_on: ClassVar[Place] = "edit"

    name: Literal["margin"] = "margin"
    probability: float = Field(gt=0, lt=1, description="of the new object, given the edit's prompts")

    def check(self, settings: Any) -> None:
        """Raises UserError for an editor that optimises no v*."""
        self._searching(settings.editor)

    def editor(self, editor: Any) -> Any:
        """The editor with this stopping rule: no setting of an editor, whose papers fix it."""
        searching, stop = self._searching(editor), -math.log(self.probability)

        class Reaching(searching):  # type: ignore[misc, valid-type]
            def search(self) -> Any:
                return replace(super().search(), stop=stop)

        return Reaching.model_construct(**dict(editor))

    @staticmethod
    def _searching(editor: Any) -> type:
        if not hasattr(editor, "search"):
            raise UserError(
                f"mitigations: margin: {editor.name} optimises no v* to a target probability; it acts on rome, memit, "
                "emmet and alphaedit. For other editors use strength, or their own settings"
            )
        return type(editor)
