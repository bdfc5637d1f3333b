"""The memory that each stage of a study needs here, from its settings, its model's shape and its rows' lengths.

The arithmetic is estimate.py's. Loads no model; what is not here is estimated without. Knows nothing of time.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from retention import estimate
from retention.adapters import Adapter, trainable_numbers
from retention.configs import config_of
from retention.data import rows_of
from retention.engines import inline
from retention.estimate import Need, Shape
from retention.model_folder import resolve
from retention.models import HubModel, tokenizer_of
from retention.objectives import Objective
from retention.study import Run, Tune
from retention.texts import join
from retention.trainer_fields import arguments_of
from retention.types import Missing, UserError

CHARACTERS = 4  # of English text a token, about, where the tokenizer is not here
ROW = 32  # tokens of a row of an edit, about
LOGITS = 8192  # for each token of a batch, that the probes hold at once (probes/_forward.py)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What stages will run on."""

    name: str
    memory: float  # GiB
    accelerator: bool


def device() -> Device:
    """The accelerator that stages run on, or the processor where there is none."""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return Device(name=about.name, memory=about.total_memory / estimate.GIB, accelerator=True)
    memory = _memory() / estimate.GIB
    return Device(name="processor", memory=memory, accelerator=False)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


# ------------------------------------------------------------------------------------------------ stages


def needs(stage: inline.Stage, shape: Shape, here: Device, known: Known) -> Iterator[tuple[str, Need]]:
    """What a stage needs, with words that tell it from the other needs of its kind."""
    s = stage.run.settings
    if stage.kind == "prepare":
        score = next(p for p in s.probes if p.name == "score")
        tokens = score.tokens_per_batch
        yield "", estimate.prepare(shape, tokens, tokens * LOGITS)
    elif stage.kind == "edit":
        editor = s.editor
        covariance = getattr(editor, "covariance", None)
        yield (
            stage.run.names["editor"],
            estimate.edit(
                shape,
                layers=edited_layers(s),
                covariance=covariance is not None and covariance.tokens > 0,
                trained=trained(editor, shape),
                batch=rows_at_once(stage.run, shape, here),
            ),
        )
    else:
        for t in s.tunes:
            yield _tune_need(stage.run, t, shape, here, known)


def rows_at_once(run: Run, shape: Shape, here: Device) -> int:
    """Rows of `ROW` tokens that an edit holds at once."""
    edits = edits_of(run)
    editor: Any = run.settings.editor
    if hasattr(editor, "batch_size"):
        return int(min(editor.batch_size, edits))
    rows = rows_of_edit(run.settings)
    if not hasattr(editor, "tokens_per_batch"):
        return rows
    each = estimate.token_bytes(shape.layers, shape.width, shape.mlp, shape.vocabulary)
    tokens = editor.tokens_per_batch or estimate.fixed_tokens(shape.parameters, each, accelerator=here.accelerator)
    return max(rows, min(rows * edits, tokens // ROW))  # an edit is never parted


def rows_of_edit(s: Any) -> int:
    """Rows that an edit is written by: the prompt alone and after each prefix, and the anchors; or the prompt."""
    return 2 + len(s.editor.context_lengths) if hasattr(s.editor, "context_lengths") else 1


def trained(editor: Any, shape: Shape) -> int:
    """Numbers that the editor trains; 0 for one that solves for its update."""
    return int(editor.trained(shape)) if hasattr(editor, "trained") else 0


def edited_layers(s: Any) -> int:
    """Layers that the editor writes into: as given, or as many as its paper has."""
    given = getattr(s.editor, "layers", None)
    if given is not None:
        return len(given)
    return 5 if s.editor.name in ("memit", "alphaedit") else 1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The lengths of a task's rows, tokens: at most, where the data are not here."""

    count: int  # 0: not known
    mean: float
    longest: int


def _tune_need(run: Run, t: Tune, shape: Shape, here: Device, known: Known) -> tuple[str, Need]:
    s = run.settings
    objective: Objective = t.objective or s.objective
    adapter = t.adapter or s.adapter
    arguments = arguments_of(objective, t.trainer)
    rows = known.rows(run, t, arguments)
    batch = int(arguments["per_device_train_batch_size"]) * objective.sequences
    adapted, moving = isinstance(adapter, Adapter), None
    if isinstance(adapter, Adapter):
        moving = known.trainable(adapter, s.model)
    elif kept := sum(m.held(shape, edited_layers(s)) for m in s.mitigations):
        moving = max(shape.parameters - kept, 0)
    optim = str(arguments["optim"])
    need = estimate.tune(
        shape,
        batch=batch,
        length=rows.longest,
        trainable=moving,
        adapter=adapted,
        dtype="bfloat16" if arguments["bf16"] else "float16" if arguments["fp16"] else "float32",
        checkpointing=bool(arguments["activation_checkpointing"]),
        optimizer_bytes=2 if "8bit" in optim else 4 if optim.startswith(("sgd", "lion", "rmsprop", "adagrad")) else 8,
        models=(1 if adapted else objective.models(arguments)) + sum(m.copies for m in s.mitigations),
        fused=objective.fused,
        cpu=not here.accelerator,
        shards=1 if s.launch is None else s.launch.shards,
    )
    if s.launch is not None and s.launch.count > 1:  # each rank holds the whole model that is read beside its share
        need = replace(need, parts={**need.parts, "weights to read": shape.parameters * estimate.FLOAT / estimate.GIB})
    with_ = [m.name for m in s.mitigations if m.copies or m.held(shape, 1)]
    name = " with ".join([f"{objective.name} {adapter.name}", *(["+".join(with_)] if with_ else [])])
    return f"{name}, {batch} rows of up to {rows.longest} tokens", need


class Known:
    """What many stages of a study ask for, each told once: lengths of a task's rows, numbers that an adapter trains."""

    def __init__(self) -> None:
        self._told: dict[str, Any] = {}

    def _once(self, make: Callable[[], Any], *parts: Any) -> Any:
        key = json.dumps([part.model_dump(mode="json") for part in parts])
        if key not in self._told:
            self._told[key] = make()
        return self._told[key]

    def rows(self, run: Run, t: Tune, arguments: Mapping[str, Any]) -> Rows:
        """Lengths as the trainer will see them: cut off at max_length, packed where the objective packs."""
        model = run.settings.model
        found = self._once(lambda: _lengths(t.data, model), t.data, model)
        limit = arguments.get("max_length") or max([1024, *found])
        answer = int(arguments.get("max_completion_length") or 0)  # of objectives that draw answers
        cut = [min(n + answer, limit) for n in found]
        if not cut or arguments.get("packing"):
            return Rows(count=sum(cut) // limit, mean=limit, longest=limit)
        return Rows(count=len(cut), mean=statistics.fmean(cut), longest=max(cut))

    def trainable(self, adapter: Adapter, model: Any) -> int:
        return int(self._once(lambda: trainable_numbers(adapter, config_of(model)), adapter, model))


def _lengths(data: Any, model: Any) -> tuple[int, ...]:
    """Tokens of each row, with the longer of its completions; none where the data are not here.

    By one seed: which rows are drawn hardly matters to their lengths.
    """
    try:
        rows = rows_of(data, model, 0).train
    except Missing:
        return ()
    texts = [
        row["text"] if "text" in row else join(row["prompt"], max(row["completion"], row.get("rejected", ""), key=len))
        for row in rows
    ]
    tokenizer = _tokenizer(model)
    if tokenizer is not None:
        return tuple(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])  # and the end of the text
    return tuple(math.ceil(len(each) / CHARACTERS) + 1 for each in texts)


def _tokenizer(model: Any) -> Any:
    if not isinstance(model, HubModel):
        return None
    try:
        return tokenizer_of(resolve(model.name, model.revision))
    except (UserError, OSError, ValueError):
        return None


def edits_of(run: Run) -> int:
    """Edits that a run writes: all that were drawn, or in regime single one."""
    return 1 if run.only is not None else run.settings.facts.edited
