"""Hold the weights that the edits rest on (elastic weight consolidation: Kirkpatrick et al. 2017, arXiv 1612.00796)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from retention.hooks import undisturbed
from retention.mitigations._part import Mitigation, Place, Scene
from retention.mitigations._weights import anchors, trainable
from retention.tokens import encode
from retention.types import Guard, UserError, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Ewc(Mitigation):
    """Adds weight / 2 * sum of F (w - w_edited)^2 to the loss.

    F is the diagonal of the empirical Fisher matrix of the edited model at the edits: the mean, over the prompts that
    they are written with, of the squared gradient of log p(new object | prompt), in nats. (The paper's answers are the
    old task's labels too.) An adapter's parameters are held where they start, by an F taken there; LoRA starts with
    B = 0, so that its A has no gradient there and is not held. What it costs: a backward pass per prompt once, two
    copies of what is trained and a pass over them per micro-batch.
    """

    acts_on: ClassVar[Place] = "training"
    copies: ClassVar[float] = 2

    name: Literal["ewc"] = "ewc"
    weight: float = Field(gt=0, description="lambda of the paper")

    def guard(self, model: PreTrainedModel, scene: Scene) -> Guard:
        return _Elastic(self, model, scene)


class _Elastic(Guard):
    def __init__(self, settings: Ewc, model: PreTrainedModel, scene: Scene) -> None:
        self.settings, self.model, self.scene = settings, model, scene
        self.start = anchors(model, scene)
        moving = trainable(model, scene)
        kept = scene.memory.setdefault("fisher", {})
        missing = {name: p for name, p in moving.items() if name not in kept}
        found = fisher(model, missing, scene) if missing else {}
        kept.update({name: f for name, f in found.items() if name in scene.names})
        self.fisher = {name: found[name] if name in found else kept[name] for name in moving}
        self.moving: dict[str, torch.nn.Parameter] | None = None  # known once frozen parameters are

    def penalty(self) -> Tensor | None:
        """Half the weighted, F-weighted squared distance, a float32 scalar; None where nothing is trained."""
        if self.moving is None:
            self.moving = trainable(self.model, self.scene)
        parts = [
            (self.fisher[name].to(p.device) * (p.float() - self.start[name].to(p.device).float()).square()).sum()
            for name, p in self.moving.items()
        ]
        if not parts:
            return None
        return self.settings.weight / 2 * torch.stack([part.to(parts[0].device) for part in parts]).sum()


def fisher(model: PreTrainedModel, parameters: dict[str, torch.nn.Parameter], scene: Scene) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher matrix at the edits' statements, float32, by parameter name.

    The model is left as it was, its gradients included. Raises UserError if a target has no token.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    statements = [(edit, prompt) for edit in scene.edits for prompt in edit.prompts]
    device = next(model.parameters()).device
    with undisturbed(model):
        for p in parameters.values():
            p.requires_grad_(True)
        for edit, prompt in statements:
            text = encode(scene.tokenizer, fill(prompt, edit.fact.subject), edit.target, joint=edit.fact.joint)
            if text.answer_start >= len(text.ids):
                raise UserError(f"the target {edit.target!r} of {edit.fact.id} has no token")
            ids = torch.tensor([text.ids], device=device)
            with torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, text.answer_start - 1 : -1]
                answer = ids[0, text.answer_start :]
                logp = logits.float().log_softmax(-1).gather(1, answer[:, None]).sum()
                gradients = torch.autograd.grad(logp, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.float().square() / len(statements)
    return total
