"""The tables and findings in our texts, from the stored tables (CSV) of results/.

    python analysis/cited.py README.md docs/findings.md

A line `<!-- table: KIND STUDY [EDITOR] -->` is above each such table, which is written again. KIND: `held`, what held
at step 0 and was retained; `gains`, retained against gained; `remedies`, each mitigation against none.

`<!-- finding: KIND STUDY [MEASURE] -->` begins and `<!-- end -->` ends a paragraph that is written again, in words that
the tests of the table bear (retention/statistics/wording.py). KIND: `equal_terms`, edited against intrinsic facts,
matched and not; `arms`, each value of the study's axis against its baseline, for a measure (edited, intrinsic, gain);
`recency`, edited against late facts, and relearning. `make figures` runs it.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import mitigations
import pandas as pd
import recency
import tables
from opened import names_of, script

from retention.statistics import wording
from retention.store import write_text
from retention.types import UserError

MARK = re.compile(r"(<!-- table: (\w+) (\w+)(?: ([\w-]+))? -->\n\n?)((?:\|.*\n)*)")
FINDING = re.compile(r"<!-- finding: (\w+) (\w+)(?: (\w+))? -->\n(?:(?!<!--).)*?<!-- end -->\n", re.DOTALL)
WIDTH = 120
AT_0 = {
    "efficacy_at_0": "efficacy", "paraphrase_at_0": "paraphrase", "intrinsic_at_0": "intrinsic",
    "neighbor_at_0": "neighbors", "same_subject_at_0": "same subject",
}  # fmt: skip
KEPT = {"edited_kept": "edited, kept", "intrinsic_kept": "intrinsic, kept"}
UNIT = {"task_accuracy": "accuracy", "task_loss": "nats"}


def varied(found: pd.DataFrame, first: str) -> pd.DataFrame:
    """The columns that tell the lines apart."""
    return found[[n for n in names_of(found, first) if n == "editor" or found[n].nunique() > 1]].copy()


def told(row: pd.Series, name: str, *, signed: bool = False) -> str:
    return tables.told(tables.estimate(row, name), "none right", signed=signed, n=False)


def held(folder: Path, _: str | None) -> pd.DataFrame:
    found = tables.read(folder, "summary", names_end="runs")
    out = varied(found, "runs")
    for name, title in AT_0.items():
        if found[name].notna().any():
            out[title] = [f"{value:.2f}" for value in found[name]]
    for name, title in {**KEPT, "edited_minus_intrinsic": "edited - intrinsic"}.items():
        out[title] = [told(row, name) for _, row in found.iterrows()]
    return out


def gains(folder: Path, _: str | None) -> pd.DataFrame:
    found = tables.read(folder, "pareto", names_end="runs")
    out = varied(found, "runs")
    for name, title in KEPT.items():
        out[title] = [told(row, name) for _, row in found.iterrows()]
    out["gained"] = [f"{row.gain:+.2f} {UNIT[str(row.measure)]}" for row in found.itertuples()]
    return out


def remedies(folder: Path, editor: str | None) -> pd.DataFrame:
    """Bold: lower or higher; italic: within the bound of equality; else the data cannot tell."""
    found = tables.read(folder, "mitigations", names_end="against")
    found["verdict"] = mitigations.judged(found)
    found = found[found["editor"] == editor]
    out: dict[str, dict[str, str]] = {}
    for _, row in found.iterrows():
        measure = str(row["measure"])
        title = KEPT.get(f"{measure}_kept", measure.replace("_", " ").replace(" gain", " gained"))
        text = tables.told(tables.estimate(row, "difference"), "none right", signed=True, n=False)
        about = {wording.LOWER: "**", wording.HIGHER: "**", wording.WITHIN: "*"}.get(row["verdict"].word, "")
        out.setdefault(str(row["mitigations"]), {})[title] = f"{about}{text}{about}"
    return pd.DataFrame([{"remedy": remedy} | line for remedy, line in out.items()])


def equal_terms(folder: Path, _: str | None) -> str:
    """Edited against intrinsic facts, with how many seeds and where n of each cell is."""
    found = tables.read(folder, "forest", names_end="runs")
    said = {name: tables.verdicts(found, name, f"{name}_p", f"{name}_state") for name in ("matched", "unmatched")}
    on = "lead" if "matched_on" in found else "margin over the foil (stored before the lead was read, and not fair)"
    return f"{wording.matched(said['matched'], on)} {wording.unmatched(said['unmatched'], said['matched'])}"


def arms(folder: Path, measure: str | None) -> str:
    """One measure of the study's comparison of arms, with the number of paired seeds."""
    name = next((name for name in mitigations.NAMES if (folder / f"{name}.csv").is_file()), None)
    if name is None:
        raise UserError(f"finding: {folder.name} has no table of arms ({', '.join(mitigations.NAMES)})")
    axis = name.removeprefix("by_")
    found = tables.read(folder, name, names_end="against")
    own = found[(found["measure"] == measure) | found["measure"].str.endswith(f" {measure}")]
    seeds = sorted({int(n) for n in found["seeds"]})
    return f"{' '.join(mitigations.sentences(found, axis, own.index))} n: {wording.span(seeds)} paired seeds."


def recent(folder: Path, _: str | None) -> str:
    """Edited against late facts, and relearning."""
    seeds = sorted(set(tables.read(folder, "recency", names_end="runs")["seeds"]))
    return f"{' '.join(recency.sentences(folder))} n: {wording.span(seeds)} seeds."


FINDINGS: dict[str, Callable[[Path, str | None], str]] = {"equal_terms": equal_terms, "arms": arms, "recency": recent}
KINDS: dict[str, Callable[[Path, str | None], pd.DataFrame]] = {"held": held, "gains": gains, "remedies": remedies}


def written(text: str, results: Path) -> str:
    """The text with its tables written anew. Raises UserError for a mark that names no stored table."""

    def table(match: re.Match[str]) -> str:
        mark, kind, study, editor = match.group(1, 2, 3, 4)
        if kind not in KINDS:
            raise UserError(f"table: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
        found = KINDS[kind](results / study, editor)
        if found.empty:
            raise UserError(f"table: {study} has no line of the editor {editor!r}")
        return f"{mark.rstrip()}\n\n{tables.markdown(found)}\n"

    def finding(match: re.Match[str]) -> str:
        kind, study, measure = match.group(1, 2, 3)
        if kind not in FINDINGS:
            raise UserError(f"finding: unknown kind {kind!r}; expected one of {', '.join(FINDINGS)}")
        mark = f"<!-- finding: {' '.join(filter(None, (kind, study, measure)))} -->"
        return f"{mark}\n\n{textwrap.fill(FINDINGS[kind](results / study, measure), WIDTH)}\n\n<!-- end -->\n"

    if len(FINDING.findall(text)) != text.count("<!-- finding:"):
        raise UserError("finding: a mark without its <!-- end -->; what is between the two is written again")
    return FINDING.sub(finding, MARK.sub(table, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+", help="Markdown files")
    parser.add_argument("--results", type=Path, default=Path("results"), help="a results folder")
    args = parser.parse_args()
    for path in args.texts:
        text = path.read_text(encoding="utf-8")
        write_text(path, written(text, args.results))
        print(f"written: {path} ({len(MARK.findall(text))} tables, {len(FINDING.findall(text))} findings)")


if __name__ == "__main__":
    script(main, "cited")
