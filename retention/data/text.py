"""Plain text as downstream data: a local file, cut into rows of a given number of characters at line ends."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from retention.data._draw import Drawn, draw
from retention.data.files import data_file
from retention.types import Part, UserError


class Text(Part):
    """Rows of plain text for objective clm. Rows are drawn by seed; held-out rows are never among the trained ones."""

    name: Literal["text"] = "text"
    path: str = Field(description="a text file, UTF-8")
    rows: int = Field(2000, ge=1, description="rows to train on, at most")
    heldout: int = Field(100, ge=1, description="rows kept for the held-out loss")
    characters: int = Field(400, ge=20, description="length of a row, about: rows end at line ends")

    def files(self) -> list[Path]:
        return [data_file(self.path, "tune.data: text")]

    def load(self, seed: int) -> Drawn:
        """Cut the file into rows and draw from them. Raises UserError if it has too few."""
        blocks: list[str] = [""]
        try:
            text = self.files()[0].read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"tune.data: {self.path}: not UTF-8 text ({error.reason})") from None
        for line in text.splitlines():
            if line.strip():
                blocks[-1] = f"{blocks[-1]}\n{line.strip()}" if blocks[-1] else line.strip()
            if len(blocks[-1]) >= self.characters:
                blocks.append("")
        blocks = [b for b in blocks if b]
        return draw(
            [{"text": b} for b in blocks],
            salt=f"text {seed}",
            rows=self.rows,
            heldout=self.heldout,
            apart="text",
            source=f"{self.path} in blocks of {self.characters} characters",
        )
