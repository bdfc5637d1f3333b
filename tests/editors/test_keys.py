"""Keys and their covariance equal what plain forwards give, and are found again by content alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from facts import EDITS, PREFIXES
from torch import Tensor

from retention.editors import _keys
from retention.editors._base import preserved
from retention.editors._keys import Covariance, KeyWalk, covariances, factored, mean_keys, metrics
from retention.editors._rows import statement_rows
from retention.hooks import on_input, on_output
from retention.models import Loaded, anatomy
from retention.types import Delta, UserError


def plain_keys(loaded: Loaded, ids: list[int], layer: int) -> Tensor:
    """Keys [tokens, m] of one text by one forward, float64."""
    found: list[Tensor] = []
    with torch.no_grad(), on_input(anatomy(loaded.model).down_module(loaded.model, layer), found.append):
        loaded.model(torch.tensor([ids]), use_cache=False)
    return found[0].reshape(len(ids), -1).double()


def test_covariance_is_the_mean_product_over_real_tokens(loaded: Loaded, corpus: tuple[str, ...]) -> None:
    texts = corpus[:12]  # of 8 to 19 words
    found = covariances(loaded.model, loaded.tokenizer, [0, 2], texts, Covariance())
    for layer in (0, 2):
        keys = torch.cat([plain_keys(loaded, loaded.tokenizer(text)["input_ids"], layer) for text in texts])
        expected = keys.T @ keys / len(keys)
        assert float((found[layer] - expected).norm() / expected.norm()) < 1e-6
        assert torch.equal(found[layer], found[layer].T)


def test_wide_keys_are_multiplied_in_blocks(tiny_model: Any, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    whole = covariances(loaded.model, loaded.tokenizer, [1], corpus, Covariance())[1]
    monkeypatch.setattr(_keys, "BLOCK", 24)  # not a divisor of 64
    monkeypatch.setattr(_keys, "BATCH_TOKENS", 50)
    found = covariances(loaded.model, loaded.tokenizer, [1], corpus, Covariance())[1]
    assert torch.allclose(found, whole, rtol=1e-5, atol=1e-7)


def test_a_sample_of_the_corpus(tiny_model: Any, corpus: tuple[str, ...]) -> None:
    loaded = tiny_model("llama")
    rows = _keys._sample(loaded.tokenizer, corpus, Covariance(tokens=100, length=10))
    assert sum(map(len, rows)) == 100
    assert max(map(len, rows)) <= 10
    assert rows == _keys._sample(loaded.tokenizer, corpus, Covariance(tokens=100, length=10))


def test_few_samples_never_give_a_singular_matrix(tiny_model: Any, corpus: tuple[str, ...]) -> None:
    loaded = tiny_model("llama")
    few = covariances(loaded.model, loaded.tokenizer, [1], corpus, Covariance(tokens=6))[1]
    assert int(torch.linalg.matrix_rank(few.double(), rtol=1e-5)) <= 6
    metric = factored(few, 1e-4)
    dense = few.double() + 1e-4 * few.double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    keys = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(metric.solve(keys), torch.linalg.solve(dense, keys.double().T).T, rtol=1e-6, atol=0)
    with pytest.raises(UserError, match=r"larger corpus or a larger covariance\.ridge"):
        factored(torch.zeros(8, 8), 1e-4)


def test_no_texts(tiny_model: Any) -> None:
    loaded = tiny_model("llama")
    for empty in ((), (" ", "")):
        with pytest.raises(UserError, match=r"corpus is empty.*covariance\.tokens=0"):
            metrics(loaded.model, loaded.tokenizer, [0], empty, Covariance())
    identity = metrics(loaded.model, loaded.tokenizer, [0], (), Covariance(tokens=0))[0]
    keys = torch.ones(2, 64)
    assert torch.equal(identity.solve(keys), keys.double())


def test_cached_by_content(corpus: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.build("llama")
    sample = Covariance()
    expected = covariances(model, tokenizer, [0, 1], corpus, sample, tmp_path)
    plain = covariances(model, tokenizer, [0, 1], corpus, sample)
    assert all(torch.equal(expected[i], plain[i]) for i in (0, 1))
    monkeypatch.setattr(_keys, "_accumulate", None)  # not called any more
    again = covariances(model, tokenizer, [0, 1], corpus, sample, tmp_path)
    assert all(torch.equal(expected[i], again[i]) for i in (0, 1))

    def moved(name: str) -> bool:
        """Whether another value of this parameter makes another covariance to compute."""
        parameter = model.get_parameter(name)
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] += 0.5
        try:
            covariances(model, tokenizer, [0, 1], corpus, sample, tmp_path)
        except TypeError:
            return True
        finally:
            with torch.no_grad():
                parameter.copy_(saved)
        return False

    assert moved("model.layers.0.mlp.down_proj.weight")
    assert moved("model.layers.1.mlp.up_proj.weight")
    assert not moved("model.layers.1.mlp.down_proj.weight")  # keys of a layer do not depend on what they enter
    assert not moved("model.layers.2.mlp.up_proj.weight")
    for change in ({"corpus": corpus[:30]}, {"settings": Covariance(tokens=50)}, {"layers": [0]}):
        given = {"layers": [0, 1], "corpus": corpus, "settings": sample, "cache": tmp_path} | change
        with pytest.raises(TypeError):
            covariances(model, tokenizer, **given)


def test_walk_gives_the_keys_and_values_of_plain_forwards(loaded: Loaded) -> None:
    """Also after the layers below were changed, as MEMIT does while it walks."""
    model, parts = loaded.model, anatomy(loaded.model)
    rows = statement_rows(loaded.tokenizer, EDITS, PREFIXES)
    noise = torch.randn(parts.down_module(model, 0).weight.shape, generator=torch.Generator().manual_seed(0))
    with preserved(model, 0):
        walk = KeyWalk(model, parts, rows, 0)
        assert_keys(loaded, rows, walk, 0)
        with Delta({f"{parts.down.format(0)}.weight": 0.1 * noise}).applied(model):
            walk.up_to(2)
            assert_keys(loaded, rows, walk, 2)
            for site in ("mlp", "block"):
                module = parts.down_module(model, 3) if site == "mlp" else parts.blocks(model)[3]
                found = walk.values(3, site)  # type: ignore[arg-type]
                for i, row in enumerate(rows):
                    seen: list[Tensor] = []
                    with torch.no_grad(), on_output(module, lambda out, seen=seen: seen.append(out.clone())):
                        model(torch.tensor([row.ids]), use_cache=False)
                    torch.testing.assert_close(
                        found[i], seen[0].reshape(len(row.ids), -1)[row.at], rtol=1e-4, atol=1e-5
                    )


def test_walk_is_bounded_by_tokens(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    rows = statement_rows(loaded.tokenizer, EDITS, PREFIXES)
    places = anatomy(loaded.model)
    with preserved(loaded.model, 0):
        whole = KeyWalk(loaded.model, places, rows, 1).keys()
        monkeypatch.setattr("retention.editors._keys.WALK_TOKENS", 24)
        walk = KeyWalk(loaded.model, places, rows, 1)
        assert max(states.shape[0] * states.shape[1] for *_, states in walk.parts) <= 24
        assert sorted(i for group, *_ in walk.parts for i in group) == list(range(len(rows)))
        torch.testing.assert_close(walk.keys(), whole)


def assert_keys(loaded: Loaded, rows: list[Any], walk: KeyWalk, layer: int) -> None:
    found = walk.keys()
    for i, row in enumerate(rows):
        expected = plain_keys(loaded, list(row.ids), layer)[row.at]
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-4, atol=1e-5)


def test_mean_keys(tiny_model: Any) -> None:
    rows = statement_rows(tiny_model("llama").tokenizer, EDITS[:2], PREFIXES)  # 1 + 3, and 1 + 3 + 1 rows
    keys = torch.arange(9.0)[:, None] ** 2
    assert mean_keys(keys, rows, 2)[:, 0].tolist() == pytest.approx(
        [0 / 2 + (1 + 4 + 9) / 6, (16 + 64) / 4 + (25 + 36 + 49) / 6]
    )
    bare = statement_rows(tiny_model("llama").tokenizer, EDITS[:1], ())
    assert mean_keys(keys[:1] + 3, bare, 1).tolist() == [[3.0]]


def test_reading_stops_once_directions_have_settled(tiny_model: Any, corpus: tuple[str, ...]) -> None:
    """What it reads is the covariance of just those texts, and told; a stricter bound reads on."""
    loaded = tiny_model("llama")
    many = tuple(f"{text} {text}" for text in corpus) * 60
    whole = covariances(loaded.model, loaded.tokenizer, [0, 2], many, Covariance(tokens=50_000))
    loose = covariances(loaded.model, loaded.tokenizer, [0, 2], many, Covariance(tokens=50_000, settle=0.5))
    strict = covariances(loaded.model, loaded.tokenizer, [0, 2], many, Covariance(tokens=50_000, settle=1e-12))
    assert _keys.FIRST_LOOK < loose.tokens < strict.tokens <= whole.tokens
    drawn = _keys._sample(loaded.tokenizer, many, Covariance(tokens=50_000))
    total, used = 0, 0
    while total < loose.tokens:
        total += len(drawn[used])
        used += 1
    assert total == loose.tokens
    sums = _keys._accumulate(loaded.model, anatomy(loaded.model), [0, 2], sorted(drawn[:used], key=len, reverse=True))
    for layer in (0, 2):
        expected = torch.triu(sums[layer]) + torch.triu(sums[layer], 1).T
        assert torch.allclose(loose[layer].double(), expected / total, rtol=1e-4, atol=1e-6)
        assert torch.allclose(strict[layer], whole[layer], rtol=1e-4, atol=1e-6) or strict.tokens < whole.tokens


@pytest.mark.parametrize("settle", [0.0, 1.0, -0.1])
def test_a_bound_that_means_nothing_is_refused(settle: float) -> None:
    with pytest.raises(ValueError, match="settle"):
        Covariance(settle=settle)
