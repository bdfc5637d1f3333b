"""Pretrain at any size, on facts and text, on a CPU or a GPU: what `retention pretrain` does.

Documents are packed into rows without being cut; positions begin anew with each, and no document sees another. Taken up
again after a kill: on a CPU the weights are then those of an undisturbed run, bit for bit. Reports the loss on held-out
passages, tokens a second, and what fraction of the matrix products' measured ceiling that is. The folder is
as pretrain.py describes it. Knows no source of facts and no data set.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retention.cache_folders import appearing
from retention.types import Fact, UserError, content_id
from retention.world.pretrain import recall_by_class, write_model
from retention.world.settings import Pretraining
from retention.world.stream import Material, stream, warm_facts, wordings
from retention.world.tokenizer import bpe_tokenizer
from retention.world.train import IGNORE, Progress, documents, new_model, one_thread, optimizers, scheduled

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VERSION = 1  # raised whenever equal settings would give other weights
OPEN_ROWS = 64  # rows that still take documents while packing
TOKENIZER_PASSAGES = 20_000  # passages that the tokenizer is trained on, at most
END = "."


def settings_of(overrides: Sequence[str]) -> Pretraining:
    """Settings from `key=value` texts. Raises UserError with all that is wrong with them."""
    from retention.explain import explain
    from retention.yaml_file import apply_overrides

    written = apply_overrides({}, overrides)
    if "grid" in written:
        raise UserError(f"pretrain: one value each, no sweep: {', '.join(written['grid'])}")
    try:
        return Pretraining.model_validate_json(json.dumps(written), strict=True)
    except ValidationError as error:
        raise UserError("\n".join(f"pretrain: {line}" for line in explain(error, Pretraining, written, {}))) from None


def pretrain_files(
    facts: Sequence[Fact],
    text: Sequence[str],
    out: Path,
    settings: Pretraining,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pretrain on facts and passages of text, publish the folder `out`, and return its report (world.json).

    Each fact is stated `exposures` times (`warm_exposures` more where it is of the first part), each passage read once,
    but `heldout_passages` of them: the held-out loss is of these. Interrupted, call it again with the same arguments.
    Raises UserError for a folder in use, or for an interrupted pretraining of something else.
    """
    if out.exists():
        raise UserError(f"--out {out}: this folder exists already; name a new one or remove it")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, and torch finds no GPU here; use device=cpu")
    passages, heldout = _apart(text, settings)
    warm = warm_facts(facts, settings)
    stated = tuple(replace(f, exposures=settings.exposures + settings.warm_exposures * (f.id in warm)) for f in facts)
    identity = _identity(stated, passages, heldout, settings)
    with one_thread() if settings.device == "cpu" else nullcontext():
        material = Material(facts=stated, warm=warm, text=passages, end=END)
        sentences, n_first = stream(material, settings)
        spoken = (sentence for fact in stated for sentence in wordings(fact, END))
        tokenizer = bpe_tokenizer([*spoken, *passages[:TOKENIZER_PASSAGES]], settings.vocabulary, 4 * settings.context)
        parts = [_rows(s, tokenizer, settings) for s in (sentences[:n_first], sentences[n_first:])]
        work = out.parent / f".{out.name}.part"
        trained = _train(parts, tokenizer, settings, identity, work, out, progress)
        model = trained.model
        report: dict[str, Any] = {
            "heldout_loss": _loss(model, _rows(heldout, tokenizer, settings), tokenizer, settings),  # nats a token
            "heldout_passages": len(heldout),
            "recall": recall_by_class(model, tokenizer, stated),
            "facts": len(stated),
            "steps": trained.steps,
            "tokens": trained.tokens,  # that a loss was read at
            "padding": round(trained.padding, 4),  # share of the rows' tokens
            "final_loss": trained.last_loss,  # of the last tenth of the steps, nats a token
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(trained.seconds, 1),  # of the steps; of the processor where device is cpu
            "tokens_per_second": round(trained.tokens / trained.seconds),
            **_against_ceiling(model, trained, settings),
            "device": torch.cuda.get_device_name() if settings.device == "cuda" else "cpu, one thread",
            "settings": settings.model_dump(),
        }
        with appearing(out) as folder:
            write_model(folder, model.cpu(), tokenizer, sentences, stated, settings.seed, report)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _apart(text: Sequence[str], settings: Pretraining) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(passages to train on, held-out passages), drawn by seed; equal passages stay on one side."""
    known = list(dict.fromkeys(text))
    random.Random(f"passages {settings.seed}").shuffle(known)
    if len(known) <= settings.heldout_passages:
        return tuple(known), ()
    heldout, rest = known[: settings.heldout_passages], known[settings.heldout_passages :]
    return tuple(rest if settings.passages is None else rest[: settings.passages]), tuple(heldout)


def _identity(facts: Sequence[Fact], text: Sequence[str], heldout: Sequence[str], settings: Pretraining) -> str:
    """Content key of a pretraining: what a checkpoint must agree with to be taken up."""
    texts = hashlib.sha256("\n".join((*text, "", *heldout)).encode()).hexdigest()
    told = [[f.subject, f.prompt, f.target, f.paraphrases, f.phrasings, f.exposures] for f in facts]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    counted = settings.model_dump(exclude={"checkpoint_seconds"})
    return content_id([VERSION, counted, told, texts, versions])


# ------------------------------------------------------------------------------------------------ rows


def _rows(sentences: Sequence[str], tokenizer: PreTrainedTokenizerFast, settings: Pretraining) -> Tensor:
    """Token ids [n, context] of sentences in their order, grouped into documents; n is a multiple of `rows`."""
    ids = tokenizer(list(sentences), add_special_tokens=False, verbose=False)["input_ids"] if sentences else []
    room = settings.context - 2
    pieces = [piece[at : at + room] for piece in ids for at in range(0, len(piece), room)]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(bos, int)
    assert isinstance(eos, int)
    assert isinstance(pad, int)
    return pack(documents(pieces, settings, bos, eos), settings.context, pad, settings.rows)


def pack(docs: Sequence[Sequence[int]], context: int, pad: int, multiple: int = 1) -> Tensor:
    """Ids [n, context]: each document whole in one row, about in their order, the rest padding; n: of `multiple`.

    First fit among the rows that are open; the fullest of 64 is closed. A document longer than a row is an assertion.
    """
    done: list[list[int]] = []
    rows: list[list[int]] = []
    for doc in docs:
        assert len(doc) <= context, f"a document of {len(doc)} tokens in rows of {context}"
        fits = next((row for row in rows if len(row) + len(doc) <= context), None)
        if fits is not None:
            fits.extend(doc)
            continue
        if len(rows) == OPEN_ROWS:
            fullest = max(range(len(rows)), key=lambda i: len(rows[i]))
            done.append(rows.pop(fullest))
        rows.append(list(doc))
    done += rows
    done += [[] for _ in range(-len(done) % multiple)]
    return torch.tensor([row + [pad] * (context - len(row)) for row in done], dtype=torch.long).view(-1, context)


def positions(ids: Tensor, bos: int) -> Tensor:
    """Position of each token [rows, context] in its own document: what keeps documents of a row apart.

    transformers takes positions that begin anew for packed sequences, and masks attention between them.
    """
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return places - places.masked_fill(ids != bos, 0).cummax(1).values


def labels_of(ids: Tensor, bos: int, pad: int) -> Tensor:
    """What follows each token but the last [rows, context - 1]; nothing where another document or padding does."""
    following = ids[:, 1:]
    return following.masked_fill((following == bos) | (following == pad), IGNORE)


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True, kw_only=True)
class _Trained:
    model: LlamaForCausalLM
    steps: int
    tokens: int
    padding: float
    seconds: float
    last_loss: float


def _train(
    parts: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerFast,
    settings: Pretraining,
    identity: str,
    work: Path,
    out: Path,
    progress: Progress | None,
) -> _Trained:
    """One pass over the rows of the first part, then of the second; from the last checkpoint where there is one."""
    bos, pad = int(tokenizer.bos_token_id or 0), int(tokenizer.pad_token_id or 0)
    rows = torch.cat(list(parts))
    total = len(rows) // settings.rows
    model = new_model(settings, tokenizer).train()
    model.to(torch.device(settings.device))  # type: ignore[arg-type]
    steppers = optimizers(model, settings)
    peaks = [stepper.param_groups[0]["lr"] for stepper in steppers]
    loss_of = _loss_function(model, bos, pad, settings)
    checkpoint = _Checkpoint(work / "checkpoint.safetensors", identity, out)
    at, losses, seconds = checkpoint.load(model, steppers)
    clock = _clock(settings.device)
    saved, started = time.monotonic(), clock()
    for step in range(at, total):
        for stepper, peak in zip(steppers, peaks, strict=True):
            stepper.param_groups[0]["lr"] = peak * scheduled(step, total, settings.warmup)
        ids = rows[step * settings.rows : (step + 1) * settings.rows].to(settings.device)
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if settings.device == "cpu" or step % 20 == 0:
            losses[-20:] = [float(x) for x in losses[-20:]]
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"pretraining: the loss is {losses[-1]} at step {step + 1}; lower matrix_lr and vector_lr, then "
                    f"remove {work} and start again"
                )
        if progress is not None:
            progress(step + 1, total)
        if time.monotonic() - saved > settings.checkpoint_seconds:
            losses = [float(x) for x in losses]
            checkpoint.save(model, steppers, step + 1, losses, seconds + clock() - started)
            saved = time.monotonic()
    seconds += clock() - started
    last = [float(x) for x in losses[-max(1, total // 10) :]]
    return _Trained(
        model=model.eval(),
        steps=total,
        tokens=int((labels_of(rows, bos, pad) != IGNORE).sum()),
        padding=float((rows == pad).float().mean()),
        seconds=max(seconds, 1e-9),
        last_loss=sum(last) / len(last),
    )


def _loss_function(model: LlamaForCausalLM, bos: int, pad: int, settings: Pretraining) -> Callable[[Tensor], Tensor]:
    """Mean loss of a batch of rows, nats a token."""

    def loss_of(ids: Tensor) -> Tensor:
        places = positions(ids, bos)
        with torch.autocast(settings.device, dtype=torch.bfloat16, enabled=settings.bf16):
            logits = model(input_ids=ids[:, :-1], position_ids=places[:, :-1], use_cache=False).logits
        labels = labels_of(ids, bos, pad)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)

    return torch.compile(loss_of, dynamic=False) if settings.compile else loss_of


def _clock(device: str) -> Callable[[], float]:
    """Seconds: of the processor on a CPU, which others may share; by the wall, all work done, on a GPU."""
    if device == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.monotonic()

    return now


class _Checkpoint:
    """Weights and optimizers' states at a step, in one file that appears whole or not at all."""

    def __init__(self, path: Path, identity: str, out: Path) -> None:
        self.path, self.identity, self.out = path, identity, out

    def save(
        self,
        model: LlamaForCausalLM,
        steppers: Sequence[torch.optim.Optimizer],
        step: int,
        losses: Sequence[float],
        seconds: float,
    ) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        for i, stepper in enumerate(steppers):
            for index, state in stepper.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{index}.{key}": value for key, value in state.items()}
        done = {"step": step, "losses": list(losses), "seconds": seconds}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(own, new, metadata={"identity": self.identity, "done": json.dumps(done)})
        os.replace(new, self.path)

    def load(self, model: LlamaForCausalLM, steppers: Sequence[torch.optim.Optimizer]) -> tuple[int, list[Any], float]:
        """(steps done, their losses, seconds they took), and the states put in place; 0 without a checkpoint."""
        if not self.path.is_file():
            return 0, [], 0.0
        with safe_open(self.path, "pt") as file:
            about = file.metadata()
            if about["identity"] != self.identity:
                raise UserError(
                    f"--out {self.out}: {self.path.parent} holds an interrupted pretraining of other facts, text or "
                    "settings; remove it, or name another folder"
                )
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(f"model.{name}"))
            states: dict[int, dict[int, dict[str, Tensor]]] = {i: {} for i in range(len(steppers))}
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                if key.startswith("optimizer."):
                    _, i, index, name = key.split(".", 3)
                    states[int(i)].setdefault(int(index), {})[name] = file.get_tensor(key)
        for i, stepper in enumerate(steppers):
            stepper.load_state_dict({**stepper.state_dict(), "state": states[i]})
        done = json.loads(about["done"])
        return done["step"], done["losses"], done["seconds"]


# ------------------------------------------------------------------------------------------------ measuring


@torch.inference_mode()
def _loss(
    model: LlamaForCausalLM, rows: Tensor, tokenizer: PreTrainedTokenizerFast, settings: Pretraining
) -> float | None:
    """Mean loss over all tokens of the rows, nats a token, in float32; None without rows."""
    bos, pad = int(tokenizer.bos_token_id or 0), int(tokenizer.pad_token_id or 0)
    total, n = 0.0, 0
    for at in range(0, len(rows), settings.rows):
        ids = rows[at : at + settings.rows].to(settings.device)
        places = positions(ids, bos)[:, :-1]
        logits = model(input_ids=ids[:, :-1], position_ids=places, use_cache=False).logits
        labels = labels_of(ids, bos, pad).flatten()
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")
        )
        n += int((labels != IGNORE).sum())
    return round(total / n, 4) if n else None


def _against_ceiling(model: LlamaForCausalLM, trained: _Trained, settings: Pretraining) -> dict[str, Any]:
    """The rate of training's matrix products, the best rate of one large product here, and their ratio.

    A product of a training step takes 6 operations for each weight and token, forward and backward (Kaplan et al. 2020,
    arXiv:2001.08361); attention's own products and the optimizer's are not counted, padding is no token.
    """
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the tied embedding once: as the head
    rate = 6 * weights * trained.tokens / trained.seconds
    ceiling = product_ceiling(settings.device, torch.bfloat16 if settings.bf16 else torch.float32)
    return {
        "products_per_second": float(f"{rate:.4g}"),
        "ceiling_per_second": float(f"{ceiling:.4g}"),
        "fraction_of_ceiling": round(rate / ceiling, 4),
    }


def product_ceiling(device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating-point operations a second of a large square matrix product, the best of `repeats`."""
    size = 8192 if device == "cuda" else 2048
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = _clock(device)
    best = math.inf
    for _ in range(repeats):
        started = clock()
        torch.mm(one, other)
        best = min(best, clock() - started)
    return 2 * size**3 / best
