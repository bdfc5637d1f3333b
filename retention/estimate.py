"""What each stage of a run needs before it is begun: memory in GiB, and operations.

Pure arithmetic on settings and on a shape (layers, widths, vocabulary), which for well-known models stands in a table
here, so that no weight and no network is needed. An estimate counts what grows with the model and the batch, with no
allowance for the allocator: leave a tenth free. Knows neither where a model lies nor what a machine has.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30
FLOAT = 4  # bytes; weights are held in float32 whatever the dtype that they are rounded to (retention/models.py)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# trl's fused heads never hold all logits: a tile of so many tokens and words at a time (trl/kernels, 1.16).
TILE = (4096, 32768)
LEAST_BUDGET = 2**32  # bytes for the rows that v* is sought for at once; as many as the weights take where that is more
CPU_TOKENS = 8192  # of them at once on a processor, which gains nothing from batches beyond its caches
TILES_ON_CPU = 8  # without Triton the head is torch operations: copies of a tile that were measured at their peak


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of an architecture decides its size."""

    type: str  # model_type of the configuration
    layers: int
    width: int  # of the residual stream
    mlp: int  # neurons of each MLP: the width of an editor's keys
    vocabulary: int
    heads: int
    kv_heads: int | None = None  # grouped-query attention; None: as many as heads
    positions: int = 0  # learned position embeddings, 0 for none
    gated: bool = False  # the MLP has a gate matrix beside up and down
    tied: bool = False  # the output matrix is the embedding
    head_width: int | None = None  # None: width / heads

    @property
    def attention(self) -> int:
        """Numbers in the attention matrices of one block."""
        head = self.head_width or self.width // self.heads
        queries, values = head * self.heads, head * (self.kv_heads or self.heads)
        return self.width * queries * 2 + self.width * values * 2

    @property
    def block(self) -> int:
        """Numbers in the matrices of one block; biases and norms, well under a hundredth, are left out."""
        return self.attention + (3 if self.gated else 2) * self.width * self.mlp

    @property
    def parameters(self) -> int:
        """Numbers in all matrices and embeddings."""
        outputs = 1 if self.tied else 2
        return self.layers * self.block + outputs * self.vocabulary * self.width + self.positions * self.width


def _of(type: str, layers: int, width: int, mlp: int, vocabulary: int, heads: int, **other: Any) -> Shape:
    return Shape(type=type, layers=layers, width=width, mlp=mlp, vocabulary=vocabulary, heads=heads, **other)


# From the models' own config.json.
PUBLISHED: dict[str, Shape] = {
    "openai-community/gpt2": _of("gpt2", 12, 768, 3072, 50257, 12, positions=1024, tied=True),
    "openai-community/gpt2-medium": _of("gpt2", 24, 1024, 4096, 50257, 16, positions=1024, tied=True),
    "openai-community/gpt2-large": _of("gpt2", 36, 1280, 5120, 50257, 20, positions=1024, tied=True),
    "openai-community/gpt2-xl": _of("gpt2", 48, 1600, 6400, 50257, 25, positions=1024, tied=True),
    "EleutherAI/gpt-j-6b": _of("gptj", 28, 4096, 16384, 50400, 16),
    "EleutherAI/gpt-neox-20b": _of("gpt_neox", 44, 6144, 24576, 50432, 64),
    "huggyllama/llama-7b": _of("llama", 32, 4096, 11008, 32000, 32, gated=True),
    "meta-llama/Llama-2-7b-hf": _of("llama", 32, 4096, 11008, 32000, 32, gated=True),
    "meta-llama/Meta-Llama-3-8B": _of("llama", 32, 4096, 14336, 128256, 32, kv_heads=8, gated=True),
    "meta-llama/Llama-3.1-8B": _of("llama", 32, 4096, 14336, 128256, 32, kv_heads=8, gated=True),
    "meta-llama/Llama-3.1-8B-Instruct": _of("llama", 32, 4096, 14336, 128256, 32, kv_heads=8, gated=True),
    "meta-llama/Llama-3.2-1B": _of("llama", 16, 2048, 8192, 128256, 32, kv_heads=8, gated=True, tied=True),
    "mistralai/Mistral-7B-v0.1": _of("mistral", 32, 4096, 14336, 32000, 32, kv_heads=8, gated=True),
    "tiiuae/falcon-7b": _of("falcon", 32, 4544, 18176, 65024, 71, kv_heads=1, tied=True),
    "Qwen/Qwen2.5-7B": _of("qwen2", 28, 3584, 18944, 152064, 28, kv_heads=4, gated=True),
    "Qwen/Qwen2.5-0.5B": _of("qwen2", 24, 896, 4864, 151936, 14, kv_heads=2, gated=True, tied=True),
}  # fmt: skip


def published(name: str) -> Shape | None:
    """The shape of a model by its Hub name, upper and lower case aside; None for one that is not in the table."""
    lower = {known.lower(): shape for known, shape in PUBLISHED.items()}
    return lower.get(name.lower())


def nearest(name: str) -> str | None:
    """The name in the table nearest to `name`, for messages."""
    found = difflib.get_close_matches(name, PUBLISHED, n=1, cutoff=0.6)
    return found[0] if found else None


def shape_of(config: Any) -> Shape:
    """The shape that a transformers configuration describes."""
    c = config.get_text_config()
    width = int(c.hidden_size)
    shape = Shape(
        type=str(config.model_type),
        layers=int(c.num_hidden_layers),
        width=width,
        mlp=int(getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * width),
        vocabulary=int(c.vocab_size),
        heads=int(c.num_attention_heads),
        kv_heads=getattr(c, "num_key_value_heads", None),
        positions=int(c.max_position_embeddings) if config.model_type in ("gpt2", "opt") else 0,
        tied=bool(config.tie_word_embeddings),
        head_width=getattr(c, "head_dim", None),
    )
    return replace(shape, gated=_gated(c, shape))


def _gated(config: Any, shape: Shape) -> bool:
    """Whether a block's matrices, counted in the model's own blocks without weights, are three in the MLP.

    Activations do not say it: Gemma's gate has a tanh GELU, as GPT-2's MLP without a gate.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError, ImportError):  # no causal language model by itself
        return getattr(config, "hidden_act", None) in ("silu", "swiglu")
    outside = (shape.vocabulary, shape.positions)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p.shape[0] not in outside)
    return bool(matrices / shape.layers - shape.attention > 2.5 * shape.width * shape.mlp)


def configuration(shape: Shape) -> Any:
    """The transformers configuration of a shape: `shape_of` the other way round, for checks without the model."""
    from transformers import AutoConfig

    config: Any = AutoConfig.for_model(shape.type)
    sizes = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }
    for name, value in sizes.items():
        setattr(config, name, value)
    setattr(
        config, next(n for n in ("intermediate_size", "n_inner", "ffn_hidden_size") if hasattr(config, n)), shape.mlp
    )
    if vars(config).get("head_dim"):
        config.head_dim = shape.head_width or shape.width // shape.heads
    if shape.positions:
        config.max_position_embeddings = shape.positions
    return config


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory of one stage, GiB, by what it is for; `total` is what must be there at once."""

    stage: str  # prepare, edit, tune
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        unit, each, digits = ("GiB", 1, 1) if self.total >= 1 else ("MiB", 1024, 0)
        parts = {name: f"{value * each:.{digits}f}" for name, value in self.parts.items()}
        told = ", ".join(f"{name} {text}" for name, text in parts.items() if float(text))
        return f"{self.stage}: {self.total * each:.{digits}f} {unit}" + (f" ({told})" if told else "")


def activations(shape: Shape, batch: int, length: int, bytes_each: int, *, checkpointing: bool = False) -> float:
    """Bytes that a backward pass keeps, besides the head's.

    A block keeps about 10 residual-wide vectors a token (inputs of norms and projections, queries, keys, values, sums;
    float32 under bf16 autocast too), 4 MLP-wide ones (5 with GPT-2's composed GELU) and no attention matrix
    (scaled-dot-product kernels recompute it; on a CPU not those with dropout). With checkpointing a block keeps its
    input, and one block at a time all of that. As counted by saved-tensor hooks on gpt2, llama, qwen2 and mistral;
    falcon, gptj and gpt_neox keep less.
    """
    tokens = batch * length
    inside = tokens * (10 * shape.width * FLOAT + (5 if shape.type == "gpt2" else 4) * shape.mlp * bytes_each)
    return shape.layers * tokens * shape.width * FLOAT + inside if checkpointing else shape.layers * inside


def head(shape: Shape, tokens: int, bytes_each: int, *, fused: bool = True, cpu: bool = False) -> float:
    """Bytes of the logits of so many tokens and of what their loss takes.

    fused: by trl's head, in tiles; else whole, in float32: logits, their log-softmax and the gradient.
    """
    if not fused:
        return 3 * tokens * shape.vocabulary * FLOAT
    tile = min(tokens, TILE[0]) * min(shape.vocabulary, TILE[1])
    return tile * (TILES_ON_CPU * FLOAT if cpu else bytes_each)


def prepare(shape: Shape, tokens_per_batch: int = 2048, logits: int = 2048 * 8192) -> Need:
    """Reading a model: its weights in float32, one block's work on a batch, the logits that are read at once (numbers).

    Logits count three times: with their log-softmax, and what is taken out of it.
    """
    inside = tokens_per_batch * (10 * shape.width + 4 * shape.mlp)
    return Need(
        stage="prepare",
        parts={
            "weights": shape.parameters * FLOAT / GIB,
            "activations": inside * FLOAT / GIB,
            "logits": 3 * logits * FLOAT / GIB,
        },
    )


def edit(
    shape: Shape,
    *,
    layers: int = 1,
    covariance: bool = True,
    trained: int = 0,
    batch: int = 64,
    length: int = 32,
) -> Need:
    """Writing edits: weights, the sums of keys' products of each layer in float64, and what is trained.

    While a layer's covariance is factored there are three more matrices of its size (its float32, a copy, the factor).

    trained: numbers that the editor trains by AdamW (0: v* alone); they have float32 gradients and two moments, and a
    copy of what they were.
    """
    keys = max(2 * layers, 5) * shape.mlp**2 * FLOAT if covariance else 0
    return Need(
        stage="edit",
        parts={
            "weights": shape.parameters * FLOAT / GIB,
            "covariance": keys / GIB,
            "optimizer": 4 * trained * FLOAT / GIB,
            "activations": activations(shape, batch, length, FLOAT) / GIB,
            "logits": head(shape, batch * length, FLOAT, fused=False) / GIB,
        },
    )


def token_bytes(blocks: int, width: int, mlp: int, vocabulary: int) -> int:
    """Bytes that a token takes in the search for v*, while gradients run through so many blocks of these widths."""
    return 4 * (blocks * (10 * width + 6 * mlp) + vocabulary)


def fixed_tokens(weights: int, each: int, *, accelerator: bool) -> int:
    """Tokens of whole rows that v* is sought for at once, in a model of so many weights, at `each` bytes a token.

    They take as much memory as the weights, at least 4 GiB: the same on every machine, whatever is free.
    """
    tokens = max(1, max(4 * weights, LEAST_BUDGET) // each)
    return tokens if accelerator else min(tokens, CPU_TOKENS)


def lora_numbers(shape: Shape, rank: int, targets: str = "all") -> int:
    """Numbers in LoRA factors on every block's mlp, attention, or all matrices."""
    head = shape.head_width or shape.width // shape.heads
    queries, values = head * shape.heads, head * (shape.kv_heads or shape.heads)
    attention = rank * (2 * (shape.width + queries) + 2 * (shape.width + values))
    mlp = rank * (3 if shape.gated else 2) * (shape.width + shape.mlp)
    return shape.layers * ({"mlp": mlp, "attention": attention, "all": mlp + attention}[targets])


def tune(
    shape: Shape,
    *,
    batch: int,
    length: int,
    trainable: int | None = None,
    adapter: bool = False,
    dtype: str = "float32",
    checkpointing: bool = False,
    optimizer_bytes: int = 8,
    models: float = 1,
    fused: bool = True,
    cpu: bool = False,
    shards: int = 1,
) -> Need:
    """A fine-tune: float32 masters, gradients, the optimizer's states, activations. Of one device.

    trainable: numbers that move; None: all. adapter: they are not the model's own. dtype: of the forward pass (bf16
    autocast keeps float32 masters).
    optimizer_bytes: a number's states: 8 for AdamW, 2 for its 8-bit form. models: weights held at once (2 with a
    reference model, a teacher, or what a mitigation keeps). fused, cpu: see `head`. shards: devices that share weights,
    gradients and states among them (FSDP); each has its own batch.
    """
    moving = shape.parameters if trainable is None else trainable
    extra = moving if adapter else 0  # its numbers come on top
    return Need(
        stage="tune",
        parts={
            "weights": (models * shape.parameters + extra) * FLOAT / GIB / shards,
            "gradients": moving * FLOAT / GIB / shards,
            "optimizer": moving * optimizer_bytes / GIB / shards,
            "activations": activations(shape, batch, length, BYTES[dtype], checkpointing=checkpointing) / GIB,
            "logits": head(shape, batch * length, BYTES[dtype], fused=fused, cpu=cpu) / GIB,
        },
    )


def multiplied(shape: Shape) -> int:
    """Numbers that each token is multiplied with: embedding look-ups cost nothing, the head does."""
    return shape.layers * shape.block + shape.vocabulary * shape.width


def flops(shape: Shape, tokens_trained: float, *, adapter: bool = False, checkpointing: bool = False) -> float:
    """Operations of training on so many tokens, 2 a number forward, and twice that backward.

    With an adapter the backward pass forms no gradient of the weights; with checkpointing the forward pass runs twice.
    """
    return (4.0 if adapter else 6.0) * (4 / 3 if checkpointing else 1) * multiplied(shape) * tokens_trained


def advice(needs: Sequence[Need], available: float) -> str | None:
    """What to change where a stage needs more than `available` GiB; None where all fit."""
    worst = max(needs, key=lambda need: need.total)
    if worst.total <= available:
        return None
    largest = max(worst.parts, key=lambda part: worst.parts[part])
    change = {
        "activations": "a smaller tune.trainer.per_device_train_batch_size with gradient_accumulation_steps, a shorter "
        "max_length, or activation_checkpointing: true",
        "optimizer": "tune.trainer.optim: adamw_8bit, an adapter (adapter: lora), or several devices (launch: "
        "{accelerate_config: fsdp2})",
        "gradients": "an adapter (adapter: lora), or freezing (mitigations: [freeze])",
        "covariance": "fewer layers of the editor",
        "logits": "a smaller tokens_per_batch of the probes"
        if worst.stage == "prepare"
        else "a smaller tune.trainer.per_device_train_batch_size",
        "weights to read": "a smaller model, or a larger device: each holds the whole of it to read it",
        "weights": "a smaller model, or a larger device",
    }[largest]
    return (
        f"{worst} does not fit into {available:.1f} GiB; most is for {largest}: "
        f"{change}"
    )  # fmt: skip
