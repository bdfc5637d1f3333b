"""Mix general text into the task's rows (as pretraining text is mixed in against forgetting)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from retention.data.files import data_file, read_lines
from retention.mitigations._part import Row, Scene
from retention.mitigations._rows import RowMitigation
from retention.types import UserError


class Mix(RowMitigation):
    """Lines of the model's corpus, or of a file, among the task's rows.

    Where the task has plain text they are rows of plain text. Where it has prompts, the first half of a line's words is
    the prompt and the rest the completion, so that every objective of completions learns it (one on completions alone
    only the second half); a line of one word is left out. Objectives that need a rejected completion are refused: text
    has none. What it costs: the share `rate` of the training, and texts like those of pretraining must be at hand.
    """

    name: Literal["mix"] = "mix"
    path: str | None = Field(None, description="text file, a line a text; left out: the study's corpus or the model's")

    @property
    def needs_corpus(self) -> bool:
        """Whether it reads the corpus: without a file of its own."""
        return self.path is None

    def files(self) -> list[Path]:
        """The file of texts, if one is named. Raises UserError if it is missing."""
        try:
            return [] if self.path is None else [data_file(self.path, "mitigations: mix")]
        except UserError as error:
            raise UserError(str(error).replace("tune.data", "mitigations", 1)) from None

    def _texts(self, corpus: Sequence[str]) -> Sequence[str]:
        try:
            return [line for path in self.files() for line in read_lines(path)] if self.path else corpus
        except UserError as error:
            raise UserError(str(error).replace("corpus: ", "mitigations: mix: ", 1)) from None

    def check(self, settings: Any) -> None:
        """Raises UserError for a file that is missing or empty, and for objectives that need a rejected completion."""
        super().check(settings)
        self._texts(())
        for tune in settings.tunes:
            objective = tune.objective or settings.objective
            if "rejected" in objective.needs:
                raise UserError(
                    f"mitigations: mix: objective {objective.name} needs a rejected completion, which plain text has "
                    "not; use replay or rehearsal, or another objective"
                )

    def extra(self, count: int, like: Sequence[Row], scene: Scene) -> list[Row]:
        """`count` lines or as many as there are, drawn by seed."""
        plain = "text" in like[0]
        held = "\n".join(" ".join(str(v) for v in row.values()) for row in scene.heldout)
        texts = [
            line
            for line in self._texts(scene.corpus)
            if len(line.split()) > (0 if plain else 1) and line.strip() not in held
        ]
        if count and not texts:
            raise UserError(
                "mitigations: mix: there is no text to mix in, and the model brings no corpus.txt: give `path`, or "
                "`corpus: texts.txt` to the study"
            )
        drawn = random.Random(f"mix texts {scene.seed}").sample(texts, min(count, len(texts)))
        return [{"text": line} if plain else _halves(line) for line in drawn]


def _halves(line: str) -> Row:
    """The line cut before the word in its middle."""
    words = [word.start() for word in re.finditer(r"\S+", line)]
    cut = words[len(words) // 2]
    return {"prompt": line[:cut].rstrip(), "completion": line[cut:]}
