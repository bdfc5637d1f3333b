"""The baseline of benchmarks/editing.py does the published work, and our editors give what it gives."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import editing  # noqa: E402  (found on the path above)
from published import Published  # noqa: E402

EDITS = [
    {"subject": "Danielle Darrieux", "prompt": "The mother tongue of {} is", "target": "English"},
    {"subject": "Toko Yasuda", "prompt": "{} produces the most amazing music on the", "target": "old piano"},
]


pytestmark = pytest.mark.long  # and red since the benchmark takes --model: to be mended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpt2")
    editing.random_model(made, 4, 64, vocabulary=1300)
    (made / "edits.jsonl").write_text("\n".join(map(json.dumps, EDITS)) + "\n")
    return made


def test_same_results_and_every_ratio(folder: Path, tmp_path: Path) -> None:
    args = argparse.Namespace(documents=5, steps=6, rome_edits=2, ridge=1e-3)
    result = editing.run(folder, editing.read_edits(folder / "edits.jsonl"), args, tmp_path)
    assert result["max_relative_difference"] < 2e-3
    assert {"v_star", "covariance", "solve", "rome_total", "memit_total"} <= set(result["ratio"])
    assert all(ratio > 0 for ratio in result["ratio"].values())
    assert result["fast"]
    assert result["threads"] == torch.get_num_threads()
    json.dumps(result)


def test_the_baseline_counts_the_published_work(folder: Path) -> None:
    """Per edit and step one forward of all rows, whole, the anchor's dead words included; padding is not counted."""
    loaded = editing.load_model(folder, device="cpu")
    settings = {"v_steps": 3, "v_lr": 0.5, "v_weight_decay": 0.5, "kl_factor": 0.0625, "clamp_norm_factor": 4.0}
    base = Published(loaded.model, loaded.tokenizer, ["The old house. ", "I was told. "], settings)
    shapes: list[Any] = []
    handle = loaded.model.lm_head.register_forward_hook(lambda _m, _a, out: shapes.append(tuple(out.shape)))
    try:
        base.value(editing.read_edits(folder / "edits.jsonl")[1], 1, "mlp")
    finally:
        handle.remove()
    text = "Toko Yasuda produces the most amazing music on the old"  # without the target's last token, " piano"
    texts = [text, f"The old house. {text}", f"I was told. {text}", "Toko Yasuda is a"]
    rows = [len(loaded.tokenizer(row)["input_ids"]) for row in texts]
    assert base.count.forwards == {"v_star": 3}
    assert base.count.tokens == {"v_star": 3 * sum(rows)}
    assert shapes == [(4, max(rows), loaded.model.config.vocab_size)] * 3  # logits at all positions


def test_prints_one_object(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "--model",
        str(folder),
        "--edits",
        str(folder / "edits.jsonl"),
        "--documents",
        "4",
        "--steps",
        "2",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["editing.py", *given])
    editing.main()
    assert json.loads(capsys.readouterr().out)["sizes"]["edits"] == 2
