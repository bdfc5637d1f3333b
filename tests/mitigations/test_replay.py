"""Rows mixed in: the rate is what it says over the rows trained, massed or spaced, and no probe's phrasing is used."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from retention.mitigations import Replay, mixed_rows
from retention.objectives import Clm, Dpo
from retention.types import Edit, UserError
from tests.mitigations.scenes import CITIES, EDITS, PEOPLE, ROWS, edited, fact, tuned

# trl 1.16 asks transformers 5.23 for `is_gradient_checkpointing`, which warns that it has a new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SCENE = edited("gpt2").scene
ANSWERS = {edit.fact.text(p): edit for edit in EDITS for p in (edit.fact.prompt, *edit.fact.phrasings)}
TEXTS = tuple({"text": f"{row['prompt']} {row['completion']}"} for row in ROWS)


def own(rows: Any) -> list[int]:
    """Places of the rows that state an edit."""
    return [i for i, row in enumerate(rows) if row["prompt"] in ANSWERS]


@pytest.mark.parametrize("rate", [0.05, 0.25, 1 / 3, 0.9])
@pytest.mark.parametrize("needed", [None, 7, 60])
def test_the_rate_is_exact_and_spaced_rows_are_so_in_every_stretch(rate, needed):
    task = ROWS * 4
    rows = Replay(rate=rate).rows(task, replace(SCENE, rows_needed=needed))
    count = round(rate * needed) if needed else round(rate * len(task) / (1 - rate))
    assert len(own(rows)) == count
    assert len(rows) == (needed or len(task) + count)
    for m in range(1, len(rows) + 1):
        assert abs(len([i for i in own(rows) if i < m]) - m * count / len(rows)) <= 1
    others = [row for i, row in enumerate(rows) if i not in own(rows)]
    assert others == [task[i % len(task)] for i in range(len(others))]


@pytest.mark.parametrize("end", ["start", "end"])
def test_massed_rows_stand_at_their_end(end):
    rows = Replay(rate=0.25, schedule="massed", massed=end).rows(ROWS, replace(SCENE, rows_needed=40))
    assert own(rows) == (list(range(10)) if end == "start" else list(range(30, 40)))


def test_what_is_said_is_the_edit_in_phrasings_that_no_probe_asks():
    rows = Replay(rate=0.5, phrasings=2).rows(ROWS, replace(SCENE, rows_needed=72))
    said = Counter((rows[i]["prompt"], rows[i]["completion"]) for i in own(rows))
    expected = {(text, f"{edit.target} .") for text, edit in ANSWERS.items()}  # full stops as the task's rows have them
    assert set(said) == expected
    assert set(said.values()) == {4}  # 36 rows of 3 edits in 3 phrasings
    asked = {edit.fact.text(p) for edit in EDITS for p in edit.fact.paraphrases}
    assert not asked & {row["prompt"] for row in rows}


def test_a_phrasing_that_a_probe_asks_is_not_taken_even_where_the_data_offer_it():
    edit = Edit(fact=fact("Ida", "Rome", phrasings=("The city where {} was born is",)), target="Bern", prompts=("{}",))
    (one,) = Replay(rate=0.5).said([edit], 0)
    assert one.phrasings == ("{} was born in",)
    with pytest.raises(UserError, match=r"replay: 1 phrasings besides .* fact Ida \(Ida Brandt, born\) has 0"):
        Replay(rate=0.5, phrasings=1).said([edit], 0)


def test_rows_have_the_form_of_the_tasks_rows():
    (text,) = {tuple(row) for row in Replay(rate=0.5).rows(TEXTS, SCENE)}
    assert text == ("text",)
    preferences = tuple({**row, "rejected": "drums ."} for row in ROWS)
    rows = Replay(rate=0.5).rows(preferences, SCENE)
    for i in own(rows):
        edit = ANSWERS[rows[i]["prompt"]]
        assert rows[i]["rejected"] == f"{edit.fact.target} ."  # the old object
    injected = tuple(replace(edit, fact=replace(edit.fact, target="")) for edit in EDITS)
    for row in Replay(rate=0.5).rows(preferences, replace(SCENE, edits=injected)):
        if row["prompt"] in ANSWERS:
            assert row["rejected"] in {f"{e.target} ." for e in EDITS} - {row["completion"]}


def test_what_a_held_out_row_asks_is_not_stated():
    heldout = ({"prompt": EDITS[0].fact.text(), "completion": "Oslo ."},)
    rows = Replay(rate=0.5).rows(ROWS, replace(SCENE, heldout=heldout))
    assert {ANSWERS[rows[i]["prompt"]].fact.id for i in own(rows)} == {"Berta", "Carl"}
    every = tuple({"prompt": edit.fact.text(), "completion": "Oslo ."} for edit in EDITS)
    with pytest.raises(UserError, match="replay: there is no fact to state that is not asked by a held-out row"):
        Replay(rate=0.5).rows(ROWS, replace(SCENE, heldout=every))


def test_rows_depend_on_the_seed_alone():
    def rows(seed: int) -> Any:
        return Replay(rate=0.3, phrasings=1).rows(ROWS, replace(SCENE, seed=seed, rows_needed=50))

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


@pytest.mark.parametrize(
    ("objective", "trainer"), [(None, {}), (Clm(), {"gradient_accumulation_steps": 2}), (Dpo(), {})]
)
def test_what_is_trained_on_holds_the_rate_whatever_the_objective(tmp_path, objective, trainer):
    made, seen = edited("gpt2"), Counter()
    subjects = {made.tokenizer(f"{p} Brandt", add_special_tokens=False)["input_ids"][0] for p in PEOPLE[:3]}
    surname = made.tokenizer("Brandt", add_special_tokens=False)["input_ids"][0]

    def watch(wrapped: Any, guards: Any) -> None:
        def count(module: Any, args: Any, kwargs: Any) -> None:
            for row in kwargs["input_ids"].tolist():
                seen[any(a in subjects and b == surname for a, b in itertools.pairwise(row))] += module.training

        wrapped.register_forward_pre_hook(count, with_kwargs=True)

    rows = [{**row, "rejected": "drums ."} for row in ROWS]
    tuned(made, [Replay(rate=0.25)], tmp_path, steps=4, objective=objective, rows=rows, watch=watch, trainer=trainer)
    sequences = 16 * (2 if trainer else 1) * (2 if isinstance(objective, Dpo) else 1)  # each pair is two sequences
    assert seen == {True: sequences // 4, False: 3 * sequences // 4}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "rate"),
        ({"rate": 0}, "greater than 0"),
        ({"rate": 1}, "less than 1"),
        ({"rate": 0.1, "massed": "start"}, "replay is spaced: give schedule: massed"),
        ({"rate": 0.1, "schedule": "often"}, "'spaced' or 'massed'"),
        ({"rate": 0.1, "phrasings": -1}, "greater than or equal to 0"),
        ({"rate": 0.1, "prhasings": 1}, "Extra inputs"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Replay(**settings)


def test_no_edit_is_no_replay():
    with pytest.raises(UserError, match=r"mitigations: replay: rate 0\.5: there are no rows to mix in"):
        Replay(rate=0.5).rows(ROWS, replace(SCENE, edits=()))


def test_rates_that_leave_no_task():
    two = (Replay(rate=0.5), Replay(rate=0.5))
    with pytest.raises(UserError, match=r"add up to 1 or more: 0\.5 \(replay\) \+ 0\.5 \(replay\)"):
        two[0].check(SimpleNamespace(mitigations=two, tunes=()))
    with pytest.raises(UserError, match="add up to 1 or more"):
        mixed_rows(two, ROWS, SCENE)
    assert len(CITIES) == len(PEOPLE)
