"""Each fact's own history: its questions, and what every run answered at every checkpoint, packed for a page.

Texts are stored once. Where a study has more readings than fit, edited and intrinsic facts come first, and what is left
out is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from retention import statistics as st
from retention.report._cells import FIRST
from retention.report._read import Opened

READINGS = 40_000  # in one page, about 25 bytes each


def histories(studies: Sequence[Opened], most: int = READINGS) -> dict[str, Any]:
    """What the page's script reads: runs, facts, questions, and a reading for each question, run and step.

    runs: [name, steps]. facts: [subject, relation, prompt, target, new target]. questions: [fact, group, form, text,
    answer, foil, readings]; readings: [run, right, log-probability, of the foil, rank, text], each a list over the
    run's steps; right is one string, at each step 1, 0 or - for each criterion that was measured.
    """
    criteria = [c for c in st.CRITERIA if any(s.rows is not None and s.rows[c].notna().any() for s in studies)]
    out: dict[str, Any] = {"criteria": criteria, "runs": [], "facts": [], "questions": [], "texts": []}
    out |= {"all": sum(_asked(s) for s in studies), "left_out": 0}
    texts: dict[str, int] = {}
    share = most // max(len(studies), 1)
    for study in studies:
        if study.rows is None or study.questions is None or study.facts is None:
            continue
        _add(out, texts, study, criteria, share, several=len(studies) > 1)
    out["texts"] = list(texts)
    out["left_out"] = out["all"] - len(out["questions"])
    return out


def _asked(study: Opened) -> int:
    return 0 if study.rows is None else len(study.rows[["base_id", "question_id"]].drop_duplicates())


def _add(
    out: dict[str, Any], texts: dict[str, int], study: Opened, criteria: list[str], most: int, *, several: bool
) -> None:
    rows, facts, questions = study.rows, study.facts, study.questions
    assert rows is not None
    assert facts is not None
    assert questions is not None
    rows = rows.astype(dict.fromkeys(("run_id", "base_id", "group", "form"), str))
    asked = (
        rows.groupby(["base_id", "question_id", "fact_id", "group", "form"], sort=False)
        .size()
        .rename("n")
        .reset_index()
    )
    first = {group: i for i, group in enumerate(FIRST)}
    asked["order"] = asked["group"].map(first).fillna(len(FIRST)) * 2 + (asked["form"] != "direct")
    asked = asked.sort_values("order", kind="stable")
    asked = asked[asked["n"].cumsum() <= most]
    text_of = {(str(q["base_id"]), q["question_id"]): q for q in questions.to_dict("records")}
    fact_of = {(str(f["base_id"]), f["fact_id"]): f for f in facts.to_dict("records")}
    varied = [name for name in study.columns if name == "editor" or rows[name].astype(str).nunique() > 1]
    run_at, step_at = {}, {}
    for run_id, part in rows.drop_duplicates(["run_id", "step"]).groupby("run_id", sort=True):
        line = part.iloc[0]
        name = " · ".join([study.name] * several + [str(line[n]) for n in varied] + [f"seed {line['seed']}"])
        steps = sorted(int(s) for s in part["step"])
        run_at[run_id], step_at[run_id] = len(out["runs"]), {s: i for i, s in enumerate(steps)}
        out["runs"].append([name, steps])
    chosen = rows.merge(asked[["base_id", "question_id", "order"]], on=["base_id", "question_id"])
    chosen = chosen.sort_values(["order", "base_id", "question_id", "run_id", "step"], kind="stable")
    columns = {
        name: chosen[name].to_list() for name in ("base_id", "question_id", "fact_id", "group", "form", "run_id")
    }
    columns |= _packed(chosen, criteria, texts)
    fact_at: dict[tuple[str, str], int] = {}
    question_at: dict[tuple[str, str], list[Any]] = {}
    for cells in zip(*columns.values(), strict=True):
        base, question_id, fact_id, group, form, run_id, step, *reading = cells
        if (base, question_id) not in question_at:
            question, key = text_of.get((base, question_id), {}), (base, fact_id)
            if key not in fact_at:
                fact = fact_of.get(key, {})
                fact_at[key] = len(out["facts"])
                out["facts"].append(
                    [_text(fact.get(k)) for k in ("subject", "relation", "prompt", "target", "new_target")]
                )
            told = [_text(question.get(k)) for k in ("text", "answer", "foil")]
            question_at[base, question_id] = [fact_at[key], group, form, *told, []]
            out["questions"].append(question_at[base, question_id])
        readings = question_at[base, question_id][-1]
        if not readings or readings[-1][0] != run_at[run_id]:
            readings.append([run_at[run_id], *([None] * len(step_at[run_id]) for _ in reading)])
        for place, value in zip(readings[-1][1:], reading, strict=True):
            place[step_at[run_id][step]] = value
    for packed in question_at.values():
        for reading in packed[-1]:
            reading[1] = "".join(x or "-" * len(criteria) for x in reading[1])


def _packed(rows: pd.DataFrame, criteria: list[str], texts: dict[str, int]) -> dict[str, list[Any]]:
    """The measures as the page reads them: lists over rows."""
    marks = [["-" if pd.isna(x) else "01"[bool(x)] for x in rows[c].to_list()] for c in criteria]
    out: dict[str, list[Any]] = {"step": rows["step"].to_list()}
    out["right"] = ["".join(m) for m in zip(*marks, strict=True)] if marks else [""] * len(rows)
    for name in ("logp_target", "logp_foil"):
        out[name] = [round(x, 2) if math.isfinite(x) else None for x in rows[name].astype(float).to_list()]
    out["rank"] = [None if pd.isna(x) else int(x) for x in rows["target_rank"].to_list()]
    said = rows["generated"].to_list()
    out["said"] = [texts.setdefault(x, len(texts)) if isinstance(x, str) else None for x in said]
    return out


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
