"""Load a causal language model, and say where it keeps its blocks, its MLPs and their second matrices.

Knows no architecture by name: places are found by running one block and watching which of its matrices are used when.
Knows nothing about facts or edits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from retention.explain import nearest
from retention.hooks import BlockCalls, StopForward, first, on_input, on_output, recording, stopped, undisturbed
from retention.model_checks import check_folder
from retention.model_folder import content_hash, resolve, tokenizer_of
from retention.types import Part, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ------------------------------------------------------------------------------------------------------ loading


class HubModel(Part):
    """A causal language model in a folder, a GGUF file or on the Hub. Never runs code that comes with the weights."""

    name: str = Field(
        description="a folder, a GGUF file, a name on the Hub such as openai-community/gpt2, or smollm2 or gemma3 "
        "(by `retention fetch`)"
    )
    revision: str | None = Field(default=None, description="commit, tag or branch on the Hub; None is its main branch")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="the weights are rounded to it, then held in float32 while they are worked on"
    )


@dataclass(frozen=True)
class Loaded:
    """A model in memory, float32 and in evaluation mode, with what identifies it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    content: str  # hash of weights, config and tokenizer files, and of dtype where it is not float32
    corpus: tuple[str, ...] = ()  # lines of corpus.txt, where the folder has one: texts it was pretrained on
    folder: Path | None = None
    dtype: str = "float32"  # what the weights were rounded to


def load_model(
    name: str | Path, revision: str | None = None, dtype: str = "float32", device: str | torch.device | None = None
) -> Loaded:
    """Load from a folder or the Hub, from safetensors only, float32 in memory whatever `dtype`.

    Raises UserError if there is no such folder, if it holds no causal language model, or if its tokenizer gives no
    character offsets.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: unknown {dtype!r}{nearest(dtype, DTYPES)}")
    folder = resolve(name, revision)
    check_folder(folder)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = tokenizer_of(folder)
        both: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model: {folder} does not hold a causal language model that can be loaded: {reason}"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model, told = both
    if missing := sorted(told["missing_keys"]):  # transformers would go on with random numbers in their place
        raise UserError(
            f"model: {folder}: its weights do not fit its config.json: {len(missing)} parameters are not in the file, "
            f"{missing[0]} among them; save model and config together with save_pretrained(folder)"
        )
    if len(tokenizer) == 0:
        raise UserError(f"model: {folder} holds no tokenizer; save it there with tokenizer.save_pretrained(folder)")
    if not tokenizer.is_fast:
        raise UserError(f"model: {folder} has no fast tokenizer (tokenizer.json), and places in a text need one")
    if any(not bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise UserError(f"model: {folder}: weights are too large for {dtype}; use dtype: bfloat16 or float32")
    model = model.float().to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    content = content_hash(folder)
    if dtype != "float32":
        content = hashlib.sha256(f"{content} {dtype}".encode()).hexdigest()
    corpus = folder / "corpus.txt"
    text = corpus.read_text(encoding="utf-8") if corpus.is_file() else ""
    lines = text.removesuffix("\n").split("\n") if text else []  # not splitlines(): a passage may hold U+2028
    return Loaded(model, tokenizer, content, tuple(lines), folder, dtype)  # type: ignore[arg-type]  # is_fast was checked


# ------------------------------------------------------------------------------------------------------ anatomy


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where a model keeps what editors and adapters touch. Patterns hold `{}` for the layer's index, from 0."""

    layers: int
    hidden: int  # width d of the residual stream
    mlp_width: int  # width of the keys: inputs of the second matrix
    block: str  # e.g. model.layers.{}
    attention: str
    mlp: str  # the module whose output is the MLP's (the second matrix itself where the block has no MLP module)
    down: str  # the MLP's second matrix, a module
    attention_projections: tuple[str, ...]  # names of the matrices, relative to the block
    mlp_projections: tuple[str, ...]
    final_norm: str | None
    project_out: str | None  # a matrix between the final norm and the head (OPT-350m)
    head: str
    transposed: bool  # the second matrix is stored [in, out] (Conv1D), not [out, in] (Linear)
    uniform: bool  # all blocks have the same matrices: no other kind of attention in some of them
    parallel: bool  # the MLP reads the block's input, not attention's output
    additive: bool  # the block adds the MLP's output to the residual stream as it is, without a norm after it
    tuples: bool  # blocks return tuples
    logit_softcap: float | None  # logits = cap * tanh(logits / cap)
    logit_scale: float  # logits are multiplied by it
    mixture: str | None = None  # why it has no single second matrix: `down` is then the experts' module

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(self.block.format(layer)) for layer in range(self.layers)]

    def down_module(self, model: nn.Module, layer: int) -> nn.Module:
        """The MLP's second matrix. Raises UserError for a layer that is not there, and for a mixture of experts."""
        self.check(layer)
        if self.mixture is not None:
            raise UserError(self.mixture)
        return model.get_submodule(self.down.format(layer))

    def check(self, layer: int) -> int:
        """The layer, if the model has it. Raises UserError otherwise."""
        if not 0 <= layer < self.layers:
            raise UserError(f"layer {layer} is out of range: this model has layers 0 to {self.layers - 1}")
        return layer

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of outputs [..., d] of the last block: final norm, head, scale and soft cap."""
        for name in (self.final_norm, self.project_out, self.head):
            if name is not None:
                hidden = model.get_submodule(name)(hidden)
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        return hidden if self.logit_softcap is None else torch.tanh(hidden / self.logit_softcap) * self.logit_softcap


def is_matrix(module: nn.Module) -> bool:
    """A plain matrix product: Linear or its like ([out, in]), or Conv1D ([in, out])."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Stored as [in, out]. Told from the type, since a square matrix does not tell by its shape."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the places by running the first block on two tokens.

    The block's last matrix in order of use is the MLP's second one, its first belongs to attention; of a mixture of
    experts only attention's matrices are told. Raises UserError for blocks that have no such matrices, with the reason.
    """
    config = model.config.get_text_config()
    path, blocks = _find_blocks(model, config)
    experts = _experts(blocks)
    with undisturbed(model), torch.no_grad():
        first_call = _first_call(model, blocks)
        if experts is not None:
            return _examine_mixture(model, config, path, blocks, *first_call, experts)
        return _examine(model, config, path, blocks, *first_call)


def single_mlps(model: PreTrainedModel) -> Anatomy:
    """The places, for what needs a single second matrix of each MLP. Raises UserError for a mixture of experts."""
    refuse_mixture(model)
    return anatomy(model)


def refuse_mixture(model: PreTrainedModel) -> None:
    """Raises UserError for a mixture of experts; also for a model without values."""
    config = model.config.get_text_config()
    _, blocks = _find_blocks(model, config)
    if (experts := _experts(blocks)) is not None:
        raise UserError(_no_single_matrix(experts, config))


def last_mlp(model: PreTrainedModel) -> nn.Module:
    """The last block's MLP, or its second matrix where the block has no MLP module (OPT); an adapter may be in it.

    Told from the order in which a block's parts are registered, not tried out: for architectures that are tested.
    """
    _, blocks = _find_blocks(model, model.config.get_text_config())
    return [part for part in blocks[-1].children() if any(p.ndim == 2 for p in part.parameters())][-1]


def _find_blocks(model: nn.Module, config: Any) -> tuple[str, list[nn.Module]]:
    found = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and not any(part in name for part in ("vision", "audio", "experts"))
        and all(any(is_matrix(leaf) for leaf in block.modules()) for block in module)
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__}: found no list of {config.num_hidden_layers} transformer blocks to edit"
        )
    return min(found, key=lambda item: item[0].count("."))


def _experts(blocks: list[nn.Module]) -> str | None:
    """The part of a block that is a mixture of experts, by its name in the block; None where no block has one."""
    for block in blocks:
        for name, module in block.named_modules():
            kind = type(module).__name__.lower()
            if isinstance(module, nn.ModuleList) or "expert" in name.lower() or "expert" in kind or "moe" in kind:
                return name.split(".")[0]
    return None


def _no_single_matrix(part: str, config: Any) -> str:
    return (
        f"the blocks' {part!r} is a mixture of experts: there is no single matrix that a fact's MLP output comes from, "
        f"so {config.model_type!r} models cannot be edited by locate-then-edit; use ft, lora with targets attention, "
        "freeze_tuning or identity"
    )


def _first_call(model: PreTrainedModel, blocks: list[nn.Module]) -> tuple[BlockCalls, Tensor]:
    """How the model calls its first block on two tokens, and the hidden states that it hands it."""
    states: list[Tensor] = []
    ids = torch.tensor([[1, 2]], device=next(model.parameters()).device)
    with recording(blocks) as calls, on_input(blocks[0], states.append), stopped():

        def stop(_output: Tensor) -> None:
            raise StopForward

        with on_output(blocks[0], stop):
            model(input_ids=ids, use_cache=False)
    # Noise instead of embeddings: a fresh model's embeddings are so small that differences drown in rounding.
    noise = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(0))
    return calls, noise.to(states[0])


def _examine(
    model: PreTrainedModel, config: Any, path: str, blocks: list[nn.Module], calls: BlockCalls, hidden: Tensor
) -> Anatomy:
    block, width = blocks[0], config.hidden_size
    matrices = {module: name for name, module in block.named_modules() if is_matrix(module)}
    order: list[str] = []
    with _Uses(matrices, order):
        plain = block(hidden, *calls.args[0], **calls.kwargs[0])
    if len(order) < 3:
        raise UserError(f"{type(model).__name__}: a block uses {len(order)} matrices; expected attention and an MLP")
    attention, down = order[0].rsplit(".", 1)[0], order[-1]
    in_attention = [name for name in order if name.startswith(attention + ".")]
    in_mlp = [name for name in order if name not in in_attention]
    mlp = down.rsplit(".", 1)[0] if "." in down else down
    second = block.get_submodule(down)
    shape = _weight(second).shape
    rows, columns = shape[::-1] if is_transposed(second) else shape
    if down in in_attention or rows != width or len(in_mlp) < 2 or len(set(order)) != len(order):
        raise UserError(
            f"{type(model).__name__}: found no single second matrix of the MLP (last used: {down}, {columns} to {rows} "
            f"with a residual stream of {width}), so this model cannot be edited by locate-then-edit"
        )
    for layer, other in enumerate(blocks):
        leaf = dict(other.named_modules()).get(down)
        if leaf is None or type(leaf) is not type(second) or _weight(leaf).shape != shape:
            raise UserError(f"{type(model).__name__}: block {layer} differs from block 0: it has no matrix {down!r}")

    noise = torch.randn(plain_shape := first(plain).shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    keys: list[Tensor] = []
    with on_input(second, keys.append):
        block(hidden, *calls.args[0], **calls.kwargs[0])
        with on_output(block.get_submodule(in_attention[-1]), lambda out: out + noise.view_as(out)):
            block(hidden, *calls.args[0], **calls.kwargs[0])
    with on_output(second, lambda out: out + noise.view_as(out)):
        moved = first(block(hidden, *calls.args[0], **calls.kwargs[0])) - first(plain)
    assert plain_shape[-1] == width

    return Anatomy(
        layers=len(blocks),
        hidden=width,
        mlp_width=columns,
        block=f"{path}.{{}}",
        attention=f"{path}.{{}}.{attention}",
        mlp=f"{path}.{{}}.{mlp}",
        down=f"{path}.{{}}.{down}",
        attention_projections=tuple(in_attention),
        mlp_projections=tuple(in_mlp),
        transposed=is_transposed(second),
        uniform=_uniform(blocks, order),
        parallel=torch.equal(keys[0], keys[1]),
        additive=torch.allclose(moved, noise, rtol=1e-3, atol=1e-3),
        tuples=isinstance(plain, (tuple, list)),
        **_outputs(model, config, path),
    )


def _examine_mixture(
    model: PreTrainedModel,
    config: Any,
    path: str,
    blocks: list[nn.Module],
    calls: BlockCalls,
    hidden: Tensor,
    experts: str,
) -> Anatomy:
    """Attention's matrices, and where the experts are; nothing that depends on a single second matrix."""
    block = blocks[0]
    matrices = {m: n for n, m in block.named_modules() if is_matrix(m) and n.split(".")[0] != experts}
    order: list[str] = []
    with _Uses(matrices, order):
        plain = block(hidden, *calls.args[0], **calls.kwargs[0])
    if not order:
        raise UserError(f"{type(model).__name__}: a block uses no matrix besides its experts; expected attention")
    where = f"{path}.{{}}.{experts}"
    return Anatomy(
        layers=len(blocks),
        hidden=config.hidden_size,
        mlp_width=0,
        block=f"{path}.{{}}",
        attention=f"{path}.{{}}.{order[0].rpartition('.')[0]}",
        mlp=where,
        down=where,
        attention_projections=tuple(dict.fromkeys(order)),
        mlp_projections=(),
        transposed=False,
        uniform=_uniform(blocks, [n for n, m in block.named_modules() if is_matrix(m)]),
        parallel=False,
        additive=False,
        tuples=isinstance(plain, (tuple, list)),
        mixture=_no_single_matrix(experts, config),
        **_outputs(model, config, path),
    )


def _uniform(blocks: list[nn.Module], names: list[str]) -> bool:
    return all({n for n, m in other.named_modules() if is_matrix(m)} == set(names) for other in blocks)


def _outputs(model: PreTrainedModel, config: Any, path: str) -> dict[str, Any]:
    """What comes after the blocks, as fields of Anatomy."""
    head, width = model.get_output_embeddings(), config.hidden_size
    names = {module: name for name, module in model.named_modules()}
    owner = model.get_submodule(path.rpartition(".")[0])
    norm = [
        n
        for n, m in owner.named_children()
        if "norm" in type(m).__name__.lower() and all(p.shape == (width,) for p in m.parameters())
    ]
    out = [n for n, m in owner.named_children() if is_matrix(m) and m is not head and m.in_features == width]
    prefix = names[owner] + "." if names[owner] else ""
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return {
        "final_norm": prefix + norm[-1] if norm else None,
        "project_out": prefix + out[-1] if out else None,
        "head": names[head],
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": float(scale),
    }


class _Uses:
    """Note the names of matrices in the order in which they are used."""

    def __init__(self, matrices: dict[nn.Module, str], order: list[str]) -> None:
        self.matrices, self.order = matrices, order

    def __enter__(self) -> None:
        self.handles = [
            module.register_forward_hook(lambda _m, _a, _o, name=name: self.order.append(name))
            for module, name in self.matrices.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a text may have; None where the architecture has no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def down_parameter(model: PreTrainedModel, layer: int) -> tuple[str, nn.Parameter]:
    """Name and parameter of the MLP's second matrix in a layer; of a mixture of experts that of all its experts.

    Raises UserError for a layer that is not there, and for experts that are not held in one tensor.
    """
    places = anatomy(model)
    places.check(layer)
    if places.mixture is None:
        return f"{places.down.format(layer)}.weight", _weight(places.down_module(model, layer))
    within = places.down.format(layer)
    # Registered in order of use: gate and up (or both in one), then the second matrices [experts, ., .].
    stacked = [(n, p) for n, p in model.get_submodule(within).named_parameters(prefix=within) if p.ndim == 3]
    if not stacked:
        raise UserError(f"{within}: its experts are not held in one tensor, so no single one can be trained")
    return stacked[-1]
