"""A list of fine-tunes trains one model: each finds it, and torch, as if the model had just been loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from retention.adapters import Adapter, Full
from retention.models import anatomy
from retention.objectives import Dpo, Grpo, Kto, Sft
from retention.restored import switches
from retention.trainers import validate
from retention.tune import Budget, Held, TuneResult, fine_tune
from retention.types import UserError
from tests.test_tune import ROWS
from tests.tiny import build

PAIRS = tuple(row | {"rejected": "Madrid ."} for row in ROWS)
LORA = Adapter(name="lora", settings={"r": 2})

pytestmark = pytest.mark.usefixtures("trl_imported")


def tuned(
    folder: Path, model: Any, tokenizer: Any, *, rows: Any = ROWS, objective: Any = None, adapter: Any = None,
    trainer: dict[str, Any] | None = None, on_checkpoint: Any = lambda *_: None,
) -> TuneResult:  # fmt: skip
    often = {"logging_steps": 1, "learning_rate": 3e-3, "per_device_train_batch_size": 4}
    return fine_tune(
        model, tokenizer, rows, objective=objective or Sft(), adapter=adapter or Full(), hold=lambda _: Held(),
        anatomy=anatomy(model), budget=Budget(steps=3), trainer=often | (trainer or {}), seed=0, at=(3,), merge=True,
        on_checkpoint=on_checkpoint, folder=folder, base=lambda: build("llama")[0],
    )  # fmt: skip


def losses(result: TuneResult) -> list[float]:
    return [entry["loss"] for entry in result.log]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"bf16": True}, {"bf16": True}),
        ({}, {"bf16": True}),
        ({"bf16": True}, {}),
        ({"activation_checkpointing": True}, {"bf16": True}),
        ({"neftune_noise_alpha": 5.0}, {"bf16": True, "activation_checkpointing": True}),
    ],
    ids=["bf16-bf16", "none-bf16", "bf16-none", "checkpointed-bf16", "noise-bf16"],
)
@pytest.mark.parametrize("adapter", [Full(), LORA], ids=["full", "lora"])
def test_a_fine_tune_of_a_list_equals_the_same_one_alone(tmp_path, first, second, adapter):
    model, tokenizer = build("llama", attention_dropout=0.1)
    tuned(tmp_path / "1", model, tokenizer, trainer=first, adapter=adapter)
    alone, _ = build("llama", attention_dropout=0.1)
    alone.load_state_dict(model.state_dict())
    in_list = tuned(tmp_path / "2", model, tokenizer, trainer=second, adapter=adapter)
    by_itself = tuned(tmp_path / "3", alone, tokenizer, trainer=second, adapter=adapter)
    assert losses(in_list) == losses(by_itself)
    own, other = dict(model.named_parameters()), dict(alone.named_parameters())
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert in_list.precision == by_itself.precision
    assert in_list.precision["compute"] == ("bfloat16" if second.get("bf16") else "float32")
    assert in_list.precision["weights"] == "float32"


@pytest.mark.parametrize(
    ("objective", "rows", "trainer"),
    [
        (Sft(), ROWS, {"bf16": True, "eos_token": "Paris"}),
        (Sft(), ROWS, {"activation_checkpointing": True, "full_determinism": True}),
        (Dpo(), PAIRS, {"bf16": True}),
        (Kto(), PAIRS, {}),
        (Grpo(num_generations=2, max_completion_length=3), ROWS, {"bf16": True}),
    ],
    ids=["sft", "sft-checkpointed", "dpo", "kto", "grpo"],
)
def test_nothing_stays_on_the_model_but_what_was_learned(tmp_path, objective, rows, trainer):
    model, tokenizer = build("llama")
    before, outside, words = _all_of(model), switches(), dict(tokenizer.special_tokens_map)
    within: list[dict[str, Any]] = []
    tuned(
        tmp_path, model, tokenizer, rows=rows, objective=objective, trainer=trainer,
        on_checkpoint=lambda *_: within.append(switches()),
    )  # fmt: skip
    assert _all_of(model) == before
    assert switches() == outside
    assert within == [outside]  # a reading at a checkpoint is as one before training
    assert tokenizer.special_tokens_map == words


def _all_of(model: Any) -> dict[str, Any]:
    """Every attribute of every module that is neither weight nor train mode, as text."""
    left = ("_parameters", "_buffers", "_modules", "training")
    return {
        f"{name}.{key}": repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in left
    }


def test_a_precision_that_nobody_asked_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=r"expected mixed precision none \(bf16, fp16\), and training uses bfloat16"):
        tuned(tmp_path, *build("llama"))
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_half_precision_that_a_processor_would_ignore_is_refused():
    if torch.cuda.is_available():
        pytest.skip("an accelerator computes in fp16")
    with pytest.raises(UserError, match=r"tune.trainer.fp16: needs an accelerator"):
        validate(Sft(), {"fp16": True})
