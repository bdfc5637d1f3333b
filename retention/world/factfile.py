"""Read what to pretrain on: facts from a file or a study's source, passages from plain text or JSON lines.

A file of facts is JSON lines (or one JSON array), as facts/jsonl.py reads them. Keys: subject, relation, object, and
the phrasings: `prompt`, `prompts` or `templates` (texts with one {} for the subject, or with the subject itself); the
object follows them after a space. Other keys are ignored. Knows no model.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path

from retention.facts._read import read_records
from retention.facts.jsonl import written
from retention.types import Fact, FactPool, UserError, content_id


def read_facts(path: Path, *, held_out: int, seed: int, exposures: int) -> tuple[Fact, ...]:
    """The facts of a file, each with `held_out` phrasings (of at least four) set aside as `paraphrases`.

    The first phrasing is the direct one and always trained. Raises UserError naming file and line.
    """
    facts: dict[str, Fact] = {}
    for record in read_records(path):
        subject, relation = record.text("subject"), record.text("relation")
        target = record.text("object", "target_true")
        direct, *others = written(record, subject)
        key = content_id([subject, relation, target])
        if key in facts:
            raise record.error(f"({subject!r}, {relation!r}, {target!r}) stands in the file already; join the lines")
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
    return tuple(facts.values())


def gather_facts(given: Sequence[str], *, held_out: int, seed: int, exposures: int) -> tuple[Fact, ...]:
    """The facts of several files or sources; of two with one subject and relation the first stays.

    Each is a file, or what a study says at `facts`: a source's name, or a mapping such as `{name: trex}`. A source
    holds out phrasings by its own settings, `held_out` is for files. Raises UserError.
    """
    found: dict[tuple[str, str], Fact] = {}
    for text in given:
        path = Path(text)
        if path.exists() or (path.suffix and not text.lstrip().startswith("{")):
            some: Sequence[Fact] = read_facts(path, held_out=held_out, seed=seed, exposures=exposures)
        else:
            some = pool_of_source(text).facts
        for fact in some:
            found.setdefault((fact.subject, fact.relation), fact)
    return tuple(found.values())


def pool_of_source(text: str) -> FactPool:
    """What a study's source offers, from its name or a mapping. Raises UserError for a text that names none."""
    import yaml
    from pydantic import ValidationError, create_model

    from retention.explain import explain
    from retention.facts import AnyFacts
    from retention.facts.world import WorldFacts

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise UserError(f"--facts: expected a file, a source's name or a mapping like '{{name: trex}}', got {text!r}")
    study = create_model("study", facts=(AnyFacts, ...))
    try:
        facts = study.model_validate({"facts": value}).facts  # type: ignore[attr-defined]
    except ValidationError as error:
        problems = [f"--facts: {line}" for line in explain(error, study, {"facts": value}, {})]
        raise UserError("\n".join(problems)) from None
    if isinstance(facts, WorldFacts):
        raise UserError("--facts world: the embedded world is pretrained by `model: world` in a study, with its facts")
    return facts.pool(0)


def read_passages(path: Path) -> tuple[str, ...]:
    """Passages to learn from besides: the lines of a plain text, or of the key `text` of JSON lines (.jsonl).

    Either may be compressed (.xz). Blank lines are passed over. Raises UserError naming file and line.
    """
    if not path.is_file():
        raise UserError(f"--text {path}: no such file; expected plain text, one passage a line, or JSON lines")
    name = path.name.removesuffix(".xz")
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except lzma.LZMAError as error:
        raise UserError(f"--text {path}: not a whole .xz file ({error})") from None
    try:
        lines = raw.decode("utf-8-sig").split("\n")  # not splitlines(): a passage may hold U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: not UTF-8 text ({error.reason})") from None
    if not name.endswith(".jsonl"):
        return tuple(line.strip() for line in lines if line.strip())
    found = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                found += [passage.strip() for passage in text.split("\n") if passage.strip()]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"--text {path}, line {n}: expected an object with a text under `text`") from None
    return tuple(found)
