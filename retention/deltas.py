"""Edits as files: written from a study or by `retention edit`, put into a model folder, and taken out again exactly.

float32 weights do not give w + d - d = w (1.1 % of them do not, measured), so a folder that an edit was put into keeps,
beside the factors, the few values that subtraction would miss. Weights are safetensors only. Knows no editor.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from retention.cache_folders import appearing, share
from retention.models import DTYPES, Loaded, load_model
from retention.types import Delta, LowRank, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IN_FOLDER = "retention_delta.safetensors"  # in a model folder: the edit that its weights hold


def save_delta(
    path: Path, delta: Delta, soft_prompt: Tensor | None = None, undo: dict[str, Tensor] | None = None, **meta: str
) -> None:
    """Factors as `<parameter>:left` and `<parameter>:right`, dense updates under the parameter's own name; float32.

    A soft prompt, which is no change of weights, is `:soft_prompt`.
    """
    tensors = {} if soft_prompt is None else {":soft_prompt": soft_prompt}
    for name, update in delta.updates.items():
        if isinstance(update, LowRank):
            tensors[f"{name}:left"], tensors[f"{name}:right"] = update.left, update.right
        else:
            tensors[name] = update
    plain = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(plain | (undo or {}), temporary, {"format": "retention-delta", **meta})
    share(temporary)
    os.replace(temporary, path)


def load_delta(path: Path) -> tuple[Delta, Tensor | None]:
    """What `save_delta` wrote. Raises UserError for a missing, damaged or foreign file."""
    tensors, _ = _read(path)
    updates: dict[str, Any] = {n: t for n, t in tensors.items() if ":" not in n}
    for name in sorted({n.rpartition(":")[0] for n in tensors if n.endswith((":left", ":right"))}):
        left, right = (tensors.get(f"{name}:{side}") for side in ("left", "right"))
        if left is None or right is None or left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise UserError(f"{path}: is damaged: the factors of {name} do not fit each other")
        updates[name] = LowRank(left, right)
    return Delta(updates), tensors.get(":soft_prompt")


def made_for(path: Path) -> str | None:
    """Content hash of the model that the update was made for, where the file tells it."""
    return _read(path)[1].get("base")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `retention edit MODEL --delta --out FILE.safetensors` writes one")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged, or no safetensors file: {error}") from None
    if meta.get("format") != "retention-delta":
        raise UserError(f"{path}: holds tensors, but not an edit written by retention")
    return tensors, meta


def write_edited(loaded: Loaded, delta: Delta, out: Path, dtype: str = "float32") -> dict[str, float]:
    """Write the edited model as an ordinary Hugging Face folder, with what is needed to take the edit out again.

    `dtype`: of the weights in the folder. Returns `lost`: the part of the update's norm that rounding to it loses, and
    `unmoved`: the share of the weights it was to move that stayed. The model in memory is left as it was. Raises
    UserError if the model's folder already holds an edit (see `refuse_edited`), or the update is not finite: a study
    records an edit that diverged, a model folder would hide it.
    """
    refuse_edited(loaded.folder)
    for name, update in delta.updates.items():
        if not math.isfinite(Delta({name: update}).norm()):
            raise UserError(f"{out}: not written: the update of {name} holds numbers that are not finite")
    model = loaded.model
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in delta.updates if name in parameters}
    undo: dict[str, Tensor] = {}
    lost = moved = unmoved = size = 0.0
    with delta.applied(model), _publishing(out) as folder:
        for name, old in before.items():
            wanted, rounded = parameters[name].detach(), parameters[name].detach().to(DTYPES[dtype]).float()
            start = old.to(DTYPES[dtype]).float()
            lost += float((rounded - start - (wanted - old)).double().pow(2).sum())
            size += float((wanted - old).double().pow(2).sum())
            moved += float((wanted != old).sum())
            unmoved += float(((wanted != old) & (rounded == start)).sum())
            wrong = (rounded - delta.dense(name).to(rounded)) != start
            undo[f"{name}:undo_index"] = wrong.flatten().nonzero().flatten().cpu()
            undo[f"{name}:undo_value"] = start[wrong].cpu()
            undo[f"{name}:undo_base"] = torch.tensor(list(_digest(start)), dtype=torch.uint8)
            undo[f"{name}:undo_hash"] = torch.tensor(list(_digest(rounded)), dtype=torch.uint8)
        _save(model, loaded, folder, dtype)
        save_delta(folder / IN_FOLDER, delta, undo=undo, dtype=dtype)
    return {"lost": (lost / size) ** 0.5 if size else 0.0, "unmoved": unmoved / moved if moved else 0.0}


def refuse_edited(folder: Path | None) -> None:
    """Raise UserError if an edit was put into the model folder: the record of a second would take the first's place."""
    if folder is not None and (folder / IN_FOLDER).is_file():
        raise UserError(
            f"{folder}: holds an edit already, which could not be taken out again once another is written over it; "
            f"take it out first (retention revert {folder} --out FOLDER), or write all edits at once"
        )


def revert(name: Path, out: Path) -> None:
    """Write the model as it was before the edit that `write_edited` put into its folder, bit for bit.

    Raises UserError if there is no such folder, if it holds no such edit, or if its edited matrices have moved since
    (a fine-tune).
    """
    if not name.is_dir():
        near = difflib.get_close_matches(name.name, [p.name for p in name.parent.glob("*") if p.is_dir()], n=1)
        raise UserError(
            f"{name}: no such folder{f'; did you mean {name.parent / near[0]}?' if near else ''}; expected one that "
            "`retention edit` or `retention apply` wrote"
        )
    if not (name / IN_FOLDER).is_file():
        raise UserError(f"{name}: holds no edit to take out: there is no {IN_FOLDER} in it")
    tensors, meta = _read(name / IN_FOLDER)
    delta, _ = load_delta(name / IN_FOLDER)
    room_for(out)
    loaded = load_model(name)
    parameters = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for parameter in delta.updates:
            weight = parameters.get(parameter)
            kept = [f"{parameter}:undo_{part}" for part in ("hash", "base", "index", "value")]
            if weight is None or any(key not in tensors for key in kept):
                lacks = f"the model has no {parameter}" if weight is None else f"it has no {kept[0]} and the like"
                raise UserError(
                    f"{name}: {IN_FOLDER} does not say how to take its edit out of this model ({lacks}); only a folder "
                    "that `retention edit` or `retention apply` wrote, with nothing put in, can be reverted"
                )
            if list(_digest(weight)) != tensors[f"{parameter}:undo_hash"].tolist():
                raise UserError(
                    f"{name}: {parameter} is not as the edit left it (was the model fine-tuned since?), so the edit "
                    "cannot be taken out exactly"
                )
            update, wrong = delta.dense(parameter), tensors[f"{parameter}:undo_index"]
            if update.shape != weight.shape or (len(wrong) and int(wrong.max()) >= weight.numel()):
                raise UserError(f"{name}: {IN_FOLDER} is damaged: the update of {parameter} has another shape")
            restored = (weight - update.to(weight)).flatten()
            restored[tensors[f"{parameter}:undo_index"].to(weight.device)] = tensors[f"{parameter}:undo_value"].to(
                weight
            )
            if list(_digest(restored)) != tensors[f"{parameter}:undo_base"].tolist():
                raise UserError(
                    f"{name}: {parameter} cannot be restored bit for bit on this machine (its products round otherwise "
                    "than where the edit was put in); revert it there"
                )
            weight.copy_(restored.view_as(weight))
    with _publishing(out) as folder:
        _save(loaded.model, loaded, folder, meta["dtype"])


def room_for(out: Path) -> None:
    """Make the folder that `out` is to stand in. Raises UserError if the name is taken, or where nothing can be made.

    Called before any work is done, so that no work is lost for a name.
    """
    try:
        if os.path.lexists(out):
            raise UserError(f"--out: {out}: exists already; give a new name")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
        os.stat(out)  # too long a name is told here
    except FileNotFoundError as error:
        if error.filename != str(out):
            raise UserError(f"--out: {out}: cannot be made: {error.strerror}") from None
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be made: {error.strerror}") from None


def _digest(weight: Tensor) -> bytes:
    return hashlib.sha256(weight.detach().float().cpu().contiguous().numpy().tobytes()).digest()


def _save(model: PreTrainedModel, loaded: Loaded, folder: Path, dtype: str) -> None:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        cast: dict[int, Tensor] = {}  # tied weights stay one tensor
        state = {n: cast.setdefault(t.data_ptr(), t.to(DTYPES[dtype])) for n, t in model.state_dict().items()}
        kept = model.config.dtype
        model.config.dtype = DTYPES[dtype]
        model.save_pretrained(folder, state_dict=state)
        model.config.dtype = kept
    finally:
        if bars:
            logging.enable_progress_bar()
    loaded.tokenizer.save_pretrained(folder)
    if loaded.corpus:
        (folder / "corpus.txt").write_text("".join(f"{line}\n" for line in loaded.corpus), encoding="utf-8")


@contextmanager
def _publishing(out: Path) -> Iterator[Path]:
    """A folder that appears under its name when all is written. Raises UserError if the name is taken."""
    room_for(out)
    with appearing(out) as folder:
        yield folder
