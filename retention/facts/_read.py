"""Reading of fact files and Hub datasets, with errors that name the file and the line or record.

Knows nothing about what the records mean: the keys they need are asked for by the sources, one file each.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retention.records import Item, Malformed, items_of_file, items_of_hub
from retention.texts import nfc, occurrences
from retention.types import Missing, UserError

DATA_ENV = "RETENTION_DATA"  # a folder; each source says what it looks for below it


@dataclass(frozen=True, kw_only=True)
class Record:
    """One JSON object of a fact file and where it stands. The getters raise UserError naming that place."""

    place: str  # "FILE, line 3" or "FILE, record 3" (both count from 1); keys inside are appended with a dot
    fields: Mapping[str, Any]

    def error(self, message: str) -> UserError:
        return UserError(f"{self.place}: {message}")

    def text(self, *keys: str, empty: bool = False) -> str:
        """The text under the first of `keys` that is there, stripped, in NFC. `empty` allows one without characters."""
        key = self._key(keys)
        value = self.fields[key]
        if value is None or (isinstance(value, str) and not value.strip() and not empty):
            raise self.error(f"{key!r} is empty; expected a text")
        if not isinstance(value, str):
            raise self.error(f"{key!r} must be a text, not {_kind(value)} ({_short(value)})")
        return nfc(value.strip())

    def optional_text(self, key: str) -> str | None:
        """The text under `key`, stripped; None where it is absent or null."""
        return None if self.fields.get(key) is None else self.text(key)

    def texts(self, key: str, required: bool = False) -> tuple[str, ...]:
        """The texts under `key` (a list, or one text), stripped, in NFC. Absent: none, or an error if `required`."""
        value = self.fields.get(key) if not required else self.fields[self._key((key,))]
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise self.error(f"{key!r} must be a list of texts, not {_kind(value)} ({_short(value)})")
        for n, item in enumerate(values, start=1):
            if not isinstance(item, str) or not item.strip():
                raise self.error(f"item {n} of {key!r} must be a text that is not empty, not {_short(item)}")
        return tuple(nfc(item.strip()) for item in values)

    def number(self, key: str) -> float | None:
        """The number under `key`, which CSV writes as a text; None where it is absent or null."""
        value = self.fields.get(key)
        try:
            if value is None or (isinstance(value, int | float | str) and not isinstance(value, bool)):
                return None if value is None else float(value)
        except ValueError:
            pass
        raise self.error(f"{key!r} must be a number, not {value!r}")

    def inside(self, key: str) -> Record:
        """The JSON object under `key` as a record of its own."""
        value = self.fields[self._key((key,))]
        if not isinstance(value, dict):
            raise self.error(f"{key!r} must be an object, not {_kind(value)} ({_short(value)})")
        return Record(place=f"{self.place}, {key}", fields=value)

    def records(self, key: str) -> list[Record]:
        """The JSON objects of the list under `key`; none where it is absent."""
        value = self.fields.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(f"{key!r} must be a list of objects, not {_short(value)}")
        return [Record(place=f"{self.place}, {key}[{n}]", fields=item) for n, item in enumerate(value)]

    def only(self, known: Sequence[str]) -> None:
        """Raise if there is a key that is not `known`, with the nearest one that is."""
        for key in self.fields:
            if key not in known:
                raise self.error(f"unknown key {key!r}{nearest(key, known)}; known are {', '.join(known)}")

    def _key(self, keys: Sequence[str]) -> str:
        for key in sorted(keys, key=lambda key: self.fields.get(key) is None):
            if key in self.fields:
                return key
        has = ", ".join(map(str, self.fields)) or "none"
        raise self.error(f"no key {' or '.join(map(repr, keys))}{nearest(keys[0], list(self.fields))}; it has {has}")


def nearest(word: str, known: Sequence[str]) -> str:
    """ " (did you mean ...?)" with the known word nearest to `word`, or nothing where none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def locate(path: str | None, default: str, what: str) -> Path:
    """The file or folder `path`; where it is None, `default` below $RETENTION_DATA.

    Raises UserError that says where it was looked for and what to put there; `what` describes the content.
    """
    if path is not None:
        found = Path(path).expanduser()
        if found.exists():
            return found
        siblings = sorted(p.name for p in found.parent.iterdir()) if found.parent.is_dir() else []
        raise Missing(f"no {what} at {found}{nearest(found.name, siblings)} (relative to {Path.cwd()})")
    root = os.environ.get(DATA_ENV)
    if not root:
        raise Missing(
            f"no {what}: give its place as `path` in the study, or set {DATA_ENV} to a folder that holds {default}"
        )
    found = Path(root).expanduser() / default
    if not found.exists():
        raise Missing(f"no {what} at {found}: put it there, or give its place as `path` in the study")
    return found


def read_records(path: Path) -> list[Record]:
    """All records of a file: JSON lines or one JSON array; by its ending CSV, TSV or parquet.

    Blank lines are passed over. Raises UserError for what is not JSON (with line and column), for a record that is not
    an object, and for a file without records.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; a file of JSON lines or one JSON array was expected")
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise Missing(f"{path}: no such file{nearest(path.name, siblings)}")
    return _placed(str(path), lambda: items_of_file(path))


def read_hub(name: str, config: str | None, split: str, revision: str, file: str | None) -> list[Record]:
    """All records of a Hub dataset at one commit. Raises UserError as `read_records` does."""
    return _placed(f"{name}: {file or split}", lambda: items_of_hub(name, config, split, revision, file))


def _placed(source: str, read: Callable[[], list[Item]]) -> list[Record]:
    try:
        items = read()
    except Malformed as error:
        column = "" if error.column is None else f", column {error.column}"
        where = f", {error.where}{column}" if error.where else ""
        raise UserError(f"{source}{where}: {error.reason}") from error.__cause__
    for item in items:
        if not isinstance(item.value, dict):
            raise UserError(
                f"{source}, {item.where}: an object was expected, not {_kind(item.value)} ({_short(item.value)})"
            )
    if not items:
        raise UserError(f"{source} holds no records")
    return [Record(place=f"{source}, {item.where}", fields=item.value) for item in items]


def phrasing_of(text: str, subject: str) -> str | None:
    """`text` with `{}` in place of the subject; None where the subject does not occur.

    Of several occurrences the last whole word counts (data sets put distracting sentences before the statement, and a
    short subject may be part of another word); without a whole one, the last occurrence.
    """
    start = (
        text.rfind(subject)
        if text.count(subject) == 1
        else max(occurrences(text, subject), default=text.rfind(subject))
    )
    return None if start < 0 else text[:start] + "{}" + text[start + len(subject) :]


@dataclass(kw_only=True)
class LeftOut:
    """What was left out of a file, by reason; with `strict` a text that lacks its subject is refused instead."""

    strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def phrasing(self, record: Record, text: str | None, subject: str, what: str, *, gap: bool = False) -> str | None:
        """The text with `{}` for the subject. None, and counted, where the subject or one place for it is missing.

        Data sets have a few such records: a question says "Karl E. Voss", or its subject was picked by a model.
        gap: the text may have `{}` in the subject's place already; with two of them it is refused.
        """
        if text is None:
            return None
        if gap and "{}" in text and not ("{}" in subject and subject in text):
            return one_gap(record, what, text)
        found = phrasing_of(text, subject)
        if found is not None and found.count("{}") == 1:
            return found
        wrong = "does not occur in" if found is None else "is not the only {} in"
        if self.strict:
            raise record.error(f"the subject {subject!r} {wrong} its {what} {text!r} (strict: true)")
        self.counts[f"{what}: its subject is not in it"] += 1
        return None


def one_gap(record: Record, key: str, phrasing: str, what: str = "subject") -> str:
    """`phrasing` if it has exactly one `{}` for `what`, else a UserError that names the record."""
    if phrasing.count("{}") != 1:
        raise record.error(f"{key} must have exactly one {{}} for the {what}, not {phrasing.count('{}')}: {phrasing!r}")
    return phrasing


def different(record: Record, old: str, new: str) -> None:
    """Raise if the new target is the old one: such an edit changes nothing and would count as kept for ever."""
    if old == new:
        raise record.error(f"the new target is the old one ({new!r}); an edit needs another object")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _short(value: Any, length: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= length else text[:length] + "..."
