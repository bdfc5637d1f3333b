"""Records of a data file (JSON lines, JSON, CSV, parquet) or of a Hub dataset, each with the place it stands at.

Text files may be compressed: .gz, .xz or .zst behind the ending of their format.

Knows nothing about what the records mean, nor how a caller words its errors: it gives places and reasons. JSON and CSV
are read here, so that an error can name the line; parquet and the Hub go through `datasets`, which never runs code of a
dataset and works offline on what lies in its cache.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

COMPRESSED = (".gz", ".xz", ".zst")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One record as it was read (an object, unless the file holds something else), and where it stands."""

    where: str  # "line 3", "record 3", "row 3"; all count from 1
    value: Any


class Malformed(Exception):
    """What was read is no data. Callers say which file or dataset it was."""

    def __init__(self, where: str, reason: str, column: int | None = None) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where  # as in Item; "" where it is the whole file
        self.reason = reason
        self.column = column  # from 1, where it is known


def items_of_file(path: Path) -> list[Item]:
    """All records of a file; the format goes by its ending, and JSON (lines, or one array) is the rest.

    Blank lines are passed over. An empty cell of CSV or TSV is None, as in parquet. Raises Malformed, and OSError for a
    file that is not there.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    text = text_of_file(path)
    format = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if format in (".csv", ".tsv"):
        return list(_csv(text, "\t" if format == ".tsv" else ","))
    return list(_json(text))


def text_of_file(path: Path) -> str:
    """The text of a UTF-8 file, unpacked if its name ends in one of `COMPRESSED`.

    Raises Malformed for what is neither, and OSError for a file that is not there.
    """
    raw = path.read_bytes()
    if path.suffix in COMPRESSED:
        try:
            raw = _unpacked(raw, path.suffix)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise Malformed("", f"not a whole {path.suffix} file ({error})") from None
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise Malformed(f"line {line}", f"not UTF-8 text ({error.reason})") from None


def _unpacked(raw: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.decompress(raw)
    if ending == ".xz":
        return lzma.decompress(raw)
    with pa.CompressedInputStream(pa.BufferReader(raw), "zstd") as stream:
        return bytes(stream.read())


def items_of_hub(name: str, config: str | None, split: str, revision: str, file: str | None = None) -> list[Item]:
    """All records of one split of a dataset at one commit. `file`: only this data file of it.

    Raises Malformed with the reason of `datasets`.
    """
    if Path(name).exists():
        raise Malformed(
            "",
            "`revision` asks for a dataset of the Hub, but there is a file or folder of that name here, which "
            "`datasets` would read instead. Leave `revision` out to read a file, or work in another folder",
        )
    import datasets

    one = {} if file is None else {"data_files": file}
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision, **one)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Malformed("", f"could not be loaded from the Hub at {revision}: {reason}") from error
    return [Item(where=f"row {i}", value=row) for i, row in enumerate(rows, 1)]


def check_pin(path: str, revision: str) -> None:
    """Raises ValueError unless `revision` is a whole commit and `path` a name on the Hub."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"revision: expected a commit, 40 hexadecimal digits, got {revision!r}: a branch or tag may move, "
            "and equal settings shall mean equal rows"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise ValueError(f"path: with `revision` a name on the Hub is expected, OWNER/NAME; got {path!r}")


def _json(text: str) -> Iterator[Item]:
    if text.lstrip()[:1] == "[":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise Malformed(f"line {error.lineno}", f"not JSON ({error.msg})", error.colno) from None
        yield from (Item(where=f"record {n}", value=value) for n, value in enumerate(values, 1))
        return
    for n, line in enumerate(text.split("\n"), 1):  # not splitlines(): a text may hold U+2028, which JSON allows
        if line.strip():
            try:
                yield Item(where=f"line {n}", value=json.loads(line))
            except json.JSONDecodeError as error:
                reason = f"not JSON ({error.msg}); one whole object a line was expected, or one array in the file"
                raise Malformed(f"line {n}", reason, error.colno) from None


def _csv(text: str, delimiter: str) -> Iterator[Item]:
    """The first line names the columns; a quoted cell may span lines, and its record stands where it begins."""
    csv.field_size_limit(2**31 - 1)  # the module refuses cells of more than 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = next(reader, [])
    start = reader.line_num + 1
    for cells in reader:
        if cells:
            if len(cells) != len(header):
                raise Malformed(f"line {start}", f"has {len(cells)} cells; the first line names {len(header)}")
            values = (cell if cell.strip() else None for cell in cells)
            yield Item(where=f"line {start}", value=dict(zip(header, values, strict=True)))
        start = reader.line_num + 1


def _parquet(path: Path) -> list[Item]:
    import datasets

    try:
        # Streamed: a file of one's own is not copied into the cache of `datasets`.
        rows = list(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    except ValueError as error:
        raise Malformed("", f"not a parquet file: {error}") from None
    return [Item(where=f"row {i}", value=value) for i, value in enumerate(rows, 1)]
