"""A fine-tune that is interrupted goes on from its last snapshot and ends bit for bit as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import retention
from retention import fine_tuning, memory, snapshot
from retention import resume as resuming
from retention.adapters import Adapter, Full
from retention.cli import main
from retention.interrupts import Held as Signals
from retention.interrupts import held_back
from retention.models import anatomy
from retention.objectives import Clm, Cpo, Distill, Dpo, Grpo, Kto, Orpo, Sft
from retention.resume import Resume
from retention.study import Study
from retention.tune import Budget, Held, TuneResult, fine_tune
from tests.mitigations.test_in_a_study import ALL
from tests.small_study import ROME, TUNE, one
from tests.test_objectives import ROWS
from tests.test_peft_adapters import MISSING, SETTINGS
from tests.tiny import build

TIMED = {"train_runtime", "train_tokens_per_second", "train_samples_per_second", "train_steps_per_second", "step_time"}


pytestmark = pytest.mark.usefixtures("trl_imported")


class Killed(BaseException):
    """In place of SIGKILL: nobody cleans up after it."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The optimizer steps that are really trained, in the order in which they are."""
    done: list[int] = []
    train = transformers.Trainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(self.state.global_step + 1)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)
    return done


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Save after every step; `kill(tune, step)`: die once that step is saved, or as that fine-tune of a list begins."""
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    monkeypatch.setattr(resuming, "SHARE", math.inf)
    write, at = Resume._write, [""]

    def write_and_die(self: Resume, path: Path, value: Any) -> None:
        write(self, path, value)
        self.settle()
        if path.name == at[0]:
            at[0] = ""
            raise Killed

    def choose(tune: int, step: int | None = None) -> None:
        at[0] = f"tune-{tune}" if step is None else f"tune-{tune}-{step:08d}"

    monkeypatch.setattr(Resume, "_write", write_and_die)
    yield choose
    assert at[0] == "", "was never reached"


# ------------------------------------------------------------------------------------------------ one fine-tune


def tuned(
    folder: Path, objective: Any, adapter: Any, name: str, total: int, signals: Any = None, **trainer: Any
) -> tuple[dict[str, torch.Tensor], TuneResult]:
    """All weights after some steps with dropout, and what the fine-tune reports."""
    drops = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1} if name == "gpt2" else {"attention_dropout": 0.1}
    model, tokenizer = build(name, **drops)
    resume = Resume(folder, "edit", signals or Signals(), lambda what: None)
    result = fine_tune(
        model, tokenizer, ROWS, objective=objective, adapter=adapter, hold=lambda wrapped: Held(),
        anatomy=anatomy(model), budget=Budget(steps=total), base=lambda: build(name)[0], seed=0, at=(),
        on_checkpoint=lambda step, tokens, model: None, folder=folder / "trainer", resume=resume,
        trainer={"logging_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 3e-3} | trainer,
    )  # fmt: skip
    return {n: p.detach().clone() for n, p in model.named_parameters()}, result


def log(result: TuneResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in TIMED} for entry in result.log]


def check(folder: Path, steps: list[int], kill: Any, objective: Any, adapter: Any, name: str, **trainer: Any) -> None:
    """Six steps, two epochs' worth or so, killed after the third: between two entries of the log."""
    total = trainer.pop("total", 6)
    undisturbed, expected = tuned(folder / "a", objective, adapter, name, total, **trainer)
    per_step = len(steps) // total
    steps.clear()
    kill(1, 3)
    with pytest.raises(Killed):
        tuned(folder / "b", objective, adapter, name, total, **trainer)
    assert steps == [n for n in range(1, 4) for _ in range(per_step)]
    steps.clear()
    weights, result = tuned(folder / "b", objective, adapter, name, total, **trainer)
    assert steps == [n for n in range(4, total + 1) for _ in range(per_step)]  # not from the beginning
    assert result.resumed == (3,)
    assert weights.keys() == undisturbed.keys()
    assert [n for n in weights if not torch.equal(weights[n], undisturbed[n])] == []
    assert log(result) == log(expected)
    assert [list(entry) for entry in result.log] == [list(entry) for entry in expected.log]
    assert (result.steps, result.tokens) == (expected.steps, expected.tokens)


LONG = pytest.mark.long
OBJECTIVES = [
    (Sft(), {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}),
    pytest.param(Sft(packing="bfd"), {"max_length": 24, "neftune_noise_alpha": 1.0}, marks=LONG),
    pytest.param(Clm(block=16), {"optim": "adafactor"}, marks=LONG),
    (Dpo(), {"optim": "sgd", "lr_scheduler_type": "linear", "warmup_steps": 4}),
    pytest.param(Kto(), {}, marks=LONG),
    (Grpo(num_generations=2), {"total": 4}),
    pytest.param(Distill(max_completion_length=4), {"total": 4}, marks=LONG),
    pytest.param(Orpo(experimental=True), {}, marks=LONG),
    pytest.param(Cpo(experimental=True), {}, marks=LONG),
]
ADAPTERS = [name if name in ("lora", "pissa") else pytest.param(name, marks=LONG) for name in SETTINGS]


@pytest.mark.parametrize(("objective", "trainer"), OBJECTIVES, ids=lambda v: getattr(v, "name", ""))
def test_every_objective_goes_on_where_it_was_killed(tmp_path, steps, kill, objective, trainer):
    check(tmp_path, steps, kill, objective, Full(), "gpt2", **trainer)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_goes_on_where_it_was_killed(tmp_path, steps, kill, name):
    model = "llama" if (name, "gpt2") in MISSING else "gpt2"
    settings = SETTINGS[name] | ({"lora_dropout": 0.1} if name == "lora" else {})
    check(tmp_path, steps, kill, Sft(), Adapter(name=name, settings=settings), model)


def test_an_optimizer_that_is_finer_than_the_weights_goes_on_unrounded(tmp_path, steps, kill, monkeypatch):
    whole = build

    def halves(*args: Any, **kwargs: Any) -> Any:
        model, tokenizer = whole(*args, **kwargs)
        return model.to(torch.bfloat16), tokenizer

    monkeypatch.setattr(f"{__name__}.build", halves)
    check(tmp_path, steps, kill, Sft(), Full(), "gpt2", optim="adafactor")


# ------------------------------------------------------------------------------------------------ a whole run

LIST = [
    {**TUNE, "steps": 3, "adapter": {"name": "lora", "settings": {"r": 4, "lora_dropout": 0.1}}},
    {"data": {"name": "world", "task": "text", "rows": 64}, "objective": "clm", "tokens": 900,
     "trainer": {"learning_rate": 1.0e-2, "per_device_train_batch_size": 8, "logging_steps": 2, "bf16": True}},
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """Two fine-tunes one after another, under every remedy, with all there is to read; undisturbed."""
    study = Study.of(
        one(editor=ROME, mitigations=ALL, tune=LIST, at=[1, 2, 3, 4, 6], weights=True, probes=["score"]),
        name="whole",
    )
    place = tmp_path_factory.mktemp("whole")
    retention.run(study, results=place, cache=cache)
    return study, place


@pytest.fixture
def again(whole: tuple[Study, Path], tmp_path: Path) -> Path:
    """The same results without the run: base and edit are there."""
    place = Path(shutil.copytree(whole[1], tmp_path / "r"))
    shutil.rmtree(place / "runs")
    return place


def numbers(results: Path) -> dict[str, Any]:
    """Everything that was published of the one run, but times."""
    (folder,) = (results / "runs").iterdir()
    found: dict[str, Any] = {
        path.name: pq.read_table(path).to_pandas().drop(columns=TIMED, errors="ignore")
        for path in folder.glob("*.parquet")
    }
    record = json.loads((folder / "run.json").read_text())
    for training in record["training"]:
        del training["seconds"], training["resumed"]
    marked = json.loads((folder / "complete.json").read_text())["sha256"]
    sums = {name: digest for name, digest in marked.items() if name.startswith(("probes", "relearn", "scores"))}
    return found | {"run.json": record, "sums": sums, "files": sorted(marked)}


def same(results: Path, undisturbed: Path) -> None:
    here, there = numbers(results), numbers(undisturbed)
    assert here.keys() == there.keys()
    for name, value in there.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(here[name], value, check_exact=True)
        else:
            assert here[name] == value, name
    assert not (results / ".work").exists()


def go(study: Study, results: Path, cache: Path) -> None:
    retention.run(study, results=results, cache=cache)


def test_a_list_of_fine_tunes_under_every_remedy_killed_three_times(whole, again, cache, steps, kill):
    for tune, step in ((1, 2), (2, None), (2, 1)):
        kill(tune, step)
        with pytest.raises(Killed):
            go(whole[0], again, cache)
    assert steps == [1, 2, 3, 1]
    go(whole[0], again, cache)
    (record,) = (json.loads(p.read_text()) for p in again.glob("runs/*/run.json"))
    first, second = record["training"]
    assert (first["resumed"], second["resumed"]) == ([2], [1])
    assert first["precision"] == {"weights": "float32", "compute": "float32"}
    assert second["precision"] == {"weights": "float32", "compute": "bfloat16"}
    assert steps == [1, 2, 3, *range(1, second["steps"] + 1)]  # each once
    same(again, whole[1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def other_format(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": snapshot.FORMAT + 1}))


DAMAGE = [
    ("resume/tune-1-00000007/tensors.bin", flip),
    ("resume/tune-1-00000007/tensors.bin", cut),
    ("resume/tune-1-00000007/value.json", flip),
    ("resume/tune-1-00000007/value.json", Path.unlink),
    ("resume/tune-1-00000007/complete.json", cut),
    ("resume/tune-1-00000007/complete.json", other_format),
    ("probes-000005.parquet", flip),
    ("probes-000005.parquet", Path.unlink),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda v: getattr(v, "__name__", v))
def test_what_is_not_as_it_was_saved_is_never_used_and_removed(tmp_path, name, damage):
    place = tmp_path / "run"
    place.mkdir()

    def opened() -> Resume:
        return Resume(place, "edit", Signals(), lambda what: pytest.fail(what))

    (place / "probes-000005.parquet").write_bytes(b"rows of step 5")
    saving = opened()
    assert not (place / "probes-000005.parquet").exists()  # no snapshot: read again
    (place / "probes-000005.parquet").write_bytes(b"rows of step 5")
    saving.run = {"scores": [1.5]}
    saving.save({"step": 7, "parameters": {"w": torch.ones(3)}})
    saving.settle()
    (place / "probes-000009.parquet").write_bytes(b"rows of step 9")
    found = opened()
    assert found.before() == {"scores": [1.5]}
    assert torch.equal(found.begun["training"]["parameters"]["w"], torch.ones(3))
    assert [p.name for p in place.glob("*.parquet")] == ["probes-000005.parquet"]
    shutil.copytree(place, tmp_path / "copy")
    assert Resume(tmp_path / "copy", "another edit", Signals(), lambda what: None).before() is None
    damage(place / name)
    found = opened()
    assert (found.before(), found.begun, found.first, found.number) == (None, None, None, 1)
    assert [p.name for p in place.rglob("*")] == ["resume"]


@pytest.fixture(scope="module")
def short(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    study = Study.of(one(probes=["score"]), name="short")
    place = tmp_path_factory.mktemp("short")
    retention.run(study, results=place, cache=cache)
    return study, place


def emptied(short: tuple[Study, Path], tmp_path: Path) -> Path:
    place = Path(shutil.copytree(short[1], tmp_path / "r"))
    shutil.rmtree(place / "runs")
    return place


def test_a_run_whose_snapshot_is_damaged_begins_again(short, tmp_path, cache, steps, kill):
    place = emptied(short, tmp_path)
    kill(1, 3)
    with pytest.raises(Killed):
        go(short[0], place, cache)
    flip(next(place.rglob("resume/*/tensors.bin")))
    steps.clear()
    go(short[0], place, cache)
    assert steps == [1, 2, 3, 4]
    same(place, short[1])


def test_a_full_disk_on_the_way_costs_the_snapshot_and_nothing_else(short, tmp_path, cache, monkeypatch):
    place, told = emptied(short, tmp_path), []
    monkeypatch.setattr(resuming, "EVERY", 0.0)

    def full(taken: snapshot.Taken, folder: Path) -> None:
        told.append(folder.name)
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(snapshot.Taken, "write", full)
    go(short[0], place, cache)
    assert told == ["tune-1-00000001"]  # once
    same(place, short[1])


def test_small_runs_save_nothing(short, tmp_path, cache, monkeypatch):
    place = emptied(short, tmp_path)
    monkeypatch.setattr(snapshot, "taken", lambda *_: pytest.fail("saved"))
    go(short[0], place, cache)
    same(place, short[1])


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_at_a_signal_the_step_is_done_and_saved(short, tmp_path, cache, steps, monkeypatch, capsys, number, code):
    place = emptied(short, tmp_path)
    (tmp_path / "short.yaml").write_text(json.dumps(short[0].document))
    monkeypatch.setenv("RETENTION_CACHE", str(cache))
    own = Resume.due

    def due(self: Resume) -> bool:
        if steps[-1] == 2:
            os.kill(os.getpid(), number)
        return own(self)

    monkeypatch.setattr(Resume, "due", due)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        main(["run", str(tmp_path / "short.yaml"), "--results", str(place), "--quiet"])
    assert left.value.code == code
    said = capsys.readouterr().err
    assert "1 of 3 stages are left (1 tune, 1 of them begun and saved); run the same command to go on" in said
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps == [1, 2]
    assert [p.name for p in place.rglob("resume/*")] == ["tune-1-00000002"]
    monkeypatch.setattr(Resume, "due", own)
    go(short[0], place, cache)
    assert steps == [1, 2, 3, 4]
    same(place, short[1])


def test_a_signal_at_the_last_step_waits_until_the_run_is_published(short, tmp_path, cache, steps, monkeypatch):
    place = emptied(short, tmp_path)
    write = fine_tuning.write_readings

    def at_the_end(path: Path, *args: Any) -> None:
        write(path, *args)
        if path.name == "probes-000004.parquet":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(fine_tuning, "write_readings", at_the_end)
    with pytest.raises(KeyboardInterrupt):
        go(short[0], place, cache)
    same(place, short[1])


def test_a_second_signal_is_not_held_back_nor_one_before_training():
    with pytest.raises(KeyboardInterrupt), held_back():
        os.kill(os.getpid(), signal.SIGINT)
    with held_back() as held:
        held.holding = True
        os.kill(os.getpid(), signal.SIGINT)
        assert held.waiting == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        held.waiting = None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_takes_no_notice_of_a_signal_trains_on(short, tmp_path, cache, monkeypatch):
    """As in a job of submitit's, which sees to SIGTERM itself."""
    place, heard = emptied(short, tmp_path), []
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    write = fine_tuning.write_readings

    def told(path: Path, *args: Any) -> None:
        write(path, *args)
        if path.name == "probes-000002.parquet":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fine_tuning, "write_readings", told)
    try:
        go(short[0], place, cache)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["SIGTERM"]
    same(place, short[1])


# ------------------------------------------------------------------------------------------------ in the background


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No snapshot is written before the event is set."""
    go_on, write = threading.Event(), snapshot.Taken.write

    def late(taken: snapshot.Taken, folder: Path) -> None:
        assert go_on.wait(60)
        write(taken, folder)

    monkeypatch.setattr(snapshot.Taken, "write", late)
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    monkeypatch.setattr(resuming, "SHARE", math.inf)
    yield go_on
    go_on.set()


def test_a_snapshot_is_of_its_step_although_training_goes_on_while_it_is_written(tmp_path, slow):
    weight, scores = torch.ones(3), [1.5]
    with Resume(tmp_path, "edit", Signals(), lambda what: pytest.fail(what)) as saving:
        saving.run = {"scores": scores}
        assert saving.due()
        saving.save({"step": 7, "parameters": {"w": weight}})
        weight += 1
        scores.append(2.5)
        assert not saving.due()  # one at a time
        slow.set()
    found = Resume(tmp_path, "edit", Signals(), lambda what: None)
    assert found.before() == {"scores": [1.5]}
    assert torch.equal(found.begun["training"]["parameters"]["w"], torch.ones(3))


@pytest.mark.parametrize("room", [0, 1 << 40])
def test_what_memory_holds_no_copy_of_is_written_at_once(tmp_path, monkeypatch, room):
    monkeypatch.setattr(memory, "available", lambda: room)
    saving = Resume(tmp_path, "edit", Signals(), lambda what: pytest.fail(what))
    saving.save({"step": 7, "parameters": {"w": torch.ones(3)}})
    assert (saving._writing is None) == (room == 0)
    saving.settle()
    assert [p.name for p in tmp_path.glob("resume/*")] == ["tune-1-00000007"]


def test_at_a_signal_nothing_is_left_to_be_written(tmp_path, slow):
    slow.set()
    signals = Signals()
    signals.waiting = signal.SIGTERM
    Resume(tmp_path, "edit", signals, lambda what: None).save({"step": 7, "parameters": {"w": torch.ones(3)}})
    assert [p.name for p in tmp_path.glob("resume/*")] == ["tune-1-00000007"]


def test_the_next_snapshot_waits_until_this_one_has_cost_at_most_its_share(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(resuming.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(resuming.time, "thread_time", lambda: 3.0)
    saving = Resume(tmp_path, "edit", Signals(), lambda what: pytest.fail(what))
    now[0] += resuming.EVERY
    assert saving.due()
    saving.save({"step": 7, "parameters": {"w": torch.ones(3)}})
    saving.settle()
    for seconds, due in ((resuming.EVERY, False), (3.0 / 0.02 - resuming.EVERY - 1, False), (2, True)):
        now[0] += seconds
        assert saving.due() == due


# ------------------------------------------------------------------------------------------------ values


def test_values_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "PORTION", 7)
    base = torch.randn(4, 8)
    value = {
        "a": [1, 2.5, -0.0, 1e-310, "text", None, True, (1, (2,))], 3: {"nested": {}}, (1, "key"): [],
        "tensors": [base, base.T, base[1:], torch.tensor(3), torch.zeros(0), torch.ones(3, dtype=torch.bfloat16)],
        "nan": math.nan,
    }  # fmt: skip
    snapshot.taken(value).copied().write(tmp_path / "s")
    found = snapshot.load(tmp_path / "s")
    assert math.isnan(found.pop("nan"))
    tensors, before = found.pop("tensors"), value["tensors"]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, before, strict=True))
    assert [t.stride() for t in tensors] == [t.stride() for t in before]  # products are rounded by it
    assert found == {k: v for k, v in value.items() if k not in ("tensors", "nan")}
    assert str(found["a"][2]) == "-0.0"
    assert isinstance(found["a"][7], tuple)
    with pytest.raises(TypeError, match="cannot be saved: set"):
        snapshot.taken({"a": {1}})
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    with pytest.raises(ValueError, match="No such file"):
        snapshot.load(tmp_path / "t")


def test_what_was_on_a_device_that_is_not_here_is_no_snapshot(tmp_path, monkeypatch):
    down = snapshot._down
    elsewhere = lambda v, t: json.loads(json.dumps(down(v, t)).replace('"cpu"', '"cuda:63"'))  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "_down", elsewhere)
        snapshot.taken({"a": torch.ones(2)}).write(tmp_path / "s")
    with pytest.raises(ValueError, match=r"s: .*(CUDA|device)"):
        snapshot.load(tmp_path / "s")
