"""Compute and draw every table and figure of the studies cited here again, from what is stored of them.

    python analysis/figures.py [results] [--out FOLDER]

A study with an excerpt (retention/excerpt.py) has each of its tables (CSV) computed anew from it and drawn; of a study
without one the stored tables are drawn as they are. `git diff results` then shows what has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import by_lead
import dose_response
import fact_map
import fates
import forest
import forgetting_curves
import half_life
import mitigations
import pareto
import recency
import replication
import summary
import survival
import weights
from opened import Opened, opened, parser, script

from retention import excerpt
from retention.types import UserError

Compute = Callable[[Opened], object]
Draw = Callable[[Path, Path], None]
SCRIPTS: tuple[ModuleType, ...] = (
    summary, forgetting_curves, survival, forest, by_lead, fates, recency, half_life, fact_map, dose_response, pareto,
    weights,
)  # fmt: skip
DRAW: dict[str, Draw] = {  # name of the table that a script begins with -> what draws all that belongs to it
    **{module.__name__: module.draw for module in SCRIPTS},
    "replication": replication.draw,
    **{name: partial(mitigations.draw, name=name) for name in mitigations.NAMES},
}
COMPUTE: dict[str, Compute] = {  # what computes it; a replication rests on texts, which no excerpt has
    **{module.__name__: module.compute for module in SCRIPTS},
    **{n: partial(mitigations.compute, axis=n.removeprefix("by_")) for n in mitigations.NAMES},
}


def stored(results: Path) -> Iterator[tuple[Path, str]]:
    """Folder and name of each table that can be drawn."""
    for path in sorted(results.glob("*/*.csv")):
        if path.stem in DRAW:
            yield path.parent, path.stem


def computed(folder: Path, names: list[str], out: Path) -> Path:
    """Where a study's tables are, after those that its excerpt can give are computed into `out`."""
    known = [name for name in names if name in COMPUTE]
    if excerpt.at(folder / excerpt.FOLDER) is None or not known:
        return folder
    study = opened(parser(__doc__).parse_args([str(folder / excerpt.FOLDER), "--out", str(out)]))
    for name in known:
        COMPUTE[name](study)
    return out


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("results", type=Path, nargs="?", default=Path("results"), help="a results folder")
    arguments.add_argument("--out", type=Path, default=None, help="folder for all of it [default: the results folder]")
    args = arguments.parse_args()
    found = list(stored(args.results))
    if not found:
        raise UserError(f"{args.results}: no study with a table that a script of analysis/ wrote ({', '.join(DRAW)})")
    for folder in dict.fromkeys(folder for folder, _ in found):
        names, out = [name for other, name in found if other == folder], (args.out or args.results) / folder.name
        with contextlib.redirect_stdout(io.StringIO()):
            source = computed(folder, names, out)
            for name in names:
                DRAW[name](source if name in COMPUTE else folder, out)
        print(f"drawn: {folder}: {', '.join(names)}")


if __name__ == "__main__":
    script(main, "figures")
