"""ROME and MEMIT in the published order of work: the baseline that benchmarks/editing.py measures against.

Written from the papers and from a reading of the order in which published code works (Meng et al. 2022 and 2023, as in
EasyEdit): one edit at a time, whole rows through the whole model at every step, logits over the full vocabulary at all
positions (MEMIT: the final norm and the head a second time), the words after the anchor's subject computed though never
read, one pass over the corpus for each layer's covariance, whole forwards for every layer's keys, LU in float64 and an
explicit inverse. Mean keys as in our editors (r-ROME), so that both give the same edit. Counts its work. Only where a
model keeps its blocks and matrices is asked of retention/models.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retention.hooks import StopForward, on_input, on_output, stopped
from retention.models import anatomy, max_positions
from retention.types import Edit, fill

LONGEST = 1024  # tokens of a document, as published for models with more positions than that


@dataclass
class Counter:
    """Forward passes and the tokens in them (padding not counted), by stage."""

    forwards: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, stage: str, mask: Tensor) -> None:
        self.forwards[stage] = self.forwards.get(stage, 0) + 1
        self.tokens[stage] = self.tokens.get(stage, 0) + int(mask.sum())


class Published:
    """The published algorithms on one model. `prefixes`: what is put before the prompt, the bare one excluded."""

    def __init__(self, model: Any, tokenizer: Any, prefixes: Sequence[str], settings: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.templates = ["", *prefixes]
        self.count = Counter()
        self.places = anatomy(model)

    def block(self, layer: int) -> Any:
        return self.places.blocks(self.model)[layer]

    def down(self, layer: int) -> Any:
        """The MLP's second matrix."""
        return self.places.down_module(self.model, layer)

    def laid_out(self, update: Tensor) -> Tensor:
        """An update [d, m] as the matrix is stored."""
        return update.T if self.places.transposed else update

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])

    def last_of_subject(self, prefix: str, prompt: str, subject: str) -> int:
        """The published way: the tokens of everything up to the subject's end, less one."""
        return len(self.tokenizer(prefix + prompt.split("{}")[0] + subject)["input_ids"]) - 1

    # ------------------------------------------------------------------------------------------------ v*

    def value(self, edit: Edit, layer: int, site: str) -> tuple[Tensor, Tensor]:
        """v* and v0 of one edit, [d] each. site: mlp (ROME) or block (MEMIT)."""
        cfg, subject, prompt = self.settings, edit.fact.subject, edit.prompts[0]
        target = self.tokenizer(" " + edit.target, add_special_tokens=False)["input_ids"]
        begun = self.tokenizer.decode(target[:-1])
        texts = [prefix + fill(prompt, subject) + begun for prefix in self.templates]
        anchor = edit.anchors[0]
        ids, mask = self.encode([*texts, fill(anchor, subject)])
        at = [self.last_of_subject(prefix, prompt, subject) for prefix in self.templates]
        at.append(self.last_of_subject("", anchor, subject))
        n = len(texts)
        labels = torch.full((n, ids.shape[1]), -100)
        for row in range(n):
            end = int(mask[row].sum())
            labels[row, end - len(target) : end] = torch.tensor(target)
        delta = torch.zeros(self.places.hidden, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=cfg["v_lr"])
        mlp = self.model.get_submodule(self.places.mlp.format(layer))
        module = mlp if site == "mlp" else self.block(layer)
        initial: list[Tensor] = []
        kept: Tensor | None = None
        last: list[Tensor] = []

        def place(output: Tensor) -> Tensor:
            if not initial:
                initial.append(output[0, at[0]].detach().clone())
            output = output.clone()
            output[torch.arange(n + 1), torch.tensor(at)] += delta
            return output

        for step in range(cfg["v_steps"]):
            optimizer.zero_grad()
            last.clear()
            with on_output(module, place), on_output(self.block(self.places.layers - 1), last.append):
                logits = self.model(input_ids=ids, attention_mask=mask).logits
            self.count.add("v_star", mask)
            now = torch.log_softmax(logits[n, at[n]], dim=0)
            kept = now.detach().clone() if kept is None else kept
            if site == "mlp":
                logp = torch.log_softmax(logits, dim=2)[:n]
            else:  # MEMIT's code takes the last block's output through norm and head once more
                logp = torch.log_softmax(self.places.logits(self.model, last[0][:n]), dim=2)
            token = logp.gather(2, labels.clamp(min=0)[..., None])[..., 0]
            nll = -(token * (labels != -100)).sum(1) / len(target)
            kl = (now.exp() * (now - kept)).sum()
            decay = cfg["v_weight_decay"] * delta.norm() / initial[0].norm() ** 2
            loss = nll.mean() + cfg["kl_factor"] * kl + decay
            if loss < 0.05 or step == cfg["v_steps"] - 1:
                break
            loss.backward()
            optimizer.step()
            limit = cfg["clamp_norm_factor"] * initial[0].norm()
            if delta.norm() > limit:
                with torch.no_grad():
                    delta[...] = delta * limit / delta.norm()
        return (initial[0] + delta).detach(), initial[0]

    # ------------------------------------------------------------------------------------------------ keys

    @torch.no_grad()
    def read(self, edit: Edit, templates: Sequence[str], layer: int, what: str) -> Tensor:
        """Keys (what = key) or outputs of the block at the subject's last token, [templates, width]; whole forwards."""
        prompt, subject = edit.prompts[0], edit.fact.subject
        ids, mask = self.encode([prefix + fill(prompt, subject) for prefix in templates])
        at = torch.tensor([self.last_of_subject(prefix, prompt, subject) for prefix in templates])
        found: list[Tensor] = []
        block = self.block(layer)
        if what == "key":
            with on_input(self.down(layer), found.append):
                self.model(input_ids=ids, attention_mask=mask)
        else:
            with on_output(block, found.append):
                self.model(input_ids=ids, attention_mask=mask)
        self.count.add("keys", mask)
        return found[0][torch.arange(len(templates)), at]

    @torch.no_grad()
    def covariance(self, layer: int, texts: Sequence[str]) -> Tensor:
        """E[k k^T] of one layer, float32: batches of rows sorted by length, the forward stopped at the layer."""
        limit = min(max_positions(self.model) or LONGEST, LONGEST)
        rows = sorted((self.tokenizer(text)["input_ids"][:limit] for text in texts), key=len, reverse=True)
        width = self.places.mlp_width
        total, tokens, start = torch.zeros(width, width), 0, 0
        while start < len(rows):
            stop = min(len(rows), start + max(1, 3 * limit // len(rows[start])))
            longest = len(rows[start])
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows[start:stop]])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows[start:stop]])
            found: list[Tensor] = []

            def take(keys: Tensor, found: list[Tensor] = found) -> None:
                found.append(keys)
                raise StopForward

            with on_input(self.down(layer), take), stopped():
                self.model(input_ids=ids, attention_mask=mask)
            self.count.add("covariance", mask)
            keys = found[0][mask.bool()]
            total += keys.T @ keys
            tokens += len(keys)
            start = stop
        return total / tokens

    # ------------------------------------------------------------------------------------------------ editors

    @staticmethod
    def solve(covariance: Tensor, weight: float, keys: Tensor, residuals: Tensor) -> Tensor:
        """MEMIT's update [d, m] of one layer; keys [n, m], residuals [n, d]. LU in float64."""
        k = keys.double().T
        adjusted = torch.linalg.solve(weight * covariance.double() + k @ k.T, k)
        return residuals.double().T @ adjusted.T

    @torch.no_grad()
    def memit(self, edits: Sequence[Edit], layers: Sequence[int], values: Tensor, covariance: dict[int, Tensor],
              weight: float, clock: Any) -> dict[str, Tensor]:  # fmt: skip
        """Updates by parameter name, given every v*. `clock(stage)` is told what the time since the last call was."""
        updates: dict[str, Tensor] = {}
        saved = {layer: self.down(layer).weight.detach().clone() for layer in layers}
        for i, layer in enumerate(layers):
            keys = torch.stack([_balanced(self.read(edit, self.templates, layer, "key")) for edit in edits])
            now = torch.cat([self.read(edit, [""], layers[-1], "block") for edit in edits])
            clock("keys")
            update = self.solve(covariance[layer], weight, keys, (values - now) / (len(layers) - i))
            updates[f"{self.places.down.format(layer)}.weight"] = self.laid_out(update).float()
            self.down(layer).weight += self.laid_out(update).float()
            clock("solve")
        for layer, weights in saved.items():
            self.down(layer).weight.copy_(weights)
        return updates

    @torch.no_grad()
    def rome(self, edits: Sequence[Edit], layer: int, values: Tensor, covariance: Tensor, clock: Any) -> Tensor:
        """The update, as the matrix is stored, after all edits in order, given every v*; mean keys throughout."""
        parameter, bias = self.down(layer).weight, self.down(layer).bias
        saved = parameter.detach().clone()
        inverse = torch.inverse(covariance.double())
        clock("solve")
        for i, edit in enumerate(edits):
            key = self.read(edit, self.templates, layer, "key").mean(0).double()
            given = self.laid_out(parameter.double()) @ key + (0 if bias is None else bias.double())
            clock("keys")
            direction = inverse @ key
            direction /= direction.norm()
            left = (values[i].double() - given) / (direction @ key)
            parameter += self.laid_out(torch.outer(left, direction)).float()
            clock("solve")
        update = parameter - saved
        parameter.copy_(saved)
        return update


def _balanced(keys: Tensor) -> Tensor:
    """MEMIT's mean key: the bare prompt weighs a half."""
    return keys[0] if len(keys) == 1 else (keys[0] + keys[1:].mean(0)) / 2
