"""Draw every figure and table of the studies cited here again, from their stored tables (CSV) alone.

    python analysis/figures.py [results] [--out FOLDER]

Below a results folder each CSV that a script of this folder wrote is drawn by that script's other half; raw rows are
not needed. `git diff results` then shows what has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import by_lead
import dose_response
import fact_map
import fates
import forest
import forgetting_curves
import half_life
import mitigations
import pareto
import replication
import summary
import survival
import weights
from opened import script

from retention.types import UserError

Draw = Callable[[Path, Path], None]
DRAW: dict[str, Draw] = {  # name of the table that a script begins with -> what draws all that belongs to it
    "summary": summary.draw,
    "forgetting_curves": forgetting_curves.draw,
    "survival": survival.draw,
    "forest": forest.draw,
    "by_lead": by_lead.draw,
    "fates": fates.draw,
    "half_life": half_life.draw,
    "fact_map": fact_map.draw,
    "dose_response": dose_response.draw,
    "pareto": pareto.draw,
    "weights": weights.draw,
    "replication": replication.draw,
    **{name: partial(mitigations.draw, name=name) for name in mitigations.NAMES},
}


def stored(results: Path) -> Iterator[tuple[Path, str]]:
    """Folder and name of each table that can be drawn."""
    for path in sorted(results.glob("*/*.csv")):
        if path.stem in DRAW:
            yield path.parent, path.stem


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="a results folder")
    parser.add_argument("--out", type=Path, default=None, help="folder for what is drawn; left out, beside the tables")
    args = parser.parse_args()
    found = list(stored(args.results))
    if not found:
        raise UserError(f"{args.results}: no study with a table that a script of analysis/ wrote ({', '.join(DRAW)})")
    for folder, name in found:
        with contextlib.redirect_stdout(io.StringIO()):
            DRAW[name](folder, args.out / folder.name if args.out else folder)
        print(f"drawn: {folder / name}")


if __name__ == "__main__":
    script(main, "figures")
