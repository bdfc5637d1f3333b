"""Keys: what enters the MLP's second matrix at a subject, and the covariance of what enters it anywhere.

All layers in one pass that ends at the highest one. Knows no editing method.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from retention.editors._batch import Site, padded
from retention.editors._rows import Row, batches
from retention.editors._saved import weights_hash, with_cache
from retention.editors._solve import Metric
from retention.hooks import BlockCalls, dry_run, on_input, on_output, stopped
from retention.models import Anatomy, single_mlps
from retention.progress import tell
from retention.tokens import encode
from retention.types import Part, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VERSION = 2  # of the covariance: raise it when its numbers change
BATCH_TOKENS = 4096  # tokens run at once for the covariance
WALK_TOKENS = 2**16  # tokens run at once to read the keys of edits
BLOCK = 512  # columns of a covariance computed at once
FIRST_LOOK = 2048  # tokens after which the directions of keys are looked at first, where reading may stop early
WATCHED = 32  # texts whose last tokens' keys are watched then


class Covariance(Part):
    """The sample that stands for all keys a model has ever seen. The papers took 100,000 articles of Wikipedia."""

    tokens: int = Field(default=100_000, ge=0, description="tokens of the corpus to read; 0: the identity instead")
    length: int = Field(default=512, ge=2, description="tokens that are read of one text at most")
    ridge: float = Field(
        default=1e-4, ge=0, description="added to the diagonal, as a share of its mean: few samples give no singular C"
    )
    settle: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="read no more once doubling the sample turns no direction C^-1 k by more "
        "than this (1 - cosine); how many tokens were read is recorded",
    )


class Moments(dict[int, Tensor]):
    """Covariance [m, m] by layer, float32, and how many tokens it was read from."""

    tokens: int = 0


def covariances(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    layers: Sequence[int],
    corpus: Sequence[str],
    settings: Covariance,
    cache: Path | None = None,
) -> Moments:
    """Uncentred covariance E[k k^T] of each layer, float32 [m, m] on the CPU, over the real tokens of a sample.

    The texts are drawn from the corpus in an order that depends on the corpus alone. Raises UserError without texts.
    """
    if not any(text.strip() for text in corpus):
        raise UserError(
            "this editor needs texts for the covariance of keys, and the corpus is empty: give a corpus, "
            "or switch the covariance off with covariance.tokens=0"
        )
    places = single_mlps(model)
    for layer in layers:
        places.check(layer)
    rows = _sample(tokenizer, corpus, settings)
    key = None
    if cache is not None:
        # Keys depend on nothing above their layer, nor on the second matrix of the layer itself.
        below = weights_hash(model, places, max(layers))
        text = hashlib.sha256(str(rows).encode()).hexdigest()
        key = ["covariance", VERSION, below, text, sorted(layers)]
        if settings.settle is not None:
            key += [settings.settle, settings.ridge]

    def compute() -> dict[str, Tensor]:
        if settings.settle is None:
            sums = _accumulate(model, places, sorted(layers), sorted(rows, key=len, reverse=True))
            return _mean(sums, sum(map(len, rows)))
        return _until_settled(model, places, sorted(layers), rows, settings.settle, settings.ridge)

    found = with_cache(cache, key, compute)
    moments = Moments({layer: found[str(layer)] for layer in layers})
    moments.tokens = int(found["tokens"])
    return moments


def _until_settled(
    model: PreTrainedModel,
    places: Anatomy,
    layers: Sequence[int],
    rows: Sequence[tuple[int, ...]],
    settle: float,
    ridge: float,
) -> dict[str, Tensor]:
    """The covariance of as many texts, in their drawn order, as it takes for the directions of keys to stand still.

    The keys whose directions are watched are those of the last tokens of the first texts.
    """
    watched = _last_keys(model, places, layers, rows[:WATCHED])
    sums: dict[int, Tensor] = {}
    before: dict[int, Tensor] = {}
    start, total, goal = 0, 0, FIRST_LOOK
    while start < len(rows):
        stop = start
        while stop < len(rows) and total < goal:
            total += len(rows[stop])
            stop += 1
        more = _accumulate(model, places, layers, sorted(rows[start:stop], key=len, reverse=True))
        sums = {layer: more[layer] + sums[layer] if sums else more[layer] for layer in layers}
        start, goal = stop, 2 * total
        found = _mean(sums, total)
        turned, now = 0.0, {}
        for layer in layers:
            matrix = found[str(layer)].to(watched[layer].device).double()
            matrix.diagonal().add_(ridge * matrix.diagonal().mean())
            directions = torch.nn.functional.normalize(torch.linalg.solve(matrix, watched[layer].double().T).T, dim=1)
            if before:
                turned = max(turned, float(1 - (directions * before[layer]).sum(1).min()))
            now[layer] = directions
        if before and turned <= settle:
            break
        before = now
    return found


def metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    layers: Sequence[int],
    corpus: Sequence[str],
    settings: Covariance,
    cache: Path | None = None,
) -> dict[int, Metric]:
    """The factored covariance of each layer, on the model's device; the identity where settings.tokens is 0."""
    if settings.tokens == 0:
        return {layer: Metric(None) for layer in layers}
    device = next(model.parameters()).device
    found = covariances(model, tokenizer, layers, corpus, settings, cache)
    return {
        layer: replace(factored(found[layer].to(device), settings.ridge, cache), tokens=found.tokens)
        for layer in layers
    }


def factored(covariance: Tensor, ridge: float, cache: Path | None = None) -> Metric:
    """Cholesky factor, float64, of C + ridge * mean(diag C) * I. Kept by content with `cache`."""
    key = None
    if cache is not None:
        key = ["factor", hashlib.sha256(covariance.cpu().numpy().tobytes()).hexdigest(), ridge]

    def compute() -> dict[str, Tensor]:
        matrix = covariance.double()
        matrix.diagonal().add_(ridge * matrix.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise UserError(
                "the covariance of keys is singular: give a larger corpus or a larger covariance.ridge (it is "
                f"{ridge:g}, as a share of the mean of the diagonal)"
            )
        return {"factor": factor.contiguous()}

    return Metric(with_cache(cache, key, compute)["factor"].to(covariance.device))


def _sample(tokenizer: PreTrainedTokenizerFast, corpus: Sequence[str], settings: Covariance) -> list[tuple[int, ...]]:
    order = list(range(len(corpus)))
    random.Random(0).shuffle(order)
    rows: list[tuple[int, ...]] = []
    total = 0
    for index in order:
        if total >= settings.tokens:
            break
        if corpus[index].strip():
            rows.append(encode(tokenizer, corpus[index]).ids[: min(settings.length, settings.tokens - total)])
            total += len(rows[-1])
    return rows


def _mean(sums: dict[int, Tensor], tokens: int) -> dict[str, Tensor]:
    found = {str(layer): _symmetric(matrix / tokens).float().cpu() for layer, matrix in sums.items()}
    return {**found, "tokens": torch.tensor(tokens)}


@torch.no_grad()
def _last_keys(
    model: PreTrainedModel, places: Anatomy, layers: Sequence[int], rows: Sequence[tuple[int, ...]]
) -> dict[int, Tensor]:
    """The key of each row's last token, [rows, m] by layer."""
    ids, mask = padded(rows, next(model.parameters()).device)
    last = mask.sum(1) - 1
    found: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        hooks.enter_context(stopped())
        for layer in layers:

            def keep(keys: Tensor, layer: int = layer) -> None:
                found[layer] = keys.reshape(len(rows), -1, keys.shape[-1])[torch.arange(len(rows)), last].clone()

            hooks.enter_context(on_input(places.down_module(model, layer), keep, stop=layer == max(layers)))
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


@torch.no_grad()
def _accumulate(
    model: PreTrainedModel, places: Anatomy, layers: Sequence[int], rows: Sequence[tuple[int, ...]]
) -> dict[int, Tensor]:
    """Sums of k k^T over all tokens, on and above the diagonal, float64. Rows from the longest to the shortest."""
    device = next(model.parameters()).device
    sums = {
        layer: torch.zeros(places.mlp_width, places.mlp_width, dtype=torch.float64, device=device) for layer in layers
    }
    start = 0
    while start < len(rows):
        tell("covariance of keys, texts", start, len(rows))
        stop = min(len(rows), start + max(1, BATCH_TOKENS // len(rows[start])))
        ids, mask = padded(rows[start:stop], device)
        real = mask.bool().flatten()
        with ExitStack() as hooks:
            hooks.enter_context(stopped())
            for layer in layers:

                def add(keys: Tensor, layer: int = layer, real: Tensor = real) -> None:
                    _add_products(sums[layer], keys.reshape(len(real), -1)[real])

                down = places.down_module(model, layer)
                hooks.enter_context(on_input(down, add, stop=layer == max(layers)))
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        start = stop
    return sums


def _add_products(total: Tensor, keys: Tensor) -> None:
    """total += keys^T keys, on and above the diagonal only: half of the work. Products in float32."""
    keys = keys.float()
    for start in range(0, keys.shape[1], BLOCK):
        total[start : start + BLOCK, start:] += keys[:, start : start + BLOCK].T @ keys[:, start:]


def _symmetric(matrix: Tensor) -> Tensor:
    return torch.triu(matrix) + torch.triu(matrix, 1).T


class KeyWalk:
    """Rows held at the input of one block, cut after their subject's last token; taken upwards block by block.

    What an edit changes below is felt above: keys are read again after each layer's update, without running the
    layers below once more.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, places: Anatomy, rows: Sequence[Row], layer: int) -> None:
        self.model, self.places, self.layer, self.count = model, places, layer, len(rows)
        self.blocks = places.blocks(model)
        self.device = next(model.parameters()).device
        self.parts: list[tuple[list[int], Tensor, BlockCalls, Tensor]] = []  # rows, their `at`, calls, states
        cut = [row.ids[: row.at + 1] for row in rows]
        for group in _within(batches([len(ids) for ids in cut], overhead=64.0), [len(ids) for ids in cut]):
            ids, mask = padded([cut[i] for i in group], self.device)
            with dry_run(self.blocks, tuples=places.tuples) as calls:
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            states: list[Tensor] = []
            with on_input(self.blocks[layer], states.append, stop=True), stopped():
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            at = torch.tensor([rows[i].at for i in group], device=self.device)
            self.parts.append((group, at, calls, states[0]))

    @torch.no_grad()
    def up_to(self, layer: int) -> None:
        """Take the rows to the input of a higher block, through the weights as they are now."""
        self.parts = [
            (group, at, calls, calls.run(states, self.layer, layer)) for group, at, calls, states in self.parts
        ]
        self.layer = layer

    @torch.no_grad()
    def keys(self) -> Tensor:
        """Keys [rows, m] of the current block at the subjects' last tokens."""
        out = torch.empty(self.count, self.places.mlp_width, device=self.device)
        down = self.places.down_module(self.model, self.layer)
        for group, at, calls, states in self.parts:
            found: list[Tensor] = []
            with on_input(down, found.append, stop=True), stopped():
                calls.run(states, self.layer, self.layer + 1)
            out[group] = _at(found[0], states, at)
        return out

    @torch.no_grad()
    def values(self, layer: int, site: Site) -> Tensor:
        """What a site of a block at or above the current one gives now at the subjects' last tokens, [rows, d]."""
        out = torch.empty(self.count, self.places.hidden, device=self.device)
        module = self.places.down_module(self.model, layer) if site == "mlp" else self.blocks[layer]
        for group, at, calls, states in self.parts:
            found: list[Tensor] = []
            with on_output(module, found.append, stop=True), stopped():
                calls.run(states, self.layer, layer + 1)
            out[group] = _at(found[0], states, at)
        return out


def _within(groups: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The groups of rows, none with more than WALK_TOKENS, padding included."""
    parts = []
    for group in groups:
        rows = max(1, WALK_TOKENS // max(lengths[i] for i in group))
        parts += [group[start : start + rows] for start in range(0, len(group), rows)]
    return parts


def _at(tensor: Tensor, states: Tensor, at: Tensor) -> Tensor:
    """tensor [rows (x) tokens, width] at one position of each row of states [rows, tokens, d]."""
    return tensor.reshape(*states.shape[:2], -1)[torch.arange(len(at), device=at.device), at].float()


def mean_keys(keys: Tensor, rows: Sequence[Row], edits: int) -> Tensor:
    """One key per edit [edits, m], float64, from the keys of its rows: a weighted mean, as published for MEMIT.

    The rows without a generated prefix together weigh as much as those with one: the bare prompt counts for a half.
    """
    weights = torch.zeros(edits, len(rows), dtype=torch.float64)
    for i, row in enumerate(rows):
        weights[row.edit, i] = 1.0
    bare = torch.tensor([row.bare for row in rows])
    for part in (bare, ~bare):
        weights[:, part] /= weights[:, part].sum(dim=1, keepdim=True).clamp(min=1.0)
    weights /= weights.sum(dim=1, keepdim=True)
    return weights.to(keys.device) @ keys.double()
