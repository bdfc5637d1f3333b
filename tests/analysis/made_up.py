"""A study that nobody ran: its tables, made from a planted law, for the scripts of analysis/ to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

STEPS = (0, 1, 3, 10, 30)
CATEGORIES = ("run_id", "edit_id", "base_id", "editor", "task", "objective", "adapter", "mitigations", "group", "form")


def tables(
    *,
    editors: Sequence[str] = ("memit", "rome"),
    mitigations: Sequence[str] = ("none", "freeze", "replay(rate=0.1)"),
    seeds: Sequence[int] = (0, 1, 2),
    groups: Sequence[str] = ("edited", "intrinsic"),
    right_at_0: float = 0.95,
    kept: float | None = None,  # share kept at every later step; None: a law by margin and mitigation
    axis: dict[str, float] | None = None,  # mitigations -> value of a further axis, tune.steps
    many: int = 1,  # so many times the facts
) -> dict[str, pd.DataFrame]:
    """rows, runs, scores and facts, as `retention.load` gives them; 12 edited and 20 intrinsic facts a run."""
    rows, runs, scores, facts = [], [], [], []
    for seed in seeds:
        rng = np.random.default_rng([5, seed])
        own = {group: (12 if group == "edited" else 20) * many for group in groups}
        names = {g: [f"{g} {seed} {i}" for i in range(n)] for g, n in own.items()}
        margins = {g: rng.normal(6 if g == "edited" else 4.5, 1.5, n) for g, n in own.items()}
        facts += [
            {"fact_id": name, "relation": f"r{i % 3}", "exposures": 3 + i, "base_id": f"b{seed}", "target": "x"}
            for g in groups
            for i, name in enumerate(names[g])
        ]
        for editor in editors:
            for number, mitigation in enumerate(mitigations):
                run = f"{editor} {mitigation} {seed}"
                key = {"editor": editor, "task": "new_facts", "objective": "sft", "adapter": "full"}
                key |= {"mitigations": mitigation, "seed": seed, "facts_seed": seed}
                key |= {"tune.steps": axis[mitigation]} if axis else {}
                runs.append({"only": None, "run_id": run, "edit_id": f"{editor}{seed}", "base_id": f"b{seed}"} | key)
                luck = np.random.default_rng([6, seed, number, editors.index(editor)])
                for g in groups:
                    start = luck.random(own[g]) < right_at_0
                    life = luck.exponential(np.exp(margins[g] * 0.5 + number))
                    for step in STEPS:
                        later = start & (luck.random(own[g]) < kept if kept is not None else life > step)
                        for i, name in enumerate(names[g]):
                            right = bool(start[i] if step == 0 else later[i])
                            rows.append(
                                key | {"run_id": run, "edit_id": f"{editor}{seed}", "base_id": f"b{seed}", "group": g}
                                | {"form": "direct", "step": step, "tokens_seen": 100 * step, "fact_id": name}
                                | {"lead": margins[g][i] if step == 0 else -1.0}
                                | {"question_id": f"q {name}", "logp_target": -1.0, "n_target_tokens": 1 + i % 2}
                                | {"logp_foil": -1.0 - margins[g][i] * (1 if step == 0 else 0.5), "all_correct": right}
                                | {"first_correct": right, "prefers_target": right, "gen_exact": None}
                                | {"gen_contains": None, "trains_edited": None if step == 0 else mitigation == "none"}
                            )  # fmt: skip
                for step in (0, STEPS[-1]):
                    for score, value in (("task_accuracy", 0.1 + 0.02 * step - 0.03 * number), ("task_loss", 2.0)):
                        scores.append({"run_id": run, "step": step, "score": score, "value": value + 0.01 * seed})
    out = {"rows": pd.DataFrame(rows), "runs": pd.DataFrame(runs), "scores": pd.DataFrame(scores)}
    out["facts"] = pd.DataFrame(facts)
    luck = np.random.default_rng(7)
    out["weights"] = pd.DataFrame(
        {"run_id": run["run_id"], "step": step, "parameter": name, "update_norm": (0.5 + luck.random()) * step**0.5}
        | {"edit_norm": 2.0, "effect_left": 1 - step / 100, "state": "ok"}
        for run in runs
        for step in STEPS[1:]
        for name in ("a", "b")
    )
    out["runs"]["complete"] = True
    out["runs"]["study"] = "made-up"
    for name in CATEGORIES:
        out["rows"][name] = out["rows"][name].astype("category")
    return out
