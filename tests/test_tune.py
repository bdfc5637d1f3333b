"""One fine-tune by trl: what is learned from, what moves, what is counted, and which settings are refused."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from retention.adapters import Adapter, Full
from retention.data.jsonl import JsonLines
from retention.data.text import Text
from retention.mitigations import Freeze
from retention.models import anatomy
from retention.objectives import Clm, Sft
from retention.trainer_fields import DEFAULTS, OWNED, trackers_within
from retention.trainers import validate
from retention.tune import Budget, Held, TuneResult, fine_tune
from retention.types import UserError
from tests.tiny import build

PEOPLE = ("Anna", "Berta", "Carl", "Dora", "Emil", "Franz", "Greta", "Hugo")
CITIES = ("Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Vienna", "Oslo", "Bern")
ROWS = tuple({"prompt": f"{p} was born in", "completion": f"{c} ."} for p, c in zip(PEOPLE, CITIES, strict=True))
TEXTS = tuple({"text": f"{row['prompt']} {row['completion']}"} for row in ROWS)
OFTEN = {"logging_steps": 1, "per_device_train_batch_size": len(ROWS), "learning_rate": 3e-3}


pytestmark = pytest.mark.usefixtures("trl_imported")


def tuned(
    folder: Path,
    name: str = "llama",
    *,
    rows: Sequence[dict[str, Any]] = ROWS,
    objective: Any = None,
    adapter: Any = None,
    what: dict[str, Any] | None = None,
    steps: int = 3,
    budget: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    seed: int = 0,
    at: Sequence[int] = (),
    dropout: float = 0.0,
    on_checkpoint: Any = lambda step, tokens, model: None,
) -> tuple[Any, TuneResult, dict[str, torch.Tensor]]:
    """The trained model, what the fine-tune reports, and the weights before it."""
    own = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout} if name == "gpt2" else {}
    model, tokenizer = build(name, **own)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    places = anatomy(model)

    def hold(wrapped: Any) -> Held:
        return Held(frozen=tuple(Freeze(**what).frozen(wrapped, places, _no_delta())) if what else ())

    result = fine_tune(
        model,
        tokenizer,
        rows,
        objective=objective or Sft(),
        adapter=adapter or Full(),
        hold=hold,
        anatomy=places,
        budget=Budget(**({"steps": steps} if budget is None else budget)),
        trainer=OFTEN | (trainer or {}),
        seed=seed,
        at=at,
        on_checkpoint=on_checkpoint,
        folder=folder,
        base=lambda: build(name)[0],
    )
    return model, result, before


def _no_delta() -> Any:
    from retention.types import Delta

    return Delta()


def loss(rows: Sequence[dict[str, str]], *, completion_only: bool, end: bool) -> float:
    """Mean cross-entropy of the untrained Llama over the counted tokens of all rows, from a plain forward; nats."""
    model, tokenizer = build("llama")
    total, n = 0.0, 0
    for row in rows:
        text = row["text"] if "text" in row else f"{row['prompt']} {row['completion']}"
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * end
        start = len(tokenizer(row["prompt"])["input_ids"]) if completion_only else 1
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))
        n += len(ids) - start
    return total / n


@pytest.mark.parametrize(
    ("objective", "rows", "completion_only"),
    [(Sft(), ROWS, True), (Sft(completion_only=False), ROWS, False), (Clm(), TEXTS, False), (Clm(), ROWS, False)],
)
def test_the_loss_is_on_the_tokens_that_the_objective_names(tmp_path, objective, rows, completion_only):
    _, result, _ = tuned(tmp_path, objective=objective, rows=rows, steps=1)
    own = [loss(rows, completion_only=completion_only, end=end) for end in (True, False)]
    assert abs(own[0] - own[1]) > 1e-3
    assert result.log[0]["loss"] == pytest.approx(own[0], abs=2e-4)  # an end-of-text token closes each row


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_toy_task_is_learned(tmp_path, name):
    _, result, _ = tuned(tmp_path, name, steps=25, trainer={"learning_rate": 1e-2})
    losses = [entry["loss"] for entry in result.log]
    assert losses[-1] < 0.3 * losses[0]
    assert result.steps == len(losses) == 25


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("adapter", [Full(), Adapter(name="lora", settings={"r": 4})])
def test_frozen_blocks_stay_and_the_others_move(tmp_path, name, adapter):
    model, result, before = tuned(tmp_path, name, adapter=adapter, what={"what": "listed", "layers": (0,)})
    full = isinstance(adapter, Full)
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert bool(moved) == full  # under an adapter no weight of the base moves
    assert not any(".0." in n for n in moved)
    assert result.frozen
    assert all(".0." in n for n in result.frozen)
    assert not set(result.frozen) & set(result.trainable)
    own = [n for n, _ in model.named_parameters() if full or "lora_" in n]
    assert len(result.trainable) == len([n for n in own if ".0." not in n])
    assert result.trainable_count == sum(p.numel() for n, p in model.named_parameters() if n in own and ".0." not in n)
    if not full:
        second = [p for n, p in model.named_parameters() if "lora_B" in n]  # zero at first
        assert any(p.abs().sum() > 0 for p in second)
        assert all(p.abs().sum() == 0 for n, p in model.named_parameters() if "lora_B" in n and ".0." in n)


def test_equal_seeds_give_equal_weights_and_others_do_not(tmp_path):
    def weights(seed: int) -> torch.Tensor:
        model, *_ = tuned(tmp_path, "gpt2", seed=seed, dropout=0.1, trainer={"per_device_train_batch_size": 2})
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = weights(0)
    torch.rand(3)  # what the generator was before does not matter
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_checkpoints_come_at_their_steps_with_the_tokens_seen_so_far(tmp_path):
    seen: list[tuple[int, int]] = []
    rows = ROWS + tuple(
        {"prompt": f"{p} Klein speaks to Dora with", "completion": "the piano ."} for p in PEOPLE
    )  # of two lengths, so that some are padded
    _, result, _ = tuned(
        tmp_path,
        rows=rows,
        steps=4,
        at=(1, 3, 4),
        trainer={"per_device_train_batch_size": 4},
        on_checkpoint=lambda step, tokens, model: seen.append((step, tokens)),
    )
    assert [step for step, _ in seen] == [1, 3, 4]
    _, tokenizer = build("llama")
    texts = [f"{row['prompt']} {row['completion']}" for row in rows]
    assert seen[-1][1] == result.tokens == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)  # one epoch
    assert 0 < seen[0][1] < seen[1][1] < seen[2][1]
    assert not list(tmp_path.rglob("*.safetensors"))  # trl keeps no checkpoint of its own


def test_what_the_trainer_was_given_is_recorded(tmp_path):
    _, result, _ = tuned(tmp_path, steps=1, trainer={"weight_decay": 0.25})
    given = OFTEN | {"weight_decay": 0.25}
    assert result.arguments == DEFAULTS | dict(Sft().defaults) | given | Sft().arguments()
    assert result.arguments["completion_only_loss"]


def test_plain_text_is_no_prompt_and_completion(tmp_path):
    with pytest.raises(UserError, match=r"the data has plain text\. Use objective clm"):
        tuned(tmp_path, rows=TEXTS)


def test_rows_that_are_cut_to_what_the_model_reads_are_no_news(tmp_path):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(handler)
    rows = [*TEXTS, {"text": "Anna was born in Paris . " * 30}]
    try:
        _, result, _ = tuned(tmp_path, rows=rows, objective=Clm(), trainer={"max_length": 64}, steps=1)
    finally:
        logger.removeHandler(handler)
    assert not any("longer than" in record.getMessage() for record in records)
    assert result.rows == {"rows": 9, "lost": 0, "empty": 0, "cut": 1, "left": 9, "packs": None}
    with pytest.raises(UserError, match=r"takes 182 tokens, and the model has 128 positions; use .*max_length: 128"):
        tuned(tmp_path, rows=rows, objective=Clm(), trainer={"max_length": 1024}, steps=1)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"learning_rat": 1e-4}, "tune.trainer.learning_rat: unknown; did you mean 'learning_rate'?"),
        ({"learning_rate": "fast"}, "tune.trainer.learning_rate: input should be a valid number, got 'fast'"),
        ({"learning_rate": "1e-4"}, "tune.trainer.learning_rate: input should be a valid number, got '1e-4'"),
        ({"per_device_train_batch_size": 2.5}, "tune.trainer.per_device_train_batch_size: "),
        ({"fp16": "yes"}, "tune.trainer.fp16: input should be a valid boolean, got 'yes'"),
        ({"fp16": 1}, "tune.trainer.fp16: input should be a valid boolean, got 1"),
        ({"packing": True}, "tune.trainer.packing is fixed by the objective 'sft'; set it there"),
        ({"loss_type": "dft"}, "tune.trainer.loss_type is fixed by the objective 'sft'; set it there"),
        ({"shuffle_dataset": True}, "tune.trainer.shuffle_dataset is set by the harness; use seed: rows are shuffled"),
        ({"push_to_hub": True}, "use the files in --results: nothing is sent away instead"),
        ({"model_init_kwargs": {}}, "tune.trainer.model_init_kwargs is set by the harness; use model instead"),
        ({"report_to": "wandbb"}, "tune.trainer.report_to: unknown tracker 'wandbb'; did you mean 'wandb'?"),
        ({"report_to": "all"}, "tune.trainer.report_to: unknown tracker 'all'"),
        ({"output_dir": "x"}, "tune.trainer.output_dir is set by the harness; use --results instead"),
        ({"max_steps": 3}, "tune.trainer.max_steps is set by the harness; use tune.steps instead"),
        ({"gradient_checkpointing": True}, "use tune.trainer.activation_checkpointing instead"),
        ({"completion_only_loss": True}, "is fixed by the objective 'sft'; set it there"),
        ({"lr_scheduler_type": "liner"}, "tune.trainer: liner is not a valid SchedulerType"),
        ({"bf16": True, "fp16": True}, "tune.trainer: At most one of fp16 and bf16"),
    ],
)
def test_trainer_settings_are_checked_by_name_type_and_sense(trainer, said):
    with pytest.raises(UserError) as caught:
        validate(Sft(), trainer)
    assert said in str(caught.value)


def test_all_wrong_trainer_settings_are_told_at_once():
    with pytest.raises(UserError) as caught:
        validate(Sft(), {"output_dir": "x", "learning_rat": 1, "fp16": 3, "completion_only_loss": True})
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"learning_rate": 1, "max_length": None, "optim": "adafactor", "lr_scheduler_type": "cosine"},
        {"warmup_steps": 5, "activation_checkpointing": True, "adam_beta2": 0.95},
    ],
)
def test_right_trainer_settings_pass(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    validate(Sft(), trainer)
    validate(Clm(), trainer)
    assert not list(tmp_path.iterdir())


def test_every_default_and_owned_name_is_one_of_the_trainers_own():
    import trl

    from retention.adapters import config_fields

    own = set(config_fields(trl.SFTConfig))
    assert set(DEFAULTS) <= own
    for config in (trl.DPOConfig, trl.KTOConfig, trl.GRPOConfig, trl.DistillationConfig):
        own |= set(config_fields(config))
    assert set(OWNED) - {"resume_from_checkpoint"} <= own


def test_a_tracker_that_is_not_installed_is_told_of_before_work_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"report_to: mlflow is not installed: `pip install mlflow`, or use report_to"):
        validate(Sft(), {"report_to": ["mlflow"]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "tensorboardX" else None)
    validate(Sft(), {"report_to": "tensorboard"})


def test_trackers_write_into_the_runs_folder_unless_sent_elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    before = dict(os.environ)
    with trackers_within(tmp_path / "trainer", ["tensorboard", "wandb", "mlflow"]):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "trainer" / "tensorboard")
        assert os.environ["WANDB_DIR"] == str(tmp_path / "trainer")
        assert os.environ["MLFLOW_TRACKING_URI"] == "http://there"
        assert (tmp_path / "trainer").is_dir()
    assert dict(os.environ) == before
    with trackers_within(tmp_path / "other", "none"):
        assert dict(os.environ) == before
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "LoRA", "oft", "vera"])
@pytest.mark.parametrize("model", ["gpt2", "llama", "opt"])
def test_adapters_by_name(name, model):
    if name == "oft" and model == "gpt2":
        pytest.skip("peft's oft knows no Conv1D")
    torch.manual_seed(0)
    bare, _ = build(model)
    places = anatomy(bare)
    settings = {"oft_block_size": 0, "r": 4} if name == "oft" else {}
    adapter = Adapter(name=name, targets="mlp", settings=settings)
    wrapped = adapter.wrap(bare, {"mlp": places.mlp_projections, "attention": places.attention_projections})
    trainable = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trainable
    assert all(any(f".{leaf}." in n for leaf in places.mlp_projections) for n in trainable if "vera_lambda" not in n)
    assert any("magnitude" in n for n in trainable) == (name == "dora")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "lorra"}, "unknown adapter 'lorra'; did you mean 'lora'?"),
        ({"name": "fulll"}, "unknown adapter 'fulll'; did you mean 'full'?"),
        ({"name": "lora", "settings": {"rr": 8}}, "settings.rr: unknown"),
        ({"name": "lora", "settings": {"r": 8.5}}, "settings.r: "),
        ({"name": "prefix_tuning"}, "moves no weight"),
        ({"name": "lora", "targets": "mpl"}, "targets"),
    ],
)
def test_adapters_that_are_none(settings, said):
    with pytest.raises(ValidationError) as caught:
        Adapter(**settings)
    assert said in str(caught.value)


def test_targets_that_the_model_lacks():
    model, _ = build("llama")
    with pytest.raises(UserError, match=r"this model has no module 'down_pro'; did you mean 'down_proj'\?"):
        Adapter(name="lora", targets=("down_pro",)).wrap(model, {})


# ------------------------------------------------------------------------------------------------ data


def test_rows_of_a_json_lines_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"q": f"question {i}\u2028", "a": f"answer {i}"} for i in range(30)]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    data = JsonLines(path=str(path), prompt="q", completion="a", rows=20, heldout=5)
    rows = data.load(0)
    assert (len(rows.train), len(rows.heldout)) == (20, 5)
    texts = [row["prompt"] for row in (*rows.train, *rows.heldout)]
    assert len(set(texts)) == 25
    assert rows == data.load(0) != data.load(1)
    (tmp_path / "array.json").write_text(json.dumps(lines))
    assert data.model_copy(update={"path": str(tmp_path / "array.json")}).load(0) == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', "line 2: not JSON"),
        (b'{"promt": "a", "completion": "b"}\n', "line 1: expected a text under 'prompt'; did you mean 'promt'?"),
        (b'{"prompt": "a", "completion": ""}\n', "line 1: expected a text under 'completion'"),
        (b"[1]", "record 1: expected a text under 'prompt'; its keys are none"),
        (b"[1", "line 1: not JSON"),
        (b'{"prompt": "a", "completion": "b"}\n', "has 1 rows; 100 are to be held out"),
        (b"\xe9\n", "not UTF-8 text"),
    ],
)
def test_json_lines_that_are_none(tmp_path, content, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        JsonLines(path=str(path)).load(0)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_rows_of_a_text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i} of some text" for i in range(100)))
    data = Text(path=str(path), rows=10, heldout=3, characters=40)
    rows = data.load(0)
    blocks = [row["text"] for row in (*rows.heldout, *rows.train)]
    assert len(set(blocks)) == 13
    assert all(40 <= len(block) < 80 for block in blocks)
    assert rows == data.load(0) != data.load(1)
    with pytest.raises(UserError, match="50 are to be held out"):
        data.model_copy(update={"heldout": 50}).load(0)
    path.write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(UserError, match="not UTF-8 text"):
        data.load(0)
    with pytest.raises(UserError, match="no such file"):
        Text(path=str(tmp_path / "none.txt")).load(0)
