"""What must hold whatever is studied: imports point down, measuring moves nothing, probes ask what nobody wrote."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from retention import stages, yaml_file
from retention.adapters import Adapter, Full
from retention.deltas import load_delta, save_delta
from retention.engines import inline
from retention.facts.draw import draw
from retention.facts.world import WorldFacts
from retention.mitigations import Paraphrase
from retention.models import anatomy, load_model
from retention.objectives import Sft
from retention.probes import Generate, Score, read_all
from retention.probes.ability import heldout
from retention.stages import Bench
from retention.store import Store
from retention.study import Study
from retention.tune import Budget, Held, fine_tune
from retention.types import Delta, LowRank, Question, UserError
from retention.world import WorldModel
from tests.small_study import ROME, WORLD, one
from tests.tiny import build

PACKAGE = Path(__file__).resolve().parents[1] / "retention"

# ------------------------------------------------------------------------------------------------ imports

LEVELS = {
    0: ("types", "texts", "chats", "tokens", "explain", "yaml_file", "estimate", "cache_folders", "checked_tensors"),
    1: (
        "trainer_fields",
        "trainer_state",
        "restored",
        "snapshot",
        "memory",
        "resume",
        "interrupts",
        "models",
        "half",
        "model_folder",
        "model_checks",
        "gguf_file",
        "fetch",
        "configs",
        "presets",
        "fetch_data",
        "records",
        "edit_keys",
        "hooks",
        "facts",
        "world",
        "data",
        "adapters",
        "soft_prompt",
        "deltas",
        "ranks",
    ),
    2: (
        "editors",
        "objectives",
        "mitigations",
        "probes",
        "trainers",
        "training_rows",
        "tune",
        "tracing",
        "layers",
        "weight_diagnostics",
        "abilities",
    ),
    3: (
        "stages",
        "fine_tuning",
        "relearn",
        "late",
        "ids",
        "artefacts",
        "edit",
        "labels",
        "study",
        "preflight",
        "launch",
        "store",
        "excerpt",
        "reading",
        "statistics",
        "regimes",
    ),
    4: ("engines",),
    5: (
        "api",
        "calibrate",
        "cli",
        "outside",
        "progress",
        "doctor",
        "planning",
        "needs",
        "hours",
        "rephrase",
        "report",
        "watch",
    ),
}
# Leaves: settings or bookkeeping that import no more than level 0, so that anyone may use them.
LEAVES = ("regimes", "progress", "store")
APART = ("editors", "objectives", "mitigations", "probes")  # folders of level 2: never each other


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, within functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def owner(name: str) -> str | None:
    """`retention.facts.draw` -> `facts`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "retention" and len(parts) > 1 else None


def level(top: str) -> int:
    (found,) = (n for n, tops in LEVELS.items() if top in tops)
    return found


def tops() -> set[str]:
    return {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}


def test_every_module_has_a_level():
    assert tops() - {"__init__"} == {top for group in LEVELS.values() for top in group}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return
    me = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        other = owner(name)
        if other is None or other == me or other not in tops():
            continue
        if me in LEAVES:
            assert level(other) == 0, f"{me} imports {name}"
        elif other not in LEAVES:
            assert level(other) <= level(me), f"{me} (level {level(me)}) imports {name} (level {level(other)})"
        if me in APART:
            assert other not in APART, f"{me} imports {name}"
        if other == "tune":
            assert level(me) > 2, f"{me} imports {name}"


def at_once(path: Path) -> set[str]:
    """The modules of the package that are imported when a file is: not within functions, not for type checkers."""
    known = {module_name(p) for p in modules()}
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    # Python begins with the packages around a module; those around the file itself have begun before it.
    within = {package for name in found for package in packages(name)} - {
        module_name(path),
        *packages(module_name(path)),
    }
    return (found | within) & known


def packages(name: str) -> set[str]:
    """`retention.facts.draw` -> `retention`, `retention.facts`."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_any_module_can_be_the_first_that_is_imported():
    graph = {module_name(path): at_once(path) for path in modules()}
    assert {"retention.facts", "retention.facts.zsre"} <= graph["retention.world.facts_model"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("folder", APART)
def test_private_files_are_their_folders_own(folder):
    for path in modules():
        if path.is_relative_to(PACKAGE / folder):
            continue
        private = [n for n in imports(path) if n.startswith(f"retention.{folder}._")]
        assert private == [], path


def users(package: str) -> set[str]:
    return {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


def test_outside_libraries_have_one_home():
    assert users("trl") == set()  # trainers.py imports the trainer that an objective names
    assert "import_module" in (PACKAGE / "trainers.py").read_text()
    assert [p.name for p in modules() if "import_module" in p.read_text()] == ["trainers.py"]
    assert users("duckdb") == {"reading.py"}
    assert users("hydra") == {"yaml_file.py"}
    assert users("typer") == {"cli.py"}
    assert users("matplotlib") == set()
    assert users("altair") | users("jinja2") | users("vl_convert") == {"report/_charts.py", "report/_page.py"}
    written = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(word in path.read_text() for word in ("write_table(", "to_parquet(", "ParquetWriter"))
        and "pq.write_table" in path.read_text()
    }
    assert written == {"store.py"}


# ------------------------------------------------------------------------------------------------ what files may do

UNPICKLE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, what is called as it is written, the call) of the whole package, the scripts and the benchmarks."""
    folders = (PACKAGE, PACKAGE.parent / "analysis", PACKAGE.parent / "benchmarks")
    return [
        (str(path.relative_to(PACKAGE.parent)), ast.unparse(node.func), node)
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def test_no_file_that_is_read_can_run_code():
    """No pickle, by whatever name: weights are safetensors, tables parquet, settings YAML by a safe loader.

    But one: launch.py hands a run to the processes that it starts, in a temporary folder that is its own.
    """
    assert {path.name for path in modules() if imports(path) & UNPICKLE} == {"launch.py"}
    found = calls()
    assert len(found) > 5000
    forbidden = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "eval", "exec", "compile", "os.system"}
    assert [(path, name) for path, name, _ in found if name in forbidden] == []
    loads = [(path, ast.unparse(call)) for path, name, call in found if name in ("yaml.load", "yaml.unsafe_load")]
    assert loads == [("retention/yaml_file.py", "yaml.load(text, Loader=_Loader)")]
    assert issubclass(yaml_file._Loader, yaml.SafeLoader | yaml.CSafeLoader)
    assert [path for path, _, call in found if any(k.arg == "shell" for k in call.keywords)] == []


def test_code_that_comes_with_weights_is_never_run():
    """Every place that reads a model or a tokenizer of somebody else's says so; none says otherwise."""
    said = {
        (path, name): [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        for path, name, call in calls()
        if name.endswith(".from_pretrained") or any(keyword.arg == "trust_remote_code" for keyword in call.keywords)
    }
    assert len(said) >= 3
    assert {place: value for place, value in said.items() if value != ["False"]} == {}


# ------------------------------------------------------------------------------------------------ measuring

PEOPLE = ("Anna", "Berta", "Carl", "Dora", "Emil", "Franz", "Greta", "Hugo")
CITIES = ("Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Vienna", "Oslo", "Bern")
ROWS = tuple({"prompt": f"{p} was born in", "completion": f"{c} ."} for p, c in zip(PEOPLE, CITIES, strict=True))
QUESTIONS = [
    Question(fact_id=p, group="edited", form="direct", text=f"{p} {'Klein ' * (i % 3)}speaks", answer=c, foil="Prague")
    for i, (p, c) in enumerate(zip(PEOPLE, CITIES, strict=True))
]  # fmt: skip


def trained(
    folder: Path, name: str, probes: Any, at: tuple[int, ...], adapter: Any
) -> tuple[torch.Tensor, list[float]]:
    """All weights after six steps with dropout, and the losses on the way."""
    drops = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1} if name == "gpt2" else {"attention_dropout": 0.1}
    model, tokenizer = build(name, **drops)

    def checkpoint(step: int, tokens: int, model: Any) -> None:
        assert model.training
        read_all(probes, model, tokenizer, QUESTIONS, step)
        heldout(model, tokenizer, ROWS)

    result = fine_tune(
        model, tokenizer, ROWS, objective=Sft(), adapter=adapter,
        hold=lambda wrapped: Held(), anatomy=anatomy(model), budget=Budget(steps=6), base=lambda: model,
        seed=0, at=at, on_checkpoint=checkpoint,
        trainer={"logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 3e-3}, folder=folder,
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in model.parameters()]), [entry["loss"] for entry in result.log]


DROPPING = Adapter(name="lora", settings={"lora_dropout": 0.1})


@pytest.mark.parametrize(("name", "adapter"), [("gpt2", Full()), ("llama", DROPPING)])
def test_probing_never_moves_training(tmp_path, name, adapter):
    alone, losses = trained(tmp_path, name, [Score()], (), adapter)
    for probes in ([Score()], [Score(), Generate()]):
        weights, found = trained(tmp_path, name, probes, (1, 2, 3, 4, 5, 6), adapter)
        assert found == losses
        assert torch.equal(weights, alone)


def test_the_edit_stage_leaves_the_base_model_as_it_was(cache, tmp_path, monkeypatch):
    kept: list[Any] = []

    def keeping(*args: Any) -> Any:
        loaded = load_model(*args)
        kept.append((loaded.model, {n: p.detach().clone() for n, p in loaded.model.named_parameters()}))
        return loaded

    monkeypatch.setattr(stages, "load_model", keeping)
    bench = Bench(store=Store(tmp_path / "r", create=True), cache=cache)
    grid = {"regime": ["batch", {"name": "sequential", "size": 2}]}
    runs = Study.of(one(editor=ROME, grid=grid), name="leaving").runs
    for stage in inline.plan(runs, bench):
        if stage.kind != "tune":
            inline.WORK[stage.kind](stage.run, bench)
    assert len(kept) == 3
    for model, before in kept:
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    delta, soft_prompt = load_delta(next((tmp_path / "r" / "edits").glob("*/delta.safetensors")))
    assert soft_prompt is None
    assert delta.norm() > 0  # there was something to take back


def test_a_delta_is_taken_back_bit_for_bit():
    model, _ = build("llama")
    generator = torch.Generator().manual_seed(0)
    names = [n for n, p in model.named_parameters() if p.dim() == 2][:6]
    shapes = {n: p.shape for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    updates: dict[str, Any] = {n: torch.randn(shapes[n], generator=generator) for n in names[:3]}
    for n in names[3:]:
        rows, columns = shapes[n]
        updates[n] = LowRank(torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator))
    delta = Delta(updates)
    with delta.applied(model):
        for n, p in model.named_parameters():
            added = delta.dense(n) if n in updates else torch.zeros(p.shape)
            assert torch.equal(p, before[n] + added)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # Adding and taking away again would not have done it:
    assert any(not torch.equal(before[n] + delta.dense(n) - delta.dense(n), before[n]) for n in names)
    bad = Delta(updates | {"nowhere.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"the edit changes 'nowhere\.weight'"), bad.applied(model):
        raise AssertionError("an edit of another model was applied")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_delta_survives_its_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(4, 2, generator=generator), torch.randn(2, 3, generator=generator))
    delta, prompt = Delta({"a.weight": factors, "b.weight": torch.randn(5, generator=generator)}), torch.randn(2, 3)
    save_delta(tmp_path / "d.safetensors", delta, prompt)
    again, soft_prompt = load_delta(tmp_path / "d.safetensors")
    assert torch.equal(soft_prompt, prompt)
    assert again.updates.keys() == delta.updates.keys()
    assert isinstance(again.updates["a.weight"], LowRank)
    assert all(torch.equal(again.dense(n), delta.dense(n)) for n in delta.updates)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


# ------------------------------------------------------------------------------------------------ asking


@pytest.mark.parametrize("kind", ["modification", "injection"])
@pytest.mark.parametrize("seed", range(4))
def test_no_probe_asks_what_an_edit_was_written_with_or_told_to_keep(kind, seed):
    world = WorldModel.model_validate(WORLD)
    facts = WorldFacts(
        kind=kind, share=0.5, edited=3 if kind == "injection" else 6, control=1, intrinsic=20, neighbors=3,
        same_subject=8, paraphrases=3, intrinsic_relations="any",
    )  # fmt: skip
    pool = facts.pool(world, seed)

    def first_object(asked: Any) -> list[str | None]:
        return [(*objects, None)[0] for *_, objects in asked]

    drawn = draw(pool, facts, seed, lambda asked: [True] * len(asked), first_object)
    written = {e.fact.id: e for e in Paraphrase(n=3).edits(drawn.edits, seed)}
    used = {e.fact.text(p) for e in written.values() for p in e.prompts}
    statements = {f.text(p) for f in drawn.facts.values() for p in (f.prompt, *f.phrasings)}
    for question in drawn.questions:
        assert question.answer
        if question.form == "paraphrase":
            assert question.text not in used
            assert question.text not in statements  # nor with what pretraining states
        elif question.group != "edited":
            assert question.text not in used
        if question.group == "same_subject":
            edit = written[question.edit_of]
            assert question.text not in {edit.fact.text(anchor) for anchor in edit.anchors}
            assert drawn.facts[question.fact_id].subject == edit.fact.subject
    asked = {(q.group, q.form) for q in drawn.questions}
    assert {("edited", "paraphrase"), ("same_subject", "direct"), ("control", "direct")} <= asked
    assert len({q.id for q in drawn.questions}) == len(drawn.questions)


def test_a_draw_depends_on_its_seed_alone_and_never_on_success():
    world = WorldModel.model_validate(WORLD)
    facts = WorldFacts(share=0.5, edited=5, control=2, intrinsic=6, intrinsic_relations="any")

    def drawn(seed: int, known: Any) -> Any:
        return draw(facts.pool(world, seed), facts, seed, known, lambda asked: [None] * len(asked))

    first = drawn(0, lambda asked: [True] * len(asked))
    torch.rand(1)
    assert drawn(0, lambda asked: [True] * len(asked)) == first
    assert {e.fact.id for e in drawn(1, lambda asked: [True] * len(asked)).edits} != {e.fact.id for e in first.edits}
    # A model that knows other things is asked other intrinsic facts, but the same edits and controls.
    other = drawn(0, lambda asked: [len(q.answer) % 2 == 0 for q in asked])
    assert other.edits == first.edits

    def ids(draw: Any, group: str) -> list[str]:
        return [q.fact_id for q in draw.questions if q.group == group]

    assert ids(other, "control") == ids(first, "control")
    assert ids(other, "intrinsic") != ids(first, "intrinsic")
    assert all(len(other.facts[i].target) % 2 == 0 for i in ids(other, "intrinsic"))
    with pytest.raises(UserError, match=r"6 intrinsic facts were asked for; .* knows none of them"):
        drawn(0, lambda asked: [False] * len(asked))


def test_test_files_have_names_of_their_own():
    """Test folders are no packages: two files of one name stop the collection of the whole suite."""
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert {name for name in names if names.count(name) > 1} <= {"__init__.py"}
