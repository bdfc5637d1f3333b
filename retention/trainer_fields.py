"""What a study may say about a trainer: our written-out defaults, the fields that the harness owns, the trackers.

Knows the names of the fields of trl's configs, not trl.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retention.explain import nearest

# Every argument that can move a number is written out: library defaults change between releases (trl made bf16 and
# gradient checkpointing its defaults). Values are transformers' and trl's own at 5.23 and 1.16 except where noted.
# What only one trainer has stands in its objective's `defaults`; an objective's arguments stand above both.
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
_TEACHER = "objective distill: its teacher is the unedited model"
_RESUME = "retention run again"
_SHARED = "the files in --results: nothing is sent away"
_ROWS = "nothing: rows are prepared by the harness"
OWNED = {
    "output_dir": "--results",
    "seed": "seed",
    "data_seed": "seed",
    "max_steps": "tune.steps",
    "num_train_epochs": "tune.epochs",
    "save_strategy": "at",
    "save_steps": "at",
    "eval_strategy": "at",
    "eval_steps": "at",
    "eval_on_start": "at",
    "do_train": "tune.steps",
    "do_eval": "at",
    "do_predict": "at",
    "load_best_model_at_end": "at, or tune.until",
    "disable_tqdm": "--quiet",
    "use_cpu": "a machine with an accelerator",
    "include_num_input_tokens_seen": "nothing: tokens are always counted",
    "resume_from_checkpoint": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    "enable_jit_checkpoint": _RESUME,
    "ignore_data_skip": _RESUME,
    "train_sampling_strategy": "a mitigation of the rows: it decides on their order",
    "shuffle_dataset": "seed: rows are shuffled by it; a mitigation of the rows decides on their order",
    "remove_unused_columns": _ROWS,
    "dataset_kwargs": _ROWS,
    "chat_template_path": "a model folder whose tokenizer has the chat template",
    "auto_find_batch_size": "tune.trainer.per_device_train_batch_size: steps must mean the same in each run",
    "gradient_checkpointing": "tune.trainer.activation_checkpointing",  # transformers' old name of it
    "gradient_checkpointing_kwargs": "tune.trainer.activation_checkpointing_kwargs",
    "model_init_kwargs": "model",
    "trust_remote_code": "model: code that comes with weights is never run",
    "teacher_model_name_or_path": _TEACHER,
    "teacher_model_revision": _TEACHER,
    "teacher_model_init_kwargs": _TEACHER,
    "push_to_hub": _SHARED,
    "hub_model_id": _SHARED,
    "hub_strategy": _SHARED,
    "hub_token": _SHARED,
    "hub_private_repo": _SHARED,
    "hub_always_push": _SHARED,
    "hub_revision": _SHARED,
    "log_completions_hub_repo": _SHARED,
}
# Arguments that move no number: what is logged and where to, how rows are loaded, and what is not asked for here
# (evaluation, saving). They enter no key; `training.parquet` has a row for each `logging_steps`.
IDLE = frozenset(
    {
        *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level"),
        *("log_level_replica", "log_completions", "num_completions_to_print", "log_unique_prompts", "log_multimodal"),
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc"),
        *("eval_delay", "per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches"),
        *("eval_use_gather_object", "eval_packing", "include_for_metrics", "batch_eval_metrics"),
        *("prediction_loss_only", "generate_during_eval", "num_generations_eval"),
        *("metric_for_best_model", "greater_is_better"),
        *("save_only_model", "save_on_each_node", "save_total_limit"),
        *("skip_memory_metrics", "torch_empty_cache_steps", "ddp_timeout", "local_rank"),
        *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    }
)
# Trackers that `report_to` may name, and the packages of which each needs one.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


# Bounds that the fields' types do not tell: least, most (None: none); a field of any trainer.
BOUNDS: dict[str, tuple[float, float | None]] = {
    "per_device_train_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "max_length": (2, None),
    "max_completion_length": (1, None),
    "pad_to_multiple_of": (1, None),
    "logging_steps": (1, None),
    "dataset_num_proc": (1, None),
    "dataloader_num_workers": (0, None),
    "learning_rate": (0, None),
    "weight_decay": (0, None),
    "max_grad_norm": (0, None),
    "warmup_steps": (0, None),
    "neftune_noise_alpha": (0, None),
    "label_smoothing_factor": (0, 1),
    "label_smoothing": (0, 1),
    "ld_alpha": (0, 1),
    "ref_model_mixup_alpha": (0, 1),
    "ref_model_sync_steps": (1, None),
    "num_iterations": (1, None),
    "epsilon": (0, None),
    "epsilon_high": (0, None),
    "delta": (0, None),
    "top_entropy_quantile": (0, 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (0, None),
    "repetition_penalty": (1e-6, None),
    "simpo_gamma": (0, None),
}
# Words that the trainers look at only once they train.
WORDS = {
    "truncation_mode": ("keep_start", "keep_end"),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
}


def nonsense(trainer: Mapping[str, Any]) -> list[str]:
    """Values of the right type that no training can use."""
    found = []
    for name, value in trainer.items():
        if isinstance(value, bool) or value is None:
            continue
        least, most = BOUNDS.get(name, (None, None))
        if least is not None and isinstance(value, (int, float)) and not least <= value <= (most or math.inf):
            if least == 0 and most is None:
                found.append(f"tune.trainer.{name}: expected a number that is not negative, got {value!r}")
            else:
                bounds = f"at least {least:g}" if most is None else f"a number from {least:g} to {most:g}"
                found.append(f"tune.trainer.{name}: expected {bounds}, got {value!r}")
        if name in WORDS and value not in WORDS[name]:
            found.append(f"tune.trainer.{name}: unknown {value!r}{nearest(str(value), WORDS[name])}")
    return found


def trackers(report_to: Any) -> list[str]:
    """Names of the trackers that `report_to` asks for."""
    asked = [report_to] if isinstance(report_to, str) else list(report_to or ())
    return [name for name in asked if name != "none"]


def tracker_problems(report_to: Any) -> list[str]:
    """What is wrong with `report_to`: a name that is none, or a package that is not installed."""
    found = []
    for name in trackers(report_to):
        if name not in TRACKERS:
            found.append(f"tune.trainer.report_to: unknown tracker {name!r}{nearest(name, ['none', *TRACKERS])}")
        elif not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            found.append(
                f"tune.trainer.report_to: {name} is not installed: `pip install {TRACKERS[name][0]}`, "
                "or use report_to: none"
            )
    return found


@contextmanager
def trackers_within(folder: Path, report_to: Any) -> Iterator[None]:
    """Within it, trackers write into the folder; one that was sent elsewhere by its own variable goes there."""
    places: dict[str, dict[str, Path | str]] = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": folder / "tensorboard"},
        "trackio": {"TRACKIO_DIR": folder / "trackio"},
        "wandb": {"WANDB_DIR": folder},
        "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').absolute()}"},
    }
    new = {key: str(value) for name in trackers(report_to) for key, value in places[name].items()}
    new = {key: value for key, value in new.items() if key not in os.environ}
    if new:
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            del os.environ[key]


def arguments_of(objective: Any, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the trainer's config: our defaults, the objective's, what is passed, what it fixes."""
    return {**DEFAULTS, **objective.defaults, **trainer, **objective.arguments()}


def keyed(objective: Any, trainer: Mapping[str, Any], library: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments that can move a number, filled in: what a key is made from.

    library: the defaults of the trainer's config, asked for where something is passed that we do not write out; a value
    that equals its default there is left away, since the versions of the libraries are in each key.
    """
    found = {k: v for k, v in arguments_of(objective, trainer).items() if k not in IDLE}
    others = set(trainer) - DEFAULTS.keys() - objective.defaults.keys() - IDLE
    defaults = library() if others else {}
    return {k: v for k, v in found.items() if not (k in others and k in defaults and defaults[k] == v)}


def rows_needed(objective: Any, trainer: Mapping[str, Any], steps: int | None) -> int | None:
    """Rows that so many steps take; None where that, or the number of steps, is not known beforehand."""
    each = objective.rows_in_step(arguments_of(objective, trainer))
    return None if steps is None or each is None else math.ceil(steps * each)
