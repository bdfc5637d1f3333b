"""LoRA as an editor: what it returns is the adapter's effect, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from retention.editors._peft import adapted, merged_update, peft_config, target_modules
from retention.editors.lora import Lora
from retention.types import LowRank, UserError
from tests.editors.small import CORPUS, edits, logp, unchanged
from tests.tiny import ARCHITECTURES, build


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_writes_the_edits_on_every_architecture_and_leaves_the_model(name: str) -> None:
    model, tokenizer = build(name)
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    with unchanged(model):
        result = Lora(rank=4, alpha=4, lr=4e-2, epochs=12).edit(model, tokenizer, edits(), seed=3)
    model.eval()
    before = [logp(model, tokenizer, edit) for edit in edits()]
    with result.delta.applied(model):
        after = [logp(model, tokenizer, edit) for edit in edits()]
    n_tokens = (1, 2)
    for i, record in enumerate(result.diagnostics):
        assert after[i] > before[i] + 1
        assert record["final_loss"] == pytest.approx(-after[i] / n_tokens[i], abs=1e-4)
    assert all(isinstance(update, LowRank) and update.left.shape[1] == 4 for update in result.delta.updates.values())


@pytest.mark.parametrize("name", ["gpt2_square", "llama_square", "opt", "phi3"])
@pytest.mark.parametrize("targets", ["mlp", "attention", "all"])
def test_factors_are_the_adapter_in_the_parameters_own_layout(name: str, targets: str) -> None:
    """The logits with a random adapter in place equal those with its update added to the weights."""
    model, tokenizer = build(name)
    ids = torch.tensor([tokenizer("Anna Klein was born in Paris")["input_ids"]])
    modules = target_modules(model, targets, None)
    with adapted(model, peft_config(model, modules, "lora", 4, 12.0, 0.0, {})) as wrapped, torch.no_grad():
        for parameter in wrapped.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
        with_adapter = wrapped.model(input_ids=ids).logits
        delta = merged_update(wrapped, plain=True)
    base = model(ids).logits
    with delta.applied(model):
        merged = model(ids).logits
    assert len(delta.updates) == len(modules)
    assert (with_adapter - base).abs().max() > 0.1
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dora", {}),
        ("loha", {}),
        ("hra", {}),
        ("ia3", {"feedforward_modules": []}),
        ("lora", {"init_lora_weights": "pissa"}),  # moves the base weights when it is put on
    ],
)
def test_other_methods_are_merged_exactly(method: str, options: dict[str, Any]) -> None:
    model, tokenizer = build("llama")
    ids = torch.tensor([tokenizer("Anna Klein was born in Paris")["input_ids"]])
    modules = target_modules(model, "mlp", None)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with adapted(model, peft_config(model, modules, method, 4, 4.0, 0.0, options)) as wrapped, torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in wrapped.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        with_adapter = wrapped.model(input_ids=ids).logits
        delta = merged_update(wrapped, plain=False)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with delta.applied(model):
        merged = model(ids).logits
    assert (merged - model(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(merged, with_adapter, rtol=1e-3, atol=1e-3)


def test_equal_seeds_give_equal_updates_and_other_seeds_others() -> None:
    model, tokenizer = build("llama")
    editor = Lora(rank=2, epochs=3, dropout=0.1, prefixes=2, keep_anchors=0.5, keep_corpus=0.5, rehearsal=2)
    first, second, other = (
        editor.edit(model, tokenizer, edits(), seed=seed, corpus=CORPUS).delta for seed in (1, 1, 2)
    )
    torch.manual_seed(99)
    third = editor.edit(model, tokenizer, edits(), seed=1, corpus=CORPUS).delta
    assert all(
        torch.equal(first.dense(n), second.dense(n)) and torch.equal(first.dense(n), third.dense(n))
        for n in first.updates
    )
    assert not torch.equal(first.dense(next(iter(first.updates))), other.dense(next(iter(other.updates))))


def test_keeping_terms_hold_what_they_name() -> None:
    """With the KL on the corpus, the texts' next-token distributions move less; the label says that they were seen."""
    model, tokenizer = build("llama")
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in CORPUS]
    settings: dict[str, Any] = {"rank": 4, "alpha": 4, "lr": 1e-2, "epochs": 40, "stop_loss": 0}

    def moved(editor: Lora) -> float:
        base = [model(row).logits.log_softmax(-1) for row in ids]
        with editor.edit(model, tokenizer, edits(), seed=0, corpus=CORPUS).delta.applied(model):
            return sum(
                float((b.exp() * (b - model(r).logits.log_softmax(-1))).sum()) for b, r in zip(base, ids, strict=True)
            )

    kept = Lora(**settings, keep_corpus=5.0)
    with torch.no_grad():
        assert moved(kept) < 0.3 * moved(Lora(**settings))
    assert Lora().label == "lora"
    assert kept.label == "lora+kl"
    assert Lora(method="dora", rehearsal=4, postprocess=({"name": "prune"},)).label == "dora+rehearsal+prune"


def test_low_precision_weights_still_get_a_float32_update() -> None:
    model, tokenizer = build("llama")
    model.to(torch.bfloat16)
    with unchanged(model):
        result = Lora(rank=4, alpha=4, lr=2e-2, epochs=20).edit(model, tokenizer, edits(), seed=0)
    assert all(result.delta.dense(name).dtype == torch.float32 for name in result.delta.updates)
    assert max(record["final_loss"] for record in result.diagnostics) < 3


def test_layers_and_module_names_choose_the_matrices() -> None:
    model, tokenizer = build("llama")
    one = Lora(rank=2, epochs=1, layers=(1,), targets=("down_proj",)).edit(model, tokenizer, edits(), seed=0)
    assert list(one.delta.updates) == ["model.layers.1.mlp.down_proj.weight"]


def test_mistakes_are_named() -> None:
    model, tokenizer = build("llama")

    def edit(**settings: Any) -> None:
        with unchanged(model):
            Lora(epochs=1, **settings).edit(model, tokenizer, edits(), seed=0)

    with pytest.raises(UserError, match="layers 0 to 3"):
        edit(layers=(4,))
    with pytest.raises(UserError, match="did you mean 'down_proj'"):
        edit(targets=("down_prj",))
    with pytest.raises(UserError, match="rehearsal draws from the corpus"):
        edit(rehearsal=4)
    with pytest.raises(ValidationError, match="xlora mixes adapters that were trained before"):
        edit(method="xlora")
    with pytest.raises(UserError, match="peft refuses"):
        edit(method="oft")
    with pytest.raises(ValidationError, match="did you mean 'dora'"):
        Lora(method="dorra")
    with pytest.raises(ValidationError, match="soft prompt"):
        Lora(method="prompt_tuning")
    with pytest.raises(ValidationError, match="use_rslora"):
        Lora(method_options={"use_rslor": True})
    with pytest.raises(ValidationError, match="rank"):
        Lora(rank=0)
