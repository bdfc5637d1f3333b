"""A learned soft prompt before every text of a model: an edit that changes no weight.

What phase 2 and the probes need to keep such an edit while the weights below it move. Knows no editor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def prompted(model: PreTrainedModel, soft_prompt: Tensor | None) -> Iterator[Any]:
    """The model as a reader should call it: with the soft prompt before each text.

    soft_prompt: [virtual tokens, width of the embeddings]. Yields a peft model around `model`, whose weights it shares,
    or `model` itself where there is no soft prompt. Nothing of `model` is changed, its flags included.
    """
    if soft_prompt is None:
        yield model
        return
    state = torch.get_rng_state()
    with wrapped(model, len(soft_prompt), inference_mode=True) as reader:
        torch.set_rng_state(state)  # the encoder's first values are drawn, and overwritten
        encoder = reader.prompt_encoder["default"]
        with torch.no_grad():
            encoder.embedding.weight.copy_(soft_prompt)
        encoder.requires_grad_(False)
        reader.eval()
        yield reader


@contextmanager
def wrapped(model: PreTrainedModel, virtual_tokens: int, **settings: Any) -> Iterator[Any]:
    """A peft model with a prompt encoder before `model`; on leaving, flags, modes and attributes are as they were."""
    from peft import PeftModelForCausalLM, PromptEncoderConfig

    config = model.config.get_text_config()
    embeddings: Any = model.get_input_embeddings()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    attributes = set(vars(model))
    with warnings.catch_warnings():
        # peft 0.21 asks for a property by a name that transformers 5.23 has replaced
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        reader = PeftModelForCausalLM(
            model,
            PromptEncoderConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=virtual_tokens,
                num_transformer_submodules=1,
                token_dim=embeddings.weight.shape[1],
                num_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                **settings,
            ),
        )
    reader.word_embeddings = embeddings  # peft guesses them by a dimension equal to the vocabulary's
    for parameter, required in flags:
        parameter.requires_grad_(required)
    try:
        yield reader
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)
        for module, training in modes:
            module.training = training
        for attribute in set(vars(model)) - attributes:
            delattr(model, attribute)
