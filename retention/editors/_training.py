"""What the editors that train share: rows of edits, the loss on their targets, the loop, and restoring the weights.

Knows no editor and no adapter. Losses are in nats; a step is one optimizer step; an epoch passes over all edits once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from retention.models import anatomy
from retention.progress import tell
from retention.tokens import encode
from retention.types import Delta, Edit, EditResult, UserError, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text to train on. The tokens from `start` on are predicted; those before are given."""

    ids: tuple[int, ...]
    start: int  # >= 1: the first token has nothing to be predicted from


def edit_row(tokenizer: PreTrainedTokenizerFast, edit: Edit, phrasing: str, prefix: str = "", eos: bool = False) -> Row:
    """The phrasing about the edit's subject and its new target, after `prefix`; `eos` appends the end-of-text token."""
    encoded = encode(tokenizer, prefix + fill(phrasing, edit.fact.subject), edit.target, joint=edit.fact.joint)
    if eos and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token to append to the targets; set append_eos: false")
    ids = (*encoded.ids, tokenizer.eos_token_id) if eos else encoded.ids
    return Row(ids=ids, start=max(1, encoded.answer_start))


def text_row(tokenizer: PreTrainedTokenizerFast, text: str, longest: int = 256) -> Row:
    """A text of which every token after the first is predicted, cut at `longest` tokens."""
    return Row(ids=encode(tokenizer, text).ids[:longest], start=1)


def padded(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [rows, longest], padded on the right with id 0, which the mask hides."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    return ids.to(device), mask.to(device)


def log_probs(model: Any, rows: Sequence[Row], places: Sequence[tuple[int, int]]) -> Tensor:
    """Next-token log-probabilities [places, vocabulary], float32, at (row, position) places.

    The vocabulary head runs only over positions that some row needs.
    """
    device = model.device
    ids, mask = padded(rows, device)
    columns = sorted({position for _, position in places})
    logits = model(
        input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=torch.tensor(columns, device=device)
    ).logits
    at = {position: i for i, position in enumerate(columns)}
    row_index = torch.tensor([row for row, _ in places], device=device)
    column_index = torch.tensor([at[position] for _, position in places], device=device)
    return logits[row_index, column_index].float().log_softmax(-1)


def target_losses(
    model: Any,
    rows: Sequence[Row],
    read: Literal["each", "prompt_last"] = "each",
) -> Tensor:
    """Mean negative log-probability per predicted token of each row [rows], nats.

    `each`: every token from the ones before it. `prompt_last`: all of them from the last token of the prompt (FT-L).
    """
    places, targets, owner = [], [], []
    for i, row in enumerate(rows):
        for position in range(row.start, len(row.ids)):
            places.append((i, position - 1 if read == "each" else row.start - 1))
            targets.append(row.ids[position])
            owner.append(i)
    log_p = log_probs(model, rows, places)
    nll = -log_p.gather(1, torch.tensor(targets, device=log_p.device)[:, None])[:, 0]
    index = torch.tensor(owner, device=log_p.device)
    total = torch.zeros(len(rows), device=log_p.device).index_add(0, index, nll)
    return total / torch.bincount(index, minlength=len(rows))


class Masters:
    """float32 copies of low-precision parameters while they are trained; float32 parameters stand for themselves.

    One optimizer step is smaller than the spacing of bfloat16 weights: trained in place, they would lose most of it.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.pairs = [(p, p if p.dtype == torch.float32 else p.detach().float()) for p in parameters]

    @property
    def tensors(self) -> list[Tensor]:
        return [master for _, master in self.pairs]

    def take_gradients(self) -> None:
        for parameter, master in self.pairs:
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        for parameter, master in self.pairs:
            if master is not parameter:
                parameter.copy_(master)


@contextmanager
def trained(model: PreTrainedModel, names: Sequence[str]) -> Iterator[tuple[Masters, Callable[[], Delta]]]:
    """The named parameters ready to be trained, and a function that gives their change so far as a dense Delta.

    On leaving, values are restored by copy and gradients as they were.
    """
    by_name = dict(model.named_parameters())
    saved = {name: (by_name[name].detach().clone(), by_name[name].grad) for name in names}
    for name in names:
        by_name[name].grad = None
        by_name[name].requires_grad_(True)
    masters = Masters([by_name[name] for name in names])

    def delta() -> Delta:
        return Delta(
            {
                name: (master.detach() - saved[name][0].float()).cpu()
                for name, master in zip(names, masters.tensors, strict=True)
            }
        )

    try:
        yield masters, delta
    finally:
        with torch.no_grad():
            for name, (value, gradient) in saved.items():
                by_name[name].copy_(value)
                by_name[name].grad = gradient


def block_parameters(
    model: PreTrainedModel, layers: Sequence[int], what: Literal["all", "mlp", "attention"] = "all"
) -> list[str]:
    """Names of all parameters of the blocks, or of their MLPs' or attentions' matrices. UserError if out of range."""
    places = anatomy(model)
    chosen = {
        "all": ("",),
        "mlp": tuple(f"{name}." for name in places.mlp_projections or [places.mlp.removeprefix(f"{places.block}.")]),
        "attention": tuple(f"{name}." for name in places.attention_projections),
    }[what]
    starts = tuple(f"{places.block.format(places.check(layer))}.{name}" for layer in layers for name in chosen)
    return [name for name, _ in model.named_parameters() if name.startswith(starts)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast to train."""

    epochs: int
    batch_size: int  # rows of edits a step
    lr: float
    weight_decay: float = 0.0
    stop_loss: float = 0.0  # training ends once an epoch's mean loss on the edits is below it, nats per token


@dataclass(frozen=True, kw_only=True)
class Fitted:
    steps: int  # optimizer steps taken
    loss: float  # mean loss on the edits over the last epoch, nats per token


def fit(
    masters: Masters,
    rows: Callable[[int], Sequence[Row]],
    loss: Callable[[Sequence[Row]], Tensor],
    plan: Plan,
    seed: int,
    extra: Callable[[int], Tensor | None] = lambda step: None,
    after_step: Callable[[], None] = lambda: None,
) -> Fitted:
    """Train jointly on all rows: each epoch draws them anew by `rows(epoch)`, shuffles and batches them.

    `loss` gives one loss per row; `extra` a further term of a step (rehearsal, locality); `after_step` may project.
    AdamW with its usual betas; without weight decay that is Adam, which the published editors use.
    """
    optimizer = torch.optim.AdamW(masters.tensors, lr=plan.lr, weight_decay=plan.weight_decay)
    shuffle = random.Random(seed)
    step, mean = 0, float("nan")
    for epoch in range(plan.epochs):
        tell("epochs over the edits", epoch, plan.epochs)
        order = list(rows(epoch))
        shuffle.shuffle(order)
        seen: list[Tensor] = []
        for begin in range(0, len(order), plan.batch_size):
            per_row = loss(order[begin : begin + plan.batch_size])
            further = extra(step)
            total = per_row.mean() if further is None else per_row.mean() + further
            optimizer.zero_grad()
            total.backward()
            masters.take_gradients()
            optimizer.step()
            masters.write_back()
            after_step()
            seen.append(per_row.detach())
            step += 1
        mean = float(torch.cat(seen).mean())
        if mean < plan.stop_loss:
            break
    return Fitted(steps=step, loss=mean)


@torch.no_grad()
def final_losses(model: Any, rows: Sequence[Row], batch_size: int = 64) -> list[float]:
    """Loss of each row under the model as it stands, nats per token."""
    parts = [target_losses(model, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return torch.cat(parts).tolist()


def train_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    edits: Sequence[Edit],
    names: Sequence[str],
    plan: Plan,
    seed: int,
    *,
    read: Literal["each", "prompt_last"] = "each",
    eos: bool = False,
    bound: float | None = None,
) -> EditResult:
    """Fine-tune the named parameters on all edits jointly and give their change; the model is restored.

    `bound` is the largest change of any single weight, enforced after every step (the L-infinity constraint of FT-L).
    """
    rows = [edit_row(tokenizer, e, phrasing, eos=eos) for e in edits for phrasing in e.prompts]
    with trained(model, names) as (masters, delta):
        limits = [] if bound is None else [(m, m.detach() - bound, m.detach() + bound) for m in masters.tensors]

        @torch.no_grad()
        def project() -> None:
            for master, low, high in limits:
                master.clamp_(low, high)
            if limits:
                masters.write_back()

        fitted = fit(
            masters, lambda _: rows, lambda batch: target_losses(model, batch, read), plan, seed, after_step=project
        )
        change = delta()
    return EditResult(
        delta=change,
        diagnostics=diagnostics(model, tokenizer, edits, change, fitted),
        info={"steps": fitted.steps, "train_loss": fitted.loss, "parameters": list(names)},
    )


def diagnostics(
    model: Any, tokenizer: PreTrainedTokenizerFast, edits: Sequence[Edit], delta: Delta, fitted: Fitted
) -> tuple[dict[str, Any], ...]:
    """Per edit: the loss of its direct prompt in the edited model, nats per target token, and the steps taken."""
    rows = [edit_row(tokenizer, e, e.prompts[0]) for e in edits]
    with delta.applied(model):
        losses = final_losses(model, rows)
    return tuple(
        {"fact_id": e.fact.id, "final_loss": loss, "steps": fitted.steps} for e, loss in zip(edits, losses, strict=True)
    )
