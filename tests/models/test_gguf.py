"""GGUF files: converted once, whole or not at all, to what transformers' own loader gives; others are refused."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch

from retention import gguf_file
from retention.cache_folders import publish, sound
from retention.model_folder import NotFetched, content_hash, nothing_fetched, resolve
from retention.models import load_model
from retention.types import Missing, UserError

pytest.importorskip("gguf")
TEXTS = ["The capital of France is", " the Paris is\n\tthe  end", "naïve – 東京は</s>", ""]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETENTION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def real() -> list[Path]:
    """GGUF files in $RETENTION_GGUF, a folder."""
    return sorted(Path(os.environ["RETENTION_GGUF"]).rglob("*.gguf")) if "RETENTION_GGUF" in os.environ else []


@pytest.mark.parametrize("file", [None, *real()], ids=lambda p: p.stem if p else "tiny")
def test_tokens_logits_and_texts_are_those_of_transformers_own_loader(file: Path | None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = file or tiny_gguf.write(tmp_path / "x.gguf")
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    found = load_model(file, device="cpu")
    assert [found.tokenizer(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert found.tokenizer.chat_template == tokenizer.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(found.tokenizer, name) == getattr(tokenizer, name), name
        assert getattr(found.model.generation_config, name) == getattr(model.generation_config, name), name
    for text in TEXTS[:3]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            assert torch.equal(found.model(input_ids=ids).logits, model(input_ids=ids).logits)
        written = [m.generate(input_ids=ids, do_sample=False, max_new_tokens=12) for m in (found.model, model)]
        assert torch.equal(*written)


def test_weights_are_the_dequantised_ones(tmp_path: Path) -> None:
    """By gguf's own dequantisation, of a matrix whose rows no architecture permutes."""
    from gguf import GGUFReader, dequantize

    file = tiny_gguf.write(tmp_path / "x.gguf")
    (tensor,) = [t for t in GGUFReader(file).tensors if t.name == "blk.1.ffn_down.weight"]
    expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    weight = load_model(file, device="cpu").model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(weight, expected)


def test_a_file_is_converted_once_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(tiny_gguf.write(tmp_path / "x.gguf"))
    monkeypatch.setattr(gguf_file, "_write", None)  # to convert again would fail
    assert resolve(tiny_gguf.write(tmp_path / "renamed.gguf")) == first
    monkeypatch.undo()
    monkeypatch.setenv("RETENTION_CACHE", str(tmp_path / "cache2"))
    again = resolve(tmp_path / "x.gguf")
    assert again != first
    assert content_hash(again) == content_hash(first)
    other = resolve(tiny_gguf.write(tmp_path / "x.gguf", seed=1))  # of the same size, in its place
    assert content_hash(other) != content_hash(again)


def test_a_chat_template_is_part_of_a_models_content(tmp_path: Path) -> None:
    folder = shutil.copytree(resolve(tiny_gguf.write(tmp_path / "x.gguf")), tmp_path / "copy")
    before = content_hash(folder)
    (folder / "chat_template.jinja").write_text("another")
    assert content_hash(folder) != before


def test_a_plan_converts_nothing(tmp_path: Path, own_cache: Path) -> None:
    file = tiny_gguf.write(tmp_path / "x.gguf")
    with nothing_fetched(), pytest.raises(NotFetched, match="not converted yet"):
        resolve(file)
    assert not own_cache.exists()


# ------------------------------------------------------------------------------------------------ refusals


def test_architectures_that_transformers_cannot_convert_are_refused_by_name(tmp_path: Path, own_cache: Path) -> None:
    file = tiny_gguf.write(tmp_path / "x.gguf", architecture="plamo")
    with pytest.raises(UserError, match=r"cannot convert it .*'plamo'.*use the model's own folder with safetensors"):
        resolve(file)
    assert [p.name for p in (own_cache / "gguf").iterdir() if not p.name.endswith(".lock")] == []


def test_files_that_lack_tensors_or_are_one_part_of_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 parameters of 'llama' are not in it, model\.layers\.1\.mlp\.up_proj"):
        resolve(tiny_gguf.write(tmp_path / "x.gguf", lacking="blk.1.ffn_up.weight"))
    with pytest.raises(UserError, match="one of 3 parts; join them"):
        resolve(tiny_gguf.write(tmp_path / "y.gguf", split_count=3))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = tiny_gguf.write(tmp_path / "x.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    rng = random.Random(0)
    for content in [b"", b"GGUF", b"<html>not found</html>", *(whole[: rng.randrange(len(whole))] for _ in range(25))]:
        bad.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged GGUF file|not a GGUF file"):
            resolve(bad)


def test_a_file_that_is_not_there_and_a_revision(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "model.gguf")
    with pytest.raises(Missing, match=r"did you mean 'model\.gguf'"):
        resolve(tmp_path / "modell.gguf")
    with pytest.raises(UserError, match="revision"):
        resolve(file, "main")


def test_without_the_package_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    file = tiny_gguf.write(tmp_path / "x.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'retention\[gguf\]'"):
        resolve(file)


# ------------------------------------------------------------------------------------------------ the cache


def test_what_was_changed_in_the_cache_is_set_aside_and_converted_again(tmp_path: Path, caplog: Any) -> None:
    file = tiny_gguf.write(tmp_path / "x.gguf")
    folder = resolve(file)
    before = content_hash(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    changes = {"corpus.txt": b"a text\n", "model.safetensors": bytes(weights), "made.json": b"[]"}
    for number, (name, raw) in enumerate(changes.items(), 1):
        (folder / name).write_bytes(raw)
        assert resolve(file) == folder
        assert content_hash(folder) == before
        assert caplog.text.count("not as it was written") == number
    aside = list(folder.parent.glob(".*.broken-*"))
    assert sorted((p / "corpus.txt").is_file() for p in aside) == [False, False, True]


def test_two_at_once_write_once_and_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    place, written = tmp_path / "some" / "place", []

    def write(folder: Path) -> dict[str, Any]:
        (folder / "a").write_text("first half")
        written.append(folder)
        time.sleep(0.2)
        return {}

    def die(folder: Path) -> dict[str, Any]:
        (folder / "a").write_text("first half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(place, die)
    (place.parent / ".place-killed").mkdir()  # what SIGKILL leaves
    assert not sound(place)
    threads = [threading.Thread(target=publish, args=(place, write)) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(written) == 1
    assert sound(place)
    assert sorted(p.name for p in place.parent.iterdir()) == [".place.lock", "place"]
