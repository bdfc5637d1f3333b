"""Retention as a function of where facts start: a curve of edited and one of intrinsic facts, and the gap between them.

Facts right at step 0 are grouped by their lead there. Within a group of nearly equal leads, intrinsic facts have lost
the advantage or handicap of where they begin: the gap says what being edited changes. Reads `matching.fact_table`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from retention.statistics.intervals import Estimate
from retention.statistics.matching import counts_of
from retention.statistics.shares import difference, share

BINS = 6
LEAST = 5  # facts of each group that a gap needs


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Facts that start with nearly the same lead."""

    low: float  # nats; leads of the bin are above it (the first: from it on)
    high: float  # nats, included
    lead: float  # mean over both groups, nats
    edited: Estimate | None  # share kept at the last step; None: no such fact
    intrinsic: Estimate | None
    gap: Estimate | None  # edited minus intrinsic; None: fewer than LEAST facts of either


def by_lead(table: pd.DataFrame, *, bins: int = BINS) -> list[Bin]:
    """Bins of equally many facts of both groups together, by lead. Empty where no lead was read.

    Shares, gaps and intervals are those of `shares`: runs are the unit of replication.
    """
    if table.empty or table["lead"].isna().any():
        return []
    lead, edited = table["lead"].to_numpy(float), table["edited"].to_numpy() == 1
    edges = np.unique(np.quantile(lead, np.linspace(0, 1, bins + 1)))
    if len(edges) == 1:
        edges = np.repeat(edges, 2)
    place = np.clip(np.searchsorted(edges, lead, side="left") - 1, 0, len(edges) - 2)
    found = []
    for i in range(len(edges) - 1):
        inside = place == i
        if not inside.any():
            continue
        one, two = (counts_of(table, np.flatnonzero(inside & group)) for group in (edited, ~edited))
        enough = min(len(one.right), len(two.right)) >= LEAST
        found.append(
            Bin(
                low=float(edges[i]), high=float(edges[i + 1]), lead=float(lead[inside].mean()),
                edited=share(one), intrinsic=share(two), gap=difference(one, two) if enough else None,
            )
        )  # fmt: skip
    return found
