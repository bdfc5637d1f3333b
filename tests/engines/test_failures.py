"""Stages that fail: recorded, tried again, and the rest of the grid goes on."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

import retention
from retention import ids, preflight, snapshot
from retention.api import Unfinished
from retention.cli import main
from retention.store import Store, write_json, write_table
from retention.study import Run
from retention.types import UserError
from tests.engines.fakes import faked, noted, study, traceback_of
from tests.engines.processes import Forked


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rome(kind: str, run: Run) -> None:
    if kind == "edit" and run.settings.editor.name == "rome":
        raise RuntimeError("the solver\nbroke")


def go(place: Path, breaks: Any = lambda kind, run: None, **more: Any) -> Path:
    with faked(place / "log", breaks=breaks):
        return retention.run(study(), results=place / "r", cache=place, **more)


def begun(place: Path, kind: str) -> int:
    return sum(line[:2] == ("begin", kind) for line in noted(place / "log"))


def test_the_rest_of_the_grid_goes_on_and_the_failure_is_told(place, capsys):
    with pytest.raises(Unfinished) as caught:
        go(place, rome)
    text = str(caught.value)
    assert "1 of 7 stages failed, and 2 more wait for what failed" in text
    assert "RuntimeError: the solver" in text
    assert "--retry-failed" in text
    store = Store(place / "r")
    runs = retention.load(place / "r", "runs")
    assert dict(runs["state"].value_counts()) == {"ok": 2, "edit failed: RuntimeError: the solver": 2}
    assert list(runs["complete"]) == list(runs["state"] == "ok")
    (failed,) = store.failures()
    run = next(r for r in study().runs if r.settings.editor.name == "rome")
    assert (failed["stage"], failed["key"], failed["attempts"]) == ("edit", ids.edit_id(run), 2)
    assert failed["error"] == "RuntimeError: the solver\nbroke"
    assert {"torch", "trl", "python"} <= set(failed["versions"])
    assert "in rome\n    raise RuntimeError" in traceback_of(place / "r", "edits", ids.edit_id(run))
    assert begun(place, "edit") == 3  # identity once, rome twice
    assert not (place / "r" / ".work").exists()
    assert list((place / "r" / "edits").iterdir()) != []
    with pytest.raises(SystemExit) as left:
        main(["status", "--results", str(place / "r")])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "fake: 2 of 4 runs complete" in out
    assert out.count("  waits  ") == 2
    assert f"failed: edit {ids.edit_id(run)} (editor=rome" in out
    assert "2 attempts, the last at 20" in out
    assert "RuntimeError: the solver\n  broke" in out
    assert "--retry-failed" in out


def test_what_failed_is_tried_again_only_when_asked_for(place):
    for _ in range(2):
        with pytest.raises(Unfinished):
            go(place, rome)
    assert begun(place, "edit") == 3  # the second run tried nothing
    with pytest.raises(Unfinished):
        go(place, rome, retry_failed=True, attempts=1)
    assert begun(place, "edit") == 4
    go(place, retry_failed=True)
    assert Store(place / "r").failures() == []
    assert not (place / "r" / "failed").exists()
    assert retention.load(place / "r", "runs")["complete"].all()


def test_what_passes_by_itself_costs_one_more_attempt(place):
    def full_memory(kind: str, run: Run) -> None:
        if kind == "prepare" and begun(place, "prepare") == 1:
            raise MemoryError

    go(place, full_memory)
    assert begun(place, "prepare") == 2
    assert not (place / "r" / "failed").exists()


def test_a_base_that_fails_blocks_everything_above_it(place):
    def base(kind: str, run: Run) -> None:
        assert kind != "prepare"

    with pytest.raises(Unfinished, match="1 of 7 stages failed, and 6 more wait"):
        go(place, base)
    assert begun(place, "edit") == begun(place, "tune") == 0


def test_a_mistake_of_the_users_is_told_without_a_traceback_and_tried_in_each_run(place):
    def mistake(kind: str, run: Run) -> None:
        if kind == "edit":
            raise UserError("corpus: too short")

    for times in (1, 2):
        with pytest.raises(UserError, match=r"^corpus: too short$"):
            go(place, mistake)
        assert begun(place, "edit") == 2 * times
    go(place)
    assert not (place / "r" / "failed").exists()


def test_a_damaged_record_of_a_failure_is_no_failure(place):
    with pytest.raises(Unfinished):
        go(place, rome)
    (record,) = (place / "r" / "failed").glob("*/*.json")
    record.write_text("{")
    go(place)
    assert not record.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_where_nothing_can_be_written_there_is_one_clear_error(place, number):
    def full(kind: str, run: Run) -> None:
        if kind == "edit":
            raise OSError(number, "told by the system", str(place / "r" / "x"))

    with pytest.raises(UserError, match=r"r/x: cannot be written: .*mend it and run the same command") as caught:
        go(place, full)
    assert len(str(caught.value).splitlines()) == 1
    assert begun(place, "edit") == 1
    assert not (place / "r" / ".work").exists()
    assert not list((place / "r").glob("edits/*"))
    assert not (place / "r" / "failed").exists()
    go(place)


def test_safetensors_tells_a_full_disk_in_its_message_alone(place):
    class SafetensorError(Exception):
        pass

    def full(kind: str, run: Run) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match="No space left on device"):
        go(place, full)


def test_a_file_that_may_not_be_read_is_no_full_disk(place):
    def forbidden(kind: str, run: Run) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/rows.jsonl")

    with pytest.raises(Unfinished, match=r"Permission denied: '/elsewhere/rows.jsonl'"):
        go(place, forbidden)


WRITERS = {
    "parquet": lambda path: write_table(path, pa.table({"a": torch.randn(1 << 16).numpy()})),
    "json": lambda path: write_json(path, {"a": "x" * (1 << 18)}),
    "safetensors": lambda path: save_file({"a": torch.ones(1 << 16)}, path),
    "snapshot": lambda path: snapshot.taken({"a": torch.ones(1 << 16)}).write(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_the_system_refuses_to_write_is_one_clear_error_of_every_writer(place, name):
    """A limit on the size of files is refused as a full disk is: in the middle of writing, by the system."""

    def large(kind: str, run: Run) -> None:
        if kind == "edit":
            WRITERS[name](place / "r" / "large")

    def work() -> int:
        sys.stderr = (place / "said").open("w", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
        try:
            go(place, large)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        return 0

    assert Forked(work).wait() == 2
    said = (place / "said").read_text()
    assert "cannot be written: File too large. Nothing half-written is used; mend it" in said
    assert len(said.splitlines()) == 1
    assert not list((place / "r").glob("edits/*"))
    go(place)
    assert retention.load(place / "r", "runs")["complete"].all()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user, as only root may")
def test_a_folder_that_is_really_read_only(monkeypatch):
    """As another user, since root writes everywhere; told before any stage."""
    preflight.settled(study())  # imports what a run needs: Python's own files may be closed to the other user
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o777)
        monkeypatch.setenv("RETENTION_CACHE", str(place / "cache"))
        (place / "r").mkdir(mode=0o755)  # root's: nobody else may write into it

        def work() -> int:
            sys.stderr = (place / "said").open("w", buffering=1)
            os.setuid(65534)
            try:
                go(place)
            except UserError as error:
                print(error, file=sys.stderr)
                return 2
            return 0

        assert Forked(work).wait() == 2
        said = (place / "said").read_text()
        assert "cannot be written: Permission denied; give another folder with --results" in said
        assert begun(place, "prepare") == 0
        assert [p.name for p in (place / "r").iterdir()] == []


def test_a_folder_that_cannot_be_made_is_told_before_work_starts(place, monkeypatch):
    def no(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", no)
    with pytest.raises(
        UserError, match=r"cannot be written: Read-only file system; give another folder with --results"
    ):
        go(place)


def test_exit_codes(place, capsys, monkeypatch):
    (place / "s.yaml").write_text(json.dumps(study().document))
    monkeypatch.setenv("RETENTION_CACHE", str(place))

    def call(breaks: Any, *more: str) -> tuple[int, str]:
        with faked(place / "log", breaks=breaks), pytest.raises(SystemExit) as left:
            main(["run", str(place / "s.yaml"), "--quiet", *more])
        return int(left.value.code or 0), capsys.readouterr().err

    code, err = call(rome)
    assert code == 1
    assert "retention: 1 of 7 stages failed" in err
    assert "Traceback" not in err
    assert call(lambda *_: None)[0] == 1  # not tried again
    assert call(lambda *_: None, "--retry-failed") == (0, "")
