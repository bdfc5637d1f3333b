"""Adapters: where they sit, what moves, what merging gives, and what is refused before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from retention.adapters import Adapter, Full, adapted_modules, merged
from retention.models import Anatomy, anatomy
from retention.objectives import Sft
from retention.tune import Budget, Held, TuneResult, fine_tune
from retention.types import UserError
from tests.tiny import build

CITIES = {"Anna": "Paris", "Berta": "Rome", "Carl": "Berlin", "Dora": "Madrid"}
ROWS = tuple({"prompt": f"{p} was born in", "completion": f"{c} ."} for p, c in CITIES.items())
IDS = torch.tensor([[1, 7, 30, 12, 9], [1, 22, 8, 40, 11]])
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "dora": {"r": 4},
    "pissa": {"r": 4},
    "oft": {"oft_block_size": 8},
    "osf": {},
    "vera": {"r": 8},
    "ia3": {},
}
MISSING = {("oft", "gpt2"), ("osf", "gpt2")}  # peft's, for Conv1D
FITTING = [(n, a) for n in SETTINGS for a in ("gpt2", "llama") if (n, a) not in MISSING]


pytestmark = pytest.mark.usefixtures("trl_imported")


def adapter(name: str, **more: Any) -> Any:
    return Full() if name == "full" else Adapter(name=name, settings=SETTINGS.get(name, {}), **more)


def projections(places: Anatomy) -> dict[str, tuple[str, ...]]:
    return {"mlp": places.mlp_projections, "attention": places.attention_projections}


def tuned(folder: Path, model: Any, tokenizer: Any, adapter: Any, *, merge: bool = False) -> tuple[Any, TuneResult]:
    """The model with its adapter around it after two steps, and what the fine-tune reports."""
    kept: list[Any] = []

    def hold(wrapped: Any) -> Held:
        kept.append(wrapped)
        return Held()

    result = fine_tune(
        model, tokenizer, ROWS, objective=Sft(), adapter=adapter, hold=hold, anatomy=anatomy(model),
        budget=Budget(steps=2), trainer={"learning_rate": 1e-2, "per_device_train_batch_size": 4}, seed=0, at=(),
        on_checkpoint=lambda *_: None, folder=folder, base=lambda: model, merge=merge,
    )  # fmt: skip
    return kept[0], result


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(("name", "architecture"), FITTING)
def test_an_adapter_alone_moves_and_merging_gives_the_same_model(tmp_path, name, architecture):
    model, tokenizer = build(architecture)
    before = logits(model)
    names = [n for n, _ in model.named_parameters()]
    wrapped, result = tuned(tmp_path, model, tokenizer, adapter(name))
    assert sorted(result.adapted) == sorted(adapted_modules(wrapped)) != []
    assert all(any(place in n for place in result.adapted) or "vera_lambda" in n for n in result.trainable)
    assert result.trainable_count == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)

    untrained, _ = build(architecture)
    torch.manual_seed(0)
    fresh = adapter(name).wrap(untrained, projections(anatomy(untrained)))
    start = {n: p.detach() for n, p in fresh.named_parameters()}
    moved = {n for n, p in wrapped.named_parameters() if not torch.equal(p, start[n])}
    assert moved
    assert moved <= set(result.trainable)  # all that is frozen is as the adapter's start has left it

    adapted = logits(wrapped)
    assert (adapted - before).abs().max() > 1e-3
    state = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
    plain, _ = build(architecture)
    with merged(wrapped, names) as own, torch.no_grad():
        for n, p in plain.named_parameters():
            p.copy_(own[n])
    assert torch.allclose(logits(plain), adapted, atol=2e-4)  # in an ordinary model, far from peft's layers
    assert all(torch.equal(p, state[n]) for n, p in wrapped.named_parameters())
    assert torch.equal(logits(wrapped), adapted)


@pytest.mark.parametrize(("name", "architecture"), [("lora", "gpt2"), ("pissa", "llama"), ("oft", "llama")])
def test_a_merged_fine_tune_leaves_an_ordinary_model_for_the_next(tmp_path, name, architecture):
    model, tokenizer = build(architecture)
    names = [n for n, _ in model.named_parameters()]
    apart, _ = build(architecture)
    wrapped, _ = tuned(tmp_path, apart, tokenizer, adapter(name))
    tuned(tmp_path, model, tokenizer, adapter(name), merge=True)
    assert [n for n, _ in model.named_parameters()] == names
    assert torch.allclose(logits(model), logits(wrapped), atol=2e-4)
    _, result = tuned(tmp_path, model, tokenizer, Full())
    assert list(result.trainable) == names
    assert result.adapted == ()


@pytest.mark.parametrize("targets", ["mlp", "attention", "all", ("down_proj", "0.self_attn.q_proj")])
def test_targets_are_resolved_for_the_architecture(targets):
    model, _ = build("llama")
    places = anatomy(model)
    found = set(adapted_modules(adapter("lora", targets=targets).wrap(model, projections(places))))
    mlp = {f"model.layers.{i}.mlp.{leaf}_proj" for i in range(4) for leaf in ("gate", "up", "down")}
    attention = {f"model.layers.{i}.self_attn.{leaf}_proj" for i in range(4) for leaf in "qkvo"}
    listed = {n for n in mlp if "down" in n} | {"model.layers.0.self_attn.q_proj"}
    assert found == {"mlp": mlp, "attention": attention, "all": mlp | attention}.get(str(targets), listed)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", [*SETTINGS, "frod", "shira"])
def test_what_fits_is_found_to_fit_without_weights(name):
    model, _ = build("llama")
    more = {"frod": {}, "shira": {"r": 4}}
    state = torch.random.get_rng_state()
    part = Adapter(name=name, settings=more.get(name, SETTINGS.get(name, {})))
    part.check(model.config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config.num_hidden_layers == 4  # the config is the caller's


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox", "gemma3", "falcon_alibi", "phi3", "mistral"])
def test_every_architecture_is_checked_without_weights(architecture):
    config = build(architecture)[0].config
    adapter("lora").check(config)
    with pytest.raises(UserError, match="this model has no module 'nowhere'; "):
        adapter("lora", targets=("nowhere",)).check(config)


@pytest.mark.parametrize(
    ("part", "architecture", "said"),
    [
        ({"name": "lora", "settings": {"r": 0}}, "llama", "positive integer"),
        ({"name": "lora", "settings": {"lora_dropout": 2.0}}, "llama", "dropout probability"),
        ({"name": "oft", "settings": {"oft_block_size": 0, "r": 0}}, "llama", "oft_block_size"),
        ({"name": "oft", "settings": {"oft_block_size": 5}}, "llama", "Adjusted `oft_block_size` to (4)"),
        ({"name": "oft", "settings": {"oft_block_size": 0, "r": 5}}, "llama", "Adjusted `r` to (4)"),
        ({"name": "vblora"}, "llama", "must be divisible by `vector_length` 256"),
        ({"name": "lora", "targets": ["down_pro"]}, "llama", "no module 'down_pro'; did you mean 'down_proj'?"),
        ({"name": "lora", "targets": ["lm_head"]}, "llama", "'lm_head' is the head"),
        ({"name": "lora", "settings": {"modules_to_save": ["lm_haed"]}}, "llama", "'lm_haed'; did you mean 'lm_head'?"),
        ({"name": "lora", "settings": {"rank_pattern": {"q": 2}}}, "llama", "did not match any targeted module"),
        ({"name": "oft"}, "gpt2", "Conv1D"),
        ({"name": "osf"}, "gpt2", "its matrices are Conv1D"),
    ],
)
def test_what_does_not_fit_is_refused_without_weights(part, architecture, said):
    config = build(architecture)[0].config
    with pytest.raises(UserError) as caught:
        Adapter(**part).check(config)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"adapter {part['name']}: ")


@pytest.mark.parametrize("alpha", [0, -8])
def test_an_update_without_scale_is_refused(alpha):
    with pytest.raises(ValidationError, match=f"lora_alpha: expected a number above 0 .* got {alpha}"):
        Adapter(name="lora", settings={"lora_alpha": alpha})


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("vera", {"r": -2}, "settings.r: expected a whole number above 0, got -2"),  # peft: a tensor of dimension -2
        ("lora", {"lora_dropout": -0.1}, "settings.lora_dropout: expected a share from 0 to 1, got -0.1"),
        ("lora", {"init_lora_weights": "eva"}, "eva is worked out from activations"),
    ],
)
def test_what_peft_would_take_without_a_word_or_with_a_riddle(name, settings, said):
    with pytest.raises(ValidationError, match=said):
        Adapter(name=name, settings=settings)


@pytest.mark.parametrize("name", ["adalora", "adaption_prompt", "poly", "shadow", "trainable_tokens", "xlora"])
def test_methods_that_adapt_no_matrix_by_ordinary_training_are_refused(name):
    with pytest.raises(ValidationError, match=f"{name} .*; use an adapter of matrices, such as lora"):
        Adapter(name=name)
