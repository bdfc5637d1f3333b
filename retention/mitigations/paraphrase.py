"""Write each edit with several phrasings (the remedy of arXiv 2507.14198)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from retention.mitigations._part import Mitigation, Place
from retention.types import Edit, UserError


class Paraphrase(Mitigation):
    """Adds n phrasings of the relation to each edit: more contexts for v* and its key, more rows for trained editors.

    They come from `Fact.phrasings`, which no probe ever asks (`Fact.paraphrases` is what probes ask).
    """

    acts_on: ClassVar[Place] = "edit"

    name: Literal["paraphrase"] = "paraphrase"
    n: int = Field(ge=1, description="phrasings added to the direct one")

    def edits(self, edits: Sequence[Edit], seed: int) -> list[Edit]:
        """The same edits with n more prompts each, chosen by seed. Raises UserError if a fact has fewer."""
        out = []
        for edit in edits:
            others = sorted(p for p in edit.fact.phrasings if p not in (edit.fact.prompt, *edit.prompts))
            if len(others) < self.n:
                raise UserError(
                    f"mitigations: paraphrase: n = {self.n} phrasings were asked for; fact {edit.fact.id} "
                    f"({edit.fact.subject}, {edit.fact.kind}) has {len(others)} that it is not written with yet"
                )
            chosen = random.Random(f"phrasings {seed} {edit.fact.id}").sample(others, self.n)
            out.append(replace(edit, prompts=(*edit.prompts, *chosen)))
        return out
