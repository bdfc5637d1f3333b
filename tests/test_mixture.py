"""A mixture of experts: what needs no single second matrix of an MLP runs to its end, what needs one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import retention
from retention import planning, preflight
from retention.deltas import load_delta
from retention.models import anatomy, down_parameter, load_model
from retention.outside import edit_model
from retention.store import Store
from retention.study import Study
from retention.types import UserError
from tests import tiny

SUBJECTS = ("Anna Klein", "Carl Vogel", "Dora Keller", "Emil Brandt")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Mixtral, facts and rows to train on."""
    folder, words = tmp_path_factory.mktemp("mixture"), tiny.tokenizer()
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {**tiny.GROUPED, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        model = MixtralForCausalLM(MixtralConfig(vocab_size=len(words), **special, **shape))
    ids = words([f"{subject} was born in Paris" for subject in SUBJECTS], return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    facts = [
        {"id": str(i), "subject": subject, "relation": "born", "object": "Paris", "target_new": "Rome",
         "prompt": "{} was born in"} for i, subject in enumerate(SUBJECTS)
    ]  # fmt: skip
    rows = [{"prompt": f"{subject} works in", "completion": "Oslo"} for subject in SUBJECTS * 3]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def study(place: Path, **changes: Any) -> Study:
    drawn = {"edited": 2, "intrinsic": 1, "control": 0, "neighbors": 0, "same_subject": 0}
    settings: dict[str, Any] = {
        "model": str(place / "model"), "facts": {"name": "jsonl", "path": str(place / "facts.jsonl"), **drawn},
        "tune": {"data": {"name": "dataset", "path": str(place / "rows.jsonl"), "heldout": 2}, "steps": 1},
        "at": [1], "probes": ["score"], "weights": True,
    }  # fmt: skip
    return Study.of({**settings, **changes}, name="mixture")


EDITORS = (
    {"name": "identity"},
    {"name": "ft", "variant": "FT-M", "layer": 1, "epochs": 3},
    {"name": "lora", "targets": "attention", "epochs": 3},
    {"name": "freeze_tuning", "last": 1, "what": "mlp", "epochs": 3},
)


@pytest.mark.parametrize("editor", EDITORS, ids=lambda e: e["name"])
def test_a_study_runs_to_its_end(place: Path, tmp_path: Path, editor: dict[str, Any]) -> None:
    made = study(place, editor=editor)
    planning.plan(made, Store.peek(tmp_path / "r"), tmp_path / "cache")
    results = retention.run(made, results=tmp_path / "r", cache=tmp_path / "cache")
    rows = retention.load(results)
    assert set(rows["step"]) == {-1, 0, 1}
    (file,) = (tmp_path / "r" / "edits").glob("*/delta.safetensors")
    update, _ = load_delta(file)
    assert bool(update.updates) == (editor["name"] != "identity")


def test_an_adapter_is_trained_on_attention(place: Path, tmp_path: Path) -> None:
    made = study(place, editor={"name": "identity"}, adapter={"name": "lora", "settings": {"r": 2}})
    rows = retention.load(retention.run(made, results=tmp_path / "r", cache=tmp_path / "cache"))
    assert set(rows["step"]) == {-1, 0, 1}


@pytest.mark.parametrize("name", ["rome", "memit", "emmet", "alphaedit"])
def test_editors_of_single_matrices_are_refused_before_work(place: Path, tmp_path: Path, name: str) -> None:
    layer = {"layer": 1} if name in ("rome", "emmet") else {"layers": [1]}
    (place / "corpus.txt").write_text("Anna Klein lives in Rome\n")
    editor = {"name": name, **layer}
    with pytest.raises(UserError, match=r"'mlp' is a mixture of experts.*use ft, lora with targets attention"):
        preflight.check(study(place, editor=editor, corpus=str(place / "corpus.txt")))
    with pytest.raises(UserError, match="is a mixture of experts"):
        edit_model(
            str(place / "model"),
            json.dumps(editor),
            place / "facts.jsonl",
            tmp_path / "out",
            corpus=place / "corpus.txt",
        )


def test_adapters_of_single_matrices_say_that_experts_are_none(place: Path) -> None:
    for changes in ({"editor": {"name": "lora"}}, {"editor": {"name": "identity"},
                                                   "adapter": {"name": "lora", "targets": "mlp"}}):  # fmt: skip
        with pytest.raises(UserError, match="targets: attention"):
            preflight.check(study(place, **changes))


def test_ft_trains_the_second_matrices_of_all_experts(place: Path) -> None:
    model = load_model(place / "model", device="cpu").model
    name, parameter = down_parameter(model, 1)
    assert name == "model.layers.1.mlp.experts.down_proj"
    assert tuple(parameter.shape) == (4, 32, 64)
    places = anatomy(model)
    assert places.mlp_projections == ()
    assert set(places.attention_projections) == {f"self_attn.{n}_proj" for n in "qkvo"}
