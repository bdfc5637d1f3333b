"""Read what to pretrain on: facts from a file or a study's source, passages from plain text or JSON lines.

A file of facts is one that a source of studies reads, or plain records as facts/jsonl.py reads them. The keys of these:
subject, relation, object, and the phrasings: `prompt`, `prompts` or `templates` (texts with one {} for the subject, or
with the subject itself). Other keys are ignored. Knows no model.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from retention.facts._read import LeftOut, read_records
from retention.facts.files import read_pool, source_of
from retention.facts.jsonl import JsonLines, joint_of, written
from retention.records import COMPRESSED, Malformed, text_of_file
from retention.types import Fact, FactPool, UserError, content_id


def read_facts(
    path: Path, *, held_out: int, seed: int, exposures: int, dropped: Counter[str] | None = None
) -> tuple[Fact, ...]:
    """The facts of a file of plain records, `held_out` phrasings of each (of at least four) set aside as `paraphrases`.

    The first phrasing is the direct one and always trained; a record in which it lacks the subject is omitted, and
    counted in `dropped`. Of a file of another form, its facts as a study's source reads them. Raises UserError naming
    file and line.
    """
    if source_of(path) is not JsonLines:
        pool = read_pool(path)
        if dropped is not None:
            dropped.update(pool.dropped)
        return pool.facts
    left = LeftOut()
    facts: dict[str, Fact] = {}
    for record in read_records(path):
        subject, relation = record.text("subject"), record.optional_text("relation")
        target = record.text("object", "target_true")
        phrasings = written(record, subject, left)
        if not phrasings:
            continue
        direct, *others = phrasings
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
            joint=joint_of(record),
        )
    if dropped is not None:
        dropped.update(left.counts)
    return tuple(facts.values())


def gather_facts(
    given: Sequence[str], *, held_out: int, seed: int, exposures: int, dropped: Counter[str] | None = None
) -> tuple[Fact, ...]:
    """The facts of several files or sources; of two with one subject and relation the first stays.

    Each is a file, or what a study says at `facts`: a source's name, or a mapping such as `{name: trex}`. A source
    holds out phrasings by its own settings, `held_out` is for files. What is omitted is counted in `dropped`.
    Raises UserError.
    """
    found: dict[tuple[str, str], Fact] = {}
    for text in given:
        if is_file(text):
            some: Sequence[Fact] = read_facts(
                Path(text), held_out=held_out, seed=seed, exposures=exposures, dropped=dropped
            )
        else:
            some = pool_of_source(text).facts
        for fact in some:
            found.setdefault((fact.subject, fact.kind), fact)
    return tuple(found.values())


def is_file(text: str) -> bool:
    """Whether a text is meant for a file, not for a source of facts or a mapping."""
    return Path(text).exists() or bool(Path(text).suffix and not text.lstrip().startswith("{"))


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

    Either may be compressed (.gz, .xz, .zst). Blank lines are passed over. Raises UserError naming file and line.
    """
    if not path.is_file():
        raise UserError(f"--text {path}: no such file; expected plain text, one passage a line, or JSON lines")
    name = path.stem if path.suffix in COMPRESSED else path.name
    try:
        lines = text_of_file(path).split("\n")  # not splitlines(): a passage may hold U+2028
    except Malformed as error:
        raise UserError(f"--text {path}: {error.reason}") from None
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
