"""The pretraining loop: sentences to batches, Muon for hidden matrices, AdamW for the rest. One thread, bit-identical.

Knows no facts and no files. Muon: K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retention.texts import Joint
from retention.world.muon import Muon
from retention.world.settings import Recipe

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Progress = Callable[[int, int], None]  # (steps done, steps in all)
_WINDOW = 64  # batches whose documents are sorted by length together
IGNORE = -100


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, and leave thread count and global RNG as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def architecture(recipe: Recipe, vocabulary: int, **special: Any) -> LlamaConfig:
    """The recipe's model as a configuration. special: ids of special tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        # Downstream rows and generation may be longer than the rows of pretraining; rotary positions carry no weights.
        max_position_embeddings=4 * recipe.context,
        initializer_range=recipe.init_std,
        tie_word_embeddings=True,
        **special,
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model of the recipe's size, drawn with its seed."""
    from transformers import LlamaForCausalLM

    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = architecture(recipe, len(tokenizer), **special)
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def documents(sentences: Sequence[Sequence[int]], recipe: Recipe, bos: int, eos: int) -> list[list[int]]:
    """<bos> sentence ... <eos>, of one sentence up to as many as the context takes, cut only where one is too long."""
    rng = random.Random(f"documents {recipe.seed}")
    found: list[list[int]] = []
    current, room = [bos], 0
    for ids in sentences:
        if len(current) > 1 and len(current) + len(ids) + 1 > room:
            found.append([*current, eos])
            current = [bos]
        if len(current) == 1:
            room = rng.randint(0, recipe.context)
        current.extend(ids[: recipe.context - 2])
    if len(current) > 1:
        found.append([*current, eos])
    return found


def batches(rows: Sequence[list[int]], recipe: Recipe, pad: int) -> list[Tensor]:
    """Right-padded batches of at most recipe.rows * recipe.context tokens, of documents alike in length."""
    budget = recipe.rows * recipe.context
    rng = random.Random(f"batches {recipe.seed}")
    found: list[Tensor] = []
    window: list[list[int]] = []

    def flush() -> None:
        window.sort(key=len)
        groups: list[list[list[int]]] = [[]]
        for row in window:
            if groups[-1] and (len(groups[-1]) + 1) * len(row) > budget:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            longest = max(map(len, group))
            found.append(torch.tensor([row + [pad] * (longest - len(row)) for row in group]))
        window.clear()

    tokens = 0
    for row in rows:
        window.append(row)
        tokens += len(row)
        if tokens >= _WINDOW * budget:
            flush()
            tokens = 0
    if window:
        flush()
    return found


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    hidden = {id(p) for p in matrices}
    vectors = [p for p in model.parameters() if id(p) not in hidden]
    return [
        Muon(
            matrices, lr=recipe.matrix_lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay,
            dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
        ),
        torch.optim.AdamW(vectors, lr=recipe.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]  # fmt: skip


def scheduled(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: a linear rise, then half a cosine to 0."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def train(
    model: LlamaForCausalLM, data: Sequence[Tensor], recipe: Recipe, pad: int, progress: Progress | None = None
) -> float:
    """One pass over the batches, in place. Returns the mean loss of the last tenth, in nats a token."""
    steppers = optimizers(model, recipe)
    peaks = [stepper.param_groups[0]["lr"] for stepper in steppers]
    model.train()
    # On short rows, on a CPU, the plain formula's backward pass takes half the time of the fused kernel's.
    model.set_attn_implementation("eager")
    losses = []
    for step, ids in enumerate(data):
        factor = scheduled(step, len(data), recipe.warmup)
        for stepper, peak in zip(steppers, peaks, strict=True):
            stepper.param_groups[0]["lr"] = peak * factor
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == pad, IGNORE)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bf16):
            # Padding is on the right, where causal attention never looks back from a label: no mask needed.
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, len(data))
    model.eval()
    model.set_attn_implementation("sdpa")
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


@torch.inference_mode()
def recall(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[tuple[str, str, Joint | None]],
    rows: int = 256,
) -> list[bool]:
    """Whether every token of each answer is the argmax, given its prompt and the tokens before it (greedy, float32).

    prompts: text, answer and what parts them.
    """
    from retention.tokens import encode

    model.eval()
    encoded = [encode(tokenizer, prompt, answer, joint=joint) for prompt, answer, joint in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    right = [False] * len(encoded)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        longest = len(encoded[chosen[-1]].ids)
        pad = int(tokenizer.pad_token_id or 0)
        ids = torch.tensor([[*encoded[i].ids, *[pad] * (longest - len(encoded[i].ids))] for i in chosen])
        best = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        for row, i in enumerate(chosen):
            places = slice(encoded[i].answer_start, len(encoded[i].ids))
            answer = ids[row, places]
            right[i] = bool((best[row, encoded[i].answer_start - 1 : len(encoded[i].ids) - 1] == answer).all())
    return right
