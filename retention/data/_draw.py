"""Draw rows to train on and rows that are truly held out. Knows no file and no column."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from retention.types import TaskRows, UserError

Row = dict[str, Any]  # texts; of a conversation also its `messages`
Apart = Literal["prompt", "text"]


@dataclass(frozen=True, kw_only=True)
class Drawn(TaskRows):
    """Rows of a task, and what was left out on the way to them."""

    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> rows of the source that were left out


def draw(
    candidates: Sequence[Row],
    *,
    salt: str,  # seeds the order of the rows, with the run's seed in it
    rows: int,  # to train on, at most
    heldout: int,
    apart: Apart,
    source: str,  # for the errors: where the rows are from
    heldout_candidates: Sequence[Row] | None = None,  # where the source has held-out rows of its own
) -> Drawn:
    """Shuffle by `salt`, take held-out rows first, then rows to train on in the shuffled order.

    No row to train on shares its prompt with a held-out row (apart: prompt), or its prompt and completion (apart: text;
    for plain text always the text), white space aside. Held-out rows are told apart likewise. Rows that this leaves
    out, in all of the source, are counted as `equal_to_heldout`. Raises UserError where the rows do not suffice.
    """
    rng = random.Random(salt)
    pool = list(candidates)
    rng.shuffle(pool)
    what = "text" if pool and "text" in pool[0] else apart  # plain text has no prompt
    if heldout_candidates is None:
        offered: Sequence[Row] = pool
        if len(pool) <= heldout:
            raise UserError(
                f"tune.data: {source}: has {len(pool)} rows; {heldout} are to be held out and some trained on"
            )
    else:
        offered = list(heldout_candidates)
        rng.shuffle(offered)
    held: dict[str, Row] = {}
    for row in offered:
        if len(held) == heldout:
            break
        held.setdefault(same(row, apart), row)
    if len(held) < heldout:
        raise UserError(
            f"tune.data: {source}: gives {len(held)} held-out rows of different {what}; {heldout} were asked for"
        )
    rest = [row for row in pool if same(row, apart) not in held]
    if not rest:
        hint = "; `apart: text` compares prompt and completion" if what == "prompt" else ""
        raise UserError(f"tune.data: {source}: no row to train on has another {what} than the held-out rows{hint}")
    lost = len(pool) - len(rest) - (len(held) if heldout_candidates is None else 0)
    return Drawn(
        train=tuple(rest[:rows]), heldout=tuple(held.values()), dropped={"equal_to_heldout": lost} if lost else {}
    )


def same(row: Row, apart: Apart = "text") -> str:
    """What two rows have in common if one tells the other's answer: white space and `rejected` do not count."""
    text = row["text"] if "text" in row else row["prompt"] if apart == "prompt" else row["prompt"] + row["completion"]
    return " ".join(text.split())
