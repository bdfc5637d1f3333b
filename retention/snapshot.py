"""Nested values with tensors as a folder, so that work can be taken up again: safetensors and JSON, never a pickle.

A snapshot appears whole, by one rename, and is read only if every checksum fits. Numbers come back bit for bit. Does
not know what is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1  # raised when the layout changes: others' snapshots are then no snapshots
LARGEST = 1 << 30  # bytes of tensors in one file, since each is copied in memory while it is written


def save(folder: Path, value: Any) -> None:
    """Write None, numbers, texts, tensors, and lists, tuples and dicts of them. Raises TypeError for anything else."""
    tensors: list[Tensor] = []
    shape = json.dumps(_down(value, tensors))
    work = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    work.mkdir(parents=True)
    try:
        (work / "value.json").write_text(shape, encoding="utf-8")
        for number, part in enumerate(_parts(tensors)):
            save_file(part, work / f"tensors-{number:03d}.safetensors")
        mark = {"format": FORMAT, "sha256": {path.name: checksum(path) for path in sorted(work.iterdir())}}
        (work / "complete.json").write_text(json.dumps(mark), encoding="utf-8")
        os.rename(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def load(folder: Path) -> Any:
    """What was saved, on the devices it was on. Raises ValueError if it is no snapshot, not as it was, or they lack."""
    try:
        mark = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        found = {path.name: checksum(path) for path in folder.iterdir() if path.name != "complete.json"}
        if mark != {"format": FORMAT, "sha256": found}:
            raise ValueError(f"{folder}: is not what was saved, or was saved in another format")
        tensors: dict[str, Tensor] = {}
        for name in found:
            if name.endswith(".safetensors"):
                tensors |= load_file(folder / name)
        return _up(json.loads((folder / "value.json").read_text(encoding="utf-8")), tensors)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        # The last two: torch, of a device that is not here. CUDA without memory is a RuntimeError too.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{folder}: {error}") from None


@torch.no_grad()
def put_back(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Into tensors that are there, by name."""
    for name, value in saved.items():
        tensors[name].copy_(value)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rng_state() -> dict[str, Any]:
    """The state of every generator that training draws from."""
    name, keys, *rest = np.random.get_state(legacy=True)
    found: dict[str, Any] = {"python": random.getstate(), "numpy": (name, [int(key) for key in keys], *rest)}
    found["torch"] = torch.random.get_rng_state()
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


# ------------------------------------------------------------------------------------------------ nested values


def _down(value: Any, tensors: list[Tensor]) -> Any:
    """As JSON has it; tensors by number. Dicts as pairs, since their keys may be numbers."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"tensor": [len(tensors) - 1, str(value.device), list(value.stride())]}
    if isinstance(value, dict):
        return {"dict": [[_down(key, tensors), _down(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_down(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_down(item, tensors) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        return value.item()
    raise TypeError(f"cannot be saved: {type(value).__name__}")


def _up(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_up(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        number, device, strides = inner
        found = tensors[str(number)]
        # As it lay in memory: products of a transposed matrix are rounded otherwise.
        if list(found.stride()) != strides and 0 not in strides:
            found = torch.empty_strided(found.shape, strides, dtype=found.dtype).copy_(found)
        return found.to(device)
    if kind == "tuple":
        return tuple(_up(item, tensors) for item in inner)
    return {_up(key, tensors): _up(item, tensors) for key, item in inner}


def _parts(tensors: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    """By number, in portions of at most LARGEST bytes, a larger tensor alone."""
    part: dict[str, Tensor] = {}
    size = 0
    places: set[int] = set()
    for number, tensor in enumerate(tensors):
        bytes_ = tensor.numel() * tensor.element_size()
        if part and size + bytes_ > LARGEST:
            yield part
            part, size, places = {}, 0, set()
        own = tensor.contiguous()
        if own.numel() and own.untyped_storage().data_ptr() in places:  # safetensors takes no two views of one memory
            own = own.clone()
        places.add(own.untyped_storage().data_ptr())
        part[str(number)] = own
        size += bytes_
    if part:
        yield part
