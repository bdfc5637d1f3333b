"""The third stage: fine-tune the edited model, once or several times over, and read it at each step of `at`.

What is read at a step, and how what is trained is held back, is decided here; the training is `tune.py`'s.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from retention import half, ranks
from retention import tune as tuning
from retention.adapters import merged
from retention.data import rows_of, same
from retention.data.leakage import leak
from retention.deltas import load_delta
from retention.edit import corpus_of, written
from retention.edit_keys import edit_keys
from retention.facts.draw import Draw
from retention.ids import base_id, edit_id, model_id, names, run_id
from retention.interrupts import held_back
from retention.launch import launched, start
from retention.mitigations import Mitigation, Scene, mixed_rows
from retention.models import Loaded, anatomy, max_positions
from retention.probes import Prepared, read_all
from retention.probes.ability import Cut, Heldout, heldout
from retention.relearn import chosen, relearn
from retention.resume import Resume
from retention.snapshot import put_back
from retention.soft_prompt import prompted
from retention.stages import Bench, applied, drawn_facts, drop_if_empty, finite, load, paired, where
from retention.store import SCORES, Keys, read_readings, table_of, write_json, write_readings, write_table
from retention.study import Run, Tune
from retention.trainer_fields import arguments_of, rows_needed
from retention.trainers import micro_batches
from retention.training_rows import training_rows
from retention.types import STEP_BASE, STEP_EDITED, Delta, Fact, TaskRows, UserError
from retention.weight_diagnostics import Diagnostics

if TYPE_CHECKING:
    from retention.objectives import Objective


def tune(run: Run, bench: Bench) -> None:
    """Fine-tune the edited model as the run says; publish readings, scores, the trainer's log and what moved.

    Where training does not fit into memory it begins again with micro-batches of half the size, until it fits; the
    batch that a step takes stays as it is. Raises UserError where that is not possible.
    """
    if run.settings.launch is not None and run.settings.launch.count > 1:
        return _together(run, bench)
    split, lack = 1, ""
    while not bench.store.complete("runs", run_id(run)):
        try:
            return _tune(run, bench, split)
        except tuning.OutOfMemory as error:
            lack = str(error)
        gc.collect()  # here, since the error, while it is handled, holds what the attempt had allocated
        torch.cuda.empty_cache()
        finer = next((n for n in (2 * split, 4 * split) if _parts(run, n) != _parts(run, split)), None)
        if finer is None:
            raise UserError(
                f"tune: out of memory ({lack}), and the batches cannot be smaller without another loss; use a smaller "
                "tune.trainer.per_device_train_batch_size or max_length, activation_checkpointing: true, or an adapter"
            )
        split = finer
        bench.report(f"out of memory; again with each batch in {split} parts: {run.label}", 0, 1)


def _together(run: Run, bench: Bench) -> None:
    """By several processes: start them, or be one of them. No batch is cut for lack of memory: all would have to."""
    if not bench.store.complete("runs", run_id(run)) and not launched():
        start(run, bench)
        assert bench.store.complete("runs", run_id(run)), "rank 0 has the same settings: it publishes by the same key"
    elif launched():
        try:
            _tune(run, bench, 1)
        except tuning.OutOfMemory as error:
            raise UserError(
                f"tune: out of memory on rank {ranks.rank()} ({error}); use a smaller per_device_train_batch_size with "
                "more gradient_accumulation_steps, activation_checkpointing: true, or more processes"
            ) from None


def _parts(run: Run, split: int) -> list[int]:
    """Into how many parts the batches of each fine-tune are cut."""
    tunes = run.settings.tunes
    return [micro_batches(t.objective or run.settings.objective, t.trainer, split)[1] for t in tunes]


def _tune(run: Run, bench: Bench, split: int) -> None:
    s, key = run.settings, run_id(run)
    loaded = load(run, bench)
    drawn = drawn_facts(run, bench, loaded)
    source = bench.store.folder("edits", edit_id(run))
    delta, soft_prompt = load_delta(source / "delta.safetensors")
    late = load_delta(source / "late.safetensors")[0] if drawn.late else Delta()
    scene = Scene(
        edits=written(run, drawn),
        intrinsic=_facts_of(drawn, "intrinsic"),
        corpus=corpus_of(run, loaded),
        seed=s.seed,
        tokenizer=loaded.tokenizer,
        anatomy=anatomy(loaded.model),
        delta=delta,
        rows_needed=None,
        names=frozenset(name for name, _ in loaded.model.named_parameters()),
    )
    tasks, sources = _tasks(run, scene, max_positions(loaded.model))
    with (
        held_back() as signals,
        bench.store.publishing("runs", key, resume=True) as folder,
        Resume(
            folder, bench.store.content("edits", edit_id(run)), signals, lambda what: bench.report(what, 0, 1)
        ) as resume,
        half.reading(s.precision.read) as tally,
    ):
        reader = Reader(run, loaded, drawn, tasks, soft_prompt, folder)
        before = resume.before()
        if before is None:
            reader.score(STEP_BASE, 0, soft_prompt=None)
        late.apply_(loaded.model)
        if s.weights:
            with delta.applied(loaded.model):
                keys = edit_keys(loaded.model, loaded.tokenizer, scene.edits, sorted(delta.updates))
            reader.diagnostics = Diagnostics(loaded.model, delta, keys)
        delta.apply_(loaded.model)
        results: list[tuning.TuneResult] = []
        log: list[dict[str, Any]] = []
        if before is None:
            reader.score(STEP_EDITED, 0)
        else:
            reader.scores, reader.weights, log = before["scores"], before["weights"], before["log"]
            results = [tuning.TuneResult(**result) for result in before["results"]]
            split = before["split"]  # what a run has begun with it ends with
        if resume.first is not None:
            put_back(dict(loaded.model.named_parameters()), resume.first["weights"])
            scene.memory.update(resume.first["memory"])
        signals.holding = alone = ranks.size() == 1  # several ranks would have to save, and to begin, at the same step
        for number, (t, task) in enumerate(zip(s.tunes, tasks, strict=True), 1):
            if number <= len(results):
                continue
            reader.steps_before, reader.tokens_before = sum(r.steps for r in results), sum(r.tokens for r in results)
            told = [asdict(result) for result in results]
            resume.run = {
                "scores": reader.scores,
                "weights": reader.weights,
                "log": log,
                "results": told,
                "split": split,
            }
            if number > resume.number and alone:
                resume.begin(number, {"weights": dict(loaded.model.named_parameters()), "memory": scene.memory})
                signals.deliver()
            last = number == len(tasks)
            merge = not last or s.relearn is not None
            result = _once(run, bench, t, task, scene, reader, resume, merge=merge, split=split)
            log += [{**entry, "step": reader.steps_before + entry["step"], "tune": number} for entry in result.log]
            results.append(result)
        if s.relearn is not None:
            first = read_readings(source / f"probes-{STEP_EDITED:06d}.parquet", "all_correct")
            _relearn(run, loaded, drawn, reader, first, folder)
        write_table(folder / "scores.parquet", pa.Table.from_pylist(reader.scores, schema=SCORES))
        if reader.weights:
            write_table(folder / "weights.parquet", table_of(reader.weights))
        write_table(folder / "training.parquet", table_of([{"run_id": key, **entry} for entry in log]))
        drop_if_empty(folder / "trainer")
        resume.over()
        record: dict[str, Any] = {"run_id": key, "edit_id": edit_id(run), "base_id": base_id(run)}
        record |= {"processes": ranks.size()} if ranks.size() > 1 else {}
        record |= {"cell": dict(run.cell), "settings": run.dump(), "rows": sources}
        record |= {"training": [{k: v for k, v in asdict(result).items() if k != "log"} for result in results]}
        write_json(folder / "run.json", finite(record | tally.record()) | where())
        bench.tell(tally)


def _tasks(run: Run, scene: Scene, positions: int | None) -> tuple[list[TaskRows], list[dict[str, Any]]]:
    """Each fine-tune's rows after the leakage filter, and what was counted and left out on the way to them."""
    tasks: list[TaskRows] = []
    sources: list[dict[str, Any]] = []
    for t in run.settings.tunes:
        rows = rows_of(t.data, run.settings.model, run.settings.seed)
        objective: Objective = t.objective or run.settings.objective
        trained = ("text", "prompt", "completion", *["rejected"] * objective.trains_rejected)
        found = leak(
            rows, t.leakage, edited=scene.edits, intrinsic=scene.intrinsic, seed=run.settings.seed, keys=trained
        )
        tasks.append(found.rows)
        sources.append({"mentions": dict(found.counts), "dropped": Counter(rows.dropped)})
    held = [{same(row) for row in task.heldout} for task in tasks]
    for i, task in enumerate(tasks):  # a list of fine-tunes may draw from one source
        others = set().union(*(h for j, h in enumerate(held) if j != i))
        train = tuple(row for row in task.train if same(row) not in others)
        if len(train) < len(task.train):
            sources[i]["dropped"]["held_out_of_another_tune"] = len(task.train) - len(train)
            tasks[i] = replace(task, train=train)
        t = run.settings.tunes[i]
        objective = t.objective or run.settings.objective
        arguments = arguments_of(objective, t.trainer)
        fitted = training_rows(tasks[i].train, objective, scene.tokenizer, arguments, chat=t.chat, positions=positions)
        fitted.counts.refuse(t.min_share, arguments["max_length"])
        sources[i]["tokens"] = asdict(fitted.counts)
        tasks[i] = replace(tasks[i], train=tuple(fitted.source))
    return tasks, sources


class Reader:
    """Reads all that there is to read of one run's model at a step, and keeps it."""

    def __init__(
        self, run: Run, loaded: Loaded, drawn: Draw, tasks: Sequence[TaskRows], soft_prompt: Tensor | None, folder: Path
    ) -> None:
        self.run, self.model, self.tokenizer, self.drawn = run, loaded.model, loaded.tokenizer, drawn
        self.tasks, self.soft_prompt, self.folder = tasks, soft_prompt, folder
        self.keys = Keys(
            base_id=base_id(run), edit_id=edit_id(run), run_id=run_id(run), model_id=model_id(run.settings.model),
            **names(run),
        )  # fmt: skip
        self.scores: list[dict[str, Any]] = []
        self.steps_before = self.tokens_before = 0  # done by earlier fine-tunes of a list
        self.prepared = Prepared()
        self.abilities = [a.reader(run.settings.model, run.settings.seed, tasks) for a in run.settings.abilities]
        self.diagnostics: Diagnostics | None = None
        self.weights: list[dict[str, Any]] = []
        self.own: Callable[[], AbstractContextManager[Mapping[str, Tensor]]] = lambda: nullcontext({})

    def score(self, step: int, tokens_seen: int, **other: Tensor | None) -> None:
        """Held-out loss and accuracy of every task."""
        abilities = []
        with prompted(self.model, other.get("soft_prompt", self.soft_prompt)) as model:
            for ability in self.abilities:
                abilities += ability.read(model, self.tokenizer)
            found = [self.heldout(model, number) for number in range(len(self.tasks))]
        same = {"run_id": self.keys.run_id, "step": step, "tokens_seen": tokens_seen}
        for number, read in enumerate(found, 1):
            which = "" if number == 1 else f"_{number}"  # of a list of fine-tunes
            values = [("task_loss", read.loss, read.n_tokens), ("task_accuracy", read.accuracy, read.n_rows)]
            self.scores += [
                {**same, "score": name + which, "value": value, "n": n, "state": read.state}
                for name, value, n in values
                if value is not None or read.state != "ok"  # plain text has no accuracy
            ]
        self.scores += [{**same, "score": a.name, "value": a.value, "n": a.n, "state": a.state} for a in abilities]

    def heldout(self, model: Any, number: int) -> Heldout:
        """Of the task of one fine-tune, from 0; its rows as they are trained on."""
        t, rows = self.run.settings.tunes[number], self.tasks[number].heldout
        cut = _cut(t, t.objective or self.run.settings.objective)
        return heldout(model, self.tokenizer, rows, prepared=self.prepared, chat=t.chat, cut=cut)

    def checkpoint(self, step: int, tokens_seen: int, _model: Any) -> None:
        """All probes and scores, at a step of the present fine-tune."""
        step, tokens_seen = self.steps_before + step, self.tokens_before + tokens_seen
        with prompted(self.model, self.soft_prompt) as model:
            readings = read_all(
                self.run.settings.probes, model, self.tokenizer, self.drawn.questions, step, self.prepared
            )
        write_readings(
            self.folder / f"probes-{step:06d}.parquet", self.keys, paired(self.drawn.questions, readings), tokens_seen,
            applied(self.run, self.drawn),
        )  # fmt: skip
        self.score(step, tokens_seen)
        if self.diagnostics is not None:
            with self.own() as parameters:
                self.weights += [
                    {"run_id": self.keys.run_id, "step": step, **row} for row in self.diagnostics.read(parameters)
                ]


def _cut(t: Tune, objective: Objective) -> Cut:
    """What a fine-tune sees of a row. An objective that draws its completions cuts none that are given."""
    arguments = arguments_of(objective, t.trainer)
    drawing = objective.shuffled_by == "field"
    return Cut(
        length=None if drawing else arguments["max_length"],
        end=arguments.get("truncation_mode") == "keep_end",
        whole=objective.whole,
        tokens=t.heldout_tokens,
    )


def _once(
    run: Run,
    bench: Bench,
    t: Tune,
    task: TaskRows,
    scene: Scene,
    reader: Reader,
    resume: Resume,
    *,
    merge: bool,
    split: int,
) -> tuning.TuneResult:
    """One fine-tune of the run's list."""
    s = run.settings
    objective: Objective = t.objective or s.objective
    on_rows: list[Mitigation] = [m for m in s.mitigations if m.acts_on == "rows"]
    needed = rows_needed(objective, t.trainer, t.steps)
    needed = None if needed is None else needed * ranks.size()
    scene = replace(scene, rows_needed=needed, heldout=task.heldout)

    def hold(wrapped: Any) -> tuning.Held:
        frozen = {n for m in s.mitigations for n in m.frozen(wrapped, scene.anatomy, scene.delta)}
        moving = [n for n, p in wrapped.named_parameters() if p.requires_grad and n not in frozen]
        reader.keys = replace(reader.keys, trains_edited=_touches(moving, scene.delta))
        guards = [m.guard(wrapped, scene) for m in s.mitigations]
        reader.own = lambda: merged(wrapped, scene.names)
        return tuning.Held(frozen=tuple(sorted(frozen)), guards=tuple(g for g in guards if g is not None))

    def enough(step: int) -> bool:
        with prompted(reader.model, reader.soft_prompt) as model:
            loss = reader.heldout(model, s.tunes.index(t)).loss
        return loss is not None and t.until is not None and loss < t.until.loss

    which = f" {s.tunes.index(t) + 1} of {len(s.tunes)}" if len(s.tunes) > 1 else ""
    return tuning.fine_tune(
        reader.model,
        reader.tokenizer,
        mixed_rows(on_rows, task.train, scene) if on_rows else task.train,
        objective=objective,
        adapter=t.adapter or s.adapter,
        hold=hold,
        anatomy=scene.anatomy,
        budget=tuning.Budget(
            steps=t.steps, epochs=t.epochs, tokens=t.tokens, stop=enough, every=t.until.every if t.until else None
        ),
        trainer=t.trainer,
        seed=s.seed,
        at={step - reader.steps_before for step in s.at},
        on_checkpoint=reader.checkpoint,
        folder=resume.folder / "trainer",
        base=lambda: load(run, bench).model,
        in_order=bool(on_rows),
        chat=t.chat,
        merge=merge,
        progress=lambda done, total: bench.report(f"fine-tuning{which} {run.label}", done, total),
        resume=resume if ranks.size() == 1 else None,
        split=split,
    )


def _touches(moving: Sequence[str], delta: Delta) -> bool:
    """Whether one of the parameters is an edited matrix, or belongs to an adapter on one."""
    modules = [name.rpartition(".")[0] for name in delta.updates]
    return any(f"{module}." in name for name in moving for module in modules)


def _relearn(
    run: Run, loaded: Loaded, drawn: Draw, reader: Reader, first: dict[str, bool | None], folder: Path
) -> None:
    """Teach the forgotten edits again, and write how fast they come back to relearn.parquet."""
    settings = run.settings.relearn
    assert settings is not None, "asked for"
    # The model as training left it, at its very end: what a checkpoint read may be earlier, or merged.
    score = next(p for p in run.settings.probes if p.name == "score")
    last = read_all([score], loaded.model, loaded.tokenizer, drawn.questions, 0)
    kept = {r.question_id for r in last if r.all_correct}
    right = {q for q, correct in first.items() if correct}
    questions = chosen(drawn.questions, drawn.facts, right, kept, settings.most)
    if not questions:  # nothing was forgotten, or there is no control to compare with: the table is not there
        return
    parts: list[Path] = []

    def read(step: int) -> None:
        readings = read_all(run.settings.probes, loaded.model, loaded.tokenizer, questions, step)
        parts.append(folder / f"relearn-{step:06d}.parquet")
        write_readings(parts[-1], reader.keys, paired(questions, readings), 0, applied(run, drawn))

    relearn(
        loaded.model, loaded.tokenizer, settings, questions,
        anatomy=anatomy(loaded.model), seed=run.settings.seed, folder=folder / "trainer", read=read,
    )  # fmt: skip


def _facts_of(drawn: Draw, group: str) -> list[Fact]:
    return [drawn.facts[i] for i in dict.fromkeys(q.fact_id for q in drawn.questions if q.group == group)]
