"""Several processes that train one model together: which one this is, and how the whole model comes to each of them.

Knows neither who started them nor what they train. One process alone is rank 0 of 1.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def spread(trainer: Any, model: torch.nn.Module) -> None:
    """Give `model`, which is whole on every rank, the weights that the trainer has come to. All ranks call it."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # FSDP: whole on rank 0 alone
    device = trainer.accelerator.device
    with torch.no_grad():
        for name, value in model.state_dict().items():
            here = value.to(device)
            if rank() == 0:
                here.copy_(weights[name])
            torch.distributed.broadcast(here, src=0)
            value.copy_(here)


def agreed(value: bool) -> bool:
    """What rank 0 says. All ranks call it, and wait for it."""
    if size() == 1:
        return value
    said = [value]
    torch.distributed.broadcast_object_list(said, src=0)
    return bool(said[0])
