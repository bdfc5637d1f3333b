"""Stages as Ray tasks: same artefacts, each stage once, workers and nodes that die are replaced."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import retention
from retention.api import Unfinished
from retention.engines import Engine
from retention.engines import ray as engine_ray
from retention.study import Study
from tests.engines.fakes import fake_settle, faked, files, noted, study
from tests.small_study import document

ray = pytest.importorskip("ray", reason="needs the extra ray")
ROOT = Path(__file__).resolve().parents[2]

# Ray's own processes and sockets are closed by its exit handler, which Python's checks do not wait for.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(engine_ray, "settle", fake_settle)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "seconds").write_text("0.05")
    return tmp_path


@pytest.fixture(scope="module")
def cluster() -> Any:
    """One cluster for the tests of this module: starting one is what costs."""
    os.environ["PYTHONPATH"] = str(ROOT)
    engine_ray._library()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False)
    yield
    ray.shutdown()
    with warnings.catch_warnings():  # Ray leaves it to the system to wait for the processes that it has ended
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def go(place: Path) -> None:
    with faked(place / "log"):  # for what the driver looks at before work starts
        retention.run(study(), results=place / "r", cache=place / "cache", engine=Engine(name="ray", workers=2))


def alone(place: Path) -> dict[str, str]:
    with faked(place / "alone.log"):
        retention.run(study(), results=place / "alone", cache=place / "cache")
    return files(place / "alone")


def begun(place: Path) -> Counter[tuple[str, str]]:
    return Counter((kind, key) for what, kind, key, _, _ in noted(place / "log") if what == "begin")


def test_the_same_artefacts_each_computed_once_after_what_it_needs(place, cluster):
    go(place)
    assert files(place / "r") == alone(place)
    assert list(begun(place).values()) == [1] * 7
    times = {(what, kind, key): at for what, kind, key, _, at in noted(place / "log")}
    base_done = max(at for (what, kind, _), at in times.items() if (what, kind) == ("end", "prepare"))
    assert all(at > base_done for (what, kind, _), at in times.items() if (what, kind) == ("begin", "edit"))
    assert len({line[3] for line in noted(place / "log")}) == 2  # two processes at work
    assert os.getpid() not in {line[3] for line in noted(place / "log")}


def test_a_worker_that_is_killed_is_replaced_and_a_stage_that_fails_blocks_what_needs_it(place, cluster):
    (place / "cache" / "kill").touch()
    (place / "cache" / "fail").touch()
    with pytest.raises(Unfinished, match="1 of 7 stages failed, and 2 more wait"):
        go(place)
    assert sorted(begun(place).values()) == [1, 1, 1, 1, 3]  # rome's edit: killed once, failed twice
    (place / "cache" / "fail").unlink()
    (place / "r" / "failed" / "edits").rename(place / "was")
    go(place)
    assert files(place / "r") == alone(place)


@pytest.mark.long
def test_a_node_that_is_removed(place, monkeypatch):
    """Two nodes; one goes in the middle. What ran there is computed once more, and nothing else is."""
    from ray.cluster_utils import Cluster

    ray.shutdown()  # of the other tests' cluster
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (place / "cache" / "seconds").write_text("1.0")
    small = {"num_cpus": 1, "object_store_memory": 100 << 20}
    nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    second = nodes.add_node(**small)
    deadline = time.monotonic() + 120
    removed = threading.Event()

    def remove() -> None:
        while sum(begun(place).values()) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        nodes.remove_node(second, allow_graceful=False)
        removed.set()

    try:
        ray.init(address=nodes.address, log_to_driver=False)
        threading.Thread(target=remove, daemon=True).start()
        go(place)
        assert removed.is_set()
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert files(place / "r") == alone(place)
    again = {stage: n for stage, n in begun(place).items() if n > 1}
    assert list(again.values()) in ([], [2]), again


@pytest.mark.long
def test_the_same_rows_as_inline(finished, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    results = tmp_path / "r"
    retention.run(
        Study.of(document(), name="small"), results=results, cache=cache, engine=Engine(name="ray", workers=2)
    )
    for table in ("rows", "scores"):
        order = ["run_id", "step", "question_id" if table == "rows" else "score"]
        here, there = (
            retention.load(folder / "small", table).astype(str).sort_values(order, ignore_index=True)  # type: ignore[arg-type]
            for folder in (results, finished)
        )
        pd.testing.assert_frame_equal(here, there)
