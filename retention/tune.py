"""One fine-tune, by trl. The only file that imports trl.

The harness owns where things are written, the seeds, the number of steps and when the model is probed; every other
field of the trainer's config passes through. Knows no probe: it calls back at the steps that it is given.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retention.adapters import Adapter, Full, config_fields, validate_fields
from retention.tokens import join
from retention.types import TaskRows, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from retention.models import Anatomy
    from retention.objectives import Objective

# Every argument that can move a number is written out: library defaults change between releases (trl made bf16 and
# gradient checkpointing its defaults). Values are transformers' and trl's own at 5.23 and 1.16 except where noted.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,  # transformers: 8
    "gradient_accumulation_steps": 1,
    "learning_rate": 2.0e-5,
    "lr_scheduler_type": "constant",  # transformers: linear; with it the step budget would change the whole curve
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1.0e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 1024,
    "packing": False,
    "loss_type": "nll",
    "bf16": False,
    "fp16": False,
    "activation_checkpointing": False,
    "average_tokens_across_devices": True,
    "dataloader_drop_last": False,
    "dataloader_num_workers": 0,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "report_to": "none",
}
OWNED = {
    "output_dir": "--results",
    "seed": "seed",
    "data_seed": "seed",
    "max_steps": "tune.steps",
    "num_train_epochs": "tune.steps",
    "save_strategy": "at",
    "save_steps": "at",
    "eval_strategy": "at",
    "eval_steps": "at",
    "do_train": "tune.steps",
    "disable_tqdm": "--quiet",
    "use_cpu": "a machine with an accelerator",
    "include_num_input_tokens_seen": "nothing: tokens are always counted",
    "resume_from_checkpoint": "retention run again",
    "remove_unused_columns": "nothing: rows are prepared by the harness",
    "gradient_checkpointing": "tune.trainer.activation_checkpointing",  # transformers' old name of it
    "gradient_checkpointing_kwargs": "tune.trainer.activation_checkpointing_kwargs",
}

Checkpoint = Callable[[int, int, "PreTrainedModel"], None]  # (step, training tokens so far, model in train mode)


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What a fine-tune reports, besides what its checkpoints wrote."""

    steps: int  # optimizer steps done
    tokens: int  # training tokens that were not padding
    seconds: float
    frozen: tuple[str, ...]  # parameters that were kept from moving by a mitigation
    trainable: tuple[str, ...]  # parameters that could move
    trainable_count: int  # numbers in them
    arguments: dict[str, Any]  # as passed to the trainer's config
    log: tuple[dict[str, Any], ...]  # the trainer's own log: step, loss (nats), learning_rate, grad_norm


def validate(objective: Objective, trainer: dict[str, Any]) -> None:
    """Check pass-through trainer settings by name and type. Raises UserError with all mistakes, nearest names given."""
    import trl

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
        validate_fields(config_fields(getattr(trl, objective.config)), passed, (), "tune.trainer", "")
        if not problems:  # what the types do not say, the config does: a scheduler's name, two settings that exclude
            _config(objective, passed, steps=1, seed=0, folder=Path())
    except (ValueError, TypeError, ImportError) as error:
        text = str(error)
        problems.append(text if text.startswith("tune.trainer") else f"tune.trainer: {text}")
    if problems:
        raise UserError("\n".join(problems))


def _arguments(objective: Objective, trainer: dict[str, Any]) -> dict[str, Any]:
    return {**DEFAULTS, **objective.arguments(), **trainer}


def _config(objective: Objective, trainer: dict[str, Any], *, steps: int, seed: int, folder: Path) -> Any:
    """The trainer's config: our defaults, the objective's arguments, what is passed through, what the harness owns."""
    import trl

    config_class = getattr(trl, objective.config)
    known = config_fields(config_class)
    return config_class(
        **{k: v for k, v in _arguments(objective, trainer).items() if k in known},
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        max_steps=steps,
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        include_num_input_tokens_seen="non_padding",
    )


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: TaskRows,
    *,
    objective: Objective,
    adapter: Full | Adapter,
    freeze: Callable[[PreTrainedModel], tuple[str, ...]],
    anatomy: Anatomy,
    steps: int,
    trainer: dict[str, Any],
    seed: int,
    at: Sequence[int],
    on_checkpoint: Checkpoint,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> TuneResult:
    """Train `model` in place for `steps` optimizer steps and call `on_checkpoint` after each step in `at`.

    `freeze` is called once the adapter is in place; it makes parameters untrainable and names them.
    Rows are shuffled by the seed; the loss and the optimizer are trl's. The model is left trained, in train mode.
    Raises UserError if a mitigation freezes everything or an adapter does not fit the model.
    """
    import trl
    from transformers import PrinterCallback, TrainerCallback, set_seed

    set_seed(seed)  # peft draws an adapter's weights when it wraps the model
    wanted = set(at)
    if isinstance(adapter, Adapter):
        wrapped = adapter.wrap(model, {"mlp": anatomy.mlp_projections, "attention": anatomy.attention_projections})
    else:
        model.requires_grad_(True)
        wrapped = model
    frozen = freeze(wrapped)

    config = _config(objective, trainer, steps=steps, seed=seed, folder=folder)

    class Checkpoints(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in wanted:
                on_checkpoint(state.global_step, int(state.num_input_tokens_seen), model)
            if progress is not None:
                progress(state.global_step, steps)

    with warnings.catch_warnings(), _no_bars():
        # torch warns that pinned memory needs an accelerator; on a CPU node there is none, and nothing is lost.
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer_ = getattr(trl, objective.trainer)(
            model=wrapped,
            args=config,
            train_dataset=_dataset(rows.train, objective.rows),
            processing_class=tokenizer,
            callbacks=[Checkpoints()],
        )
        trainer_.remove_callback(PrinterCallback)  # our own progress tells how far it is; the log goes into the results
        trainable = {name: p.numel() for name, p in wrapped.named_parameters() if p.requires_grad}
        assert not trainable.keys() & set(frozen), "building the trainer has thawed frozen parameters"
        start = time.perf_counter()
        trainer_.train()
        seconds = time.perf_counter() - start
    state = trainer_.state
    if state.global_step != steps:  # a stop signal makes train() return as if all were well
        raise InterruptedError(f"training stopped at step {state.global_step} of {steps}")
    return TuneResult(
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        seconds=seconds,
        frozen=frozen,
        trainable=tuple(trainable),
        trainable_count=sum(trainable.values()),
        arguments=_arguments(objective, trainer),
        log=tuple(entry for entry in state.log_history if "loss" in entry),
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars that datasets draws for each pass over the rows: our own progress tells how far it is."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _dataset(rows: Sequence[dict[str, Any]], kind: str) -> Dataset:
    """The rows as a trl dataset: a completion begins with the space that separates it from its prompt."""
    from datasets import Dataset

    if kind == "text":
        return Dataset.from_list(
            [{"text": row["text"] if "text" in row else join(row["prompt"], row["completion"])} for row in rows]
        )
    bare = next((row for row in rows if "prompt" not in row), None)
    if bare is not None:
        raise UserError(
            "objective sft trains on prompts and completions; the data has plain text. Use objective clm, or other data"
        )
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": join(row["prompt"], row["completion"])[len(row["prompt"]) :]}
            for row in rows
        ]
    )
