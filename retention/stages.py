"""The three stages of a run: prepare, edit, tune. Read it as a method section.

Each stage is idempotent and keyed by the content of its settings: its artefact in the results folder is the only truth
about whether it is done. Probing never moves the experiment: the same suite reads every group of facts at step -1 (the
base model), 0 (the edited model) and at each step of `at`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from retention import tune as tuning
from retention.data import files_of, rows_of
from retention.data.files import read_lines
from retention.deltas import load_delta, save_delta
from retention.facts import pool_of
from retention.facts.draw import Draw, draw
from retention.mitigations.freeze import Freeze, freeze
from retention.mitigations.paraphrase import Paraphrase
from retention.models import HubModel, Loaded, anatomy, content_hash, load_model, resolve
from retention.probes import read_all
from retention.probes.ability import heldout
from retention.probes.rivals import rivals
from retention.regimes import Sequential
from retention.soft_prompt import prompted
from retention.store import SCORES, Keys, Store, table_of, write_json, write_readings, write_table
from retention.study import Run, Settings
from retention.types import (
    STEP_BASE,
    STEP_EDITED,
    Delta,
    Edit,
    EditResult,
    Fact,
    Question,
    Reading,
    UserError,
    content_id,
)

# Version of each stage's algorithm: raised when its numbers change, so that old artefacts are not taken for new ones.
VERSIONS = {"prepare": 2, "edit": 2, "tune": 1}

Report = Callable[[str, int, int], None]  # (what, done, total)


def default_cache() -> Path:
    """Where pretrained worlds, covariances and v* are kept: $RETENTION_CACHE, or the user's cache directory."""
    if path := os.environ.get("RETENTION_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retention"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where a run works: its results, its cache, and whom it tells how far it is."""

    store: Store
    cache: Path
    report: Report = lambda what, done, total: None


# ------------------------------------------------------------------------------------------------ keys


_version = lru_cache(importlib.metadata.version)


def _versions(*names: str) -> dict[str, str]:
    return {name: _version(name) for name in names}


@lru_cache(maxsize=256)
def _file_hash(path: Path, _size: int, _mtime: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(files: Sequence[Path]) -> list[str]:
    return sorted(_file_hash(f, f.stat().st_size, f.stat().st_mtime_ns) for f in files)


@lru_cache(maxsize=16)
def model_id(part: Any) -> str:
    """Content key of a model: of its files, or, for one that we pretrain, of all that its pretraining depends on."""
    if isinstance(part, HubModel):
        return content_id([content_hash(resolve(part.name, part.revision)), part.dtype])
    return part.key()


def base_id(run: Run) -> str:
    s = run.settings
    return content_id(
        {
            "stage": ["prepare", VERSIONS["prepare"]],
            "model": model_id(s.model),
            "facts": _settings(s.facts.model_dump(mode="json", exclude={"seed"})),
            "facts_seed": run.facts_seed,
            "files": _hashes(s.facts.files()),
            "probes": [p.model_dump(mode="json") for p in s.probes],
            "threads": s.threads,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "versions": _versions("torch", "transformers"),
        }
    )


def edit_id(run: Run) -> str:
    s = run.settings
    return content_id(
        {
            "stage": ["edit", VERSIONS["edit"]],
            "base": base_id(run),
            "editor": s.editor.model_dump(mode="json"),
            "regime": s.regime.model_dump(mode="json"),
            "only": run.only,
            "corpus": _hashes(_corpus_files(s)),
            "mitigations": _dump(s, "edit"),
            "seed": s.seed,
            "versions": _versions("peft"),
        }
    )


def run_id(run: Run) -> str:
    s = run.settings
    return content_id(
        {
            "stage": ["tune", VERSIONS["tune"]],
            "edit": edit_id(run),
            "objective": s.objective.model_dump(mode="json"),
            "adapter": s.adapter.model_dump(mode="json"),
            "mitigations": _dump(s, "rows", "training", "after"),
            "tune": _settings(s.tune.model_dump(mode="json")),
            "files": _hashes(files_of(s.tune.data)),
            "defaults": tuning.DEFAULTS,
            "at": s.at,
            "seed": s.seed,
            "versions": _versions("trl", "accelerate", "datasets"),
        }
    )


def _settings(dump: dict[str, Any]) -> dict[str, Any]:
    """A part's settings without those that say where its data lie: what the files hold is hashed."""
    kept = {k: v for k, v in dump.items() if k not in ("path", "counterfact", "trex")}
    return {k: _settings(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _corpus_files(s: Settings) -> list[Path]:
    if s.corpus is None:
        return []
    path = Path(s.corpus).expanduser()
    if not path.is_file():
        raise UserError(f"corpus: no such file: {path}")
    return [path]


def _dump(s: Settings, *where: str) -> list[dict[str, Any]]:
    """Mitigations that act at these places. Their order does not matter, so it does not enter a key."""
    return sorted((m.model_dump(mode="json") for m in s.mitigations if m.acts_on in where), key=lambda d: d["name"])


def names(run: Run) -> dict[str, Any]:
    """The columns that tell a study's runs apart."""
    return {**run.names, "seed": run.settings.seed, "facts_seed": run.facts_seed}


# ------------------------------------------------------------------------------------------------ stages


def load(run: Run, bench: Bench) -> Loaded:
    """The base model, made first if it is one of ours."""
    torch.set_num_threads(run.settings.threads)
    part = run.settings.model
    if isinstance(part, HubModel):
        return load_model(part.name, part.revision, part.dtype)
    return load_model(
        part.folder(bench.cache, lambda done, total: bench.report(f"pretraining {part.name}", done, total))
    )


def prepare(run: Run, bench: Bench) -> None:
    """Draw the facts by seed and read the base model (step -1)."""
    s, key = run.settings, base_id(run)
    if bench.store.complete("bases", key):
        return
    loaded = load(run, bench)
    model, tokenizer = loaded.model, loaded.tokenizer
    score = next(p for p in s.probes if p.name == "score")

    def known(questions: Sequence[Question]) -> list[bool]:
        return [bool(r.all_correct) for r in score.read(model, tokenizer, questions, STEP_BASE)]

    bench.report("drawing facts", 0, 1)
    drawn = draw(
        pool_of(s.facts, s.model, run.facts_seed),
        s.facts,
        run.facts_seed,
        known,
        lambda asked: rivals(model, tokenizer, asked),
    )
    bench.report("reading the base model", 0, 1)
    readings = read_all(s.probes, model, tokenizer, drawn.questions, STEP_BASE)
    with bench.store.publishing("bases", key) as folder:
        write_draw(folder, drawn)
        keys = Keys(base_id=key, model_id=model_id(s.model), facts_seed=run.facts_seed)
        write_readings(folder / f"probes-{STEP_BASE:06d}.parquet", keys, _pair(drawn.questions, readings), 0, 0)
        record = {
            "base_id": key,
            "model_content": loaded.content,
            "dropped": drawn.dropped,
            "facts_seed": run.facts_seed,
        }
        write_json(
            folder / "base.json",
            record | {k: run.dump()[k] for k in ("model", "facts", "probes", "threads")} | _where(),
        )


def edit(run: Run, bench: Bench) -> None:
    """Write the edits, and read the edited model (step 0)."""
    s, key = run.settings, edit_id(run)
    if bench.store.complete("edits", key):
        return
    loaded = load(run, bench)
    drawn = read_draw(bench, run, loaded)
    with bench.store.publishing("edits", key) as folder:
        keys = Keys(
            base_id=base_id(run), edit_id=key, model_id=model_id(s.model), editor=names(run)["editor"],
            seed=s.seed, facts_seed=run.facts_seed,
        )  # fmt: skip

        def read(soft_prompt: Tensor | None, name: str, applied: int) -> None:
            bench.report("reading the edited model", 0, 1)
            with prompted(loaded.model, soft_prompt) as reader:
                readings = read_all(s.probes, reader, loaded.tokenizer, drawn.questions, STEP_EDITED)
            write_readings(folder / name, keys, _pair(drawn.questions, readings), 0, applied)

        result = _write_edits(run, bench, loaded, drawn, lambda n: read(None, f"sequence-{n:06d}.parquet", n))
        with result.delta.applied(loaded.model):
            read(result.soft_prompt, f"probes-{STEP_EDITED:06d}.parquet", _applied(run, drawn))
        save_delta(folder / "delta.safetensors", result.delta, result.soft_prompt)
        rows = [{"edit_id": key, **row} for row in result.diagnostics]
        write_table(folder / "edits.parquet", table_of(rows))
        record = {
            "edit_id": key,
            "base_id": base_id(run),
            "seconds": result.seconds,
            "update_norm": result.delta.norm(),
        }
        record |= {"info": result.info, "parameters": sorted(result.delta.updates), "edits": _applied(run, drawn)}
        record |= {"weight_edit": result.soft_prompt is None, "mitigations": _dump(s, "edit")}
        record |= {"seed": s.seed, "threads": s.threads, "only": run.only}
        record |= {name: run.dump()[name] for name in ("editor", "regime")}
        write_json(folder / "edit.json", _finite(record) | _where())


def _write_edits(run: Run, bench: Bench, loaded: Loaded, drawn: Draw, after_batch: Callable[[int], None]) -> EditResult:
    """Call the editor as the regime says. The model is left as it was; the result is the whole of what is added."""
    s = run.settings
    edits = list(drawn.edits)
    for mitigation in s.mitigations:
        if isinstance(mitigation, Paraphrase):
            edits = mitigation.edits(edits, s.seed)
    corpus = [line for path in _corpus_files(s) for line in read_lines(path)] or loaded.corpus
    fixed: dict[str, Any] = {"seed": s.seed, "corpus": corpus, "cache": bench.cache}
    model, tokenizer = loaded.model, loaded.tokenizer
    if not isinstance(s.regime, Sequential):
        bench.report(f"editing with {s.editor.name}", 0, 1)
        return s.editor.edit(model, tokenizer, edits, **fixed)
    # Prune compresses the update of a whole sequence against the unedited weights (arXiv 2405.16821), so it comes last.
    parts = getattr(s.editor, "postprocess", ())
    last = [part for part in parts if part.name == "prune"]
    each = tuple(part for part in parts if part not in last)
    editor: Any = s.editor.model_copy(update={"postprocess": each}) if last else s.editor
    total, state, diagnostics, seconds = Delta(), None, [], 0.0
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    for start in range(0, len(edits), s.regime.size):
        bench.report(f"editing with {editor.name}", start, len(edits))
        batch = edits[start : start + s.regime.size]
        carried: dict[str, Any] = {"state": state} if getattr(editor, "carries_state", False) else {}
        # Each batch draws anew: random updates of one seed would add up instead of averaging out.
        result = editor.edit(model, tokenizer, batch, **carried, **{**fixed, "seed": s.seed + start})
        result.delta.apply_(model)
        total, state, seconds = total.plus(result.delta), result.state, seconds + result.seconds
        diagnostics.extend(result.diagnostics)
        after_batch(start + len(batch))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])
    for part in last:
        total = part.process(model, total, rank_one_per_edit=False)
    return EditResult(delta=total, diagnostics=tuple(diagnostics), seconds=seconds, info=result.info)


def _applied(run: Run, drawn: Draw) -> int:
    """Edits in the weights once all are written."""
    return 0 if run.settings.editor.name == "identity" else len(drawn.edits)


def tune(run: Run, bench: Bench) -> None:
    """Fine-tune the edited model, and read it at each step of `at`."""
    s, key = run.settings, run_id(run)
    if bench.store.complete("runs", key):
        return
    loaded = load(run, bench)
    model, tokenizer = loaded.model, loaded.tokenizer
    drawn = read_draw(bench, run, loaded)
    delta, soft_prompt = load_delta(bench.store.folder("edits", edit_id(run)) / "delta.safetensors")
    rows = rows_of(s.tune.data, s.model, s.seed)
    places = anatomy(model)
    keys = Keys(base_id=base_id(run), edit_id=edit_id(run), run_id=key, model_id=model_id(s.model), **names(run))
    scores: list[dict[str, Any]] = []

    def score_task(step: int, tokens_seen: int, soft_prompt: Tensor | None = soft_prompt) -> None:
        with prompted(model, soft_prompt) as reader:
            task = heldout(reader, tokenizer, rows.heldout)
        found = [("task_loss", task.loss, task.n_tokens), ("task_accuracy", task.accuracy, task.n_rows)]
        scores.extend(
            {"run_id": key, "step": step, "tokens_seen": tokens_seen, "score": name, "value": value, "n": n}
            | {"state": task.state}
            for name, value, n in found
            if value is not None or task.state != "ok"  # plain text has no accuracy
        )

    score_task(STEP_BASE, 0, None)
    delta.apply_(model)
    score_task(STEP_EDITED, 0)

    with bench.store.publishing("runs", key) as folder:

        def checkpoint(step: int, tokens_seen: int, _model: Any) -> None:
            with prompted(model, soft_prompt) as reader:
                readings = read_all(s.probes, reader, tokenizer, drawn.questions, step)
            write_readings(
                folder / f"probes-{step:06d}.parquet",
                keys,
                _pair(drawn.questions, readings),
                tokens_seen,
                _applied(run, drawn),
            )
            score_task(step, tokens_seen)

        def hold(wrapped: Any) -> tuple[str, ...]:
            frozen = [n for m in s.mitigations if isinstance(m, Freeze) for n in m.frozen(wrapped, places, delta)]
            freeze(wrapped, frozen)
            return tuple(dict.fromkeys(frozen))

        result = tuning.fine_tune(
            model,
            tokenizer,
            rows,
            objective=s.objective,
            adapter=s.adapter,
            freeze=hold,
            anatomy=places,
            steps=s.tune.steps,
            trainer=s.tune.trainer,
            seed=s.seed,
            at=s.at,
            on_checkpoint=checkpoint,
            folder=folder / "trainer",
            progress=lambda done, total: bench.report(f"fine-tuning {run.label}", done, total),
        )
        write_table(folder / "scores.parquet", pa.Table.from_pylist(scores, schema=SCORES))
        write_table(folder / "training.parquet", table_of([{"run_id": key, **entry} for entry in result.log]))
        if not any((folder / "trainer").iterdir()):  # trl makes it in any case
            (folder / "trainer").rmdir()
        outcome = {k: v for k, v in asdict(result).items() if k != "log"}
        record = {"run_id": key, "edit_id": edit_id(run), "base_id": base_id(run), "cell": dict(run.cell)}
        write_json(folder / "run.json", record | {"settings": run.dump(), "training": _finite(outcome)} | _where())


def _finite(value: Any) -> Any:
    """The same with NaN and infinity in words, which JSON lacks: an edit that diverged is recorded, not lost."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _pair(questions: Sequence[Question], readings: Sequence[Reading]) -> list[tuple[Question, Reading]]:
    assert [q.id for q in questions] == [r.question_id for r in readings]
    return list(zip(questions, readings, strict=True))


def _where() -> dict[str, Any]:
    """What a number may depend on besides the settings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or platform.machine())
    packages = _versions("retention", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy")
    return {"versions": packages | {"python": platform.python_version()}, "device": device}


# ------------------------------------------------------------------------------------------------ artefacts


def write_draw(folder: Path, drawn: Draw) -> None:
    """facts.parquet and questions.parquet: all texts, once; and edits.json, from which the edits are read again."""
    new = {e.fact.id: e.target for e in drawn.edits}
    facts = [
        {
            "fact_id": f.id,
            "subject": f.subject,
            "relation": f.relation,
            "prompt": f.prompt,
            "target": f.target,
            "new_target": new.get(f.id),
            "paraphrases": list(f.paraphrases),
            "phrasings": list(f.phrasings),
            "exposures": f.exposures,
            "tags": sorted(f.tags),
        }
        for f in drawn.facts.values()
    ]
    write_table(folder / "facts.parquet", pa.Table.from_pylist(facts, schema=FACTS))
    questions = [
        {"question_id": q.id, **{n: getattr(q, n) for n in QUESTIONS.names if n != "question_id"}}
        for q in drawn.questions
    ]
    write_table(folder / "questions.parquet", pa.Table.from_pylist(questions, schema=QUESTIONS))
    edits = [
        {"fact_id": e.fact.id, "target": e.target, "prompts": e.prompts, "anchors": e.anchors} for e in drawn.edits
    ]
    write_json(folder / "edits.json", edits)


FACTS = pa.schema(
    [(n, pa.string()) for n in ("fact_id", "subject", "relation", "prompt", "target", "new_target")]
    + [("paraphrases", pa.list_(pa.string())), ("phrasings", pa.list_(pa.string()))]
    + [("exposures", pa.int32()), ("tags", pa.list_(pa.string()))]
)
QUESTIONS = pa.schema([(n, pa.string()) for n in ("question_id", *Question.__dataclass_fields__)])


def read_draw(bench: Bench, run: Run, loaded: Loaded) -> Draw:
    """The facts that `prepare` drew, for the model that it read. Raises UserError if the model is another one now."""
    import pyarrow.parquet as pq

    folder = bench.store.folder("bases", base_id(run))
    if bench.store.settings("bases", base_id(run))["model_content"] != loaded.content:
        raise UserError(
            f"{folder}: these base readings are of a model with other weights (the cached model was made anew on "
            "another machine?). Use another --results folder, or the cache that they were made with"
        )
    facts = {}
    for row in pq.read_table(folder / "facts.parquet").to_pylist():
        facts[row["fact_id"]] = Fact(
            id=row["fact_id"],
            subject=row["subject"],
            relation=row["relation"],
            prompt=row["prompt"],
            target=row["target"],
            paraphrases=tuple(row["paraphrases"]),
            phrasings=tuple(row["phrasings"]),
            exposures=row["exposures"],
            tags=frozenset(row["tags"]),
        )
    questions = []
    for row in pq.read_table(folder / "questions.parquet").to_pylist():
        question = Question(**{n: row[n] for n in Question.__dataclass_fields__})
        questions.append(question)
    stored = json.loads((folder / "edits.json").read_text())
    edits = [
        Edit(fact=facts[e["fact_id"]], target=e["target"], prompts=tuple(e["prompts"]), anchors=tuple(e["anchors"]))
        for e in stored
    ]
    if run.only is not None:  # regime single: this edit, what stands beside it, and the facts that no edit touches
        edits = [edits[run.only]]
        mine, others = edits[0].fact.id, {e["fact_id"] for e in stored} - {edits[0].fact.id}
        questions = [
            q for q in questions if (q.edit_of or mine) == mine and not (q.group == "edited" and q.fact_id in others)
        ]
    return Draw(edits=tuple(edits), facts=facts, questions=tuple(questions), dropped={})
