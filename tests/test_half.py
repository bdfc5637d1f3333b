"""Bfloat16 where a study asks for it: the head's loss against float64 and against trl's own, keys, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import retention
from retention import half, ids, planning, preflight, trainers
from retention.half import WholeHead
from retention.study import Study
from retention.types import UserError
from tests.small_study import ROME, TUNE, one
from tests.tiny import build

N, D, V = 23, 16, 97


def drawn() -> tuple[torch.Tensor, ...]:
    """Numbers that bfloat16 holds exactly, so that what is left is the rounding of the products."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().float()

    return some(N, D), some(V, D) * 0.5, some(V), torch.randint(0, V, (N,), generator=generator), some(N)


def exact(
    hidden: Any, weight: Any, bias: Any, targets: Any, by: Any, temperature: float, cap: Any, scale: float
) -> Any:
    """The same in float64, by torch's own softmax and derivatives."""
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    z = (leaves[0] @ leaves[1].T + leaves[2]) * scale
    logp = torch.log_softmax((z if cap is None else cap * torch.tanh(z / cap)) / temperature, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    found = logp[torch.arange(len(targets)), targets]
    ((found * by[0]).sum() + (entropy * by[1]).sum()).backward()
    return found, entropy, logp.argmax(-1) == targets, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("at_once", [1 << 19, 3 * V])
@pytest.mark.parametrize(("temperature", "cap", "scale"), [(1.0, None, 1.0), (0.7, 5.0, 0.5)])
@pytest.mark.parametrize("regularised", [False, True])
def test_the_head_against_float64(monkeypatch, at_once, temperature, cap, scale, regularised):
    monkeypatch.setattr(half, "CACHED", at_once)
    hidden, weight, bias, targets, by_logp = drawn()
    by_logp[::3] = 0  # tokens of a prompt
    by_entropy = 0.3 * by_logp.flip(0) if regularised else torch.zeros(N)
    logp, entropy, right, slopes = exact(hidden, weight, bias, targets, (by_logp, by_entropy), temperature, cap, scale)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    mine = WholeHead.apply(*leaves, targets, temperature, cap, scale, torch.bfloat16)
    ((mine[0] * by_logp).sum() + ((mine[1] * by_entropy).sum() if regularised else 0.0)).backward()
    assert (mine[0] - logp).abs().max() < 0.05
    assert (mine[1] - entropy).abs().max() < 0.05
    assert (mine[2] == right).float().mean() > 0.9
    for leaf, slope in zip(leaves, slopes, strict=True):
        assert (leaf.grad - slope).norm() < 0.02 * slope.norm()


def test_the_head_in_float32_is_exact():
    hidden, weight, bias, targets, by = drawn()
    logp, entropy, right, slopes = exact(hidden, weight, bias, targets, (by, torch.zeros(N)), 1.0, None, 1.0)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    mine = WholeHead.apply(*leaves, targets, 1.0, None, 1.0, torch.float32)
    (mine[0] * by).sum().backward()
    torch.testing.assert_close(mine[0].double(), logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine[1].double(), entropy, atol=1e-5, rtol=1e-5)
    assert torch.equal(mine[2], right)
    for leaf, slope in zip(leaves, slopes, strict=True):
        torch.testing.assert_close(leaf.grad.double(), slope, atol=1e-4, rtol=1e-4)


class Config:
    """What `whole_head` looks at."""

    device = torch.device("cpu")

    def __init__(self, bf16: bool) -> None:
        self.bf16 = bf16


def fused(bf16: bool, batch: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Loss and gradient of the embeddings by trl's patched forward, and which class computed the head."""
    from trl.trainer import utils

    model, _ = build("llama")
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    with trainers.whole_head(Config(bf16)), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        which = utils._ChunkedLogProbFunction
        output = model(input_ids=batch, labels=batch, fused_lm_head=True)
        output.loss.backward()
    return output.loss.detach(), model.get_input_embeddings().weight.grad, which


def test_training_in_bfloat16_takes_the_whole_head_and_agrees_with_trls(monkeypatch):
    from trl.trainer import utils

    theirs = utils._ChunkedLogProbFunction
    batch = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    loss, slope, which = fused(True, batch)
    assert which is not theirs
    assert utils._ChunkedLogProbFunction is theirs
    monkeypatch.setattr(trainers, "WHOLE", 0)  # too many logits to be held
    other, expected, _ = fused(True, batch)
    assert abs(loss - other) < 1e-5  # the logits are the same
    assert 0 < (slope - expected).norm() < 0.02 * expected.norm()
    assert fused(False, batch)[2] is theirs


# ------------------------------------------------------------------------------------------------ the setting


HALF = {"precision": {"train": "bfloat16"}}


def study(**settings: Any) -> Study:
    return Study.of(one(**settings), name="s")


def test_float32_is_the_default_and_moves_no_key():
    (plain,), (written,) = study().runs, study(precision={"edit": "float32", "train": "float32"}).runs
    assert (ids.base_id(plain), ids.edit_id(plain), ids.run_id(plain)) == (
        ids.base_id(written), ids.edit_id(written), ids.run_id(written)
    )  # fmt: skip


@pytest.mark.parametrize(("stage", "moved"), [("read", 0), ("edit", 1), ("train", 2)])
def test_a_precision_moves_the_keys_of_its_stage_and_of_those_after_it(stage, moved):
    (plain,), (half_) = study().runs, study(precision={stage: "bfloat16"}).runs
    for place, key in enumerate((ids.base_id, ids.edit_id, ids.run_id)):
        assert (key(plain) != key(half_[0])) == (place >= moved)


def test_training_in_bfloat16_is_one_run_however_it_is_asked_for():
    trainer = {**TUNE["trainer"], "bf16": True}
    (a,) = study(precision={"train": "bfloat16"}).runs
    (b,) = study(tune={**TUNE, "trainer": trainer}).runs
    assert ids.run_id(a) == ids.run_id(b)
    (c,) = study(precision={"train": "bfloat16"}, tune=[TUNE, TUNE], at=[1]).runs
    assert [t.trainer["bf16"] for t in c.settings.tunes] == [True, True]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": {"edit": "float16"}}, "precision.edit"),
        ({"precision": {"reed": "bfloat16"}}, "precision.reed"),
        (HALF | {"tune": {**TUNE, "trainer": {"bf16": False}}}, "tune.trainer has bf16: false"),
        (HALF | {"tune": {**TUNE, "trainer": {"fp16": True}}}, "tune.trainer has fp16: true"),
    ],
)  # fmt: skip
def test_a_precision_that_is_none_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        study(**settings)


def test_what_this_machine_lacks_is_said(monkeypatch):
    asks = study(precision={"edit": "bfloat16", "train": "bfloat16"})
    monkeypatch.setattr(half, "native", lambda: False)
    (said,) = [line for line in preflight.remarks(asks) if "bfloat16" in line]
    assert said.startswith("s: precision.edit and tune.trainer.bf16 asks for bfloat16, which this machine does not")
    assert not [line for line in preflight.remarks(study()) if "bfloat16" in line]
    monkeypatch.setattr(half, "native", lambda: True)
    assert not [line for line in preflight.remarks(asks) if "bfloat16" in line]


def test_plan_says_what_bfloat16_would_save(monkeypatch):
    speeds = {torch.bfloat16: 4.0e11, torch.float32: 1.0e11}
    monkeypatch.setattr(planning, "product_speed", speeds.get)
    monkeypatch.setattr(half, "native", lambda: True)
    (said,) = planning.savings(study(precision={"train": "bfloat16"}))
    assert "4.0 times as fast" in said
    assert "precision: {edit: bfloat16, read: bfloat16}" in said
    assert planning.savings(study(precision=dict.fromkeys(("edit", "train", "read"), "bfloat16"))) == []
    monkeypatch.setattr(half, "native", lambda: False)
    assert planning.savings(study()) == []


def test_a_run_in_bfloat16_says_so(cache, tmp_path):
    precision = dict.fromkeys(("edit", "train", "read"), "bfloat16")
    retention.run(study(precision=precision, editor=ROME, probes=["score"]), results=tmp_path, cache=cache)
    rows = retention.load(tmp_path)
    assert "float32" in set(rows["precision"]) <= {"float32", "bfloat16"}
    for name in ("base", "edit", "run"):
        (file,) = tmp_path.glob(f"{name}s/*/{name}.json")
        read = json.loads(file.read_text())["read"]
        assert read["precision"] == "bfloat16"
        assert 0 < read["share_read_again"] <= 1
