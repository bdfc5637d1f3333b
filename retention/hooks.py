"""Read, replace and replay single modules of a running model.

Knows nothing about facts, edits or tokens, and no architecture by name. A block's recorded call (everything that the
model hands it beside the hidden states: masks, positions, rotary tables, cache) can be replayed on other hidden states:
this is how work starts at an inner layer for any architecture, without a copy of its forward.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn


class StopForward(Exception):
    """Ends a forward pass early; raised by a hook, caught by `stopped`."""


@contextmanager
def stopped() -> Iterator[None]:
    """Run a forward pass that a hook may end early."""
    try:
        yield
    except StopForward:
        return


def first(output: Any) -> Tensor:
    """The hidden states in a block's output, which some architectures return within a tuple or a list."""
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def on_input(module: nn.Module, act: Callable[[Tensor], None], *, stop: bool = False) -> Iterator[None]:
    """Call `act` with the module's first argument; with `stop`, end the forward there."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        act(args[0] if args else kwargs["hidden_states"])
        if stop:
            raise StopForward

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, act: Callable[[Tensor], Tensor | None], *, stop: bool = False) -> Iterator[None]:
    """Call `act` with the module's output; what it returns, unless None, takes the output's place."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = act(first(output))
        if stop:
            raise StopForward
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, (tuple, list)) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@lru_cache(maxsize=1)
def _cache_name() -> str:
    """What models call their cache of keys and values: transformers 5.24 has renamed it, 5.40 drops the old name."""
    release = Version(importlib.metadata.version("transformers")).release
    return "cache" if release >= (5, 24) else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a model its cache; none without one."""
    return {} if cache is None else {_cache_name(): cache}


@contextmanager
def old_cache_name() -> Iterator[None]:
    """Without the warning that peft 0.21 hands its learned prefix over by the name that 5.24 has replaced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
        yield


def cache_of(output: Any) -> Any:
    """The cache in a model's output. Raises AttributeError for an architecture that keeps none."""
    return getattr(output, _cache_name())


@contextmanager
def only_at(module: nn.Module, places: Tensor) -> Iterator[None]:
    """Run a module that treats each place by itself (an MLP) at some places only; elsewhere its output is 0.

    places: [rows, tokens] bool, of an input [rows, tokens, width] or [rows * tokens, width].
    """

    shape: Sequence[int] = ()

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal shape
        shape = args[0].shape[:-1]
        return (args[0][places.view(shape)], *args[1:])

    def scatter(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        whole = output.new_zeros(places.numel(), output.shape[-1])
        whole[places.flatten()] = output
        return whole.view(*shape, -1)

    handles = [module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class BlockCalls:
    """The arguments with which a model called its blocks, hidden states left out. Replay them on other states."""

    blocks: Sequence[nn.Module]
    args: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # layer -> positional arguments after the first
    kwargs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def run(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Hidden states [rows, tokens, d] at the input of block `start`, taken through blocks start .. stop - 1."""
        for layer in range(start, stop):
            hidden = first(self.blocks[layer](hidden, *self.args[layer], **self.kwargs[layer]))
        return hidden

    def keep(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Note one block's call; returns the hidden states that were among its arguments."""
        others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        self.args[layer], self.kwargs[layer] = tuple(args[1:]), others
        return args[0] if args else kwargs["hidden_states"]


@contextmanager
def recording(blocks: Sequence[nn.Module]) -> Iterator[BlockCalls]:
    """Note how the model calls its blocks while it runs as usual."""
    calls = BlockCalls(blocks)
    handles = []
    for layer, block in enumerate(blocks):

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
            calls.keep(layer, args, kwargs)

        handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def dry_run(blocks: Sequence[nn.Module], *, tuples: bool) -> Iterator[BlockCalls]:
    """Note how the model calls its blocks while every block hands its input through: no work is done in them.

    tuples: whether this architecture's blocks return a tuple that the model takes the first entry of.
    """
    calls = BlockCalls(blocks)
    for layer, block in enumerate(blocks):

        def stub(*args: Any, layer: int = layer, **kwargs: Any) -> Any:
            hidden = calls.keep(layer, args, kwargs)
            return (hidden, None) if tuples else hidden

        block.forward = stub  # an instance attribute: it hides the class's forward until it is deleted
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients inside; train mode, requires_grad, use_cache and the RNG after.

    Random numbers drawn inside do not move the generators that training draws from.
    """
    training = {module: module.training for module in model.modules()}
    requires = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for parameter in requires:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            for parameter, flag in requires.items():
                parameter.requires_grad_(flag)
            if config is not None and use_cache is not None:
                config.use_cache = use_cache


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """The model as its class runs it: trainers put a forward of their own over it (half precision, a fused head)."""
    patched = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if patched is not None:
            model.__dict__["forward"] = patched
