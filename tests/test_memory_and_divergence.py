"""Training that does not fit into memory goes on in smaller parts, to the same end; training that diverged is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import retention
from retention.adapters import Full
from retention.mitigations import Kl, L2Sp
from retention.models import anatomy
from retention.objectives import Dpo, Kto, Sft
from retention.study import Study
from retention.trainers import micro_batches
from retention.tune import Budget, Held, OutOfMemory, fine_tune
from retention.types import UserError
from tests.mitigations.scenes import edited
from tests.small_study import TUNE, one
from tests.test_objectives import ROWS

NO_ROOM = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    lambda: MemoryError(),
]


pytestmark = pytest.mark.usefixtures("trl_imported")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`room(rows)`: more rows than that in a micro-batch do not fit. The sizes that were tried."""
    train = transformers.Trainer.training_step

    def choose(rows: int, error: Any = NO_ROOM[0]) -> list[int]:
        tried: list[int] = []

        def step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > rows:
                raise error()
            return train(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(transformers.Trainer, "training_step", step)
        return tried

    return choose


# ------------------------------------------------------------------------------------------------ memory


def tuned(folder: Path, objective: Any, split: int, mitigations: Any = (), read: Any = None) -> torch.Tensor:
    """All weights after two epochs of ten rows: batches of 6, and of 4, which halves of 6 cut into 3 and 1."""
    made = edited("llama")

    def hold(wrapped: Any) -> Held:
        return Held(guards=tuple(m.guard(wrapped, made.scene) for m in mitigations))

    result = fine_tune(
        made.model, made.tokenizer, (*ROWS, *ROWS[:2]), objective=objective, adapter=Full(), hold=hold,
        anatomy=anatomy(made.model), budget=Budget(steps=4), base=lambda: made.model, seed=0,
        at=(1,) if read else (), on_checkpoint=lambda step, tokens, model: read(), folder=folder, split=split,
        trainer={"per_device_train_batch_size": 6, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0},
    )  # fmt: skip
    assert result.split == {1: 1, 2: 2, 4: 6}[split]
    assert result.arguments["per_device_train_batch_size"] == 6 // result.split
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


CASES = [
    (Sft(), ()),
    (Dpo(), (L2Sp(weight=5.0),)),
    (Sft(), (Kl(n=4, batch=2, weight=5.0), L2Sp(weight=5.0))),
]


@pytest.mark.parametrize(("objective", "mitigations"), CASES, ids=["sft", "dpo-l2sp", "sft-kl-l2sp"])
def test_batches_in_parts_give_the_same_weights(tmp_path, objective, mitigations):
    whole, halves, single = (tuned(tmp_path, objective, split, mitigations) for split in (1, 2, 4))
    moved = (whole - torch.cat([p.detach().flatten() for p in edited("llama").model.parameters()])).abs().max()
    assert moved > 1e-3
    assert (halves - whole).abs().max() < 1e-4 * moved + 1e-6
    assert (single - whole).abs().max() < 1e-4 * moved + 1e-6


@pytest.mark.parametrize(
    ("rows", "split", "parts"), [(16, 1, 1), (16, 2, 2), (16, 3, 4), (15, 2, 3), (7, 2, 7), (2, 8, 2), (25, 4, 5)]
)
def test_parts_are_equal_and_the_batch_of_a_step_stays(rows, split, parts):
    asked = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 3, "learning_rate": 1.0}
    trainer, found = micro_batches(Sft(), asked, split)
    assert found == parts
    assert trainer["per_device_train_batch_size"] * parts == rows
    assert trainer["gradient_accumulation_steps"] == 3 * parts
    assert micro_batches(Kto(), asked, split) == (asked, 1)
    assert micro_batches(Dpo(loss=("aot",)), asked, split) == (asked, 1)


@pytest.mark.parametrize("error", NO_ROOM, ids=["cuda", "cpu", "python"])
def test_every_way_to_run_out_of_memory_is_one_error(tmp_path, room, error):
    room(2, error)
    with pytest.raises(OutOfMemory):
        tuned(tmp_path, Sft(), 2)


@pytest.mark.parametrize("error", NO_ROOM, ids=["cuda", "cpu", "python"])
def test_what_runs_out_of_memory_while_it_is_read_is_no_matter_of_batches(tmp_path, error):
    def read() -> None:
        raise error()

    with pytest.raises(UserError, match=r"probes: out of memory at a checkpoint .*smaller tokens_per_batch"):
        tuned(tmp_path, Sft(), 1, read=read)


def test_another_error_of_training_stays_itself(tmp_path, room):
    room(2, lambda: RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit") as caught:
        tuned(tmp_path, Sft(), 2)
    assert type(caught.value) is RuntimeError


@pytest.fixture(scope="module")
def short(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    study = Study.of(one(probes=["score"]), name="short")
    place = tmp_path_factory.mktemp("short")
    retention.run(study, results=place, cache=cache)
    return study, place


def test_a_run_that_does_not_fit_goes_on_in_smaller_parts_and_says_so(short, tmp_path, cache, room):
    study, undisturbed = short
    place = Path(shutil.copytree(undisturbed, tmp_path / "r"))
    shutil.rmtree(place / "runs")
    tried = room(4)
    retention.run(study, results=place, cache=cache)
    assert tried == [16, 8, *[4] * 16]
    (record,) = (json.loads(p.read_text()) for p in place.glob("runs/*/run.json"))
    (training,) = record["training"]
    assert training["split"] == 4
    assert training["arguments"]["per_device_train_batch_size"] == 4
    assert training["arguments"]["gradient_accumulation_steps"] == 4
    here, there = retention.load(place), retention.load(undisturbed)
    assert list(here["question_id"]) == list(there["question_id"])
    np.testing.assert_allclose(here["logp_target"], there["logp_target"], atol=2e-3)
    assert not np.array_equal(here["logp_target"], there["logp_target"])  # equal but for rounding
    np.testing.assert_array_equal(here["tokens_seen"], there["tokens_seen"])
    assert not (place / "failed").exists()
    assert not (place / ".work").exists()


def test_what_cannot_be_smaller_is_told_and_the_grid_goes_on(short, tmp_path, cache, room):
    place = Path(shutil.copytree(short[1], tmp_path / "r"))
    room(0)
    grid = {"seed": [0, 1]}  # the first is done
    study = Study.of(one(probes=["score"], grid=grid), name="two")
    with pytest.raises(UserError, match=r"out of memory \(CUDA out of memory.* activation_checkpointing: true"):
        retention.run(study, results=place, cache=cache)
    assert list(retention.load(place / "two", "runs")["complete"]) == [True, False]
    (failed,) = place.glob("failed/runs/*.json")
    assert "out of memory" in failed.read_text()


# ------------------------------------------------------------------------------------------------ divergence


def test_a_run_that_diverged_has_all_its_rows_each_with_its_state(cache, tmp_path, monkeypatch):
    steps: list[int] = []
    train = transformers.Trainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step + 1)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)
    tune = {**TUNE, "steps": 8, "trainer": {"learning_rate": 1e30}}
    study = Study.of(one(probes=["score"], tune=tune, at=[1, 4, 8], grid={"seed": [0, 1]}), name="high")
    retention.run(study, results=tmp_path, cache=cache)
    rows, scores = retention.load(tmp_path), retention.load(tmp_path, "scores")
    assert set(rows["step"]) == {-1, 0, 1, 4, 8}
    late = rows[rows["step"] >= 4]
    assert set(late["state"]) == {"nan_logits"}
    assert late["logp_target"].isna().all()
    assert set(scores[scores["step"] == 8]["state"]) == {"nan_logits"}
    record = json.loads(next(tmp_path.glob("runs/*/run.json")).read_text())
    (training,) = record["training"]
    assert training["diverged"] == training["steps"] < 8
    assert max(steps) == training["steps"]
    assert rows.groupby("step")["question_id"].nunique().nunique() == 1
