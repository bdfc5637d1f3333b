"""What a study will do before any of it is done: its stages, what they share, the memory and the time they need.

Nothing is fetched or loaded. What is not here is named; keys that rest on it are provisional, and the rest is planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retention import estimate, half, preflight
from retention.configs import config_of
from retention.engines import inline
from retention.estimate import Need, Shape
from retention.hours import Clock, add, duration, product_speed
from retention.ids import model_id, provisional
from retention.model_folder import NotFetched
from retention.models import HubModel
from retention.needs import Known, device, needs
from retention.stages import Bench
from retention.store import Store
from retention.study import Study
from retention.types import Missing, UserError

LINES = 3  # needs of one stage and model that are told one by one


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study, planned."""

    study: Study
    stages: Sequence[inline.Stage]
    presets: Sequence[str]  # settings that the study leaves open, and where they are from
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
        from_presets, study = preflight.from_presets(study, exact=True), preflight.settled(study)
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
        needed: dict[str, dict[str, Need]] = {model.name: {} for model in models}
        known = Known()
        clock = Clock(store, shapes, throughput, here, known)
        hours: dict[str, float | None] = {}
        for stage in stages:
            shape = shapes[stage.run.settings.model]
            if shape is not None:
                for label, need in needs(stage, shape, here, known):
                    old = needed[stage.run.settings.model.name].get(label)
                    if old is None or need.total > old.total:
                        needed[stage.run.settings.model.name][label] = need
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
    notes += savings(study)
    refusals = []
    if here.accelerator:
        for name, found in needed.items():
            each = {need.stage: [n for n in found.values() if n.stage == need.stage] for need in found.values()}
            said = (estimate.advice(group, 0.9 * here.memory) for group in each.values())
            refusals += [f"{name}: {text}" for text in said if text]
    return Plan(
        study=study, stages=stages, models=told, presets=from_presets, hours=hours, basis=clock.basis(),
        notes=notes, missing=files,
        needs={name: sorted(found.items(), key=lambda item: -item[1].total) for name, found in needed.items()},
        refusals=refusals,
    )  # fmt: skip


def savings(study: Study) -> list[str]:
    """What bfloat16 would save where this machine has it and the study does not use it."""
    used = {
        "edit": all(run.settings.precision.edit == "bfloat16" for run in study.runs),
        "train": all(t.trainer.get("bf16") or t.trainer.get("fp16") for run in study.runs for t in run.settings.tunes),
        "read": all(run.settings.precision.read == "bfloat16" for run in study.runs),
    }
    could = [stage for stage, already in used.items() if not already]
    if not could or not half.native():
        return []
    times = product_speed(torch.bfloat16) / product_speed(torch.float32)
    wanted = ", ".join(f"{stage}: bfloat16" for stage in could)
    return [
        f"bfloat16 products are {times:.1f} times as fast as float32's here: precision: {{{wanted}}} would use them"
    ]


def text(plan: Plan) -> Iterator[str]:
    """For people, line by line."""
    yield f"{plan.study.name}: {plan.study.question}" if plan.study.question else plan.study.name
    for kind, what in (("prepare", "base reading"), ("edit", "distinct edit"), ("tune", "fine-tune")):
        of_kind = [s for s in plan.stages if s.kind == kind]
        hours = plan.hours.get(kind, 0.0)
        left = sum(not s.done for s in of_kind)
        cost = "" if not left else ", time not known" if hours is None else f", {duration(hours)} left"
        yield f"  {len(of_kind):4d} {what}{'s' * (len(of_kind) != 1)}, {len(of_kind) - left} done{cost}"
    yield from (f"  time: {line}" for line in plan.basis if any(not s.done for s in plan.stages))
    for name, told in plan.models.items():
        yield f"  model: {told}"
        for kind in ("prepare", "edit", "tune"):
            found = [(label, need) for label, need in plan.needs[name] if need.stage == kind]
            yield from (f"    {need}, {label}" if label else f"    {need}" for label, need in found[:LINES])
            if len(found) > LINES:
                yield f"    {kind}: {len(found) - LINES} more need less"
    yield from (f"  editor: {line}" for line in plan.presets)
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


def shape_of(model: Any) -> Shape | None:
    """From the table of published models, else from the model's config; None where it is in neither."""
    known = estimate.published(model.name) if isinstance(model, HubModel) else None
    try:
        return known or estimate.shape_of(config_of(model))
    except Missing:
        return None


def _described(model: Any, shape: Shape | None, key: str, absent: bool) -> str:
    size = "of unknown size" if shape is None else f"{shape.parameters / 1e6:,.1f} million numbers"
    state = f"not here: key {key[:8]} is provisional" if absent else key[:8]
    return f"{model.name} ({state}), {size}"
