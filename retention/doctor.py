"""What `retention doctor` tells: versions, devices, caches, data, and what a given study lacks. Fetches nothing.

Every function takes what it looks at and returns lines; nothing is printed here. Knows no stage.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from retention.types import UserError

State = Literal["ok", "note", "missing"]  # note: nothing needs to be done; missing: something cannot be run as it is
FEW = 4  # files of one part that are told one by one


@dataclass(frozen=True, kw_only=True)
class Line:
    """One finding."""

    what: str
    found: str
    state: State = "ok"


def examine(
    study: Path | None = None, overrides: Sequence[str] = (), *, cache: Path | None = None
) -> dict[str, list[Line]]:
    """All findings by section. Raises UserError if the study cannot be read at all, or its settings are wrong.

    cache: where pretrained worlds and covariances lie; left out, as `retention run` would have it.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from retention.cache_folders import default_cache

    place = default_cache() if cache is None else cache
    found = {
        "versions": versions(importlib.metadata.requires("retention") or [], version_of),
        "devices": devices(),
        "caches": caches(place, Path(HF_HUB_CACHE)),
        "data": data(os.environ.get("RETENTION_DATA")),
    }
    if study is not None:
        found[f"study {study}"] = needs(study, overrides, place)
    return found


def text(found: Mapping[str, Sequence[Line]]) -> str:
    """For people: a section a paragraph, and at the end how much is missing."""
    width = max(len(line.what) for lines in found.values() for line in lines)
    marks = {"ok": "     ", "note": "note ", "missing": "MISS "}
    out = []
    for title, lines in found.items():
        out += [title, *(f"  {marks[line.state]}{line.what:{width}}  {line.found}" for line in lines), ""]
    count = len(missing(found))
    return "\n".join([*out, f"{count} missing" if count else "nothing is missing"])


def missing(found: Mapping[str, Sequence[Line]]) -> list[Line]:
    """What must be put right: with any of these the exit code is 2."""
    return [line for lines in found.values() for line in lines if line.state == "missing"]


# ------------------------------------------------------------------------------------------------ versions


def version_of(name: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(requirements: Iterable[str], version: Callable[[str], str | None]) -> list[Line]:
    """Python and every requirement of the package against its supported range. Extras that are absent are notes."""
    found = [_within("python", platform.python_version(), SpecifierSet(">=3.11"))]
    for requirement in map(Requirement, requirements):
        extra = _extra(requirement)
        if extra == "dev":
            continue
        have = version(requirement.name)
        if have is None and extra is not None:
            advice = f"not installed; for what needs it: pip install 'retention[{extra}]'"
            found.append(Line(what=requirement.name, found=advice, state="note"))
        else:
            found.append(_within(requirement.name, have, requirement.specifier))
    return found


def _extra(requirement: Requirement) -> str | None:
    """The extra that asks for it, if it is not always needed."""
    text = str(requirement.marker or "")
    return text.split("extra ==")[1].strip().strip("\"'") if "extra ==" in text else None


def _within(name: str, have: str | None, supported: SpecifierSet) -> Line:
    asked = f"{supported}" or "any version"
    if have is None:
        return Line(what=name, found=f"not installed; pip install '{name}{supported}'", state="missing")
    if not supported.contains(have, prereleases=True):
        return Line(
            what=name, found=f"{have}, and {asked} is supported; pip install '{name}{supported}'", state="missing"
        )
    return Line(what=name, found=f"{have} ({asked})")


# ------------------------------------------------------------------------------------------------ devices


def devices() -> list[Line]:
    """Processors, memory and accelerators. A machine without an accelerator is no fault."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    found = [
        Line(what="processors", found=f"{os.cpu_count()}; a stage uses as many as the study's `threads` says (1)"),
        Line(what="memory", found=size(memory)),
    ]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        found.append(Line(what=f"cuda:{i}", found=f"{about.name}, {size(about.total_memory)}, {half}"))
    if not torch.cuda.is_available():
        found.append(Line(what="accelerator", found=f"none that torch {torch.__version__} can use", state="note"))
    return found


# ------------------------------------------------------------------------------------------------ caches


def caches(cache: Path, hub: Path) -> list[Line]:
    """What the caches hold and how much room is left; and whether the first can be written to."""
    there = _existing(cache)
    found = [Line(what="RETENTION_CACHE", found=f"{cache}{'' if cache.is_dir() else ' (not made yet)'}")]
    if not os.access(there, os.W_OK):
        advice = f"{cache}: {there} cannot be written to; set RETENTION_CACHE to a folder of yours"
        found = [Line(what="RETENTION_CACHE", found=advice, state="missing")]
    kinds: dict[str, list[int]] = {}
    for entry in sorted(cache.iterdir()) if cache.is_dir() else []:
        kinds.setdefault(entry.name if entry.is_dir() else entry.name.split("-")[0], []).append(bytes_in(entry))
    found += [Line(what=f"  {kind}", found=f"{size(sum(n))}, {len(n)} entries") for kind, n in kinds.items()]
    found.append(Line(what="  room left", found=size(shutil.disk_usage(there).free)))
    found.append(Line(what="models of the Hub", found=f"{hub}, {size(bytes_in(hub))}"))
    return found


def bytes_in(path: Path) -> int:
    """Of a file, or of all files below a folder; links count as what they are, so that nothing counts twice."""
    if not path.is_dir():
        return path.lstat().st_size if path.exists() else 0
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def size(n: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return path if path.exists() else _existing(path.parent)


# ------------------------------------------------------------------------------------------------ data


def data(root: str | None) -> list[Line]:
    """What lies in $RETENTION_DATA, by the fact source that reads it."""
    if not root:
        unset = "not set: studies that name their files by `path` need none"
        return [Line(what="RETENTION_DATA", found=unset, state="note")]
    folder = Path(root).expanduser()
    if not folder.is_dir():
        return [Line(what="RETENTION_DATA", found=f"{folder} is no folder", state="missing")]
    found, known = [Line(what="RETENTION_DATA", found=str(folder))], set()
    for name, place in places().items():
        known.add(Path(place).parts[0])
        there = (folder / place).exists()
        told = size(bytes_in(folder / place)) if there else "not there"
        found.append(Line(what=f"  facts: {name}", found=f"{place}: {told}", state="ok" if there else "note"))
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in known and entry.is_dir())
    return [*found, *([Line(what="  other folders", found=", ".join(others))] if others else [])]


def places() -> dict[str, str]:
    """Fact source -> what it reads below $RETENTION_DATA if a study names no path."""
    from retention.facts import AnyFacts

    sources = typing.get_args(typing.get_args(AnyFacts)[0])
    found = {s.model_fields["name"].default: getattr(sys.modules[s.__module__], "PLACE", None) for s in sources}
    return {name: place for name, place in found.items() if place is not None}


# ------------------------------------------------------------------------------------------------ a study


def needs(path: Path, overrides: Sequence[str], cache: Path) -> list[Line]:
    """What a study's runs need, and whether it is here. No model is fetched, loaded or pretrained.

    Raises UserError for settings that are wrong in themselves.
    """
    from retention import preflight
    from retention.study import Study

    study = Study.load(path, overrides)
    found: dict[str, Line] = {}
    parts: dict[str, Callable[[], list[Line]]] = {}  # each distinct part is looked at once, however many runs there are
    for s in (run.settings for run in study.runs):
        parts.setdefault(repr(s.model), partial(_model, s.model, cache))
        parts.setdefault(repr(s.abilities), partial(_packages, s))
        parts.setdefault(repr((s.facts, s.tune, s.abilities, s.mitigations, s.corpus)), partial(_files, s))
    for line in (line for look in parts.values() for line in look()):
        found.setdefault(f"{line.what} {line.found}", line)
    lines = [Line(what="runs", found=str(len(study.runs))), *found.values()]
    away = ("Hub", "not converted yet")
    if any(
        line.what.startswith("model") and line.state != "ok" and any(w in line.found for w in away) for line in lines
    ):
        return [*lines, Line(what="settings", found="checked further once the model is here", state="note")]
    try:
        preflight.check(study)
    except UserError as error:
        told = [message.removeprefix(f"{study.name}: ") for message in str(error).splitlines()]
        named = " ".join(line.found for line in lines)
        return lines + [Line(what="settings", found=t, state="missing") for t in told if t not in named]
    return [*lines, Line(what="settings", found="every check passes")]


def _model(part: Any, cache: Path) -> list[Line]:
    from retention.models import HubModel

    if isinstance(part, HubModel):
        return [_hub_model(part.name, part.revision)]
    what = f"model {part.name}"
    try:
        folder = part.place(cache)
    except UserError as error:  # its facts are read from files
        return [Line(what=what, found=str(error), state="missing")]
    if folder.is_dir():
        return [Line(what=what, found=f"pretrained, {size(bytes_in(folder))}")]
    return [Line(what=what, found="will be pretrained on first use", state="note")]


def _hub_model(name: str, revision: str | None) -> Line:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from retention.model_folder import NotFetched, nothing_fetched, resolve

    what = f"model {name}"
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        try:
            with nothing_fetched():
                return Line(what=what, found=f"folder, {size(bytes_in(resolve(name)))}")
        except NotFetched as error:
            return Line(what=what, found=str(error), state="note")
        except UserError as error:
            return Line(what=what, found=str(error), state="missing")
    try:
        at = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        fetch = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        if HF_HUB_OFFLINE:
            return Line(
                what=what, found=f"not among the models of the Hub here, and HF_HUB_OFFLINE is set; {fetch}",
                state="missing",
            )  # fmt: skip
        return Line(what=what, found=f"not here yet: fetched from the Hub on first use, or by: {fetch}", state="note")
    weights = list(at.glob("*.safetensors"))
    if not weights:
        return Line(what=what, found=f"{at}: fetched without weights (*.safetensors) from the Hub", state="missing")
    return Line(what=what, found=f"fetched, {size(sum(p.stat().st_size for p in weights))} of weights")


def _packages(settings: Any) -> list[Line]:
    """Packages that a part needs beyond the ones that are always there."""
    names = {name for ability in settings.abilities for name in ability.packages}
    absent = sorted(name for name in names if version_of(name) is None)
    return [
        Line(what="package", found=f"{name} is not installed; pip install 'retention[{name}]'", state="missing")
        for name in absent
    ]


def _files(settings: Any) -> list[Line]:
    """Files of facts, tasks, texts and mitigations."""
    from retention.data import files_of
    from retention.ids import corpus_files

    asked: list[tuple[str, Callable[[], Sequence[Path]]]] = [("facts", settings.facts.files)]
    asked += [("tune.data", partial(files_of, t.data)) for t in settings.tunes]
    asked += [("abilities", a.files) for a in settings.abilities]
    asked += [("mitigations", m.files) for m in settings.mitigations]
    asked.append(("corpus", partial(corpus_files, settings)))
    found = []
    for what, files in asked:
        try:
            here = list(dict.fromkeys(files()))
        except UserError as error:
            found.append(Line(what=what, found=str(error), state="missing"))
            continue
        if len(here) > FEW:
            total = size(sum(map(bytes_in, here)))
            found.append(Line(what=what, found=f"{len(here)} files, {total}, the first {here[0]}"))
        else:
            found += [Line(what=what, found=f"{file}, {size(bytes_in(file))}") for file in here]
    return found
