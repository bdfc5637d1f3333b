"""Undo what trainers change besides weights: attributes of modules, the tokenizer, torch's switches, the environment.

A list of fine-tunes trains one model, and each of them must find it as it would find a model that was just loaded.
Knows no trainer by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Attributes of a module that training is meant to change: weights, adapters, train mode.
TRAINED = ("_parameters", "_buffers", "_modules", "training")
OF_TOKENIZER = ("padding_side", "truncation_side", "chat_template", "pad_token", "eos_token", "bos_token", "unk_token")
# Variables of the environment by which one trainer's arguments would reach the next trainer.
VARIABLES = (
    "ACCELERATE_", "FSDP_", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC",
    "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
)  # fmt: skip


@contextmanager
def model_as_before(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Restore every attribute of the modules, the configs and the tokenizer on leaving.

    Weights, buffers, submodules and train mode stay as they are then. Accelerate marks a model that it has prepared and
    never prepares it again: without this, mixed precision is lost from the second trainer of a model on.
    """
    modules = {module: _attributes(module) for module in model.modules()}
    configs = [(config, dict(vars(config))) for config in _configs(model)]
    words = {name: getattr(tokenizer, name) for name in OF_TOKENIZER}
    try:
        yield
    finally:
        for module, before in modules.items():
            _put_back(module, before)
        for config, values in configs:
            vars(config).clear()
            vars(config).update(values)
        for name, value in words.items():
            if getattr(tokenizer, name) != value:
                setattr(tokenizer, name, value)


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    """A module's own attributes; of its tables of hooks, which change in place, copies.

    Buffers that are computed, not loaded, belong to them: rotary tables that grow with the texts note how far they go.
    """
    computed = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
    return {"computed": computed} | {
        name: value.copy() if name.endswith("_hooks") and isinstance(value, dict) else value
        for name, value in vars(module).items()
        if name not in TRAINED
    }


def _put_back(module: torch.nn.Module, before: Mapping[str, Any]) -> None:
    now, before = vars(module), dict(before)
    for name, buffer in before.pop("computed").items():
        other = module._buffers.get(name)
        if buffer is not None and other is not None and (buffer.device, buffer.dtype) == (other.device, other.dtype):
            module._buffers[name] = buffer
    for name in [name for name in now if name not in before and name not in TRAINED]:
        del now[name]
    for name, value in before.items():
        if name.endswith("_hooks") and isinstance(value, dict):  # handles hold on to the table itself
            if now[name] != value:
                now[name].clear()
                now[name].update(value)
        elif now.get(name) is not value:
            now[name] = value


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration object of the model, each once: its own, its text model's, that of generation."""
    found = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    return list({id(config): config for config in found if config is not None}.values())


def switches() -> dict[str, Any]:
    """Read torch's global switches that move numbers, and the environment's variables of trainers."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "float32": torch.backends.fp32_precision,  # type: ignore[attr-defined]
        "environment": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
    }


def switch(to: Mapping[str, Any]) -> None:
    """Set the switches as `switches` has read them."""
    now = switches()
    if now["deterministic"] != to["deterministic"]:
        torch.use_deterministic_algorithms(to["deterministic"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = to["cudnn"]
    if now["float32"] != to["float32"]:  # a setting of a single backend is overwritten by the one for all
        torch.backends.fp32_precision = to["float32"]  # type: ignore[attr-defined]
    for name in now["environment"].keys() - to["environment"].keys():
        del os.environ[name]
    os.environ.update(to["environment"])


@contextmanager
def switches_as_before() -> Iterator[None]:
    """Restore the switches on leaving. Serves as a decorator too."""
    before = switches()
    try:
        yield
    finally:
        switch(before)


@contextmanager
def switched(to: Mapping[str, Any]) -> Iterator[None]:
    """Set the switches inside, and as they were on leaving."""
    with switches_as_before():
        switch(to)
        yield
