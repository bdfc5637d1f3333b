"""Closed forms of rank-one and batch updates, in float64, by Cholesky factors and small systems.

Knows matrices only. Legend: K [n, m] keys, R [n, d] what the keys should give on top, C [m, m] covariance of keys;
an update is left [d, n] @ right [n, m], a map from keys to values whatever the layout of the parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A symmetric positive definite C, factored once and used for any number of batches. None: the identity."""

    factor: Tensor | None  # lower Cholesky factor [m, m], float64
    tokens: int = 0  # of the sample that C was read from

    def solve(self, keys: Tensor) -> Tensor:
        """C^-1 k for every key: [n, m] -> [n, m], float64."""
        keys = keys.double()
        if self.factor is None:
            return keys
        # Two triangular solves: cholesky_solve gives the same bits, but copies the factor first (7 times as long).
        half = torch.linalg.solve_triangular(self.factor, keys.T, upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, half, upper=True).T


@dataclass(frozen=True)
class Update:
    """left [d, n] @ right [n, m], float64."""

    left: Tensor
    right: Tensor


def rank_one_in_order(metric: Metric, direction_keys: Tensor, keys: Tensor, residuals: Tensor) -> Update:
    """ROME for edits one after another (Meng et al. 2022, equation 2), each against the weights the last one left.

    u_i = C^-1 k_i / |C^-1 k_i| from `direction_keys`; W_i = W_{i-1} + L_i u_i^T with L_i such that W_i gives the i-th
    value for the i-th of `keys`. residuals: values less what the unedited weights give, [n, d]. All n updates at once:
    L T = residuals^T with T[j, i] = u_j k_i for j <= i, a triangular system.
    """
    solved = metric.solve(direction_keys)
    directions = solved / solved.norm(dim=1, keepdim=True)
    triangle = torch.triu(directions @ keys.double().T)
    left = torch.linalg.solve_triangular(triangle, residuals.double().T, upper=True, left=False)
    return Update(left, directions)


def least_squares(metric: Metric, weight: float, keys: Tensor, residuals: Tensor) -> Update:
    """MEMIT (Meng et al. 2023, equation 14): R K^T (weight C + K K^T)^-1, keys as columns there.

    By Woodbury a system of n x n in the place of m x m: with A = (weight C)^-1, (weight C + K K^T)^-1 K =
    A K (I + K^T A K)^-1.
    """
    keys = keys.double()
    solved = metric.solve(keys) / weight
    small = torch.eye(len(keys), dtype=torch.float64, device=keys.device) + keys @ solved.T
    right = torch.cholesky_solve(solved, torch.linalg.cholesky((small + small.T) / 2))
    return Update(residuals.double().T, right)
