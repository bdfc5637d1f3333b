"""What in a model folder would fail or give wrong numbers later, found from its files: no model is put in memory.

Each fault is one UserError that says what to do. A folder is a stranger's: nothing that it holds is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from retention.model_folder import refuse_adapter, tokenizer_of
from retention.types import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Keys of config.json and names of tensors by which quantised checkpoints are known (bitsandbytes, GPTQ, AWQ, FP8, ...).
QUANTISED = ("quantization_config", "compression_config")
PACKED = (".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", ".weight_packed", ".weight_scale",
          ".weight_scale_inv", "_blocks", ".weight_format")  # fmt: skip
PLAIN = ("F64", "F32", "F16", "BF16", "BOOL", "I64", "I32")  # the last three of buffers; masks, 4-d, may be U8
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tokens_embed.weight")


def check_folder(folder: Path) -> None:
    """Raises UserError for a folder that is no model which can be edited, probed and fine-tuned as it is.

    Adapters, quantised weights, architectures that are code, parts that are missing or outside the folder, shapes and
    token ids that do not fit, NaN. Reads every weight once in a process, unless a file changes.
    """
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    _check(folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@lru_cache(maxsize=16)
def _check(folder: Path, _files: tuple[tuple[str, int, int], ...]) -> None:
    refuse_adapter(folder)
    settings = json_object(folder / "config.json")
    _refuse_quantised(folder, settings)
    config = _config(folder, settings)
    files = _weights(folder)
    tensors = {name: (kind, shape) for file in files for name, kind, shape in _headers(file)}
    packed = sorted(
        name
        for name, (kind, shape) in tensors.items()
        if (kind not in PLAIN and len(shape) < 4) or name.endswith(PACKED)
    )
    if packed:
        raise UserError(_quantised(folder, f"{packed[0]} is {tensors[packed[0]][0]}"))
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    _refuse_ids(folder, config, shapes)
    _refuse_shapes(folder, config, shapes)
    for file in files:
        _refuse_nan(folder, file)


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model: {file} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"model: {file} holds no JSON object")
    return found


# ------------------------------------------------------------------------------------------------ config.json


def _refuse_quantised(folder: Path, settings: Mapping[str, Any]) -> None:
    for part in (settings, settings.get("text_config")):
        for key in QUANTISED:
            if isinstance(part, Mapping) and part.get(key):
                how = part[key].get("quant_method") if isinstance(part[key], Mapping) else None
                raise UserError(_quantised(folder, str(how or key)[:40]))


def _quantised(folder: Path, how: str) -> str:
    return (
        f"model: {folder}: its weights are quantised ({how}), and editing and training need plain ones: give the model "
        "that it was made from, or save it dequantised (transformers: model.dequantize(), then save_pretrained)"
    )


def _config(folder: Path, settings: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = settings.get("model_type")
    if settings.get("auto_map") and kind not in CONFIG_MAPPING:
        raise UserError(
            f"model: {folder}: its architecture {str(kind)[:40]!r} comes as code with the weights (auto_map in "
            "config.json), which is never run here: use a model whose architecture is part of transformers, or a "
            "version of transformers that has this one"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        int(config.get_text_config().num_hidden_layers)
    except Exception as error:  # a stranger's file: configurations check what they are given in many ways
        reason = str(error).strip().splitlines()[:1]
        raise UserError(
            f"model: {folder}: its config.json describes no causal language model: {''.join(reason)}"
        ) from None
    return config


# ------------------------------------------------------------------------------------------------ weights


def _weights(folder: Path) -> list[Path]:
    """The files that hold the weights, as transformers chooses them."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"model: {folder} has no *.safetensors file; save it with save_pretrained(folder) first")
        raise UserError(f"model: {folder} has neither {WEIGHTS} nor {INDEX}; save it with save_pretrained(folder)")
    named = json_object(folder / INDEX).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    if not names:
        raise UserError(f"model: {folder / INDEX} names no file of weights; save the model again by save_pretrained")
    for name in names:
        if name in (".", "..") or Path(name).name != name:
            raise UserError(
                f"model: {folder / INDEX} names weights outside the folder ({name[:80]!r}), which are not read: put "
                "all parts beside it, named without a folder"
            )
        if not (folder / name).is_file():
            raise UserError(f"model: {folder / INDEX} names {name[:80]}, which is not there: copy every part")
    return [folder / name for name in names]


def _headers(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, type, shape) of every tensor. Raises UserError for a damaged file."""
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                part = tensors.get_slice(name)
                yield name, part.get_dtype(), tuple(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise UserError(f"model: {file} is damaged or no safetensors file ({error}); copy it again") from None


def _refuse_shapes(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Tensors whose names the architecture has, in another shape than it gives them."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever an architecture raises on sizes that do not go together
        reason = str(error).strip().splitlines()[:1]
        raise UserError(
            f"model: {folder}: its config.json describes no causal language model: {''.join(reason)}"
        ) from None
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [name for name, shape in shapes.items() if own.get(name, shape) != shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"model: {folder}: its weights do not fit its config.json: {name} is {list(shapes[name])} in the file and "
            f"{list(own[name])} by the configuration; save model and config together with save_pretrained(folder)"
        )


@lru_cache(maxsize=256)
def _nan_in(file: Path, _size: int, _changed: int) -> str | None:
    """The first tensor that holds NaN or infinite numbers; masks (four dimensions) may hold infinite ones."""
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_tensor(name)
            if tensor.is_floating_point() and tensor.dim() < 4 and not bool(torch.isfinite(tensor).all()):
                return str(name)
    return None


def _refuse_nan(folder: Path, file: Path) -> None:
    stat = file.stat()
    if name := _nan_in(file.resolve(), stat.st_size, stat.st_mtime_ns):
        raise UserError(
            f"model: {folder}: {name} in {file.name} holds NaN or infinite numbers (a training that diverged, or a "
            "damaged file): give a checkpoint from before, or copy it again"
        )


# ------------------------------------------------------------------------------------------------ tokenizer


def _refuse_ids(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Token ids that texts, padding or the chat template use, beyond the rows of the embedding."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"model: {folder} holds no tokenizer; save it there with tokenizer.save_pretrained(folder)")
    try:
        tokenizer = tokenizer_of(folder)
        ids: dict[str, int] = tokenizer.get_vocab()
    except Exception as error:  # whatever tokenizers raise on a stranger's files
        reason = str(error).strip().splitlines()[:1]
        raise UserError(f"model: {folder}: its tokenizer cannot be loaded: {''.join(reason)}") from None
    named = [shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS) and len(shape) == 2]
    rows = named[0] if named else int(config.get_text_config().vocab_size)
    beyond = {token: i for token, i in ids.items() if i >= rows and _used(tokenizer, token, i)}
    if beyond:
        token, top = max(beyond.items(), key=lambda item: item[1])
        raise UserError(
            f"model: {folder}: its tokenizer has token {token[:40]!r} with id {top}, its embedding has {rows} rows: "
            f"call model.resize_token_embeddings({top + 1}) and save both, or take the token out (padding may use "
            "the end-of-text token)"
        )


def _used(tokenizer: Any, token: str, i: int) -> bool:
    """Whether a token can occur. Special ones without a role, such as one for images, occur in no text."""
    special: Sequence[int] = tokenizer.all_special_ids
    added = tokenizer.added_tokens_decoder.get(i)
    if i not in special and not getattr(added, "special", False):
        return True
    template = tokenizer.chat_template
    written = template.values() if isinstance(template, dict) else [template or ""]
    return i in [getattr(tokenizer, role) for role in ROLES] or any(token in text for text in written)
