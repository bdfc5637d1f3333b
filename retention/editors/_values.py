"""What the edited layer should give at a subject for the model to say the new target: v*, for all edits at once.

ROME (Meng et al. 2022, equation 4) and MEMIT (Meng et al. 2023, equation 16), with the published loss, optimiser and
stopping rule. Knows no closed form: what to do with a v* is the editor's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retention import half
from retention.editors._batch import FastBatch, FullBatch, Site, States
from retention.editors._rows import Row, anchor_rows, batches, merged, statement_rows
from retention.editors._saved import weights_hash, with_cache
from retention.estimate import fixed_tokens, token_bytes
from retention.models import Anatomy, max_positions, single_mlps
from retention.progress import tell
from retention.types import Edit, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VERSION = 3  # of the algorithm: raise it when its numbers change
HEAD_READS = {"cpu": 64, "cuda": 2048}  # positions whose logits are held at once: 13 MB and 400 MB at 50,000 tokens
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, as published


@dataclass(frozen=True, kw_only=True)
class ValueSettings:
    """The published loss: mean over rows of NLL per target token + kl_factor KL + weight_decay |delta| / |v0|^2."""

    steps: int  # evaluations of the loss; updates are one fewer, as published
    lr: float
    weight_decay: float
    clamp: float  # |delta| <= clamp * |v0|
    kl_factor: float  # of KL(edited || unedited) in nats at the anchors
    stop: float = 0.05  # an edit is finished when its loss is below, nats
    tokens_per_batch: int | None = None  # tokens of whole rows held at once; None: `fixed_tokens` of the model


@dataclass(frozen=True)
class Values:
    """v* of every edit at one site, and how it was reached."""

    value: Tensor  # [edits, d] float32, v* = initial + delta
    initial: Tensor  # [edits, d], v0: what the site gives for the bare direct prompt
    mean_key: Tensor  # [edits, m] float64, mean over the edit's rows of what enters the layer's second matrix
    bare_key: Tensor  # [edits, m] float64, the same for the bare direct prompt
    diagnostics: tuple[dict[str, Any], ...]  # per edit: fact_id, final_loss (nats), steps, target_probability, ...
    fast: bool  # False where the architecture needed whole forwards
    tokens_per_batch: int  # of whole rows, held at once


def target_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    edits: Sequence[Edit],
    *,
    layer: int,
    site: Site,
    settings: ValueSettings,
    prefixes: Sequence[str] = (),
    cache: Path | None = None,
    fast: bool = True,
) -> Values:
    """Optimise v* of each edit separately, on the unedited model, in groups of `settings.tokens_per_batch` tokens.

    Which edits share a group moves v* in its last digits (6e-5 of its norm, SmolLM2), so the size of a group depends on
    the model and the settings only, never on the memory that happens to be free. The model must be in eval mode,
    without parameter gradients. Raises UserError where a group does not fit into the memory that is available.
    """
    places = single_mlps(model)
    places.check(layer)
    rows = merged(statement_rows(tokenizer, edits, prefixes) + anchor_rows(tokenizer, edits))
    longest = max(rows, key=lambda row: len(row.ids))
    limit = max_positions(model)
    if limit is not None and len(longest.ids) > limit:
        raise UserError(
            f"the edit {edits[longest.edit].fact.id} has {len(longest.ids)} tokens after its longest prefix; the model "
            f"has {limit} positions: give shorter context_lengths"
        )
    device = next(model.parameters()).device
    weights = sum(parameter.numel() for parameter in model.parameters())
    each = _token_bytes(model, places, places.layers)
    budget = settings.tokens_per_batch or fixed_tokens(weights, each, accelerator=device.type == "cuda")
    key = None
    if cache is not None:
        texts = [[r.edit, r.ids, r.at, r.targets, r.keep] for r in rows]
        sought = asdict(settings) | {"tokens_per_batch": budget}
        key = ["values", VERSION, weights_hash(model), texts, layer, site, sought, fast]
        key += [half.of_edits()] if half.of_edits() != "float32" else []

    def compute() -> dict[str, Tensor]:
        return _all(model, places, edits, rows, layer, site, settings, fast, budget)

    found = with_cache(cache, key, compute)
    diagnostics = []
    for i, edit in enumerate(edits):
        delta = float((found["value"][i] - found["initial"][i]).norm())
        diagnostics.append(
            {
                "fact_id": edit.fact.id,
                "final_loss": float(found["loss"][i]),
                "steps": int(found["steps"][i]),
                "target_probability": float(found["probability"][i]),
                "relative_delta": delta / float(found["initial"][i].norm()),
            }
        )
    return Values(
        found["value"], found["initial"], found["mean_key"], found["bare_key"], tuple(diagnostics),
        bool(found["fast"].all()), budget,
    )  # fmt: skip


def _all(
    model: PreTrainedModel, places: Anatomy, edits: Sequence[Edit], rows: Sequence[Row], layer: int, site: Site,
    settings: ValueSettings, fast: bool, budget: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Groups of edits within the budget of tokens, one after another. Raises UserError for one that does not fit."""
    of_edit: list[list[Row]] = [[] for _ in edits]
    for row in rows:
        of_edit[row.edit].append(row)
    sizes = [sum(len(row.ids) for row in mine) for mine in of_edit]
    parts: list[dict[str, Tensor]] = []
    start = 0
    while start < len(edits):
        stop = start + 1
        while stop < len(edits) and sum(sizes[start : stop + 1]) <= budget:
            stop += 1
        group = [row for i in range(start, stop) for row in of_edit[i]]
        tokens = sum(sizes[start:stop])
        # A replay keeps the tokens from the subject on, in the blocks above the edited one; whole forwards keep more.
        replayed = sum(len(row.ids) - row.at for row in group)
        least = replayed * _token_bytes(model, places, places.layers - layer - 1)
        room = available_memory(next(model.parameters()).device)
        if room is not None and least > room:
            raise _too_large(
                stop - start, tokens, f"about {least / 2**30:.1f} GiB, and {room / 2**30:.1f} are available"
            )
        try:
            parts.append(_optimise(model, places, group, start, stop - start, layer, site, settings, fast))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # On a processor it is a RuntimeError: "DefaultCPUAllocator: can't allocate memory".
            if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
                raise
            raise _too_large(stop - start, tokens, str(error).partition("\n")[0]) from None
        start = stop
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _too_large(edits: int, tokens: int, why: str) -> UserError:
    """What to change where a group of edits needs more memory than there is; another size would move numbers."""
    if edits == 1:
        return UserError(
            f"editor: out of memory at v* of one edit with {tokens} tokens ({why}); use fewer or shorter "
            "context_lengths"
        )
    return UserError(
        f"editor: out of memory at v* of {edits} edits with {tokens} tokens ({why}); use a smaller "
        f"editor.tokens_per_batch, such as {tokens // 2}, for all runs that are to be compared"
    )


@dataclass(frozen=True)
class _Piece:
    """A batch of rows and how each of its read positions counts."""

    batch: FastBatch | FullBatch
    edit: Tensor  # [rows] index of the row's edit within the group
    weight: Tensor  # [reads] share of this read in its edit's loss
    direct: Tensor  # [target reads] 1 at the target tokens of the bare direct prompt
    kept: Tensor | None = None  # [anchor reads, vocabulary] log-probabilities to be kept

    def without(self, active: list[bool]) -> _Piece | None:
        """Only the rows of edits that are still active; None where there are none."""
        rows = [i for i, edit in enumerate(self.edit.tolist()) if active[edit]]
        if len(rows) == len(self.batch.rows):
            return self
        if not rows:
            return None
        stays = torch.zeros(len(self.batch.rows), dtype=torch.bool, device=self.edit.device)
        stays[rows] = True
        reads = stays[self.batch.reads.row]
        n = self.batch.reads.n_targets
        assert self.kept is not None
        return _Piece(
            self.batch.select(rows), self.edit[stays], self.weight[reads], self.direct[reads[:n]], self.kept[reads[n:]]
        )


def _pieces(
    model: PreTrainedModel, places: Anatomy, rows: Sequence[Row], first_edit: int, v0: Tensor, keys: Tensor, site: Site,
    layer: int, fast: bool,
) -> tuple[list[_Piece], bool]:  # fmt: skip
    """Rows in batches of like length, after one plain forward that also gives each edit's v0 and its mean and bare
    key (filled in).

    A replay that does not give back the plain forward's states (an architecture whose blocks depend on something that
    their call does not show) is not used: whole forwards take its place.
    """
    fast = fast and places.uniform
    batched: list[FastBatch | FullBatch] = []
    statements: Counter[int] = Counter(row.edit for row in rows if row.targets)
    for members in batches([len(row.ids) - row.at for row in rows]):
        chosen = [rows[i] for i in members]
        states, final = States.of(model, places, chosen, layer, site, keys=fast)
        for b, row in enumerate(chosen):
            if row.targets:
                keys[0, row.edit - first_edit] += states.key[b].double() / statements[row.edit]
            if row.direct:
                v0[row.edit - first_edit] = states.value[b]
                keys[1, row.edit - first_edit] = states.key[b]
        fast = fast and len(states.keys) == places.layers - layer
        if fast:
            quick = FastBatch(model, places, chosen, layer, site, states)
            fast = quick.agrees(final) and (bool(batched) or _head_agrees(model, places, chosen[-1], final[-1]))
            batched.append(quick)
    if not fast:
        whole = batches([len(row.ids) for row in rows])
        batched = [FullBatch(model, places, [rows[i] for i in group], layer, site) for group in whole]
    anchors: Counter[int] = Counter(row.edit for row in rows for _ in row.keep)
    pieces = []
    for batch in batched:
        targets = [1.0 / (len(row.targets) * statements[row.edit]) for row in batch.rows for _ in row.targets]
        keep = [1.0 / anchors[row.edit] for row in batch.rows for _ in row.keep]
        edit = torch.tensor([row.edit - first_edit for row in batch.rows], device=v0.device)
        weight = torch.tensor(targets + keep, device=v0.device)
        direct = torch.tensor([float(row.direct) for row in batch.rows for _ in row.targets], device=v0.device)
        pieces.append(_Piece(batch, edit, weight, direct))
    return pieces, fast


@torch.no_grad()
def _head_agrees(model: PreTrainedModel, places: Anatomy, row: Row, final: Tensor) -> bool:
    """Whether final norm, head and soft cap, applied to the last block's output, give the model's own logits."""
    ids = torch.tensor([row.ids], device=final.device)
    expected = model(input_ids=ids, use_cache=False).logits[0, row.at :]
    found = places.logits(model, final[: len(expected)])
    return bool((found - expected).norm() <= 1e-3 * expected.norm())


def _optimise(
    model: PreTrainedModel, places: Anatomy, rows: Sequence[Row], first_edit: int, count: int, layer: int, site: Site,
    settings: ValueSettings, fast: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """v* of `count` edits from `first_edit` on, in step with one another."""
    device = next(model.parameters()).device
    v0 = torch.zeros(count, places.hidden, device=device)
    keys = torch.zeros(2, count, places.mlp_width, dtype=torch.float64, device=device)
    pieces, fast = _pieces(model, places, rows, first_edit, v0, keys, site, layer, fast)
    with half.products(half.of_edits(), model):
        return _search(pieces, v0, keys, first_edit, settings) | {"fast": torch.tensor([fast])}


def _search(
    pieces: list[_Piece], v0: Tensor, keys: Tensor, first_edit: int, settings: ValueSettings
) -> dict[str, Tensor]:
    """Adam on what is added to v0 [edits, d], each edit's until its loss is low enough. Clamped after each step."""
    count, device = len(v0), v0.device
    limit = settings.clamp * v0.norm(dim=1)
    decay = settings.weight_decay / v0.norm(dim=1).square()
    delta, mean, square = (torch.zeros_like(v0) for _ in range(3))
    loss, surprise = torch.zeros(count, device=device), torch.zeros(count, device=device)
    steps = torch.zeros(count, dtype=torch.long, device=device)
    active = torch.ones(count, dtype=torch.bool, device=device)
    what = f"v* of {count} edits" + (f" from {first_edit + 1} on" if first_edit else "")
    for step in range(1, settings.steps + 1):
        tell(what, step - 1, settings.steps)
        last = step == settings.steps
        leaf, grad = delta.clone().requires_grad_(not last), torch.zeros_like(delta)
        loss_now, surprise_now = decay * delta.norm(dim=1), torch.zeros_like(surprise)
        pieces = [_read(piece, leaf, settings.kl_factor, grad, loss_now, surprise_now) for piece in pieces]
        loss = torch.where(active, loss_now, loss)
        surprise = torch.where(active, surprise_now, surprise)
        steps += active
        still = active & (loss_now >= settings.stop)
        if last or not bool(still.any()):
            break
        grad = grad + (decay / delta.norm(dim=1).clamp(min=1e-30))[:, None] * delta
        mean = BETAS[0] * mean + (1 - BETAS[0]) * grad
        square = BETAS[1] * square + (1 - BETAS[1]) * grad * grad
        denominator = square.sqrt() / (1 - BETAS[1] ** step) ** 0.5 + EPSILON
        moved = delta - settings.lr / (1 - BETAS[0] ** step) * mean / denominator
        length = moved.norm(dim=1)
        moved = moved * torch.where(length > limit, limit / length.clamp(min=1e-30), 1.0)[:, None]
        delta = torch.where(still[:, None], moved, delta)
        if bool((active & ~still).any()):
            rest = [piece.without(still.tolist()) for piece in pieces]
            pieces = [piece for piece in rest if piece is not None]
        active = still
    return {
        "value": (v0 + delta).cpu(), "initial": v0.cpu(), "mean_key": keys[0].cpu(), "bare_key": keys[1].cpu(),
        "loss": loss.cpu(), "steps": steps.cpu(), "probability": (-surprise).exp().cpu(),
    }  # fmt: skip


def _read(piece: _Piece, delta: Tensor, kl_factor: float, gradient: Tensor, loss: Tensor, surprise: Tensor) -> _Piece:
    """Add the piece's share to each edit's gradient, loss and surprise at the direct prompt (nats).

    The vocabulary's width is met some reads at a time, and the derivative by the logits is written out: of the NLL
    p - 1[target], of KL(p || kept) p (log p - log kept - KL).
    """
    reads, derive = piece.batch.reads, delta.requires_grad
    with torch.set_grad_enabled(derive):
        states = piece.batch.read(delta[piece.edit])
    edit, n = piece.edit[reads.row], reads.n_targets
    upstream = torch.zeros_like(states) if derive else states
    kept = []
    at_once = HEAD_READS[delta.device.type]
    for start in range(0, len(states), at_once):
        part = slice(start, start + at_once)
        leaf = states[part].detach().requires_grad_(derive)
        with torch.set_grad_enabled(derive):
            logits = piece.batch.logits(leaf)
        logp = torch.log_softmax(logits.detach().float(), dim=-1)
        targets = max(0, min(n - start, len(logp)))
        index = torch.arange(targets, device=logp.device)
        token, weight = reads.token[start : start + targets], piece.weight[part]
        nll = -logp[index, token]
        now = logp[targets:]
        anchors = slice(start + targets - n, start + len(logp) - n)  # among the anchor reads
        before = now.clone() if piece.kept is None else piece.kept[anchors]
        ratio = now - before
        kl = (now.exp() * ratio).sum(-1)
        loss.index_add_(0, edit[part], torch.cat([nll, kl_factor * kl]) * weight)
        surprise.index_add_(0, edit[start : start + targets], nll * piece.direct[start : start + targets])
        if derive:
            slope = logp.exp_()
            slope[index, token] -= 1
            slope[targets:] *= kl_factor * (ratio - kl[:, None])
            slope *= weight[:, None]
            upstream[part] = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))[0]
        kept.append(before)
    if derive:
        gradient += torch.autograd.grad(states, delta, upstream)[0]  # of delta alone, whatever else asks for one
    return piece if piece.kept is not None else replace(piece, kept=torch.cat(kept))


def _token_bytes(model: PreTrainedModel, places: Anatomy, blocks: int) -> int:
    return token_bytes(blocks, places.hidden, places.mlp_width, model.config.get_text_config().vocab_size)


def available_memory(device: torch.device) -> int | None:
    """Bytes that may still be allocated, the page cache included; None where the system does not say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024
