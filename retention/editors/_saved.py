"""Cache intermediate values by content: equal weights, texts and settings find them again, nothing else does.

Knows nothing of what the values are. Files appear whole or not at all, and hold a hash of their tensors, which is
checked when they are read: a flipped bit in a covariance would otherwise move every edit that uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retention.cache_folders import set_aside
from retention.checked_tensors import read_checked, write_checked
from retention.types import content_id

if TYPE_CHECKING:
    from retention.models import Anatomy


def weights_hash(model: nn.Module, places: Anatomy | None = None, up_to: int | None = None) -> str:
    """Hash of the parameters' and buffers' names, types and bytes, in order.

    `places` and `up_to`: of those that the keys of that layer depend on. A block may hold its norms after the second
    matrix of its MLP, so what counts is told by name, not by order. The configuration is part of it: the same weights
    under another one (a rotary base, say) are another model.
    """
    digest = hashlib.sha256(str(getattr(model, "config", None)).encode())
    above: tuple[str, ...] = ()
    if places is not None and up_to is not None:
        later = [places.block.format(layer) for layer in range(up_to + 1, places.layers)]
        names = [places.down.format(up_to), *later, places.head, places.final_norm, places.project_out]
        above = tuple(f"{name}." for name in names if name)
    for name, tensor in model.state_dict().items():
        if name.startswith(above):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def with_cache(cache: Path | None, key: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` gives, from `cache` if it was computed with this key before.

    The versions of torch and transformers, the number of threads and the kind of device join the key: they move the
    last digits.
    """
    if cache is None:
        return compute()
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = content_id([key, torch.__version__, transformers.__version__, torch.get_num_threads(), device], 32)
    file = Path(cache) / f"{key[0]}-{whole}.safetensors"
    if file.is_file():
        found = read_checked(file)
        if not isinstance(found, str):
            return found
        set_aside(file, found)
    return write_checked(file, compute())
