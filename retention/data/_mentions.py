"""Which of many phrases a text mentions as whole words, as written. Knows nothing of facts or rows.

What a word is says `texts.mentions`; what is canonically equivalent in Unicode is equal.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from retention.texts import mentions, nfc, words


class Phrases:
    """An index of phrases, each under the one of its words that the fewest phrases share.

    A text costs one pass over its words, and for each word that an indexed phrase has a search for that phrase.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        given = {phrase: nfc(phrase) for phrase in sorted(set(phrases))}
        parts = {phrase: words(form) for phrase, form in given.items()}
        shared = Counter(word for found in parts.values() for word in found)
        self._by_word: dict[str, list[tuple[str, str]]] = defaultdict(list)  # word -> (phrase, its normal form)
        self._wordless: list[tuple[str, str]] = []  # "!!!" has no word to be found by
        for phrase, form in given.items():
            if parts[phrase]:
                self._by_word[min(parts[phrase], key=lambda word: (shared[word], word))].append((phrase, form))
            elif form.strip():
                self._wordless.append((phrase, form))
        self._words = self._by_word.keys()

    def found(self, text: str) -> set[str]:
        """The phrases that the text mentions, nested and overlapping ones included."""
        text = nfc(text)
        candidates = list(self._wordless)
        for word in self._words & words(text):
            candidates += self._by_word[word]
        return {phrase for phrase, form in candidates if mentions(text, form)}
