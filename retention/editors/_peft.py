"""peft adapters on and off a model: which modules, which configuration, and the adapter as a change of weights.

Knows no editor and no training. An adapter wraps modules in place; leaving `adapted` puts every module back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retention.adapters import MIXTURE, Adapter
from retention.models import anatomy, is_transposed
from retention.types import Delta, LowRank, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def target_modules(model: PreTrainedModel, targets: str | Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """Full names of the matrices meant by `mlp`, `attention`, `all` or a list of names, in the given blocks.

    Raises UserError for a block out of range and for a name that no matrix of these blocks has.
    """
    places = anatomy(model)
    groups = {
        "mlp": places.mlp_projections,
        "attention": places.attention_projections,
        "all": (*places.attention_projections, *places.mlp_projections),
    }
    chosen = range(places.layers) if layers is None else [places.check(layer) for layer in layers]
    every = [f"{places.block.format(layer)}.{name}" for layer in chosen for name in groups["all"]]
    if isinstance(targets, str):
        if not groups[targets]:
            raise UserError(f"targets: {MIXTURE}")
        return [f"{places.block.format(layer)}.{name}" for layer in chosen for name in groups[targets]]
    leaves = sorted({name.rpartition(".")[2] for name in every})
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in every):
            near = get_close_matches(target, leaves, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(leaves)}"
            raise UserError(f"targets: the chosen blocks have no matrix {target!r}; {hint}")
    return [name for name in every if any(name == target or name.endswith("." + target) for target in targets)]


def peft_config(
    model: PreTrainedModel,
    modules: Sequence[str],
    method: str,
    rank: int,
    alpha: float,
    dropout: float,
    options: dict[str, Any],
) -> Any:
    """peft's configuration of a method by its name, rank and scale under the names that the method has for them."""
    known = Adapter(name=method, targets="all")
    allowed = known.peft_fields()
    if "target_modules" not in allowed:
        raise UserError(f"method: {method!r} does not adapt weight matrices; use lora, dora or another that does")
    settings: dict[str, Any] = {"target_modules": list(modules), "r": rank}
    settings["fan_in_fan_out"] = is_transposed(model.get_submodule(modules[0]))
    if "lora_alpha" in allowed:
        settings |= {"lora_alpha": alpha, "lora_dropout": dropout}
    elif "alpha" in allowed:
        settings["alpha"] = alpha
    if method == "dora":
        settings["use_dora"] = True
    settings = {name: value for name, value in settings.items() if name in allowed}
    try:
        return known.config_class()(**(settings | options))
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"method: peft refuses {method} with these settings: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A model with an adapter in it."""

    model: Any  # the peft model
    original: dict[str, Tensor]  # parameter name -> value without the adapter (some methods move the base weights)


@contextmanager
def adapted(model: PreTrainedModel, config: Any) -> Iterator[Adapted]:
    """The model with a trainable adapter in it; on leaving, its modules and weights are those it had."""
    from peft import get_peft_model

    original = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if any(name.startswith(target + ".") for target in config.target_modules)
    }
    children = [(module, dict(module._modules), set(vars(module))) for module in model.modules()]
    adapter: Any = None
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks for a property by a name that transformers 5.23 has replaced
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            try:
                adapter = get_peft_model(model, config)
            except (ValueError, TypeError, ImportError, NotImplementedError) as error:
                raise UserError(f"peft refuses this adapter on this model: {error}") from error
        for _, layer in _tuner_layers(adapter):  # the adapter's dropout only; the model's own stays off
            for name, module in layer.named_modules():
                module.training = not name.startswith("base_layer")
        yield Adapted(model=adapter, original=original)
    finally:
        if adapter is not None:
            adapter.unload()
        for module, own, attributes in children:  # also where peft failed half-way
            module._modules.clear()
            module._modules.update(own)
            for attribute in set(vars(module)) - attributes:
                delattr(module, attribute)
        with torch.no_grad():
            for name, value in original.items():
                model.get_parameter(name).copy_(value)


def _tuner_layers(adapter: Any) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    prefix = "base_model.model."
    return [
        (name.removeprefix(prefix), module)
        for name, module in adapter.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


@torch.no_grad()
def merged_update(adapter: Adapted, *, plain: bool) -> Delta:
    """The trained adapter as a change of the base model's parameters, float32, each in its parameter's own layout.

    `plain` LoRA gives its factors. Any other method is merged into float32 weights and the difference taken; the model
    is then left merged. Raises UserError for a method that peft cannot merge.
    """
    updates: dict[str, Tensor | LowRank] = {}
    for name, layer in _tuner_layers(adapter.model):
        if plain:
            down = layer.lora_A["default"].weight.float() * layer.scaling["default"]  # [r, in]
            up = layer.lora_B["default"].weight.float()  # [out, r]
            factors = (down.T, up.T) if layer.fan_in_fan_out else (up, down)
            updates[f"{name}.weight"] = LowRank(*(factor.detach().cpu().clone().contiguous() for factor in factors))
            continue
        base = layer.get_base_layer()
        own = {key: (parameter, parameter.data) for key, parameter in base.named_parameters(recurse=False)}
        for parameter, data in own.values():
            parameter.data = data.float().clone()
        try:
            layer.merge()
        except (NotImplementedError, AttributeError, ValueError) as error:
            raise UserError(f"method: this adapter cannot be merged into the weights: {error}") from error
        for key in own:
            change = base.get_parameter(key).detach() - adapter.original[f"{name}.{key}"].float()
            if bool((change != 0).any()):
                updates[f"{name}.{key}"] = change.cpu()
        for parameter, data in own.values():
            parameter.data = data
    return Delta(updates)
