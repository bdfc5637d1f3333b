"""The page itself: what `page.html` shows, and what `page.js` reads. All that comes from data is escaped.

Texts go through Jinja's escaping; what the script reads is JSON in a script element, with every `<`, `>` and `&`
written as an escape, and the script only ever sets text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from retention import statistics as st
from retention.report import _tables as tables
from retention.report._cells import Cell, Point, arms_of, cells_of, criterion_of, order, points_of
from retention.report._charts import COLORS, CYCLE, DASHES, SHAPES, bundle, specs
from retention.report._histories import READINGS, histories
from retention.report._read import Opened, opened
from retention.report._words import Finding, finding, verdicts
from retention.store import write_text
from retention.types import UserError

PANELS = 12  # shown at a time


def write(
    studies: Sequence[str | Path], *, out: str | Path | None = None, criterion: str | None = None, most: int = READINGS
) -> Path:
    """Write the report of one study, or of two side by side; returns its file.

    studies: their folders. out: the file; left out, report.html in the study's folder, or of two compare-<second>.html
    in the first one's. criterion: of the headline and the tables; left out, the first that was measured. most: readings
    of single facts that are put into the file. Raises UserError.
    """
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise UserError(f"a report needs {error.name}: pip install 'retention[report]'") from None
    found = _told_apart([opened(Path(path)) for path in studies])
    name = "report.html" if len(found) == 1 else f"compare-{found[1].folder.name}.html"
    path = Path(out) if out is not None else found[0].folder / name
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --out wants a file, such as {path / 'report.html'}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; --out wants a file in a folder that is there")
    write_text(path, html(found, criterion, most))
    return path


def _told_apart(studies: list[Opened]) -> list[Opened]:
    """Two studies of one name (of two results folders) are named with their folders."""
    if len({s.name for s in studies}) == len(studies):
        return studies
    if len({s.folder.resolve() for s in studies}) < len(studies):
        raise UserError(f"{studies[0].folder}: the same study twice; --compare wants two")
    return [replace(s, name=f"{s.folder.parent.name or '.'}/{s.name}") for s in studies]


def html(studies: Sequence[Opened], criterion: str | None = None, most: int = READINGS) -> str:
    """The page as text."""
    import jinja2

    chosen = [criterion_of(s.rows, criterion) if s.rows is not None else None for s in studies]
    by_study = [cells_of(s, c) if c is not None else [] for s, c in zip(studies, chosen, strict=True)]
    arms = [arms_of(s, c) if c is not None else (None, [], "") for s, c in zip(studies, chosen, strict=True)]
    findings = [_found(s, own, c, arm) for s, own, c, arm in zip(studies, by_study, chosen, arms, strict=True)]
    told = [line for own in by_study for line in zip(own, *verdicts(own), strict=True)]
    told.sort(key=lambda line: order(line[0]))  # two studies' cells of the same name side by side
    cells, unmatched, matched = [c for c, _, _ in told], [u for _, u, _ in told], [m for _, _, m in told]
    varied = _varied(studies, cells)
    shown: list[tables.Table] = []
    if cells:
        shown = [tables.kept(cells, varied, unmatched), tables.fair(cells, varied, matched), tables.at_0(cells, varied)]
        shown += [tables.criteria(cells, varied), tables.lives(cells, varied)]
        for study, (axis, of_axis, _) in zip(studies, arms, strict=True):
            if axis is not None and of_axis:
                shown.append(_named(tables.arms(of_axis, axis), study, len(studies)))
    facts = histories(studies, most)
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    data = _data(cells, varied, chosen, facts)
    return environment.get_template("page.html").render(
        unpaired=[_of(s, why, len(studies)) for s, (_, _, why) in zip(studies, arms, strict=True) if why and cells],
        title=" and ".join(s.name for s in studies), studies=studies, findings=findings, tables=shown,
        state=[_state(s) for s in studies], runs=tables.runs(studies, varied), differing=_differing(studies),
        made=[_named(tables.made_with(s), s, len(studies)) for s in studies], data=_json(data), varied=varied,
        choices=data["choices"], facts=facts, css=(here / "page.css").read_text(encoding="utf-8"),
        js=(here / "page.js").read_text(encoding="utf-8"), bundle=bundle() if cells else "", has_cells=bool(cells),
        criterion=next((c for c in chosen if c), None),
    )  # fmt: skip


def _found(study: Opened, cells: Sequence[Cell], criterion: str | None, arms: Any) -> Finding:
    left = int((~study.runs["complete"]).sum())
    if study.rows is not None and criterion is None:
        return Finding(
            headline="Nothing was read that could be right or wrong: the study has neither of score and generate.",
            sentences=(),
            cautions=(),
        )
    return finding(cells, arms[1], arms[0], criterion or "", left)


def _of(study: Opened, text: str, many: int) -> str:
    return f"{study.name}: {text}" if many > 1 else text


def _named(table: tables.Table, study: Opened, many: int) -> tables.Table:
    return replace(table, caption=_of(study, table.caption, many))


def _differing(studies: Sequence[Opened]) -> tables.Table | None:
    return tables.differing(studies) if len(studies) > 1 else None


def _varied(studies: Sequence[Opened], cells: Sequence[Cell]) -> list[str]:
    """What cells differ in: `study` where there are two, the editor always."""
    columns = list(dict.fromkeys(name for s in studies for name in s.columns))
    values = {
        name: {str(v) for s in studies if name in s.runs for v in s.runs[name]} | ({"-"} if cells and any(
            name not in c.named for c in cells) else set())
        for name in columns
    }  # fmt: skip
    return ["study"] * (len(studies) > 1) + [n for n in columns if n == "editor" or len(values[n]) > 1]


def _state(study: Opened) -> dict[str, Any]:
    tally = study.runs["state"].value_counts().to_dict()
    return {"total": len(study.runs), "complete": int(tally.get("complete", 0))} | {
        "rest": ", ".join(f"{n} {state}" for state, n in tally.items() if state != "complete")
    }


def _data(
    cells: Sequence[Cell], varied: Sequence[str], chosen: Sequence[str | None], facts: dict[str, Any]
) -> dict[str, Any]:
    """What the script reads."""
    points = list(points_of(list(cells)))
    groups = list(dict.fromkeys(p.group for p in points))
    criteria = [c for c in st.CRITERIA if any(p.criterion == c for p in points)]
    forms = sorted({p.form for p in points}, key=lambda form: (form != "direct", form))
    names = [tables.named(cell, varied) for cell in cells]
    order = {name: list(dict.fromkeys(line[i] for line in names)) for i, name in enumerate(varied)}
    for values in order.values():
        values.sort(key=lambda value: value != "none")
    return {
        "varied": list(varied), "cells": names, "values": order, "groups": groups, "criteria": criteria, "forms": forms,
        "criterion": next((c for c in chosen if c), None), "panels": PANELS,
        "points": _packed(points, groups, criteria, forms), "fair": _fair(cells), "gains": [_gain(c) for c in cells],
        "facts": facts, "colors": COLORS, "cycle": CYCLE, "shapes": SHAPES, "dashes": DASHES,
        "specs": specs() if cells else {},
        "choices": {"criterion": criteria, "form": forms, "group": groups, **order},
    }  # fmt: skip


def _packed(points: Sequence[Point], groups: list[str], criteria: list[str], forms: list[str]) -> list[list[Any]]:
    """Columns: cell, group, form, criterion, of (0 kept, 1 all), step (null: the end), value, low, high, n."""
    lines = [
        (
            p.cell, groups.index(p.group), forms.index(p.form), criteria.index(p.criterion), int(p.of == "all"), p.step,
            round(p.estimate.value, 4), round(p.estimate.low, 4), round(p.estimate.high, 4), p.estimate.n,
        )
        for p in points
    ]  # fmt: skip
    return [list(column) for column in zip(*lines, strict=True)] if lines else [[] for _ in range(10)]


def _fair(cells: Sequence[Cell]) -> list[list[Any]]:
    """Lines: cell, how, value, low, high, n."""
    out: list[list[Any]] = []
    for number, cell in enumerate(cells):
        f = cell.fair
        how = {"matched": f.matched.difference, "regression": f.regression, "unmatched": f.unmatched}
        out += [[number, name, _finite(e.value), _finite(e.low), _finite(e.high), e.n] for name, e in how.items() if e]
    return out


def _gain(cell: Cell) -> list[Any] | None:
    if cell.gain is None:
        return None
    return [cell.gained, _finite(cell.gain.value), _finite(cell.gain.low), _finite(cell.gain.high), cell.gain.n]


def _finite(x: float) -> float | None:
    return round(float(x), 4) if x == x and abs(x) != float("inf") else None


def _json(data: Any) -> str:
    """JSON that is safe within a script element. Raises ValueError on NaN, which it lacks."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
