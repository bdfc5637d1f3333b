"""`retention doctor`: what it finds, with its advice, and that it makes and fetches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from retention import doctor
from retention.types import UserError
from tests import tiny_gguf
from tests.small_study import TUNE, one


def by_name(lines: list[doctor.Line]) -> dict[str, doctor.Line]:
    return {line.what: line for line in lines}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study file in an empty working folder; no data of the machine's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETENTION_DATA", raising=False)
    return tmp_path / "mine.yaml"


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(one(**changes), sort_keys=False))
    return path


# ------------------------------------------------------------------------------------------------ the machine


def test_versions_are_held_against_their_ranges():
    have = {"a": "1.5", "b": "2.0", "d": "1.0rc1", "x": None}
    asked = ["a>=1,<2", "b<2", "c>=3", "d>=0.9", 'x>=1; extra == "lm-eval"', 'y; extra == "dev"']
    found = by_name(doctor.versions(asked, lambda name: have.get(name)))
    assert set(found) == {"python", "a", "b", "c", "d", "x"}
    assert {name: line.state for name, line in found.items()} == {
        "python": "ok", "a": "ok", "b": "missing", "c": "missing", "d": "ok", "x": "note",
    }  # fmt: skip
    assert found["b"].found == "2.0, and <2 is supported; pip install 'b<2'"
    assert found["c"].found == "not installed; pip install 'c>=3'"
    assert "pip install 'retention[lm-eval]'" in found["x"].found


def test_an_extra_that_is_there_is_checked_too():
    (_, line) = doctor.versions(['x>=2; extra == "lm-eval"'], lambda name: "1.0")
    assert line.state == "missing"


def test_this_environment_is_within_its_ranges():
    found = doctor.examine()
    assert [line for line in found["versions"] if line.state == "missing"] == []
    assert {"torch", "trl", "peft"} <= set(by_name(found["versions"]))
    assert {"processors", "memory"} <= set(by_name(found["devices"]))


def test_sizes():
    assert [doctor.size(n) for n in (0, 1023, 1024, 3 * 2**20, 2**30, 1.5 * 2**40)] == [
        "0 B", "1023 B", "1 KiB", "3 MiB", "1.0 GiB", "1536.0 GiB",
    ]  # fmt: skip


def test_caches_are_told_by_kind_and_nothing_is_made(tmp_path):
    cache = tmp_path / "cache"
    (cache / "worlds" / "abc").mkdir(parents=True)
    (cache / "worlds" / "abc" / "model.safetensors").write_bytes(b"x" * 2048)
    (cache / "values-1.safetensors").write_bytes(b"x" * 1024)
    (cache / "values-2.safetensors").write_bytes(b"x" * 1024)
    found = by_name(doctor.caches(cache, tmp_path / "hub"))
    assert found["  worlds"].found == "2 KiB, 1 entries"
    assert found["  values"].found == "2 KiB, 2 entries"
    assert found["models of the Hub"].found == f"{tmp_path / 'hub'}, 0 B"
    absent = by_name(doctor.caches(tmp_path / "none" / "yet", tmp_path / "hub"))
    assert absent["RETENTION_CACHE"].found.endswith("yet (not made yet)")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


def test_a_cache_that_cannot_be_written_to_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    line = by_name(doctor.caches(tmp_path / "cache", tmp_path))["RETENTION_CACHE"]
    assert line.state == "missing"
    assert "set RETENTION_CACHE to a folder of yours" in line.found


def test_data_are_told_by_the_source_that_reads_them(tmp_path):
    (tmp_path / "zsre").mkdir()
    (tmp_path / "zsre" / "zsre_3k.json").write_bytes(b"x" * 1024)
    (tmp_path / "more").mkdir()
    found = by_name(doctor.data(str(tmp_path)))
    assert found["  facts: zsre"].found == "zsre/zsre_3k.json: 1 KiB"
    assert found["  facts: counterfact"].found == "counterfact/counterfact_10k.jsonl: not there"
    assert found["  facts: counterfact"].state == "note"
    assert found["  other folders"].found == "more"
    assert doctor.data(None)[0].state == "note"
    assert doctor.data(str(tmp_path / "nowhere"))[0].state == "missing"


# ------------------------------------------------------------------------------------------------ a study


def test_a_study_that_can_be_run(study, tmp_path):
    found = doctor.needs(write(study), [], tmp_path / "cache")
    assert [line for line in found if line.state == "missing"] == []
    assert by_name(found)["model world"].found == "will be pretrained on first use"
    assert found[-1].found == "every check passes"
    assert not (tmp_path / "cache").exists()


def test_a_pretrained_world_is_found(study, cache):
    line = by_name(doctor.needs(write(study), [], cache))["model world"]
    assert line.state == "ok"
    assert line.found.startswith("pretrained, ")


def test_what_a_study_lacks_is_said_once_each(study, tmp_path):
    lacking = {
        "facts": {"name": "counterfact"},
        "tune": TUNE | {"data": {"name": "jsonl", "path": "none.jsonl"}},
        "corpus": "texts.txt",
        "editor": {"name": "rome", "layer": 0},
    }
    found = doctor.examine(write(study, **lacking), cache=tmp_path / "cache")
    told = [line.found for line in doctor.missing({"study": found[f"study {study}"]})]
    for part in ("no CounterFact file", "no such file: none.jsonl", "corpus: no such file: texts.txt"):
        assert sum(part in text for text in told) == 1, (part, told)
    assert doctor.text(found).endswith(f"{len(doctor.missing(found))} missing")


def test_a_setting_that_does_not_fit_the_model(study, tmp_path):
    (line,) = doctor.missing({"": doctor.needs(write(study, editor={"name": "rome", "layer": 9}), [], tmp_path)})
    assert "layers 0 to 1" in line.found


def test_a_model_that_is_not_here_is_not_fetched(study, tmp_path, monkeypatch):
    import huggingface_hub
    import huggingface_hub.constants

    asked = []

    def absent(name: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append((name, revision, local_files_only))
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    model = {"name": "some/model", "revision": "abc"}
    path = write(study, model=model, facts={"name": "jsonl", "path": "none.jsonl"})
    for offline, state in ((False, "note"), (True, "missing")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        line = by_name(doctor.needs(path, [], tmp_path))["model some/model"]
        assert line.state == state
        assert "hf download some/model --revision abc" in line.found
    assert asked == [("some/model", "abc", True)] * 2


def test_a_folder_that_is_no_model(study, tmp_path):
    line = by_name(doctor.needs(write(study, model="./nowhere"), [], tmp_path))["model ./nowhere"]
    assert line.state == "missing"
    assert "there is no folder './nowhere'" in line.found


def test_settings_that_are_wrong_are_told_as_by_plan(study, tmp_path):
    with pytest.raises(UserError, match="did you mean 'seed'"):
        doctor.needs(write(study), ["sede=1"], tmp_path)


def test_overrides_count(study, tmp_path):
    path = write(study, corpus="texts.txt")
    assert doctor.missing({"": doctor.needs(path, [], tmp_path)})
    assert not doctor.missing({"": doctor.needs(path, ["~corpus"], tmp_path)})


def test_a_gguf_file_is_not_converted_and_a_fetched_model_is_named_with_its_command(study, monkeypatch):
    pytest.importorskip("gguf")
    cache = study.parent / "cache"
    monkeypatch.setenv("RETENTION_CACHE", str(cache))
    tiny_gguf.write(study.parent / "x.gguf")
    facts = study.parent / "facts.jsonl"
    facts.write_text("")
    settings = {"facts": {"name": "jsonl", "path": str(facts)}}
    line = by_name(doctor.needs(write(study, model="./x.gguf", **settings), (), cache))["model ./x.gguf"]
    assert (line.state, "not converted yet" in line.found) == ("note", True)
    line = by_name(doctor.needs(write(study, model="smollm2", **settings), (), cache))["model smollm2"]
    assert (line.state, "`retention fetch smollm2`" in line.found) == ("missing", True)
    assert not cache.exists()
