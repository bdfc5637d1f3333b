"""How a run's edits are written: which phrasings, by which editor, all at once or batch after batch.

Calls the editor as the regime says and applies the mitigations that act on the edit. Knows neither store nor probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from retention import half
from retention.data.files import read_lines
from retention.facts.draw import Draw
from retention.ids import corpus_files
from retention.late import teach
from retention.models import Loaded, anatomy
from retention.progress import Report
from retention.regimes import Sequential
from retention.study import Run
from retention.types import Delta, Edit, EditResult


def write_edits(
    run: Run, loaded: Loaded, drawn: Draw, after_batch: Callable[[int], None], cache: Path, report: Report
) -> EditResult:
    """Call the editor as the regime says. The model is left as it was; the result is the whole of what is added."""
    with half.editing(run.settings.precision.edit):
        return _by_regime(run, loaded, drawn, after_batch, cache, report)


def _by_regime(
    run: Run, loaded: Loaded, drawn: Draw, after_batch: Callable[[int], None], cache: Path, report: Report
) -> EditResult:
    s = run.settings
    on_edit = [m for m in s.mitigations if m.acts_on == "edit"]

    def remedied(result: EditResult) -> EditResult:
        for mitigation in on_edit:
            result = replace(result, delta=mitigation.delta(result.delta))
        return result

    edits = written(run, drawn)
    editor: Any = s.editor
    for mitigation in on_edit:
        editor = mitigation.editor(editor)
    fixed: dict[str, Any] = {"seed": s.seed, "corpus": corpus_of(run, loaded), "cache": cache}
    model, tokenizer = loaded.model, loaded.tokenizer
    if not isinstance(s.regime, Sequential):
        report(f"editing with {editor.name}", 0, 1)
        return remedied(editor.edit(model, tokenizer, edits, **fixed))
    # Prune compresses the update of a whole sequence against the unedited weights (arXiv 2405.16821), so it comes last.
    parts = getattr(editor, "postprocess", ())
    last = [part for part in parts if part.name == "prune"]
    each = tuple(part for part in parts if part not in last)
    editor = editor.model_copy(update={"postprocess": each}) if last else editor
    total, state, seconds = Delta(), None, 0.0
    diagnostics: list[dict[str, Any]] = []
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    for start in range(0, len(edits), s.regime.size):
        report(f"editing with {editor.name}", start, len(edits))
        batch = edits[start : start + s.regime.size]
        carried: dict[str, Any] = {"state": state} if getattr(editor, "carries_state", False) else {}
        # Each batch draws anew: random updates of one seed would add up instead of averaging out.
        result = remedied(editor.edit(model, tokenizer, batch, **carried, **{**fixed, "seed": s.seed + start}))
        result.delta.apply_(model)
        total, state, seconds = total.plus(result.delta), result.state, seconds + result.seconds
        diagnostics.extend(result.diagnostics)
        after_batch(start + len(batch))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])
    for part in last:
        total = part.process(model, total, rank_one_per_edit=False)
    return EditResult(delta=total, diagnostics=tuple(diagnostics), seconds=seconds, info=result.info)


def written(run: Run, drawn: Draw) -> list[Edit]:
    """The edits as the mitigations that act on them have them written."""
    return _phrased(run, drawn.edits)


def _phrased(run: Run, edits: Sequence[Edit]) -> list[Edit]:
    found = list(edits)
    for mitigation in run.settings.mitigations:
        if mitigation.acts_on == "edit":
            found = mitigation.edits(found, run.settings.seed)
    return found


def teach_late(run: Run, loaded: Loaded, drawn: Draw, folder: Path, report: Report) -> Delta:
    """What teaching the late facts adds to the weights, in the phrasings that edits are written with; often nothing."""
    if not drawn.late:
        return Delta()
    return teach(
        loaded.model, loaded.tokenizer, run.settings.late, _phrased(run, drawn.late), corpus_of(run, loaded),
        anatomy=anatomy(loaded.model), seed=run.settings.seed, folder=folder,
        progress=lambda done, total: report("teaching late facts", done, total),
    )  # fmt: skip


def corpus_of(run: Run, loaded: Loaded) -> Sequence[str]:
    """Texts like those of pretraining: the study's, or else those that the model's folder brings."""
    return [line for path in corpus_files(run.settings) for line in read_lines(path)] or loaded.corpus
