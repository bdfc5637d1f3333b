"""What a base holds on disk besides its readings: the facts that were drawn, what is asked of them, and the edits.

Texts are stored once; probe rows refer to them by id.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retention.facts.draw import Draw
from retention.store import write_json, write_table
from retention.types import Edit, Fact, Question

FACTS = pa.schema(
    [(n, pa.string()) for n in ("fact_id", "subject", "relation", "prompt", "target", "new_target")]
    + [("paraphrases", pa.list_(pa.string())), ("phrasings", pa.list_(pa.string()))]
    + [("exposures", pa.int32()), ("tags", pa.list_(pa.string())), ("popularity", pa.float64()), ("joint", pa.string())]
)
QUESTIONS = pa.schema([(n, pa.string()) for n in ("question_id", *Question.__dataclass_fields__)])


def write_draw(folder: Path, drawn: Draw) -> None:
    """facts.parquet and questions.parquet: all texts, once; and edits.json, from which the edits are read again."""
    new = {e.fact.id: e.target for e in (*drawn.edits, *drawn.late)}
    facts = [
        {
            "fact_id": f.id,
            "subject": f.subject,
            "relation": f.relation,
            "prompt": f.prompt,
            "target": f.target,
            "new_target": new.get(f.id),
            "paraphrases": list(f.paraphrases),
            "phrasings": list(f.phrasings),
            "exposures": f.exposures,
            "tags": sorted(f.tags),
            "popularity": f.popularity,
            "joint": f.joint,
        }
        for f in drawn.facts.values()
    ]
    write_table(folder / "facts.parquet", pa.Table.from_pylist(facts, schema=FACTS))
    questions = [
        {"question_id": q.id, **{n: getattr(q, n) for n in QUESTIONS.names if n != "question_id"}}
        for q in drawn.questions
    ]
    write_table(folder / "questions.parquet", pa.Table.from_pylist(questions, schema=QUESTIONS))
    for name, edits in (("edits", drawn.edits), ("late", drawn.late)):
        kept = [{"fact_id": e.fact.id, "target": e.target, "prompts": e.prompts, "anchors": e.anchors} for e in edits]
        write_json(folder / f"{name}.json", kept)


def read_draw(folder: Path, only: int | None = None) -> Draw:
    """The facts that `prepare` drew. only: the place of the one edit that is written (regime single)."""
    facts = {}
    for row in pq.read_table(folder / "facts.parquet").to_pylist():
        facts[row["fact_id"]] = Fact(
            id=row["fact_id"],
            subject=row["subject"],
            relation=row["relation"],
            prompt=row["prompt"],
            target=row["target"],
            paraphrases=tuple(row["paraphrases"]),
            phrasings=tuple(row["phrasings"]),
            exposures=row["exposures"],
            tags=frozenset(row["tags"]),
            popularity=row.get("popularity"),  # bases made before these were kept have no such columns
            joint=row.get("joint"),
        )
    questions = []
    for row in pq.read_table(folder / "questions.parquet").to_pylist():
        question = Question(**{n: row.get(n) for n in Question.__dataclass_fields__})
        questions.append(question)
    edits, late = (
        [
            Edit(fact=facts[e["fact_id"]], target=e["target"], prompts=tuple(e["prompts"]), anchors=tuple(e["anchors"]))
            for e in json.loads((folder / f"{name}.json").read_text())
        ]
        for name in ("edits", "late")
    )
    if only is not None:  # this edit, what stands beside it, and the facts that no edit touches
        mine, others = edits[only].fact.id, {e.fact.id for e in edits} - {edits[only].fact.id}
        edits = [edits[only]]
        questions = [
            q for q in questions if (q.edit_of or mine) == mine and not (q.group == "edited" and q.fact_id in others)
        ]
    return Draw(edits=tuple(edits), late=tuple(late), facts=facts, questions=tuple(questions), dropped={})
