"""`retention calibrate`: seeded settings, successive halving, resuming, and the preset that comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from retention import calibrate, cli
from retention.calibrate import Found, Journal, Plan, Trial, drawn_settings, editor_of, rounds, search
from retention.editors.memit import Memit
from retention.facts.draw import apart
from retention.facts.files import read_pool
from retention.layers import Recommendation
from retention.presets import read, set_aside, settle
from retention.types import UserError
from tests.tiny import build, save

CONFIG = LlamaConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=4)
NONE = Recommendation(rome=None, memit=(), reason="")


def trial(
    settings: dict[str, Any], edits: int = 8, efficacy: float = 1.0, intrinsic: float = 1.0, **more: Any
) -> Trial:
    found = {"paraphrase": 0.5, "neighbors": None, "n": {"intrinsic": 10, "neighbors": 0}, "seconds": 1.0, **more}
    return Trial(settings=settings, edits=edits, efficacy=efficacy, intrinsic=intrinsic, **found)


class Table:
    """Stands in for a bench: a setting's outcome is a function of it, and every call is noted."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def tried(self, section: str, settings: Any, edits: int) -> Trial:
        self.calls.append((settings["x"], edits))
        return trial(dict(settings), edits, efficacy=min(1.0, settings["x"] / 10), intrinsic=1 - settings["x"] / 100)


@pytest.mark.parametrize("section", list(calibrate.SPACES))
@pytest.mark.parametrize("additive", [True, False])
def test_settings_are_drawn_by_the_seed_are_valid_and_share_v_star(section: str, additive: bool) -> None:
    found = drawn_settings(section, CONFIG, NONE, additive, Plan(settings=32))
    assert len(found) == 32
    assert found == drawn_settings(section, CONFIG, NONE, additive, Plan(settings=32))
    assert found != drawn_settings(section, CONFIG, NONE, additive, Plan(settings=32, seed=1))
    for settings in found:
        editor = settle(editor_of(section, settings), CONFIG)
        layers = settings.get("layers") or [settings.get("layer", 0)]
        assert set(layers) <= set(range(4))
        assert additive or section != "memit" or len(layers) == 1
        assert editor.open <= settings.keys()
    if section in calibrate.SHARED:
        rest = [{k: v for k, v in s.items() if k not in ("covariance_weight", "variant")} for s in found[1:]]
        assert len({json.dumps(r) for r in rest}) <= 1 + 31 // calibrate.SHARED[section]


def test_better_settings_go_on_and_all_edits_decide(tmp_path: Path) -> None:
    table = Table()
    found = search("memit", [{"x": x} for x in range(12)], table, Journal(tmp_path / "j"), Plan(edits=8))  # type: ignore[arg-type]
    assert rounds(8) == [2, 4, 8]
    assert [edits for _, edits in table.calls] == [2] * 12 + [4] * 4 + [8] * 2
    assert found.complete
    assert found.best.settings == {"x": 10}  # 10 and 11 write all; 10 damages less
    assert {x for x, edits in table.calls if edits == 4} == {8, 9, 10, 11}


def test_efficacy_counts_first_then_damage_then_paraphrases() -> None:
    writes, gentle, said = (
        trial({"a": 1}),
        trial({"a": 2}, efficacy=0.9, intrinsic=1.0),
        trial({"a": 3}, paraphrase=0.9),
    )
    worse = trial({"a": 4}, efficacy=0.96, intrinsic=0.5)
    assert sorted([writes, gentle, said, worse], key=lambda t: t.merit)[0] == gentle
    found = Found(editor="rome", trials=(writes, gentle, said, worse), complete=True, seconds=1)
    assert found.best == said
    assert found.front == (said,)
    near = trial({}, intrinsic=0.5, neighbors=1.0, n={"intrinsic": 10, "neighbors": 30})
    assert near.kept == pytest.approx((5 + 30) / 40)


def test_what_was_tried_is_not_tried_again(tmp_path: Path) -> None:
    file, settings = tmp_path / "j" / "memit.jsonl", [{"x": x} for x in range(6)]
    whole = search("memit", settings, Table(), Journal(file), Plan(edits=4))  # type: ignore[arg-type]
    file.write_text("\n".join(file.read_text().splitlines()[:3]) + '\n{"settings": {"x"')  # killed while it wrote
    table = Table()
    again = search("memit", settings, table, Journal(file), Plan(edits=4))  # type: ignore[arg-type]
    assert table.calls[0] == (3, 1)
    assert again.best == whole.best
    late = Table()
    with pytest.raises(UserError, match="not one setting was tried"):
        search("memit", settings, late, Journal(tmp_path / "new"), replace(Plan(edits=4), minutes=-1.0))  # type: ignore[arg-type]
    stopped = search("memit", [*settings[:1], {"x": 77}], late, Journal(file), Plan(edits=4, minutes=-1.0))  # type: ignore[arg-type]
    assert not stopped.complete
    assert late.calls == []


def facts(folder: Path) -> Path:
    """Facts that a tiny model "knows": each object is what it says next."""
    model, tokenizer = build("llama")
    lines = []
    for subject in (
        "Anna",
        "Berta",
        "Carl",
        "Dora",
        "Emil",
        "Franz",
        "Greta",
        "Hugo",
        "Ida",
        "Jonas",
        "Klein",
        "Vogel",
    ):
        ids = tokenizer(f"{subject} speaks", return_tensors="pt")
        said = tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip()
        new = "piano" if said != "piano" else "violin"
        lines.append({"subject": subject, "relation": "r", "object": said, "target_new": new, "prompt": "{} speaks"})
    path = folder / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_preset_comes_out_and_studies_leave_its_facts_alone(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("RETENTION_CACHE", str(tmp_path / "cache"))
    model, source = save("llama", tmp_path / "m"), facts(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Anna speaks French in Paris .\nBerta lives in Rome .\n" * 4)
    arguments = [
        "calibrate", str(model), "--editor", "memit", "--facts", str(source), "--edits", "4", "--known", "4",
        "--settings", "6", "--corpus", str(corpus), "--traced", "0",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "memit: 6 settings" in said
    path = tmp_path / "cache" / "presets" / "m.yaml"
    section = read(path).editors["memit"]
    assert section.calibrated is not None
    assert section.calibrated.n["efficacy"] == 4
    assert section.measured is None
    config = LlamaConfig.from_pretrained(model)
    assert settle(Memit(), config).covariance_weight == section.settings["covariance_weight"]

    marks, pool = set_aside(config), read_pool(source)
    left = apart(pool, marks)
    assert len(marks) >= 8
    assert len(left.facts) == len(pool.facts) - len(marks)
    assert {f.subject for f in left.facts}.isdisjoint({f.subject for f in pool.facts} - {f.subject for f in left.facts})

    with pytest.raises(SystemExit):
        cli.main([*arguments[:3], "ptuning", *arguments[4:]])
    assert "no search for 'ptuning'" in capsys.readouterr().err
