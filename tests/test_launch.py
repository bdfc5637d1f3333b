"""A fine-tune on several processes: the setting, and two ranks on a processor against one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

import retention
from retention.ids import edit_id, run_id
from retention.study import Study
from retention.types import UserError
from tests.small_study import ROME, TUNE, one

TWO = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2,
       "num_machines": 1, "machine_rank": 0, "mixed_precision": "no", "main_training_function": "main"}  # fmt: skip


@pytest.fixture
def two(tmp_path: Path) -> str:
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(TWO))
    return str(file)


def study(launch: dict[str, object] | None = None, **changes: object) -> Study:
    return Study.of(one(launch=launch, **changes), name="launched")


def test_the_configurations_of_trl_and_ones_own(two):
    settings = study({"accelerate_config": "fsdp2"}).runs[0].settings
    assert settings.launch is not None
    assert (settings.launch.count, settings.launch.shards, settings.launch.file.name) == (8, 8, "fsdp2.yaml")
    settings = study({"accelerate_config": "multi_gpu", "processes": 3}).runs[0].settings
    assert settings.launch is not None
    assert (settings.launch.count, settings.launch.shards) == (3, 1)
    settings = study({"accelerate_config": two}).runs[0].settings
    assert settings.launch is not None
    assert (settings.launch.count, settings.launch.shards) == (2, 1)


def test_processes_are_part_of_a_runs_key_and_of_no_edits(two):
    alone, together = study().runs[0], study({"accelerate_config": two}).runs[0]
    assert edit_id(alone) == edit_id(together)
    assert run_id(alone) != run_id(together) != run_id(study({"accelerate_config": two, "processes": 3}).runs[0])
    assert run_id(alone) == run_id(study({"accelerate_config": two, "processes": 1}).runs[0])


@pytest.mark.parametrize(
    ("launch", "changes", "said"),
    [
        ({"accelerate_config": "fsdp3"}, {}, r"launch.*'fsdp3'; did you mean 'fsdp[12]'\?"),
        ({"accelerate_config": "fsdp2", "processes": 0}, {}, r"launch.processes: .*greater than or equal to 1"),
        ({"accelerate_config": "fsdp2", "proceses": 2}, {}, r"launch.proceses: .*did you mean 'processes'\?"),
        ({"accelerate_config": "none.yaml"}, {}, r"launch.*neither a file nor a configuration of trl: 'none.yaml'"),
        ({"accelerate_config": "bad.yaml"}, {}, r"bad.yaml: is no configuration of accelerate"),
        ({"accelerate_config": "cpu.yaml"}, {}, r"got MULTI_CPU.*starts one process here; on processors: MULTI_GPU"),
        ({"accelerate_config": "fsdp2"}, {"mitigations": [{"name": "ema"}]}, r"launch: mitigation ema acts on each"),
        ({"accelerate_config": "fsdp2"}, {"objective": "distill"}, r"launch: objective distill draws answers"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched(launch, changes, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("a: 1\n")
    Path("cpu.yaml").write_text(yaml.safe_dump(TWO | {"distributed_type": "MULTI_CPU"}))
    with pytest.raises(UserError, match=said):
        study(launch, **changes)


@pytest.mark.long
def test_two_ranks_give_the_rows_of_one_process_at_the_same_effective_batch(two, tmp_path, cache):
    """8 rows on each of two ranks are the 16 of one process: losses and readings agree but for rounding."""
    changes = {"editor": ROME, "mitigations": ["freeze"], "probes": ["score"]}

    def run(name: str, launch: dict[str, object] | None, batch: int) -> Path:
        trainer = TUNE["trainer"] | {"per_device_train_batch_size": batch, "logging_steps": 1}
        changed = study(launch, tune=TUNE | {"trainer": trainer}, **changes)
        return retention.run(changed, results=tmp_path / name, cache=cache)

    apart, together = run("one", None, 16), run("two", {"accelerate_config": two}, 8)
    rows = [retention.load(folder).sort_values(["step", "question_id"]) for folder in (apart, together)]
    assert len(rows[0]) == len(rows[1]) > 0
    assert rows[0].groupby("step").size().to_dict() == rows[1].groupby("step").size().to_dict()
    assert list(rows[0]["question_id"]) == list(rows[1]["question_id"])
    # Tokens of all ranks are counted: half as many would mean that one process ran, or that both had the same rows.
    assert list(rows[0]["tokens_seen"]) == list(rows[1]["tokens_seen"])
    assert rows[0]["tokens_seen"].max() > 0
    moved = abs(rows[0]["logp_target"].to_numpy() - rows[1]["logp_target"].to_numpy()).max()
    started = rows[0][rows[0]["step"] == 0]["logp_target"].to_numpy()
    ended = rows[0][rows[0]["step"] == 4]["logp_target"].to_numpy()
    print(f"largest difference {moved:.2g} nats, of a change by up to {abs(ended - started).max():.2g}")
    assert moved < 1e-3 < abs(ended - started).max()
    (record,) = (retention.store.Store(tmp_path / "two").settings("runs", key) for key in published(tmp_path / "two"))
    assert record["processes"] == 2
    assert record["training"][0]["steps"] == 4
    assert not list((tmp_path / "two").rglob("*partial*"))


def published(results: Path) -> list[str]:
    return [path.parent.name for path in results.glob("runs/*/complete.json")]


@pytest.mark.parametrize(
    ("optim", "package"),
    [("adamw_8bit", "bitsandbytes"), ("paged_adamw_32bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")],
)
def test_an_optimizer_of_another_package_is_missed_before_work_starts(optim, package):
    from retention.objectives import Sft
    from retention.trainers import validate

    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=rf"tune.trainer.optim: {optim}: .*{package}"):
        validate(Sft(), {"optim": optim})
