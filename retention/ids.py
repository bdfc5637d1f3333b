"""Content keys: what a base, an edit and a run are made of, and therefore when two are the same.

Everything that can move a number enters a key: settings with all defaults, the content of files, seeds, threads,
package versions, and the version of each stage's algorithm. Nothing else does: not where data lie, nor in which order
settings are written, nor whether a default is written out, nor what is logged (`trainer_fields.IDLE`, `launch.IDLE`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from retention.cache_folders import file_digest
from retention.configs import config_of
from retention.data import files_of
from retention.data.files import data_file
from retention.model_folder import content_hash, nothing_fetched, resolve
from retention.models import HubModel
from retention.objectives import Clm, Objective, Sft
from retention.presets import set_aside
from retention.study import Run, Settings, Tune
from retention.trainer_fields import keyed
from retention.trainers import library_defaults
from retention.types import Missing, UserError, content_id

# Version of each stage's algorithm: raised when its numbers change, so that old artefacts are not taken for new ones.
VERSIONS = {"prepare": 3, "edit": 3, "tune": 3}

_version = lru_cache(importlib.metadata.version)


def versions(*names: str) -> dict[str, str]:
    """Installed versions by name. Raises UserError for a package that is not installed."""
    try:
        return {name: _version(name) for name in names}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the package {error.name} is not installed; pip install {error.name}") from None


_absent: ContextVar[dict[str, Missing] | None] = ContextVar("absent", default=None)


@contextmanager
def provisional() -> Iterator[dict[str, Missing]]:
    """Within it nothing is fetched, and what is not here enters a key by its name, so that a study can be planned.

    Yields what was found absent: messages and errors. Keys that rest on it are others than those that `run` will make.
    """
    found: dict[str, Missing] = {}
    token = _absent.set(found)
    try:
        with nothing_fetched():
            yield found
    finally:
        _absent.reset(token)


def _content(look: Callable[[], Any], name: Any) -> Any:
    """What `look` finds; where it is not here, within `provisional`, its name."""
    try:
        return look()
    except Missing as error:
        absent = _absent.get()
        if absent is None:
            raise
        absent[str(error)] = error
        return ["not here", name]


def _hashes(files: Callable[[], Sequence[Path]], part: Any) -> Any:
    """Of the files that a part reads, in its own order: rows to train on and held-out rows are not interchangeable."""
    return _content(lambda: [file_digest(file).hex() for file in files()], part)


def model_id(part: Any) -> str:
    """Content key of a model: of its files, or, for one that we pretrain, of all that its pretraining depends on."""
    found = _content(lambda: _model_id(part), part.model_dump(mode="json"))
    return found if isinstance(found, str) else content_id(found)


@lru_cache(maxsize=16)
def _model_id(part: Any) -> str:
    if isinstance(part, HubModel):
        return content_id([content_hash(resolve(part.name, part.revision)), part.dtype])
    return part.key()


def base_id(run: Run) -> str:
    s = run.settings
    return content_id(
        {
            "stage": ["prepare", VERSIONS["prepare"]],
            "model": model_id(s.model),
            "facts": _settings(s.facts.model_dump(mode="json", exclude={"seed"})),
            "facts_seed": run.facts_seed,
            "files": _hashes(s.facts.files, s.facts.model_dump(mode="json")),
            "probes": sorted((p.model_dump(mode="json") for p in s.probes), key=lambda probe: probe["name"]),
            "threads": s.threads,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "versions": versions("torch", "transformers", "tokenizers"),
            **_set_aside(s.model),
            **_in_bfloat16(s, "read"),
        }
    )


def _set_aside(model: Any) -> dict[str, Any]:
    """Subjects that no study of the model draws, since its presets were calibrated on them; empty without any."""
    config = _content(lambda: config_of(model), None)
    marks = [] if isinstance(config, list) else sorted(set_aside(config))
    return {"set_aside": marks} if marks else {}


def edit_id(run: Run) -> str:
    s = run.settings
    return content_id(
        {
            "stage": ["edit", VERSIONS["edit"]],
            "base": base_id(run),
            "editor": s.editor.model_dump(mode="json"),
            "regime": s.regime.model_dump(mode="json"),
            "only": run.only,
            "corpus": _hashes(lambda: corpus_files(s), s.corpus),
            "mitigations": [_settings(m) for m in mitigations_at(s, "edit")],
            "late": [s.late.model_dump(mode="json"), _arguments(Clm(), {})] if s.facts.late else None,
            "seed": s.seed,
            "versions": versions("peft", *(["trl", "accelerate", "datasets"] if s.facts.late else [])),
            **_in_bfloat16(s, "edit"),
        }
    )


def run_id(run: Run) -> str:
    s = run.settings
    return content_id(
        {
            "stage": ["tune", VERSIONS["tune"]],
            "edit": edit_id(run),
            "mitigations": [_settings(m) for m in mitigations_at(s, "rows", "training", "after")],
            "tune": [_tune(t, s) for t in s.tunes],
            "files": [_hashes(partial(files_of, t.data), t.data.model_dump(mode="json")) for t in s.tunes],
            "mitigation_files": _hashes(lambda: [file for m in s.mitigations for file in m.files()], None),
            "at": s.at,
            "abilities": sorted(
                (
                    {
                        **_settings(a.model_dump(mode="json")),
                        "files": _hashes(a.files, a.model_dump(mode="json")),
                        "versions": versions(*a.packages),
                    }
                    for a in s.abilities
                ),
                key=content_id,
            ),
            "weights": s.weights,
            "relearn": None if s.relearn is None else [s.relearn.model_dump(mode="json"), _arguments(Sft(), {})],
            "seed": s.seed,
            "versions": versions("trl", "accelerate", "datasets"),
            **({} if s.launch is None or s.launch.count == 1 else {"launch": s.launch.key()}),
            # Version of half.WholeHead, where it may take the place of trl's head.
            **({"head": 1} if any(t.trainer.get("bf16") for t in s.tunes) and not torch.cuda.is_available() else {}),
        }
    )


def _in_bfloat16(s: Settings, stage: str) -> dict[str, str]:
    """What a stage's precision adds to its key. That of training is in the trainer's arguments."""
    return {} if getattr(s.precision, stage) == "float32" else {"precision": "bfloat16"}


PLACES = ("path", "heldout_from", "include_path", "counterfact", "trex")  # settings that say where data lie


def _settings(dump: dict[str, Any]) -> dict[str, Any]:
    """A part's settings without those that say where its data lie: what the files hold is hashed."""
    hub = dump.get("revision") is not None  # of a dataset there, names are not places of files
    kept = {k: v for k, v in dump.items() if k not in PLACES or (hub and isinstance(v, str))}
    return {k: _settings(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _tune(t: Tune, s: Settings) -> dict[str, Any]:
    """One fine-tune, with the objective and the adapter that it has from the run where it names none."""
    objective, adapter = t.objective or s.objective, t.adapter or s.adapter
    own = t.model_dump(mode="json", exclude={"trainer", "objective", "adapter", "min_share"})
    return {
        **_settings(own),
        "objective": objective.model_dump(mode="json"),
        "adapter": _numbers(adapter.key()),
        "trainer": _arguments(objective, t.trainer),
    }


def _arguments(objective: Objective, trainer: Mapping[str, Any]) -> Any:
    """All arguments of the trainer that can move a number."""
    return _numbers(keyed(objective, trainer, lambda: library_defaults(objective)))


def _numbers(value: Any) -> Any:
    """The same with 1.0 written as 1: passed-through settings come as they were typed."""
    if isinstance(value, Mapping):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def corpus_files(s: Settings) -> list[Path]:
    """The texts of the covariance of keys, where the study names them. Raises Missing."""
    return [] if s.corpus is None else [data_file(s.corpus, "corpus")]


def mitigations_at(s: Settings, *where: str) -> list[dict[str, Any]]:
    """Mitigations that act at these places. Their order does not matter, so it does not enter a key."""
    return sorted((m.model_dump(mode="json") for m in s.mitigations if m.acts_on in where), key=lambda d: d["name"])


def names(run: Run) -> dict[str, Any]:
    """The columns that tell a study's runs apart."""
    return {**run.names, "seed": run.settings.seed, "facts_seed": run.facts_seed}
