"""Estimates against hand calculations and against the models themselves."""

from types import SimpleNamespace

import pytest

from retention import estimate
from retention.estimate import PUBLISHED, Shape

# Parameters as the models' cards give them, in millions.
CARDS = {
    "openai-community/gpt2": 124.4,
    "openai-community/gpt2-xl": 1557.6,
    "EleutherAI/gpt-j-6b": 6050.9,
    "EleutherAI/gpt-neox-20b": 20554.6,
    "meta-llama/Llama-2-7b-hf": 6738.4,
    "meta-llama/Llama-3.1-8B": 8030.3,
    "meta-llama/Llama-3.2-1B": 1235.8,
    "mistralai/Mistral-7B-v0.1": 7241.7,
    "Qwen/Qwen2.5-7B": 7615.6,
    "Qwen/Qwen2.5-0.5B": 494.0,
    "tiiuae/falcon-7b": 6921.7,
}


@pytest.mark.parametrize("name", CARDS)
def test_parameters_are_those_of_the_cards(name):
    assert PUBLISHED[name].parameters / 1e6 == pytest.approx(CARDS[name], rel=2e-3)


TINY = Shape(type="llama", layers=2, width=8, mlp=16, vocabulary=100, heads=2, kv_heads=1, gated=True)


def test_by_hand():
    # attention: q and o 8 x 8, k and v 8 x 4; mlp: three matrices of 8 x 16
    assert TINY.block == 2 * 64 + 2 * 32 + 3 * 128 == 576
    assert TINY.parameters == 2 * 576 + 2 * 800
    # 3 rows of 5 tokens: (10 * 8 + 4 * 16) floats a block and token; in bfloat16 what is as wide as the MLP is half
    assert estimate.activations(TINY, 3, 5, 4) == 2 * 15 * 144 * 4
    assert estimate.activations(TINY, 3, 5, 2, checkpointing=True) == 2 * 15 * 8 * 4 + 15 * (80 * 4 + 64 * 2)
    # the fused head: one tile on an accelerator, eight of float32 on a processor; logits, log-softmax, gradient without
    assert estimate.head(TINY, 15, 2) == 15 * 100 * 2
    assert estimate.head(TINY, 15, 2, cpu=True) == 8 * 15 * 100 * 4
    assert estimate.head(TINY, 5000, 2) == 4096 * 100 * 2
    assert estimate.head(TINY, 5000, 2, fused=False) == 3 * 5000 * 100 * 4
    need = estimate.tune(TINY, batch=3, length=5)
    assert need.parts["weights"] == need.parts["gradients"] == 2752 * 4 / 2**30
    assert need.parts["optimizer"] == 2 * need.parts["weights"]
    assert need.total == pytest.approx((4 * 2752 * 4 + 2 * 15 * 144 * 4 + 15 * 100 * 4) / 2**30)
    # rank 2: q 2 * (8 + 8), o the same, k and v 2 * (8 + 4); three matrices of 2 * (8 + 16)
    assert estimate.lora_numbers(TINY, 2, "attention") == 2 * (64 + 48)
    assert estimate.lora_numbers(TINY, 2, "mlp") == 2 * 144
    assert estimate.lora_numbers(TINY, 2) == 2 * (64 + 48 + 144)
    lora = estimate.tune(TINY, batch=3, length=5, trainable=512, adapter=True)
    assert lora.parts["gradients"] == 512 * 4 / 2**30
    assert lora.parts["weights"] == (2752 + 512) * 4 / 2**30
    frozen = estimate.tune(TINY, batch=3, length=5, trainable=512)
    assert (frozen.parts["weights"], frozen.parts["optimizer"]) == (2752 * 4 / 2**30, 512 * 8 / 2**30)
    shared = estimate.tune(TINY, batch=3, length=5, shards=2)
    assert shared.total == pytest.approx(need.total - 2 * 2752 * 4 / 2**30)
    # float64 sums of three layers' keys; one layer: its float32, a float64 copy and the float64 factor
    assert estimate.edit(TINY, layers=3, batch=1, length=1).parts["covariance"] == 3 * 256 * 8 / 2**30
    assert estimate.edit(TINY, layers=1, batch=1, length=1).parts["covariance"] == 256 * (4 + 8 + 8) / 2**30
    assert estimate.edit(TINY, covariance=False).parts["covariance"] == 0
    assert estimate.flops(TINY, 210) == 6 * (1152 + 800) * 210
    assert estimate.flops(TINY, 210, adapter=True, checkpointing=True) == pytest.approx(4 * 4 / 3 * 1952 * 210)


def test_full_fine_tuning_of_8b_does_not_fit_an_h200_in_float32_and_lora_does():
    shape = PUBLISHED["meta-llama/Llama-3.1-8B"]
    full = estimate.tune(shape, batch=16, length=100, dtype="bfloat16", checkpointing=True)
    assert full.total == pytest.approx(16 * 8.03e9 / 2**30, rel=0.05)  # 4 + 4 + 8 bytes a number
    assert "tune: " in estimate.advice([full], 100)
    assert "adamw_8bit" in estimate.advice([full], 100)
    lora = estimate.tune(
        shape, batch=16, length=100, trainable=estimate.lora_numbers(shape, 32), adapter=True, dtype="bfloat16"
    )
    assert estimate.advice([lora, estimate.prepare(shape)], 100) is None


def test_names():
    assert estimate.published("OPENAI-community/GPT2-xl") is PUBLISHED["openai-community/gpt2-xl"]
    assert estimate.published("openai-community/gpt3") is None
    assert estimate.nearest("openai-community/gpt2-x") == "openai-community/gpt2-xl"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_has_the_shape_it_was_made_for(name):
    """Built without weights, the model has as many numbers in its matrices as the shape says."""
    import torch
    from transformers import AutoModelForCausalLM

    shape = PUBLISHED[name]
    config = estimate.configuration(shape)
    config.get_text_config().num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert matrices == shape.parameters - (shape.layers - 1) * shape.block


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral", "gemma3_text", "gemma2", "phi3", "olmo2"])
def test_shape_of_a_configuration(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}}.get(
        family,
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 80, "head_dim": 8, "pad_token_id": 0},
    )  # fmt: skip
    config = AutoConfig.for_model(family, vocab_size=500, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert estimate.shape_of(config).parameters == matrices
    assert estimate.shape_of(config).type == family


def test_a_config_that_wraps_a_text_model():
    text = SimpleNamespace(hidden_size=8, num_hidden_layers=2, intermediate_size=16, vocab_size=100,
                           num_attention_heads=2, num_key_value_heads=1, hidden_act="silu", head_dim=4)  # fmt: skip
    config = SimpleNamespace(model_type="wrapped", get_text_config=lambda: text, tie_word_embeddings=False)
    assert estimate.shape_of(config).parameters == TINY.parameters
