"""Several processes at one grid, and processes that are interrupted or killed: each stage once, nothing lost."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import retention
from retention.cli import main
from retention.store import Store
from tests.engines.fakes import faked, files, noted, study
from tests.engines.processes import Forked, until


def worker(place: Path, seconds: float = 0.05) -> Forked:
    def work() -> None:
        with faked(place / "log", seconds):
            retention.run(study(), results=place / "r", cache=place)

    return Forked(work)


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, str]:
    with faked(tmp_path / "alone.log"):
        retention.run(study(), results=tmp_path / "alone", cache=tmp_path)
    return files(tmp_path / "alone")


def test_three_processes_share_one_study_and_each_stage_is_run_once(tmp_path, undisturbed):
    children = [worker(tmp_path) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    begun = [line[1:3] for line in noted(tmp_path / "log") if line[0] == "begin"]
    assert len(begun) == len(set(begun)) == 7
    assert len({line[3] for line in noted(tmp_path / "log")}) > 1  # they did share
    assert files(tmp_path / "r") == undisturbed
    assert not (tmp_path / "r" / ".work").exists()
    assert len(retention.load(tmp_path / "r", "runs")) == 4


def test_killed_again_and_again_the_grid_completes_as_if_nothing_had_happened(tmp_path, undisturbed):
    """Two processes at a time, 25 of them killed at random moments."""
    drawn = random.Random("kills")
    kills = 0
    children = [worker(tmp_path, 0.1), worker(tmp_path, 0.1)]
    while kills < 25 and not all(store_done(tmp_path, name) for name in undisturbed):
        time.sleep(drawn.uniform(0.0, 0.12))
        victim = drawn.randrange(2)
        children[victim].send(signal.SIGKILL)
        kills += children[victim].wait() == -signal.SIGKILL
        children[victim] = worker(tmp_path, 0.1)
    assert [child.wait() for child in children] == [0, 0]
    assert kills > 0
    assert files(tmp_path / "r") == undisturbed
    ended = Counter(line[1:3] for line in noted(tmp_path / "log") if line[0] == "end")
    assert set(ended.values()) == {1}
    assert not (tmp_path / "r" / ".work").exists()


def store_done(place: Path, name: str) -> bool:
    return (place / "r" / name).exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_says_what_is_left_and_leaves_nothing_half_done(tmp_path, number, code, monkeypatch):
    (tmp_path / "s.yaml").write_text(json.dumps(study().document))
    monkeypatch.setenv("RETENTION_CACHE", str(tmp_path))
    said = tmp_path / "said"

    def work() -> None:
        sys.stderr = said.open("w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with faked(tmp_path / "log", 0.2):
            main(["run", str(tmp_path / "s.yaml"), "--results", str(tmp_path / "r"), "--quiet"])

    child = Forked(work)
    until(lambda: sum(line[:2] == ("begin", "edit") for line in noted(tmp_path / "log")) == 2)
    time.sleep(0.05)
    child.send(number)
    assert child.wait() == code
    text = said.read_text()
    assert "retention: interrupted after" in text
    assert "5 of 7 stages are left (1 edit, 4 tune); run the same command to go on" in text
    assert "Traceback" not in text
    assert not (tmp_path / "r" / ".work").exists()
    store = Store(tmp_path / "r")
    assert len(list((store.root / "edits").iterdir())) == 1
    assert store.failures() == []
    assert worker(tmp_path, 0.0).wait() == 0
    assert sum(line[0] == "begin" for line in noted(tmp_path / "log")) == 8  # the interrupted one twice


def test_a_stage_that_another_process_gives_up_is_not_tried_for_ever(tmp_path):
    """Both see the failure of either, and both end."""

    def broken(kind: str, run: object) -> None:
        if kind == "edit":
            raise ZeroDivisionError

    def work() -> int:
        with faked(tmp_path / "log", 0.02, broken):
            try:
                retention.run(study(), results=tmp_path / "r", cache=tmp_path)
            except retention.api.Unfinished:
                return 1
        return 0

    children = [Forked(work), Forked(work)]
    assert [child.wait() for child in children] == [1, 1]
    begun = Counter(line[1] for line in noted(tmp_path / "log") if line[0] == "begin")
    # Two attempts at each of two edits; the second process may begin one more before it sees the last record.
    assert begun["prepare"] == 1
    assert 4 <= begun["edit"] <= 5


def test_a_model_of_ours_is_pretrained_by_one_process(tmp_path, monkeypatch):
    from retention.cache_folders import publish, sound
    from retention.engines import _work
    from retention.stages import Bench
    from retention.world import WorldModel

    made = []

    def folder(self: WorldModel, cache: Path, progress: object = None) -> Path:
        out = self.place(cache)
        if not sound(out):
            with (tmp_path / "made").open("a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.2)
            publish(out, lambda folder: {})
        made.append(out)
        return out

    monkeypatch.setattr(WorldModel, "folder", folder)
    run = study().runs[0]
    bench = Bench(store=Store.peek(tmp_path / "r"), cache=tmp_path / "cache")
    children = [Forked(lambda: _work.made(run, bench)) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    assert list((tmp_path / "cache" / "claims").iterdir()) == []
    _work.made(run, bench)
    assert made == []  # it is there: nobody is asked
