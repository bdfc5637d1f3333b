"""Content keys: what a base, an edit and a run are made of, and therefore when two are the same.

Everything that can move a number enters a key: settings with all defaults, the content of files, seeds, threads,
package versions, and the version of each stage's algorithm. Where data lie does not.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
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
from retention.objectives import Clm, Sft
from retention.presets import set_aside
from retention.study import Run, Settings
from retention.trainer_fields import DEFAULTS
from retention.types import Missing, content_id

# Version of each stage's algorithm: raised when its numbers change, so that old artefacts are not taken for new ones.
VERSIONS = {"prepare": 3, "edit": 2, "tune": 3}

_version = lru_cache(importlib.metadata.version)


def versions(*names: str) -> dict[str, str]:
    return {name: _version(name) for name in names}


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
    """Of the files that a part reads."""
    return _content(lambda: sorted(file_digest(file).hex() for file in files()), part)


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
            "probes": [p.model_dump(mode="json") for p in s.probes],
            "threads": s.threads,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "versions": versions("torch", "transformers"),
            **_set_aside(s.model),
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
            "mitigations": mitigations_at(s, "edit"),
            "late": [s.late.model_dump(mode="json"), DEFAULTS, dict(Clm.defaults)] if s.facts.late else None,
            "seed": s.seed,
            "versions": versions("peft", *(["trl", "accelerate", "datasets"] if s.facts.late else [])),
        }
    )


def run_id(run: Run) -> str:
    s = run.settings
    return content_id(
        {
            "stage": ["tune", VERSIONS["tune"]],
            "edit": edit_id(run),
            "objective": s.objective.model_dump(mode="json"),
            "adapter": s.adapter.model_dump(mode="json"),
            "mitigations": mitigations_at(s, "rows", "training", "after"),
            "tune": [_settings(t.model_dump(mode="json")) for t in s.tunes],
            "files": [_hashes(partial(files_of, t.data), t.data.model_dump(mode="json")) for t in s.tunes],
            "mitigation_files": _hashes(lambda: [file for m in s.mitigations for file in m.files()], None),
            "defaults": [DEFAULTS, *(dict((t.objective or s.objective).defaults) for t in s.tunes)],
            "at": s.at,
            "abilities": [
                {
                    **_settings(a.model_dump(mode="json")),
                    "files": _hashes(a.files, a.model_dump(mode="json")),
                    "versions": versions(*a.packages),
                }
                for a in s.abilities
            ],
            "weights": s.weights,
            "relearn": None if s.relearn is None else [s.relearn.model_dump(mode="json"), dict(Sft.defaults)],
            "seed": s.seed,
            "versions": versions("trl", "accelerate", "datasets"),
            **({} if s.launch is None or s.launch.count == 1 else {"launch": s.launch.key()}),
        }
    )


def _settings(dump: dict[str, Any]) -> dict[str, Any]:
    """A part's settings without those that say where its data lie: what the files hold is hashed."""
    kept = {k: v for k, v in dump.items() if k not in ("path", "counterfact", "trex")}
    return {k: _settings(v) if isinstance(v, dict) else v for k, v in kept.items()}


def corpus_files(s: Settings) -> list[Path]:
    """The texts of the covariance of keys, where the study names them. Raises Missing."""
    return [] if s.corpus is None else [data_file(s.corpus, "corpus")]


def mitigations_at(s: Settings, *where: str) -> list[dict[str, Any]]:
    """Mitigations that act at these places. Their order does not matter, so it does not enter a key."""
    return sorted((m.model_dump(mode="json") for m in s.mitigations if m.acts_on in where), key=lambda d: d["name"])


def names(run: Run) -> dict[str, Any]:
    """The columns that tell a study's runs apart."""
    return {**run.names, "seed": run.settings.seed, "facts_seed": run.facts_seed}
