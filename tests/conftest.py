"""What test modules share: one thread, one small pretrained world and one finished study, made once a session."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for the Hub fails at once

import pytest
import torch

import retention
from retention.facts._read import DATA_ENV
from retention.study import Study
from retention.world import WorldModel
from tests.small_study import WORLD, document


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Path of real data below $RETENTION_DATA, or ../shared/data where it is not set; skips where there are none.

    Sets the variable. Nothing may be downloaded, and the data are not part of the project.
    """
    root = Path(os.environ.get(DATA_ENV) or Path(__file__).resolve().parents[2] / "shared" / "data")
    monkeypatch.setenv(DATA_ENV, str(root))

    def find(place: str) -> Path:
        if not (root / place).exists():
            pytest.skip(f"no {place} below {root} (set {DATA_ENV})")
        return root / place

    return find


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """Engines and trainers collect garbage at every stage: 0.2 to 0.5 s of looking through all that is imported.

    What is alive when a module begins is not looked at again.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def trl_imported() -> None:
    """The same, for modules that train: what trl imports is then alive as well."""
    import trl  # noqa: F401

    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of one session have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One worker at a time: the second finds done what the first has done."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    """A cache that holds the small world, pretrained."""
    with _alone(shared / "cache.lock"):
        WorldModel.model_validate(WORLD).folder(shared / "cache")
    return shared / "cache"


@pytest.fixture(scope="session")
def finished(shared: Path, cache: Path) -> Path:
    """A results folder with the small study (`small`), finished. Tests that change it copy it first."""
    with _alone(shared / "finished.lock"):
        retention.run(Study.of(document(), name="small"), results=shared / "finished", cache=cache)
    return shared / "finished"
