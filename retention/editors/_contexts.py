"""Prefixes that an edit is written after, so that it holds in running text: sampled from the model, by seed.

Knows nothing about facts. Nothing is kept between calls: equal model, seed and lengths give equal prefixes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retention.hooks import cache_argument, cache_of
from retention.models import max_positions
from retention.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

STARTS = ("The", "Therefore", "Because", "I", "You")  # as in MEMIT (Meng et al. 2023) and EasyEdit
TOP_K = 5  # as published


def knows(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """Whether the tokenizer can write the text without its unknown token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and (tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids)


def opening(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The special tokens that the tokenizer puts before a text: none for a tokenizer that only has a BOS token."""
    found = tokenizer(STARTS[0], return_special_tokens_mask=True)
    special = found["special_tokens_mask"]
    return list(found["input_ids"][: special.index(0) if 0 in special else 0])


@torch.no_grad()
def sample_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lengths: Sequence[int], seed: int
) -> tuple[str, ...]:
    """One prefix for each entry of `lengths` (its length in tokens), to be put before a prompt as it stands.

    Top-5 sampling after The, Therefore, Because, I, You in turn, where the vocabulary has them, and else after the
    beginning of a text. What stands before a text's first word is what the tokenizer puts there: a BOS token for some
    models, nothing for others. Each prefix has a generator of its own: one more prefix leaves the others as they were.
    """
    limit = max_positions(model)
    if limit is not None and max(lengths, default=0) >= limit:
        raise UserError(f"context_lengths: a prefix of {max(lengths)} tokens; the model has {limit} positions")
    starts = [start for start in STARTS if knows(tokenizer, start)] or [""]
    head = opening(tokenizer)
    if not head and starts == [""]:
        head = [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0]
    rows: list[list[int]] = []
    for index in range(len(lengths)):
        word = starts[index % len(starts)]
        rows.append(head + (list(tokenizer(word, add_special_tokens=False)["input_ids"]) if word else []))
    # Special tokens end or break a text; numbers beyond the tokenizer's are padding of the vocabulary.
    width = model.config.get_text_config().vocab_size
    banned = torch.tensor(sorted({*tokenizer.all_special_ids, *range(len(tokenizer), width)}), device=model.device)
    generators = [torch.Generator().manual_seed(_own_seed(seed, index)) for index in range(len(lengths))]
    groups: dict[int, list[int]] = defaultdict(list)  # rows of equal start length run together, without padding
    for index, row in enumerate(rows):
        groups[len(row)].append(index)
    for members in groups.values():
        cache: Any = None
        ids = torch.tensor([rows[i] for i in members], device=model.device)
        for _ in range(max(len(head) + lengths[i] - len(rows[i]) for i in members)):
            out = model(input_ids=ids, use_cache=True, **cache_argument(cache))
            cache = cache_of(out)
            ids = _sample(out.logits[:, -1].float(), banned, [generators[i] for i in members])
            for i, token in zip(members, ids[:, 0].tolist(), strict=True):
                if len(rows[i]) < len(head) + lengths[i]:
                    rows[i].append(token)
    stop = ". " if knows(tokenizer, ".") else " "
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]
    return tuple(text + stop for text in texts if text)


def _sample(logits: Tensor, banned: Tensor, generators: list[torch.Generator]) -> Tensor:
    logits[:, banned] = -torch.inf
    values, tokens = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    weights = values.softmax(-1).cpu()
    picks = [torch.multinomial(w, 1, generator=g) for w, g in zip(weights, generators, strict=True)]
    return tokens.gather(1, torch.stack(picks).to(tokens.device))


def _own_seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % 2**63
