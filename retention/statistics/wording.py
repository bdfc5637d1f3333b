"""Estimates and p-values as people read them, in tables and reports alike. Knows no table."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import false_discovery_control

from retention.statistics.intervals import Estimate


def told(estimate: Estimate | None, why: str, *, signed: bool = False, n: bool = True) -> str:
    """An estimate with its interval and n, or why there is none; never NaN."""
    if estimate is None:
        return why
    form = "+z.2f" if signed else "z.2f"  # z: no minus before a zero
    count = f" ({estimate.n})" if n else ""
    if estimate.low != estimate.low:
        return f"{estimate.value:{form}} [one run]{count}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]{count}"


def p_value(p: float | None) -> str:
    """A p-value."""
    if p is None or p != p:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def adjusted(p: Sequence[float | None]) -> list[float | None]:
    """Benjamini and Hochberg's (1995) q of each p that is known; None where it is None or NaN."""
    known = {i: float(x) for i, x in enumerate(p) if x is not None and x == x}
    if not known:
        return [None] * len(p)
    q = dict(zip(known, false_discovery_control(list(known.values()), method="bh"), strict=True))
    return [float(q[i]) if i in q else None for i in range(len(p))]
