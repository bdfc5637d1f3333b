"""ROME and MEMIT in the published order of work: the baseline that benchmarks/editing.py measures against.

Written from the papers and from a reading of the order in which published code works (Meng et al. 2022 and 2023, as in
EasyEdit): one edit at a time, whole rows through the whole model at every step, logits over the full vocabulary at all
positions (MEMIT: the final norm and the head a second time), the words after the anchor's subject computed though never
read, one pass over the corpus for each layer's covariance, whole forwards for every layer's keys, LU in float64 and an
explicit inverse. Mean keys as in our editors (r-ROME), so that both give the same edit. GPT-2 only. Counts its work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retention.hooks import StopForward, on_input, on_output, stopped
from retention.types import Edit, fill


@dataclass
class Counter:
    """Forward passes and the tokens in them (padding not counted), by stage."""

    forwards: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, stage: str, mask: Tensor) -> None:
        self.forwards[stage] = self.forwards.get(stage, 0) + 1
        self.tokens[stage] = self.tokens.get(stage, 0) + int(mask.sum())


class Published:
    """The published algorithms on one GPT-2 model. `prefixes`: what is put before the prompt, the bare one excluded."""

    def __init__(self, model: Any, tokenizer: Any, prefixes: Sequence[str], settings: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.templates = ["", *prefixes]
        self.count = Counter()

    def block(self, layer: int) -> Any:
        return self.model.transformer.h[layer]

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
        target = self.tokenizer(" " + edit.target)["input_ids"]
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
        delta = torch.zeros(self.model.config.n_embd, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=cfg["v_lr"])
        module = self.block(layer).mlp if site == "mlp" else self.block(layer)
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
            with on_output(module, place), on_output(self.block(self.model.config.n_layer - 1), last.append):
                logits = self.model(input_ids=ids, attention_mask=mask).logits
            self.count.add("v_star", mask)
            now = torch.log_softmax(logits[n, at[n]], dim=0)
            kept = now.detach().clone() if kept is None else kept
            if site == "mlp":
                logp = torch.log_softmax(logits, dim=2)[:n]
            else:  # MEMIT's code takes the last block's output through norm and head once more
                again = self.model.transformer.ln_f(last[0][:n]) @ self.model.lm_head.weight.T
                logp = torch.log_softmax(again, dim=2)
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
            with on_input(block.mlp.c_proj, found.append):
                self.model(input_ids=ids, attention_mask=mask)
        else:
            with on_output(block, found.append):
                self.model(input_ids=ids, attention_mask=mask)
        self.count.add("keys", mask)
        return found[0][torch.arange(len(templates)), at]

    @torch.no_grad()
    def covariance(self, layer: int, texts: Sequence[str]) -> Tensor:
        """E[k k^T] of one layer, float32: batches of rows sorted by length, the forward stopped at the layer."""
        limit = self.model.config.n_positions
        rows = sorted((self.tokenizer(text)["input_ids"][:limit] for text in texts), key=len, reverse=True)
        width = self.block(layer).mlp.c_proj.weight.shape[0]
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

            with on_input(self.block(layer).mlp.c_proj, take), stopped():
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
        saved = {layer: self.block(layer).mlp.c_proj.weight.detach().clone() for layer in layers}
        for i, layer in enumerate(layers):
            keys = torch.stack([_balanced(self.read(edit, self.templates, layer, "key")) for edit in edits])
            now = torch.cat([self.read(edit, [""], layers[-1], "block") for edit in edits])
            clock("keys")
            update = self.solve(covariance[layer], weight, keys, (values - now) / (len(layers) - i))
            updates[f"transformer.h.{layer}.mlp.c_proj.weight"] = update.T.float()
            self.block(layer).mlp.c_proj.weight += update.T.float()
            clock("solve")
        for layer, weights in saved.items():
            self.block(layer).mlp.c_proj.weight.copy_(weights)
        return updates

    @torch.no_grad()
    def rome(self, edits: Sequence[Edit], layer: int, values: Tensor, covariance: Tensor, clock: Any) -> Tensor:
        """The update [m, d] after all edits in order, given every v*; mean keys throughout."""
        parameter = self.block(layer).mlp.c_proj.weight
        saved = parameter.detach().clone()
        inverse = torch.inverse(covariance.double())
        clock("solve")
        for i, edit in enumerate(edits):
            key = self.read(edit, self.templates, layer, "key").mean(0).double()
            given = key @ parameter.double() + self.block(layer).mlp.c_proj.bias.double()
            clock("keys")
            direction = inverse @ key
            direction /= direction.norm()
            left = (values[i].double() - given) / (direction @ key)
            parameter += torch.outer(direction, left).float()
            clock("solve")
        update = parameter - saved
        parameter.copy_(saved)
        return update


def _balanced(keys: Tensor) -> Tensor:
    """MEMIT's mean key: the bare prompt weighs a half."""
    return keys[0] if len(keys) == 1 else (keys[0] + keys[1:].mean(0)) / 2
