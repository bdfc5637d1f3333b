"""Keep the model's predictions near the edited model's on general text (learning without forgetting: Li and Hoiem 2016,
arXiv 1606.09282, with text in place of the new task's inputs)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from retention.hooks import undisturbed
from retention.mitigations._part import Mitigation, Place, Scene
from retention.tokens import encode
from retention.types import Guard, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Kl(Mitigation):
    """Adds weight * mean over tokens of KL(edited || current), in nats, to the loss of each micro-batch.

    On the first `tokens` tokens of `n` lines of the corpus drawn by seed, `batch` of them at a time in a fixed
    rotation; without dropout, as the edited model was read. What it costs: a forward and backward pass over `batch`
    texts per micro-batch, and n * tokens * vocabulary floats of memory.
    """

    acts_on: ClassVar[Place] = "training"

    name: Literal["kl"] = "kl"
    weight: float = Field(1.0, gt=0, description="of the mean KL divergence in nats")
    n: int = Field(64, ge=1, description="texts")
    tokens: int = Field(32, ge=1, description="that are read of each text at most")
    batch: int = Field(4, ge=1, description="texts a micro-batch")

    @property
    def needs_corpus(self) -> bool:
        """It reads the corpus."""
        return True

    def guard(self, model: PreTrainedModel, scene: Scene) -> Guard:
        return _Near(self, model, scene)


class _Near(Guard):
    def __init__(self, settings: Kl, model: PreTrainedModel, scene: Scene) -> None:
        self.settings, self.model, self.turn = settings, model, 0
        if "kl" not in scene.memory:
            texts = _texts(settings, scene)
            with undisturbed(model), torch.no_grad():
                found = [_log_probabilities(model, [text]).cpu() for text in texts]
            scene.memory["kl"] = texts, found
        self.texts, self.kept = scene.memory["kl"]

    def penalty(self) -> Tensor:
        """The divergence on the next texts, a float32 scalar."""
        chosen = [(self.turn + i) % len(self.texts) for i in range(min(self.settings.batch, len(self.texts)))]
        self.turn = (self.turn + len(chosen)) % len(self.texts)
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            now = _log_probabilities(self.model, [self.texts[i] for i in chosen])
        finally:
            for module, mode in training.items():
                module.training = mode
        before = torch.cat([self.kept[i] for i in chosen]).to(now.device)
        return self.settings.weight * (before.exp() * (before - now)).sum(-1).mean()

    def state(self) -> int:
        return self.turn

    def resume(self, state: int) -> None:
        self.turn = state


def _texts(settings: Kl, scene: Scene) -> list[tuple[int, ...]]:
    """Token ids of the texts, drawn by seed. Raises UserError where there is none."""
    lines = [line for line in scene.corpus if line.strip()]
    if not lines:
        raise UserError(
            "mitigations: kl: there is no text to keep the predictions on, and the model brings no corpus.txt: give "
            "`corpus: texts.txt` to the study"
        )
    drawn = random.Random(f"kl {scene.seed}").sample(lines, min(settings.n, len(lines)))
    return [encode(scene.tokenizer, line).ids[: settings.tokens] for line in drawn]


def _log_probabilities(model: PreTrainedModel, texts: list[tuple[int, ...]]) -> Tensor:
    """Of the next token at every token of every text, one text after another [tokens, vocabulary], float32."""
    device = next(model.parameters()).device
    width = max(len(text) for text in texts)
    ids = torch.tensor([text + text[-1:] * (width - len(text)) for text in texts], device=device)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    real = torch.arange(width, device=device) < lengths[:, None]
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    return logits[real].float().log_softmax(-1)
