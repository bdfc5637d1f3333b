"""One YAML file and its overrides become a validated Study and its list of runs.

A study is data: settings at the top level, and under `grid` lists of values for any of them. A run is one cell: a plain
dict of settings, whose canonical JSON keys everything that is computed for it. All mistakes are reported at once, each
with its path, before anything is computed. Knows nothing of how a stage works.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from retention.adapters import AnyAdapter, Full
from retention.data import AnyData
from retention.editors import AnyEditor
from retention.facts import AnyFacts
from retention.mitigations import AnyMitigation
from retention.models import HubModel
from retention.objectives import AnyObjective, Sft
from retention.probes import AnyProbe
from retention.regimes import AnyRegime, Batch, Single
from retention.types import UserError, content_id
from retention.world import WorldModel
from retention.world.facts_model import FactModel

EMBEDDED = ("world", "facts")  # models that we pretrain; any other name is a folder or a Hub name


def _model_kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return name if name in EMBEDDED else "hub"


AnyModel = Annotated[
    Annotated[WorldModel, Tag("world")] | Annotated[FactModel, Tag("facts")] | Annotated[HubModel, Tag("hub")],
    Discriminator(_model_kind),
]

RESERVED = ("bases", "edits", "runs")  # folders of the store itself
NAMED = {  # settings whose value may be written as just the part's name, and the union that it must be one of
    "model": AnyModel,
    "facts": AnyFacts,
    "editor": AnyEditor,
    "objective": AnyObjective,
    "adapter": AnyAdapter,
    "regime": AnyRegime,
}


class Tune(BaseModel):
    """The downstream fine-tune."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: AnyData
    steps: int = Field(ge=1, description="optimizer steps")
    trainer: dict[str, Any] = Field(default_factory=dict, description="passed through to the trl trainer's config")


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
    tune: Tune
    probes: tuple[AnyProbe, ...]
    at: tuple[int, ...] = Field(description="optimizer steps at which the probes read; -1 and 0 are always read")
    seed: int = Field(
        0, ge=0, description="of the edit, the training and, unless facts.seed is set, of the draw of facts"
    )
    corpus: str | None = Field(
        None,
        description="text file whose lines give the covariance of keys; left out, the corpus.txt in the model's folder",
    )
    threads: int = Field(1, ge=1, description="CPU threads a stage computes with; part of its key")

    @field_validator("at")
    @classmethod
    def _sorted(cls, at: tuple[int, ...]) -> tuple[int, ...]:
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
        if self.at and self.at[-1] > self.tune.steps:
            raise ValueError(f"at: step {self.at[-1]} lies beyond tune.steps ({self.tune.steps})")
        if self.regime.name == "sequential" and self.editor.name == "ptuning":
            raise ValueError("regime sequential: ptuning changes no weight that a next batch could build on; use batch")
        names = [m.name for m in self.mitigations]
        if len(set(names)) < len(names):
            raise ValueError("mitigations: one is named twice in one run")
        return self


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
        alone = [] if self.only is None else [f"edit={self.only}"]
        return " ".join([*(f"{k}={v}" for k, v in self.cell.items()), *alone]) or "the only run"


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
        return cls.of(_read_yaml(path), name=path.stem, where=str(path), overrides=overrides)

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
        document = _override(dict(document), overrides)
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
                settings = _set(settings, key.split("."), grid[key][index[key]])
            settings = _spelled_out(settings)
            for loc in _not_finite(settings):
                found[f"{_path(loc, index)}: expected a finite number"] = None
            try:
                cells.append((_validate(settings), cell))
            except ValidationError as error:
                for problem in _explain(error, index, settings):
                    found[problem] = None
        if found:
            raise UserError(_report(where, list(found)))
        labels = _labels([settings for settings, _ in cells])
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


# ------------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses repeated keys and reads 1e-4 as a number (YAML 1.1 makes it a text)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *block`: its keys may be written again, to change them
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, f"a key must be a text, got {key!r} (are its braces meant?)", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is written twice", key_node.start_mark
            )
        seen[key] = None
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise UserError(
            f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}: line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {error}") from None


def _override(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides in Hydra's grammar. A list of values (`editor=rome,memit`) becomes an axis of the grid."""
    if not overrides or not isinstance(document.get("grid") or {}, Mapping):
        return document
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"override {text!r}: {reason}; expected key=value, key=a,b or ~key") from None
        keys = override.key_or_group.split(".")
        in_grid = keys[0] == "grid"
        name = ".".join(keys[1:] if in_grid else keys)
        grid = dict(document.get("grid") or {})
        if override.is_delete():
            present = name in grid or _has(document, keys)
            if not present:
                raise UserError(f"override {text!r}: there is no {name!r} to remove")
            grid.pop(name, None)
            document = _without(document, keys) if _has(document, keys) and not in_grid else document
        elif override.is_sweep_override() or in_grid:
            if override.is_sweep_override():
                values = [_plain(v) for v in override.sweep_iterator()]
            else:
                value = _plain(override.value())
                values = value if isinstance(value, list) else [value]
            document = _without(document, keys) if not in_grid and _has(document, keys) else document
            grid[name] = values
        else:
            # A single value replaces an axis of that name; settings below it (editor.layer) need the axis to be gone.
            grid.pop(name, None)
            above = next((g for g in grid if name.startswith(g + ".")), None)
            if above is not None:
                raise UserError(
                    f"override {text!r}: {above} is an axis of the grid; set {above}=... as a whole instead"
                )
            document = _set(document, keys, _plain(override.value()))
        document = {**{k: v for k, v in document.items() if k != "grid"}, **({"grid": grid} if grid else {})}
    return document


def _plain(value: Any) -> Any:
    """Hydra's quoted strings and nested containers as plain values."""
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return getattr(value, "text", value)


def _has(tree: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def _set(tree: Any, keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of the tree with one value changed. A part written as its bare name becomes {name: ...} on the way."""
    tree = {"name": tree} if isinstance(tree, str) else dict(tree) if isinstance(tree, Mapping) else {}
    tree[keys[0]] = value if len(keys) == 1 else _set(tree.get(keys[0], {}), keys[1:], value)
    return tree


def _without(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    copy = dict(tree)
    if len(keys) == 1:
        copy.pop(keys[0])
    else:
        copy[keys[0]] = _without(copy[keys[0]], keys[1:])
    return copy


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
    if isinstance(settings.get("tune"), Mapping) and isinstance(settings["tune"].get("data"), str):
        settings["tune"] = {**settings["tune"], "data": {"name": settings["tune"]["data"]}}
    return settings


def _not_finite(tree: Any, loc: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of numbers that are infinite or NaN: JSON has none, and keys are made of JSON."""
    if isinstance(tree, float) and not math.isfinite(tree):
        yield loc
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for step, value in items:
        yield from _not_finite(value, (*loc, step))


def _validate(settings: Mapping[str, Any]) -> Settings:
    """Through JSON, so that types are strict (no 'true' for 1, no 3.7 for 3) and lists may be lists."""
    return Settings.model_validate_json(json.dumps(settings, default=str), strict=True)


def _explain(error: ValidationError, index: Mapping[str, int], settings: Mapping[str, Any]) -> Iterator[str]:
    """Each of pydantic's errors as: path: what is wrong, what to type instead."""
    for item in error.errors(include_url=False):
        kind, context = item["type"], item.get("ctx", {})
        loc = _clean(item["loc"], settings, keep_last=kind == "missing")
        path = _path(loc, index)
        if kind == "extra_forbidden":
            owner = _owner(loc[:-1], settings)
            yield f"{path}: unknown key" + (nearest(str(loc[-1]), owner.model_fields) if owner is not None else "")
        elif kind == "union_tag_invalid":
            expected = [e.strip().strip("'") for e in context["expected_tags"].split(",")]
            yield f"{path}: unknown name {context['tag']!r}{nearest(context['tag'], expected)}"
        elif kind == "union_tag_not_found":
            yield f"{path}: expected a name, or a mapping with a `name`"
        elif kind == "missing":
            yield f"{path}: required, but not given"
        elif kind == "value_error":
            prefix = f"{path}: " if path else ""
            yield prefix + str(context["error"])
        else:
            yield f"{path}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _clean(loc: tuple[Any, ...], settings: Mapping[str, Any], *, keep_last: bool) -> tuple[Any, ...]:
    """pydantic's location without the union tags that it puts between the keys.

    keep_last: the last step is a key that is missing in the settings, so it is no tag although it is not there.
    """
    out: list[Any] = []
    tree: Any = settings
    for i, step in enumerate(loc):
        is_key = keep_last and i + 1 == len(loc)
        if isinstance(tree, Mapping) and step not in tree and step in (tree.get("name"), "hub", "peft") and not is_key:
            continue
        out.append(step)
        if isinstance(tree, Mapping):
            tree = tree.get(step)
        elif isinstance(tree, list) and isinstance(step, int) and step < len(tree):
            tree = tree[step]
        else:
            tree = None
    return tuple(out)


def _path(loc: Iterable[Any], index: Mapping[str, int]) -> str:
    text = ""
    for step in loc:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    for key, i in index.items():
        if text == key or text.startswith((f"{key}.", f"{key}[")):
            return f"grid.{key}[{i}]{text[len(key) :]}"
    return text


def _owner(loc: Sequence[Any], settings: Mapping[str, Any]) -> type[BaseModel] | None:
    """The part whose fields an unknown key was meant for; None where its name tells none."""
    candidates: list[type[BaseModel]] = [Settings]
    tree: Any = settings
    for step in loc:
        if not isinstance(step, int):
            owner = _chosen(candidates, tree)
            if owner is None:
                return None
            candidates = _parts(owner.model_fields[step].annotation)
        tree = tree[step]
    return _chosen(candidates, tree)


def _chosen(candidates: Sequence[type[BaseModel]], tree: Any) -> type[BaseModel] | None:
    """The one of a union's classes that the mapping's name asks for; else the one that takes any name."""
    if len(candidates) == 1:
        return candidates[0]
    name = tree.get("name") if isinstance(tree, Mapping) else None
    named = [part for part in candidates if name in _names(part)]
    return next(iter([*named, *(part for part in candidates if not _names(part))]), None)


def _parts(union: Any) -> list[type[BaseModel]]:
    """The classes of an annotated union."""
    if isinstance(union, type) and issubclass(union, BaseModel):
        return [union]
    return [part for arg in get_args(union) for part in _parts(arg)]


def _names(part: type[BaseModel]) -> tuple[str, ...]:
    return get_args(part.model_fields["name"].annotation) if "name" in part.model_fields else ()


def part_fields(union: Any, name: str) -> list[str]:
    """The settings of the part of that name in a union."""
    return next((list(part.model_fields) for part in _parts(union) if name in _names(part)), [])


def nearest(word: str, known: Iterable[str]) -> str:
    """What to type instead of an unknown word, as the end of a sentence."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"


def _report(where: str, problems: Sequence[str]) -> str:
    return "\n".join(f"{where}: {problem}" for problem in problems)


def _labels(settings: Sequence[Settings]) -> list[dict[str, str]]:
    """Names of each run's parts. Where a study has one part in several settings, those that differ are added."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for s in settings:
        for part in (s.editor, s.objective, s.adapter, *s.mitigations):
            seen = variants.setdefault(f"{type(part).__name__} {part.name}", [])
            dump = part.model_dump(mode="json")
            if dump not in seen:
                seen.append(dump)

    def label(part: Any) -> str:
        name = getattr(part, "label", part.name)
        dump, others = part.model_dump(mode="json"), variants[f"{type(part).__name__} {part.name}"]
        differ = [k for k in dump if any(o.get(k) != others[0].get(k) for o in others)]
        told = [f"{k}={short_name(dump[k])}" for k in differ if dump[k] is not None]
        return f"{name}({', '.join(told)})" if told else name

    return [
        {
            "editor": label(s.editor),
            "objective": label(s.objective),
            "adapter": label(s.adapter),
            "mitigations": "+".join(sorted(label(m) for m in s.mitigations)) or "none",
        }
        for s in settings
    ]


def short_name(value: Any) -> str:
    """A part's name with the settings that differ from its defaults, as labels in tables and figures show it."""
    if isinstance(value, list):
        return "+".join(short_name(v) for v in value) or "none"
    if isinstance(value, Mapping):
        rest = [f"{k}={short_name(v)}" for k, v in value.items() if k != "name"]
        return str(value.get("name", "")) + (f"({', '.join(rest)})" if rest else "")
    return str(value)
