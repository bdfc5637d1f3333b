"""Model folders: where a name leads, and what tells two of them apart. Loads no model."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from retention.cache_folders import file_digest
from retention.fetch import MODELS, fetched
from retention.gguf_file import architecture_of, convert, converted
from retention.types import Missing, UserError

CONTENT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
                 "*token*.json", "merges.txt", "vocab.*", "*.model", "chat_template*", "corpus.txt")  # fmt: skip


class NotFetched(Missing):
    """A model of the Hub that is not in the Hub's cache, and was not to be fetched or could not be."""


_fetching: ContextVar[bool] = ContextVar("fetching", default=True)


def fetching() -> bool:
    return _fetching.get()


@contextmanager
def nothing_fetched() -> Iterator[None]:
    """Within it, a model of the Hub is looked for in the Hub's own cache alone."""
    token = _fetching.set(False)
    try:
        yield
    finally:
        _fetching.reset(token)


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The folder that holds the model: a folder, a GGUF file's, that of a model by `retention fetch`, or of the Hub.

    A GGUF file is converted and a Hub name is fetched where that was not done yet, but not within `nothing_fetched`.
    Raises UserError for what is no model folder, Missing for what is not here and could not be fetched.
    """
    folder = Path(name).expanduser()
    if (folder.suffix == ".gguf" and folder.is_file()) or str(name) in MODELS:
        return _of_gguf(folder, str(name), revision)
    if folder.is_dir():
        refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"model: {folder} has no config.json, so it is not a model folder")
        return folder
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, siblings, n=1)
        raise Missing(
            f"model: there is no folder {text!r}{f'; did you mean {near[0]!r}?' if near else ''}; "
            f"give a folder, a GGUF file, a Hub name such as openai-community/gpt2, or {' or '.join(MODELS)}"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    here = constants.HF_HUB_OFFLINE or not fetching()
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        found = Path(snapshot_download(text, revision=revision, allow_patterns=wanted, local_files_only=here))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if here:
            raise NotFetched(_not_here(text, revision)) from error
        raise NotFetched(
            f"model: {text!r} is no folder here and could not be fetched from the Hub: {reason}"
        ) from error
    if here and not _whole(found):  # only some of its files were fetched
        raise NotFetched(_not_here(text, revision))
    return found


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer, by AutoTokenizer unless the folder says that its tokenizer is of no family.

    AutoTokenizer goes by the model's type for some (qwen2), and would cut such a tokenizer's texts as that family does.
    """
    import transformers

    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError("its tokenizer_config.json is no JSON object")
    own = settings.get("tokenizer_class")
    plain = own in ("PreTrainedTokenizerFast", "TokenizersBackend") and (folder / "tokenizer.json").is_file()
    loader: Any = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
    return loader.from_pretrained(folder, trust_remote_code=False)


def refuse_adapter(folder: Path) -> None:
    """Raises UserError if the folder is a peft adapter: transformers would load another folder's model for it."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])[:80]
    except (OSError, ValueError, KeyError, TypeError):
        base = "BASE"
    raise UserError(
        f"model: {folder} is a peft adapter, not a whole model: merge it into {base} first "
        f"(PeftModel.from_pretrained(model, {str(folder)!r}).merge_and_unload().save_pretrained(OUT)) and give OUT"
    )


def _of_gguf(path: Path, name: str, revision: str | None) -> Path:
    if revision is not None:
        raise UserError(f"model: {name!r} has no revisions: leave `revision` out (it is for models of the Hub)")
    if name in MODELS:
        if path.exists():
            raise UserError(
                f"model: {name!r} is the name of a model by `retention fetch`, and of a folder here: write ./{name} "
                "for the folder, or rename it"
            )
        return fetched(name)
    found = converted(path)
    if found is None and not fetching():
        architecture_of(path)
        raise NotFetched(f"model: {name!r} is not converted yet; `retention run` does that once")
    return found or convert(path)


def _not_here(name: str, revision: str | None) -> str:
    from huggingface_hub import constants

    fetch = f"`hf download {name}{f' --revision {revision}' if revision else ''}`"
    why = (
        ", and HF_HUB_OFFLINE is set: unset it, or fetch"
        if constants.HF_HUB_OFFLINE
        else ": `retention run` fetches it, or"
    )
    return f"model: {name!r} is neither a folder nor, whole, in the Hub's cache {constants.HF_HUB_CACHE}{why} {fetch}"


def _whole(folder: Path) -> bool:
    """Whether a snapshot has its configuration and all of its weights."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        return False
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / part).is_file() for part in parts)


def content_hash(folder: str | Path) -> str:
    """Hash of the names and bytes of a model folder's weights, config and tokenizer files."""
    digest = hashlib.sha256()
    files = {file for pattern in CONTENT_FILES for file in Path(folder).glob(pattern)}
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.name.encode() + b"\0" + file_digest(file))
    return digest.hexdigest()
