"""The real quickstart: its data are what they say, and CI's cut of it never passes for having run when it did not."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from retention.facts.files import read_pool
from retention.study import Study

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "experiments" / "data"


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_facts_are_false_to_edit_in_phrasings_that_probes_hold_out() -> None:
    found = records("smollm2_facts.jsonl")
    assert 150 <= len(found) <= 250
    for record in found:
        assert record["target_new"] != record["object"]
        assert len(record["prompts"]) >= 2
        assert len(record["paraphrases"]) == 2
        assert not set(record["prompts"]) & set(record["paraphrases"])
        assert record["source"].startswith("T-REx")
    assert len({r["id"] for r in found}) == len(found)
    assert len(read_pool(DATA / "smollm2_facts.jsonl").edits) == len(found)


def test_calibration_facts_are_of_other_subjects() -> None:
    studied, calibrated = ({r["subject"] for r in records(f"smollm2_{n}.jsonl")} for n in ("facts", "calibration"))
    assert len(calibrated) >= 100
    assert not studied & calibrated


def test_phrasings_are_our_own() -> None:
    folder = Path(os.environ.get("RETENTION_DATA") or ROOT.parent / "shared" / "data") / "trex_pararel" / "pattern_data"
    if not folder.is_dir():
        pytest.skip("ParaRel's phrasings are not here")
    theirs = {
        re.sub(r"\W+", " ", json.loads(line)["pattern"].replace("[X]", "").replace("[Y]", "")).strip().lower()
        for file in (folder / "graphs_json").glob("P*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    ours = {p for r in records("smollm2_facts.jsonl") for p in (*r["prompts"], *r["paraphrases"])}
    # A handful of words ("The official language of X is") leaves few ways to say it; longer sentences must be ours.
    long = {p for p in ours if len(re.sub(r"\W+", " ", p.replace("{}", "")).split()) > 6}
    assert not {p for p in long if re.sub(r"\W+", " ", p.replace("{}", "")).strip().lower() in theirs}


def test_instructions_are_what_their_script_makes(tmp_path: Path) -> None:
    import runpy

    made = runpy.run_path(str(DATA / "make_instructions.py"))
    rng = made["random"].Random(made["SEED"])
    assert records("instructions.jsonl")[0] == made["row"](rng)
    assert len(records("instructions.jsonl")) == made["ROWS"]


def test_the_study_is_valid() -> None:
    study = Study.load(ROOT / "experiments" / "smollm2_quickstart.yaml")
    assert len(study.runs) == 4
    assert {run.settings.editor.name for run in study.runs} == {"memit", "rome"}


@pytest.mark.parametrize(("required", "code"), [("1", 1), ("0", 0)])
def test_a_skip_is_printed_and_fails_where_it_must_run(tmp_path: Path, required: str, code: int) -> None:
    fake = tmp_path / "retention"
    fake.write_text("#!/bin/sh\necho 'the package index was not reached' >&2\nexit 2\n")
    fake.chmod(0o755)
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RETENTION_REQUIRE_REAL": required}
    ended = subprocess.run([ROOT / ".ci" / "real"], env=os.environ | place, capture_output=True, text=True)
    assert ended.returncode == code
    assert ended.stdout.splitlines()[-1] == "real: SKIPPED (the package index was not reached)"


def test_a_failing_study_is_no_skip(tmp_path: Path) -> None:
    fake = tmp_path / "retention"
    fake.write_text('#!/bin/sh\n[ "$1" = fetch ]\n')
    fake.chmod(0o755)
    ended = subprocess.run(
        [ROOT / ".ci" / "real"], env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "real: ran" not in ended.stdout
