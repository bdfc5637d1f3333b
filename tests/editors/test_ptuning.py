"""A soft prompt writes the edits without a weight, and is read back exactly."""

from __future__ import annotations

import pytest
import torch

from retention.editors.ptuning import PTuning
from retention.probes.score import Score
from retention.soft_prompt import prompted
from retention.types import Question
from tests.editors.small import edits, unchanged
from tests.tiny import ARCHITECTURES, build

QUESTIONS = [
    Question(fact_id=e.fact.id, group="edited", form="direct", text=e.fact.text(), answer=e.target, foil=None)
    for e in edits()
]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "falcon_alibi"])
def test_writes_the_edits_without_a_weight(name: str) -> None:
    """Readings through a prompt are those of the same embeddings put before the text by hand."""
    model, tokenizer = build(name)
    model.train()
    with unchanged(model):
        result = PTuning(virtual_tokens=4, encoder_width=16, epochs=25).edit(model, tokenizer, edits(), seed=1)
        model.eval()
        before = [r.logp_target for r in Score().read(model, tokenizer, QUESTIONS, -1)]
        with prompted(model, result.soft_prompt) as reader:
            after = [r.logp_target for r in Score().read(reader, tokenizer, QUESTIONS, 0)]
        model.train()
    assert not result.delta.updates
    assert result.soft_prompt is not None
    assert result.soft_prompt.dtype == torch.float32
    assert sum(after) > sum(before) + 0.3  # type: ignore[arg-type]
    model.eval()
    for i, edit in enumerate(edits()):
        full = tokenizer(f"{edit.fact.text()} {edit.target}")["input_ids"]
        n = (1, 2)[i]
        embedded = model.get_input_embeddings()(torch.tensor([full]))
        with torch.no_grad():
            out = model(inputs_embeds=torch.cat([result.soft_prompt[None], embedded], dim=1)).logits[0].log_softmax(-1)
        by_hand = sum(float(out[4 + len(full) - n + j - 1, full[len(full) - n + j]]) for j in range(n))
        assert after[i] == pytest.approx(by_hand, abs=1e-4)
        assert result.diagnostics[i]["final_loss"] == pytest.approx(-by_hand / n, abs=1e-4)


def test_determinism_and_the_lstm_encoder() -> None:
    model, tokenizer = build("llama")
    editor = PTuning(virtual_tokens=3, encoder="lstm", encoder_width=8, epochs=3)
    with unchanged(model):
        prompts = [editor.edit(model, tokenizer, edits(), seed=seed).soft_prompt for seed in (0, 0, 1)]
    assert torch.equal(prompts[0], prompts[1])  # type: ignore[arg-type]
    assert not torch.equal(prompts[0], prompts[2])  # type: ignore[arg-type]


def test_no_soft_prompt_is_the_model_itself() -> None:
    model, _ = build("llama")
    with prompted(model, None) as reader:
        assert reader is model


def test_the_weights_below_a_prompt_stay_trainable() -> None:
    """Phase 2 moves the weights while the prompt is read: the reader shares them and changes no flag."""
    model, tokenizer = build("llama")
    soft_prompt = torch.zeros(2, 32)
    with prompted(model, soft_prompt) as reader:
        assert all(parameter.requires_grad for parameter in model.parameters())
        first = Score().read(reader, tokenizer, QUESTIONS, 0)[0].logp_target
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    with prompted(model, soft_prompt) as reader:
        assert Score().read(reader, tokenizer, QUESTIONS, 1)[0].logp_target != first
