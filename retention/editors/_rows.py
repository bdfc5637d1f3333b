"""The token rows that an edit is written with, and how rows of unequal length are put together in batches.

Knows no model and no editing method. A row is cut where nothing more can matter: after the last token that is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from retention.tokens import encode, subject_last
from retention.types import Edit, UserError, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PUBLISHED_ANCHOR = "{} is a"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text of one edit. Positions are indices into `ids`."""

    edit: int  # index of the edit
    ids: tuple[int, ...]
    at: int  # the subject's last token, where the key is read and the value is placed
    bare: bool  # written without a generated prefix
    direct: bool = False  # the direct prompt, bare: what v0, the residual and the reported probability are read from
    targets: tuple[tuple[int, int], ...] = ()  # (position, the token that should follow it)
    keep: tuple[int, ...] = ()  # positions whose next-token distribution is to be kept


def statement_rows(tokenizer: PreTrainedTokenizerFast, edits: Sequence[Edit], prefixes: Sequence[str]) -> list[Row]:
    """Every edit's direct prompt bare and after each prefix, then its further prompts bare; each with its new target.

    The last target token is not among the ids: nothing is read after it. Row 0 of each edit is the bare direct prompt.
    Raises UserError for a target or a subject that has no token.
    """
    rows = []
    for index, edit in enumerate(edits):
        direct, *others = edit.prompts
        subject = edit.fact.subject
        texts = [("", direct), *((prefix, direct) for prefix in prefixes), *(("", other) for other in others)]
        for i, (prefix, prompt) in enumerate(texts):
            joint = edit.fact.joint
            text = encode(tokenizer, prefix + fill(prompt, subject), edit.target, joint=joint)
            if text.answer_start >= len(text.ids):
                raise UserError(f"the target {edit.target!r} of {edit.fact.id} has no token")
            at = subject_last(tokenizer, prompt, subject, prefix, edit.target, joint)
            targets = tuple((j - 1, text.ids[j]) for j in range(text.answer_start, len(text.ids)))
            rows.append(Row(edit=index, ids=text.ids[:-1], at=at, bare=not prefix, direct=i == 0, targets=targets))
    return rows


def anchor_rows(tokenizer: PreTrainedTokenizerFast, edits: Sequence[Edit]) -> list[Row]:
    """The prompts whose next-token distribution an edit is to keep (KL rows).

    The published anchor `{} is a` is read at the subject's last token, as published (the words after it are never
    looked at). Any other anchor asks something after the subject and is read at its own last token, where it is
    answered.
    """
    rows = []
    for index, edit in enumerate(edits):
        for anchor in edit.anchors:
            at = subject_last(tokenizer, anchor, edit.fact.subject)
            ids = encode(tokenizer, fill(anchor, edit.fact.subject)).ids
            read = at if anchor == PUBLISHED_ANCHOR else len(ids) - 1
            rows.append(Row(edit=index, ids=ids[: read + 1], at=at, bare=True, keep=(read,)))
    return rows


def merged(rows: Sequence[Row]) -> list[Row]:
    """Anchors that begin another row of the same edit are read off that row: in a causal model they are the same."""
    kept = [row for row in rows if row.targets]
    for row in (row for row in rows if not row.targets):
        for i, other in enumerate(kept):
            if other.edit == row.edit and other.at == row.at and other.ids[: len(row.ids)] == row.ids:
                kept[i] = replace(other, keep=other.keep + row.keep)
                break
        else:
            kept.append(row)
    return kept


@dataclass
class _Plan:
    cost: float
    groups: list[list[int]] = field(default_factory=list)


def batches(lengths: Sequence[int], overhead: float = 16.0) -> list[list[int]]:
    """Put items of these lengths together so that padding plus `overhead` (in tokens) per batch is least.

    Returns lists of indices. Exact, by dynamic programming over the distinct lengths.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    distinct = sorted(set(lengths))
    members = [[i for i in order if lengths[i] == length] for length in distinct]
    best = [_Plan(0.0)]
    for end in range(1, len(distinct) + 1):
        options = []
        for start in range(end):
            together = [i for group in members[start:end] for i in group]
            cost = best[start].cost + len(together) * distinct[end - 1] + overhead
            options.append(_Plan(cost, [*best[start].groups, together]))
        best.append(min(options, key=lambda plan: plan.cost))
    return best[-1].groups
