"""Which source reads a given fact file: told from the keys of its first record. For use outside a study."""

from __future__ import annotations

from pathlib import Path

from retention.facts._read import read_records
from retention.facts.counterfact import CounterFact
from retention.facts.jsonl import JsonLines
from retention.facts.mquake import MQuAKE
from retention.facts.zsre import ZsRE
from retention.types import FactPool, UserError


def read_pool(path: str | Path) -> FactPool:
    """Facts and edits of a CounterFact (nested or flat), MQuAKE, zsRE or plain JSON lines file.

    Raises UserError that names the file, and the line of a malformed record.
    """
    path = Path(path)
    first = next(iter(read_records(path)), None)
    if first is None:
        raise UserError(f"{path}: holds no record")
    keys = set(first.fields)
    if isinstance(first.fields.get("requested_rewrite"), list):  # a case of several edits; CounterFact's is one object
        return MQuAKE(path=str(path)).pool(0)
    if "requested_rewrite" in keys or {"ground_truth", "target_new"} <= keys:
        return CounterFact(path=str(path)).pool(0)
    if {"src", "alt"} <= keys:
        return ZsRE(path=str(path)).pool(0)
    return JsonLines(path=str(path)).pool(0)
