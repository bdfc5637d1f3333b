"""v* in bfloat16: what is searched is rounded, what it starts from and what solves take is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from facts import EDITS, PREFIXES
from test_values import SETTINGS, difference, find

from retention import half
from retention.editors._base import preserved
from retention.editors._values import target_values
from retention.models import Loaded


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_only_the_search_is_rounded(loaded: Loaded, site: str, fast: bool) -> None:
    exact = find(loaded, site=site, fast=fast)
    with half.editing("bfloat16"):
        rounded = find(loaded, site=site, fast=fast)
    for name in ("initial", "mean_key", "bare_key"):
        assert torch.equal(getattr(rounded, name), getattr(exact, name))
    assert rounded.value.dtype == torch.float32
    assert rounded.fast == exact.fast
    assert 0 < difference(rounded.value, exact.value) < 0.2  # Adam divides by the size of small gradients
    for a, b in zip(rounded.diagnostics, exact.diagnostics, strict=True):
        assert a["final_loss"] == pytest.approx(b["final_loss"], rel=0.05)
    assert all(p.requires_grad and p.grad is None for p in loaded.model.parameters())


def test_a_stored_value_is_of_its_precision(loaded: Loaded, tmp_path: Path) -> None:
    def found() -> torch.Tensor:
        with preserved(loaded.model, 0):
            return target_values(
                loaded.model, loaded.tokenizer, EDITS, layer=1, site="mlp", settings=SETTINGS, prefixes=PREFIXES,
                cache=tmp_path,
            ).value  # fmt: skip

    exact = found()
    with half.editing("bfloat16"):
        rounded = found()
    assert not torch.equal(rounded, exact)
    assert torch.equal(found(), exact)
