"""A study small enough for tests: a world that is pretrained in seven CPU-seconds, two editors, two mitigations."""

from __future__ import annotations

from typing import Any

WORLD: dict[str, Any] = {
    "name": "world",
    "layers": 2,
    "width": 64,
    "heads": 4,
    "mlp": 256,
    "context": 48,
    "rows": 6,
    "bf16": False,
    "exposures": 40,
    "warm_exposures": 40,
    "people": 16,
    "new_people": 6,
    "cities": 6,
    "companies": 6,
    "countries": 3,
    "warm_people": 6,
    "withheld": 4,
    "graded": 0,
}
FACTS: dict[str, Any] = {
    "name": "world",
    "share": 0.5,
    "edited": 4,
    "control": 2,
    "intrinsic": 8,
    "intrinsic_relations": "any",
    "intrinsic_exposures": "any",  # this world is too small to match on them
    "neighbors": 2,
    "same_subject": 1,
    "paraphrases": 1,
}
TUNE: dict[str, Any] = {
    "data": {"name": "world", "task": "new_facts", "rows": 64, "heldout": 12, "people": 4},
    "steps": 4,
    "trainer": {"learning_rate": 1.0e-3},
}
# Every setting that a preset of another model would give.
ROME: dict[str, Any] = {
    "name": "rome",
    "layer": 0,
    "v_steps": 40,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 4.0,
}
GRID: dict[str, Any] = {"editor": ["identity", ROME], "mitigations": [[], ["freeze"]]}


def document(**changes: Any) -> dict[str, Any]:
    """The small study as its YAML would be read, with top-level settings replaced (None: left out)."""
    base = {
        "question": "Are edits forgotten more readily than what the model knew before?",
        "model": WORLD,
        "facts": FACTS,
        "tune": TUNE,
        "probes": ["score", "generate"],
        "at": [1, 2, 4],
        "grid": GRID,
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def one(**changes: Any) -> dict[str, Any]:
    """The small study without a grid: the unedited model, one run."""
    return document(**({"grid": None, "editor": "identity"} | changes))
