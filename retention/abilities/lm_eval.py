"""Tasks of EleutherAI's lm-evaluation-harness (the package lm-eval) on the model in memory.

The tasks are lm-eval's own or local YAML files; with local data nothing is downloaded. Knows no task.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import io
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from retention.abilities._part import Ability, AbilityScore
from retention.hooks import undisturbed
from retention.types import Part, TaskRows, UserError

FEWSHOT_SEED = 1234  # lm-eval's own default: the examples before a question are the same at every step


class LmEval(Ability):
    """Any lm-eval tasks, read at every checkpoint. Scores are TASK.METRIC, or TASK.METRIC.FILTER."""

    name: Literal["lm_eval"] = "lm_eval"
    tasks: tuple[str, ...] = Field(min_length=1, description="tasks, groups or tags, by their names in lm-eval")
    include_path: str | None = Field(
        None,
        description="a folder with YAML tasks of one's own; all its files are part of the run's key, so keep the data "
        "there too (paths in a YAML file are relative to where the program runs)",
    )
    limit: int | None = Field(None, ge=1, description="documents of each task, at most: the first ones")
    num_fewshot: int | None = Field(
        None, ge=0, description="examples before each question; left out, or where a task insists on none, the task's"
    )
    batch_size: int = Field(8, ge=1, description="texts at once")

    packages: ClassVar[tuple[str, ...]] = ("lm-eval",)

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twice = next((task for task in tasks if tasks.count(task) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is named twice")
        return tasks

    @property
    def labels(self) -> tuple[str, ...]:
        return self.tasks

    def files(self) -> list[Path]:
        if self.include_path is None:
            return []
        found = sorted(p for p in self._folder().rglob("*") if p.is_file())
        return [p for p in found if "__pycache__" not in p.parts]  # that loading the tasks leaves behind

    def check(self, model: Part, seed: int) -> None:
        self._index()

    def reader(self, model: Part, seed: int, trained: Sequence[TaskRows] = ()) -> LmEvalReader:
        """Reads the tasks' documents. Raises UserError if a task or its data cannot be loaded."""
        with _quiet(), _own_rng():
            try:
                loaded = self._index().load(list(self.tasks))
            except UserError:
                raise
            except Exception as error:  # whatever a task's data raise: files, the Hub, templates
                raise UserError(f"abilities: lm_eval: {', '.join(self.tasks)} cannot be loaded: {error}") from error
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None or (self.num_fewshot and task.get_config("num_fewshot")):
                    task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
        return LmEvalReader(loaded=loaded, limit=self.limit, batch_size=self.batch_size)

    def _folder(self) -> Path:
        assert self.include_path is not None
        folder = Path(self.include_path).expanduser()
        if not folder.is_dir():
            raise UserError(f"abilities: lm_eval: include_path: no folder {folder} (relative to {Path.cwd()})")
        return folder

    def _index(self) -> Any:
        """lm-eval's index of all tasks, the user's included. Raises UserError for a task that is not there."""
        folder = None if self.include_path is None else str(self._folder())
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("abilities: lm_eval: needs the package lm-eval: pip install 'retention[lm-eval]'")
        with _quiet(), _own_rng():
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=folder, include_defaults=folder is None)
            if not set(self.tasks) <= set(manager.all_tasks) and folder is not None:
                manager = TaskManager(include_path=folder)
        for task in self.tasks:
            if task not in manager.all_tasks:
                near = difflib.get_close_matches(task, manager.all_tasks, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "; `lm-eval ls tasks` lists what there is"
                raise UserError(f"abilities: lm_eval: tasks: unknown {task!r}{hint}")
        return manager


@dataclass(frozen=True, kw_only=True)
class LmEvalReader:
    loaded: dict[str, Any]  # what lm-eval's TaskManager.load returned
    limit: int | None
    batch_size: int
    # lm-eval sets a tokenizer's padding, so it is given a copy, made once of each: id -> (the original, the copy)
    tokenizers: dict[int, tuple[Any, Any]] = field(default_factory=dict, compare=False, repr=False)

    def read(self, model: Any, tokenizer: Any) -> list[AbilityScore]:
        with _quiet(), _untouched(model):
            from lm_eval.evaluator import evaluate
            from lm_eval.models.huggingface import HFLM

            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            _, own = self.tokenizers.setdefault(id(tokenizer), (tokenizer, copy.deepcopy(tokenizer)))
            found = evaluate(
                lm=HFLM(pretrained=model, tokenizer=own, batch_size=self.batch_size),
                task_dict=self.loaded,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        sizes = {task: counted["effective"] for task, counted in found["n-samples"].items()}
        members = found.get("group_subtasks", {})
        return [
            score
            for task, row in sorted(found["results"].items())
            for score in _scores(task, row, _size(task, sizes, members))
        ]


def _size(task: str, sizes: dict[str, int], members: dict[str, list[str]]) -> int:
    """Documents of a task, or of all tasks of a group."""
    return sizes[task] if task in sizes else sum(_size(member, sizes, members) for member in members.get(task, ()))


def _scores(task: str, row: dict[str, Any], n: int) -> Iterator[AbilityScore]:
    """The metrics of one task; lm-eval's keys are "metric,filter"."""
    for key, value in sorted(row.items()):
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        name = f"{task}.{metric}" + (f".{chosen}" if chosen != "none" else "")
        fine = math.isfinite(value)
        yield AbilityScore(name=name, value=float(value) if fine else None, n=n, state="ok" if fine else "nan")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's progress bars and notices: they would come at every checkpoint."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _own_rng() -> Iterator[None]:
    """Random numbers drawn inside (lm-eval shuffles its tasks' documents) move no generator outside."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Modes, flags and every RNG are restored; lm-eval's call to tie weights does nothing (they are tied)."""
    vars(model)["tie_weights"] = lambda *args, **kwargs: None
    try:
        with _own_rng(), undisturbed(model):
            yield
    finally:
        del vars(model)["tie_weights"]
