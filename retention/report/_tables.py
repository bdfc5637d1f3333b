"""The tables of a report, as texts: every number with its interval and n, every empty cell with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from retention import statistics as st
from retention.report._cells import FIRST, Arm, Cell
from retention.report._read import STAGES, Opened
from retention.statistics import survival, wording
from retention.statistics.wording import Verdict, p_value, told

GAIN = {"task_accuracy": "accuracy", "task_loss": "nats/token"}
MEASURE = {"task_accuracy": "task gain, accuracy", "task_loss": "task gain, nats/token"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a page."""

    caption: str
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    names: int = 1  # leading columns that name the line
    note: str = ""


def named(cell: Cell, varied: Sequence[str]) -> tuple[str, ...]:
    return tuple(cell.study if name == "study" else cell.named.get(name, "-") for name in varied)


def kept(cells: Sequence[Cell], varied: Sequence[str], unmatched: Sequence[Verdict]) -> Table:
    """What was kept in the end, and what the task gained."""
    body = []
    for cell, found in zip(cells, unmatched, strict=True):
        ends = (
            told(cell.kept(g), "none right at step 0") if (g, "direct") in cell.curves else "not asked" for g in FIRST
        )
        gain = (
            f"{told(cell.gain, '', signed=True)} {GAIN[cell.gained]}" if cell.gained and cell.gain else "not measured"
        )
        body.append(
            (
                *named(cell, varied),
                str(len(cell.runs)),
                str(cell.steps),
                *ends,
                told(found.estimate, found.why or "-", signed=True),
                found.short,
                gain,
            )
        )
    return Table(
        caption="Kept at the last step, of the facts right at step 0",
        head=(
            *varied, "runs", "steps", "edited, kept", "intrinsic, kept", "edited − intrinsic, unmatched", "verdict",
            "task gain",
        ),
        body=tuple(body), names=len(varied),
        note=f"Share [95 % interval] (n facts; of the task gain, n runs). Edited − intrinsic is unmatched. "
        f"{wording.SELECTION}",
    )  # fmt: skip


def fair(cells: Sequence[Cell], varied: Sequence[str], matched: Sequence[Verdict]) -> Table:
    """Edited minus intrinsic: unmatched, matched, by regression."""
    body = []
    for cell, found in zip(cells, matched, strict=True):
        f = cell.fair
        body.append(
            (
                *named(cell, varied), told(f.matched.difference, f.states["matched"] or "-", signed=True), found.short,
                told(f.regression, f.states["regression"], signed=True),
                told(f.unmatched, f.states["unmatched"] or "-", signed=True),
            )
        )  # fmt: skip
    return Table(
        caption="Edited minus intrinsic, on equal terms",
        head=(*varied, "matched (n pairs)", "verdict, matched", "regression", "unmatched"),
        body=tuple(body), names=len(varied),
        note="Matched: pairs within run and relation that start with nearly the same lead over the best other token, "
        "answer length and frequency. Regression: mean effect of being edited at equal lead, length and frequency. "
        f"Unmatched: {wording.SELECTION}",
    )  # fmt: skip


def at_0(cells: Sequence[Cell], varied: Sequence[str]) -> Table:
    """What was right just after the edit."""
    asked = list(dict.fromkeys(key for cell in cells for key in cell.curves))
    body = [
        (
            *named(cell, varied),
            *(told(cell.at_0(*k), "not measured") if k in cell.curves else "not asked" for k in asked),
        )
        for cell in cells
    ]
    head = tuple(group if form == "direct" else f"{group}, {form}" for group, form in asked)
    return Table(
        caption="Right at step 0, just after the edit, of all facts", head=(*varied, *head), body=tuple(body),
        names=len(varied), note="Share [95 % interval] (n facts).",
    )  # fmt: skip


def criteria(cells: Sequence[Cell], varied: Sequence[str]) -> Table:
    """What was kept in the end by every criterion, side by side."""
    there = [c for c in st.CRITERIA if any(c in found for cell in cells for found in cell.curves.values())]
    body = []
    for cell in cells:
        for group in (g for g in FIRST if (g, "direct") in cell.curves):
            found = cell.curves[group, "direct"]
            ends = (told(found[c].end, "none right at step 0") if c in found else "not measured" for c in there)
            body.append((*named(cell, varied), group, *ends))
    return Table(
        caption="Kept at the last step, by every criterion",
        head=(*varied, "facts", *(c.replace("_", " ") for c in there)),
        body=tuple(body), names=len(varied) + 1,
        note="Each of the facts right at step 0 by the same criterion. Share [95 % interval] (n facts).",
    )  # fmt: skip


def lives(cells: Sequence[Cell], varied: Sequence[str]) -> Table:
    """Half-lives of edited and intrinsic facts."""
    body = []
    for cell in cells:
        found = {group: survival.lifetimes(cell.rows, group, cell.criterion) for group in FIRST}
        p = survival.log_rank(found["edited"], found["intrinsic"])
        for group in (g for g in FIRST if (g, "direct") in cell.curves):
            half = survival.half_life(found[group])
            text = half.state
            if half.value is not None and half.low is not None and half.high is not None:
                beyond = "" if half.state == "ok" else " (beyond the last checkpoint)"
                text = f"{_steps(half.value)} [{_steps(half.low)}, {_steps(half.high)}]{beyond}"
            body.append((*named(cell, varied), group, f"{half.lost}, {half.n}", text, p_value(p)))
    return Table(
        caption="Time to forgetting", head=(*varied, "facts", "lost, n", "half-life, steps", "p (log-rank)"),
        body=tuple(body), names=len(varied) + 1,
        note="A fact right at step 0 is lost at the first checkpoint that finds it wrong. Half-life of a Weibull law "
        "[95 %, over runs; of one run over its facts]. Log-rank: edited against intrinsic, facts as units, unmatched.",
    )  # fmt: skip


def _steps(x: float) -> str:
    """A number of steps; the interval of one that is hardly told may be vast."""
    return "over a million" if x > 1e6 else f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def arms(found: Sequence[Arm], axis: str) -> Table:
    """Each value of an axis against its baseline."""
    context = list(dict.fromkeys(name for arm in found for name in arm.context))
    body = []
    for arm in found:
        c = arm.found
        means = f"{c.arm:.2f}, {c.against:.2f}" if c.arm is not None and c.against is not None else "-"
        body.append(
            (
                *(arm.context.get(name, "-") for name in context), arm.name,
                MEASURE.get(arm.measure, f"{arm.measure}, kept"),
                told(c.difference, arm.state or "-", signed=True), means,
                str(c.runs), p_value(c.p_t), p_value(arm.q), p_value(c.p_seeds),
            )
        )  # fmt: skip
    return Table(
        caption=f"{axis}: each against {found[0].against}, the same seed and the same facts",
        head=(
            *context, axis, "of", "difference", f"with it, with {found[0].against}", "paired runs", "p (t)", "q",
            "p (sign flips)",
        ),
        body=tuple(body), names=len(context) + 2,
        note="Mean difference over facts right at step 0 in both [95 % interval] (n pairs of facts; of a gain, runs). "
        "p: Student's t over runs, and an exact permutation of their signs; q: Benjamini and Hochberg's over all "
        "lines of the same measure. One pair of runs has an interval over facts, and no p.",
    )  # fmt: skip


def runs(studies: Sequence[Opened], varied: Sequence[str]) -> Table:
    """Every run, complete or not."""
    body = []
    for study in studies:
        for run in study.runs.sort_values("complete", kind="stable").to_dict("records"):  # what is missing comes first
            record = study.records["runs"].get(str(run["run_id"]))
            seconds = sum(float(t["seconds"]) for t in record["training"]) if record else None
            name = tuple(study.name if n == "study" else str(run.get(n, "-")) for n in varied)
            only = "" if run.get("only") is None or run["only"] != run["only"] else f", edit {int(run['only'])}"
            body.append(
                (
                    *name,
                    f"{run['seed']}{only}",
                    run["state"],
                    f"{seconds:.1f} s" if seconds is not None else "-",
                    str(run["run_id"]),
                    run["why"] or "-",
                )
            )
    return Table(
        caption="Runs", head=(*varied, "seed", "state", "fine-tuning", "run", "what failed"), body=tuple(body),
        names=len(varied),
    )  # fmt: skip


def made_with(study: Opened) -> Table:
    """Versions, hardware and seconds, from the records of the stages."""
    body: list[tuple[str, ...]] = []
    for kind, _, stage in STAGES:
        records = study.records[kind].values()
        if not records:
            body.append((stage, "none complete", "-", "-", "-"))
            continue
        devices = sorted({str(r.get("device", "unknown")) for r in records})
        versions = sorted({", ".join(f"{k} {v}" for k, v in r.get("versions", {}).items()) for r in records})
        threads = sorted({str(_threads(r)) for r in records})
        body.append(
            (
                stage,
                f"{len(records)}",
                _seconds(kind, list(records)),
                "; ".join(devices) + f" ({', '.join(threads)} threads)",
                "; ".join(versions),
            )
        )
    return Table(
        caption="Stages, time, hardware, versions",
        head=("stage", "complete", "time", "device", "versions"),
        body=tuple(body),
    )


def _threads(record: Mapping[str, Any]) -> Any:
    return record.get("threads", record.get("settings", {}).get("threads", "unknown"))


def _seconds(kind: str, records: Sequence[Mapping[str, Any]]) -> str:
    if kind == "bases":
        return "not recorded"
    if kind == "edits":
        total = sum(float(r.get("seconds", 0)) for r in records)
    else:
        total = sum(float(t["seconds"]) for r in records for t in r["training"])
    return f"{total:.0f} s" if total < 7200 else f"{total / 3600:.1f} h"


def differing(studies: Sequence[Opened]) -> Table:
    """The settings in which two studies differ, key by key."""
    flat = [_flat(yaml.safe_load(s.settings) if s.settings else {}) for s in studies]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    differ = [key for key in keys if len({one.get(key, "-") for one in flat}) > 1]
    return Table(
        caption="Settings that differ", head=("setting", *(s.name for s in studies)),
        body=tuple((key, *(one.get(key, "-") for one in flat)) for key in differ),
        note="" if differ else "The two studies have the same settings.",
    )  # fmt: skip


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """A document's leaves by dotted path; a list is a leaf."""
    if isinstance(value, Mapping) and value:
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")}
