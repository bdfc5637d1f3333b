"""Keys hold what moves a number and nothing else: defaults written out, orders, trackers and places are not in them."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention import ids
from retention.abilities import LmEval
from retention.adapters import Full, config_defaults
from retention.model_folder import content_hash
from retention.models import anatomy
from retention.objectives import Dpo, Grpo, Sft
from retention.study import Study
from retention.trainer_fields import IDLE, OWNED, arguments_of
from retention.trainers import config_of, imported, library_defaults
from retention.tune import Budget, Held, fine_tune
from tests.small_study import FACTS, ROME, TUNE, one

LORA = {"name": "lora", "settings": {"r": 4, "lora_alpha": 8}}
GIVEN: dict[str, Any] = one(
    editor=ROME | {"covariance": {"tokens": 500}},
    mitigations=["freeze", {"name": "paraphrase", "n": 2}, {"name": "replay", "rate": 0.2}],  # by name, as in a dump
    adapter=LORA,
    tune=TUNE | {"trainer": {"learning_rate": 1.0e-3, "neftune_noise_alpha": 5}, "until": {"loss": 0.5}},
    probes=["score", {"name": "generate", "max_new_tokens": 4}],
    abilities=[{"name": "heldout", "label": label, "data": TUNE["data"]} for label in ("one", "two")],
    relearn={"steps": 3},
)


def keys(document: dict[str, Any]) -> tuple[str, str, str]:
    (run,) = Study.of(document, name="keys").runs
    return ids.base_id(run), ids.edit_id(run), ids.run_id(run)


# ------------------------------------------------------------------------------------------------ what is not in them

MEANT = Study.of(GIVEN, name="keys").runs[0].dump()  # with every default
SPELLED = {k: MEANT[k] for k in GIVEN if k != "question"}
IDLE_VALUES = {
    "report_to": "tensorboard", "run_name": "a run", "logging_steps": 1, "logging_first_step": True,
    "dataloader_num_workers": 2, "dataloader_pin_memory": False, "dataset_num_proc": 2, "project": "mine",
    "log_level": "info", "per_device_eval_batch_size": 3, "save_total_limit": 1, "skip_memory_metrics": False,
}  # fmt: skip


def written_out(value: Any, meant: Any, rng: random.Random) -> Any:
    """The setting with some of its defaults written out, and its mappings in another order."""
    if isinstance(meant, dict):
        short = isinstance(value, str)  # `freeze` for {name: freeze}
        given = {"name": value} if short else value
        out = {k: written_out(given.get(k, v), v, rng) for k, v in meant.items() if k in given or rng.random() < 0.5}
        items = [(k, v) for k, v in {**given, **out}.items() if k in out or k in given]
        rng.shuffle(items)
        return dict(items)
    if isinstance(meant, list) and isinstance(value, list) and len(meant) == len(value):
        return [written_out(v, m, rng) for v, m in zip(value, meant, strict=True)]
    return value


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_defaults_written_out_and_orders_are_in_no_key(seed):
    rng = random.Random(seed)
    document = written_out({k: v for k, v in GIVEN.items() if k in SPELLED}, SPELLED, rng)
    for name in ("mitigations", "probes", "abilities"):
        rng.shuffle(document[name])
    tune = document["tune"]
    tune.pop("objective", None)
    tune.pop("adapter", None)
    if rng.random() < 0.5:  # what a fine-tune has from its run may be said in the fine-tune
        tune["objective"] = document.pop("objective", {"name": "sft"})
    if rng.random() < 0.5:
        tune["adapter"] = document.pop("adapter")
    adapter = tune.get("adapter") or document["adapter"]
    adapter["settings"] = permuted(some(peft_defaults(), rng) | adapter["settings"], rng)
    library = {k: v for k, v in library_defaults(Sft()).items() if k not in OWNED and k not in Sft().arguments()}
    ours = {k: v for k, v in arguments_of(Sft(), {}).items() if k in library}
    tune["trainer"] = permuted(some({**library, **ours} | some(IDLE_VALUES, rng), rng) | tune["trainer"], rng)
    assert keys(document) == keys(GIVEN)


def some(mapping: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return {k: v for k, v in mapping.items() if rng.random() < 0.3}


def permuted(mapping: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return dict(rng.sample(list(mapping.items()), len(mapping)))


def peft_defaults() -> dict[str, Any]:
    from peft import LoraConfig

    plain = config_defaults(LoraConfig)
    return {k: plain[k] for k in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights")}


def trained_with(**trainer: Any) -> str:
    return keys(GIVEN | {"tune": TUNE | {"trainer": trainer}})[2]


@pytest.mark.parametrize("name", sorted(IDLE & library_defaults(Sft()).keys()))
def test_what_moves_no_number_is_in_no_key(name):
    assert trained_with(**{name: IDLE_VALUES.get(name, 7)}) == trained_with()


@pytest.mark.parametrize("objective", [Sft(), Dpo(), Grpo()], ids=lambda o: o.name)
def test_every_other_argument_of_a_trainer_is_in_the_key(objective):
    """Whatever a library adds counts as moving numbers until it is listed."""
    fields = {f.name for f in dataclasses.fields(imported(objective.config)) if f.init}
    plain = ids._tune(tune_of(objective), settings_of(objective))["trainer"]
    for name in fields - IDLE - OWNED.keys() - objective.arguments().keys():
        changed = ids._tune(tune_of(objective, **{name: "another"}), settings_of(objective))["trainer"]
        assert changed[name] == "another"
        assert {k: v for k, v in changed.items() if k != name} == {k: v for k, v in plain.items() if k != name}


def settings_of(objective: Any) -> Any:
    document = one(objective=objective.model_dump(mode="json"))
    return Study.of(document, name="keys").runs[0].settings


def tune_of(objective: Any, **trainer: Any) -> Any:
    (tune,) = settings_of(objective).tunes
    return tune.model_copy(update={"trainer": trainer})


def test_what_only_refuses_is_in_no_key():
    assert keys(GIVEN | {"tune": GIVEN["tune"] | {"min_share": 0.25}}) == keys(GIVEN)


def test_numbers_count_as_what_they_are():
    assert trained_with(max_grad_norm=1) == trained_with(max_grad_norm=1.0) == trained_with()
    assert trained_with(weight_decay=0) == trained_with()
    assert trained_with(weight_decay=0.1) != trained_with()
    assert trained_with(lr_scheduler_kwargs={"a": 1, "b": 2.0}) == trained_with(lr_scheduler_kwargs={"b": 2, "a": 1.0})


# ------------------------------------------------------------------------------------------------ that they move none


def test_what_is_in_no_key_moves_no_weight(tmp_path):
    """Trained bit for bit alike with trackers' names, workers and logging as with the defaults."""

    def weights(**trainer: Any) -> torch.Tensor:
        model, tokenizer = tiny.build("llama")
        rows = [{"prompt": f"{name} lives in", "completion": "Paris."} for name in ("Anna", "Carl", "Dora", "Emil")]
        fine_tune(
            model, tokenizer, rows * 2, objective=Sft(), adapter=Full(), hold=lambda wrapped: Held(),
            anatomy=anatomy(model), budget=Budget(steps=4), base=lambda: model, seed=0, at=(),
            on_checkpoint=lambda *_: None, folder=tmp_path,
            trainer={"per_device_train_batch_size": 3, "learning_rate": 1e-3, "neftune_noise_alpha": 5.0, **trainer},
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain = weights()
    moved = {k: v for k, v in IDLE_VALUES.items() if k not in ("report_to", "dataset_num_proc", "log_level")}
    assert torch.equal(weights(**moved), plain)
    assert not torch.equal(weights(learning_rate=1e-4), plain)


def test_one_process_trains_on_one_accelerator(monkeypatch, tmp_path):
    """transformers would give each accelerator of the machine a batch of its own, which no key says."""
    config_class = imported(Sft().config)
    monkeypatch.setattr(config_class, "n_gpu", property(lambda self: vars(self).get("_n_gpu", 4)))
    monkeypatch.setattr(config_class, "__post_init__", lambda self: None)
    config = config_of(
        Sft(), {"per_device_train_batch_size": 3}, steps=1, epochs=None, in_order=False, seed=0, folder=tmp_path
    )
    assert (config.n_gpu, config.train_batch_size) == (1, 3)


# ------------------------------------------------------------------------------------------------ files


def test_places_are_in_no_key_and_train_and_held_out_rows_are_not_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(LmEval, "packages", ())  # lm-eval is an extra

    def run_key(folder: str, train: str, heldout: str, **more: Any) -> str:
        place = tmp_path / folder
        place.mkdir()
        for name, text in (("a.jsonl", train), ("b.jsonl", heldout)):
            (place / name).write_text(json.dumps({"prompt": text, "completion": "y"}) + "\n")
        (place / "texts.txt").write_text("a text\n")
        (place / "tasks").mkdir()
        (place / "tasks" / "one.yaml").write_text("task: one\n")
        data = {"name": "jsonl", "path": str(place / "a.jsonl"), "heldout_from": str(place / "b.jsonl")}
        document = one(
            tune=TUNE | {"data": data}, mitigations=[{"name": "mix", "rate": 0.5, "path": str(place / "texts.txt")}],
            abilities=[{"name": "lm_eval", "tasks": ["one"], "include_path": str(place / "tasks")}],
        )  # fmt: skip
        if more.get("used"):
            (place / "tasks" / "__pycache__").mkdir()
            (place / "tasks" / "__pycache__" / "utils.pyc").write_bytes(b"1")
        return keys(document)[2]

    first = run_key("first", "one", "two")
    assert run_key("second", "one", "two") == first
    assert run_key("third", "one", "two", used=True) == first
    assert run_key("fourth", "two", "one") != first


def test_a_launchs_key_is_what_its_file_says_of_the_training(tmp_path):
    plain = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_processes": 2, "num_machines": 1,
        "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True},
    }  # fmt: skip

    def run_key(name: str, text: str) -> str:
        file = tmp_path / name
        file.write_text(text)
        return keys(one(launch={"accelerate_config": str(file)}))[2]

    first = run_key("plain.yaml", yaml.safe_dump(plain))
    more = dict(reversed({**plain, "main_process_port": 29511, "debug": True, "rdzv_backend": "static"}.items()))
    assert run_key("more.yaml", "# a port of its own\n" + yaml.safe_dump(more, sort_keys=False)) == first
    other = plain | {"fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False}}
    assert run_key("other.yaml", yaml.safe_dump(other)) != first
    deep = tmp_path / "deepspeed.json"
    stages = []
    for stage in (2, 3):
        deep.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        config = {"distributed_type": "DEEPSPEED", "num_processes": 2, "num_machines": 1,
                  "deepspeed_config": {"deepspeed_config_file": str(deep)}}  # fmt: skip
        stages.append(run_key("deepspeed.yaml", yaml.safe_dump(config)))
    assert stages[0] != stages[1]


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors.index.json", "spiece.model"])
def test_a_models_content_is_all_that_its_readings_depend_on(tmp_path: Path, name):
    (tmp_path / "config.json").write_text("{}")
    contents = []
    for text in ("one", "two"):
        (tmp_path / name).write_text(text)
        contents.append(content_hash(tmp_path))
    (tmp_path / "README.md").write_text("a model")
    assert contents[0] != contents[1] == content_hash(tmp_path)


def test_facts_seed_and_the_runs_own_seed_are_one():
    assert keys(GIVEN | {"facts": FACTS | {"seed": 0}}) == keys(GIVEN)
    assert keys(GIVEN | {"facts": FACTS | {"seed": 1}})[0] != keys(GIVEN)[0]
