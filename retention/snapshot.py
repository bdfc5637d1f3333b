"""Nested values with tensors as a folder, so that work can be taken up again: raw numbers and JSON, never a pickle.

A snapshot appears whole, by one rename, and is read only if every checksum fits. Numbers come back bit for bit. Does
not know what is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 2  # raised when the layout changes: others' snapshots are then no snapshots
TENSORS = "tensors.bin"  # one behind the other, as value.json tells
PORTION = 1 << 22  # bytes that are hashed and written at once: what stays in a processor's cache


@dataclass(frozen=True)
class Taken:
    """A value as it was at one moment, still to be written."""

    shape: str  # JSON; tensors by number
    tensors: tuple[Tensor, ...]  # contiguous

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def copied(self) -> Taken:
        """With tensors of its own, in main memory: what goes on in others leaves it as it is."""
        return Taken(self.shape, tuple(torch.empty_like(t, device="cpu").copy_(t) for t in self.tensors))

    def write(self, folder: Path) -> None:
        """Raises OSError; the folder is then not there."""
        work = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        work.mkdir(parents=True)
        try:
            sums = {"value.json": _written(work / "value.json", [self.shape.encode()])}
            sums[TENSORS] = _written(work / TENSORS, map(_bytes, self.tensors))
            mark = {"format": FORMAT, "sha256": sums}
            (work / "complete.json").write_text(json.dumps(mark), encoding="utf-8")
            os.rename(work, folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def taken(value: Any) -> Taken:
    """None, numbers, texts, tensors, and lists, tuples and dicts of them. Raises TypeError for anything else.

    Tensors are the value's own where they are contiguous.
    """
    tensors: list[Tensor] = []
    shape = json.dumps({"value": _down(value, tensors), "tensors": [[_name(t), list(t.shape)] for t in tensors]})
    return Taken(shape, tuple(tensor.contiguous() for tensor in tensors))


def load(folder: Path) -> Any:
    """What was saved, on the devices it was on. Raises ValueError if it is no snapshot, not as it was, or they lack."""
    try:
        mark = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        if mark["format"] != FORMAT or {p.name for p in folder.iterdir()} != {*mark["sha256"], "complete.json"}:
            raise ValueError(f"{folder}: is not what was saved, or was saved in another format")
        text = (folder / "value.json").read_bytes()
        shape = json.loads(text)
        tensors, digest = _read(folder / TENSORS, shape["tensors"])
        if mark["sha256"] != {"value.json": hashlib.sha256(text).hexdigest(), TENSORS: digest}:
            raise ValueError(f"{folder}: is not what was saved")
        return _up(shape["value"], tensors)
    except (OSError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, AssertionError) as error:
        # The last two: torch, of a device that is not here. CUDA without memory is a RuntimeError too.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{folder}: {error}") from None


def _written(path: Path, parts: Iterable[Any]) -> str:
    """The checksum of what is written, without reading it again."""
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), PORTION):
                portion = view[start : start + PORTION]
                digest.update(portion)
                while portion:
                    portion = portion[file.write(portion) :]
    return digest.hexdigest()


def _read(path: Path, about: Sequence[Any]) -> tuple[list[Tensor], str]:
    """Tensors by their dtypes and shapes, and the checksum of the file."""
    digest = hashlib.sha256()
    tensors = []
    with path.open("rb", buffering=0) as file:
        left = path.stat().st_size
        for name, shape in about:
            dtype = getattr(torch, name)
            size = math.prod(shape) * dtype.itemsize
            if size > left:
                raise ValueError(f"{path}: is shorter than its tensors")
            left -= size
            tensor = torch.empty(shape, dtype=dtype)
            view = memoryview(_bytes(tensor))
            for start in range(0, len(view), PORTION):
                portion = view[start : start + PORTION]
                rest = portion
                while rest:
                    rest = rest[file.readinto(rest) or len(rest) :]
                digest.update(portion)
            tensors.append(tensor)
        digest.update(file.read())
    return tensors, digest.hexdigest()


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy()


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


def _up(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, list):
        return [_up(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        number, device, strides = inner
        found = tensors[number]
        # As it lay in memory: products of a transposed matrix are rounded otherwise.
        if list(found.stride()) != strides and 0 not in strides:
            found = torch.empty_strided(found.shape, strides, dtype=found.dtype).copy_(found)
        return found.to(device)
    if kind == "tuple":
        return tuple(_up(item, tensors) for item in inner)
    return {_up(key, tensors): _up(item, tensors) for key, item in inner}
