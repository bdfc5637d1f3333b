"""One YAML file and its overrides become a validated Study and its list of runs.

A study is data: settings at the top level, and under `grid` lists of values for any of them. A run is one cell: a plain
dict of settings, whose canonical JSON keys everything that is computed for it. All mistakes are reported at once, each
with its path, before anything is computed. Knows nothing of how a stage works.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from retention.abilities import AnyAbility, distinct
from retention.adapters import AnyAdapter, Full
from retention.data import AnyData
from retention.data.leakage import Leakage
from retention.editors import AnyEditor
from retention.explain import explain, infinite, nearest
from retention.facts import AnyFacts
from retention.half import Precision
from retention.labels import differing, labels_of, short_name
from retention.late import Late
from retention.launch import Launch
from retention.mitigations import AnyMitigation
from retention.models import HubModel
from retention.objectives import AnyObjective, Sft
from retention.probes import AnyProbe
from retention.regimes import AnyRegime, Batch, Single
from retention.relearn import Relearn
from retention.types import UserError, content_id
from retention.world import WorldModel
from retention.world.facts_model import FactModel
from retention.yaml_file import apply_overrides, read_yaml, with_value

EMBEDDED = ("world", "facts")  # models that we pretrain; any other name is a folder or a Hub name


def _model_kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return name if name in EMBEDDED else "hub"


AnyModel = Annotated[
    Annotated[WorldModel, Tag("world")] | Annotated[FactModel, Tag("facts")] | Annotated[HubModel, Tag("hub")],
    Discriminator(_model_kind),
]

CHATTING = ("sft", "dpo", "kto")  # objectives whose trainers read turns
RESERVED = ("bases", "edits", "runs", "failed")  # folders of the store itself
NAMED = {  # settings whose value may be written as just the part's name, and the union that it must be one of
    "model": AnyModel,
    "facts": AnyFacts,
    "editor": AnyEditor,
    "objective": AnyObjective,
    "adapter": AnyAdapter,
    "regime": AnyRegime,
}


class Until(BaseModel):
    """Stop once the held-out loss of the task is low enough (arXiv 2507.14198 trained until 3 nats a token)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: float = Field(gt=0, description="nats a token, on the task's held-out rows")
    every: int = Field(10, ge=1, description="steps between two looks at it")


class Tune(BaseModel):
    """One downstream fine-tune: what it trains on, for how long, and by which arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: AnyData
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    epochs: float | None = Field(None, gt=0, description="passes over the rows, instead of steps")
    tokens: int | None = Field(None, ge=1, description="training tokens that are not padding, instead of steps")
    until: Until | None = Field(None, description="end sooner, once a held-out loss is reached")
    heldout_tokens: int = Field(
        1024, ge=1, description="tokens that count of the held-out rows read at each step; rows are read in their order"
    )
    leakage: Leakage = Field(default=Leakage(), description="what is done about rows that mention the run's facts")
    trainer: dict[str, Any] = Field(default_factory=dict, description="passed through to the trl trainer's config")
    objective: AnyObjective | None = Field(None, description="of this fine-tune; left out, the run's")
    adapter: AnyAdapter | None = Field(None, description="of this fine-tune; left out, the run's")
    chat: bool = Field(
        False,
        description="rows are conversations, by the tokenizer's template: their messages, or prompt and completion",
    )
    min_share: float = Field(
        0.9, ge=0, le=1, description="refuse if max_length leaves a smaller share of the rows to train on"
    )

    @model_serializer(mode="wrap")
    def _without_idle(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is at its default and younger than stored results: keys stay."""
        found: dict[str, Any] = dump(self)
        idle = {"chat": False, "min_share": 0.9}
        return {k: v for k, v in found.items() if k not in idle or v != idle[k]}

    @model_validator(mode="after")
    def _one_budget(self) -> Tune:
        given = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of steps, epochs and tokens; got {' and '.join(given) or 'none'}")
        scheduler = self.trainer.get("lr_scheduler_type", "constant")
        if self.tokens is not None and not str(scheduler).startswith("constant"):
            raise ValueError(
                f"trainer.lr_scheduler_type: {scheduler!r} must know the number of steps, which a budget of tokens "
                "does not give; use constant, or steps"
            )
        return self


OneOrMany = Annotated[
    Annotated[Tune, Tag("one")] | Annotated[tuple[Tune, ...], Tag("many")],
    Discriminator(lambda v: "many" if isinstance(v, (list, tuple)) else "one"),
]


class Settings(BaseModel):
    """All settings of one run. `retention schema` prints this model's JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: AnyModel
    facts: AnyFacts
    editor: AnyEditor
    regime: AnyRegime = Batch()
    mitigations: tuple[AnyMitigation, ...] = ()
    objective: AnyObjective = Sft()
    adapter: AnyAdapter = Full()
    tune: OneOrMany = Field(description="a fine-tune, or a list of them, done one after another")
    probes: tuple[AnyProbe, ...]
    late: Late = Field(
        default=Late(), description="how the facts asked for by `facts.late` are taught before the edits"
    )
    relearn: Relearn | None = Field(None, description="at the end, teach the forgotten edits again: erased or masked?")
    abilities: tuple[AnyAbility, ...] = Field((), description="what else is read at each step: other tasks, lm-eval")
    weights: bool = Field(False, description="at each step also what training did to the edited matrices")
    at: tuple[int, ...] = Field(description="optimizer steps at which the probes read; -1 and 0 are always read")
    seed: int = Field(
        0, ge=0, description="of the edit, the training and, unless facts.seed is set, of the draw of facts"
    )
    corpus: str | None = Field(
        None,
        description="text file whose lines give the covariance of keys; left out, the corpus.txt in the model's folder",
    )
    launch: Launch | None = Field(
        None,
        description="several processes fine-tune one run's model, by `accelerate launch`; else this one alone",
    )
    precision: Precision = Field(
        default=Precision(), description="of matrix products, by stage: float32, or bfloat16 where the machine has it"
    )
    threads: int = Field(1, ge=1, description="CPU threads a stage computes with; part of its key")

    @field_validator("at")
    @classmethod
    def _sorted(cls, at: tuple[int, ...]) -> tuple[int, ...]:
        if not at:
            raise ValueError("give one step or more: without, nothing is read after the edit")
        if any(step < 1 for step in at):
            raise ValueError("steps in `at` are optimizer steps, from 1 on (-1 and 0 are always read)")
        return tuple(sorted(set(at)))

    @field_validator("mitigations")
    @classmethod
    def _ordered(cls, mitigations: tuple[Any, ...]) -> tuple[Any, ...]:
        # Each acts at a place of its own, so their order says nothing: [a, b] and [b, a] are one run.
        return tuple(sorted(mitigations, key=lambda m: m.name))

    @field_validator("probes")
    @classmethod
    def _scored(cls, probes: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [probe.name for probe in probes]
        if "score" not in names:
            raise ValueError("`probes` must hold score: what the base model knows is told by it")
        if len(set(names)) < len(names):
            raise ValueError("a probe is named twice")
        return probes

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if not self.tunes:
            raise ValueError("tune: the list is empty; give one fine-tune or more")
        steps = [tune.steps for tune in self.tunes]
        if None not in steps and self.at and self.at[-1] > (total := sum(step or 0 for step in steps)):
            raise ValueError(f"at: step {self.at[-1]} lies beyond tune.steps ({total})")
        if self.regime.name == "sequential" and self.editor.name == "ptuning":
            raise ValueError("regime sequential: ptuning changes no weight that a next batch could build on; use batch")
        distinct(self.abilities)
        self._together()
        for tune in self.tunes:
            half = next((f"{n}: {tune.trainer[n]}".lower() for n in ("fp16", "bf16") if n in tune.trainer), "")
            if self.precision.train == "bfloat16" and half != "bf16: true":
                raise ValueError(f"precision.train is bfloat16, and tune.trainer has {half}; give one of them")
            objective = tune.objective or self.objective
            if tune.chat and objective.name not in CHATTING:
                raise ValueError(
                    f"tune.chat: objective {objective.name} reads no turns; use one of {', '.join(CHATTING)}"
                )
        if self.relearn is not None:
            parts = [*(m.name for m in self.mitigations), self.editor.name]
            other = next((name for name in parts if name in ("ema", "merge", "reedit", "ptuning")), None)
            if other is not None:
                raise ValueError(
                    f"relearn: trains the weights that training leaves, and {other} delivers another model; leave one "
                    "of them out"
                )
            if not self.facts.control:
                raise ValueError("relearn: compares with facts never edited; give facts.control")
        names = [m.name for m in self.mitigations]
        if len(set(names)) < len(names):
            raise ValueError("mitigations: one is named twice in one run")
        return self

    def _together(self) -> None:
        """What several processes can do together."""
        if self.launch is None or self.launch.count == 1:
            return
        stepping = [m.name for m in self.mitigations if m.acts_on == "training" and m.name != "freeze"]
        if stepping:
            raise ValueError(
                f"launch: mitigation {stepping[0]} acts on each step of one process; leave one of them out"
            )
        if self.relearn is not None:
            raise ValueError("launch: relearn teaches on one process; leave one of them out")
        drawing = [o.name for o in (t.objective or self.objective for t in self.tunes) if o.shuffled_by == "field"]
        if drawing:
            raise ValueError(f"launch: objective {drawing[0]} draws answers on one process; leave one of them out")

    @property
    def tunes(self) -> tuple[Tune, ...]:
        """The fine-tunes in their order; steps are counted on through all of them."""
        return self.tune if isinstance(self.tune, tuple) else (self.tune,)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell of a grid."""

    settings: Settings
    cell: Mapping[str, str]  # grid key -> the value's short name, for people
    names: Mapping[str, str]  # editor, objective, adapter, mitigations: names that tell this study's runs apart
    only: int | None = None  # regime single: which one of the drawn edits is written

    def dump(self) -> dict[str, Any]:
        """The run's settings, complete with every default, as plain JSON values."""
        return self.settings.model_dump(mode="json") | ({} if self.only is None else {"only": self.only})

    @property
    def facts_seed(self) -> int:
        return self.settings.seed if self.settings.facts.seed is None else self.settings.facts.seed

    @property
    def label(self) -> str:
        shown = {k: v for k, v in self.cell.items() if k != "tune"}
        if "tune" in self.cell:  # a fine-tune as a whole is told by its parts, and by what else differs
            shown |= {k: self.names[k] for k in ("task", "objective", "adapter")}
            shown |= {"tune": self.cell["tune"]} if self.cell["tune"] else {}
        alone = [] if self.only is None else [f"edit={self.only}"]
        return " ".join([*(f"{k}={v}" for k, v in shown.items()), *alone]) or "the only run"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, and the runs that answer it."""

    name: str
    question: str
    document: dict[str, Any]  # the YAML after overrides, as written
    runs: tuple[Run, ...]

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Study:
        """Read a study file, apply `key=value` overrides and sweeps, validate every cell.

        Raises UserError with all mistakes, each on a line of its own.
        """
        path = Path(path)
        return cls.of(read_yaml(path), name=path.stem, where=str(path), overrides=overrides)

    @classmethod
    def of(
        cls, document: Mapping[str, Any], *, name: str, where: str = "study", overrides: Sequence[str] = ()
    ) -> Study:
        """The same from a dict, for use from Python."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in RESERVED:
            raise UserError(
                f"{where}: a study is called by its file name; {name!r} must be letters, digits, '.', '_', '-' "
                f"and none of {', '.join(RESERVED)}"
            )
        if not isinstance(document, Mapping):
            raise UserError(f"{where}: expected a mapping of settings at the top, got {type(document).__name__}")
        document = apply_overrides(dict(document), overrides)
        question = document.get("question", "")
        grid = document.get("grid") or {}
        problems = list(_grid_problems(grid))
        if not isinstance(question, str):
            problems.append("question: expected a text")
        if problems:
            raise UserError(_report(where, problems))
        base = {k: v for k, v in document.items() if k not in ("question", "grid")}
        cells: list[tuple[Settings, dict[str, str]]] = []
        found: dict[str, None] = {}
        for indices in itertools.product(*(range(len(values)) for values in grid.values())):
            settings = base
            index = dict(zip(grid, indices, strict=True))
            cell = {key: short_name(values[index[key]]) for key, values in grid.items()}
            for key in sorted(grid, key=lambda key: key.count(".")):  # a part as a whole before a setting within it
                settings = with_value(settings, key.split("."), grid[key][index[key]])
            settings = _spelled_out(settings)
            found |= dict.fromkeys(infinite(settings, index))
            try:
                cells.append((_validate(settings), cell))
            except ValidationError as error:
                found |= dict.fromkeys(explain(error, Settings, settings, index))
        if found:
            raise UserError(_report(where, list(found)))
        labels = labels_of([settings for settings, _ in cells])
        if "tune" in grid:
            for (_, cell), text in zip(cells, differing([settings for settings, _ in cells]), strict=True):
                cell["tune"] = text
        runs = [
            Run(settings=s, cell=cell, names=label, only=only)
            for (s, cell), label in zip(cells, labels, strict=True)
            for only in (range(s.facts.edited) if isinstance(s.regime, Single) else [None])
        ]
        ids = [content_id(run.dump()) for run in runs]
        if len(set(ids)) < len(ids):
            twice = next(run.label for run, i in zip(runs, ids, strict=True) if ids.count(i) > 1)
            raise UserError(f"{where}: grid: two cells are the same run ({twice}); remove the repeated value")
        return cls(name=name, question=question.strip(), document=document, runs=tuple(runs))

    def resolved(self) -> str:
        """The study as YAML after overrides, as it is stored beside its results."""
        plain = json.loads(json.dumps(self.document, default=str))
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------------------------ validating


def _grid_problems(grid: Any) -> Iterator[str]:
    if not isinstance(grid, Mapping):
        yield f"grid: expected a mapping of setting -> list of values, got {type(grid).__name__}"
        return
    for key, values in grid.items():
        top = str(key).split(".")[0]
        if top not in Settings.model_fields:
            yield f"grid.{key}: unknown setting{nearest(top, Settings.model_fields)}"
        if not isinstance(values, list) or not values:
            yield f"grid.{key}: expected a list of one or more values, got {values!r}"


def _spelled_out(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Parts written as their bare names become {name: ...}."""
    settings = dict(settings)
    for key in NAMED:
        if isinstance(settings.get(key), str):
            settings[key] = {"name": settings[key]}
    for key in ("mitigations", "probes"):
        if isinstance(settings.get(key), list):
            settings[key] = [{"name": v} if isinstance(v, str) else v for v in settings[key]]
    tune = settings.get("tune")
    precision = settings.get("precision")
    half = isinstance(precision, Mapping) and precision.get("train") == "bfloat16"
    if tune:
        settings["tune"] = [_tune(t, half) for t in tune] if isinstance(tune, list) else _tune(tune, half)
    return settings


def _tune(tune: Any, half: bool) -> Any:
    """half: `precision.train` is bfloat16: as the trainer's own field, so that both ways to ask for it are one run."""
    if not isinstance(tune, Mapping):
        return tune
    found = {key: {"name": tune[key]} for key in ("data", "objective", "adapter") if isinstance(tune.get(key), str)}
    trainer = tune.get("trainer", {})
    if half and isinstance(trainer, Mapping):
        found["trainer"] = {"bf16": True, **trainer}
    return {**tune, **found}


def _validate(settings: Mapping[str, Any]) -> Settings:
    """Through JSON, so that types are strict (no 'true' for 1, no 3.7 for 3) and lists may be lists."""
    return Settings.model_validate_json(json.dumps(settings, default=str), strict=True)


def _report(where: str, problems: Sequence[str]) -> str:
    return "\n".join(f"{where}: {problem}" for problem in problems)
