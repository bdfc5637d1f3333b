"""Folders that would fail or give wrong numbers later: each is refused in one sentence that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from retention.model_checks import check_folder
from retention.model_folder import resolve
from retention.models import load_model
from retention.types import UserError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama_tied", tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A sound folder to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def settings(folder: Path, file: str = "config.json", **changes: Any) -> None:
    found = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(found | changes))


def refused(folder: Path) -> str:
    """The one sentence, the same from the check before work and from loading."""
    said = []
    for look in (lambda: check_folder(resolve(folder)), lambda: load_model(folder)):
        with pytest.raises(UserError) as error:
            look()
        said.append(str(error.value))
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 1
    return said[0]


def test_every_tiny_architecture_is_sound(tmp_path: Path) -> None:
    for name in (*tiny.ARCHITECTURES, *tiny.OTHERS):
        check_folder(tiny.save(name, tmp_path / name))


@pytest.mark.parametrize(
    "how", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4},
            {"quant_method": "awq"}, {"quant_method": "fp8"}, {"load_in_8bit": True}]
)  # fmt: skip
def test_quantised_checkpoints(folder: Path, how: dict[str, Any]) -> None:
    settings(folder, quantization_config=how)
    found = refused(folder)
    assert f"quantised ({how.get('quant_method', 'quantization_config')})" in found
    assert "save it dequantised" in found


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model.layers.0.mlp.down_proj.qweight", torch.int32), ("model.layers.0.mlp.down_proj.weight", torch.uint8),
     ("model.layers.0.mlp.down_proj.weight", torch.float8_e4m3fn)],
)  # fmt: skip
def test_quantised_weights_whatever_the_configuration_says(folder: Path, name: str, kind: torch.dtype) -> None:
    save_file(load_file(folder / WEIGHTS) | {name: torch.ones(32, 64).to(kind)}, folder / WEIGHTS, {"format": "pt"})
    assert "are quantised" in refused(folder)


def test_an_adapter_is_no_model_with_or_without_a_configuration(folder: Path) -> None:
    settings(folder, "adapter_config.json", base_model_name_or_path="some/base", peft_type="LORA")
    assert "is a peft adapter" in refused(folder)
    (folder / "config.json").unlink()
    assert "merge it into some/base first" in refused(folder)


def test_an_architecture_that_is_code_is_named_and_its_code_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    settings(folder, model_type="own", auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"})
    assert "'own' comes as code with the weights (auto_map" in refused(folder)
    settings(folder, model_type="llama")  # one that transformers has itself: the code is not needed
    load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "no_such"}', '{"model_type": "t5"}'])
def test_configurations_that_are_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    assert f"model.layers.2.mlp.up_proj.weight in {WEIGHTS} holds NaN" in refused(folder)


def test_weights_that_overflow_when_they_are_rounded(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    load_model(folder)
    with pytest.raises(UserError, match="too large for float16; use dtype: bfloat16"):
        load_model(folder, dtype="float16")


def in_parts(folder: Path, *names: str) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for i, name in enumerate(names):
        save_file(dict(list(weights.items())[i :: len(names)]), folder / name, {"format": "pt"})
    weight_map = {key: names[i % len(names)] for i, key in enumerate(weights)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_parts_named_by_an_index(folder: Path) -> None:
    in_parts(folder, "a.safetensors", "b.safetensors")
    load_model(folder)
    (folder / "b.safetensors").unlink()
    assert "names b.safetensors, which is not there" in refused(folder)


@pytest.mark.parametrize("place", ["../outside.safetensors", "{}/outside.safetensors", "sub/part.safetensors"])
def test_an_index_that_leads_outside_the_folder(folder: Path, tmp_path: Path, place: str) -> None:
    (folder / "sub").mkdir()
    in_parts(folder, place.format(tmp_path))
    assert "names weights outside the folder" in refused(folder)


def test_a_damaged_file_of_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert "is damaged or no safetensors file" in refused(folder)


def test_shapes_that_do_not_fit_the_configuration(folder: Path) -> None:
    settings(folder, intermediate_size=96)
    found = refused(folder)
    assert "down_proj.weight is [32, 64] in the file and [32, 96] by the configuration" in found


# ------------------------------------------------------------------------------------------------ token ids


def test_a_token_that_was_added_without_a_row(folder: Path) -> None:
    tokenizer = load_model(folder).tokenizer
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    found = refused(folder)
    assert f"has token '[PAD]' with id {rows}, its embedding has {rows} rows" in found
    assert f"resize_token_embeddings({rows + 1})" in found


def test_an_ordinary_token_and_one_of_the_chat_template_need_rows_too(folder: Path) -> None:
    tokenizer = load_model(folder).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    load_model(folder)  # a model of text only: no text holds it
    tokenizer.chat_template = "{% for m in messages %}<image>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    assert "'<image>'" in refused(folder)
    tokenizer.chat_template = None
    tokenizer.add_tokens(["Zagreb"])
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert "'Zagreb'" in refused(folder)
