"""The trainers of trl: their configs, what may be passed through to them, their rows, and what we add to them.

The only file that imports trl. Knows no model's architecture and no probe, nor when a fine-tune ends.
"""

from __future__ import annotations

import importlib
import inspect
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retention.adapters import config_defaults, config_fields, validate_fields
from retention.half import WHOLE, WholeHead
from retention.trainer_fields import OWNED, arguments_of, nonsense, tracker_problems
from retention.types import Guard, UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from retention.objectives import Objective


def imported(path: str) -> Any:
    """A class by its dotted path within trl. Raises UserError where this trl lacks it."""
    module, _, name = path.rpartition(".")
    try:
        with warnings.catch_warnings():
            # trl says of each experimental trainer that it may change: whoever asks for one has said that they know.
            warnings.filterwarnings("ignore", message=".*experimental.*")
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"objective: this version of trl has no {path}: {error}") from None


# ------------------------------------------------------------------------------------------------ settings


def validate(objective: Objective, trainer: dict[str, Any]) -> None:
    """Check pass-through trainer settings by name and type. Raises UserError with all mistakes, nearest names given."""
    problems = []
    passed = {}
    for name, value in trainer.items():
        if name in OWNED:
            problems.append(f"tune.trainer.{name} is set by the harness; use {OWNED[name]} instead")
        elif name in objective.arguments():
            problems.append(f"tune.trainer.{name} is fixed by the objective {objective.name!r}; set it there")
        else:
            passed[name] = value
    try:
        validate_fields(config_fields(imported(objective.config)), passed, (), "tune.trainer", "")
        problems += nonsense(passed)
        if not problems:  # what the types do not say, the config does: a scheduler's name, two settings that exclude
            config = config_of(objective, passed, steps=1, epochs=None, in_order=False, seed=0, folder=Path())
            _try_optimizer(config)
            problems += tracker_problems(passed.get("report_to"))
            problems += objective.problems(arguments_of(objective, passed))
            if config.fp16 and not torch.cuda.is_available():  # accelerate would train in float32 without a word
                problems.append("tune.trainer.fp16: needs an accelerator, and this machine has none; use bf16: true")
    except (ValueError, TypeError, ImportError) as error:
        text = str(error)
        problems.append(text if text.startswith("tune.trainer") else f"tune.trainer: {text}")
    if problems:
        raise UserError("\n".join(problems))


def _try_optimizer(config: Any) -> None:
    """Build optimizer and schedule for one number. Raises ValueError for what they refuse or need installed."""
    from transformers import Trainer, get_scheduler

    model: Any = torch.nn.Linear(1, 1)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(config, model)
        optimizer = kind(model.parameters(), **settings)
    except Exception as error:  # of any library's own kind
        raise ValueError(f"tune.trainer.optim: {getattr(config.optim, 'value', config.optim)}: {error}") from None
    try:
        more = config.lr_scheduler_kwargs or {}
        get_scheduler(config.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=dict(more))
    except Exception as error:
        name = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        raise ValueError(f"tune.trainer.lr_scheduler_type: {name}: {error}") from None


def config_of(
    objective: Objective,
    trainer: dict[str, Any],
    *,
    steps: int,
    epochs: float | None,
    in_order: bool,
    seed: int,
    folder: Path,
) -> Any:
    """The trainer's config: our defaults, the objective's arguments, what is passed through, what the harness owns.

    steps: optimizer steps; -1: as many as `epochs` passes over the rows make.
    """
    config_class = imported(objective.config)
    known = config_fields(config_class)
    shuffled = {"shuffle_dataset": not in_order} if objective.shuffled_by == "field" else {}
    in_order = in_order or objective.shuffled_by == "harness"
    config = config_class(
        **{k: v for k, v in arguments_of(objective, trainer).items() if k in known},
        **shuffled,
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        max_steps=steps,
        num_train_epochs=epochs if epochs is not None else 1,
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential" if in_order else "random",
        use_cpu=not torch.cuda.is_available(),
        # A trainer that draws what it trains on counts its tokens as it draws them.
        include_num_input_tokens_seen="no" if objective.shuffled_by == "field" else "non_padding",
    )
    # One process trains on one accelerator, however many the machine has: else each would take a batch of its own.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def library_defaults(objective: Objective) -> dict[str, Any]:
    """The defaults of the trainer's config, as this version of trl has them."""
    return config_defaults(imported(objective.config))


def micro_batches(objective: Objective, trainer: dict[str, Any], split: int) -> tuple[dict[str, Any], int]:
    """The trainer's settings with each batch cut into `split` equal parts, and into how many it is.

    More where the number of rows wants it, one part where the objective's loss is not that of its rows added up.
    """
    arguments = arguments_of(objective, trainer)
    rows, batches = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    parts = next(n for n in range(min(split, rows), rows + 1) if rows % n == 0) if objective.splits() else 1
    if parts == 1:
        return trainer, 1
    smaller = {"per_device_train_batch_size": rows // parts, "gradient_accumulation_steps": batches * parts}
    return trainer | smaller, parts


# ------------------------------------------------------------------------------------------------ trainers


def trainer_of(objective: Objective, guards: Sequence[Guard], parts: int = 1) -> Any:
    """The objective's trainer with the guards' penalties in its loss, and with tokens counted whatever its batches.

    parts: micro-batches that stand for one batch, each weighing what its loss is a mean of; a penalty is added once for
    all of them.
    """
    trainer = imported(objective.trainer)
    if "ref_model" not in inspect.signature(trainer).parameters:
        trainer = _referenced(trainer)
    penalised = any(type(guard).penalty is not Guard.penalty for guard in guards)

    class Ours(trainer):  # type: ignore[misc, valid-type]
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            found = super().get_batch_samples(*args, **kwargs)
            self._turn = 0
            if parts > 1:
                self._counts = [_counted(batch) for batch in found[0]]
            return found

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if not penalised and parts == 1:
                return found
            loss, *rest = found if return_outputs else (found,)
            # A loss that is normalised over all micro-batches of a step is added up by the trainer, not averaged.
            added_up = self.loss_is_scaled_for_ga
            if added_up is None:
                added_up = num_items_in_batch is not None and self.model_accepts_loss_kwargs
            count = self.current_gradient_accumulation_steps
            batches = -(-count // parts)
            if parts > 1 and not added_up:
                first = self._turn - self._turn % parts
                share = self._counts[self._turn] / sum(self._counts[first : first + parts])
                loss = loss * (share * count / batches)
            share = 1 / batches if added_up else count / batches
            for guard in guards if self._turn % parts == 0 else ():
                penalty = guard.penalty()
                if penalty is not None:
                    loss = loss + share * penalty.to(loss.device)
            self._turn += 1
            return (loss, *rest) if return_outputs else loss

        def _track_num_input_tokens(self, inputs: Any) -> None:
            if self.args.include_num_input_tokens_seen == "no":
                return
            # Pairs come as two batches under two names; a pack has no padding, and no mask. A completion that stands
            # in a batch for a comparison only (kto) is not trained on.
            names = [n for n in inputs if n.endswith("attention_mask") and not n.startswith(("KL_", "prompt_"))]
            seen = sum(int(inputs[name].sum()) for name in names) if names else inputs["input_ids"].numel()
            self.state.num_input_tokens_seen += int(
                self.accelerator.gather(torch.tensor(seen, device=self.accelerator.device)).sum()
            )

        def _send_telemetry(self) -> None:
            """trl would tell its makers of each training."""

    return Ours


@contextmanager
def whole_head(config: Any) -> Iterator[None]:
    """Within it trl's fused head is `WholeHead`, where it is faster: bfloat16 on a processor, logits that fit.

    In float32, and on accelerators, trl's own stays.
    """
    if not config.bf16 or config.device.type != "cpu":
        yield
        return
    utils: Any = importlib.import_module("trl.trainer.utils")
    theirs = utils._ChunkedLogProbFunction

    class Chosen:
        @staticmethod
        def apply(
            hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, chunk_size: int,
            softcap: float | None = None, scale: float = 1.0, outputs: Sequence[str] = ("entropy",),
        ) -> tuple[Any, ...]:  # fmt: skip
            others = set(outputs) - {"log_probs", "entropy", "is_top1"}
            if others or not torch.is_autocast_enabled("cpu") or len(hidden) * len(weight) > WHOLE:
                found: tuple[Any, ...] = theirs.apply(
                    hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
                )
                return found
            dtype = torch.get_autocast_dtype("cpu")
            logp, entropy, right = WholeHead.apply(hidden, weight, bias, targets, temperature, softcap, scale, dtype)
            return logp, entropy, None, None, right

    utils._ChunkedLogProbFunction = Chosen
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = theirs


def _counted(batch: Mapping[str, Any]) -> int:
    """What the loss of a batch is a mean of: tokens that are predicted, or rows."""
    if "labels" in batch:
        return int((batch["labels"][..., 1:] != -100).sum())
    return len(next(value for value in batch.values() if torch.is_tensor(value)))


def _referenced(trainer: Any) -> Any:
    """A trainer that takes the `ref_model` which trl's own would load (grpo's).

    From the model's folder, that is, without the edits; or, under an adapter, by beginning a second one, which may move
    the weights below (pissa). So it is built as if it needed none, and then handed ours.
    """

    class Referenced(trainer):  # type: ignore[misc, valid-type]
        def __init__(self, *, args: Any, ref_model: Any = None, **others: Any) -> None:
            if ref_model is None:
                super().__init__(args=args, **others)
                return
            beta, args.beta = args.beta, 0.0
            super().__init__(args=args, **others)
            args.beta = self.beta = beta
            cast = args.cast_lm_head_to_fp32
            fuse = imported("trl.trainer.utils.add_fused_lm_head")
            fuse(ref_model, temperature=self.temperature, cast_lm_head_to_fp32=cast)
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)

    return Referenced


# ------------------------------------------------------------------------------------------------ rows


def dataset_of(made: Sequence[Mapping[str, Any]], objective: Objective, seed: int, in_order: bool) -> Dataset:
    """The trainer's dataset.

    For a trainer that shuffles none itself rows are shuffled by the seed; those in order only among their neighbors,
    since kto takes the next row of its batch for a completion that does not belong to the prompt.
    """
    from datasets import Dataset

    made = list(made)
    if objective.shuffled_by == "harness":
        rng, window = random.Random(seed), 64 if in_order else len(made)
        windows = [made[i : i + window] for i in range(0, len(made), window)]
        made = [row for some in windows for row in rng.sample(some, len(some))]
    return Dataset.from_list(made)
