"""RECT keeps the largest relative changes, of the whole update or of one edit after another."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from retention.editors.rect import Rect, largest_relative
from retention.types import Delta, LowRank, UserError


class Matrix(torch.nn.Module):
    def __init__(self, rows: int = 12, columns: int = 9) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))


def factors(rank: int) -> LowRank:
    generator = torch.Generator().manual_seed(1)
    return LowRank(torch.randn(12, rank, generator=generator), torch.randn(rank, 9, generator=generator))


def by_sorting(update: torch.Tensor, weight: torch.Tensor, n: int) -> torch.Tensor:
    """The n entries of largest |update / weight|, one at a time, in float64."""
    out = torch.zeros_like(update)
    score = (update.double() / (weight.double() + 1e-8)).abs().flatten()
    for index in sorted(range(len(score)), key=lambda i: -float(score[i]))[:n]:
        out.view(-1)[index] = update.reshape(-1)[index]
    return out


@pytest.mark.parametrize(("keep", "n"), [(0.4, 43), (0.2, 22), (1.0, 108)])
def test_keeps_the_largest_relative_entries_of_the_total(keep: float, n: int) -> None:
    model = Matrix()
    update = factors(3)
    out = Rect(keep=keep).process(model, Delta({"weight": update})).dense("weight")  # type: ignore[arg-type]
    assert int((out != 0).sum()) == n
    assert torch.equal(out, by_sorting(update.dense(), model.weight.detach(), n))


def test_per_edit_scores_each_term_against_the_weights_so_far() -> None:
    model, update = Matrix(), factors(2)
    rect = Rect(keep=0.25, per_edit=True)
    out = rect.process(model, Delta({"weight": update}), rank_one_per_edit=True).dense("weight")  # type: ignore[arg-type]
    weight = model.weight.detach()
    first = by_sorting(torch.outer(update.left[:, 0], update.right[0]), weight, 27)
    second = by_sorting(torch.outer(update.left[:, 1], update.right[1]), weight + first, 27)
    torch.testing.assert_close(out, first + second, rtol=0, atol=0)
    assert not torch.equal(out, Rect(keep=0.25).process(model, Delta({"weight": update})).dense("weight"))  # type: ignore[arg-type]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="leave per_edit out"):
        Rect(per_edit=True).process(Matrix(), Delta({"weight": factors(2)}))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="keep"):
        Rect(keep=0)


def test_zero_weights_are_as_changeable_as_can_be() -> None:
    weight = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    update = torch.tensor([[1e-3, 0.5], [0.1, 0.2]])
    assert torch.equal(largest_relative(update, weight, 0.5), torch.tensor([[1e-3, 0.5], [0.0, 0.0]]))
