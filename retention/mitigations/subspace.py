"""Keep the edited matrices' answers to the edit's keys (the idea of arXiv 2509.03122: fine-tune outside a subspace)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from retention.edit_keys import edit_keys, key_basis, key_modules, output_by_input
from retention.mitigations._part import Mitigation, Place, Scene
from retention.types import Guard, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REASON = (
    "subspace keeps W k* under full fine-tuning and plain LoRA, whose A can be held off the edit's keys; {} {}. "
    "Use adapter: full or lora, or targets that leave out the edited modules"
)


class Subspace(Mitigation):
    """After each optimizer step, the fine-tune's update of every edited matrix is projected off the edit's keys.

    So W k* stays what it was in the edited model, for the keys k* that the edited model has at the subject's last token
    (edit_keys.py). Keys that training of earlier layers moves are not followed, nor is the bias held. Under LoRA on an
    edited matrix its A is projected from the start, so that B A k* = 0. The paper constrains gradients in the
    fingerprint's subspace; we project what the optimizer made of them, so that neither momentum nor weight decay can
    leave it. Parameters without keys (embeddings, norms, biases) are left to train. What it costs: r of a matrix's
    input directions for a span of rank r, and two thin products per edited matrix and step.
    """

    acts_on: ClassVar[Place] = "training"

    name: Literal["subspace"] = "subspace"

    @property
    def needs_edit(self) -> bool:
        return True

    def check(self, settings: Any) -> None:
        """Raises UserError for adapters of MLPs that can not be held off the keys."""
        for tune in settings.tunes:
            adapter = tune.adapter or settings.adapter
            problem = None if adapter.name == "full" or settings.editor.name == "identity" else _problem(adapter)
            if problem and adapter.targets in ("mlp", "all"):
                raise UserError("mitigations: " + REASON.format(*problem))

    def guard(self, model: PreTrainedModel, scene: Scene) -> Guard | None:
        return _Aside(model, scene) if scene.delta.updates else None


def _problem(adapter: Any) -> tuple[str, str] | None:
    """What is wrong with an adapter's settings: (its name, why)."""
    if adapter.name.lower() != "lora":
        return adapter.name, "is none of them"
    if adapter.settings.get("use_dora"):
        return "use_dora", "scales the whole matrix"
    if adapter.settings.get("init_lora_weights", True) not in (True, "gaussian", "orthogonal"):
        return f"init_lora_weights: {adapter.settings['init_lora_weights']}", "takes a part of the matrix into B A"
    return None


class _Aside(Guard):
    def __init__(self, model: PreTrainedModel, scene: Scene) -> None:
        modules = key_modules(model, scene.delta.updates.keys())
        if "subspace" not in scene.memory:
            keys = edit_keys(model, scene.tokenizer, scene.edits, modules.keys())
            if not keys:
                raise UserError(
                    f"mitigations: subspace: the edit changes {', '.join(scene.delta.updates)}: no matrix of an MLP or "
                    "attention, so there are no keys to hold; use another editor or mitigation"
                )
            scene.memory["subspace"] = {
                name: (basis := key_basis(found), _times(_matrix(modules[name]), basis)) for name, found in keys.items()
            }
        self.project: list[Callable[[], None]] = []
        for name, (basis, answers) in scene.memory["subspace"].items():
            adapter = _adapter_of(model, modules[name])
            if adapter is None:
                self.project.append(_hold(modules[name], basis, answers))
            else:
                self.project += [_hold_off(a.weight, basis) for a in _plain_lora(name, adapter)]
        self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        for project in self.project:
            project()


def _matrix(module: nn.Module) -> Tensor:
    """Its weight as [out, in]."""
    weight: Any = module.weight
    return output_by_input(weight, module)


def _times(matrix: Tensor, basis: Tensor) -> Tensor:
    return matrix.detach().float() @ basis


def _hold(module: nn.Module, basis: Tensor, answers: Tensor) -> Callable[[], None]:
    """Bring W basis [out, r] back to what it was, by the smallest change of W."""

    def project() -> None:
        matrix = _matrix(module)
        if matrix.requires_grad:
            matrix.copy_(matrix.float() - (_times(matrix, basis) - answers) @ basis.T)

    return project


def _hold_off(a: Tensor, basis: Tensor) -> Callable[[], None]:
    """Take the keys' directions out of A [r, in]."""

    def project() -> None:
        a.copy_(a.float() - _times(a, basis) @ basis.T)

    return project


def _adapter_of(model: PreTrainedModel, module: nn.Module) -> Any:
    """The adapter's layer around a module, or None."""
    return next((m for m in model.modules() if getattr(m, "base_layer", None) is module), None)


def _plain_lora(name: str, layer: Any) -> list[Any]:
    """The A of each LoRA in the layer. Raises UserError if its update is not B A alone, or is not zero at first."""
    factors = getattr(layer, "lora_A", None)
    if not factors or getattr(layer, "lora_variant", None):
        raise UserError("mitigations: " + REASON.format(f"the adapter of {name}", "is none of them"))
    if any(bool(b.weight.any()) for b in layer.lora_B.values()):
        raise UserError("mitigations: " + REASON.format(f"the LoRA of {name}", "is not zero at first"))
    return list(factors.values())
