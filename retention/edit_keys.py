"""The keys of an edit: what enters each edited matrix at the subject's last token, where the edit is to take effect.

A key is read in the model that is given, from the bare prompts that an edit is written with; an editor that averages
over prefixes (ROME, MEMIT) writes with a key near it. Knows no editor: any matrix has keys, whoever changed it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from retention.hooks import on_input, undisturbed
from retention.models import is_matrix, is_transposed
from retention.tokens import encode, subject_last
from retention.types import Edit, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROWS = 64  # prompts that are run at once
TOLERANCE = 1e-5  # a direction with less than this share of the longest one's singular value is rounding: float32 keys


def key_modules(model: PreTrainedModel, names: Collection[str]) -> dict[str, nn.Module]:
    """The module of each named parameter that is the matrix of a block's MLP or attention, by parameter name.

    Names are the model's own, without an adapter around it. Embeddings, the head, norms and biases have no keys.
    """
    head = model.get_output_embeddings()
    found = {}
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.").replace(".base_layer", "") + ".weight"
        if name in names and is_matrix(module) and module is not head:
            found[name] = module
    return found


def edit_keys(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, edits: Sequence[Edit], names: Collection[str]
) -> dict[str, Tensor]:
    """Keys [n, in], float32, by parameter name: one row for each edit and each of its prompts, in this order.

    Parameters without keys are left out (see `key_modules`), and so are matrices that a forward does not call. The
    model is left bit-identical. Raises UserError for a subject that has no token.
    """
    modules = key_modules(model, names)
    texts: list[tuple[int, list[int]]] = []  # (subject's last token, ids up to it)
    for edit in edits:
        subject, joint = edit.fact.subject, edit.fact.joint
        for prompt in edit.prompts:
            at = subject_last(tokenizer, prompt, subject, answer=edit.target, joint=joint)
            ids = encode(tokenizer, fill(prompt, subject), edit.target, joint=joint).ids
            texts.append((at, list(ids[: at + 1])))
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(texts), ROWS):
        for name, keys in _keys(model, modules, texts[start : start + ROWS]).items():
            parts.setdefault(name, []).append(keys)
    return {name: torch.cat(found) for name, found in parts.items()}


def _keys(
    model: PreTrainedModel, modules: dict[str, nn.Module], texts: Sequence[tuple[int, list[int]]]
) -> dict[str, Tensor]:
    """What enters each module at the last token of each text [n, in], in one forward."""
    device = next(model.parameters()).device
    ends = torch.tensor([at for at, _ in texts], device=device)
    width = int(ends.max()) + 1
    ids = torch.tensor([row + row[-1:] * (width - len(row)) for _, row in texts], device=device)
    real = torch.arange(width, device=device) <= ends[:, None]
    rows = torch.arange(len(texts), device=device)
    found: dict[str, Tensor] = {}

    def catching(name: str) -> Callable[[Tensor], None]:
        def catch(x: Tensor) -> None:  # some architectures flatten rows and tokens before their MLP
            found[name] = x.reshape(len(texts), width, -1)[rows, ends].float()

        return catch

    with undisturbed(model), torch.no_grad(), ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(on_input(module, catching(name)))
        model(input_ids=ids, attention_mask=real.long(), use_cache=False)
    return found


def key_basis(keys: Tensor) -> Tensor:
    """Orthonormal basis [in, r] of the span of keys [n, in], float32, the strongest direction first.

    r is the number of singular values above TOLERANCE times the largest.
    """
    _, values, directions = torch.linalg.svd(keys.double(), full_matrices=False)
    return directions[values > TOLERANCE * values.max()].T.float()


def output_by_input(matrix: Tensor, module: nn.Module) -> Tensor:
    """A matrix of the module's layout as [out, in], a view: what multiplies a key (GPT-2's Conv1D stores [in, out])."""
    return matrix.T if is_transposed(module) else matrix
