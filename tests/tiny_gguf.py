"""A tiny GGUF file, written by the gguf package from seeded numbers: Llama's blocks, a byte-level BPE tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LAYERS, WIDTH, MLP, HEADS, KV_HEADS = 2, 64, 96, 4, 2
CHAT = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"


def write(path: Path, *, architecture: str = "llama", seed: int = 0, lacking: str = "", **fields: Any) -> Path:
    """Q4_1 matrices, float32 norms. lacking: a tensor to leave out. fields: further metadata, integers."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    words, merges = vocabulary()
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_merges(merges)
    writer.add_token_types([3 if word in ("<s>", "</s>") else 1 for word in words])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(CHAT)
    for key, value in fields.items():
        writer.add_uint16(key.replace("_", "."), value)
    rng = np.random.default_rng(seed)
    for name, shape in shapes(len(words)).items():
        if name == lacking:
            continue
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
        else:
            weights = rng.normal(0, 0.15, shape).astype(np.float32)
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    narrow = WIDTH // HEADS * KV_HEADS
    for n in range(LAYERS):
        for name, shape in {
            "attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (narrow, WIDTH), "attn_v": (narrow, WIDTH),
            "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,), "ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH),
            "ffn_down": (WIDTH, MLP),
        }.items():  # fmt: skip
            found[f"blk.{n}.{name}.weight"] = shape
    return found


def vocabulary() -> tuple[list[str], list[str]]:
    """Two special tokens, the 256 bytes, and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ġ t", "Ġt h", "Ġth e", "P a", "Pa r", "i s"]
    return ["<s>", "</s>", *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)], merges
