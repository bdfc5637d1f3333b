"""A replication's table beside the paper's figures, with the paper's own criteria where they differ from ours.

    python analysis/replication.py results/STUDY --paper wen2025|cheng2025|ge2024 [--out FOLDER]

Writes replication.csv and replication.md, and prints the table. The paper's figures are of other models and budgets:
they stand beside ours to be compared in direction, not in value. Where none could be read, the table says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tables
from opened import Opened, drawn_from, parser, script

from retention import statistics as st
from retention.store import write_text
from retention.types import UserError


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a paper."""

    what: str
    value: str
    source: str


CHENG = "arXiv:2511.05852 v4, second-hand"
# Second-hand: read in summaries of the papers, whose tables could not be read. See the studies' first lines.
FIGURES: dict[str, tuple[Figure, ...]] = {
    "wen2025": (
        Figure(what="edited kept, Llama3-8B, ROME", value="0.374", source="arXiv:2507.14198, second-hand"),
        Figure(what="intrinsic kept, the same", value="0.824", source="arXiv:2507.14198, second-hand"),
        Figure(what="edited kept, fine-tuning editor", value="0.634", source="arXiv:2507.14198, second-hand"),
        Figure(what="intrinsic kept, the same", value="0.831", source="arXiv:2507.14198, second-hand"),
    ),
    "cheng2025": (
        Figure(what="relative loss of efficacy, full", value="0.381", source=f"{CHENG}, Table 4"),
        Figure(what="relative loss of efficacy, LoRA", value="0.287", source=f"{CHENG}, Table 4"),
        Figure(what="relative loss of efficacy, DoRA", value="0.299", source=f"{CHENG}, Table 4"),
        Figure(what="edit flip ratio, GPT-J, MEMIT, zsRE, 10,000, LoRA", value="0.156", source=f"{CHENG}, Table 5"),
        Figure(what="edit flip ratio, GPT-J, AlphaEdit, the same", value="0.253", source=f"{CHENG}, Table 5"),
    ),
    "ge2024": (
        Figure(what="LoRA on MLPs against attention", value="MLPs better", source="arXiv:2406.04496, in words"),
        Figure(what="injection against modification", value="injection harder", source="arXiv:2406.04496"),
        Figure(what="freeze tuning, injection", value="weak", source="arXiv:2406.04496"),
        Figure(what="retention after a fine-tune", value="not studied", source="arXiv:2406.04496"),
    ),
}  # fmt: skip


def rouge1(said: str, before: str) -> float:
    """ROUGE-1 F of two texts: overlap of their words, lower case, punctuation at words' ends aside. Two empty: 1."""
    a, b = (Counter(w.strip(".,;:!?\"'()").lower() for w in text.split()) for text in (said, before))
    if not a or not b:
        return float(a == b)
    common = sum((a & b).values())
    return 2 * common / (sum(a.values()) + sum(b.values()))


def locality(cell: pd.DataFrame, step: int, group: str = "neighbor") -> float | None:
    """Mean ROUGE-1 of what is said about a group at a step against what the base model said; None without answers."""
    near = cell[(cell["group"] == group) & (cell["form"] == "direct")].dropna(subset="generated")
    at = {s: near[near["step"] == s].set_index(["run_id", "question_id"])["generated"] for s in (-1, step)}
    both = pd.concat([at[-1].rename("before"), at[step].rename("after")], axis=1, join="inner")
    return None if both.empty else float(sum(map(rouge1, both["after"], both["before"])) / len(both))


def line(cell: pd.DataFrame, paper: str) -> dict[str, object]:
    """Our figures for one cell of a grid: fair ones, then those by the paper's own criteria."""
    end = int(cell["step"].max())
    estimates = {
        "efficacy at 0": st.share(st.counts(cell, "edited", 0, "all_correct", given=None)),
        "paraphrase at 0": st.share(st.counts(cell, "edited", 0, "all_correct", form="paraphrase", given=None)),
        "edited kept": st.share(st.counts(cell, "edited", None, "all_correct")),
        "intrinsic kept": st.share(st.counts(cell, "intrinsic", None, "all_correct")),
    }
    if paper == "wen2025":  # the original's two different criteria, of all facts: not to be compared with each other
        estimates["edited, first token"] = st.share(st.counts(cell, "edited", None, "first_correct", given=None))
        if cell["gen_contains"].notna().any():
            found = st.share(st.counts(cell, "intrinsic", None, "gen_contains", given=None))
            estimates["intrinsic, generated text contains"] = found
    if paper == "cheng2025":
        estimates["edited kept, prefers target (ES)"] = st.share(st.counts(cell, "edited", None, "prefers_target"))
    out: dict[str, object] = {"runs": cell["run_id"].nunique(), "last step": end}
    for name, e in estimates.items():
        out[name] = "none" if e is None else f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}] ({e.n})"
    if paper == "cheng2025":
        # Of the edits that were right before fine-tuning, the share that is not after it; and what the share of right
        # ones among all edits has lost, in which an edit that becomes right stands for one that was lost. The paper
        # judges CounterFact by ES, zsRE token by token, for which every token right is the nearest here.
        for criterion, said in (("prefers_target", "by ES"), ("all_correct", "by every token")):
            kept = st.share(st.counts(cell, "edited", None, criterion))
            before, after = (st.share(st.counts(cell, "edited", step, criterion, given=None)) for step in (0, None))
            out[f"edit flip ratio, {said}"] = "none" if kept is None else f"{1 - kept.value:.2f}"
            lost = None if not before or not after or not before.value else 1 - after.value / before.value
            out[f"relative loss of efficacy, {said}"] = "none" if lost is None else f"{lost:.2f}"
    if paper == "ge2024":
        for group in ("neighbor", "intrinsic"):  # an injected fact has no old object, and so no neighbors
            for step in (0, end):
                value = locality(cell, step, group)
                at = "0" if step == 0 else "the end"
                out[f"locality (ROUGE-1), {group}, at {at}"] = "none" if value is None else f"{value:.2f}"
        hops = st.share(st.counts(cell, "two_hop", 0, "all_correct", given=None))
        out["two-hop at 0"] = "none" if hops is None else f"{hops.value:.2f} ({hops.n})"
    return out


def markdown(frame: pd.DataFrame, paper: str) -> str:
    head = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + " --- |" * len(frame.columns)]
    ours = [*head, *("| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False))]
    theirs = ["| the paper | figure | source |", "| --- | --- | --- |"]
    theirs += [f"| {f.what} | {f.value} | {f.source} |" for f in FIGURES[paper]]
    return "\n".join(
        ["Ours, share [95 % interval] (n facts); kept: of those right at step 0.", "", *ours, "", *theirs, ""]
    )


def compute(study: Opened, paper: str) -> None:
    lines = [study.named(cell) | line(cell.rows, paper) for cell in study.cells]
    tables.keep(study.out, "replication", pd.DataFrame(lines).assign(paper=paper))


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, "replication", names_end="paper")  # all text: numbers are written with their interval
    text = markdown(found.drop(columns="paper"), str(found["paper"].iloc[0]))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "replication.md", text)
    print(text)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--paper", choices=sorted(FIGURES), default=None, help="whose figures stand beside ours")
    args = arguments.parse_args()
    if args.paper is None and not args.from_summary:
        raise UserError(f"--paper: say whose figures stand beside ours: {', '.join(sorted(FIGURES))}")
    draw(*drawn_from(args, lambda study: compute(study, args.paper)))


if __name__ == "__main__":
    script(main, "replication")
