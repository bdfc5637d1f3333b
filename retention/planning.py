"""What a study will do before any of it is done: its stages, what they share, the memory and the time they need.

Nothing is fetched or loaded. What is not here is named; keys that rest on it are provisional, and the rest is planned.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from retention import estimate, preflight
from retention.adapters import Adapter, trainable_numbers
from retention.data import rows_of
from retention.engines import inline
from retention.estimate import Need, Shape
from retention.ids import model_id, provisional
from retention.model_folder import NotFetched, resolve
from retention.models import HubModel, tokenizer_of
from retention.objectives import Objective
from retention.stages import Bench
from retention.store import Store
from retention.study import Run, Study, Tune
from retention.trainer_fields import arguments_of
from retention.types import Missing, UserError

CHARACTERS = 4  # of English text a token, about, where the tokenizer is not here
QUESTION = 30  # tokens of a question with its answer and its foil, about
ROW = 20  # tokens of an edit's row, about
SHARE = 1 / 3  # of the speed of a large matrix product that training reaches, about
H200 = 3.3e14  # operations a second: a third of an H200's bfloat16 peak
LOGITS = 8192  # for each token of a batch, that the probes hold at once (probes/_forward.py)
LINES = 3  # needs of one stage and model that are told one by one


@dataclass(frozen=True, kw_only=True)
class Device:
    """What stages will run on."""

    name: str
    memory: float  # GiB
    accelerator: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study, planned."""

    study: Study
    stages: Sequence[inline.Stage]
    models: Mapping[str, str]  # name -> its key, shape, and whether it is here
    needs: Mapping[str, Sequence[tuple[str, Need]]]  # model -> (what it is for, memory), one for each distinct need
    hours: Mapping[str, float | None]  # kind of stage -> of all that is to do; None: not known
    basis: Sequence[str]  # where the times are from
    notes: Sequence[str]  # what could not be told, and why
    missing: Sequence[str]  # files and folders that are not here
    refusals: Sequence[str]  # what does not fit into this machine's accelerator


def plan(study: Study, store: Store, cache: Path, *, throughput: float | None = None) -> Plan:
    """Raises UserError for settings that are wrong in themselves.

    throughput: operations a second that training reaches; left out, a share of what a matrix product reaches here.
    """
    here = device()
    with provisional() as absent:
        wrong = preflight.examine(study)
        if any(not isinstance(error, Missing) for error in wrong.values()):
            raise UserError("\n".join(wrong))
        stages = inline.plan(study.runs, Bench(store=store, cache=cache))
        models = dict.fromkeys(run.settings.model for run in study.runs)
        shapes = {model: shape_of(model) for model in models}
        told = {}
        for model in models:
            key = model_id(model)
            told[model.name] = _described(model, shapes[model], key, any(repr(model.name) in line for line in absent))
        needs: dict[str, dict[str, Need]] = {model.name: {} for model in models}
        known = Known()
        clock = Clock(store, shapes, throughput, here, known)
        hours: dict[str, float | None] = {}
        for stage in stages:
            shape = shapes[stage.run.settings.model]
            if shape is not None:
                for label, need in _needs(stage, shape, here, known):
                    old = needs[stage.run.settings.model.name].get(label)
                    if old is None or need.total > old.total:
                        needs[stage.run.settings.model.name][label] = need
            if not stage.done:
                hours[stage.kind] = add(hours.get(stage.kind, 0.0), clock.hours(stage))
    notes = [line for line, error in absent.items() if isinstance(error, NotFetched)]
    files = [line for line in absent if line not in notes]
    files += [line for line in wrong if not any(line.endswith(told) for told in (*files, *notes))]
    notes += [
        f"{model.name}: no estimate: its shape is not in the table (retention/estimate.py), nor its config.json here"
        + (f"; the nearest in the table is {near}" if (near := estimate.nearest(model.name)) else "")
        for model in models
        if shapes[model] is None
    ]
    refusals = []
    if here.accelerator:
        for name, found in needs.items():
            each = {need.stage: [n for n in found.values() if n.stage == need.stage] for need in found.values()}
            said = (estimate.advice(group, 0.9 * here.memory) for group in each.values())
            refusals += [f"{name}: {text}" for text in said if text]
    return Plan(
        study=study, stages=stages, models=told, hours=hours, basis=clock.basis(), notes=notes, missing=files,
        needs={name: sorted(found.items(), key=lambda item: -item[1].total) for name, found in needs.items()},
        refusals=refusals,
    )  # fmt: skip


def text(plan: Plan) -> Iterator[str]:
    """For people, line by line."""
    yield f"{plan.study.name}: {plan.study.question}" if plan.study.question else plan.study.name
    for kind, what in (("prepare", "base readings"), ("edit", "distinct edits"), ("tune", "fine-tunes")):
        of_kind = [s for s in plan.stages if s.kind == kind]
        hours = plan.hours.get(kind, 0.0)
        left = sum(not s.done for s in of_kind)
        cost = "" if not left else ", time not known" if hours is None else f", {duration(hours)} left"
        yield f"  {len(of_kind):4d} {what}, {len(of_kind) - left} done{cost}"
    yield from (f"  time: {line}" for line in plan.basis if any(not s.done for s in plan.stages))
    for name, told in plan.models.items():
        yield f"  model: {told}"
        for kind in ("prepare", "edit", "tune"):
            found = [(label, need) for label, need in plan.needs[name] if need.stage == kind]
            yield from (f"    {need}, {label}" if label else f"    {need}" for label, need in found[:LINES])
            if len(found) > LINES:
                yield f"    {kind}: {len(found) - LINES} more need less"
    here = device()
    what = "" if here.accelerator else "no accelerator; "
    yield f"  memory as estimated, leave a tenth free; {what}here: {here.name}, {here.memory:.0f} GiB"
    yield from (f"  note: {note}" for note in plan.notes)
    for stage in plan.stages:
        if stage.kind == "tune":
            names = {"model": stage.run.settings.model.name} if len(plan.models) > 1 else {}
            names |= {**stage.run.names, "seed": str(stage.run.settings.seed)}
            label = " ".join(" ".join(f"{k}={v}" for k, v in names.items()).split())  # a template has lines of its own
            yield f"  {'done' if stage.done else 'to do':5} {stage.key}  {label}"


def device() -> Device:
    """The accelerator that stages run on, or the processor where there is none."""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return Device(name=about.name, memory=about.total_memory / estimate.GIB, accelerator=True)
    memory = _memory() / estimate.GIB
    return Device(name="processor", memory=memory, accelerator=False)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def shape_of(model: Any) -> Shape | None:
    """From the table of published models, else from the model's config; None where it is in neither."""
    known = estimate.published(model.name) if isinstance(model, HubModel) else None
    try:
        return known or estimate.shape_of(preflight.config_of(model))
    except Missing:
        return None


def _described(model: Any, shape: Shape | None, key: str, absent: bool) -> str:
    size = "of unknown size" if shape is None else f"{shape.parameters / 1e6:,.1f} million numbers"
    state = f"not here: key {key[:8]} is provisional" if absent else key[:8]
    return f"{model.name} ({state}), {size}"


# ------------------------------------------------------------------------------------------------ memory


def _needs(stage: inline.Stage, shape: Shape, here: Device, known: Known) -> Iterator[tuple[str, Need]]:
    """What a stage needs, with words that tell it from the other needs of its kind."""
    s = stage.run.settings
    if stage.kind == "prepare":
        score = next(p for p in s.probes if p.name == "score")
        tokens = score.tokens_per_batch
        yield "", estimate.prepare(shape, tokens, tokens * LOGITS)
    elif stage.kind == "edit":
        editor = s.editor
        covariance = getattr(editor, "covariance", None)
        yield (
            stage.run.names["editor"],
            estimate.edit(
                shape,
                layers=edited_layers(s),
                covariance=covariance is not None and covariance.tokens > 0,
                trained=trained(editor, shape),
                # A v* is sought for as many edits at once as memory allows: one is the least.
                batch=min(editor.batch_size, _edits(stage.run)) if hasattr(editor, "batch_size") else rows_of_edit(s),
            ),
        )
    else:
        for t in s.tunes:
            yield _tune_need(stage.run, t, shape, here, known)


def rows_of_edit(s: Any) -> int:
    """Rows that an edit is written by: the prompt alone and after each prefix, and the anchors; or the prompt."""
    return 2 + len(s.editor.context_lengths) if hasattr(s.editor, "context_lengths") else 1


def trained(editor: Any, shape: Shape) -> int:
    return int(editor.trained(shape)) if hasattr(editor, "trained") else 0


def edited_layers(s: Any) -> int:
    """Layers that the editor writes into: as given, or as many as its paper has."""
    given = getattr(s.editor, "layers", None)
    if given is not None:
        return len(given)
    return 5 if s.editor.name in ("memit", "alphaedit") else 1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The lengths of a task's rows, tokens: at most, where the data are not here."""

    count: int  # 0: not known
    mean: float
    longest: int


def _tune_need(run: Run, t: Tune, shape: Shape, here: Device, known: Known) -> tuple[str, Need]:
    s = run.settings
    objective: Objective = t.objective or s.objective
    adapter = t.adapter or s.adapter
    arguments = arguments_of(objective, t.trainer)
    rows = known.rows(run, t, arguments)
    batch = int(arguments["per_device_train_batch_size"]) * objective.sequences
    adapted, moving = isinstance(adapter, Adapter), None
    if isinstance(adapter, Adapter):
        moving = known.trainable(adapter, s.model)
    elif kept := sum(m.held(shape, edited_layers(s)) for m in s.mitigations):
        moving = max(shape.parameters - kept, 0)
    optim = str(arguments["optim"])
    need = estimate.tune(
        shape,
        batch=batch,
        length=rows.longest,
        trainable=moving,
        adapter=adapted,
        dtype="bfloat16" if arguments["bf16"] else "float16" if arguments["fp16"] else "float32",
        checkpointing=bool(arguments["activation_checkpointing"]),
        optimizer_bytes=2 if "8bit" in optim else 4 if optim.startswith(("sgd", "lion", "rmsprop", "adagrad")) else 8,
        models=(1 if adapted else objective.models(arguments)) + sum(m.copies for m in s.mitigations),
        fused=objective.fused,
        cpu=not here.accelerator,
        shards=1 if s.launch is None else s.launch.shards,
    )
    if s.launch is not None and s.launch.count > 1:  # each rank holds the whole model that is read beside its share
        need = replace(need, parts={**need.parts, "weights to read": shape.parameters * estimate.FLOAT / estimate.GIB})
    with_ = [m.name for m in s.mitigations if m.copies or m.held(shape, 1)]
    name = " with ".join([f"{objective.name} {adapter.name}", *(["+".join(with_)] if with_ else [])])
    return f"{name}, {batch} rows of up to {rows.longest} tokens", need


class Known:
    """What many stages of a study ask for, each told once: lengths of a task's rows, numbers that an adapter trains."""

    def __init__(self) -> None:
        self._told: dict[str, Any] = {}

    def _once(self, make: Callable[[], Any], *parts: Any) -> Any:
        key = json.dumps([part.model_dump(mode="json") for part in parts])
        if key not in self._told:
            self._told[key] = make()
        return self._told[key]

    def rows(self, run: Run, t: Tune, arguments: Mapping[str, Any]) -> Rows:
        """Lengths as the trainer will see them: cut off at max_length, packed where the objective packs."""
        model = run.settings.model
        found = self._once(lambda: _lengths(t.data, model), t.data, model)
        limit = arguments.get("max_length") or max([1024, *found])
        answer = int(arguments.get("max_completion_length") or 0)  # of objectives that draw answers
        cut = [min(n + answer, limit) for n in found]
        if not cut or arguments.get("packing"):
            return Rows(count=sum(cut) // limit, mean=limit, longest=limit)
        return Rows(count=len(cut), mean=statistics.fmean(cut), longest=max(cut))

    def trainable(self, adapter: Adapter, model: Any) -> int:
        return int(self._once(lambda: trainable_numbers(adapter, preflight.config_of(model)), adapter, model))


def _lengths(data: Any, model: Any) -> tuple[int, ...]:
    """Tokens of each row, with the longer of its completions; none where the data are not here.

    By one seed: which rows are drawn hardly matters to their lengths.
    """
    try:
        rows = rows_of(data, model, 0).train
    except Missing:
        return ()
    texts = [
        row["text"] if "text" in row else row["prompt"] + " " + max(row["completion"], row.get("rejected", ""), key=len)
        for row in rows
    ]
    tokenizer = _tokenizer(model)
    if tokenizer is not None:
        return tuple(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])  # and the end of the text
    return tuple(math.ceil(len(each) / CHARACTERS) + 1 for each in texts)


def _tokenizer(model: Any) -> Any:
    if not isinstance(model, HubModel):
        return None
    try:
        return tokenizer_of(resolve(model.name, model.revision))
    except (UserError, OSError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------ time


def add(total: float | None, more: float | None) -> float | None:
    return None if total is None or more is None else total + more


def duration(hours: float) -> str:
    """For people."""
    for unit, size in (("days", 24.0), ("hours", 1.0), ("minutes", 1 / 60)):
        if hours >= 2 * size:
            return f"{hours / size:,.0f} {unit}"
    return f"{max(hours * 3600, 1):.0f} s"


class Clock:
    """Hours of a stage: as measured in the results folder where it has one like it, else from operations."""

    def __init__(
        self, store: Store, shapes: Mapping[Any, Shape | None], throughput: float | None, here: Device, known: Known
    ) -> None:
        self.shapes, self.given, self.here, self.known = shapes, throughput, here, known
        self.past = past(store)
        self.from_past = self.counted = 0
        self.operations = 0.0  # of the stages that were counted
        self._speed = throughput

    @property
    def speed(self) -> float:
        """Operations a second in training."""
        if self._speed is None:
            self._speed = SHARE * product_speed()
        return self._speed

    def hours(self, stage: inline.Stage) -> float | None:
        run = stage.run
        like = self.past.get((stage.kind, *_like(stage.kind, run.dump())))
        if self.given is None and like:
            self.from_past += 1
            seconds = statistics.median(like)
            return seconds * (_edits(run) if stage.kind == "edit" else 1) / 3600
        shape = self.shapes[run.settings.model]
        if shape is None:
            return None
        needed = operations(stage, shape, self.known)
        if needed is None:
            return None
        self.counted += 1
        self.operations += needed
        return needed / self.speed / 3600

    def basis(self) -> list[str]:
        found = []
        if self.from_past:
            found.append(
                f"as measured in this folder for {self.from_past} stages like those done here, probes included"
            )
        if self.counted:
            source = "as given"
            if self.given is None:
                source = f"a third of a matrix product's speed on this {self.here.name}, measured now"
            found.append(
                f"{self.counted} stages from their {self.operations:.2g} operations at {self.speed:.2g} a second "
                f"({source}; --throughput gives another), without what waits on memory"
            )
            if self.given is None and not self.here.accelerator:
                found.append(f"on an H200 at {H200:.2g}, bfloat16: {duration(self.operations / H200 / 3600)} for these")
        return found


def _like(kind: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What the time of a stage depends on most: two stages that agree in it take about as long."""
    names = {"prepare": ("model", "facts"), "edit": ("editor",), "tune": ("model", "tune", "objective", "adapter")}[
        kind
    ]
    found = {name: settings[name] for name in names}
    if kind == "tune":
        found |= {"at": len(settings["at"]), "facts": settings["facts"]}
    if isinstance(found.get("facts"), dict):
        found["facts"] = {k: v for k, v in found["facts"].items() if k != "seed"}
    return (json.dumps(found, sort_keys=True),)


def past(store: Store) -> dict[tuple[str, ...], list[float]]:
    """(kind, what the time depends on) -> seconds of stages that are done: of a fine-tune, or of one edit."""
    found: dict[tuple[str, ...], list[float]] = {}
    for file in sorted(store.root.glob("runs/*/run.json")):
        record = _record(file)
        if record and isinstance(record.get("settings"), dict):
            seconds = sum(t.get("seconds") or 0 for t in record.get("training", []))
            found.setdefault(("tune", *_like("tune", record["settings"])), []).append(seconds)
    for file in sorted(store.root.glob("edits/*/edit.json")):
        record = _record(file)
        if record and record.get("edits"):
            found.setdefault(("edit", *_like("edit", record)), []).append(record["seconds"] / record["edits"])
    return found


def _record(file: Path) -> dict[str, Any] | None:
    """What a published record says; None where it is not complete or cannot be read (`retention verify` tells why)."""
    if not (file.parent / "complete.json").is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, OSError):
        return None


def product_speed() -> float:
    """Operations a second of a large matrix product here: bfloat16 on an accelerator, float32 on a processor."""
    on = torch.cuda.is_available()
    size = 8192 if on else 1024
    a = torch.ones(size, size, dtype=torch.bfloat16 if on else torch.float32, device="cuda" if on else "cpu")
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product = a @ a
        if on:
            product.sum().item()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def operations(stage: inline.Stage, shape: Shape, known: Known) -> float | None:
    """Of a stage: what multiplies, and nothing else. Editors that train are counted to their last epoch.

    None where the number of steps follows from data that are not here.
    """
    run, s = stage.run, stage.run.settings
    each = 2.0 * estimate.multiplied(shape)  # a token forward
    reading = _questions(run) * (QUESTION + sum(getattr(p, "max_new_tokens", None) or 8 for p in s.probes[1:])) * each
    if stage.kind == "prepare":
        return reading
    if stage.kind == "edit":
        edits, editor = _edits(run), s.editor
        rows = rows_of_edit(s)
        searched = (getattr(editor, "v_steps", 0) or 20) * rows * 2 if hasattr(editor, "v_steps") else 0
        passes = 3 * getattr(editor, "epochs", 0)
        covariance = getattr(getattr(editor, "covariance", None), "tokens", 0)
        batches = math.ceil(edits / s.regime.size) if s.regime.name == "sequential" else 1
        return (edits * ROW * (searched + passes) + covariance) * each + batches * reading
    total = 0.0
    for t in s.tunes:
        objective: Objective = t.objective or s.objective
        arguments = arguments_of(objective, t.trainer)
        lengths = known.rows(run, t, arguments)
        in_step = int(arguments["per_device_train_batch_size"]) * int(arguments["gradient_accumulation_steps"])
        if t.epochs and not lengths.count:
            return None
        tokens = t.tokens or lengths.mean * (t.steps * in_step if t.steps else (t.epochs or 0) * lengths.count)
        total += estimate.flops(
            shape,
            tokens * objective.sequences,
            adapter=isinstance(t.adapter or s.adapter, Adapter),
            checkpointing=bool(arguments["activation_checkpointing"]),
        )
    return total + len(s.at) * reading


def _edits(run: Run) -> int:
    return 1 if run.only is not None else run.settings.facts.edited


def _questions(run: Run) -> int:
    """Questions that are asked at each reading, at most."""
    f, edits = run.settings.facts, _edits(run)
    direct = edits + f.control + f.late + f.intrinsic
    return direct * (1 + f.paraphrases + f.prefixed) + edits * (f.neighbors + f.same_subject * (1 + f.specificity))
