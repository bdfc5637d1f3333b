"""Safetensors files that hold a hash of their tensors, so that a flipped bit is noticed when they are read.

They appear whole or not at all. Knows nothing of what the tensors are.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from retention.cache_folders import share


def read_checked(file: Path) -> dict[str, Tensor] | str:
    """Read a file of `with_cache`; returns its tensors, or what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as handle:
            told = (handle.metadata() or {}).get("sha256")
            # Copied into memory of torch's own: where a mapped file begins moves the last bit of a product.
            found = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, ValueError) as error:
        return f"no whole safetensors file ({error})"
    return found if told == _digest(found) else "its checksum differs"


def write_checked(file: Path, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write a file whole; returns the tensors as the next reader gets them."""
    from safetensors.torch import save_file

    plain = {name: tensor.cpu().contiguous() for name, tensor in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        save_file(plain, temporary, {"sha256": _digest(plain)})
        share(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return plain


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
