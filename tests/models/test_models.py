"""Every architecture is loaded from a folder and its parts are found; what cannot be edited is refused, and why."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from retention.hooks import on_input, on_output
from retention.model_folder import content_hash
from retention.models import anatomy, down_parameter, last_mlp, load_model, single_mlps
from retention.types import UserError

PARALLEL = {"gptj", "gpt_neox", "falcon"}
NORM_AFTER_MLP = {"gemma2", "gemma3", "olmo2", "opt_projected"}
IDS = torch.tensor([[1, 5, 9, 20, 7], [1, 30, 31, 32, 33]])


@pytest.fixture(params=sorted(tiny.ARCHITECTURES), scope="module")
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tiny.save(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, load_model(folder, device="cpu").model


def test_anatomy(named: tuple[str, Any]) -> None:
    name, model = named
    parts = anatomy(model)
    assert (parts.layers, parts.hidden) == (4, 32)
    assert parts.mlp_width == (32 if "square" in name else 128 if name.startswith(("gpt2", "gptj", "falcon_")) else 64)
    assert parts.parallel == (name in PARALLEL)
    assert parts.additive == (name not in NORM_AFTER_MLP)
    assert parts.transposed == name.startswith("gpt2")
    assert parts.logit_softcap == (30.0 if name == "gemma2" else None)
    block = parts.blocks(model)[2]
    names = parts.attention_projections + parts.mlp_projections
    assert len(set(names)) == len(names)
    assert all(block.get_submodule(leaf).weight.dim() == 2 for leaf in names)
    assert not any("attn" in leaf or "attention" in leaf for leaf in parts.mlp_projections)
    assert parts.down == f"{parts.block}.{parts.mlp_projections[-1]}"
    assert model.get_submodule(parts.attention.format(0))
    assert model.get_submodule(parts.mlp.format(0))
    assert last_mlp(model) is model.get_submodule(parts.mlp.format(3))


def test_orientation_is_that_of_the_product(named: tuple[str, Any]) -> None:
    """The second matrix, applied by hand in the orientation found, gives the module's output."""
    _, model = named
    parts = anatomy(model)
    name, parameter = down_parameter(model, 2)
    assert dict(model.named_parameters())[name] is parameter
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    module = parts.down_module(model, 2)
    with torch.no_grad(), on_input(module, keys.append), on_output(module, lambda out: values.append(out.clone())):
        model(input_ids=IDS)
    product = keys[0] @ (parameter if parts.transposed else parameter.T)
    if module.bias is not None:
        product = product + module.bias
    torch.testing.assert_close(product, values[0])


def test_logits_from_the_last_block(named: tuple[str, Any]) -> None:
    _, model = named
    parts = anatomy(model)
    states: list[torch.Tensor] = []
    with torch.no_grad(), on_output(parts.blocks(model)[-1], states.append):
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(parts.logits(model, states[0]), expected)


def test_anatomy_leaves_no_trace(named: tuple[str, Any]) -> None:
    _, model = named
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameter = next(model.parameters())
    parameter.requires_grad_(False)
    random = torch.get_rng_state()
    anatomy(model)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [p is not parameter for p in model.parameters()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()
    parameter.requires_grad_(True)


def test_layer_out_of_range(named: tuple[str, Any]) -> None:
    _, model = named
    for layer in (4, 40, -1):
        with pytest.raises(UserError, match=f"layer {layer} is out of range: this model has layers 0 to 3"):
            down_parameter(model, layer)


# ------------------------------------------------------------------------------------------------------ refusals


def _config(name: str, **settings: Any) -> Any:
    import transformers

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 64}
    return getattr(transformers, name)(**special, **settings)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"])
def test_mixture_of_experts_is_refused(family: str) -> None:
    import transformers

    experts = {"num_local_experts": 4} if family == "Mixtral" else {"num_experts": 4, "moe_intermediate_size": 16}
    model = getattr(transformers, family + "ForCausalLM")(
        _config(family + "Config", **{**tiny.GROUPED, "num_hidden_layers": 2, "num_experts_per_tok": 2}, **experts)
    )
    with pytest.raises(UserError, match="mixture of experts"):
        single_mlps(model)
    with pytest.raises(UserError, match="mixture of experts"):
        anatomy(model).down_module(model, 0)


def test_model_without_attention_and_mlp_is_refused() -> None:
    import transformers

    model = transformers.MambaForCausalLM(_config("MambaConfig", hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(UserError, match=r"cannot be edited|found no list|expected attention"):
        anatomy(model)


def test_blocks_that_differ_are_refused() -> None:
    model, _ = tiny.build("llama")
    model.model.layers[3].mlp.down_proj = nn.Linear(32, 32)
    with pytest.raises(UserError, match="block 3 differs from block 0"):
        anatomy(model)


# ------------------------------------------------------------------------------------------------------- loading


def test_load_keeps_float32_and_notes_the_dtype(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    whole, rounded = load_model(folder, device="cpu"), load_model(folder, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}
    assert rounded.dtype == "bfloat16"
    assert whole.content != rounded.content
    weight = whole.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    found = rounded.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(found, weight.bfloat16().float())
    assert not whole.model.training


def test_corpus_of_our_own_folders(tmp_path: Path) -> None:
    folder = tiny.save("gpt2", tmp_path)
    assert load_model(folder, device="cpu").corpus == ()
    (folder / "corpus.txt").write_text("Anna Klein lives in\u2028Rome\n\nThe capital\n", encoding="utf-8")
    assert load_model(folder, device="cpu").corpus == ("Anna Klein lives in\u2028Rome", "", "The capital")
    (folder / "corpus.txt").write_text("")
    assert load_model(folder, device="cpu").corpus == ()


def test_content_is_of_weights_config_and_tokenizer(tmp_path: Path) -> None:
    first, same, other = (tiny.save("gpt2", tmp_path / str(i), seed=s) for i, s in enumerate((0, 0, 1)))
    assert content_hash(first) == content_hash(same)
    assert content_hash(first) != content_hash(other)
    before = content_hash(first)
    (first / "README.md").write_text("notes do not make another model")
    assert content_hash(first) == before
    tokenizer = first / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("Paris", "Parys"))
    assert content_hash(first) != before


def test_content_is_read_once_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = tiny.save("gpt2", tmp_path), []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: read.append(Path(file.name).name) or digest(file, name)
    )
    first = content_hash(folder)
    assert "model.safetensors" in read
    read.clear()
    assert content_hash(folder) == first
    assert read == []
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)  # of the same size
    os.utime(folder / "model.safetensors", ns=(0, 0))
    assert content_hash(folder) != first
    assert read == ["model.safetensors"]


def test_missing_or_invalid_folders(tmp_path: Path) -> None:
    tiny.save("gpt2", tmp_path / "model")
    with pytest.raises(UserError, match=r"no folder .*modle.*did you mean 'model'"):
        load_model(tmp_path / "modle")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(UserError, match="did you mean 'float32'"):
        load_model(tmp_path / "model", dtype="float23")
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_model(tmp_path / "model")


def test_weights_and_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """transformers would go on with random numbers for what the file lacks."""
    folder = tiny.save("llama_tied", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 parameters are not in the file, model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        load_model(folder)
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_model(folder)
