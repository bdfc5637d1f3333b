"""Rows on their way into training: what max_length cuts or leaves nothing of, counted, said beforehand, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from retention import preflight
from retention.adapters import Full
from retention.ids import run_id
from retention.models import anatomy
from retention.objectives import Clm, Cpo, Distill, Dpo, Grpo, Kto, Orpo, Sft
from retention.study import Study
from retention.trainer_fields import arguments_of
from retention.trainers import config_of, imported, validate
from retention.training_rows import training_rows
from retention.tune import Budget, Held, fine_tune
from retention.types import UserError
from tests import tiny
from tests.small_study import one
from tests.test_chats import CHATML, ROWS, letters

SHORT = {"prompt": "Anna was born in", "completion": "Paris .", "rejected": "Rome ."}
LONG = {**SHORT, "prompt": "Anna was born in " * 5}  # 21 tokens and its answer 3
MIXED = [SHORT] * 5 + [LONG] * 31

pytestmark = pytest.mark.usefixtures("trl_imported")


def tuned(folder: Path, objective: Any, rows: Any, *, epochs: float | None = 1, **trainer: Any) -> Any:
    model, tokenizer = tiny.build("llama")
    budget = Budget(epochs=epochs) if epochs is not None else Budget(steps=1)
    return fine_tune(
        model, tokenizer, rows, objective=objective, adapter=Full(), hold=lambda _: Held(), anatomy=anatomy(model),
        budget=budget, trainer={"per_device_train_batch_size": 4, "logging_steps": 1, **trainer}, seed=0, at=(),
        on_checkpoint=lambda *_: None, folder=folder, base=lambda: tiny.build("llama")[0],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "each"),
    [(Sft(), 1), (Dpo(), 1), (Kto(), 2), (Orpo(experimental=True), 1), (Cpo(experimental=True), 1)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_rows_whose_prompt_fills_the_length_are_left_out_and_counted(tmp_path, objective, each):
    result = tuned(tmp_path, objective, MIXED, max_length=20)
    lost = {"rows": 36 * each, "lost": 31 * each, "empty": 0, "cut": 0, "left": 5 * each, "packs": None}
    assert result.rows == lost
    assert result.steps == -(-5 * each // 4)
    with pytest.raises(UserError, match=rf"0 of {31 * each} rows are left to train on \({31 * each} have a prompt"):
        tuned(tmp_path, objective, [LONG] * 31, max_length=20)
    cut = tuned(tmp_path, objective, MIXED, max_length=22).rows
    assert (cut["left"], cut["cut"]) == (36 * each, 31 * each)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Sft(packing="bfd"), {"rows": 36, "lost": 31, "empty": 0, "cut": 0, "left": 5}),
        (Sft(packing="bfd_split"), {"rows": 36, "lost": 0, "empty": 0, "cut": 0, "left": 36}),
        (Sft(completion_only=False), {"rows": 36, "lost": 0, "empty": 0, "cut": 31, "left": 36}),
        (Clm(), {"rows": 36, "lost": 0, "empty": 0, "cut": 31, "left": 36}),
    ],
    ids=["bfd", "bfd_split", "whole", "clm"],
)
def test_what_packing_and_texts_lose(tmp_path, objective, expected):
    found = tuned(tmp_path, objective, MIXED, max_length=20, epochs=None).rows
    assert {k: v for k, v in found.items() if k != "packs"} == expected
    assert (found["packs"] is None) == (objective.name == "clm" or not objective.packing)


def test_the_end_of_a_row_can_be_kept_instead():
    _, tokenizer = tiny.build("llama")
    for objective in (Sft(), Dpo()):
        arguments = arguments_of(objective, {"max_length": 20, "truncation_mode": "keep_end"})
        found = training_rows(MIXED, objective, tokenizer, arguments).counts
        assert (found.lost, found.cut, found.left) == (0, 31, 36)


@pytest.mark.parametrize("length", [None, 20, 22])
@pytest.mark.parametrize("objective", [Sft(), Sft(completion_only=False), Clm()], ids=["sft", "whole", "clm"])
def test_ids_and_labels_are_those_that_trl_makes_of_the_texts(tmp_path, objective, length):
    """By trl's own way through prompts and completions, and texts."""
    model, tokenizer = tiny.build("llama")
    arguments = {"max_length": length}
    found = training_rows(MIXED[:8], objective, tokenizer, arguments_of(objective, arguments)).columns
    config = config_of(objective, arguments, steps=1, epochs=None, in_order=True, seed=0, folder=tmp_path)
    texts = Dataset.from_list([columns for row in MIXED[:8] for columns in objective.columns(row)])
    theirs = imported(objective.trainer)(model=model, args=config, train_dataset=texts, processing_class=tokenizer)
    assert [{k: row[k] for k in ("input_ids", "labels")} for row in theirs.train_dataset] == found


@pytest.mark.parametrize("objective", [Grpo(num_generations=2), Distill()], ids=lambda o: o.name)
def test_a_prompt_that_leaves_no_room_for_answers_is_refused(tmp_path, objective):
    with pytest.raises(UserError, match=r"a row takes 142 tokens, and the model has 128 positions"):
        tuned(tmp_path, objective, [SHORT] * 7 + [{**SHORT, "prompt": "Anna was born in " * 31 + "Rome"}])


def test_a_study_says_beforehand_what_is_cut_and_refuses_where_too_little_is_left(tmp_path):
    model = {"name": str(tiny.save("llama", tmp_path / "model"))}
    rows = [{**row, "prompt": f"{i} {row['prompt']}"} for i, row in enumerate([SHORT] * 28 + [LONG] * 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "dataset", "path": str(tmp_path / "rows.jsonl"), "heldout": 1}

    def study(**tune: Any) -> Study:
        return Study.of(one(model=model, tune={"data": data, "steps": 1, **tune}, at=[1]), name="cut")

    short = {"max_length": 20}
    (refused,) = (line for line in preflight.examine(study(trainer=short)) if "tune.data" in line)
    assert "rows are left to train on" in refused
    assert "or a lower tune.min_share (now 0.9)" in refused
    allowed = study(trainer=short, min_share=0.5)
    assert not any("tune.data" in line for line in preflight.examine(allowed))
    said = "left out (the prompt fills max_length); tune.trainer.max_length is 20"
    assert any(said in line for line in preflight.remarks(allowed))
    assert not any("tune.data" in line for line in preflight.remarks(study()))
    assert run_id(allowed.runs[0]) == run_id(study(trainer=short).runs[0])  # what it refuses moves no number


def test_experimental_trainers_must_be_given_a_length():
    with pytest.raises(UserError, match="objective orpo needs a length in tokens; trl would take 512"):
        validate(Orpo(experimental=True), {"max_length": None})


# ------------------------------------------------------------------------------------------------ chats


@pytest.mark.parametrize("objective", [Sft(), Sft(assistant_only=True)], ids=["chat", "assistant_only"])
def test_messages_are_trained_on_as_they_stand(objective):
    """Not as one user's turn below the template's own system prompt."""
    tokenizer, messages = letters(CHATML), ROWS["system"][0]
    row = {"prompt": "flattened", "completion": messages[-1]["content"], "messages": messages}
    chat = not objective.assistant_only
    (found,) = training_rows([row], objective, tokenizer, arguments_of(objective, {}), chat=chat).columns
    assert found["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    learned = tokenizer.decode([i for i in found["labels"] if i >= 0])
    assert learned == "It is 1.<|im_end|>\nTwo it is.<|im_end|>\n"


def test_what_is_compared_follows_the_whole_conversation():
    tokenizer, messages = letters(CHATML), ROWS["system"][0]
    row = {"prompt": "flattened", "completion": "Two it is.", "rejected": "Three.", "messages": messages}
    (found,) = training_rows([row], Dpo(), tokenizer, arguments_of(Dpo(), {}), chat=True).columns
    assert found["prompt"] == messages[:-1]
    assert found["chosen"] == [messages[-1]]
    assert found["rejected"] == [{"role": "assistant", "content": "Three."}]
    with pytest.raises(UserError, match="conversations with tools can be trained on by sft only"):
        training_rows([{**row, "tools": [{}]}], Dpo(), tokenizer, arguments_of(Dpo(), {}), chat=True)
