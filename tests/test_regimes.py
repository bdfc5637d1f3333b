"""Edits written all at once, each alone, or in batches: what each reads and stores, never confused."""

import pytest

import retention
from retention.store import Store
from retention.study import Study
from retention.types import UserError
from tests.small_study import FACTS, ROME, document


@pytest.fixture(scope="module")
def results(tmp_path_factory, cache):
    root = tmp_path_factory.mktemp("regimes")
    for name, regimes in (("several", ["batch", {"name": "sequential", "size": 2}]), ("alone", ["single"])):
        changes = {"editor": ROME, "mitigations": [], "grid": {"regime": regimes}}
        retention.run(Study.of(document(**changes), name=name), results=root, cache=cache)
    return root


def test_a_sequence_is_read_after_each_batch_and_once_at_the_end(results):
    rows, sequence = retention.load(results / "several"), retention.load(results / "several", "sequence")
    n = FACTS["edited"]
    edited = rows[(rows["step"] == 0)]
    assert set(edited["edits_applied"]) == {n}
    assert sorted(set(sequence["edits_applied"])) == list(range(2, n + 1, 2))
    assert set(sequence["step"]) == {0}
    assert sequence["run_id"].nunique() == 1
    per_reading = sequence.groupby("edits_applied")["question_id"].nunique()
    assert per_reading.nunique() == 1
    assert not rows.duplicated(["run_id", "step", "question_id"]).any()
    # Right after the last batch all edits are in the weights, as at the end: the same but for the order of rounding.
    last = sequence[sequence["edits_applied"] == n].set_index("question_id")["logp_target"]
    end = edited[edited["run_id"].isin(sequence["run_id"].unique())].set_index("question_id")["logp_target"]
    assert (last - end.loc[last.index]).abs().max() < 1e-2


def test_each_edit_alone_has_a_run_of_its_own(results):
    rows, runs = retention.load(results / "alone"), retention.load(results / "alone", "runs")
    n = FACTS["edited"]
    assert len(runs) == runs["run_id"].nunique() == n
    assert runs["base_id"].nunique() == 1
    edited = rows[(rows["group"] == "edited") & (rows["form"] == "direct")]
    for step in (-1, 0):
        facts = edited[edited["step"] == step].groupby("run_id", observed=True)["fact_id"].agg(list)
        assert all(len(found) == 1 for found in facts), "a run asks for its own edit alone"
        assert len({found[0] for found in facts}) == n, "every edit has a run"
    assert set(rows[rows["step"] >= 0]["edits_applied"]) == {1}
    beside = rows[rows["group"].isin(["neighbor", "same_subject"])].groupby("run_id", observed=True)["fact_id"]
    assert beside.nunique().max() <= FACTS["neighbors"] + FACTS["same_subject"]
    assert (
        rows[rows["step"] == 0].groupby("run_id", observed=True)["group"].agg(set).map(lambda g: "intrinsic" in g)
    ).all()


def test_one_edit_alone_is_the_first_batch_of_one(results, cache, tmp_path):
    """The first batch of one edit is the first edit alone; readings differ by what shares a forward pass, not more."""
    changes = {"editor": ROME, "mitigations": [], "grid": {"regime": [{"name": "sequential", "size": 1}]}}
    retention.run(Study.of(document(**changes), name="ones"), results=tmp_path, cache=cache)
    sequence = retention.load(tmp_path / "ones", "sequence")
    first = sequence[sequence["edits_applied"] == 1].set_index("question_id")["logp_target"]
    alone, store = retention.load(results / "alone"), Store(results)
    runs = retention.load(results / "alone", "runs")
    run = next(r for r in runs.itertuples() if store.settings("edits", r.edit_id)["only"] == 0)
    mine = alone[(alone["run_id"] == run.run_id) & (alone["step"] == 0)].set_index("question_id")["logp_target"]
    assert (first.loc[mine.index] - mine).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("regime", "message"),
    [
        ("sequental", "did you mean 'sequential'"),
        ({"name": "sequential", "size": 0}, "size"),
        ({"name": "sequential", "sise": 2}, "did you mean 'size'"),
        ({"name": "batch", "size": 2}, "unknown key"),
    ],
)
def test_a_wrong_regime_is_told(regime, message):
    with pytest.raises(UserError, match=message):
        Study.of(document(regime=regime), name="x")


def test_a_soft_prompt_is_not_written_in_sequence():
    with pytest.raises(UserError, match="ptuning changes no weight"):
        Study.of(document(regime={"name": "sequential"}, editor="ptuning", grid={}), name="x")
