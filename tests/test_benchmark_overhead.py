"""The overhead benchmark at a small size: what it prints, and what it predicts for freezing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import editing  # noqa: E402  (found on the path above)
import overhead  # noqa: E402

from retention.mitigations.freeze import Freeze  # noqa: E402
from retention.models import anatomy  # noqa: E402
from retention.types import Delta  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpt2")
    editing.random_model(made, 3, 64, vocabulary=1300)
    return made


def test_prints_one_object(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--questions", "5", "--steps", "4", "--checkpoints", "2", "--repeats", "1", "--freezing-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--json", "--model", str(folder), *small])
    overhead.main()
    result = json.loads(capsys.readouterr().out)
    assert result["sizes"]["questions"] == 5
    assert result["ratio"] > 0
    assert result["products"] > 0
    assert "checkpoint_in_steps" in result
    assert result["ratio_within_a_run"] > 1
    assert result["cpu_seconds_a_checkpoint"].keys() == {"score and generate", "task", "writing"}
    assert result["cpu_seconds_alone"].keys() == {"score", "generate"}
    assert [row["up_to"] for row in result["freezing"]] == [0, 1]
    assert all(0 < row["predicted"] < 1 for row in result["freezing"])


@pytest.mark.parametrize("layer", [0, 1])
def test_prediction_is_what_autograd_multiplies(folder: Path, layer: int) -> None:
    """Against the multiplications that torch counts in the matrix products of one step."""
    given = overhead.made_up(folder, 5, 1)
    model, tokenizer = given.loaded.model, given.loaded.tokenizer
    model.set_attn_implementation("eager")
    places = anatomy(model)
    names = Freeze(what="up_to", layer=layer).frozen(model, places, Delta())
    ids = tokenizer("The capital of the country", return_tensors="pt").input_ids[:, :2]  # short: little attention

    def work() -> float:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        return float(counter.get_total_flops())

    whole = work()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    assert overhead.predicted(model, places, names) == pytest.approx(work() / whole, abs=0.01)
