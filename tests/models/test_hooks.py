"""Hooks see and change what they say, and nothing of them stays."""

from __future__ import annotations

import tiny
import torch

from retention.hooks import dry_run, on_input, on_output, only_at, recording, stopped, undisturbed
from retention.models import anatomy

IDS = torch.tensor([[1, 5, 9, 20, 7], [1, 30, 31, 32, 33]])


def test_replay_of_recorded_calls_equals_the_forward() -> None:
    model, _ = tiny.build("gemma3")  # two kinds of masks and of rotary tables
    blocks = anatomy(model).blocks(model)
    states: list[torch.Tensor] = []
    with torch.no_grad(), on_input(blocks[1], states.append), on_output(blocks[3], states.append):
        with recording(blocks) as calls:
            model(input_ids=IDS, use_cache=False)
        assert torch.equal(calls.run(states[0], 1, 4), states[1])


def test_dry_run_sees_the_same_calls_without_the_work() -> None:
    model, _ = tiny.build("gemma3")
    blocks = anatomy(model).blocks(model)
    states: list[torch.Tensor] = []
    with torch.no_grad():
        with dry_run(blocks, tuples=False) as calls, on_input(blocks[0].self_attn.q_proj, states.append):
            model.base_model(input_ids=IDS, use_cache=False)
        assert not states
        with on_input(blocks[0], states.append), on_output(blocks[3], states.append):
            model.base_model(input_ids=IDS, use_cache=False)
        assert torch.equal(calls.run(states[0], 0, 4), states[1])
    assert not any("forward" in vars(block) for block in blocks)


def test_a_hook_may_end_the_forward() -> None:
    model, _ = tiny.build("llama")
    blocks = anatomy(model).blocks(model)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), on_input(blocks[1], seen.append, stop=True), on_input(blocks[2], seen.append), stopped():
        model(input_ids=IDS)
    assert len(seen) == 1


def test_what_a_hook_returns_takes_the_outputs_place() -> None:
    model, _ = tiny.build("gptj")  # blocks return tuples
    blocks = anatomy(model).blocks(model)
    with torch.no_grad(), on_output(blocks[0], torch.zeros_like):
        zeroed = model(input_ids=IDS).logits
        seen: list[torch.Tensor] = []
        with on_input(blocks[1], seen.append):
            model(input_ids=IDS)
    assert float(seen[0].abs().max()) == 0.0
    assert not torch.equal(zeroed, model(input_ids=IDS).logits)


def test_an_mlp_at_some_places_only() -> None:
    model, _ = tiny.build("llama")
    mlp = model.model.layers[0].mlp
    states = torch.randn(2, 3, mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[True, False, True], [False, True, False]])
    with torch.no_grad():
        expected = mlp(states) * places[..., None]
        with only_at(mlp, places):
            torch.testing.assert_close(mlp(states), expected)
            torch.testing.assert_close(mlp(states.flatten(0, 1)), expected.flatten(0, 1))  # as OPT hands them over
        assert mlp(states).all()
    assert not mlp._forward_hooks
    assert not mlp._forward_pre_hooks


def test_undisturbed_restores_modes_flags_and_random_numbers() -> None:
    model, _ = tiny.build("llama")
    model.train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.down_proj.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        torch.rand(3)
        model.config.use_cache = False
    assert modes == [module.training for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.equal(random, torch.get_rng_state())
    assert model.config.use_cache
