"""Any local JSON lines file as downstream data: prompts and completions, or plain text, under keys that one names."""

from __future__ import annotations

import difflib
import json
import random
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from retention.data.files import data_file
from retention.types import Part, TaskRows, UserError


class JsonLines(Part):
    """Rows for objective sft (prompt and completion) or clm (text). Rows are drawn by seed, held-out ones first."""

    name: Literal["jsonl"] = "jsonl"
    path: str = Field(description="a file with one JSON object a line, or one JSON array of objects")
    prompt: str = Field("prompt", description="key of the prompt")
    completion: str = Field("completion", description="key of the completion")
    text: str | None = Field(None, description="key of a plain text, instead of prompt and completion")
    rows: int = Field(2000, ge=1, description="rows to train on, at most")
    heldout: int = Field(100, ge=1, description="rows kept for the held-out loss and accuracy")

    @model_validator(mode="after")
    def _one_form(self) -> JsonLines:
        if self.text is not None and {"prompt", "completion"} & self.model_fields_set:
            raise ValueError("jsonl: give `text`, or `prompt` and `completion`, not both")
        return self

    def files(self) -> list[Path]:
        return [data_file(self.path, "jsonl")]

    def load(self, seed: int) -> TaskRows:
        """Read and draw rows. Raises UserError naming file, line and key."""
        keys = {"text": self.text} if self.text is not None else {"prompt": self.prompt, "completion": self.completion}
        rows = [self._row(record, where, keys) for where, record in self._records()]
        if len(rows) <= self.heldout:
            raise UserError(
                f"tune.data: {self.path}: has {len(rows)} rows; {self.heldout} are to be held out and some trained on"
            )
        random.Random(f"rows {seed}").shuffle(rows)
        return TaskRows(heldout=tuple(rows[: self.heldout]), train=tuple(rows[self.heldout :][: self.rows]))

    def _records(self) -> list[tuple[str, Any]]:
        try:
            text = self.files()[0].read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"tune.data: {self.path}: not UTF-8 text ({error.reason})") from None
        if text.lstrip().startswith("["):
            try:
                return [(f"record {i}", record) for i, record in enumerate(json.loads(text), 1)]
            except json.JSONDecodeError as error:
                raise UserError(f"tune.data: {self.path}: line {error.lineno}: not JSON: {error.msg}") from None
        out = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): a text may hold U+2028
            if line.strip():
                try:
                    out.append((f"line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise UserError(f"tune.data: {self.path}: line {number}: not JSON: {error.msg}") from None
        return out

    def _row(self, record: Any, where: str, keys: dict[str, str]) -> dict[str, str]:
        row = {}
        for name, key in keys.items():
            if not isinstance(record, dict) or not isinstance(record.get(key), str) or not record[key].strip():
                have = sorted(record) if isinstance(record, dict) else []
                near = difflib.get_close_matches(key, have, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; its keys are {', '.join(have) or 'none'}"
                raise UserError(f"tune.data: {self.path}: {where}: expected a text under {key!r}{hint}")
            row[name] = record[key]
        return row
