"""Edits and probes outside a study: edit a model folder, read any model, read inside a training run of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import ValidationError
from transformers import TrainerCallback

from retention.artefacts import QUESTIONS
from retention.cache_folders import default_cache
from retention.data.files import read_lines
from retention.deltas import refuse_edited, room_for, save_delta, write_edited
from retention.editors import AnyEditor
from retention.editors.ptuning import PTuning
from retention.explain import explain, infinite
from retention.facts.files import read_pool
from retention.facts.questions import Asked, question, questions
from retention.facts.same import Edited
from retention.hooks import own_forward
from retention.models import anatomy, load_model
from retention.probes import Generate, Score, read_all
from retention.probes.rivals import rivals
from retention.soft_prompt import prompted
from retention.store import Keys, write_readings, write_table
from retention.types import Edit, FactPool, Part, Question, Reading, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def editor_of(text: str) -> Any:
    """An editor from its name, or from a YAML mapping such as `{name: rome, layer: 5}`. Raises UserError."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise UserError(f"--editor: expected a name or a mapping like '{{name: rome, layer: 5}}', got {text!r}")
    settings = {"editor": value}
    problems = list(infinite(settings, {}))
    try:  # through JSON, as in a study, so that types are strict
        if not problems:
            return _Chosen.model_validate_json(json.dumps(settings, default=str), strict=True).editor
    except ValidationError as error:
        problems = list(explain(error, _Chosen, settings, {}))
    raise UserError("\n".join(f"--editor: {p.removeprefix('editor').lstrip('.: ')}" for p in problems))


class _Chosen(Part):
    editor: AnyEditor


def edit_model(
    name: str,
    editor: str,
    edits: Path,
    out: Path,
    *,
    delta_only: bool = False,
    dtype: str = "float32",
    corpus: Path | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> dict[str, Any]:
    """Write the edits of a file into a model, and the edited folder (or the update alone) to `out`; returns a report.

    All edits of the file, or its first `limit`, at once. `corpus`: a text file for the covariance of keys. Everything
    that can be wrong with the edits is said before the model is loaded.
    """
    chosen, pool = editor_of(editor), read_pool(edits)
    wanted = list(pool.edits[:limit])
    if not wanted:
        raise UserError(f"{edits}: holds no edit: no record has a new target (target_new){left_out(pool.dropped)}")
    room_for(out)
    if isinstance(chosen, PTuning) and not delta_only:
        raise UserError(f"{chosen.name} changes no weight: there is no edited folder to write; use --delta")
    given = () if corpus is None else read_lines(corpus)
    loaded = load_model(name)
    if not delta_only:
        refuse_edited(loaded.folder)
    layers = anatomy(loaded.model).check
    for layer in (getattr(chosen, "layer", None), *(getattr(chosen, "layers", None) or ())):
        if layer is not None:
            layers(layer)
    result = chosen.edit(
        loaded.model, loaded.tokenizer, wanted, seed=seed, corpus=given or loaded.corpus, cache=default_cache()
    )
    report: dict[str, Any] = {"editor": getattr(chosen, "label", chosen.name), "edits": len(wanted)}
    if pool.dropped:
        report["left_out"] = dict(pool.dropped)
    report |= {"seconds": round(result.seconds, 2), "update_norm": result.delta.norm()}
    if delta_only:
        save_delta(out, result.delta, result.soft_prompt, base=loaded.content)
    else:
        report |= write_edited(loaded, result.delta, out, dtype)
    with result.delta.applied(loaded.model), prompted(loaded.model, result.soft_prompt) as reader:
        asked = [question(_edited(e)) for e in wanted]
        readings = Score().read(reader, loaded.tokenizer, asked, 0)
    report["efficacy"] = sum(bool(r.all_correct) for r in readings) / len(readings)
    return report


def left_out(dropped: Mapping[str, int]) -> str:
    """Say how often something of a file was omitted, and why, as the end of a message; nothing where nothing was."""
    return "".join(f"; omitted {n}: {reason}" for reason, n in sorted(dropped.items()))


def questions_of(pool: FactPool, limit: int | None = None) -> list[Question]:
    """All that a file asks: of edits the new target, the old one as foil; of neighbors and other facts the object.

    Not of facts that are an edit's in other words: the old object would count as right.
    """
    edits = pool.edits[:limit]
    edited, same = {e.fact.id for e in pool.edits}, Edited(pool.edits)
    asked = [_edited(e) for e in edits]
    asked += [
        Asked(fact=f, group="neighbor", answer=f.target, foil=e.target, edit_of=e.fact.id)
        for e in edits
        for f in pool.neighborhood.get(e.fact.id, ())
        if not same.has(f)
    ]
    left = [f for f in pool.facts if f.id not in edited and not same.has(f)]
    asked += [Asked(fact=f, group="intrinsic", answer=f.target) for f in left[:limit]]
    return questions(asked, lambda fact: fact.paraphrases)


def _edited(edit: Edit) -> Asked:
    return Asked(fact=edit.fact, group="edited", answer=edit.target, foil=edit.fact.target or None)


def probe_model(
    name: str, facts: Path, out: Path, *, generate: bool = True, limit: int | None = None
) -> list[tuple[Question, Reading]]:
    """Read any model, edited or fine-tuned elsewhere, into probe rows at `out`; the questions go beside it.

    The rows have the columns of a study's; what a model read alone has not (run, editor, seeds,
    tokens, edits) is null, the step is 0.
    """
    if out.suffix != ".parquet":
        raise UserError(f"--out: {out}: expected the name of a parquet file, such as rows.parquet")
    room_for(out)
    pool = read_pool(facts)
    if not questions_of(pool, limit):
        raise UserError(f"{facts}: holds no fact to ask for{left_out(pool.dropped)}")
    loaded = load_model(name)
    asked = _with_rivals(questions_of(pool, limit), pool, loaded.model, loaded.tokenizer)
    probes: list[Any] = [Score(), Generate()] if generate else [Score()]
    pairs = list(zip(asked, read_all(probes, loaded.model, loaded.tokenizer, asked, 0), strict=True))
    _write(out, pairs, loaded.content[:16])
    return pairs


def _with_rivals(
    asked: Sequence[Question], pool: FactPool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> list[Question]:
    """The questions, with the strongest rival object as foil where they have none."""
    kinds = {f.id: f.kind for f in pool.facts} | {e.fact.id: e.fact.kind for e in pool.edits}
    bare = [q for q in asked if q.foil is None]
    found = rivals(model, tokenizer, [(q, pool.objects.get(kinds.get(q.fact_id, ""), ())) for q in bare])
    foils = {q.id: foil for q, foil in zip(bare, found, strict=True)}
    return [replace(q, foil=foils[q.id]) if q.foil is None else q for q in asked]


def _write(out: Path, pairs: Sequence[tuple[Question, Reading]], model_id: str, tokens_seen: int | None = None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    same = Keys(base_id=None, model_id=model_id, facts_seed=None)
    write_readings(out, same, pairs, tokens_seen, None)
    rows: list[Mapping[str, Any]] = [
        {"question_id": q.id, **{n: getattr(q, n) for n in QUESTIONS.names if n != "question_id"}} for q, _ in pairs
    ]
    write_table(out.with_name(f"{out.stem}-questions.parquet"), pa.Table.from_pylist(list(rows), schema=QUESTIONS))


class ProbeCallback(TrainerCallback):
    """Our probes inside a transformers or trl training run that is not ours.

    Reads the questions before training (step 0) and after each step in `at`, into `folder`/probes-<step>.parquet. The
    model is read as its class runs it, whatever precision the trainer runs it in. Training goes on exactly as it would
    without. A run that is taken up again asks what it asked before. `tokens_seen` is null unless the trainer counts
    them (include_num_input_tokens_seen).
    """

    def __init__(
        self, facts: str | Path, tokenizer: PreTrainedTokenizerFast, folder: str | Path, at: Sequence[int],
        *, generate: bool = False, limit: int | None = None,
    ) -> None:  # fmt: skip
        self.pool, self.tokenizer, self.folder = read_pool(facts), tokenizer, Path(folder)
        self.at, self.limit = set(at), limit
        self.probes: list[Any] = [Score(), Generate()] if generate else [Score()]
        self.asked: list[Question] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._read(kwargs["model"], args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.at:
            self._read(kwargs["model"], args, state)

    def _read(self, model: Any, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        step = int(state.global_step)
        with own_forward(model):
            if not self.asked:
                self.asked = (self._asked_before() if step else []) or _with_rivals(
                    questions_of(self.pool, self.limit), self.pool, model, self.tokenizer
                )
            readings = read_all(self.probes, model, self.tokenizer, self.asked, step)
        pairs = list(zip(self.asked, readings, strict=True))
        counted = getattr(args, "include_num_input_tokens_seen", "no") not in (False, "no")
        tokens = int(state.num_input_tokens_seen) if counted else None
        _write(self.folder / f"probes-{step:06d}.parquet", pairs, "own-run", tokens)

    def _asked_before(self) -> list[Question]:
        """What the run asked at step 0: a fine-tuned model would choose other foils. Raises UserError if it differs."""
        file = self.folder / "probes-000000-questions.parquet"
        if not file.is_file():
            return []
        names = [f.name for f in fields(Question)]
        found = [Question(**{n: row.get(n) for n in names}) for row in pq.read_table(file).to_pylist()]
        if [replace(q, foil=None) for q in found] != [
            replace(q, foil=None) for q in questions_of(self.pool, self.limit)
        ]:
            raise UserError(f"{self.folder}: holds the readings of other questions; give this run a folder of its own")
        return found
