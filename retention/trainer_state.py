"""All that a trainer of transformers or trl has gathered by a step, as nested values, and put back into a new trainer.

What is put back goes on bit for bit. Where it would not, `savable` says no, and an interrupted fine-tune begins again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from retention.snapshot import put_back, rng_state, set_rng_state
from retention.types import Guard

# What trainers add up between two entries of their log, or over all of training; each has some of them.
TALLIES = (
    "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "current_flos", "_metrics", "_stored_metrics",
    "_total_train_tokens", "_step", "_last_world_entropy", "_entropy_window_stats",
)  # fmt: skip


def savable(trainer: Any, *, draws: bool) -> bool:
    """Whether a fine-tune saved now would go on as if nothing had happened.

    Not on several ranks; not where the optimizer lives in hooks of the parameters, or a reference moves along. draws:
    the trainer draws its order of rows from a generator of its own, which begins anew with a new trainer, and answers
    ahead for several steps; so it is saved within the first epoch, when all answers are used up.
    """
    args = trainer.args
    if args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return False
    if "layerwise" in str(args.optim) or "lomo" in str(args.optim) or getattr(args, "sync_ref_model", False):
        return False
    if not draws:
        return True
    ahead = getattr(args, "steps_per_generation", args.gradient_accumulation_steps)
    ahead *= getattr(args, "num_iterations", 1)
    return trainer.state.epoch < 1 and trainer._step % ahead == 0


def gathered(trainer: Any, guards: Sequence[Guard]) -> dict[str, Any]:
    """At the end of a step, once it is logged. Holds the model's own tensors, not copies."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return {
        "step": trainer.state.global_step,
        "state": json.dumps(asdict(trainer.state)),
        "parameters": {name: p for name, p in trainer.model.named_parameters() if p.requires_grad},
        "buffers": dict(trainer.model.named_buffers()),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "tallies": {name: getattr(trainer, name) for name in TALLIES if hasattr(trainer, name)},
        "guards": [guard.state() for guard in guards],
        "rng": rng_state(),
    }


def resumable(
    trainer: type[Any], guards: Sequence[Guard], begun: dict[str, Any] | None, save: Callable[[dict[str, Any]], None]
) -> type[Any]:
    """The trainer's class; with `begun`, what `gathered` gave, its `train` goes on from there.

    `save` gets what is gathered whenever a callback has said `should_save`.
    """

    class Resumable(trainer):  # type: ignore[misc, valid-type]
        def train(self, *args: Any, **kwargs: Any) -> Any:
            if begun is None:
                return super().train(*args, **kwargs)
            with TemporaryDirectory() as folder:  # the trainer wants to read its own state from a file
                (Path(folder) / "trainer_state.json").write_text(begun["state"], encoding="utf-8")
                return super().train(resume_from_checkpoint=folder)

        def _save_checkpoint(self, *_: Any, **__: Any) -> None:
            save(gathered(self, guards))

        def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
            """Nothing yet: what reads the model before its first step must find it as it was then."""

        def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
            assert begun is not None, "called when training is resumed"
            own = dict(self.model.named_parameters())
            assert begun["parameters"].keys() == {n for n, p in own.items() if p.requires_grad}, "the same run"
            put_back(own, begun["parameters"])
            put_back(dict(self.model.named_buffers()), begun["buffers"])
            self.optimizer.load_state_dict(begun["optimizer"])
            _unrounded(self.optimizer, begun["optimizer"])
            self.lr_scheduler.load_state_dict(begun["scheduler"])
            for guard, state in zip(guards, begun["guards"], strict=True):
                guard.resume(state)

        def _load_scaler(self, checkpoint: Any) -> None:
            assert begun is not None, "called when training is resumed"
            if begun["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(begun["scaler"])

        def _load_rng_state(self, checkpoint: Any) -> None:
            if begun is not None:
                set_rng_state(begun["rng"])

    return Resumable


def _unrounded(optimizer: Any, saved: dict[str, Any]) -> None:
    """What torch has rounded to the parameters' dtype as it loaded it: adafactor's is float32 beside bfloat16."""
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            loaded = optimizer.state[parameter][name]
            if isinstance(value, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(loaded.device)


def put_back_tallies(trainer: Any, tallies: dict[str, Any]) -> None:
    """Once the trainer has set them to nothing."""
    for name, value in tallies.items():
        if isinstance(value, dict):
            _fill(getattr(trainer, name), value)
        else:
            setattr(trainer, name, value.to(trainer.args.device) if isinstance(value, torch.Tensor) else value)


def _fill(tally: dict[str, Any], value: dict[str, Any]) -> None:
    """Into the trainer's own dicts, which make entries that lack."""
    for key, item in value.items():
        if isinstance(item, dict):
            _fill(tally[key], item)
        else:
            tally[key] = item
