"""Any data set as downstream data: a file of JSON lines, JSON, CSV or parquet, or a dataset of the Hub at one commit.

Columns become the rows that objectives train on: plain text, prompts and completions (instructions, questions with a
verifiable answer, conversations), or preferences (a rejected completion beside the preferred one). Knows no trainer and
no tokenizer: a conversation becomes plain text, "role: content" on lines of their own, with its messages beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from retention.data import _columns as columns
from retention.data._draw import Apart, Drawn, Row, draw
from retention.data._records import Record, from_file, from_hub
from retention.data.files import data_file
from retention.records import check_pin
from retention.types import Part


class Table(Part):
    """Where the records lie, and which column is what. Rows are drawn by seed, held-out ones first.

    prompt and completion: {prompt: question, completion: answer}
    instructions: {template: "{instruction}\\n{input}\\nAnswer:", completion: output}
    GSM8K: {template: "Question: {question}\\nAnswer:", completion: answer, answer_after: "####"}, or without
      answer_after to train on the whole reasoning
    conversations: {messages: messages}; with tools: {messages: messages, tools: tools}
    preferences: {prompt: prompt, completion: chosen, rejected: rejected}; `prompt: null` where both answers begin with
      the prompt
    plain text: {text: text}
    """

    path: str = Field(description="a file (.jsonl, .json, .csv, .tsv, .parquet); with `revision`: a name on the Hub")
    revision: str | None = Field(None, description="commit of a dataset on the Hub, 40 hexadecimal digits")
    config: str | None = Field(None, description="Hub: configuration of the dataset")
    split: str = Field("train", description="Hub: split, or part of one: train[:5000]")
    heldout_from: str | None = Field(
        None, description="file, or split on the Hub, that held-out rows come from; left out: from the same rows"
    )
    prompt: str | None = Field("prompt", description="column of the prompt; null: both answers begin with it")
    template: str | None = Field(
        None,
        description="the prompt made of columns, {column}, instead of `prompt`; lines without content are left out",
    )
    completion: str = Field("completion", description="column of the completion (of preferences: of the preferred one)")
    rejected: str | None = Field(None, description="column of the dispreferred completion")
    messages: str | None = Field(None, description="column of a conversation, instead of prompt and completion")
    tools: str | None = Field(
        None, description="column of the tools that a conversation may call: a list, or a list as JSON"
    )
    text: str | None = Field(None, description="column of a plain text, instead of prompt and completion")
    answer_after: str | None = Field(
        None, min_length=1, description="the completion is what follows this mark (GSM8K: ####)"
    )
    skip_blank: bool = Field(False, description="leave rows with an empty text out, and count them, not refuse them")
    apart: Apart = Field(
        "prompt", description="held-out rows share with trained ones no prompt; or (text) no whole row"
    )
    rows: int = Field(2000, ge=1, description="rows to train on, at most")
    heldout: int = Field(100, ge=1, description="rows kept for the held-out loss and accuracy")

    @model_validator(mode="after")
    def _one_form(self) -> Table:
        given = self.changed()
        alone: dict[str, set[str]] = {
            "text": {"prompt", "template", "completion", "rejected", "messages", "tools", "answer_after"},
            "messages": {"prompt", "template", "completion", "rejected"},
            "template": {"prompt"},
        }
        for field, others in alone.items():
            clash = sorted(other for other in others & given if getattr(self, other) is not None)
            if getattr(self, field) is not None and clash:
                raise ValueError(f"give `{field}`, or {', '.join(f'`{c}`' for c in clash)}, not both")
        if self.tools is not None and self.messages is None:
            raise ValueError("`tools` belong to a conversation: give `messages`, or leave tools out")
        if self.template is not None:
            columns.template_columns(self.template)
        elif self.prompt is None and self.rejected is None and self.text is None and self.messages is None:
            raise ValueError(
                "prompt: null means that `completion` and `rejected` begin with it: give `rejected`, or name a prompt"
            )
        return self

    @model_validator(mode="after")
    def _pinned(self) -> Table:
        if self.revision is None:
            clash = [name for name in ("config", "split") if name in self.changed()]
            if clash:
                raise ValueError(
                    f"{clash[0]} is of a dataset on the Hub: give its commit as `revision`, or leave {clash[0]} out"
                )
            return self
        check_pin(self.path, self.revision)
        return self

    def files(self) -> list[Path]:
        """The files whose content enters a run's key; none for the Hub, whose commit is among the settings."""
        if self.revision is not None:
            return []
        hint = "; for a dataset on the Hub give its commit as `revision`" if not Path(self.path).suffix else ""
        return [
            data_file(name, "tune.data: dataset", hint) for name in (self.path, self.heldout_from) if name is not None
        ]

    def load(self, seed: int) -> Drawn:
        """Read and draw rows. Raises UserError naming file (or dataset), line or row, and key."""
        dropped: Counter[str] = Counter()
        candidates = self._rows(self._records(self.path, self.split), dropped)
        held = None
        if self.heldout_from is not None:
            path, split = (self.path, self.heldout_from) if self.revision else (self.heldout_from, self.split)
            held = self._rows(self._records(path, split), dropped)
        drawn = draw(
            candidates,
            salt=f"rows {seed}",
            rows=self.rows,
            heldout=self.heldout,
            apart=self.apart,
            source=self.path,
            heldout_candidates=held,
        )
        return Drawn(train=drawn.train, heldout=drawn.heldout, dropped={**dropped, **drawn.dropped})

    def _records(self, path: str, split: str) -> list[Record]:
        if self.revision is not None:
            return from_hub(path, self.config, split, self.revision)
        return from_file(data_file(path, "tune.data: dataset"), path)

    def _rows(self, records: Sequence[Record], dropped: Counter[str]) -> list[Row]:
        make = self._maker()
        rows = []
        for record in records:
            try:
                row = make(record)
            except columns.BlankText:
                if not self.skip_blank:
                    raise
                dropped["blank"] += 1
                continue
            if "rejected" in row and row["rejected"].split() == row["completion"].split():
                dropped["rejected_equals_completion"] += 1  # prefers nothing
                continue
            rows.append(row)
        return rows

    def _maker(self) -> Callable[[Record], Row]:
        text, messages = self.text, self.messages
        if text is not None:
            return lambda record: {"text": columns.text_of(record, text)}
        if messages is not None:
            return lambda record: self._conversation(record, messages)
        return self._answered

    def _answered(self, record: Record) -> Row:
        if self.prompt is None and self.template is None:
            assert self.rejected is not None, "validated: without a prompt there are two answers"
            return self._turned(
                record, self._verified(record, *columns.common_prompt(record, self.completion, self.rejected))
            )
        if self.template is not None:
            prompt = columns.filled(record, self.template)
        else:
            assert self.prompt is not None
            prompt = columns.prompt_of(record, self.prompt)
        answers = [columns.answer_of(record, key) for key in (self.completion, self.rejected) if key is not None]
        return self._turned(record, self._verified(record, prompt, *answers))

    def _turned(self, record: Record, row: Row) -> Row:
        """The row, with its conversation beside it where the record has one: what stands in for it is plain text."""
        turns = columns.conversed(record, self.prompt if self.template is None else None, self.completion)
        if turns is None or self.template is not None:
            return row
        return {**row, "messages": self._said(turns, row)}

    def _conversation(self, record: Record, messages: str) -> Row:
        """As plain text, and with its turns beside it, for an objective that reads a chat."""
        turns = columns.answered(record, messages)
        row = self._verified(record, columns.chat(turns[:-1]), columns.said(turns[-1]))
        tools = columns.tools_of(record, self.tools) if self.tools is not None else []
        return {**row, "messages": self._said(turns, row), **({"tools": tools} if tools else {})}

    def _said(self, turns: Sequence[columns.Message], row: Row) -> list[columns.Message]:
        """The turns, of the last one only what can be verified where that is asked for."""
        last = turns[-1] if self.answer_after is None else {**turns[-1], "content": row["completion"]}
        return [*turns[:-1], last]

    def _verified(self, record: Record, prompt: str, *answers: str) -> Row:
        """The row, with of each answer only what can be verified where that is asked for."""
        mark = self.answer_after
        said = [columns.after(record, answer, mark) if mark is not None else answer for answer in answers]
        return dict(zip(("prompt", "completion", "rejected"), (prompt, *said), strict=False))


class DataSet(Table):
    """The general part: see Table for its forms."""

    name: Literal["dataset"] = "dataset"
