"""Read a file of facts to pretrain on: one JSON object a line.

Keys: subject, relation, object (texts), and `templates` (texts with one {} for the subject) or `prompts` (texts with
the subject filled in); the object follows them after a space. Other keys are ignored. Knows no model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retention.types import Fact, UserError, content_id

_SHAPE = '{"subject": "Paris", "relation": "P1376", "object": "France", "templates": ["{} is the capital of", ...]}'


def _text(record: Mapping[str, Any], key: str, place: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {key!r} must be a non-empty text, but is {value!r}. A line looks like {_SHAPE}")
    return value.strip()


def _templates(record: Mapping[str, Any], subject: str, place: str) -> list[str]:
    """The phrasings of one line, each with one {}, without repetition."""
    if ("templates" in record) == ("prompts" in record):
        raise UserError(f"{place}: give either 'templates' or 'prompts'. A line looks like {_SHAPE}")
    key = "templates" if "templates" in record else "prompts"
    values = record[key]
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise UserError(f"{place}: {key!r} must be a list of texts, but is {values!r}")
    found: dict[str, None] = {}
    for value in values:
        if key == "templates":
            if value.count("{}") != 1:
                raise UserError(f"{place}: a template needs exactly one {{}} for the subject; {value!r} has not")
            template = value
        else:
            if subject not in value:
                raise UserError(f"{place}: the subject {subject!r} does not occur in the prompt {value!r}")
            before, after = value.split(subject, 1)
            template = f"{before}{{}}{after}"
            if template.count("{}") != 1:
                raise UserError(f"{place}: the prompt {value!r} must not hold {{}}")
        found[template.rstrip()] = None
    return list(found)


def read_facts(path: Path, *, held_out: int, seed: int, exposures: int) -> tuple[Fact, ...]:
    """The facts of a file, each with `held_out` phrasings (of at least four) set aside as `paraphrases`.

    The first phrasing is the direct one and always trained. Raises UserError naming file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected one JSON object a line, such as {_SHAPE}")
    facts: dict[str, Fact] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not valid JSON ({error.msg}); a line looks like {_SHAPE}") from None
        if not isinstance(record, dict):
            raise UserError(f"{place}: expected a JSON object such as {_SHAPE}, but it is {line.strip()[:60]!r}")
        subject, relation = _text(record, "subject", place), _text(record, "relation", place)
        target = _text(record, "object", place)
        direct, *others = _templates(record, subject, place)
        key = content_id([subject, relation, target])
        if key in facts:
            raise UserError(
                f"{place}: ({subject!r}, {relation!r}, {target!r}) stands in the file already; join the lines"
            )
        rng = random.Random(f"held out {seed} {key}")
        rng.shuffle(others)
        aside = min(held_out, len(others) - 2) if len(others) >= 3 else 0
        facts[key] = Fact(
            id=key,
            subject=subject,
            relation=relation,
            prompt=direct,
            target=target,
            paraphrases=tuple(others[:aside]),
            phrasings=tuple(others[aside:]),
            exposures=exposures,
        )
    if not facts:
        raise UserError(f"{path}: holds no fact; a line looks like {_SHAPE}")
    return tuple(facts.values())
