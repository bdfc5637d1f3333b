"""What is documented is there, and what is there is documented."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import typer

from retention.cli import app
from retention.study import Study

ROOT = Path(__file__).resolve().parents[1]
VERBS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)  # type: ignore[union-attr]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_is_in_the_readme(verb):
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert command.help
    assert f"retention {verb}" in readme()


def test_every_file_is_in_the_readmes_tree():
    missing = [
        str(path.relative_to(ROOT))
        for folder in ("retention", "analysis", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "__init__.py" and not re.search(rf"(?<![\w/]){re.escape(path.name)}\b", readme())
    ]
    assert missing == []


def test_the_readmes_tree_names_no_file_that_is_not_there():
    tree = max(re.findall(r"```[a-z]*\n(.*?)```", readme(), re.DOTALL), key=lambda block: block.count(".py"))
    there = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert [name for name in re.findall(r"[\w-]+\.py\b", tree) if name not in there] == []


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_is_a_study_that_says_how_it_is_run(path):
    study = Study.load(path)
    assert study.question
    assert study.runs
    assert f"retention run experiments/{path.name}" in path.read_text(encoding="utf-8").split("\n\n")[0]


def test_the_projects_texts_name_no_place_of_one_machine():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(?:tmp|work|root|home)/\w")
    found = [
        f"{name}: {match.group()}"
        for name in tracked.stdout.split("\0")
        if name and (ROOT / name).is_file() and Path(name).suffix in (".py", ".md", ".yaml", ".toml", "")
        for match in pattern.finditer((ROOT / name).read_text(encoding="utf-8", errors="ignore"))
    ]
    assert found == []
