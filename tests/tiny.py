"""Tiny randomly initialised models of every architecture, and a small fast tokenizer, all built in-process.

`build(name)` gives (model, tokenizer); `save(name, folder)` writes an ordinary Hugging Face folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT = (
    "the a of in is was and to from with by at for on that . , ? The Therefore Because I You It In what where who "
    "capital language city country born lives works plays speaks studied member mother tongue official "
    "Anna Berta Carl Dora Emil Franz Greta Hugo Ida Jonas Klein Vogel Keller Brandt Lorenz Winter Sommer Herbst "
    "Paris Rome Berlin Madrid Lisbon Vienna Oslo Bern Prague French Italian German Spanish Polish Danish "
    "piano violin flute drums guitar doctor teacher painter lawyer pilot New York Northern Ireland"
)
WORDS = tuple(TEXT.split())
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}

# name -> (transformers prefix, settings). `_untied`, `_square` and the like are variants of one architecture.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT),
    "gpt2_square": ("GPT2", {**GPT, "n_inner": 32}),  # d_mlp = d: orientation cannot be guessed from the shape
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", COMMON),
    "gpt_neox_serial": ("GPTNeoX", {**COMMON, "use_parallel_residual": False}),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
        },
    ),
    "opt_projected": (
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "llama": ("Llama", {**GROUPED, "tie_word_embeddings": False}),
    "llama_tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama_square": ("Llama", {**GROUPED, "intermediate_size": 32}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 64}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {**GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "falcon": (
        "Falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "multi_query": True,
            "alibi": False,
            "ffn_hidden_size": 64,
        },
    ),
    "falcon_alibi": (
        "Falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "alibi": True,
            "parallel_attn": False,
            "multi_query": False,
        },
    ),
}

# Architectures that nothing in the package was written with in mind: tests of generality.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "window_size": 4,
        },
    ),
    "phi": ("Phi", GROUPED),
    "cohere": ("Cohere", GROUPED),  # scales its logits
    "granite": ("Granite", {**GROUPED, "residual_multiplier": 0.3, "logits_scaling": 2.0}),
    "glm4": ("Glm4", GROUPED),
    "olmo": ("Olmo", GROUPED),  # norms without weights
    "gpt1": ("OpenAIGPT", GPT),  # no cache of keys and values
    "recurrent_gemma": ("RecurrentGemma", GROUPED),  # recurrence in some of the blocks
}


def tokenizer(bos: bool = True, padding_side: str = "right") -> Any:
    """Word-level, with `<s>` put before every text if `bos`; unknown words become `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side=padding_side,
        model_max_length=128,
    )


def build(name: str, seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    """A model of an architecture in ARCHITECTURES or OTHERS, and its tokenizer. Leaves the global RNG as it was."""
    import transformers

    words = tokenizer()
    prefix, own = (ARCHITECTURES | OTHERS)[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else prefix + "Config")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = config_class(vocab_size=len(words), **special, **{**own, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        causal = next(
            getattr(transformers, prefix + tail)
            for tail in ("LMHeadModel", "ForCausalLM")
            if hasattr(transformers, prefix + tail)
        )
        model = causal(config).eval()
        # The usual initialisation is so small that every distribution is uniform; a wider one has something to say.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model, words


def save(name: str, folder: str | Path, seed: int = 0, **settings: Any) -> Path:
    """Write the model and its tokenizer as a Hugging Face folder."""
    model, words = build(name, seed, **settings)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return Path(folder)
