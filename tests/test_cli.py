"""The command line: what it prints, and one clear message with exit code 2 for everything that a user can get wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from retention.cli import main
from tests.small_study import FACTS, ROME, TUNE, document, one

FACT = {
    "subject": "Anna Klein",
    "relation": "born",
    "prompt": "{} was born in",
    "object": "Rome",
    "target_new": "Paris",
}


@pytest.fixture
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, the small world in the cache, and no data of the machine's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETENTION_CACHE", str(cache))
    monkeypatch.delenv("RETENTION_DATA", raising=False)
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        out = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out.out, out.err

    return call


def write(place: Path, name: str = "small.yaml", **changes: Any) -> Path:
    path = place / name
    path.write_text(yaml.safe_dump(document(**changes) if "grid" in changes else one(**changes), sort_keys=False))
    return path


def refused(place: Path, call: Any, *arguments: Any) -> str:
    """What is said on standard error, without notes; exit code 2, no traceback, no file written anywhere."""
    before = set(place.rglob("*"))
    code, out, err = call(*arguments)
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert set(place.rglob("*")) == before
    return "".join(line for line in str(err).splitlines(keepends=True) if not line.startswith("note: "))


# ------------------------------------------------------------------------------------------------ bad input

WRONG: list[tuple[str, dict[str, Any], list[str]]] = [
    ("unknown key", {"sede": 1}, ["small.yaml", "sede", "did you mean 'seed'?"]),
    ("unknown editor", {"editor": "roma"}, ["small.yaml", "editor", "'roma'", "did you mean 'rome'?"]),
    ("unknown objective", {"objective": "stf"}, ["small.yaml", "objective", "did you mean 'sft'?"]),
    ("editor's layer", {"editor": ROME | {"layer": 7}}, ["small", "editor: rome.layer: layer 7", "layers 0 to 1"]),
    (
        "a layer of the editor that a random update is like",
        {"editor": {"name": "random", "like": {"name": "memit", "layers": [0, 2]}}},
        ["editor: memit.layers: layer 2", "layers 0 to 1"],
    ),
    (
        "more blocks than there are",
        {"editor": {"name": "freeze_tuning", "last": 3}},
        ["editor: freeze_tuning.last: 3 blocks of a model that has 2"],
    ),
    (
        "one of the editor's layers",
        {"editor": {"name": "memit", "layers": [0, 2]}},
        ["editor: memit.layers: layer 2", "layers 0 to 1"],
    ),
    (
        "freeze's layer",
        {"mitigations": [{"name": "freeze", "what": "up_to", "layer": 2}]},
        ["small", "mitigations: freeze.layer: layer 2", "layers 0 to 1"],
    ),
    (
        "too many facts",
        {"facts": FACTS | {"edited": 40}},
        ["small: facts: edited (40) + control (2) = 42", "world offers 8"],
    ),
    (
        "too many phrasings",
        {"mitigations": [{"name": "paraphrase", "n": 30}]},
        ["small: mitigations: paraphrase: n = 30 phrasings were asked for"],
    ),
    (
        "facts of another model",
        {"model": "no/where"},
        ["small: facts: world: these are the facts of `model: {name: world}`"],
    ),
    ("a model that is not there", {"model": "./nowhere"}, ["model: there is no folder './nowhere'", "give a folder"]),
    (
        "plain text for sft",
        {"tune": TUNE | {"data": {"name": "world", "task": "text"}}},
        ["small: tune.data", "Use objective clm"],
    ),
    (
        "too many people",
        {"tune": TUNE | {"data": TUNE["data"] | {"people": 99}}},
        ["99 new people", "Ask for at most 6"],
    ),
    (
        "trainer's name",
        {"tune": TUNE | {"trainer": {"learning_rat": 1e-3}}},
        ["small: tune.trainer.learning_rat", "did you mean 'learning_rate'?"],
    ),
    (
        "trainer's type",
        {"tune": TUNE | {"trainer": {"learning_rate": "fast"}}},
        ["small: tune.trainer.learning_rate", "number, got 'fast'"],
    ),
    (
        "trainer's number",
        {"tune": TUNE | {"trainer": {"learning_rate": -1}}},
        ["tune.trainer.learning_rate: expected a number that is not negative, got -1"],
    ),
    (
        "what peft refuses",
        {"adapter": {"name": "lora", "settings": {"r": 0}}},
        ["small: adapter lora: peft cannot put it on this model", "positive integer"],
    ),
    (
        "a frozen model",
        {"mitigations": [{"name": "freeze", "what": "from", "layer": 0}]},
        ["small: mitigations: freeze leaves nothing to train"],
    ),
    (
        "a block of a longer model",
        {"objective": {"name": "clm", "block": 5000}},
        ["small: objective: clm.block: 5000 tokens; the model has 192 positions"],
    ),
    (
        "a chat with a model that has none",
        {"objective": {"name": "sft", "assistant_only": True}},
        ["small: objective: sft.assistant_only reads rows as a chat, and this model's tokenizer has no chat template"],
    ),
    (
        "an adapter's module",
        {"adapter": {"name": "lora", "targets": ["q_prjo"]}},
        ["adapter lora: targets: this model has no module 'q_prjo'; did you mean 'q_proj'?"],
    ),
    (
        "a mitigation of another editor",
        {"editor": "lora", "mitigations": [{"name": "margin", "probability": 0.9}]},
        ["mitigations: margin: lora optimises no v*", "use strength"],
    ),
]
ABSENT: list[tuple[str, dict[str, Any], list[str]]] = [
    ("a corpus that is not there", {"corpus": "none.txt"}, ["corpus: no such file: none.txt"]),
    (
        "rows that are not there",
        {"tune": TUNE | {"data": {"name": "jsonl", "path": "none.jsonl"}}},
        ["tune.data: dataset: no such file: none.jsonl"],
    ),
    (
        "data that nobody put anywhere",
        {"facts": {"name": "counterfact"}},
        ["give its place as `path` in the study, or set RETENTION_DATA"],
    ),
    ("facts that are not there", {"facts": {"name": "jsonl", "path": "none.jsonl"}}, ["no fact file at none.jsonl"]),
]


@pytest.mark.parametrize(("changes", "said"), [w[1:] for w in ABSENT], ids=[w[0] for w in ABSENT])
def test_what_is_not_here_stops_a_run_and_is_told_after_a_plan(place, call, changes, said):
    study = write(place, **changes)
    err = refused(place, call, "run", study)
    assert err.startswith("retention: ")
    code, out, again = call("plan", study)
    assert code == 2
    assert "   1 fine-tune, 0 done" in out
    assert re.search(r"  to do [0-9a-f]{16}  editor=identity", out)
    assert list(place.iterdir()) == [study]
    for text in (err, again):
        assert len(text.splitlines()) == 1
        for part in said:
            assert part in text, text


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize(("changes", "said"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_settings(place, call, verb, changes, said):
    err = refused(place, call, verb, write(place, **changes))
    for part in said:
        assert part in err, err
    assert err.startswith("retention: ")
    # Another model than the world's is wrong for the world's facts and for its tasks too.
    assert len(err.splitlines()) == (3 if "model" in changes else 1)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([FACT | {"prompt": "Bernd was born in"}], ["jsonl offers 0"]),
        ([FACT, FACT | {"id": "2", "target_new": "Rome"}], ["line 2: the new target is the old one ('Rome')"]),
        ([FACT | {"target_new": " "}], ["line 1: 'target_new' is empty"]),
        ([FACT | {"object": ""}], ["line 1: 'object' is empty"]),
        ([FACT, '{"subject": "Anna"'], ["line 2, column 19: not JSON"]),
        ([{k: v for k, v in FACT.items() if k != "subject"}], ["line 1: no key 'subject'"]),
        ([FACT | {"promt": "{} is"}], ["line 1: unknown key 'promt'", "did you mean 'prompt'?"]),
        ([FACT, FACT | {"id": "2"}], ["small: facts: edited (4)", "jsonl offers 1"]),
        ([], ["holds no records"]),
    ],
)
def test_wrong_facts(place, call, lines, said):
    path = place / "my-facts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    study = write(place, facts={"name": "jsonl", "path": "my-facts.jsonl", "edited": 4})
    err = refused(place, call, "run", study)
    for part in said:
        assert part in err, err
    assert "my-facts.jsonl" in err or "jsonl offers" in err
    assert len(err.splitlines()) == 1


def test_wrong_rows_of_data(place, call):
    (place / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"promt": "a", "completion": "b"}\n')
    study = write(place, tune=TUNE | {"data": {"name": "jsonl", "path": "rows.jsonl"}})
    err = refused(place, call, "run", study)
    assert "rows.jsonl: line 2: expected a text under 'prompt'; did you mean 'promt'?" in err


def test_several_mistakes_are_told_at_once(place, call):
    changes = {
        "editor": ROME | {"layer": 9},
        "facts": FACTS | {"edited": 40},
        "tune": TUNE | {"trainer": {"packing": 3}},
    }
    err = refused(place, call, "run", write(place, **changes))
    assert len(err.splitlines()) == 3
    changes |= {"corpus": "none.txt"}
    assert "facts: edited (40)" in refused(place, call, "run", write(place, **changes))


def test_no_fact_that_the_model_knows(place, call):
    """This takes the model to find out; nothing is published then."""
    names = ("Xo", "Yp", "Zq", "Wr", "Vs")
    lines = [FACT | {"id": name, "subject": f"{name} Klein"} for name in names]
    (place / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"name": "jsonl", "path": "facts.jsonl", "edited": 1, "intrinsic": 2}
    code, _, err = call("run", write(place, facts=facts), "--quiet")
    assert code == 2
    assert "2 intrinsic facts were asked for; of 4 candidates the base model knows none of them" in err
    assert "Traceback" not in err
    assert not list((place / "results").glob("*/*/complete.json"))


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_results_folder_that_belongs_to_something_else(place, call, verb):
    (place / "photos").mkdir()
    (place / "photos" / "cat.jpg").write_text("meow")
    err = refused(place, call, verb, write(place), "--results", "photos")
    assert "photos: is not a results folder of retention (it holds 'cat.jpg'" in err
    (place / "old").mkdir()
    (place / "old" / "store.json").write_text('{"format": "retention", "schema": 0}')
    assert "old: written with schema 0" in refused(place, call, verb, write(place), "--results", "old")
    (place / "file").write_text("")
    assert "file: is a file" in refused(place, call, verb, write(place), "--results", "file")


def test_files_and_words_that_are_not_there(place, call):
    write(place)
    assert "did you mean small.yaml?" in refused(place, call, "run", "smal.yaml")
    assert "no results here" in refused(place, call, "status")
    assert "no results here" in refused(place, call, "status", "--results", "elsewhere")
    assert "override 'tune.steps'" in refused(place, call, "run", "small.yaml", "tune.steps")
    assert "No such command" in refused(place, call, "rnu", "small.yaml")
    assert "No such option" in refused(place, call, "run", "small.yaml", "--result", "x", "--nope")
    assert "Missing argument" in refused(place, call, "run")
    (place / "bad.yaml").write_text("a: 1\na: 2\n")
    assert "bad.yaml: line 2: the key 'a' is written twice" in refused(place, call, "run", "bad.yaml")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "facts.jsonl, line 1, column 2: not JSON"),
        (
            [json.dumps({"subject": "A", "relation": "r", "object": "b", "templates": ["no gap"]})],
            "facts.jsonl: no fact to learn; omitted 1",
        ),
        (
            [json.dumps({"subject": "A", "relation": "r", "object": "b", "prompts": ["B is"]})],
            "no fact to learn; omitted 1",
        ),
        ([json.dumps({"subject": "A", "relation": "r", "object": " ", "prompts": ["A is"]})], "'object' is empty"),
        ([], "holds no records"),
    ],
)
def test_pretraining_on_wrong_facts(place, call, lines, said):
    (place / "facts.jsonl").write_text("".join(line + "\n" for line in lines))
    assert said in refused(place, call, "pretrain", "--facts", "facts.jsonl", "--out", "model")


def test_pretraining_on_a_file_that_is_not_there(place, call):
    assert "none.jsonl: no such file" in refused(place, call, "pretrain", "--facts", "none.jsonl", "--out", "model")
    (place / "binary").write_bytes(b"PK\x03\x80")
    err = refused(place, call, "pretrain", "--facts", "binary", "--out", "model")
    assert err == "retention: binary, line 1: not UTF-8 text (invalid start byte)\n"


def test_taking_an_edit_out_of_a_folder_that_is_not_there(place, call):
    (place / "edited").mkdir()
    err = refused(place, call, "revert", "edite", "--out", "back")
    assert "edite: no such folder; did you mean edited?; expected one that `retention edit`" in err
    assert "edited: holds no edit to take out" in refused(place, call, "revert", "edited", "--out", "back")


# ------------------------------------------------------------------------------------------------ good input


def test_plan_prints_the_runs_and_computes_nothing(place, call, finished, monkeypatch):
    from retention import stages

    monkeypatch.setattr(stages, "load", lambda *_: pytest.fail("a model was loaded"))
    study = write(place, grid=document()["grid"])
    code, out, err = call("plan", study)
    assert code == 0
    (note,) = err.splitlines()  # of four runs, two are the same experiment
    assert note.startswith(
        "note: small: mitigations: freeze acts on what the edit changed, and editor identity changes"
    )
    assert note.endswith("`what: listed` with `layers` freezes the same blocks for every editor")
    assert "small: Are edits forgotten more readily than what the model knew before?" in out
    for line in ("1 base reading, 0 done", "2 distinct edits, 0 done", "4 fine-tunes, 0 done"):
        assert line in out
    assert out.count("to do") == 4
    assert out.count("mitigations=freeze") == 2
    assert [p.name for p in place.iterdir()] == ["small.yaml"]
    code, out, _ = call("plan", study, "--results", finished)
    assert "4 fine-tunes, 4 done" in out
    assert "to do" not in out
    assert "time" not in out
    code, out, _ = call("plan", study, "seed=0,1", "--results", finished)
    assert "8 fine-tunes, 4 done" in out
    assert "time: as measured in this folder for 5 stages like those done here" in out  # an edit, 4 fine-tunes
    assert "time: 2 stages from their" in out  # base readings and the identity of the other seed


def test_a_finished_study_is_run_again_in_no_time(place, call, finished, monkeypatch):
    from retention import stages

    monkeypatch.setattr(stages, "load", lambda *_: pytest.fail("a model was loaded"))
    started = time.process_time()
    code, out, err = call("run", write(place, grid=document()["grid"]), "--results", finished)
    assert (code, out) == (0, f"results: {finished / 'small'}\n")
    assert err.startswith("note: small: mitigations: freeze acts on what the edit changed")
    assert len(err.splitlines()) == 1
    assert time.process_time() - started < 2


def test_status_names_what_is_left(place, call, finished):
    shutil.copytree(finished, place / "results")
    code, out, _ = call("status")
    assert (code, out) == (0, "small: 4 of 4 runs complete\n")
    run = next((place / "results" / "runs").iterdir())
    (run / "complete.json").unlink()
    code, out, _ = call("status")
    assert code == 0
    first, second = out.splitlines()
    assert first == "small: 3 of 4 runs complete"
    assert re.match(rf"to do +{run.name} +editor=", second.strip())


def test_run_tells_how_far_it_is(place, call, finished):
    shutil.copytree(finished, place / "results")
    shutil.rmtree(next((place / "results" / "runs").iterdir()))
    study = write(place, grid=document()["grid"])
    code, out, err = call("run", study)
    assert (code, out) == (0, "results: results/small\n")
    assert "[1/1] tune editor=" in err
    assert "fine-tuning" in err
    assert "it/s" not in err  # no bars of the libraries
    shutil.rmtree(next((place / "results" / "runs").iterdir()))
    code, out, err = call("run", study, "--quiet")
    assert (code, err) == (0, "")


def test_help_of_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "what does it forget?" in out
    for verb in ("plan", "run", "status", "pretrain", "schema"):
        assert verb in out
        code, text, _ = call(verb, "--help")
        assert code == 0
        assert "Usage:" in text


# ------------------------------------------------------------------------------------------------ real processes


def process(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "retention.cli", *arguments], cwd=place, text=True, env=os.environ | {"COLUMNS": "200"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_mistake_in_a_real_process(place):
    (place / "s.yaml").write_text(yaml.safe_dump(one(sede=1)))
    started = process(place, "run", "s.yaml")
    out, err = started.communicate()
    assert (started.returncode, out) == (2, "")
    assert err == "retention: s.yaml: sede: unknown key; did you mean 'seed'?\n"


def test_an_interrupted_run_says_how_to_go_on(place):
    study = write(place, tune=TUNE | {"steps": 100_000}, at=[1])
    started = process(place, "run", str(study))
    assert started.stderr is not None
    for line in started.stderr:
        if "fine-tuning" in line:
            started.send_signal(signal.SIGINT)
            break
    _, err = started.communicate()
    assert started.returncode == 130
    assert "retention: interrupted after" in err
    assert "run the same command to go on" in err
    assert "Traceback" not in err
    assert len(list((place / "results" / "edits").glob("*/complete.json"))) == 1
    assert not list((place / "results" / "runs").glob("*/complete.json"))


def test_power_of_a_pilot(call, finished, tmp_path):
    results = shutil.copytree(finished, tmp_path / "results")
    code, out, _ = call("power", results / "small", "--difference", "0.2", "--facts", "10,400")
    assert code == 0
    assert "10 facts 400 facts" in " ".join(out.split())
    assert "no comparison possible: no edited fact is right at step 0" in out  # what identity left
    seeds = next(line for line in out.splitlines() if line.split()[:2] == ["rome", "none"])
    assert "pairs of facts start alike, fewer than 20" in seeds
    code, out, _ = call("power", results / "small", "--difference", "0.2", "--axis", "mitigations")
    assert code == 0
    assert "edited facts, mitigations against none" in out
    for arguments, said in (
        (["small", "--difference", "20"], "difference: expected a share between 0 and 1, such as 0.1; got 20.0"),
        (["small", "--difference", "0.1", "--power", "80"], "power: expected a probability between 0 and 1"),
        (["small", "--difference", "0.1", "--facts", "few"], "--facts: expected numbers, such as 50,100; got 'few'"),
        (["small", "--difference", "0.1", "--group", "edits"], "--group: expected edited or intrinsic; got 'edits'"),
        (["small", "--difference", "0.1", "--form", "indirect"], "--form: unknown 'indirect'; this study asked"),
        (["small", "--difference", "0.1", "--axis", "mitigation"], "did you mean 'mitigations'"),
        (["smal", "--difference", "0.1"], "did you mean 'small'"),
        ([".", "--difference", "0.1"], "give the folder of one study in it: small"),
    ):
        code, _, err = call("power", results / arguments[0], *arguments[1:])
        assert (code, said in err) == (2, True), err
