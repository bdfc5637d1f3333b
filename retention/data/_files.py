"""Where a data file named in a study lies: as written, or below $RETENTION_DATA."""

from __future__ import annotations

import os
from pathlib import Path

from retention.types import UserError


def data_file(name: str, source: str) -> Path:
    """The file, relative to the current directory or else to $RETENTION_DATA. Raises UserError that names both."""
    here = Path(name).expanduser()
    root = os.environ.get("RETENTION_DATA")
    places = [here, *([Path(root).expanduser() / name] if root else [])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = " nor ".join(str(place) for place in places)
        hint = "" if root else "; set RETENTION_DATA to the folder that holds it, or give its place"
        raise UserError(f"tune.data: {source}: no such file: {looked}{hint}")
    return found
