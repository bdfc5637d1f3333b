"""The time that the stages of a study take: as measured in the results folder, else from what they multiply.

Knows nothing of memory, nor how a plan is told.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from retention import estimate
from retention.adapters import Adapter
from retention.engines import inline
from retention.estimate import Shape
from retention.needs import Device, Known, edits_of, rows_of_edit
from retention.objectives import Objective
from retention.store import Store
from retention.study import Run
from retention.trainer_fields import arguments_of

QUESTION = 30  # tokens of a question with its answer and its foil, about
ROW = 20  # tokens of an edit's row, about
SHARE = 1 / 3  # of the speed of a large matrix product that training reaches, about
H200 = 3.3e14  # operations a second: a third of an H200's bfloat16 peak


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
            return seconds * (edits_of(run) if stage.kind == "edit" else 1) / 3600
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


def product_speed(dtype: torch.dtype | None = None) -> float:
    """Operations a second of a large matrix product here; unless given, bfloat16 on an accelerator, else float32."""
    on = torch.cuda.is_available()
    size = 8192 if on else 1024
    dtype = dtype or (torch.bfloat16 if on else torch.float32)
    a = torch.ones(size, size, dtype=dtype, device="cuda" if on else "cpu")
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
        edits, editor = edits_of(run), s.editor
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


def _questions(run: Run) -> int:
    """Questions that are asked at each reading, at most."""
    f, edits = run.settings.facts, edits_of(run)
    direct = edits + f.control + f.late + f.intrinsic
    return direct * (1 + f.paraphrases + f.prefixed) + edits * (f.neighbors + f.same_subject * (1 + f.specificity))
