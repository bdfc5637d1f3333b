"""Run rows through a model from the edited layer on: the same numbers as a full forward, at a fraction of the work.

A causal model's states before the subject's last token do not depend on what an edit adds at that token, so their keys
and values are computed once; nor do the states at the input of the edited layer. What is left at every step of an
optimisation is: tokens from the subject's last one on, layers above the edited one. `FullBatch` does it the long way,
for architectures where that cannot be replayed, and as the reference.

Shapes: B rows, S tokens from the subject's last one on, P tokens before it, d the residual stream's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from retention.editors._rows import Row
from retention.hooks import BlockCalls, cache_argument, dry_run, on_input, on_output
from retention.models import Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Site = Literal["mlp", "block"]  # where a value is placed: output of the MLP's second matrix, or of the whole block


class Reads:
    """Which positions of a batch are read, and what for: fixed index tensors."""

    def __init__(self, rows: Sequence[Row], device: torch.device, origin: Sequence[int]) -> None:
        """origin: what to subtract from positions in each row (0, or the row's first computed token)."""
        target = [(b, p - origin[b], token) for b, row in enumerate(rows) for p, token in row.targets]
        keep = [(b, p - origin[b]) for b, row in enumerate(rows) for p in row.keep]
        self.row = torch.tensor([r for r, *_ in target] + [r for r, _ in keep], device=device)
        self.position = torch.tensor([p for _, p, _ in target] + [p for _, p in keep], device=device)
        self.token = torch.tensor([t for *_, t in target], dtype=torch.long, device=device)
        self.n_targets = len(target)


class FullBatch:
    """Whole rows through the model's own forward, with the value placed by a hook."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row], layer: int, site: Site) -> None:
        self.model, self.anatomy, self.rows, self.layer, self.site = model, anatomy, list(rows), layer, site
        self.module = _site_module(model, anatomy, layer, site)
        device = next(model.parameters()).device
        self.ids, self.mask = padded([row.ids for row in rows], device)
        self.at = torch.tensor([row.at for row in rows], device=device)
        self.index = torch.arange(len(rows), device=device)
        self.reads = Reads(rows, device, [0] * len(rows))

    def read(self, delta: Tensor) -> Tensor:
        """Logits at the read positions [reads, vocabulary] with delta [B, d] added at each row's subject."""

        def add(output: Tensor) -> Tensor:
            shaped = output.reshape(len(self.rows), self.ids.shape[1], -1).clone()
            shaped[self.index, self.at] += delta
            return shaped.view(output.shape)

        with on_output(self.module, add):
            out = self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        return out[self.reads.row, self.reads.position]

    def logits(self, read: Tensor) -> Tensor:
        """Logits of some of what `read` gave."""
        return read

    def select(self, rows: Sequence[int]) -> FullBatch:
        """The same with only some of the rows."""
        return FullBatch(self.model, self.anatomy, [self.rows[i] for i in rows], self.layer, self.site)


class FastBatch:
    """Tokens from each row's subject on, layers above the edited one, the head at read positions only."""

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row], layer: int, site: Site, states: States
    ) -> None:
        self.model, self.anatomy, self.rows, self.layer, self.site = model, anatomy, list(rows), layer, site
        self.states = states
        self.blocks = anatomy.blocks(model)
        # A norm between the MLP's output and the residual stream has to be gone through: from the block's input.
        self.through_block = site == "mlp" and not anatomy.additive
        self.calls = self._calls(states.suffix.shape[1])
        self.one = self._calls(1) if self.through_block else None
        self.reads = Reads(rows, states.suffix.device, [row.at for row in rows])

    def _calls(self, tokens: int) -> BlockCalls:
        """How the model would call its blocks on the first `tokens` tokens of the suffixes, the prefixes cached."""
        states = self.states
        mask = torch.cat([states.prefix_mask, torch.ones_like(states.ids[:, :tokens])], dim=1)
        with torch.no_grad(), dry_run(self.blocks, tuples=self.anatomy.tuples) as calls:
            self.model.base_model(
                input_ids=states.ids[:, :tokens],
                attention_mask=mask,
                position_ids=states.positions[:, :tokens],
                use_cache=True,
                **cache_argument(states.cache()),
            )
        return calls

    def hidden(self, delta: Tensor) -> Tensor:
        """Outputs of the last block [B, S, d] with delta [B, d] added at each row's subject."""
        suffix = self.states.suffix
        if self.one is None:
            start = suffix[:, :1] + delta[:, None]
        else:
            down = self.anatomy.down_module(self.model, self.layer)
            with on_output(down, lambda output: output + delta.view(output.shape)):
                start = self.one.run(self.states.entry, self.layer, self.layer + 1)
        return self.calls.run(torch.cat([start, suffix[:, 1:]], dim=1), self.layer + 1, self.anatomy.layers)

    def read(self, delta: Tensor) -> Tensor:
        """The last block's outputs at the read positions [reads, d] with delta [B, d] added at each row's subject."""
        return self.hidden(delta)[self.reads.row, self.reads.position]

    def logits(self, read: Tensor) -> Tensor:
        """Logits of some of what `read` gave."""
        return self.anatomy.logits(self.model, read)

    @torch.no_grad()
    def agrees(self, final: Tensor) -> bool:
        """Whether replaying with nothing added gives back the plain forward's states at the read positions."""
        index = self.reads.row, self.reads.position
        expected = final[index]
        found = self.hidden(torch.zeros_like(self.states.value))[index]
        return bool((found - expected).norm() <= 1e-3 * expected.norm())

    def select(self, rows: Sequence[int]) -> FastBatch:
        """The same with only some of the rows."""
        index = torch.tensor(rows, device=self.states.suffix.device)
        chosen = [self.rows[i] for i in rows]
        return FastBatch(self.model, self.anatomy, chosen, self.layer, self.site, self.states.select(index))


class States:
    """What one plain forward leaves behind for FastBatch."""

    suffix: Tensor  # [B, S, d] outputs of the edited block from the subject's last token on
    entry: Tensor  # [B, 1, d] inputs of the edited block at the subject's last token
    value: Tensor  # [B, d] what the site gave at the subject's last token
    key: Tensor  # [B, m] what entered the MLP's second matrix there
    ids: Tensor  # [B, S]
    positions: Tensor  # [B, S]
    prefix_mask: Tensor  # [B, P] 1 where there is a token: prefixes are aligned to the right
    keys: dict[int, tuple[Tensor, Tensor]]  # layer -> prefix keys and values [B, heads, P, head size]

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Row], layer: int, site: Site, *, keys: bool
    ) -> tuple[States, Tensor]:
        """One forward of whole rows, without the head. Also the last block's outputs [B, S, d].

        keys: keep the prefixes' keys and values, which a replay needs.
        """
        from transformers import DynamicCache

        self = cls()
        device = next(model.parameters()).device
        ids, mask = padded([row.ids for row in rows], device)
        at = torch.tensor([row.at for row in rows], device=device)
        rest = max(len(row.ids) - row.at for row in rows)
        before = int(at.max())
        index = (at[:, None] + torch.arange(rest, device=device)).clamp(max=ids.shape[1] - 1)
        each = torch.arange(len(rows), device=device)
        blocks, cache = anatomy.blocks(model), DynamicCache() if keys else None
        final: list[Tensor] = []

        # What is needed is copied out at once: some models add to a module's output in place afterwards.
        def entry(states: Tensor) -> None:
            self.entry = states[each, at][:, None]

        def block(states: Tensor) -> None:
            self.suffix = states[each[:, None], index]

        def value(states: Tensor) -> None:
            self.value = states.reshape(*ids.shape, -1)[each, at]

        def entering(states: Tensor) -> None:
            self.key = states.reshape(*ids.shape, -1)[each, at]

        with (
            on_input(blocks[layer], entry),
            on_output(blocks[layer], block),
            on_output(_site_module(model, anatomy, layer, site), value),
            on_input(anatomy.down_module(model, layer), entering),
            on_output(blocks[-1], lambda states: final.append(states[each[:, None], index])),
        ):
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=keys, **cache_argument(cache))
        self.ids, self.positions = ids.gather(1, index), index
        shifted = torch.arange(before, device=device) - before + at[:, None]  # position of each prefix slot, < 0: none
        self.prefix_mask = (shifted >= 0).long()
        shifted = shifted.clamp(min=0)
        self.keys = {}
        held: Any
        # Fewer layers than the model has where it keeps no keys and values: then nothing can be replayed.
        for i, held in enumerate(cache.layers if cache is not None else ()):
            if i < layer:
                continue
            self.keys[i] = (_take(held.keys, shifted), _take(held.values, shifted))
        return self, final[0]

    def select(self, rows: Tensor) -> States:
        new = States()
        for name in ("suffix", "entry", "value", "key", "ids", "positions", "prefix_mask"):
            setattr(new, name, getattr(self, name)[rows])
        new.keys = {layer: (k[rows], v[rows]) for layer, (k, v) in self.keys.items()}
        return new

    def cache(self) -> Any:
        """The prefixes as a transformers cache that does not grow."""
        from transformers.cache_utils import Cache

        lowest = min(self.keys)
        # Layers below the edited one are never run; the model asks them for their length only.
        return Cache(layers=[_prefix_layer(*self.keys[max(i, lowest)]) for i in range(max(self.keys) + 1)])


def _prefix_layer(keys: Tensor, values: Tensor) -> Any:
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    layer = PrefixLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _take(states: Tensor, index: Tensor) -> Tensor:
    """states [B, heads, tokens, size] at index [B, P] along the tokens."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def _site_module(model: nn.Module, anatomy: Anatomy, layer: int, site: Site) -> nn.Module:
    return anatomy.down_module(model, layer) if site == "mlp" else anatomy.blocks(model)[layer]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, tokens], padded on the right with id 0: causal models never see it from the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
