"""Run the tests with the newest and the lowest allowed versions of the libraries that change most.

Each set has an environment of its own, `.venv-newest` and `.venv-lowest`: everything as in constraints.txt, and the
five libraries as the index serves them within pyproject.toml's ranges, or at the ranges' lower ends. torch stays
pinned. Prints the versions and the tests' last line; exits 1 if a set fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = ("transformers", "trl", "peft", "datasets", "accelerate")


def lowest() -> dict[str, str]:
    """Library -> the lower end of its range in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ends = {}
    for line in project["dependencies"]:
        name, low = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+).*", line).groups()  # type: ignore[union-attr]
        ends[name] = low
    return {name: ends[name] for name in LIBRARIES}


def constraints(which: str) -> str:
    """constraints.txt with the five libraries freed, or pinned to the lower ends of their ranges."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in LIBRARIES]
    pins = [f"{name}=={version}" for name, version in lowest().items()] if which == "lowest" else []
    return "\n".join([*kept, *pins]) + "\n"


def environment(which: str) -> Path:
    """The environment's Python, with everything installed."""
    folder = ROOT / f".venv-{which}"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "constraints.txt"
        file.write_text(constraints(which), encoding="utf-8")
        install = [python, "-m", "pip", "install", "--quiet", "-c", file]
        subprocess.run([*install, "torch==2.13.0"], check=True)
        subprocess.run([*install, "--upgrade", "--upgrade-strategy", "eager", "-e", f"{ROOT}[dev]"], check=True)
    return python


def tested(which: str, arguments: list[str]) -> bool:
    """Whether the tests pass in that set."""
    python = environment(which)
    asked = "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    said = subprocess.run([python, "-c", asked, *LIBRARIES, "torch"], check=True, capture_output=True, text=True)
    print(f"{which}: {said.stdout.strip()}", flush=True)
    alone = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, env=alone, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=["newest", "lowest"], choices=["newest", "lowest"])
    parser.add_argument("tests", nargs="*", default=["-n", "2"], help="arguments of pytest, after --")
    asked = parser.parse_args()
    passed = [tested(which, asked.tests) for which in asked.sets]  # both, whatever the first gives
    raise SystemExit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
