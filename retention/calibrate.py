"""Find settings of an editor for a model: where facts are recalled, then a search, then a preset with its evidence.

Settings are drawn by a seed and tried by successive halving: all of them on a few calibration edits, the better third
on twice as many, and so on up to all edits. Better is: efficacy up to ENOUGH, then known facts and neighbors that are
still right, then paraphrases. The subjects that were asked about are marked in the preset, and no study draws them.

What was tried is kept in the cache, so that a search that ran out of time is taken up again. Settings of v* are drawn
less often than what follows them, which shares the v* that were found (by the editors' own cache).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from retention import presets
from retention.editors import AnyEditor
from retention.facts._part import FactsPart
from retention.facts.draw import Draw, draw
from retention.layers import Recommendation, recommend
from retention.models import Loaded, anatomy
from retention.presets import Measured, Preset, Section, shape_of, subject_mark
from retention.probes import Score
from retention.store import write_text
from retention.tracing import TracingSettings, trace
from retention.types import FactPool, Question, UserError, content_id

VERSION = 1  # of the search: raise it when it draws or judges otherwise
ENOUGH = 0.95  # efficacy beyond which only what the edit damages counts
THIRD = 3  # one in so many settings goes on to the next round
SHARED = {"memit": 4, "rome": 3}  # settings that share their v*

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is tried."""

    edits: int = 30
    known: int = 60  # facts that the model knows, read for damage
    settings: int = 32
    minutes: float = 60.0  # CPU minutes of this call
    seed: int = 0
    traced: int = 6  # facts; 0: no tracing


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting, tried on so many edits: shares of right answers, and of how many questions."""

    settings: dict[str, Any]
    edits: int
    efficacy: float
    paraphrase: float | None
    intrinsic: float
    neighbors: float | None
    n: dict[str, int]
    seconds: float  # CPU

    @property
    def kept(self) -> float:
        """Known facts and neighbors that are still right, of all of them."""
        near = self.n["neighbors"]
        total = self.n["intrinsic"] + near
        return (self.intrinsic * self.n["intrinsic"] + (self.neighbors or 0.0) * near) / total

    @property
    def merit(self) -> tuple[float, float, float]:
        return min(self.efficacy, ENOUGH), self.kept, self.paraphrase or 0.0

    def __str__(self) -> str:
        shown = ", ".join(f"{k}: {list(v) if isinstance(v, tuple) else v}" for k, v in self.settings.items())
        near = "-" if self.neighbors is None else f"{self.neighbors:.2f}"
        said = "-" if self.paraphrase is None else f"{self.paraphrase:.2f}"
        return (
            f"efficacy {self.efficacy:.2f}  paraphrase {said}  intrinsic {self.intrinsic:.2f}  neighbors {near}  "
            f"({self.edits} edits, {self.seconds:.0f} CPU s)  {{{shown}}}"
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    editor: str  # section of the preset
    trials: tuple[Trial, ...]
    complete: bool  # all rounds were done within the time
    seconds: float  # CPU, of all calls together

    @property
    def final(self) -> tuple[Trial, ...]:
        """The trials on the most edits."""
        most = max(trial.edits for trial in self.trials)
        return tuple(trial for trial in self.trials if trial.edits == most)

    @property
    def best(self) -> Trial:
        return max(self.final, key=lambda trial: trial.merit)

    @property
    def front(self) -> tuple[Trial, ...]:
        """Trials on the most edits that no other beats in efficacy, damage and paraphrase at once."""
        marks = [(t.efficacy, t.kept, t.paraphrase or 0.0) for t in self.final]
        kept = [
            trial
            for trial, mine in zip(self.final, marks, strict=True)
            if not any(other != mine and all(o >= m for o, m in zip(other, mine, strict=True)) for other in marks)
        ]
        return tuple(sorted(kept, key=lambda trial: trial.merit, reverse=True))


# ------------------------------------------------------------------------------------------------ space


def drawn_settings(
    editor: str, config: Any, advice: Recommendation, additive: bool, plan: Plan
) -> list[dict[str, Any]]:
    """The settings to try, in the order of the draw, those of the nearest preset first."""
    rng = random.Random(f"calibrate {editor} {plan.seed}")
    layers = int(config.get_text_config().num_hidden_layers)
    space = SPACES[editor](rng, layers, advice, additive)
    near = presets.choice(editor_of(editor, {}), config)
    found = [] if near is None else [near.settings]
    found = [s for s in found if additive or len(s.get("layers", ())) < 2]
    while len(found) < plan.settings:
        for settings in space():
            if settings not in found:
                found.append(settings)
    return found[: plan.settings]


def _spot(rng: random.Random, layers: int, advised: int | None) -> int:
    """A block: often near where facts are recalled, else any of the lower two thirds."""
    if advised is not None and rng.random() < 0.5:
        return min(layers - 1, max(0, advised + rng.randint(-2, 2)))
    return rng.randrange(max(1, 2 * layers // 3))


def _value(rng: random.Random) -> dict[str, Any]:
    """Settings of v*'s search."""
    return {
        "v_steps": rng.choice([15, 25]),
        "v_lr": rng.choice([0.2, 0.5]),
        "v_weight_decay": rng.choice([1e-3, 1e-2, 0.1, 0.5]),
        "clamp_norm_factor": rng.choice([1.0, 2.0, 4.0, 8.0]),
    }


Space = Callable[[], list[dict[str, Any]]]


def _memit(rng: random.Random, layers: int, advice: Recommendation, additive: bool) -> Space:
    first = iter([advice.memit] if advice.memit else [])

    def some() -> list[dict[str, Any]]:
        """One v* at the last layer, and weights of the covariance."""
        span = next(first, None)
        if span is None:
            last = _spot(rng, layers, advice.memit[-1] if advice.memit else None)
            span = tuple(range(max(0, last + 1 - rng.randint(1, 5)), last + 1))
        span = span if additive else span[-1:]
        value = _value(rng)
        weights = rng.sample([30.0, 100.0, 300.0, 1000.0, 3000.0, 15000.0], SHARED["memit"])
        return [{"layers": list(span), "covariance_weight": weight, **value} for weight in weights]

    return some


def _rome(rng: random.Random, layers: int, advice: Recommendation, additive: bool) -> Space:
    first = iter([] if advice.rome is None else [advice.rome])

    def some() -> list[dict[str, Any]]:
        """One v*, and every rule by which it is written."""
        layer = next(first, None)
        layer = _spot(rng, layers, advice.rome) if layer is None else layer
        value = {**_value(rng), "context_lengths": rng.choice([[5] * 5, [10] * 5])}
        return [{"variant": rule, "layer": layer, **value} for rule in ("r-rome", "original", "p-rome")]

    return some


def _ft(rng: random.Random, layers: int, advice: Recommendation, additive: bool) -> Space:
    return lambda: [
        {
            "layer": rng.randrange(layers),
            "lr": rng.choice([2e-4, 5e-4, 1e-3, 2e-3]),
            "epochs": rng.choice([10, 20, 40]),
            "norm_constraint": rng.choice([None, 1e-3, 3e-3, 1e-2]),
        }
    ]


def _lora(rng: random.Random, layers: int, advice: Recommendation, additive: bool) -> Space:
    third = layers // 3

    def some() -> list[dict[str, Any]]:
        span = rng.choice([None, (0, third), (third, 2 * third), (2 * third, layers)])
        return [
            {
                "layers": None if span is None else list(range(*span)),
                "targets": rng.choice(["mlp", "attention"]),
                "rank": rng.choice([4, 8, 32]),
                "lr": rng.choice([3e-4, 1e-3, 3e-3]),
                "epochs": rng.choice([15, 30, 60]),
                "keep_anchors": rng.choice([0.0, 3.0, 10.0]),
            }
        ]

    return some


SPACES: Mapping[str, Callable[[random.Random, int, Recommendation, bool], Space]] = {
    "memit": _memit, "rome": _rome, "ft-m": _ft, "lora": _lora,
}  # fmt: skip


def editor_of(section: str, settings: Mapping[str, Any]) -> Any:
    """The editor that a preset's section is of, with these settings."""
    named = {"name": "ft", "variant": section.upper()} if section.startswith("ft-") else {"name": section}
    return TypeAdapter(AnyEditor).validate_python({**named, **settings})


# ------------------------------------------------------------------------------------------------ trying


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the settings are tried with."""

    loaded: Loaded
    corpus: Sequence[str]
    drawn: Draw
    cache: Path
    seed: int

    def answers(self, questions: Sequence[Question]) -> list[bool]:
        readings = Score().read(self.loaded.model, self.loaded.tokenizer, questions, 0)
        return [bool(r.all_correct) for r in readings]

    def tried(self, section: str, settings: Mapping[str, Any], edits: int) -> Trial:
        """Write the first `edits` calibration edits at once, and read what is right then."""
        start, chosen = time.process_time(), self.drawn.edits[:edits]
        result = editor_of(section, settings).edit(
            self.loaded.model, self.loaded.tokenizer, chosen, seed=self.seed, corpus=self.corpus, cache=self.cache
        )
        ids = {edit.fact.id for edit in chosen}
        asked = [q for q in self.drawn.questions if (q.edit_of or q.fact_id) in ids or q.group == "intrinsic"]
        asked = [q for q in asked if q.group == "edited" or q.form == "direct"]
        with result.delta.applied(self.loaded.model):
            right = self.answers(asked)
        groups: dict[str, list[bool]] = {"efficacy": [], "paraphrase": [], "intrinsic": [], "neighbors": []}
        for question, yes in zip(asked, right, strict=True):
            edited = "efficacy" if question.form == "direct" else "paraphrase"
            groups[{"edited": edited, "neighbor": "neighbors"}.get(question.group, question.group)].append(yes)
        share: dict[str, Any] = {name: sum(found) / len(found) if found else None for name, found in groups.items()}
        return Trial(
            settings=dict(settings), edits=edits, n={name: len(found) for name, found in groups.items()},
            seconds=round(time.process_time() - start, 1), **share,
        )  # fmt: skip


class Journal:
    """Trials that are done, one JSON object a line; what cannot be read is tried again."""

    def __init__(self, path: Path) -> None:
        self.path, self.trials = path, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                self.trials.append(Trial(**json.loads(line)))
            except (ValueError, TypeError):  # cut off where an earlier call was killed
                continue

    def get(self, settings: Mapping[str, Any], edits: int) -> Trial | None:
        return next((t for t in self.trials if t.settings == settings and t.edits == edits), None)

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trial)) + "\n")


def rounds(edits: int) -> list[int]:
    """Edits of each round: a quarter, half, all."""
    return sorted({max(1, edits // 4), max(1, edits // 2), edits})


def search(
    section: str, candidates: Sequence[Mapping[str, Any]], bench: Bench, journal: Journal, plan: Plan,
    report: Report = lambda what, done, total: None,
) -> Found:  # fmt: skip
    """Successive halving over the candidates, as far as the CPU minutes go."""
    start, complete = time.process_time(), True
    alive = [dict(settings) for settings in candidates]
    for edits in rounds(plan.edits):
        tried: list[Trial] = []
        for i, settings in enumerate(alive):
            report(f"{section}: settings on {edits} edits", i, len(alive))
            trial = journal.get(settings, edits)
            if trial is None:
                if time.process_time() - start > 60 * plan.minutes:
                    complete = False
                    break
                trial = bench.tried(section, settings, edits)
                journal.add(trial)
            tried.append(trial)
        if not complete:
            break
        tried.sort(key=lambda trial: trial.merit, reverse=True)
        alive = [trial.settings for trial in tried[: max(2, -(-len(tried) // THIRD))]]
    if not journal.trials:
        raise UserError(f"--minutes {plan.minutes:g}: not one setting was tried; give more")
    return Found(
        editor=section, trials=tuple(journal.trials), complete=complete,
        seconds=sum(trial.seconds for trial in journal.trials),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ all of it


def calibrate(
    loaded: Loaded, pool: FactPool, sections: Sequence[str], *, corpus: Sequence[str], cache: Path, plan: Plan,
    report: Report = lambda what, done, total: None,
) -> tuple[Draw, Recommendation, list[Found]]:  # fmt: skip
    """Draw the calibration facts, trace some of them, and search the settings of every editor.

    Raises UserError for an editor without a space, and where the pool has too few facts or the model knows too few.
    """
    for section in sections:
        if section not in SPACES:
            raise UserError(f"--editor: no search for {section!r}; expected one of {', '.join(SPACES)}")
    want = FactsPart(
        edited=plan.edits, intrinsic=plan.known, neighbors=2, same_subject=0, paraphrases=2, intrinsic_relations="any"
    )
    bench = Bench(loaded=loaded, corpus=corpus, drawn=Draw(edits=(), facts={}, questions=(), dropped={}), cache=cache,
                  seed=plan.seed)  # fmt: skip
    report("drawing calibration facts", 0, 1)
    drawn = draw(pool, want, plan.seed, bench.answers, lambda asked: [None] * len(asked))
    bench = replace(bench, drawn=drawn)
    key = content_id(
        [VERSION, loaded.content, asdict(replace(plan, minutes=0.0)), [q.id for q in drawn.questions],
         [[e.fact.id, e.target] for e in drawn.edits], list(corpus)]
    )  # fmt: skip
    folder = cache / "calibrations" / key
    advice = _advice(loaded, drawn, plan, folder, report)
    additive = anatomy(loaded.model).additive
    found = []
    for section in sections:
        candidates = drawn_settings(section, loaded.model.config, advice, additive, plan)
        found.append(search(section, candidates, bench, Journal(folder / f"{section}.jsonl"), plan, report))
    return drawn, advice, found


def _advice(loaded: Loaded, drawn: Draw, plan: Plan, folder: Path, report: Report) -> Recommendation:
    """The layers that tracing names, from the cache where they were traced before."""
    file = folder / "tracing.json"
    if plan.traced == 0:
        return Recommendation(rome=None, memit=(), reason="not traced")
    if file.is_file():
        about = json.loads(file.read_text(encoding="utf-8"))
        return Recommendation(rome=about["rome"], memit=tuple(about["memit"]), reason=str(about["reason"]))
    known = {q.fact_id for q in drawn.questions if q.group == "intrinsic"}
    facts = [fact for fact in drawn.facts.values() if fact.id in known][: plan.traced]
    traced = trace(
        loaded.model, loaded.tokenizer, facts, TracingSettings(samples=2, seed=plan.seed),
        progress=lambda done, total: report("tracing", done, total),
    )  # fmt: skip
    advice = recommend(traced)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(asdict(advice)) + "\n")
    return advice


def preset_of(
    model: str, config: Any, drawn: Draw, found: Sequence[Found], data: str, seed: int, old: Preset | None = None
) -> Preset:
    """A preset with the best settings and their evidence; sections of other editors stay as they are in `old`."""
    sections = dict(old.editors) if old is not None else {}
    for one in found:
        best = one.best
        sections[one.editor] = Section(
            settings=best.settings,
            calibrated=Measured(
                efficacy=best.efficacy, paraphrase=best.paraphrase, intrinsic=best.intrinsic, neighbors=best.neighbors,
                n=best.n, seeds=1, day=date.today(), data=f"{data}, seed {seed}, best of {len(one.trials)} trials",
            ),
        )  # fmt: skip
    marks = {subject_mark(fact.subject) for fact in drawn.facts.values()} | set(old.calibrated_on if old else ())
    return Preset(
        model=old.model if old is not None else model, shapes=old.shapes if old is not None else (shape_of(config),),
        calibrated_on=tuple(sorted(marks)), editors=sections,
    )  # fmt: skip


def write(preset: Preset, path: Path) -> None:
    """As a preset file. Numbers as YAML reads them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(presets.dump(preset), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    write_text(path, text)


def text(found: Found) -> list[str]:
    """The front, line by line."""
    tried = len({json.dumps(trial.settings, sort_keys=True) for trial in found.trials})
    lines = [f"{found.editor}: {tried} settings, {len(found.trials)} trials, {found.seconds / 60:.1f} CPU minutes"]
    lines += [f"  {trial}" for trial in found.front]
    if not found.complete:
        lines.append("  the time is up; the same command resumes")
    return lines
