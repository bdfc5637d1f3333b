"""Sampled prefixes: what stands before their first word is what the tokenizer puts there."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tokenizers import processors

from retention.editors._contexts import opening, sample_prefixes


def closing() -> Any:
    """A tokenizer that puts its special token behind a text only."""
    found = tiny.tokenizer(bos=False)
    template = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    found.backend_tokenizer.post_processor = template
    return found


@pytest.mark.parametrize(
    ("tokenizer", "before"),
    [(tiny.tokenizer(bos=True), [1]), (tiny.tokenizer(bos=False), []), (closing(), [])],
    ids=["bos", "a BOS token that is put nowhere", "eos"],
)
def test_prefixes_begin_as_the_tokenizer_begins_a_text(tiny_model: Any, tokenizer: Any, before: list[int]) -> None:
    """All three tokenizers name a BOS token; a model whose tokenizer does not put it there has never read it so."""
    assert tokenizer.bos_token_id == 1
    model = tiny_model("llama").model
    first: list[list[int]] = []

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        first.append(given["input_ids"][0].tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        found = sample_prefixes(model, tokenizer, (4,), seed=0)
    finally:
        handle.remove()
    assert opening(tokenizer) == before
    assert first[0] == [*before, tokenizer.convert_tokens_to_ids("The")]
    # The same by hand: four tokens, the first given, the others drawn from the five most probable.
    ids, generator = [*before, first[0][-1]], torch.Generator().manual_seed(0)
    banned = [i for i in range(model.config.vocab_size) if i in tokenizer.all_special_ids or i >= len(tokenizer)]
    for _ in range(3):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        logits[banned] = -torch.inf
        values, tokens = logits.topk(5)
        ids.append(int(tokens[torch.multinomial(values.softmax(-1), 1, generator=generator)]))
    assert found == (f"{tokenizer.decode(ids[len(before) :])}. ",)
