"""Readings in bfloat16: what is right is float32's, whatever the rounding did, and the rest says its precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from retention import half
from retention.probes import Generate, Score, _twice, read_all
from retention.probes._forward import Scores
from retention.probes._rows import NEXT, Continuation
from retention.probes.ability import heldout
from retention.types import Question, Reading

SAME = ("first_correct", "all_correct", "prefers_target", "generated", "gen_exact", "state", "n_target_tokens")


def asked(words: Any, count: int) -> list[Question]:
    """Texts, answers and foils of the tokenizer's own words, drawn by seed."""
    pieces = sorted(word for word in words.get_vocab() if word.isalpha())
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> str:
        return " ".join(pieces[i] for i in torch.randint(0, len(pieces), (n,), generator=generator).tolist())

    return [
        Question(fact_id=str(i), group="intrinsic", form="direct", text=some(3), answer=some(1 + i % 2), foil=some(1))
        for i in range(count)
    ]


def right(model: Any, words: Any, questions: list[Question]) -> list[Question]:
    """With what the model says as the answer of every second question, so that many are right by little."""
    said = Generate(max_new_tokens=1).read(model, words, questions, 0)
    return [
        replace(q, answer=r.generated) if i % 2 and r.generated else q
        for i, (q, r) in enumerate(zip(questions, said, strict=True))
    ]


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def given(request: pytest.FixtureRequest) -> tuple[Any, Any, list[Question]]:
    model, words = tiny.build(request.param)
    return model, words, right(model, words, asked(words, 400))


def in_bfloat16(given: Any) -> tuple[list[Reading], half.Reading]:
    with half.reading("bfloat16") as tally:
        return read_all([Score(), Generate(max_new_tokens=2)], *given, 0), tally


def test_what_is_right_is_float32s(given):
    exact = read_all([Score(), Generate(max_new_tokens=2)], *given, 0)
    found, tally = in_bfloat16(given)
    assert 0.05 < sum(bool(r.all_correct) for r in exact) / len(exact) < 0.95
    for a, b in zip(found, exact, strict=True):
        assert [getattr(a, name) for name in SAME] == [getattr(b, name) for name in SAME]
        assert (a.target_rank == 1) == (b.target_rank == 1)
        assert a.logp_target == pytest.approx(b.logp_target, abs=1e-5 if a.precision == "float32" else 0.5)
    assert {r.precision for r in exact} == {"float32"}
    assert {r.precision for r in found} == {"float32", "bfloat16"}
    assert 0 < tally.again < tally.read
    assert tally.record()["read"]["share_read_again"] == tally.again / tally.read


def test_without_reading_again_it_would_not_be(given, monkeypatch):
    """That the rule is needed here: what is not read again differs."""
    exact = read_all([Score()], *given, 0)
    monkeypatch.setattr(_twice, "MARGIN", 0.0)
    with half.reading("bfloat16"):
        found = read_all([Score()], *given, 0)
    assert [r.logp_target for r in found] != [r.logp_target for r in exact]


def scores(*leads: float, logp: float = -1.0) -> Scores:
    ranks = tuple(1 if lead >= 0 else 2 for lead in leads)
    n = len(leads)
    return Scores(logps=(logp,) * n, ranks=ranks, best=(7,) * n, leads=leads, gaps=(9.0,) * n)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of made-up continuations: the lead is the first id over 100, in bfloat16 0.1 more."""

    def token_scores(model: Any, wanted: Any, *_: Any, **__: Any) -> list[Scores]:
        more = 0.1 if torch.is_autocast_enabled("cpu") else 0.0
        return [scores(c.ids[0] / 100 + more, logp=c.ids[1] / 100 + more) for c in wanted]

    monkeypatch.setattr(_twice, "token_scores", token_scores)


def of(lead: int, logp: int = 0) -> Continuation:
    return Continuation(ids=(lead, logp, NEXT), start=2)


@pytest.mark.usefixtures("made_up")
def test_what_is_within_twice_the_largest_error_is_read_again(monkeypatch):
    monkeypatch.setattr(_twice, "SAMPLE", 1)
    wanted = [of(500), of(5), of(-25), of(-35), of(9), of(12), of(50)]
    with half.reading("bfloat16") as tally:
        found = _twice.scores_of(torch.nn.Linear(1, 1), wanted, [], 100)
    again = {of(500), of(5), of(-25), of(9)}  # 0.15, -0.15, 0.19 in bfloat16; 0.22 and -0.25 are beyond 0.2
    assert set(found.exact) == again
    assert found.scores[of(5)].leads == (0.05,)
    assert found.scores[of(12)].leads == pytest.approx((0.22,))
    assert (tally.read, tally.again) == (7, 4)
    assert found.precision(of(5), None, "too_long") == "float32"
    assert found.precision(of(5), of(12)) == "bfloat16"


@pytest.mark.usefixtures("made_up")
def test_both_of_a_pair_that_is_close_are_read_again(monkeypatch):
    monkeypatch.setattr(_twice, "SAMPLE", 1)
    apart, close = (of(500, -100), of(500, -500)), (of(900, -200), of(900, -200))
    other = of(900, -201)
    with half.reading("bfloat16"):
        found = _twice.scores_of(torch.nn.Linear(1, 1), [*apart, close[0], other], [apart, (close[0], other)], 100)
    assert set(found.exact) == {*apart}  # a shift of all log-probabilities moves no difference
    assert close[0] not in found.exact


def test_held_out_loss_in_bfloat16(given):
    model, words, questions = given
    rows = [{"prompt": q.text, "completion": q.answer} for q in questions[:20]]
    exact = heldout(model, words, rows)
    with half.reading("bfloat16"):
        found = heldout(model, words, rows)
    assert 0 < abs(found.loss - exact.loss) < 0.05


def test_float32_reads_as_before(given):
    exact = read_all([Score()], *given, 0)
    with half.reading("float32") as tally:
        assert read_all([Score()], *given, 0) == exact
    assert tally.record() == {}
