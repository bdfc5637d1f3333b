"""Where a data file named in a study lies: as written, or below $RETENTION_DATA."""

from __future__ import annotations

import os
from pathlib import Path

from retention.records import Malformed, text_of_file
from retention.types import Missing, UserError


def data_file(name: str, where: str, advice: str = "") -> Path:
    """The file, relative to the current directory or else to $RETENTION_DATA. Raises Missing that names both.

    `where` begins the message: which setting names it. `advice` ends it: what else the name may have been meant to be.
    """
    here = Path(name).expanduser()
    root = os.environ.get("RETENTION_DATA")
    places = [here, *([Path(root).expanduser() / name] if root else [])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = " nor ".join(str(place) for place in places)
        hint = "" if root else "; set RETENTION_DATA to the folder that holds it, or give its place"
        raise Missing(f"{where}: no such file: {looked}{hint}{advice}")
    return found


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, packed or not, that are not blank. Raises UserError if it is missing or holds no text."""
    if not path.is_file():
        raise Missing(f"corpus: no such file: {path}")
    try:
        lines = [line for line in text_of_file(path).splitlines() if line.strip()]
    except Malformed as error:
        raise UserError(f"corpus: {path}: {error.reason}") from None
    if not lines:
        raise UserError(f"corpus: {path}: holds no text")
    return lines
