"""Settings of editors for the model at hand: one YAML file a model, a section an editor, each with its evidence.

A preset fits a model of the same architecture, depth and width. Settings that a user gives always win. A model without
a preset takes from the nearest one what has no default, its layers moved to the same relative depth. Files that
`retention calibrate` wrote into the cache come before those of the package. Knows no editing method and loads no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from retention.cache_folders import default_cache
from retention.explain import nearest
from retention.types import Part, UserError, content_id
from retention.yaml_file import read_yaml

PACKAGED = Path(__file__).parent
LAYERED = ("layer", "layers")  # settings that count blocks: moved with the depth of the model


class Measured(Part):
    """What was measured right after the edit: shares of facts of which the model gives every token of the object."""

    efficacy: float = Field(ge=0, le=1, description="edits, asked directly")
    paraphrase: float | None = Field(None, ge=0, le=1, description="edits, in held-out phrasings")
    intrinsic: float | None = Field(None, ge=0, le=1, description="facts that the unedited model knows")
    neighbors: float | None = Field(None, ge=0, le=1, description="neighbors that the unedited model knows")
    n: dict[str, int] = Field(description="questions of each, over all seeds")
    seeds: int = Field(ge=1)
    day: date
    data: str = Field(description="facts and corpus")

    def __str__(self) -> str:
        shares = {name: getattr(self, name) for name in ("efficacy", "paraphrase", "intrinsic", "neighbors")}
        told = ", ".join(
            f"{name} {share:.2f}" + (f" of {self.n[name]}" if name in self.n else "")
            for name, share in shares.items()
            if share is not None
        )
        return f"{told} ({self.seeds} seed{'s' * (self.seeds != 1)}, {self.day}, {self.data})"


class Section(Part):
    """Settings of one editor, and where they are from."""

    settings: dict[str, Any]
    published: str | None = Field(None, description="where; the settings were not measured here")
    calibrated: Measured | None = Field(None, description="on the edits of the search that chose the settings")
    measured: Measured | None = Field(None, description="on edits that had no part in choosing the settings")

    @model_validator(mode="after")
    def _evidence(self) -> Section:
        if not (self.published or self.calibrated or self.measured):
            raise ValueError("give its evidence: published, calibrated or measured")
        return self

    @property
    def evidence(self) -> str:
        if self.measured is not None:
            return f"measured: {self.measured}"
        if self.calibrated is not None:
            return f"measured on its calibration edits: {self.calibrated}"
        return f"published ({self.published}), not measured here"


class Preset(Part):
    """One file."""

    model: str
    shapes: tuple[tuple[str, int, int], ...] = Field(min_length=1, description="architecture, blocks, width")
    embedded: bool = Field(False, description="a model that is made here: no neighbor of any other")
    calibrated_on: tuple[str, ...] = Field((), description="subjects that no study draws, as `subject_mark` gives them")
    editors: dict[str, Section]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The section that stands in for what a user did not set, and how far its model is from the one at hand."""

    preset: Preset
    section: Section
    exact: bool
    layers: int  # of the model at hand

    @property
    def settings(self) -> dict[str, Any]:
        """With layers at the same relative depth, where the model is another one."""
        found = dict(self.section.settings)
        if not self.exact:
            depth = self.preset.shapes[0][1]
            for name in LAYERED:
                if name in found:
                    found[name] = _moved(found[name], depth, self.layers)
        return found


def subject_mark(subject: str) -> str:
    """What stands for a subject in `calibrated_on`."""
    return content_id(subject, 12)


def shape_of(config: Any) -> tuple[str, int, int]:
    """Architecture, blocks and width of a transformers configuration, or of a model's."""
    text = config.get_text_config()
    return str(text.model_type), int(text.num_hidden_layers), int(text.hidden_size)


def choice(editor: Any, config: Any) -> Choice | None:
    """The preset for an editor in a model; None for an editor that no preset has a section of."""
    shape, name = shape_of(config), getattr(editor, "preset", editor.name)
    having = [preset for preset in every() if name in preset.editors]
    for preset in having:
        if shape in preset.shapes:
            return Choice(preset=preset, section=preset.editors[name], exact=True, layers=shape[1])
    near = [(_distance(shape, own), preset) for preset in having if not preset.embedded for own in preset.shapes]
    if not near:
        return None
    preset = min(near, key=lambda pair: pair[0])[1]
    return Choice(preset=preset, section=preset.editors[name], exact=False, layers=shape[1])


def settle(editor: Any, config: Any) -> Any:
    """The editor with what was not given taken from the preset of the model. Raises UserError for a faulty preset."""
    if hasattr(editor, "settled"):  # it holds the settings of another editor
        return editor.settled(lambda inner: settle(inner, config))
    found = choice(editor, config)
    taken = {} if found is None else _taken(editor, found)
    unknown = [] if found is None else sorted(found.section.settings.keys() - type(editor).model_fields.keys())
    if found is not None and unknown:
        near = nearest(unknown[0], type(editor).model_fields)
        raise UserError(f"preset {found.preset.model}: {editor.name}.{unknown[0]}: unknown setting{near}")
    if found is None or not taken:
        return editor
    given = {name: value for name, value in editor if name in editor.model_fields_set and name not in taken}
    try:
        return type(editor).model_validate(given | taken)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"preset {found.preset.model}: {editor.name}.{key}: {first['msg']}") from None


def remark(editor: Any, config: Any) -> str | None:
    """For people: what is taken from which preset, and on what evidence; None where everything was given."""
    if hasattr(editor, "settled"):
        return None
    found = choice(editor, config)
    if found is None:
        return None
    if not (taken := _taken(editor, found)):
        return None
    shown = ", ".join(f"{name}: {_shown(value)}" for name, value in taken.items())
    if found.exact:
        return f"{editor.name}: preset {found.preset.model} gives {shown}; {found.section.evidence}"
    return (
        f"{editor.name}: no preset for {' x '.join(map(str, shape_of(config)))}; the nearest one, of "
        f"{found.preset.model}, gives {shown}. Find better ones by `retention calibrate MODEL --editor {editor.name}`"
    )


def set_aside(config: Any) -> frozenset[str]:
    """Marks of the subjects that the presets of this model were calibrated on."""
    shape = shape_of(config)
    return frozenset(mark for preset in every() if shape in preset.shapes for mark in preset.calibrated_on)


def _taken(editor: Any, found: Choice) -> dict[str, Any]:
    """What the preset gives: of its own model all that was not given, of another one only what has no default."""
    missing = {name for name in getattr(editor, "open", ()) if getattr(editor, name) is None}
    if found.exact:
        missing |= set(type(editor).model_fields) - editor.model_fields_set
        either: frozenset[str] = getattr(editor, "alternatives", frozenset())
        missing -= either if editor.model_fields_set & either else set()
    return {name: value for name, value in found.settings.items() if name in missing}


def _moved(value: Any, depth: int, layers: int) -> Any:
    """Blocks at the same relative depth; of a run of neighbors that would coincide, one stays."""
    if isinstance(value, (list, tuple)):
        return sorted({_moved(one, depth, layers) for one in value})
    return min(layers - 1, round(value * layers / depth))


def _distance(one: tuple[str, int, int], other: tuple[str, int, int]) -> tuple[bool, float]:
    """Another architecture is farther than any size."""
    return one[0] != other[0], abs(math.log(one[1] / other[1])) + abs(math.log(one[2] / other[2]))


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


# ------------------------------------------------------------------------------------------------ files


def every() -> tuple[Preset, ...]:
    """All presets, those of the cache first."""
    own = default_cache() / "presets"
    return (*_read_folder(own, _state(own)), *_read_folder(PACKAGED, None))


def _state(folder: Path) -> tuple[Any, ...]:
    try:
        if not folder.is_dir():
            return ()
        return tuple(sorted((str(p), p.stat().st_mtime_ns) for p in folder.glob("*.yaml")))
    except PermissionError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None


@lru_cache(maxsize=8)
def _read_folder(folder: Path, state: tuple[Any, ...] | None) -> tuple[Preset, ...]:
    """state: names and times of the files, so that a file that changed is read again."""
    return tuple(read(path) for path in sorted(folder.glob("*.yaml")))


def read(path: Path) -> Preset:
    """A preset file. Raises UserError that names file and key."""
    document = read_yaml(path)
    try:
        return Preset.model_validate(document)
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError("\n".join(lines)) from None


def dump(preset: Preset) -> Mapping[str, Any]:
    """As a file holds it."""
    return preset.model_dump(mode="json", exclude_defaults=True)
