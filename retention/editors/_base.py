"""What every weight editor shares: post-processing, presets, leaving the model as it was.

Knows no editing method.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field

from retention.editors.prune import Prune
from retention.editors.rect import Rect
from retention.models import max_positions
from retention.presets import settle
from retention.tokens import encode
from retention.types import Edit, EditResult, Part, UserError, fill

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from retention.estimate import Shape

Postprocessor = Annotated[Rect | Prune, Field(discriminator="name")]


class WeightEditor(Part, ABC):
    """An editor whose result is a change of weights. A method defines `write`; callers use `edit`."""

    rank_one_per_edit: ClassVar[bool] = False  # each update is a LowRank with one term per edit, in order

    carries_state: ClassVar[bool] = False  # `write` takes and gives a state between batches

    open: ClassVar[frozenset[str]] = frozenset()  # settings that a preset must give where the user does not
    alternatives: ClassVar[frozenset[str]] = frozenset()  # of these one is given, by the user or by a preset

    single_mlps: ClassVar[bool] = False  # it needs a single second matrix of each MLP: no mixture of experts

    postprocess: tuple[Postprocessor, ...] = ()  # applied to the update in order, e.g. [{name: rect, keep: 0.4}]

    @property
    def preset(self) -> str:
        """Name of the section that holds its settings in a preset."""
        name: str = self.name  # type: ignore[attr-defined]
        return name

    @property
    def label(self) -> str:
        """Name in tables: the treatment, where settings make it another one than the bare method."""
        name: str = self.name  # type: ignore[attr-defined]
        return "+".join([name, *(part.name for part in self.postprocess)])

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        edits: Sequence[Edit],
        *,
        seed: int,
        corpus: Sequence[str] = (),
        cache: Path | None = None,
        state: Any = None,
    ) -> EditResult:
        """Write the edits and hand back what they add to the weights; the model is left bit for bit as it was.

        Settings that were not given are those of the model's preset (retention/presets).
        state: `EditResult.state` of the batch before, when batches are written one after another into one model.
        """
        start = time.perf_counter()
        own = settle(self, model.config)
        check_lengths(model, tokenizer, edits)
        carried = {"state": state} if self.carries_state else {}
        with preserved(model, seed):
            result = own.write(model, tokenizer, edits, seed=seed, corpus=corpus, cache=cache, **carried)
        delta = result.delta
        for part in self.postprocess:
            delta = part.process(model, delta, rank_one_per_edit=self.rank_one_per_edit and delta is result.delta)
        return replace(result, delta=delta, seconds=time.perf_counter() - start)

    def trained(self, shape: Shape) -> int:
        """Numbers of a model of this shape that are trained while edits are written (0: a v* alone). For estimates."""
        return 0

    @abstractmethod
    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        edits: Sequence[Edit],
        *,
        seed: int,
        corpus: Sequence[str],
        cache: Path | None,
    ) -> EditResult:
        """The method itself. Called in eval mode, with no parameter requiring a gradient and the RNG seeded.

        Parameters that it changes in place it restores by copy; flags, modes and RNG states are restored for it.
        """


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, edits: Sequence[Edit], before: int = 0
) -> None:
    """Raise UserError for an edit that is longer than the model's positions, with `before` tokens in front of it."""
    limit = max_positions(model)
    if limit is None:
        return
    for edit in edits:
        for prompt in edit.prompts:
            text = fill(prompt, edit.fact.subject)
            tokens = before + len(encode(tokenizer, text, edit.target, joint=edit.fact.joint).ids)
            if tokens > limit:
                raise UserError(
                    f"the edit {edit.fact.id} has {tokens} tokens"
                    f"{f' with {before} in front of it' if before else ''}; the model has {limit} positions"
                )


@contextmanager
def preserved(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode, float32, nothing requiring a gradient, RNG seeded; on leaving, all as it was, weights to the bit.

    Half-precision weights stand aside while float32 ones take their place: rounding would move v* by more than an edit.
    """
    low = (torch.bfloat16, torch.float16)
    halves = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype in low]
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        try:
            for tensor, half in halves:
                tensor.data = half.float()
            yield
        finally:
            for tensor, half in halves:
                tensor.data = half
            for parameter, required in flags:
                parameter.requires_grad_(required)
            for module, training in modes:
                module.training = training
