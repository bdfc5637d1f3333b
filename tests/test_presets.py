"""Presets: files of settings with their evidence, matched by shape; what a user gives wins; studies record them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from retention import ids, preflight
from retention.editors import AnyEditor
from retention.editors.alphaedit import AlphaEdit
from retention.editors.ft import Ft
from retention.editors.identity import Identity
from retention.editors.locft import LocFt
from retention.editors.lora import Lora
from retention.editors.memit import Memit
from retention.editors.random import Random
from retention.editors.rome import Rome
from retention.facts.draw import apart
from retention.presets import PACKAGED, every, read, remark, set_aside, settle, subject_mark
from retention.study import Study
from retention.types import Edit, Fact, FactPool, UserError
from tests.small_study import document
from tests.tiny import save

GPT2_XL = GPT2Config(n_layer=48, n_embd=1600)
LLAMA = LlamaConfig()  # 32 blocks of 4,096
QWEN3 = Qwen3Config(num_hidden_layers=36, hidden_size=4096)
WORLD = LlamaConfig(num_hidden_layers=4, hidden_size=192)


def editor_of_section(name: str, settings: dict[str, Any]) -> Any:
    named = {"name": "ft", "variant": name.upper()} if name.startswith("ft-") else {"name": name}
    return TypeAdapter(AnyEditor).validate_python(named | settings)


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_file_holds_valid_settings_and_all_that_an_editor_cannot_do_without(path: Path) -> None:
    preset = read(path)
    for name, section in preset.editors.items():
        editor = editor_of_section(name, section.settings)
        assert editor.preset == name
        assert editor.open <= section.settings.keys(), f"{path.name}: {name}"
        layers = section.settings.get("layers", [section.settings.get("layer", 0)])
        assert all(0 <= layer < preset.shapes[0][1] for layer in layers)
        assert section.evidence


def test_the_papers_settings_of_the_papers_models() -> None:
    """From the papers and EasyEdit's hyperparameter files; not from the presets."""
    memit = settle(Memit(), GPT2_XL)
    assert memit.layers == (13, 14, 15, 16, 17)
    assert (memit.covariance_weight, memit.v_steps, memit.v_weight_decay, memit.clamp_norm_factor) == (
        20000, 20, 0.5, 0.75,
    )  # fmt: skip
    rome = settle(Rome(), LLAMA)
    assert (rome.layer, rome.v_steps, rome.v_weight_decay, rome.clamp_norm_factor) == (5, 25, 1e-3, 4)
    assert settle(AlphaEdit(), LLAMA).v_lr == 0.1
    assert settle(AlphaEdit(), QWEN3).ridge == 1
    assert (settle(Ft(), GPT2_XL).norm_constraint, settle(Ft(variant="FT-M"), GPT2_XL).norm_constraint) == (5e-4, None)
    mistral = LlamaConfig()
    mistral.model_type = "mistral"
    assert (settle(LocFt(), mistral).layer, settle(LocFt(), mistral).what) == (23, "block")


def test_what_is_given_wins_and_an_editor_is_settled_once() -> None:
    memit = settle(Memit(layers=(3,), clamp_norm_factor=2.0), GPT2_XL)
    assert (memit.layers, memit.clamp_norm_factor, memit.v_steps) == ((3,), 2.0, 20)
    assert settle(memit, GPT2_XL) == memit
    assert settle(Ft(norm_constraint=None), GPT2_XL).norm_constraint is None  # null: unbounded, and not the preset's
    assert settle(Memit(v_steps=None), GPT2_XL).v_steps == 20
    world = settle(AlphaEdit(null_below=0.1), WORLD)
    assert (world.null_below, world.null_fraction) == (0.1, None)  # of two rules that exclude each other one is given
    assert settle(Identity(), GPT2_XL) == Identity()
    assert settle(Lora(lr=1e-2), WORLD).lr == 1e-2


def test_an_unknown_model_takes_the_nearest_of_its_architecture_at_the_same_depth() -> None:
    small = GPT2Config(n_layer=12, n_embd=768)
    memit = settle(Memit(), small)  # of gpt2-xl, the only GPT-2 with a section of MEMIT: 13 to 17 of 48
    assert memit.layers == (3, 4)
    assert (memit.covariance_weight, memit.clamp_norm_factor) == (20000, 0.75)
    assert settle(Rome(), small).layer == round(8 * 12 / 24)  # gpt2-medium is nearer than gpt2-xl
    said = remark(Memit(), small)
    assert said is not None
    assert "gpt2-xl" in said
    assert "retention calibrate" in said
    # Settings that have a default are not taken from another model.
    assert settle(Ft(layer=1), small).norm_constraint is None
    deep = LlamaConfig(num_hidden_layers=5, hidden_size=192)
    assert "SmolLM2" in str(remark(Memit(), deep))  # the embedded world's model is no neighbor


def test_random_takes_the_settings_of_the_editor_that_it_is_like() -> None:
    random = settle(Random(like={"name": "memit", "layers": [2]}), GPT2_XL)
    assert random.like["layers"] == [2]
    assert random.like["covariance_weight"] == 20000


def test_a_study_records_the_settings_that_it_ran_with() -> None:
    study = Study.of(document(editor="memit", model="world", grid=None), name="open")
    settled = preflight.settled(study)
    (run,) = settled.runs
    assert run.dump()["editor"]["covariance_weight"] == 100
    assert run.names == study.runs[0].names
    written = json.loads(settle(Memit(), WORLD).model_dump_json())
    given = Study.of(document(editor=written, model="world", grid=None), name="given")
    assert ids.edit_id(run) == ids.edit_id(given.runs[0]) != ids.edit_id(study.runs[0])


def test_the_plan_tells_what_presets_give(tmp_path: Path) -> None:
    exact = preflight.from_presets(Study.of(document(editor="memit", model="world", grid=None), name="s"), exact=True)
    assert len(exact) == 1
    assert "preset embedded gives layers: [0, 1]" in exact[0]
    assert "efficacy 0.98 of 50" in exact[0]
    folder = save("llama", tmp_path / "m")
    other = Study.of(document(editor="rome", model=str(folder), grid=None), name="s")
    assert preflight.from_presets(other, exact=True) == []
    (line,) = [r for r in preflight.remarks(other) if "rome" in r]
    assert "no preset for llama x 4 x 32" in line
    assert "retention calibrate" in line


def test_presets_of_the_cache_come_first_and_faults_name_file_and_key(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("RETENTION_CACHE", str(tmp_path))
    (tmp_path / "presets").mkdir()
    file = tmp_path / "presets" / "own.yaml"
    text = "model: mine\nshapes: [[gpt2, 48, 1600]]\neditors:\n  rome:\n    settings: {layer: 9, v_steps: 7}\n"
    file.write_text(text + "    published: by hand\n")
    assert settle(Rome(), GPT2_XL).layer == 9
    file.write_text(text)
    with pytest.raises(UserError, match=r"own.yaml: editors.rome: .*evidence"):
        every()
    file.write_text((text + "    published: by hand\n").replace("v_steps: 7", "v_step: 7"))
    with pytest.raises(UserError, match=r"preset mine: rome\.v_step"):
        settle(Rome(), GPT2_XL)


def test_no_study_draws_what_editors_were_calibrated_on(tmp_path: Path, monkeypatch: Any) -> None:
    facts = [Fact(id=s, subject=s, relation="r", prompt="{} is", target="x") for s in ("Anna", "Berta", "Carl", "Dora")]
    pool = FactPool(
        facts=tuple(facts),
        edits=tuple(Edit(fact=f, target="y", prompts=(f.prompt,)) for f in facts[:3]),
        neighborhood={"Anna": (facts[1], facts[3])},
    )
    left = apart(pool, {subject_mark("Berta")})
    assert [f.subject for f in left.facts] == ["Anna", "Carl", "Dora"]
    assert [e.fact.subject for e in left.edits] == ["Anna", "Carl"]
    assert left.neighborhood["Anna"] == (facts[3],)
    assert sum(left.dropped.values()) == 1
    assert apart(pool, set()) is pool

    monkeypatch.setenv("RETENTION_CACHE", str(tmp_path / "cache"))
    run = Study.of(document(model=str(save("llama", tmp_path / "m")), grid=None, editor="identity"), name="s").runs[0]
    before = ids.base_id(run)
    folder = tmp_path / "cache" / "presets"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(
        f"model: tiny\nshapes: [[llama, 4, 32]]\ncalibrated_on: [{subject_mark('Berta')}]\neditors: {{}}\n"
    )
    assert set_aside(preflight.config_of(run.settings.model)) == {subject_mark("Berta")}
    assert ids.base_id(run) != before
