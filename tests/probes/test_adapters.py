"""Models with a peft adapter on them are read as they are: low-rank updates, and learned tokens before the text."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from retention.hooks import old_cache_name
from retention.probes import Generate, Score
from tests import tiny
from tests.probes.independent import alone, question, some_questions

# peft 0.21 asks transformers 5.23 for `is_gradient_checkpointing`, which warns that it has a new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIGS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["up_proj", "q_proj"]),
    "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p_tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix_tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def adapted(kind: str):
    model, tokenizer = tiny.build("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(model, CONFIGS[kind]).eval()
        for name, parameter in model.named_parameters():
            if "prompt" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return model, tokenizer


def whole(model, ids):
    """Logits [tokens, vocabulary] after each real token, by one plain forward."""
    with torch.no_grad(), old_cache_name():
        ids = torch.tensor([ids])
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores(kind):
    model, tokenizer = adapted(kind)
    bare = tiny.build("llama")[0]
    differs = 0
    asked = some_questions(8)
    for reading, one in zip(Score().read(model, tokenizer, asked, 0), asked, strict=True):
        assert reading.state == "ok"
        ids, start = tokenizer(f"{one.text} {one.answer}").input_ids, len(tokenizer(one.text).input_ids)
        logps = whole(model, ids).log_softmax(-1)
        expected = sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids)))
        assert reading.logp_target == pytest.approx(expected, abs=1e-5)
        pairs = [(logps[place - 1], ids[place]) for place in range(start, len(ids))]
        leads = [float(row[token]) - max(float(x) for i, x in enumerate(row) if i != token) for row, token in pairs]
        assert reading.lead == pytest.approx(min(leads), abs=1e-5)
        differs += abs(expected - alone(bare, tokenizer, one.text, one.answer)["logp"]) > 0.01
    assert differs > 4  # the adapter is not idle


@pytest.mark.parametrize("kind", CONFIGS)
def test_generation(kind):
    model, tokenizer = adapted(kind)
    asked = some_questions(6)
    for reading, one in zip(Generate(max_new_tokens=5, stop=()).read(model, tokenizer, asked, 0), asked, strict=True):
        ids, said = tokenizer(one.text).input_ids, []
        while len(said) < 5 and said[-1:] != [tokenizer.eos_token_id]:
            said.append(int(whole(model, ids + said)[-1].argmax()))
        assert reading.generated == tokenizer.decode(said, skip_special_tokens=True)


def test_learned_tokens_take_positions():
    model, tokenizer = adapted("prompt_tuning")  # 128 positions, 3 of them learned
    fits, long = (question(" ".join(["piano"] * n), "Rome") for n in (123, 124))
    assert [r.state for r in Score().read(model, tokenizer, [fits, long], 0)] == ["ok", "too_long"]
