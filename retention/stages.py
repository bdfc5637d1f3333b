"""The stages of a run: prepare and edit here, tune in fine_tuning.py. Read them as a method section.

Each stage is idempotent and keyed by the content of its settings: its artefact in the results folder is the only truth
about whether it is done. Probing never moves the experiment: the same suite reads every group of facts at step -1 (the
base model), 0 (the edited model) and at each step of `at`.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retention import half
from retention.artefacts import read_draw, write_draw
from retention.deltas import save_delta
from retention.edit import teach_late, write_edits
from retention.facts import pool_of
from retention.facts.draw import Draw, apart, draw
from retention.ids import base_id, edit_id, mitigations_at, model_id, names, versions
from retention.models import HubModel, Loaded, load_model
from retention.presets import set_aside
from retention.probes import read_all
from retention.probes.rivals import rivals
from retention.progress import Report, reporting
from retention.soft_prompt import prompted
from retention.store import Keys, Store, table_of, write_json, write_readings, write_table
from retention.study import Run
from retention.types import (
    STEP_BASE,
    STEP_EDITED,
    Question,
    Reading,
    UserError,
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where a run works: its results, its cache, and whom it tells how far it is."""

    store: Store
    cache: Path
    report: Report = lambda what, done, total: None
    # (key of a model, how to read it) -> a model of the stage's own; an engine may keep one in memory
    keep: Callable[[str, Callable[[], Loaded]], Loaded] = lambda key, read: read()

    def tell(self, tally: half.Reading) -> None:
        """How much was read twice, where anything was."""
        if tally.read:
            self.report(str(tally), 0, 1)


# ------------------------------------------------------------------------------------------------ stages


def load(run: Run, bench: Bench) -> Loaded:
    """The base model, made first if it is one of ours."""
    torch.set_num_threads(run.settings.threads)
    part = run.settings.model

    def read() -> Loaded:
        if isinstance(part, HubModel):
            return load_model(part.name, part.revision, part.dtype)
        return load_model(
            part.folder(bench.cache, lambda done, total: bench.report(f"pretraining {part.name}", done, total))
        )

    return bench.keep(model_id(part), read)


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

    with half.reading(s.precision.read) as tally:
        bench.report("drawing facts", 0, 1)
        drawn = draw(
            apart(pool_of(s.facts, s.model, run.facts_seed), set_aside(model.config)),
            s.facts,
            run.facts_seed,
            known,
            lambda asked: rivals(model, tokenizer, asked, chat=score.chat),
        )
        bench.report("reading the base model", 0, 1)
        readings = read_all(s.probes, model, tokenizer, drawn.questions, STEP_BASE)
    bench.tell(tally)
    with bench.store.publishing("bases", key) as folder:
        write_draw(folder, drawn)
        keys = Keys(base_id=key, model_id=model_id(s.model), facts_seed=run.facts_seed)
        write_readings(folder / f"probes-{STEP_BASE:06d}.parquet", keys, paired(drawn.questions, readings), 0, 0)
        record = {
            "base_id": key,
            "model_content": loaded.content,
            "dropped": drawn.dropped,
            "neighbors": drawn.neighbors,
            "facts_seed": run.facts_seed,
        }
        write_json(
            folder / "base.json",
            record | tally.record() | {k: run.dump()[k] for k in ("model", "facts", "probes", "threads")} | where(),
        )


def edit(run: Run, bench: Bench) -> None:
    """Write the edits, and read the edited model (step 0)."""
    s, key = run.settings, edit_id(run)
    if bench.store.complete("edits", key):
        return
    loaded = load(run, bench)
    drawn = drawn_facts(run, bench, loaded)
    with bench.store.publishing("edits", key) as folder, half.reading(s.precision.read) as tally:
        keys = Keys(
            base_id=base_id(run), edit_id=key, model_id=model_id(s.model), editor=names(run)["editor"],
            seed=s.seed, facts_seed=run.facts_seed,
        )  # fmt: skip

        late = teach_late(run, loaded, drawn, folder / "trainer", bench.report)
        if drawn.late:
            save_delta(folder / "late.safetensors", late)
            late.apply_(loaded.model)
            drop_if_empty(folder / "trainer")

        def read(soft_prompt: Tensor | None, name: str, applied: int) -> None:
            bench.report("reading the edited model", 0, 1)
            with prompted(loaded.model, soft_prompt) as reader:
                readings = read_all(s.probes, reader, loaded.tokenizer, drawn.questions, STEP_EDITED)
            write_readings(folder / name, keys, paired(drawn.questions, readings), 0, applied)

        with reporting(bench.report):
            result = write_edits(
                run, loaded, drawn, lambda n: read(None, f"sequence-{n:06d}.parquet", n), bench.cache, bench.report
            )
        with result.delta.applied(loaded.model):
            read(result.soft_prompt, f"probes-{STEP_EDITED:06d}.parquet", applied(run, drawn))
        save_delta(folder / "delta.safetensors", result.delta, result.soft_prompt)
        rows = [{"edit_id": key, **row} for row in result.diagnostics]
        write_table(folder / "edits.parquet", table_of(rows))
        record = {
            "edit_id": key,
            "base_id": base_id(run),
            "seconds": result.seconds,
            "update_norm": result.delta.norm(),
        }
        record |= {"info": result.info, "parameters": sorted(result.delta.updates), "edits": applied(run, drawn)}
        record |= {"weight_edit": result.soft_prompt is None, "mitigations": mitigations_at(s, "edit")}
        record |= {"seed": s.seed, "threads": s.threads, "only": run.only}
        record |= {name: run.dump()[name] for name in ("editor", "regime")} | tally.record()
        write_json(folder / "edit.json", finite(record) | where())
        bench.tell(tally)


def applied(run: Run, drawn: Draw) -> int:
    """Edits in the weights once all are written."""
    return 0 if run.settings.editor.name == "identity" else len(drawn.edits)


def drawn_facts(run: Run, bench: Bench, loaded: Loaded) -> Draw:
    """The facts that `prepare` drew, for the model that it read. Raises UserError if the model is another one now."""
    key = base_id(run)
    folder = bench.store.folder("bases", key)
    if bench.store.settings("bases", key)["model_content"] != loaded.content:
        raise UserError(
            f"{folder}: these base readings are of a model with other weights (the cached model was made anew on "
            "another machine?). Use another --results folder, or the cache that they were made with"
        )
    return read_draw(folder, run.only)


def drop_if_empty(folder: Path) -> None:
    """trl makes its output folder in any case."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def finite(value: Any) -> Any:
    """The same with NaN and infinity in words, which JSON lacks: an edit that diverged is recorded, not lost."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def paired(questions: Sequence[Question], readings: Sequence[Reading]) -> list[tuple[Question, Reading]]:
    assert [q.id for q in questions] == [r.question_id for r in readings]
    return list(zip(questions, readings, strict=True))


def where() -> dict[str, Any]:
    """What a number may depend on besides the settings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or platform.machine())
    packages = versions("retention", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy")
    return {"versions": packages | {"python": platform.python_version()}, "device": device}
