"""How texts of any script are joined, ended and compared. Knows no tokenizer, no fact and no file.

What a script does comes from Unicode's properties (Script_Extensions, Sentence_Terminal, General_Category).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import regex

Joint = Literal["space", "none"]  # what parts a prompt from its answer

ARTICLES = frozenset({"a", "an", "the"})
FULL_STOP = "."  # as the end of a text it means the full stop of any script

# Scripts that put no space between words. (Korean and Vietnamese do.)
_SCRIPTS = (
    *("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Tai_Le"),
    *("New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Ahom", "Javanese", "Balinese"),
)
_CLASS = "[[{}]&&[\\p{{L}}\\p{{M}}]]".format("".join(f"\\p{{Script_Extensions={script}}}" for script in _SCRIPTS))
_UNSPACED = regex.compile(_CLASS, regex.V1)
_PIECE = regex.compile(f"{_CLASS}|[^{_CLASS}]+", regex.V1)
_RUN = re.compile(r"\w+")
_LETTER = regex.compile(r"\p{L}")
_LAST_LETTER = regex.compile(r"(?r)\p{L}")  # searched from the end
_TERMINAL = regex.compile("[\\p{Sentence_Terminal}\u0f0d\u0f0e]")  # Unicode gives the Tibetan shad no such property
_OPENING = ("Ps", "Pi")  # categories: opening brackets, initial quotation marks
_INVERTED = "¿¡"  # of the category of any punctuation
# What closes a statement, by the script of its last letter; Thai and Lao part sentences by a space.
_ENDS = (
    (regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}]"), "。"),
    (regex.compile(r"[\p{Devanagari}\p{Bengali}\p{Gurmukhi}\p{Oriya}]"), "।"),
    (regex.compile(r"[\p{Thai}\p{Lao}]"), ""),
    (regex.compile(r"\p{Khmer}"), "។"),
    (regex.compile(r"\p{Myanmar}"), "။"),
    (regex.compile(r"\p{Tibetan}"), "།"),
    (regex.compile(r"\p{Ethiopic}"), "።"),
    (regex.compile(r"\p{Armenian}"), "։"),
)


def nfc(text: str) -> str:
    """Compose the text canonically (NFC), so that equal words are equal strings."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def join(prompt: str, answer: str, joint: Joint | None = None) -> str:
    """Put the answer behind the prompt, parted by one space where the text wants one.

    It wants none after or before white space, after an opening mark, and between letters of scripts that put no space
    between words; a side without letters is of the other's script. `joint` overrides the last two.
    """
    if prompt[-1:].isspace() or answer[:1].isspace():
        return prompt + answer
    spaced = _spaced(prompt, answer) if joint is None else joint == "space"
    return f"{prompt} {answer}" if spaced else prompt + answer


def _spaced(prompt: str, answer: str) -> bool:
    last = prompt[-1:]
    if last and (last in _INVERTED or unicodedata.category(last) in _OPENING):
        return False
    if prompt.isascii() and answer.isascii():
        return True
    letters = [found[0] for found in (_LAST_LETTER.search(prompt), _LETTER.search(answer)) if found]
    return not letters or not all(map(unspaced, letters))


def unspaced(character: str) -> bool:
    """Tell whether a letter or mark is of a script that puts no space between words."""
    return not character.isascii() and _UNSPACED.match(character) is not None


def full_stops(text: str) -> Iterator[tuple[int, str]]:
    """Yield place and character of each full stop, of any script, in the text."""
    yield from ((m.start(), m[0]) for m in _TERMINAL.finditer(text) if _states(m[0]))


@lru_cache(maxsize=1 << 10)
def _states(mark: str) -> bool:
    """Whether a mark that ends a sentence neither asks nor exclaims."""
    plain = unicodedata.normalize("NFKC", mark)
    words = unicodedata.name(mark, "").split()
    return not {"!", "?"} & set(plain) and not {"QUESTION", "EXCLAMATION", "INTERROBANG"} & set(words)


def closed(statement: str, end: str = FULL_STOP) -> str:
    """Close the statement by `end`; where that is ".", by the full stop of the statement's script."""
    last = None if end != FULL_STOP or statement.isascii() else _LAST_LETTER.search(statement)
    return statement + (end if last is None else next((e for script, e in _ENDS if script.match(last[0])), end))


def follow(sentence: str, text: str) -> str:
    """Put a text behind a whole sentence: after a space, but for an ideographic full stop."""
    return sentence + text if sentence.endswith("。") else f"{sentence} {text}"


def words(text: str) -> set[str]:
    """Split at word borders as `mentions` has them, combining marks aside; letters without spaces stand one by one."""
    found = set(_RUN.findall(text))
    return found if text.isascii() else {piece for run in found for piece in _PIECE.findall(run)}


def mentions(text: str, phrase: str) -> bool:
    """Tell whether the text has the phrase as whole words; see `occurrences`."""
    return bool(occurrences(text, phrase))


def occurrences(text: str, phrase: str) -> list[int]:
    """Find where the text has the phrase as whole words: the places of its first characters.

    A word border is where a letter, digit, underscore or combining mark meets anything else, and about each letter of a
    script without spaces: there a phrase is found inside a longer word too (京都 in 東京都). Both in NFC.
    """
    found, at = [], text.find(phrase)
    while at >= 0:
        if _border(text, at) and _border(text, at + len(phrase)):
            found.append(at)
        at = text.find(phrase, at + 1)
    return found


def _border(text: str, at: int) -> bool:
    if not 0 < at < len(text):
        return True
    return not _combines(text[at]) and not (_in_word(text[at - 1]) and _in_word(text[at]))


def _combines(character: str) -> bool:
    return not character.isascii() and unicodedata.category(character)[0] == "M"


def _in_word(character: str) -> bool:
    return (character.isalnum() or character == "_" or _combines(character)) and not unspaced(character)


@lru_cache(maxsize=1 << 14)
def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces, NFC. A text of nothing else keeps what makes it one."""
    lower = nfc(nfc(text).lower())
    words = "".join(c for c in lower if not unicodedata.category(c).startswith("P")).split()
    kept = [word for word in words if word not in ARTICLES] or words or lower.split()
    return nfc(" ".join(kept))
