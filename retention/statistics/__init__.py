"""What counts as kept and forgotten, and how sure one can be. Reads tables of probe rows; knows no model.

What fits curves and regressions is imported by its own name (`retention.statistics.survival`, say): it costs a second.
"""

from retention.statistics.equivalence import BOUND
from retention.statistics.gains import MEASURES, task_gains
from retention.statistics.intervals import Estimate, mean_estimate
from retention.statistics.paired import (
    AGAINST,
    AXES,
    Comparison,
    arms_by_arguments,
    arms_of,
    baseline_of,
    compare,
    context_columns,
    pair_runs,
    paired_means,
    paired_questions,
)
from retention.statistics.shares import (
    CELL,
    CRITERIA,
    Counts,
    asked,
    cell_columns,
    check_criterion,
    counts,
    difference,
    share,
)

# Raised when equal rows would give other numbers; every stored table names the version that it was computed with.
VERSION = 2

__all__ = [
    "VERSION",
    "BOUND",
    "CRITERIA",
    "CELL",
    "Estimate",
    "Counts",
    "asked",
    "counts",
    "share",
    "difference",
    "mean_estimate",
    "cell_columns",
    "check_criterion",
    "MEASURES",
    "task_gains",
    "AXES",
    "AGAINST",
    "Comparison",
    "arms_by_arguments",
    "arms_of",
    "baseline_of",
    "context_columns",
    "pair_runs",
    "paired_questions",
    "compare",
    "paired_means",
]
