"""A language model in one GGUF file, converted once to an ordinary model folder in the cache.

Read and dequantised by transformers' own GGUF loader; the folder (float32 safetensors, tokenizer, chat template,
generation settings) is named after the file's content, so that a file that is renamed or copied is not converted again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from retention.cache_folders import default_cache, file_digest, publish, sound
from retention.types import UserError

VERSION = 1  # raised when a conversion gives another folder than before
MAGIC = b"GGUF"
# What save_pretrained notes of the machine, the day or the environment: it would make equal models different ones.
INCIDENTAL = ("transformers_version", "_name_or_path", "_model_name_or_path", "name_or_path", "is_local",
              "local_files_only")  # fmt: skip


def place_of(digest: str) -> Path:
    """Where the model folder of the GGUF file with this SHA-256 belongs."""
    return default_cache() / "gguf" / f"{digest[:32]}-v{VERSION}"


def converted(file: Path) -> Path | None:
    """The model folder of a GGUF file; None if it was not converted yet. Raises UserError for a damaged one."""
    place = place_of(file_digest(file).hex())
    return place if sound(place) else None


def convert(file: Path, notes: Mapping[str, Any] | None = None) -> Path:
    """The model folder of a GGUF file, converted if it was not yet; `notes` go into its marker.

    Raises UserError for a file that is damaged or not GGUF, and for an architecture or a tokenizer that transformers
    cannot convert, by name.
    """
    digest = file_digest(file).hex()

    def write(folder: Path) -> Mapping[str, Any]:
        _write(file, architecture_of(file), folder)
        return {"sha256": digest, "file": file.name, **(notes or {})}

    return publish(place_of(digest), write)


def architecture_of(file: Path) -> str:
    """The architecture that a GGUF file names. Reads all headers, no weights.

    Raises UserError if the file is damaged, one part of several, or not GGUF; or if the package gguf is absent.
    """
    required()
    with file.open("rb") as handle:
        start = handle.read(4)
    if start != MAGIC:
        raise UserError(f"model: {file} is not a GGUF file (it begins with {start!r}, expected {MAGIC!r})")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        name = reader.fields["general.architecture"].contents()
        split = reader.get_field("split.count")
        parts = 1 if split is None else int(split.contents())
    except Exception as error:  # a stranger's bytes: the reader checks little, and fails in many ways
        raise UserError(_damaged(file, error)) from error
    if parts > 1:
        raise UserError(
            f"model: {file} is one of {parts} parts; join them first (llama.cpp: llama-gguf-split --merge FIRST OUT)"
        )
    return str(name)


def required() -> None:
    """Raises UserError if the package that reads GGUF is not installed."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise UserError("model: GGUF files need the package gguf; pip install 'retention[gguf]'")


def _write(file: Path, architecture: str, folder: Path) -> None:
    """Load the model and the tokenizer as transformers does, and save them."""
    with _quiet():
        model, tokenizer, missing = _loaded(file, architecture)
        if missing:
            raise UserError(
                f"model: {file} is damaged or not whole: {len(missing)} parameters of {architecture!r} are not in it, "
                f"{missing[0]} among them"
            )
        # The weights are plain float32 now; save_pretrained refuses while the model says that it is quantised.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.glob("*config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key not in INCIDENTAL}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _loaded(file: Path, architecture: str) -> tuple[Any, Any, list[str]]:
    """The model in float32, its tokenizer, and the parameters that the file lacks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, file_name = file.parent, file.name
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=file_name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file_name, trust_remote_code=False)
    except Exception as error:  # transformers checks little of a GGUF file, and fails in many ways
        raise UserError(
            f"model: {file}: transformers cannot convert it (architecture {architecture!r}: {_first_line(error)}); "
            "use the model's own folder with safetensors instead"
        ) from error
    model, found = both
    return model, tokenizer, sorted(found["missing_keys"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars: one of them heeds no setting, so standard error is set aside."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _damaged(file: Path, error: Exception) -> str:
    return f"model: {file} is a damaged GGUF file ({_first_line(error)}); fetch it again"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
