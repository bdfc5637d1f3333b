"""What probing costs a fine-tune, and what freezing saves: CPU seconds of the same fine-tune with and without.

    python benchmarks/overhead.py [--json] [--checkpoints 10] [--repeats 5] [--model smollm2|DIR] [--probes score]

The facts, the edits, the task, the batches and the number of steps are those of the quickstart's first run
(experiments/quickstart.yaml). With --model, another model folder; questions and rows are then made up, as many. At each
checkpoint the model is read as a run reads it: the probes score and generate in one pass, the task's held-out rows, and
the readings are written as parquet. One thread; the two ways alternate and each pair gives a ratio, of which the median
counts. Neither imports nor the loading of the model are timed, the setting up of the trainer is. A checkpoint is also
told in steps of training, by time and by multiplications: what no way of reading as many questions can go below.

harness: a fine-tune by the harness, unread, over the same by trl's bare trainer, from its making on; interleaved.

freezing: a step with the embeddings and the blocks up to one of them frozen over a step of everything. What the skipped
backward pass predicts counts multiplications only (forward 1, gradient of the inputs 1, of the weights 1); attention's
own, element-wise work, the optimizer and the trainer are left out of it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import machine
import probing
import torch
from torch.utils.flop_counter import FlopCounterMode

from retention import tune
from retention.adapters import Full
from retention.cache_folders import default_cache
from retention.data import rows_of
from retention.edit import write_edits
from retention.facts import pool_of
from retention.facts.draw import draw
from retention.mitigations.freeze import Freeze
from retention.models import Anatomy, Loaded, anatomy, load_model
from retention.objectives import Sft
from retention.probes import Generate, Prepared, Score, read_all
from retention.probes.ability import heldout
from retention.probes.rivals import rivals
from retention.store import Keys, write_readings
from retention.study import Study
from retention.trainers import config_of
from retention.types import Delta, Question
from retention.world import WorldModel

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
QUESTIONS_PER_EDIT = 13  # of the made-up questions
HELD_OUT = 100  # rows of the made-up task


@dataclass(frozen=True, kw_only=True)
class Material:
    """A model, what it is asked and what it is trained on."""

    loaded: Loaded
    questions: Sequence[Question]
    train: Sequence[dict[str, Any]]
    heldout: Sequence[dict[str, Any]]
    trainer: dict[str, Any]  # settings of the trainer
    steps: int


def quickstart(cache: Path) -> Material:
    """The first run of the quickstart, its edits written."""
    run = Study.load(QUICKSTART).runs[0]
    s = run.settings
    assert isinstance(s.model, WorldModel)
    loaded = load_model(s.model.folder(cache))
    model, words = loaded.model, loaded.tokenizer

    def known(questions: Sequence[Question]) -> list[bool]:
        return [bool(reading.all_correct) for reading in Score().read(model, words, questions, 0)]

    pool = pool_of(s.facts, s.model, run.facts_seed)
    drawn = draw(pool, s.facts, run.facts_seed, known, lambda asked: rivals(model, words, asked))
    edited = write_edits(run, loaded, drawn, lambda n: None, cache, lambda what, done, total: None)
    edited.delta.apply_(model)
    (task,) = s.tunes
    rows = rows_of(task.data, s.model, s.seed)
    assert task.steps is not None
    return Material(
        loaded=loaded,
        questions=drawn.questions,
        train=rows.train,
        heldout=rows.heldout,
        trainer=task.trainer,
        steps=task.steps,
    )


def made_up(folder: Path, questions: int, steps: int) -> Material:
    """Another model, with questions of CounterFact's shape and rows that answer others of their kind."""
    asked = probing.questions(-(-questions // QUESTIONS_PER_EDIT), seed=0)[:questions]
    others = probing.questions(100, seed=1)
    rows = [{"prompt": q.text, "completion": f"{q.answer}."} for q in others]
    return Material(
        loaded=load_model(folder),
        questions=asked,
        train=rows[HELD_OUT:],
        heldout=rows[:HELD_OUT],
        trainer={"learning_rate": 2.0e-4},
        steps=steps,
    )


class Clock:
    """CPU seconds by what they went into."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - start
        return result


def fine_tune(
    given: Material,
    steps: int,
    on_checkpoint: tune.Checkpoint = lambda step, tokens, model: None,
    at: Sequence[int] = (),
    frozen: Callable[[Any, Anatomy], Sequence[str]] = lambda model, places: (),
) -> tuple[float, list[float]]:
    """CPU seconds of one fine-tune of a copy of the model, and of each of its steps but the first."""
    model = copy.deepcopy(given.loaded.model)
    places = anatomy(model)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        tune.fine_tune(
            model,
            given.loaded.tokenizer,
            given.train,
            objective=Sft(),
            adapter=Full(),
            hold=lambda wrapped: tune.Held(frozen=tuple(frozen(wrapped, places))),
            anatomy=places,
            budget=tune.Budget(steps=steps),
            trainer=given.trainer,
            seed=0,
            at=at,
            on_checkpoint=on_checkpoint,
            folder=Path(folder),
            base=lambda: given.loaded.model,
            progress=lambda done, total: ends.append(time.process_time()),
        )
        total = time.process_time() - start
    return total, [b - a for a, b in itertools.pairwise(ends)]


def probed(given: Material, at: Sequence[int], probes: Sequence[Any]) -> tuple[float, dict[str, float]]:
    """CPU seconds of a fine-tune that is read at these steps, and what its checkpoints took, by part."""
    clock, prepared = Clock(), Prepared()
    words = given.loaded.tokenizer

    def checkpoint(step: int, tokens: int, model: Any) -> None:
        readings = clock.timed(
            " and ".join(probe.name for probe in probes),
            lambda: read_all(probes, model, words, given.questions, step, prepared),
        )
        clock.timed("task", lambda: heldout(model, words, given.heldout, prepared=prepared))
        keys = Keys(base_id=None, model_id="", facts_seed=0)
        pairs = list(zip(given.questions, readings, strict=True))
        clock.timed("writing", lambda: write_readings(Path(folder) / f"{step}.parquet", keys, pairs, tokens, 0))

    with tempfile.TemporaryDirectory() as folder:
        total, _ = fine_tune(given, max(at), checkpoint, at)
    return total, clock.spent


def overhead(given: Material, checkpoints: int, repeats: int, probes: Sequence[Any]) -> dict[str, Any]:
    """The ratio of a fine-tune with probes to one without, and the seconds behind it (medians)."""
    at = [given.steps * n // checkpoints for n in range(1, checkpoints + 1)]
    pairs: list[tuple[float, float, dict[str, float]]] = []
    probed(given, [1], probes)  # the first forwards and the first step pay for the allocator and the kernels
    for number in range(repeats):
        if number % 2:
            (total, parts), (plain, _) = probed(given, at, probes), fine_tune(given, given.steps)
        else:
            (plain, _), (total, parts) = fine_tune(given, given.steps), probed(given, at, probes)
        pairs.append((plain, total, parts))
    alone = Clock()  # what one probe would take, had it been asked alone
    prepared = Prepared()
    for number in range(repeats + 1):
        clock = alone if number else Clock()  # the first time prepares
        for probe in probes:
            model, words = given.loaded.model, given.loaded.tokenizer
            clock.timed(probe.name, partial(read_all, [probe], model, words, given.questions, 0, prepared))
    step = statistics.median(plain for plain, _, _ in pairs) / given.steps
    return {
        "ratio": statistics.median(total / plain for plain, total, _ in pairs),
        "ratio_within_a_run": statistics.median(total / (total - sum(p.values())) for _, total, p in pairs),
        "cpu_seconds": {
            "without": statistics.median(plain for plain, _, _ in pairs),
            "with": statistics.median(total for _, total, _ in pairs),
        },
        "cpu_seconds_a_checkpoint": {
            part: statistics.median(parts[part] for *_, parts in pairs) / checkpoints for part in pairs[0][2]
        },
        "checkpoint_in_steps": statistics.median((total - plain) / checkpoints for plain, total, _ in pairs) / step,
        "cpu_seconds_alone": {name: seconds / repeats for name, seconds in alone.spent.items()},
        "checkpoints": checkpoints,
    }


def bare(given: Material, steps: int) -> float:
    """CPU seconds of the same fine-tune by trl's own trainer, nothing around it."""
    import trl
    from datasets import Dataset

    model = copy.deepcopy(given.loaded.model)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it prints its log
        start = time.process_time()
        config = config_of(Sft(), given.trainer, steps=steps, epochs=None, in_order=False, seed=0, folder=Path(folder))
        rows = Dataset.from_list(list(given.train))
        trl.SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=given.loaded.tokenizer).train()
        return time.process_time() - start


def harness(given: Material, steps: int, repeats: int) -> dict[str, Any]:
    """Paired and interleaved: the median ratio, and the smallest and the largest."""
    ratios = []
    for number in range(repeats):
        if number % 2:
            (ours, _), theirs = fine_tune(given, steps), bare(given, steps)
        else:
            theirs, (ours, _) = bare(given, steps), fine_tune(given, steps)
        ratios.append(ours / theirs)
    return {"ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios), "repeats": repeats}


def products(given: Material) -> float:
    """Multiplications of one checkpoint over those of one step of training, as torch counts them."""
    with FlopCounterMode(display=False) as training:
        fine_tune(given, 2)
    with FlopCounterMode(display=False) as reading:
        read_all((Score(), Generate()), given.loaded.model, given.loaded.tokenizer, given.questions, 0)
        heldout(given.loaded.model, given.loaded.tokenizer, given.heldout)
    return 2 * reading.get_total_flops() / training.get_total_flops()


def predicted(model: Any, places: Anatomy, frozen: Sequence[str]) -> float:
    """Multiplications of a step over those of a step of everything, from the sizes of the matrices."""
    held = set(frozen)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head = model.get_output_embeddings().weight
    # Only the lowest blocks are frozen, so from the first that moves on, norms before the matrices move too, and each
    # matrix needs the gradient of its inputs; a frozen one below needs neither. The head always passes a gradient on.
    whole, cost = 3 * head.numel(), (2 + (names[id(head)] not in held)) * head.numel()
    for block in places.blocks(model):
        matrices = [parameter for parameter in block.parameters() if parameter.ndim == 2]
        whole += 3 * sum(matrix.numel() for matrix in matrices)
        cost += sum((1 if names[id(matrix)] in held else 3) * matrix.numel() for matrix in matrices)
    return cost / whole


def freezing(given: Material, steps: int, repeats: int) -> list[dict[str, Any]]:
    """A step with all blocks up to one frozen over a step of everything, for three of them."""
    layers = anatomy(given.loaded.model).layers
    found = []
    for layer in sorted({0, layers // 2 - 1, layers - 2} & set(range(layers - 1))):
        freeze = Freeze(what="up_to", layer=layer)

        def frozen(model: Any, places: Anatomy, freeze: Freeze = freeze) -> list[str]:
            return list(freeze.frozen(model, places, Delta()))

        ratios, full_s, frozen_s = [], [], []
        for _ in range(repeats):
            _, full = fine_tune(given, steps)
            _, held = fine_tune(given, steps, frozen=frozen)
            full_s.append(statistics.median(full))
            frozen_s.append(statistics.median(held))
            ratios.append(frozen_s[-1] / full_s[-1])
        model = given.loaded.model
        found.append(
            {
                "up_to": layer,
                "ratio": statistics.median(ratios),
                "predicted": predicted(model, anatomy(model), frozen(model, anatomy(model))),
                "cpu_seconds_a_step": {"full": statistics.median(full_s), "frozen": statistics.median(frozen_s)},
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--model", help="a fetched model (smollm2) or a folder, instead of the world")
    parser.add_argument("--probes", nargs="+", default=["score", "generate"], choices=["score", "generate"])
    parser.add_argument("--cache", type=Path, help="where the world's model is kept; default as for `retention run`")
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of fine-tunes")
    parser.add_argument("--questions", type=int, default=550, help="with --model")
    parser.add_argument("--steps", type=int, default=100, help="with --model")
    parser.add_argument("--freezing-steps", type=int, default=30, help="steps of each fine-tune for freezing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model is None:
        given = quickstart(args.cache or default_cache())
    else:
        ((_, folder),) = machine.models([args.model]).items()
        given = made_up(folder, args.questions, args.steps)

    probes = [{"score": Score, "generate": Generate}[name]() for name in args.probes]
    result = overhead(given, args.checkpoints, args.repeats, probes)
    result["harness"] = harness(given, args.freezing_steps, args.repeats)
    result["products"] = products(given)
    result["freezing"] = freezing(given, args.freezing_steps, args.repeats)
    model = given.loaded.model
    result["sizes"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": anatomy(model).layers,
        "questions": len(given.questions),
        "heldout_rows": len(given.heldout),
        "steps": given.steps,
    }
    result["machine"] = machine.about()
    if args.json:
        print(json.dumps(result))
        return
    seconds, parts = result["cpu_seconds"], result["cpu_seconds_a_checkpoint"]
    print(f"{given.steps} steps, {len(given.questions)} questions at {args.checkpoints} checkpoints; CPU seconds")
    print(f"fine-tune        without {seconds['without']:7.2f}   with probes {seconds['with']:7.2f}")
    print(f"ratio            {result['ratio']:.2f}x   (within a run: {result['ratio_within_a_run']:.2f}x)")
    print("a checkpoint     " + "   ".join(f"{part} {s:.3f}" for part, s in parts.items()))
    print(f"in steps         time {result['checkpoint_in_steps']:.1f}   multiplications {result['products']:.1f}")
    against = result["harness"]
    print(f"harness over trl {against['ratio']:.3f}x   ({against['from']:.3f} to {against['to']:.3f})")
    print("a probe alone    " + "   ".join(f"{name} {s:.3f}" for name, s in result["cpu_seconds_alone"].items()))
    for row in result["freezing"]:
        full, frozen = (row["cpu_seconds_a_step"][way] * 1e3 for way in ("full", "frozen"))
        print(
            f"freeze up_to {row['up_to']:<3} a step {full:6.1f} ms   frozen {frozen:6.1f} ms"
            f"   {row['ratio']:.2f}   (the backward pass predicts {row['predicted']:.2f})"
        )


if __name__ == "__main__":
    main()
