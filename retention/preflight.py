"""What can be known to be wrong before work starts: data that is missing, layers a model lacks, rows of the wrong kind.

Every distinct source, task and trainer of a study is checked once; all mistakes are reported together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from retention import half, trainers
from retention.adapters import MIXTURE, Adapter, Full, mixes_experts, refuse_mixture, tried
from retention.configs import config_of
from retention.data import rows_of
from retention.data.files import read_lines
from retention.editors.random import Random, reference
from retention.facts import pool_of
from retention.facts.draw import apart
from retention.ids import corpus_files
from retention.mitigations import Freeze, Rehearsal, Replay
from retention.model_checks import check_folder
from retention.models import HubModel, resolve, tokenizer_of
from retention.objectives import Objective, Sft
from retention.presets import choice, remark, set_aside, settle
from retention.study import Run, Study, Tune
from retention.tokens import turn
from retention.trainer_fields import arguments_of
from retention.training_rows import RowCounts, training_rows
from retention.types import Delta, Missing, UserError

WITHOUT_UPDATE = ("identity", "ptuning")  # editors that change no weight
_CHATLESS: Any = SimpleNamespace(chat_template=None)  # tokenizers of the models that are made here


def check(study: Study) -> None:
    """Raises UserError with every mistake that can be found without loading a model."""
    if found := examine(study):
        raise UserError("\n".join(found))


def examine(study: Study) -> dict[str, UserError]:
    """Every mistake that can be found without loading a model; a `Missing` is only that something is not here."""
    found: dict[str, UserError] = {}
    seen: set[str] = set()
    unusable: set[Any] = set()  # models: what else would be said of them only repeats it
    for run in settled(study).runs:
        for what, probe in (("model", lambda run=run: _model(run.settings.model)), *_checks(run)):
            model = run.settings.model
            key = what + model.model_dump_json() if what == "model" else what
            if key in seen or model in unusable:
                continue
            seen.add(key)
            try:
                probe()
            except UserError as error:
                if what == "model" and not isinstance(error, Missing):
                    unusable.add(model)
                for line in str(error).splitlines():
                    found[f"{study.name}: {line}"] = error
    return found


def _model(model: Any) -> None:
    """The model's folder can be used as it is; a model that is made here is sound."""
    if isinstance(model, HubModel):
        check_folder(resolve(model.name, model.revision))


def settled(study: Study) -> Study:
    """The study with every setting of an editor that it leaves open as the preset of its model has it.

    Names of the runs stay. Where a model's configuration is not here, its runs are left as they are.
    """
    found: dict[str, Any] = {}

    def editor(run: Run) -> Any:
        own, config = run.settings.editor, _config(run)
        if config is None:
            return own
        key = f"{run.settings.model!r} {own!r} {sorted(own.model_fields_set)}"
        if key not in found:
            found[key] = settle(own, config)
        return found[key]

    return replace(
        study,
        runs=tuple(
            replace(run, settings=run.settings.model_copy(update={"editor": editor(run)})) for run in study.runs
        ),
    )


def from_presets(study: Study, *, exact: bool) -> list[str]:
    """What the study leaves open and presets give, one line an editor and model.

    exact: the lines about models that a preset is of, or those about models that take the nearest one.
    """
    found: dict[str, None] = {}
    for run in study.runs:
        config = _config(run)
        chosen = None if config is None else choice(run.settings.editor, config)
        if chosen is not None and chosen.exact == exact and (line := remark(run.settings.editor, config)):
            found[line] = None
    return list(found)


def _config(run: Run) -> Any:
    """None where it is not here, or faulty: the checks say so."""
    try:
        return config_of(run.settings.model)
    except UserError:
        return None


def remarks(study: Study) -> list[str]:
    """What may run but hardly be meant: settings of another model, a remedy that finds nothing to act on."""
    idle = {
        (run.settings.editor.name, mitigation.name, mitigation.instead)
        for run in study.runs
        for mitigation in run.settings.mitigations
        if mitigation.needs_edit and run.settings.editor.name in WITHOUT_UPDATE
    }
    unlike = [f"{study.name}: editor: {line}" for line in from_presets(study, exact=False)]
    return (
        _cuts(study)
        + unlike
        + _slow(study)
        + [
            f"{study.name}: mitigations: {name} acts on what the edit changed, and editor {editor} changes no weight: "
            f"there it does nothing{instead}"
            for editor, name, instead in sorted(idle)
        ]
    )


def _cuts(study: Study) -> list[str]:
    """Rows that max_length cuts off or leaves out: for each task once, of the first seed."""
    said: dict[str, str | None] = {}
    for run in study.runs:
        for t in run.settings.tunes if isinstance(run.settings.model, HubModel) else ():
            objective = t.objective or run.settings.objective
            parts = [run.settings.model.name, t.model_dump(mode="json"), objective.model_dump(mode="json")]
            if (task := json.dumps(parts)) in said:
                continue
            try:
                counts = _data(run, t, objective)
            except UserError:  # `examine` reports it
                counts = None
            told = None if counts is None else counts.told(arguments_of(objective, t.trainer)["max_length"])
            where = f"{study.name}: tune.data: {t.data.name}, {objective.name}, seed {run.settings.seed}"
            said[task] = told and f"{where}: {told}"
    return [line for line in said.values() if line]


def _slow(study: Study) -> list[str]:
    """What takes long because this machine has no bfloat16 products."""
    halved = {which for run in study.runs if not half.native() and (which := _halved(run))}
    return [
        f"{study.name}: {which} asks for bfloat16, which this machine does not multiply in hardware: there it takes "
        "several times as long as float32"
        for which in sorted(halved)
    ]


def _halved(run: Run) -> str:
    """The settings that ask for bfloat16; empty where none does."""
    s = run.settings
    stages = [f"precision.{stage}" for stage in ("edit", "read") if getattr(s.precision, stage) == "bfloat16"]
    return " and ".join(stages + ["tune.trainer.bf16"] * any(t.trainer.get("bf16") for t in s.tunes))


def _checks(run: Run) -> Iterator[tuple[str, Any]]:
    """(what is checked, as text that tells equal checks apart; the check)."""
    s = run.settings
    dump = run.dump()
    yield "facts" + json.dumps([dump["facts"], dump["model"], run.facts_seed, dump["mitigations"]]), lambda: _facts(run)
    yield (
        "layers" + json.dumps([dump["model"], dump["editor"], dump["mitigations"], dump["corpus"]]),
        lambda: _layers(run),
    )
    yield (
        "mitigations"
        + json.dumps([dump[k] for k in ("model", "editor", "mitigations", "tune", "objective", "adapter")]),
        lambda: _mitigations(run),
    )
    if any(getattr(part, "chat", False) for part in (*s.probes, *s.tunes)):  # not every probe can chat
        yield "chat" + json.dumps(dump["model"]), lambda: _chat(s.model)
    for ability in s.abilities:
        yield (
            "ability" + json.dumps([dump["model"], ability.model_dump(mode="json"), s.seed]),
            lambda ability=ability: ability.check(s.model, s.seed),
        )
    for t in s.tunes:
        adapter = t.adapter or s.adapter
        if isinstance(adapter, Adapter):
            yield (
                "adapter" + json.dumps([dump["model"], adapter.model_dump(mode="json")]),
                lambda adapter=adapter: adapter.check(config_of(s.model)),
            )
        named = [m for m in s.mitigations if isinstance(m, Freeze) and not m.needs_edit]
        if named:
            yield (
                "frozen" + json.dumps([dump["model"], adapter.model_dump(mode="json"), dump["mitigations"]]),
                lambda named=named, adapter=adapter: _something_trains(named, adapter, config_of(s.model)),
            )
        objective, data = t.objective or s.objective, t.data.model_dump(mode="json")
        yield (
            "trainer" + json.dumps([objective.model_dump(mode="json"), t.trainer]),
            lambda t=t, objective=objective: trainers.validate(objective, t.trainer),
        )
        yield (
            "length" + json.dumps([dump["model"], objective.model_dump(mode="json")]),
            lambda objective=objective: _length(objective, config_of(s.model)),
        )
        yield (
            "data" + json.dumps([dump["model"], data, objective.model_dump(mode="json"), t.trainer, t.chat, s.seed]),
            lambda t=t, objective=objective: _data(run, t, objective),
        )


def _chat(model: Any) -> None:
    """The model's tokenizer has a chat template."""
    if not isinstance(model, HubModel):
        raise UserError("chat: the models that are pretrained here know no chat; use a model that was trained to chat")
    turn(tokenizer_of(resolve(model.name, model.revision)), "Is there a template?")


def _mitigations(run: Run) -> None:
    s = run.settings
    for mitigation in s.mitigations:
        mitigation.check(s)
        mitigation.files()
        if mitigation.needs_corpus and s.corpus is None:
            _corpus_of_model(s.model, f"mitigations: {mitigation.name}")


def _facts(run: Run) -> None:
    s = run.settings
    pool = apart(pool_of(s.facts, s.model, run.facts_seed), set_aside(config_of(s.model)))
    subjects = {e.fact.subject for e in pool.edits}
    asked = {name: getattr(s.facts, name) for name in ("edited", "control", "late")}
    wanted = sum(asked.values())
    if len(subjects) < wanted:
        told = " + ".join(f"{name} ({n})" for name, n in asked.items() if n)
        raise UserError(
            f"facts: {told} = {wanted} facts with distinct subjects were asked for; {s.facts.name} offers "
            f"{len(subjects)}"
        )
    for mitigation in s.mitigations:
        mitigation.edits(pool.edits, s.seed)
        if isinstance(mitigation, Replay):
            mitigation.said(pool.edits, s.seed)
        if isinstance(mitigation, Rehearsal):
            mitigation.said(pool.facts, s.seed)


def _layers(run: Run) -> None:
    """Layers of the editor and of freeze lie within the model; texts for the covariance of keys are there."""
    s = run.settings
    config = config_of(s.model)
    layers = int(config.get_text_config().num_hidden_layers)
    _covariance(run)
    editor = _writer(run)
    if getattr(editor, "single_mlps", False):
        refuse_mixture(config)
    if getattr(editor, "targets", None) == "mlp" and mixes_experts(config):
        raise UserError(f"editor: {editor.name}: targets: {MIXTURE}")
    last = getattr(editor, "last", 1)
    if last > layers and getattr(editor, "layers", None) is None:
        raise UserError(f"editor: {editor.name}.last: {last} blocks of a model that has {layers}")
    parts = [("editor", editor), *(("mitigations", m) for m in s.mitigations if isinstance(m, Freeze))]
    for where, part in parts:
        for field in ("layer", "layers"):
            value = getattr(part, field, None)
            for layer in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(layer, int) and not 0 <= layer < layers:
                    raise UserError(
                        f"{where}: {part.name}.{field}: layer {layer} is out of range: the model has layers 0 to "
                        f"{layers - 1}"
                    )


def _something_trains(named: list[Freeze], adapter: Full | Adapter, config: Any) -> None:
    """What is frozen by named blocks leaves something to train."""
    for part in named:
        if not set(part.layers or (part.layer,)) <= set(range(config.get_text_config().num_hidden_layers)):
            return  # told by _layers
    model, places, stands_for = tried(adapter, config)
    if stands_for > 1:  # one block was tried for all: told when it is trained
        return
    frozen = {name for part in named for name in part.frozen(model, places, Delta())}
    if all(name in frozen for name, p in model.named_parameters() if p.requires_grad):
        raise UserError("mitigations: freeze leaves nothing to train; freeze less")


def _length(objective: Objective, config: Any) -> None:
    """What an objective makes of the rows fits into the model's positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    for field in ("block", "max_completion_length"):
        length = getattr(objective, field, None)
        if length is not None and limit is not None and length + (field != "block") > limit:
            raise UserError(f"objective: {objective.name}.{field}: {length} tokens; the model has {limit} positions")


def _writer(run: Run) -> Any:
    """The editor that makes the update: of `random` the one that it is to be like."""
    editor = run.settings.editor
    return reference(editor.like) if isinstance(editor, Random) else editor


def _covariance(run: Run) -> None:
    """Texts for the covariance of keys, where the editor needs them."""
    s, editor = run.settings, _writer(run)
    covariance = getattr(editor, "covariance", None)
    if covariance is None or covariance.tokens == 0:
        return
    if s.corpus is not None:
        for path in corpus_files(s):
            read_lines(path)
    else:
        _corpus_of_model(
            s.model,
            f"editor: {editor.name}",
            "for the covariance of keys",
            ", or to the editor `covariance: {tokens: 0}`",
        )


def _corpus_of_model(model: Any, who: str, why: str = "like those of pretraining", instead: str = "") -> None:
    if isinstance(model, HubModel) and not (resolve(model.name, model.revision) / "corpus.txt").is_file():
        raise UserError(
            f"{who} needs texts {why}, and the model brings no corpus.txt: give `corpus: texts.txt`{instead}"
        )


def _data(run: Run, tune: Tune, objective: Objective) -> RowCounts | None:
    """The task's rows can be trained on. Returns how many the limit of tokens cuts; None where nobody can know yet."""
    model = run.settings.model
    rows = rows_of(tune.data, model, run.settings.seed)
    if not rows.train:
        raise UserError(f"tune.data: {tune.data.name} gives no rows to train on")
    objective.check(rows.train[0])
    if not isinstance(model, HubModel):  # its tokenizer is made with it
        if isinstance(objective, Sft) and objective.assistant_only:
            objective.check_tokenizer(_CHATLESS)
        return None
    tokenizer = tokenizer_of(resolve(model.name, model.revision))
    objective.check_tokenizer(tokenizer)
    arguments = arguments_of(objective, tune.trainer)
    limit = getattr(config_of(model).get_text_config(), "max_position_embeddings", None)
    found = training_rows(rows.train, objective, tokenizer, arguments, chat=tune.chat, positions=limit)
    found.counts.refuse(tune.min_share, arguments["max_length"])
    return found.counts
