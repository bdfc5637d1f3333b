"""Jobs through submitit: same artefacts, failures told, the artefact believed and not the job.

Slurm is played by an executor that runs what it is handed at once; submitit's own, which starts a process a job, by a
long test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import retention
from retention.api import Unfinished
from retention.engines import Engine, slurm
from retention.study import Study
from retention.types import UserError
from tests.engines.fakes import faked, files, noted, study
from tests.small_study import document


class Job:
    def __init__(self, number: int, error: Exception | None) -> None:
        self.job_id, self.state, self._error = str(number), "COMPLETED", error

    def done(self) -> bool:
        return True

    def exception(self) -> Exception | None:
        return self._error


class Executor:
    """Runs each job as it is handed in, or loses it; keeps what it was asked for."""

    def __init__(self, works: bool = True) -> None:
        self.works = works
        self.asked: list[dict[str, Any]] = []
        self.parameters: dict[str, Any] = {}

    def update_parameters(self, **parameters: Any) -> None:
        self.parameters = parameters

    def submit(self, work: Any, *arguments: Any) -> Job:
        self.asked.append({**self.parameters, "stage": arguments[0]})
        error = None
        if self.works:
            try:
                work(*arguments)
            except Exception as raised:
                error = raised
        return Job(len(self.asked), error)


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Executor:
    made = Executor()
    monkeypatch.setattr(slurm, "_executor", lambda *_: made)
    monkeypatch.setattr(slurm.execute, "__kwdefaults__", slurm.execute.__kwdefaults__ | {"poll": 0.0, "late": 0.0})
    return made


def go(place: Path, cluster: str = "local", breaks: Any = lambda kind, run: None, **more: Any) -> None:
    engine = Engine(name="slurm", cluster=cluster, workers=2, **more)
    with faked(place / "log", breaks=breaks):
        retention.run(study(), results=place / "r", cache=place / "cache", engine=engine)


@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_the_same_artefacts_as_inline(tmp_path, executor, cluster):
    go(tmp_path, cluster)
    begun = [line[1:3] for line in noted(tmp_path / "log") if line[0] == "begin"]
    assert len(begun) == len(set(begun)) == 7
    with faked(tmp_path / "alone.log"):
        retention.run(study(), results=tmp_path / "alone", cache=tmp_path)
    assert files(tmp_path / "r") == files(tmp_path / "alone")


def test_a_stage_that_fails_blocks_what_needs_it(tmp_path, executor):
    def broken(kind: str, run: Any) -> None:
        if kind == "edit" and run.settings.editor.name == "rome":
            raise ZeroDivisionError

    with pytest.raises(Unfinished, match="1 of 7 stages failed, and 2 more wait"):
        go(tmp_path, breaks=broken)
    assert sum(line[:2] == ("begin", "tune") for line in noted(tmp_path / "log")) == 2


def test_on_slurm_jobs_wait_for_what_they_need_are_requeued_and_not_believed(tmp_path, executor):
    executor.works = False
    with pytest.raises(Unfinished, match="1 of 7 stages failed, and 6 more wait"):
        go(tmp_path, "slurm")
    assert [a["stage"].kind for a in executor.asked] == ["prepare"] + ["edit"] * 2 + ["tune"] * 4
    extra = [a["slurm_additional_parameters"] for a in executor.asked]
    assert all(e["requeue"] for e in extra)
    assert "dependency" not in extra[0]
    assert [e["dependency"] for e in extra[1:3]] == ["afterok:1"] * 2
    assert {e["dependency"] for e in extra[3:]} == {"afterok:1:2", "afterok:1:3"}
    (record,) = (tmp_path / "r" / "failed" / "bases").iterdir()
    assert "job 1 ended (COMPLETED) and left nothing" in record.read_text()


def test_what_submitit_is_not_asked(tmp_path):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    with pytest.raises(UserError, match="Slurm gives whole GPUs; the engine ray shares one"):
        go(tmp_path, gpus_per_run=0.5)
    with pytest.raises(UserError, match=r"--job: submitit refuses a parameter: .*slurm_partitoin"):
        go(tmp_path, job={"slurm_partitoin": "gpu"})
    with pytest.raises(UserError, match='--job: submitit refuses a parameter: Parameter "timeout_min" expected type'):
        go(tmp_path, job={"timeout_min": "4h"})


def test_a_job_whose_time_is_over_is_queued_again(tmp_path):
    """submitit asks the callable for what to queue; without an answer the job, and so the stage, fails."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    work = slurm.Settled()
    again = work.checkpoint(*(given := ("stage", tmp_path, tmp_path, 2)))
    assert (again.function, again.args, again.kwargs) == (work, given, {})


def test_a_machine_without_slurm(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r'--cluster slurm: submitit finds none on this machine: .*"srun"'):
        go(tmp_path, "slurm")


def test_what_a_job_asks_of_slurm():
    """The lines of the script that submitit makes of it. Without kill-on-invalid-dep a job waits for ever."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    from submitit.slurm.slurm import _make_sbatch_string

    extra = {"requeue": True, "dependency": "afterok:1:2", "kill_on_invalid_dep": "yes"}
    lines = _make_sbatch_string(command="c", folder="f", additional_parameters=extra).splitlines()
    expected = {"--requeue", "--dependency=afterok:1:2", "--kill-on-invalid-dep=yes"}
    assert {f"#SBATCH {option}" for option in expected} <= set(lines)


# The artefact tells that a job is done, so submitit's process may be about to end when the test is over.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.long
def test_the_same_rows_as_inline_by_processes_of_submitits_own(finished, cache, tmp_path):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    engine = Engine(name="slurm", cluster="local", workers=2)
    retention.run(Study.of(document(), name="small"), results=tmp_path / "r", cache=cache, engine=engine)
    for table in ("rows", "scores"):
        order = ["run_id", "step", "question_id" if table == "rows" else "score"]
        here, there = (
            retention.load(folder / "small", table).astype(str).sort_values(order, ignore_index=True)  # type: ignore[arg-type]
            for folder in (tmp_path / "r", finished)
        )
        pd.testing.assert_frame_equal(here, there)
    assert not list((tmp_path / "r").rglob("*.pkl"))
