"""v* by replay equals v* by whole forwards and by an independent plain loop, whatever else is in the batch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from facts import EDITS, FINAL_SUBJECT, OTHER_ANCHORS, PREFIXES, THREE_TOKENS
from torch import Tensor

from retention import estimate
from retention.editors import _values
from retention.editors._base import preserved
from retention.editors._values import Values, ValueSettings, target_values
from retention.hooks import on_output
from retention.models import Loaded, anatomy
from retention.types import Edit, UserError, fill

SETTINGS = ValueSettings(steps=5, lr=0.2, weight_decay=0.3, clamp=1.5, kl_factor=0.5)


def find(loaded: Loaded, edits: list[Edit] = EDITS, site: Any = "mlp", **settings: Any) -> Values:
    given = {"layer": 1, "settings": SETTINGS, "prefixes": PREFIXES, **settings}
    with preserved(loaded.model, 0):
        return target_values(loaded.model, loaded.tokenizer, edits, site=site, **given)


def difference(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("site", ["mlp", "block"])
def test_replay_equals_whole_forwards(loaded: Loaded, site: str) -> None:
    quick, whole = find(loaded, site=site), find(loaded, site=site, fast=False)
    assert quick.fast
    assert not whole.fast
    assert difference(quick.value, whole.value) < 1e-5
    assert torch.allclose(quick.initial, whole.initial, rtol=1e-5, atol=1e-6)
    for a, b in zip(quick.diagnostics, whole.diagnostics, strict=True):
        assert a.pop("fact_id") == b.pop("fact_id")
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("name", sorted(tiny.OTHERS))
def test_architectures_that_were_not_thought_of(name: str) -> None:
    """They are replayed exactly, or taken by whole forwards where their blocks cannot be."""
    model, tokenizer = tiny.build(name)
    loaded = Loaded(model, tokenizer, "")
    for site in ("mlp", "block"):
        quick, whole = find(loaded, site=site), find(loaded, site=site, fast=False)
        assert quick.fast == (name not in ("gpt1", "recurrent_gemma"))
        assert difference(quick.value, whole.value) < 1e-5
        for found, expected in ((quick.mean_key, whole.mean_key), (quick.bare_key, whole.bare_key)):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def plain(loaded: Loaded, edit: Edit, site: str, cfg: ValueSettings, layer: int = 1) -> tuple[Tensor, float]:
    """One edit by the published loss, from texts, with torch's Adam; nothing of our engine but the module's place."""
    model, tokenizer = loaded.model, loaded.tokenizer
    parts, subject = anatomy(model), edit.fact.subject
    module = model.get_submodule((parts.down if site == "mlp" else parts.block).format(layer))
    target = tokenizer(edit.target, add_special_tokens=False)["input_ids"]
    rows = [prefix + fill(edit.prompts[0], subject) for prefix in ("", *PREFIXES)]
    rows += [fill(prompt, subject) for prompt in edit.prompts[1:]]
    delta = torch.zeros(32, requires_grad=True)
    start: list[Tensor] = []
    kept: dict[str, Tensor] = {}

    def logp(text: str, extra: list[int]) -> Tensor:
        ids = tokenizer(text)["input_ids"] + extra
        # The subject's last word occurs once in these texts.
        at = ids.index(tokenizer(subject, add_special_tokens=False)["input_ids"][-1])

        def add(out: Tensor) -> Tensor:
            flat = out.reshape(len(ids), -1)
            if not start:
                start.append(flat[at].detach().clone())
            moved = flat.clone()
            moved[at] = moved[at] + delta
            return moved.view(out.shape)

        with on_output(module, add):
            out = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        return out[at] if text.endswith(" is a") else out

    optimizer = torch.optim.Adam([delta], lr=cfg.lr)
    for step in range(cfg.steps):
        loss = torch.zeros(())
        for text in rows:
            out = logp(text, target[:-1])[-len(target) :]
            loss = loss - out[torch.arange(len(target)), target].mean() / len(rows)
        for anchor in edit.anchors:
            out = logp(fill(anchor, subject), [])
            out = out if out.dim() == 1 else out[-1]
            before = kept.setdefault(anchor, out.detach())
            loss = loss + cfg.kl_factor * (out.exp() * (out - before)).sum() / len(edit.anchors)
        loss = loss + cfg.weight_decay * delta.norm() / start[0].norm() ** 2
        if loss < cfg.stop or step == cfg.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta.mul_(min(1.0, float(cfg.clamp * start[0].norm() / delta.detach().norm())))
    return (start[0] + delta).detach(), float(loss.detach())


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "falcon"])
def test_equals_a_plain_loop_over_one_edit_at_a_time(tiny_model: Any, name: str, site: str) -> None:
    loaded = tiny_model(name)
    found = find(loaded, site=site)
    with preserved(loaded.model, 0):
        for i, edit in enumerate(EDITS):
            value, loss = plain(loaded, edit, site, SETTINGS)
            assert difference(found.value[i : i + 1], value[None]) < 1e-4
            assert found.diagnostics[i]["final_loss"] == pytest.approx(loss, rel=1e-3)


def test_the_first_and_the_last_layer(tiny_model: Any) -> None:
    loaded = tiny_model("llama")
    # At the last layer a value moves its own token's prediction only: an edit that is not asked there has no gradient.
    for layer, edits in ((0, EDITS), (3, [FINAL_SUBJECT])):
        for site in ("mlp", "block"):
            quick = find(loaded, edits, site=site, layer=layer)
            assert quick.fast
            assert difference(quick.value, find(loaded, edits, site=site, layer=layer, fast=False).value) < 1e-5


def test_finished_edits_leave_and_do_not_move_the_others(tiny_model: Any) -> None:
    loaded = tiny_model("llama")
    # Losses that cross the bound at different steps, one of them never.
    settings = ValueSettings(steps=20, lr=0.5, weight_decay=0.01, clamp=20.0, kl_factor=0.0, stop=3.0)
    together = find(loaded, settings=settings)
    steps = [entry["steps"] for entry in together.diagnostics]
    assert len(set(steps)) > 1
    for i, edit in enumerate(EDITS):
        alone = find(loaded, [edit], settings=settings)
        assert alone.diagnostics[0]["steps"] == steps[i]
        assert difference(alone.value, together.value[i : i + 1]) < 1e-4
        if steps[i] < 20:
            assert alone.diagnostics[0]["final_loss"] < 3.0


@pytest.mark.parametrize("name", ["gpt2", "gptj", "opt", "llama", "gemma3", "falcon", "falcon_alibi"])
def test_neither_the_budget_nor_the_padding_side_nor_the_past_matters(tiny_model: Any, name: str) -> None:
    loaded = tiny_model(name)
    expected = find(loaded)
    few = replace(SETTINGS, tokens_per_batch=20)
    assert difference(find(loaded, settings=few).value, expected.value) < 1e-5
    left = Loaded(loaded.model, tiny.tokenizer(padding_side="left"), "")
    assert torch.equal(find(left).value, expected.value)
    backwards = find(loaded, EDITS[::-1]).value.flip(0)
    assert difference(backwards, expected.value) < 1e-5
    assert torch.equal(find(loaded).value, expected.value)


def test_clamp_and_norms_are_reported(tiny_model: Any) -> None:
    settings = ValueSettings(steps=10, lr=1.0, weight_decay=0.0, clamp=0.25, kl_factor=0.0)
    found = find(tiny_model("gpt2"), settings=settings)
    for i, entry in enumerate(found.diagnostics):
        assert entry["relative_delta"] == pytest.approx(0.25, rel=1e-4)
        norm = (found.value[i] - found.initial[i]).norm() / found.initial[i].norm()
        assert entry["relative_delta"] == pytest.approx(float(norm), rel=1e-5)


def test_more_weight_on_anchors_keeps_them_closer(tiny_model: Any) -> None:
    loaded = tiny_model("llama")

    def moved(kl_factor: float) -> float:
        settings = ValueSettings(steps=10, lr=0.3, weight_decay=0.0, clamp=4.0, kl_factor=kl_factor)
        found = find(loaded, [OTHER_ANCHORS], site="block", settings=settings, prefixes=())
        delta = found.value[0] - found.initial[0]
        ids = torch.tensor([loaded.tokenizer("Emil Vogel plays the")["input_ids"]])

        def add(out: Tensor) -> Tensor:
            out = out.clone()
            out[0, 2] += delta
            return out

        with torch.no_grad():
            before = loaded.model(ids).logits[0, -1].log_softmax(-1)
            with on_output(loaded.model.model.layers[1], add):
                after = loaded.model(ids).logits[0, -1].log_softmax(-1)
        return float((after.exp() * (after - before)).sum())

    assert moved(20.0) < 0.5 * moved(0.0)


def test_a_replay_that_would_be_wrong_is_not_used(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that depend on more than their call shows: here, on how often they were called."""
    loaded = tiny_model("llama")
    expected = find(loaded, fast=False)
    monkeypatch.setattr(_values.FastBatch, "agrees", lambda *_: False)
    found = find(loaded)
    assert not found.fast
    assert torch.equal(found.value, expected.value)


def sizes_of_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that every later search appends the sizes of its groups of edits to."""
    optimise, sizes = _values._optimise, []

    def counted(model: Any, places: Any, rows: Any, first: int, count: int, *rest: Any) -> Any:
        sizes.append(count)
        return optimise(model, places, rows, first, count, *rest)

    monkeypatch.setattr(_values, "_optimise", counted)
    return sizes


def test_free_memory_moves_no_number(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page cache of other programs takes free pages away: groups, and so v*, stay what they were."""
    loaded = tiny_model("llama")
    sizes, found = sizes_of_groups(monkeypatch), []
    for pages in (1, 2**20):
        monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}.__getitem__)
        monkeypatch.setattr(_values, "available_memory", lambda device, pages=pages: 2**30 + pages, raising=False)
        found.append(find(loaded))
    assert sizes == [len(EDITS)] * 2
    assert torch.equal(found[0].value, found[1].value)
    assert found[0].tokens_per_batch == found[1].tokens_per_batch


def test_the_budget_is_of_the_model_and_the_settings(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    assert find(loaded).tokens_per_batch == estimate.CPU_TOKENS  # so small a model's tokens are cheap
    sizes = sizes_of_groups(monkeypatch)
    found = find(loaded, settings=replace(SETTINGS, tokens_per_batch=1))
    assert (sizes, found.tokens_per_batch) == ([1] * len(EDITS), 1)
    # GPT-J: 6.05e9 float32 weights are 24.2 GB; a token takes 4 (28 (10 x 4096 + 6 x 16384) + 50400) = 15.8 MB.
    each = estimate.token_bytes(28, 4096, 16384, 50400)
    assert estimate.fixed_tokens(6_050_000_000, each, accelerator=True) == 24_200_000_000 // each == 1531
    assert estimate.fixed_tokens(100, each, accelerator=False) == 2**32 // each == 271


def test_memory_that_is_not_there_is_refused_beforehand(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    sizes = sizes_of_groups(monkeypatch)
    monkeypatch.setattr(_values, "available_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"v\* of 4 edits .* smaller editor\.tokens_per_batch, such as \d+"):
        find(loaded)
    with pytest.raises(UserError, match=r"v\* of one edit .* shorter context_lengths"):
        find(loaded, EDITS[:1])
    assert sizes == []
    monkeypatch.setattr(_values, "available_memory", lambda device: None)  # the system does not say
    find(loaded)
    assert sizes == [4]


def test_available_memory_counts_the_page_cache() -> None:
    room = _values.available_memory(torch.device("cpu"))
    if room is None:
        pytest.skip("this system has no /proc/meminfo")
    assert 2**20 < room < 2**50


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_is_refused_and_not_worked_around(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    loaded = tiny_model("llama")

    def hopeless(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(_values, "_optimise", hopeless)
    with pytest.raises(UserError, match=r"v\* of 4 edits .* editor\.tokens_per_batch"):
        find(loaded)
    error = RuntimeError("another mistake")
    with pytest.raises(RuntimeError, match="another mistake"):
        find(loaded)


def test_cached_by_content(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    expected = find(loaded, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(_values, "_optimise", None)  # not called any more
    again = find(loaded, cache=tmp_path)
    assert torch.equal(again.value, expected.value)
    assert again.diagnostics == expected.diagnostics
    few = replace(SETTINGS, tokens_per_batch=1)
    for change in ({"edits": [THREE_TOKENS]}, {"layer": 2}, {"site": "block"}, {"prefixes": ()}, {"settings": few}):
        with pytest.raises(TypeError):
            find(loaded, cache=tmp_path, **change)
    weight = loaded.model.model.layers[3].mlp.up_proj.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1e-3
        with pytest.raises(TypeError):
            find(loaded, cache=tmp_path)
        weight.copy_(saved)
    find(loaded, cache=tmp_path)
