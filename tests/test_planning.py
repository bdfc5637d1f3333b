"""Plans of what is not here, the memory that a stage was estimated to need, and what does not fit."""

from __future__ import annotations

import ctypes
import gc
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from retention import estimate, hours, planning
from retention.adapters import Adapter, Full
from retention.cli import main
from retention.ids import base_id, model_id, provisional, run_id
from retention.models import HubModel, anatomy
from retention.needs import Device
from retention.objectives import Sft
from retention.planning import plan, text
from retention.store import Store
from retention.study import Study
from retention.tune import Budget, Held, fine_tune
from retention.types import Missing, UserError
from tests import tiny

REPLICATIONS = Path(__file__).resolve().parents[1] / "experiments" / "replications"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with facts and rows; no network, and nothing in the Hub's cache."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETENTION_DATA", raising=False)
    fact = {"relation": "born", "prompt": "{} was born in", "object": "Rome", "target_new": "Paris"}
    names = ("Anna", "Berta", "Carl", "Dora")
    lines = [fact | {"id": str(i), "subject": f"{name} Klein"} for i, name in enumerate(names)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"prompt": f"Question {i}:", "completion": "word " * i} for i in range(1, 41)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def study(**changes: Any) -> Study:
    base = {
        "model": {"name": "openai-community/gpt2-xl"},
        "facts": {"name": "jsonl", "path": "facts.jsonl", "edited": 2, "intrinsic": 1, "paraphrases": 0},
        "editor": {"name": "rome", "covariance": {"tokens": 0}},
        "probes": ["score"],
        "at": [1],
        "tune": {
            "data": {"name": "jsonl", "path": "rows.jsonl", "heldout": 8},
            "steps": 2,
            "trainer": {"per_device_train_batch_size": 4},
        },
    }
    return Study.of({k: v for k, v in (base | changes).items() if v is not None}, name="planned")


def planned(**changes: Any) -> planning.Plan:
    return plan(study(**changes), Store.peek("results"), Path("cache"), throughput=1e15)


def test_a_model_that_is_not_here(place):
    """Counted by hand: 48 blocks of 12 x 1600^2 numbers, embeddings of 50,257 + 1,024 times 1600."""
    found = planned()
    numbers = 48 * 12 * 1600**2 + (50257 + 1024) * 1600
    lines = list(text(found))
    assert any(f"{numbers / 1e6:,.1f} million numbers" in line and "is provisional" in line for line in lines)
    assert [s.kind for s in found.stages] == ["prepare", "edit", "tune"]
    tune = next(need for _, need in found.needs["openai-community/gpt2-xl"] if need.stage == "tune")
    assert tune.parts["weights"] == pytest.approx(4 * numbers / 2**30)
    assert tune.parts["optimizer"] == pytest.approx(8 * numbers / 2**30)
    # 4 rows of up to 40 words: "Question 40: word word ...", 4 characters a token, and the end of the text
    longest = -(-len("Question 40: " + "word " * 40) // 4) + 1
    assert any(f"4 rows of up to {longest} tokens" in line for line in lines if longest - 1 <= 54)
    assert not found.missing
    assert not found.refusals
    assert any(
        "`retention run` fetches it" in note or "hf download openai-community/gpt2-xl" in note for note in found.notes
    )
    assert found.hours["tune"] is not None
    assert not list(place.glob("results"))


def test_a_model_of_unknown_shape_is_said_and_the_rest_planned(place):
    models = [{"name": "nobody/nothing"}, {"name": "openai-community/gpt2-xl"}]
    found = planned(model=None, editor="identity", grid={"model": models})
    assert len(found.stages) == 6
    assert any("nobody/nothing: no estimate: its shape is not in the table" in note for note in found.notes)
    assert not found.needs["nobody/nothing"]
    assert found.needs["openai-community/gpt2-xl"]
    assert found.hours["tune"] is None
    assert "2 fine-tunes, 0 done, time not known" in "\n".join(text(found))


def test_settings_are_checked_against_the_shape_of_what_is_not_here(place):
    with pytest.raises(UserError, match=r"editor: rome.layer: layer 48 is out of range: the model has layers 0 to 47"):
        planned(editor={"name": "rome", "layer": 48, "covariance": {"tokens": 0}})
    with pytest.raises(UserError, match=r"no module 'c_atn'; did you mean 'c_attn'"):
        planned(adapter={"name": "lora", "targets": ["c_atn"]})


def test_keys_are_provisional_only_within_a_plan(place):
    run = study().runs[0]
    with provisional() as absent:
        before = run_id(run)
    assert len(absent) == 1
    with pytest.raises(Missing, match="HF_HUB_OFFLINE is set: unset it, or fetch"):
        base_id(run)
    folder = tiny.save("gpt2", place / "model")
    here = study(model={"name": str(folder)}, editor={"name": "rome", "layer": 1, "covariance": {"tokens": 0}})
    with provisional() as absent:
        inside = run_id(here.runs[0])
    assert not absent
    assert inside == run_id(here.runs[0]) != before
    assert model_id(HubModel(name=str(folder))) == model_id(here.runs[0].settings.model)


@pytest.mark.parametrize("name", ["wen2025", "cheng2025", "ge2024"])
def test_replications_are_planned_without_models_data_or_network(place, name):
    """Small in number, by overrides; the models and their settings are the papers'."""
    # One model of cheng2025: building four of them without weights, to try its adapters on, takes half a minute.
    one = ["grid.model=[{name: EleutherAI/gpt-j-6b}]"] if name == "cheng2025" else []
    few = ["facts.edited=2", "grid.mitigations=[[]]"]
    document = Study.load(REPLICATIONS / f"{name}.yaml", one or few)
    found = plan(document, Store.peek("results"), Path("cache"), throughput=1e15)
    assert {run.settings.model.name for run in document.runs} == set(found.needs)
    assert all(needs for needs in found.needs.values())
    assert any("corpus: no such file" in line for line in found.missing)
    lines = "\n".join(text(found))
    assert f"{len(document.runs):4d} fine-tunes, 0 done" in lines
    assert "tune: " in lines


def test_what_does_not_fit_is_refused_with_what_to_change(place, monkeypatch, capsys):
    monkeypatch.setattr(planning, "device", lambda: Device(name="a small card", memory=20.0, accelerator=True))
    monkeypatch.setattr(hours, "product_speed", lambda: 1e13)
    found = planned()
    (line,) = found.refusals
    assert line.startswith("openai-community/gpt2-xl: tune: ")
    assert "does not fit into 18.0 GiB; most is for optimizer: tune.trainer.optim: adamw_8bit, an adapter" in line
    assert not planned(adapter="lora").refusals
    import yaml

    Path("planned.yaml").write_text(yaml.safe_dump(study().document))
    with pytest.raises(SystemExit) as left:
        main(["plan", "planned.yaml"])
    out = capsys.readouterr()
    assert left.value.code == 2
    assert "1 fine-tune, 0 done" in out.out
    assert "does not fit into 18.0 GiB" in out.err
    monkeypatch.setattr(planning, "device", lambda: Device(name="a large card", memory=80.0, accelerator=True))
    assert not planned().refusals


def test_several_devices_share_what_training_needs_and_each_holds_what_is_read(place):
    (alone,) = (need for _, need in planned().needs["openai-community/gpt2-xl"] if need.stage == "tune")
    launch = {"accelerate_config": "fsdp2", "processes": 4}
    (shared,) = (need for _, need in planned(launch=launch).needs["openai-community/gpt2-xl"] if need.stage == "tune")
    for part in ("weights", "gradients", "optimizer"):
        assert shared.parts[part] == pytest.approx(alone.parts[part] / 4)
    assert shared.parts["activations"] == alone.parts["activations"]  # each has a batch of its own
    assert shared.parts["weights to read"] == alone.parts["weights"]


# ------------------------------------------------------------------------------------------------ measured


def peak(call: Any) -> float:
    """Bytes of memory at the call's peak, above what was in use before."""

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    except OSError:
        pytest.skip("the kernel does not let the peak of memory be counted anew")
    call()
    return status("VmHWM") - before


@pytest.mark.parametrize(
    ("adapter", "trainer"),
    [
        (Full(), {}),
        (Full(), {"activation_checkpointing": True}),
        (Adapter(name="lora", settings={"r": 8}), {"bf16": True}),
    ],
    ids=["full", "checkpointing", "lora-bf16"],
)
def test_a_fine_tunes_memory_is_estimated_within_a_half(tmp_path, adapter, trainer):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("tells its peak of memory in no way that this test reads")
    from transformers import LlamaConfig, LlamaForCausalLM

    def run(layers: int, width: int, batch: int, length: int) -> estimate.Need:
        config = LlamaConfig(
            vocab_size=3000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        rows = [{"prompt": "Anna was born in", "completion": "Paris " * (length - 8)}] * batch
        result = fine_tune(
            model, tiny.tokenizer(), rows, objective=Sft(), adapter=adapter, hold=lambda _: Held(),
            anatomy=anatomy(model), budget=Budget(steps=2), seed=0, at=set(), on_checkpoint=lambda *_: None,
            trainer={"per_device_train_batch_size": batch, "max_length": length, **trainer}, folder=tmp_path,
            base=lambda: model,
        )  # fmt: skip
        adapted = isinstance(adapter, Adapter)
        return estimate.tune(
            estimate.shape_of(config), batch=batch, length=length,
            trainable=result.trainable_count if adapted else None, adapter=adapted, cpu=True,
            dtype="bfloat16" if trainer.get("bf16") else "float32",
            checkpointing=bool(trainer.get("activation_checkpointing")),
        )  # fmt: skip

    run(1, 32, 1, 16)  # what is imported and made once
    needs: list[estimate.Need] = []
    # The lesser of two: what a library allocates once, on the way, is no need of the fine-tune.
    measured = min(peak(lambda: needs.append(run(4, 256, 16, 100))) for _ in range(2)) / estimate.GIB
    print(f"estimated {needs[0]}, measured {measured:.3f} GiB")
    assert needs[0].total / 1.5 < measured < needs[0].total * 1.5
