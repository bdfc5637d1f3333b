"""PRUNE compresses the update's large singular values once, and replaces the update by the result."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from retention.editors.prune import Prune
from retention.types import Delta, LowRank
from tests.editors.test_rect import Matrix, factors


@pytest.mark.parametrize("base", [1.2, 2.0, math.e])
@pytest.mark.parametrize("low_rank", [True, False])
def test_against_numpy_in_float64(base: float, low_rank: bool) -> None:
    model = Matrix()
    update = LowRank(factors(5).left * torch.tensor([9.0, 4.0, 1.0, 0.3, 0.1]), factors(5).right)
    given = update if low_rank else update.dense()
    out = Prune(base=base).process(model, Delta({"weight": given}))  # type: ignore[arg-type]

    u, s, vh = np.linalg.svd(update.left.double().numpy() @ update.right.double().numpy(), full_matrices=False)
    limit = np.linalg.svd(model.weight.detach().double().numpy(), compute_uv=False)[0]
    assert s[0] > 2 * limit  # some are compressed
    assert s[4] < limit  # and some are not
    expected = np.where(
        s > limit, np.log(np.maximum(s, limit)) / math.log(base) - math.log(limit) / math.log(base) + limit, s
    )
    np.testing.assert_allclose(out.dense("weight").numpy(), (u * expected) @ vh, atol=1e-5)
    if low_rank:
        factor = out.updates["weight"]
        assert isinstance(factor, LowRank)
        assert factor.left.shape[1] == 5


def test_an_update_below_the_base_stays_as_it_is() -> None:
    update = LowRank(0.01 * factors(2).left, factors(2).right)
    out = Prune().process(Matrix(), Delta({"weight": update}))  # type: ignore[arg-type]
    torch.testing.assert_close(out.dense("weight"), update.dense(), rtol=1e-5, atol=1e-7)


def test_the_base_of_the_logarithm_must_exceed_one() -> None:
    with pytest.raises(ValidationError, match="base"):
        Prune(base=1.0)
