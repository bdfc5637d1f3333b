"""Intermediate values kept by content: equal weights, texts and settings find them again, nothing else does.

Knows nothing about what is kept. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retention.types import content_id


def weights_hash(model: nn.Module, before: str | None = None) -> str:
    """Hash of the parameters' and buffers' names, types and bytes, in order; `before`: of those before that module.

    The configuration is part of it: the same weights under another one (a rotary base, say) are another model.
    """
    digest = hashlib.sha256(str(getattr(model, "config", None)).encode())
    for name, tensor in model.state_dict().items():
        if before is not None and name.startswith(before + "."):
            break
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def with_cache(cache: Path | None, key: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` gives, from `cache` if it was computed with this key before.

    The versions of torch and transformers and the number of threads join the key: they move the last digits.
    """
    if cache is None:
        return compute()
    import transformers
    from safetensors.torch import load_file, save_file

    whole = content_id([key, torch.__version__, transformers.__version__, torch.get_num_threads()], 32)
    file = Path(cache) / f"{key[0]}-{whole}.safetensors"
    if not file.is_file():
        found = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}")
        os.close(handle)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, name)
        Path(name).replace(file)
    return load_file(file)
