"""Which source reads a given fact file: told from the keys of its first record. For use outside a study."""

from __future__ import annotations

from pathlib import Path

from retention.facts._read import read_records
from retention.facts._source import FileFacts
from retention.facts.chronoedit import ChronoEdit
from retention.facts.counterfact import CounterFact
from retention.facts.jsonl import JsonLines
from retention.facts.knowedit import KnowEdit
from retention.facts.mquake import MQuAKE
from retention.facts.popqa import PopQA
from retention.facts.qaedit import QAEdit
from retention.facts.s2rke import S2RKE
from retention.facts.wikibigedit import WikiBigEdit
from retention.facts.zsre import ZsRE
from retention.types import FactPool


def read_pool(path: str | Path) -> FactPool:
    """Facts and edits of a file in the form of any source that reads files.

    Raises UserError that names the file, and the line of a malformed record.
    """
    return source_of(Path(path))(path=str(path)).pool(0)


def source_of(path: Path) -> type[FileFacts]:
    """The source that reads a file, by the keys of its first record; plain JSON lines where none is known by them."""
    first = read_records(path)[0].fields
    has = {key for key, value in first.items() if value is not None}
    if isinstance(first.get("requested_rewrite"), list):  # a case of several edits; CounterFact's is one object
        return MQuAKE
    known: tuple[tuple[bool, type[FileFacts]], ...] = (
        ("requested_rewrite" in has, CounterFact),
        ("Star_Topology" in has, S2RKE),
        ({"subj", "prop", "obj"} <= has, PopQA),
        ({"tag", "subject"} <= has and bool({"update", "ans"} & has), WikiBigEdit),
        ({"kind", "time"} <= has, ChronoEdit),
        ({"src", "alt"} <= has, ZsRE),
        (bool({"case_id", "relation_candidates", "locality_prompt"} & has), CounterFact),
        ("object" in has, JsonLines),
        (isinstance(first.get("locality"), list) or bool({"target", "answer"} & has), QAEdit),
        (bool({"concept", "portability", "locality", "ground_truth"} & has), KnowEdit),
    )
    return next((source for fits, source in known if fits), JsonLines)
