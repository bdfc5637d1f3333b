"""One fine-tune: what is held back, when it ends, and where it calls back to be read. The trainer is trainers.py's.

The harness owns where things are written, the seeds, the number of steps and when the model is probed; every other
field of the trainer's config passes through. Knows no probe: it calls back at the steps that it is given.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retention import ranks
from retention.adapters import Adapter, Full, adapted_modules, config_fields
from retention.hooks import own_forward
from retention.models import max_positions
from retention.restored import model_as_before, switched, switches, switches_as_before
from retention.resume import Resume
from retention.trainer_fields import arguments_of, trackers_within
from retention.trainer_state import put_back_tallies, resumable, savable
from retention.trainers import config_of, dataset_of, micro_batches, trainer_of, whole_head
from retention.training_rows import RowCounts, training_rows
from retention.types import Guard, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from retention.models import Anatomy
    from retention.objectives import Objective

Checkpoint = Callable[[int, int, "PreTrainedModel"], None]  # (step, training tokens so far, model in train mode)
OPEN_END = 10_000_000  # steps that no budget of tokens reaches: the trainer must be given a number


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a fine-tune lasts: exactly one of steps, epochs and tokens, whichever comes first with `stop`."""

    steps: int | None = None  # optimizer steps
    epochs: float | None = None  # passes over the rows
    tokens: int | None = None  # training tokens that are not padding; the step that reaches them is the last
    stop: Callable[[int], bool] = lambda step: False  # is it enough? Asked of the model as the guards deliver it
    every: int | None = None  # steps between two times that `stop` is asked; None: never

    def looks(self, step: int) -> bool:
        """Whether `stop` is asked after this step."""
        return self.every is not None and step % self.every == 0

    @property
    def fixed(self) -> bool:
        """Whether the last step is known from the start."""
        return self.steps is not None and self.every is None


class OutOfMemory(RuntimeError):
    """Training did not fit into memory; `micro_batches` makes it smaller where the objective bears it."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What holds a model back while it is trained."""

    frozen: tuple[str, ...] = ()  # names of parameters that must not move
    guards: tuple[Guard, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What a fine-tune reports, besides what its checkpoints wrote."""

    steps: int  # optimizer steps done
    tokens: int  # training tokens that were not padding
    seconds: float
    frozen: tuple[str, ...]  # parameters that were kept from moving by a mitigation
    trainable: tuple[str, ...]  # parameters that could move
    trainable_count: int  # numbers in them
    adapted: tuple[str, ...]  # modules that an adapter was put on
    arguments: dict[str, Any]  # as passed to the trainer's config
    log: tuple[dict[str, Any], ...]  # the trainer's own log: step, loss (nats), learning_rate, grad_norm
    resumed: tuple[int, ...] = ()  # steps after which it was interrupted and taken up again
    split: int = 1  # parts that each batch was cut into, because it did not fit into memory as a whole
    diverged: int | None = None  # step after which loss and weights were not finite: no further step was trained
    rows: dict[str, int | None] | None = None  # on their way to the trainer: see `training_rows.RowCounts`
    precision: dict[str, str] | None = None  # dtypes as found in the first step: see `_precision_seen`


@switches_as_before()
def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, Any]],
    *,
    objective: Objective,
    adapter: Full | Adapter,
    hold: Callable[[PreTrainedModel], Held],
    anatomy: Anatomy,
    budget: Budget,
    trainer: dict[str, Any],
    seed: int,
    at: Collection[int],
    on_checkpoint: Checkpoint,
    folder: Path,
    base: Callable[[], PreTrainedModel],
    in_order: bool = False,
    chat: bool = False,
    merge: bool = False,
    progress: Callable[[int, int], None] | None = None,
    resume: Resume | None = None,
    split: int = 1,
) -> TuneResult:
    """Train `model` in place and call `on_checkpoint` after each step in `at`, and after the last of an open budget.

    `hold` is called once the adapter is in place; it names the parameters that must not move and the guards that act on
    each step. Rows are shuffled by the seed unless `in_order`; the loss and the optimizer are trl's. At a checkpoint
    the model is as the guards deliver it. `base` loads the unedited model, for objectives that learn from it. The model
    is left trained, in train mode, an adapter in place or, with `merge`, in its weights. With `resume` it is saved on
    the way, and goes on from what was saved: `model` must be as it was before the first step. split: see
    `micro_batches`. chat: rows are turns, by the tokenizer's template. A model whose weights have all become NaN or
    infinite is trained no further, and read as it is at the steps that are left. Raises OutOfMemory; UserError if a
    mitigation freezes everything or an adapter does not fit the model.
    """
    from transformers import PrinterCallback, TrainerCallback, set_seed

    plain = switches()
    objective.check_tokenizer(tokenizer)
    trainer, parts = micro_batches(objective, trainer, split)
    arguments = arguments_of(objective, trainer)
    if in_order and arguments["packing"] and arguments["packing_strategy"] != "wrapped":
        raise UserError(
            f"objective: {objective.name}.packing fills packs by the rows' lengths, and a mitigation of the rows has "
            "decided on their order; use packing: null"
        )
    given = training_rows(rows, objective, tokenizer, arguments, chat=chat, positions=max_positions(model))
    given.counts.refuse(0.0, arguments["max_length"])
    set_seed(seed)  # peft draws an adapter's weights when it wraps the model
    if isinstance(adapter, Adapter):
        wrapped = adapter.wrap(model, {"mlp": anatomy.mlp_projections, "attention": anatomy.attention_projections})
    else:
        model.requires_grad_(True)
        wrapped = model
    held = hold(wrapped)
    freeze(wrapped, held.frozen)
    steps = budget.steps if budget.steps is not None else OPEN_END if budget.tokens is not None else -1
    config = config_of(
        objective, trainer, steps=steps, epochs=budget.epochs, in_order=in_order, seed=seed, folder=folder
    )
    together = ranks.size() > 1
    # What is trained may be split among the ranks, what is read must be whole: another copy, which follows at readings.
    trained = copy.deepcopy(wrapped) if together else wrapped
    begun = resume.begun["training"] if resume is not None and resume.begun is not None else None

    drawn_at_once = _prompts_at_once(objective, config)
    if len(given.columns) < drawn_at_once:  # trl would leave the incomplete batch out, and end at step 0
        raise UserError(
            f"tune.data: {objective.name} draws answers to {drawn_at_once} prompts at a time, and there are "
            f"{len(given.columns)} rows; give more rows, or a smaller per_device_train_batch_size"
        )

    resumed = (*begun["resumed"], begun["step"]) if begun is not None else ()

    def save(state: dict[str, Any]) -> None:
        assert resume is not None, "nothing else asks for it"
        resume.save({**state, "seconds": time.perf_counter() - start, "resumed": resumed})
        resume.signals.deliver()

    class Checkpoints(TrainerCallback):
        diverged = False

        @contextmanager
        def delivered(self) -> Iterator[None]:
            """The model as it is to be read."""
            with ExitStack() as stack:
                stack.enter_context(own_forward(model))
                stack.enter_context(switched(plain))
                for guard in held.guards:
                    stack.enter_context(guard.reading())
                try:
                    yield
                except (RuntimeError, MemoryError) as error:
                    if not _no_room(error):
                        raise
                    raise UserError(  # no OutOfMemory: smaller micro-batches would leave a reading as it is
                        f"probes: out of memory at a checkpoint ({_first_line(error)}); use a smaller tokens_per_batch "
                        "of the probes"
                    ) from None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if begun is not None:
                put_back_tallies(trainer_, begun["tallies"])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for guard in held.guards:
                guard.before_step()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for guard in held.guards:
                guard.after_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step, tokens = state.global_step, int(state.num_input_tokens_seen)
            self.diverged = ranks.agreed(not bool(torch.isfinite(trainer_._tr_loss))) and ranks.agreed(
                all(not bool(torch.isfinite(p).all()) for p in trained.parameters() if p.requires_grad)
            )  # of parameters that are shared out each rank may see a part, and all must stop at the same step
            spent = budget.tokens is not None and tokens >= budget.tokens
            ended = control.should_training_stop or spent or step >= state.max_steps or self.diverged
            if step in at or (not budget.fixed and (ended or budget.looks(step))):
                if together:
                    ranks.spread(trainer_, wrapped)
                with self.delivered():
                    # What decides on the end is the model as it is delivered, as what is read of it.
                    ended = ended or (budget.looks(step) and ranks.agreed(ranks.rank() == 0 and budget.stop(step)))
                    if (step in at or (ended and not budget.fixed)) and ranks.rank() == 0:
                        on_checkpoint(step, tokens, model)
                ranks.agreed(True)  # the others wait for what is read
            control.should_training_stop = ended
            if resume is not None and not ended and resume.due():
                control.should_save = savable(trainer_, draws=objective.shuffled_by == "field")
                if not control.should_save:
                    resume.signals.deliver()
            if progress is not None:
                progress(*((tokens, budget.tokens) if budget.tokens is not None else (step, state.max_steps)))

    watch = Checkpoints()
    with (
        warnings.catch_warnings(), _no_bars(), trackers_within(folder, config.report_to),
        model_as_before(model, tokenizer), _memory_told(),
    ):  # fmt: skip
        # torch warns that pinned memory needs an accelerator; on a CPU node there is none, and nothing is lost.
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        # trl 1.16 asks for a property by a name that transformers 5.23 has replaced.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # trl says of each experimental trainer that it may change: whoever asks for one has said that they know.
        warnings.filterwarnings("ignore", message=".*experimental.*")
        try:
            trainer_ = resumable(trainer_of(objective, held.guards, parts), held.guards, begun, save)(
                model=trained,
                args=config,
                train_dataset=dataset_of(given.columns, objective, seed, in_order),
                processing_class=tokenizer,
                callbacks=[watch],
                **objective.extras(trained, config, base),
            )
        except (ValueError, NotImplementedError, ImportError) as error:  # what trl finds wrong when it sees the model
            raise error if isinstance(error, UserError) else UserError(f"tune: {error}") from None
        counts = _all_there(given.counts, trainer_.train_dataset, packed=arguments["packing"])
        trainer_.remove_callback(PrinterCallback)  # our own progress tells how far it is; the log goes into the results
        trainable = {name: p.numel() for name, p in trained.named_parameters() if p.requires_grad}
        assert not trainable.keys() & set(held.frozen), "building the trainer has thawed frozen parameters"
        start = time.perf_counter() - (begun["seconds"] if begun is not None else 0.0)
        with whole_head(config), _precision_seen(trained, config) as precision:
            trainer_.train()
        seconds = time.perf_counter() - start
        if together:
            ranks.spread(trainer_, wrapped)
        state, known = trainer_.state, config_fields(type(config))  # once: resolving the types takes 10 ms
        last = state.max_steps if budget.tokens is None else state.global_step
        unread = [n for n in sorted(at) if watch.diverged and state.global_step < n <= last and ranks.rank() == 0]
        for step in unread:
            with watch.delivered():  # no step would move these weights: they are what it would have left
                on_checkpoint(step, int(state.num_input_tokens_seen), model)
    # A stop signal makes train() return as if all were well.
    if budget.fixed and state.global_step != budget.steps and not watch.diverged:
        raise InterruptedError(f"training stopped at step {state.global_step} of {budget.steps}")
    if merge and wrapped is not model:
        wrapped.merge_and_unload()
    return TuneResult(
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        seconds=seconds,
        frozen=held.frozen,
        trainable=tuple(trainable),
        trainable_count=sum(trainable.values()),
        adapted=adapted_modules(wrapped),
        arguments={k: v for k, v in arguments.items() if k in known},
        log=tuple(entry for entry in state.log_history if "loss" in entry),
        resumed=resumed,
        split=parts,
        diverged=state.global_step if watch.diverged else None,
        rows=asdict(counts),
        precision=precision or None,
    )


def _all_there(counts: RowCounts, dataset: Any, *, packed: bool) -> RowCounts:
    """The counts, with the packs that were made. Raises UserError where the trainer has left out rows of its own."""
    if packed:
        return replace(counts, packs=len(dataset))
    if len(dataset) != counts.left:
        raise UserError(
            f"tune: this version of trl trains on {len(dataset)} of the {counts.left} rows that it was given; use a "
            "larger tune.trainer.max_length, or the version of trl in constraints.txt"
        )
    return counts


def _prompts_at_once(objective: Objective, config: Any) -> int:
    """Prompts in a batch of drawn answers; 1 for an objective that draws none."""
    if objective.shuffled_by != "field":
        return 1
    answers = config.per_device_train_batch_size * config.gradient_accumulation_steps
    answers = getattr(config, "generation_batch_size", answers)
    return int(answers // getattr(config, "num_generations", 1))


def freeze(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Make the named parameters untrainable. Raises UserError when nothing is left to train."""
    chosen = set(names)
    for name, parameter in model.named_parameters():
        if name in chosen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("mitigations: freeze leaves nothing to train; freeze less")


@contextmanager
def _precision_seen(model: PreTrainedModel, config: Any) -> Iterator[dict[str, str]]:
    """Yield what is filled in at the first forward of training: dtypes of the weights and of what is computed.

    weights: of the parameters that train; compute: of autocast, or of the embeddings where there is none; float32: how
    products in float32 are rounded where torch was asked for less (tf32). Looked up within the model's forward, past
    everything that wraps it. Raises UserError where a single process computes in another dtype than was asked for.
    """
    seen: dict[str, str] = {}
    embeddings: Any = model.get_input_embeddings()

    def look(*_: Any) -> None:
        if seen or not torch.is_grad_enabled():  # answers are drawn without gradients, maybe otherwise
            return
        device, own = embeddings.weight.device.type, embeddings.weight.dtype
        mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        weights = sorted({_short(p.dtype) for p in model.parameters() if p.requires_grad})
        seen.update(weights=", ".join(weights), compute=_short(mixed or own))
        seen.update({"float32": kind} if (kind := switches()["float32"]) != "none" else {})
        asked = torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else None
        if ranks.size() == 1 and mixed != asked:
            raise UserError(
                f"tune.trainer: expected mixed precision {_short(asked)} (bf16, fp16), and training uses "
                f"{_short(mixed)}; is ACCELERATE_MIXED_PRECISION set in the environment?"
            )

    handle = embeddings.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def _short(dtype: torch.dtype | None) -> str:
    return "none" if dtype is None else str(dtype).removeprefix("torch.")


@contextmanager
def _memory_told() -> Iterator[None]:
    """What does not fit into memory is told by one kind of error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if _no_room(error):
            raise OutOfMemory(_first_line(error)) from None
        raise


def _no_room(error: Exception) -> bool:
    # On a processor it is a RuntimeError: "DefaultCPUAllocator: can't allocate memory".
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or "MemoryError"


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars that trl and datasets draw for each pass over the rows: our own progress tells how far it is."""
    import datasets

    shown, before = not datasets.are_progress_bars_disabled(), os.environ.get("TQDM_DISABLE")
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
