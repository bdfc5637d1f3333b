"""Bfloat16 where a study asks for it: which passes take it, whether the machine has it, and the loss of a trained head.

Weights, optimizer states, sums of keys' products, solves and updates stay float32. Knows no stage and no architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Kind = Literal["float32", "bfloat16"]
WHOLE = 1 << 28  # logits in bfloat16 that are held at once; beyond, trl's tiles bound memory
CACHED = 1 << 19  # logits that are turned into float32 at once: 2 MiB, what stays in a processor's cache


class Precision(BaseModel):
    """The precision of matrix products, by stage. Sums, solves, weights and optimizer states are float32 throughout."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edit: Kind = Field("float32", description="of the search for v*; keys, covariances and updates are float32")
    train: Kind = Field("float32", description="of fine-tuning: bfloat16 sets tune.trainer.bf16 in every fine-tune")
    read: Kind = Field(
        "float32",
        description="of the probes: bfloat16 reads again in float32 what is close to a border, so that all_correct, "
        "first_correct and prefers_target are float32's; the column `precision` tells it of log-probabilities",
    )


def native() -> bool:
    """Whether the accelerator, or else this processor, multiplies bfloat16 in hardware.

    A processor that does not takes 7 to 40 times as long as with float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return on_processor()


def on_processor() -> bool:
    """The same of the processor, whatever else is there."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass
class Reading:
    """The precision of readings, and what it came to."""

    kind: Kind
    read: int = 0  # continuations that were read in bfloat16
    again: int = 0  # of these, in float32 as well

    def record(self) -> dict[str, Any]:
        """For a stage's record; nothing where all was read in float32."""
        share = self.again / self.read if self.read else None
        return {} if self.kind == "float32" else {"read": {"precision": self.kind, "share_read_again": share}}

    def __str__(self) -> str:
        return f"{self.again} of {self.read} continuations were read again in float32"


@contextmanager
def products(kind: str, model: torch.nn.Module) -> Iterator[None]:
    """Within it the model's matrix products are taken in this precision. float32 changes nothing.

    Each weight is rounded once: torch remembers that of a parameter which requires a gradient, so all do within.
    """
    if kind == "float32":
        yield
        return
    still = [p for p in model.parameters() if not p.requires_grad]
    device = next(model.parameters()).device
    try:
        for parameter in still:
            parameter.requires_grad_(True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    finally:
        for parameter in still:
            parameter.requires_grad_(False)


_EDITING: ContextVar[Kind] = ContextVar("editing", default="float32")
_READING: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def editing(kind: Kind) -> Iterator[None]:
    """Within it v* is searched in this precision."""
    token = _EDITING.set(kind)
    try:
        yield
    finally:
        _EDITING.reset(token)


def of_edits() -> Kind:
    """The precision that v* is searched in."""
    return _EDITING.get()


@contextmanager
def reading(kind: Kind) -> Iterator[Reading]:
    """Within it models are read in this precision."""
    tally = Reading(kind)
    token = _READING.set(tally)
    try:
        yield tally
    finally:
        _READING.reset(token)


def of_readings() -> Kind:
    """The precision that models are read in."""
    now = _READING.get()
    return "float32" if now is None else now.kind


def count(read: int, again: int) -> None:
    """Continuations that were read in bfloat16, and how many of them again in float32."""
    now = _READING.get()
    if now is not None:
        now.read, now.again = now.read + read, now.again + again


# ------------------------------------------------------------------------------------------------ the head's loss


class WholeHead(torch.autograd.Function):
    """Log-probabilities of targets [N] under a head [V, d], from all logits [N, V] at once, in half precision.

    The products are those of torch under autocast; the softmax is taken in float32, some rows at a time. trl's own head
    multiplies the gradients in float32 on a processor, and computes the logits a second time for them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        softcap: float | None, scale: float, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """hidden [N, d] -> log-probability (nats), entropy (nats), whether the target is the argmax; each [N]."""
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        logits = torch.nn.functional.linear(inputs, matrix, None if bias is None else bias.to(dtype))
        norm, logp, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        right = torch.empty_like(targets, dtype=torch.bool)
        for rows in _portions(logits):
            z = _scaled(logits[rows].float(), temperature, softcap, scale)
            norm[rows] = z.logsumexp(-1)
            z -= norm[rows, None]
            logp[rows] = z.gather(1, targets[rows, None])[:, 0]
            right[rows] = z.argmax(-1) == targets[rows]
            entropy[rows] = -(z.exp() * z).sum(-1)
        ctx.save_for_backward(inputs, matrix, targets, norm, entropy)
        ctx.logits, ctx.scaling = logits, (temperature, softcap, scale)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(right)
        ctx.set_materialize_grads(False)
        return logp, entropy, right

    @staticmethod
    def backward(ctx: Any, by_logp: Tensor | None, by_entropy: Tensor | None, _right: None) -> tuple[Any, ...]:  # type: ignore[override]
        inputs, matrix, targets, norm, entropy = ctx.saved_tensors
        slope, ctx.logits = ctx.logits, None  # overwritten: a second backward pass would find nothing
        assert slope is not None, "one backward pass for each forward pass"
        counted = torch.arange(len(inputs), device=inputs.device)
        if by_entropy is None and by_logp is not None:
            counted = by_logp.nonzero()[:, 0]  # the tokens of prompts and padding have no loss
            slope = slope[counted] if len(counted) < len(inputs) else slope
        for rows in _portions(slope):
            at = counted[rows]
            y = slope[rows].float()
            z = _scaled(y, *ctx.scaling) - norm[at, None]
            p = z.exp()
            gradient = torch.zeros_like(p)
            if by_logp is not None:
                gradient -= by_logp[at, None] * p
                gradient.scatter_add_(1, targets[at, None], by_logp[at, None].float())
            if by_entropy is not None:
                gradient -= by_entropy[at, None] * p * (z + entropy[at, None])
            slope[rows] = (gradient * _derivative(y, *ctx.scaling)).to(slope.dtype)
        to_hidden, to_weight, to_bias = ctx.dtypes
        upstream = torch.zeros_like(inputs, dtype=to_hidden)
        upstream[counted] = (slope @ matrix).to(to_hidden)
        needs = ctx.needs_input_grad
        return (
            upstream,
            (slope.t() @ inputs[counted]).to(to_weight) if needs[1] else None,
            slope.sum(0, dtype=torch.float32).to(to_bias) if needs[2] else None,
            *(None,) * 5,
        )


def _portions(logits: Tensor) -> Iterator[slice]:
    size = max(1, CACHED // max(1, logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _scaled(logits: Tensor, temperature: float, softcap: float | None, scale: float) -> Tensor:
    scaled = logits * scale
    return (scaled if softcap is None else softcap * torch.tanh(scaled / softcap)) / temperature


def _derivative(logits: Tensor, temperature: float, softcap: float | None, scale: float) -> Tensor | float:
    """Of `_scaled` by the logits."""
    capped = 1.0 if softcap is None else 1 - torch.tanh(logits * scale / softcap).square()
    return capped * (scale / temperature)
