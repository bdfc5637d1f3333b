"""Singular values of an update, dense or of low rank. Knows nothing of how it was made."""

from __future__ import annotations

import torch
from torch import Tensor

from retention.types import LowRank


def singular_values(update: Tensor | LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float64: u [rows, r], s [r], vh [r, columns]. Of factors without forming their product."""
    if not isinstance(update, LowRank):
        u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
        return u, s, vh
    q_left, r_left = torch.linalg.qr(update.left.double())
    q_right, r_right = torch.linalg.qr(update.right.double().T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vh @ q_right.T
