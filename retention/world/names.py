"""Pronounceable names that are no words, drawn by seed and never twice. Knows nothing of what is named."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

_ONSETS = re.findall(r"\w+", "b br c ch d dr f fl g gr h j k kr l m n p pl qu r s sh sk st t th tr v w z")
_VOWELS = re.findall(r"\w+", "a e i o u ai ea ie oa ou")
_CODAS = re.findall(r"\w+", "l m n r s t rd rn st nd lk ck")


class Names:
    """Draws names of two or three syllables; none repeats, and none is one of the words given."""

    def __init__(self, rng: random.Random, taken: Iterable[str]) -> None:
        self._rng = rng
        self._taken = {word.lower() for word in taken}

    def draw(self, syllables: int = 2) -> str:
        while True:
            parts = [self._rng.choice(_ONSETS) + self._rng.choice(_VOWELS) for _ in range(syllables)]
            name = "".join(parts) + self._rng.choice(_CODAS)
            if name not in self._taken:
                self._taken.add(name)
                return name.capitalize()

    def many(self, count: int, syllables: int = 2) -> list[str]:
        return [self.draw(syllables) for _ in range(count)]
