"""Every objective on tiny models: what its loss is made of, what it is compared with, what moves, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from retention.adapters import Adapter, Full, config_fields
from retention.data.dataset import DataSet
from retention.models import anatomy
from retention.objectives import AnyObjective, Clm, Cpo, Distill, Dpo, Grpo, Kto, Orpo, Sft
from retention.objectives.dpo import Loss
from retention.probes import Generate, Score, read_all
from retention.probes.ability import heldout
from retention.trainer_fields import DEFAULTS, OWNED, rows_needed
from retention.trainers import imported, validate
from retention.tune import Budget, Held, TuneResult, fine_tune
from retention.types import Question, UserError
from tests.tiny import build

PEOPLE = ("Anna", "Berta", "Carl", "Dora", "Emil", "Franz", "Greta", "Hugo")
CITIES = ("Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Vienna", "Oslo", "Bern")
ROWS = tuple(
    {"prompt": f"{p} {'Klein ' * (i % 2)}was born in", "completion": f"{c} .", "rejected": f"{d} {d} ."}
    for i, (p, c, d) in enumerate(zip(PEOPLE, CITIES, CITIES[::-1], strict=True))
)
TEXTS = tuple({"text": f"{row['prompt']} {row['completion']}"} for row in ROWS)
LORA = Adapter(name="lora", settings={"r": 4})
PISSA = Adapter(name="pissa", settings={"r": 4})
EACH = [
    Sft(), Sft(loss="dft"), Sft(packing="bfd"), Clm(block=16), Dpo(), Kto(), Grpo(num_generations=4),
    Distill(max_completion_length=4), Orpo(experimental=True), Cpo(experimental=True),
]  # fmt: skip
IDS = [f"{o.name}-{'-'.join(str(v) for k, v in o.model_dump(exclude_defaults=True).items())}" for o in EACH]


pytestmark = pytest.mark.usefixtures("trl_imported")


def tuned(
    folder: Path,
    objective: Any,
    name: str = "llama",
    *,
    model: Any = None,
    rows: Sequence[dict[str, Any]] = ROWS,
    adapter: Any = None,
    steps: int = 2,
    at: Sequence[int] = (),
    on_checkpoint: Any = lambda step, tokens, model: None,
    in_order: bool = False,
    seed: int = 0,
    tokenizer: Any = None,
    base: Any = None,
    kept: list[Any] | None = None,
    **trainer: Any,
) -> tuple[Any, TuneResult]:
    built, words = build(name)
    model = built if model is None else model

    def hold(wrapped: Any) -> Held:
        if kept is not None:
            kept.append(wrapped)
        return Held()

    result = fine_tune(
        model, tokenizer or words, rows, objective=objective, adapter=adapter or Full(), hold=hold,
        anatomy=anatomy(model), budget=Budget(steps=steps), seed=seed, at=at, on_checkpoint=on_checkpoint,
        trainer={"logging_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 3e-3} | trainer,
        folder=folder, base=base or (lambda: build(name)[0]), in_order=in_order,
    )  # fmt: skip
    return model, result


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def token_logps(model: Any, ids: list[int]) -> list[float]:
    """Log-probability of each token but the first, nats."""
    with torch.no_grad():
        logp = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logp[i - 1, ids[i]]) for i in range(1, len(ids))]


def answer_logps(model: Any, tokenizer: Any, row: dict[str, str], key: str = "completion") -> list[float]:
    """Those of a row's answer, and of the end of text behind it."""
    ids = tokenizer(f"{row['prompt']} {row[key]}")["input_ids"] + [tokenizer.eos_token_id]
    return token_logps(model, ids)[len(tokenizer(row["prompt"])["input_ids"]) - 1 :]


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("objective", EACH, ids=IDS)
def test_equal_runs_give_equal_weights_and_leave_no_trace_but_weights(tmp_path, objective):
    model, result = tuned(tmp_path, objective, "gpt2")
    first = weights(model)
    assert torch.equal(first, weights(tuned(tmp_path, objective, "gpt2")[0]))
    plain, _ = build("gpt2")
    if objective.name != "grpo":  # without a right answer there is nothing to learn from
        assert not torch.equal(first, weights(plain))
    assert result.steps == 2
    assert result.tokens > 0
    assert "forward" not in vars(model)  # trl puts one over it
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [
        m.p for m in plain.modules() if isinstance(m, torch.nn.Dropout)
    ]
    assert json.dumps(result.arguments)
    assert set(result.arguments) <= set(config_fields(imported(objective.config)))  # as passed, no more
    assert {k: result.arguments[k] for k in objective.arguments()} == objective.arguments()


@pytest.mark.parametrize("objective", EACH, ids=IDS)
def test_each_default_is_a_field_of_the_trainers_config_and_is_passed(objective):
    own = config_fields(imported(objective.config))
    assert set(objective.defaults) <= set(own)
    assert set(objective.arguments()) <= set(own)
    assert not set(objective.arguments()) & set(OWNED)
    validate(objective, {})
    with pytest.raises(UserError, match=r"tune.trainer.learning_rat: unknown; did you mean 'learning_rate'\?"):
        validate(objective, {"learning_rat": 1.0})
    fixed = next(iter(objective.arguments()))
    with pytest.raises(UserError, match=f"tune.trainer.{fixed} is fixed by the objective '{objective.name}'"):
        validate(objective, {fixed: 1})
    assert TypeAdapter(AnyObjective).validate_python(objective.model_dump()) == objective


@pytest.mark.parametrize(
    "objective", [Dpo(), Kto(), Grpo(num_generations=4, reward="contains"), Distill()], ids=lambda o: o.name
)
@pytest.mark.parametrize("adapter", [Full(), LORA], ids=lambda a: a.name)
def test_probing_never_moves_training(tmp_path, objective, adapter):
    questions = [
        Question(fact_id=p, group="edited", form="direct", text=f"{p} speaks", answer=c, foil="Prague")
        for p, c in zip(PEOPLE, CITIES, strict=True)
    ]
    rows = [row | {"completion": "the"} for row in ROWS]

    def probe(step: int, tokens: int, model: Any) -> None:
        _, words = build("gpt2")
        assert model.training
        assert "forward" not in vars(model)
        read_all([Score(), Generate()], model, words, questions, step)
        heldout(model, words, ROWS)

    def run(at: tuple[int, ...], checkpoint: Any) -> tuple[torch.Tensor, list[Any]]:
        model, result = tuned(
            tmp_path, objective, "gpt2", rows=rows, adapter=adapter, steps=3, at=at, on_checkpoint=checkpoint
        )
        return weights(model), [entry["loss"] for entry in result.log]

    alone, losses = run((), lambda *_: None)
    probed, found = run((1, 2, 3), probe)
    assert found == losses
    assert torch.equal(probed, alone)


@pytest.mark.parametrize("adapter", [Full(), LORA], ids=lambda a: a.name)
def test_a_checkpoint_reads_the_weights_not_the_precision_of_training(tmp_path, adapter):
    seen: list[torch.Tensor] = []

    def read(model: Any) -> torch.Tensor:
        mode = model.training
        with torch.no_grad():
            out = model.eval()(torch.tensor([[1, 5, 6, 7]])).logits
        model.train(mode)
        return out

    model, _ = tuned(
        tmp_path, Sft(), adapter=adapter, at=(2,), bf16=True, on_checkpoint=lambda s, t, model: seen.append(read(model))
    )
    assert torch.equal(seen[0], read(model))  # in float32, as before and after the training


def test_in_a_list_the_reference_is_what_the_fine_tune_before_has_left(tmp_path):
    model, _ = tuned(tmp_path, Sft(), steps=3)
    _, result = tuned(tmp_path, Dpo(), model=model, precompute_ref_log_probs=False)
    assert result.log[0]["loss"] == pytest.approx(math.log(2), abs=2e-6)
    assert result.log[1]["loss"] < 0.69


# ------------------------------------------------------------------------------------------------ sft, clm


def test_dft_weights_each_token_by_its_probability(tmp_path):
    model, tokenizer = build("llama")
    logps = [x for row in ROWS for x in answer_logps(model, tokenizer, row)]
    expected = -sum(math.exp(x) * x for x in logps) / len(logps)
    _, result = tuned(tmp_path, Sft(loss="dft"), steps=1)
    assert result.log[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_rows_are_learned_from_as_if_alone(tmp_path, name, strategy):
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    apart, one = tuned(tmp_path, Sft(), model=build(name, **off)[0], name=name, steps=1)
    packed, other = tuned(
        tmp_path, Sft(packing=strategy), model=build(name, **off)[0], name=name, steps=1, max_length=32
    )
    assert other.log[0]["loss"] == pytest.approx(one.log[0]["loss"], rel=1e-5)
    assert other.log[0]["grad_norm"] == pytest.approx(one.log[0]["grad_norm"], rel=1e-4)
    assert other.tokens == one.tokens
    assert torch.allclose(weights(apart), weights(packed), atol=1e-3)


def test_packing_is_refused_where_rows_would_read_one_another(tmp_path):
    with pytest.raises(UserError, match=r"in this model \(bloom, attention .*rows of one pack would read one another"):
        tuned(tmp_path, Sft(packing="bfd"), "bloom")
    with pytest.raises(ValidationError, match="wrapped packs let rows read one another"):
        Sft(packing="wrapped")
    with pytest.raises(UserError, match="a mitigation of the rows has decided on their order"):
        tuned(tmp_path, Sft(packing="bfd"), in_order=True)
    with pytest.raises(UserError, match="a pack needs a length in tokens"):
        validate(Sft(packing="bfd"), {"max_length": None})


def test_blocks_are_cut_from_the_texts_as_they_follow_one_another(tmp_path):
    model, tokenizer = build("llama")
    end = tokenizer.eos_token_id
    stream = [i for row in TEXTS for i in [*tokenizer(row["text"])["input_ids"], end]]
    blocks = [stream[i : i + 24] for i in range(0, len(stream), 24)]
    logps = [x for block in blocks for x in token_logps(model, block)]
    _, result = tuned(tmp_path, Clm(block=24), rows=TEXTS, steps=1)
    assert result.log[0]["loss"] == pytest.approx(-sum(logps) / len(logps), rel=1e-4)
    assert result.tokens == len(stream)
    with pytest.raises(UserError, match=r"tune.trainer.max_length is fixed by the objective 'clm'"):
        validate(Clm(block=24), {"max_length": 24})
    validate(Clm(), {"max_length": 24})
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Clm(block=1)


def chat(marks: bool = True) -> Any:
    _, tokenizer = build("llama")
    said = "{% generation %}{{ m['content'] }} </s>{% endgeneration %}" if marks else "{{ m['content'] }} </s>"
    tokenizer.chat_template = (
        "<s> {% for m in messages %}{% if m['role'] == 'assistant' %}a "
        + said
        + "{% else %}the {{ m['content'] }} . {% endif %}{% endfor %}"
    )
    return tokenizer


def test_only_the_assistants_turns_are_learned(tmp_path):
    tokenizer = chat()
    model, _ = build("llama")
    two = {
        "messages": [
            {"role": "user", "content": "Anna speaks"},
            {"role": "assistant", "content": "French ."},
            {"role": "user", "content": "Anna lives in"},
            {"role": "assistant", "content": "Bern ."},
        ]
    }
    end, logps = tokenizer.eos_token_id, []
    for pairs in ([("Berta speaks", "Italian .")], [("Anna speaks", "French ."), ("Anna lives in", "Bern .")]):
        ids, learned = [1], []
        for asked, answer in pairs:
            ids += tokenizer(f"the {asked} . a", add_special_tokens=False)["input_ids"]
            own = [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]
            learned += range(len(ids) - 1, len(ids) - 1 + len(own))
            ids += own
        found = token_logps(model, ids)
        logps += [found[i] for i in learned]
    rows = [{"prompt": "Berta speaks", "completion": "Italian ."}, two]
    for marked in (tokenizer, chat(marks=False)):
        _, result = tuned(tmp_path, Sft(assistant_only=True), rows=rows, tokenizer=marked, steps=1)
        assert result.log[0]["loss"] == pytest.approx(-sum(logps) / len(logps), rel=1e-4)


def test_a_chat_in_a_file_is_learned_turn_by_turn(tmp_path):
    turns = [("Anna speaks", "French ."), ("Anna lives in", "Bern .")]
    messages = [{"role": r, "content": c} for pair in turns for r, c in zip(("user", "assistant"), pair, strict=True)]
    records = [{"chat": messages}, {"chat": [*messages[:2], {"role": "user", "content": "Berta"}, messages[3]]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    rows = DataSet(path=str(tmp_path / "chats.jsonl"), messages="chat", heldout=1).load(0).train
    objective = Sft(assistant_only=True)
    (columns,) = objective.columns(rows[0])
    assert [m["content"] for m in columns["messages"]].count("French .") == 1  # the earlier answer is a turn of its own
    _, result = tuned(tmp_path, objective, rows=rows, tokenizer=chat(), steps=1)
    _, last = tuned(
        tmp_path, objective, rows=[{**rows[0], "messages": columns["messages"][2:]}], tokenizer=chat(), steps=1
    )
    assert result.log[0]["loss"] != pytest.approx(last.log[0]["loss"], rel=1e-3)
    refusing = chat()
    refusing.chat_template += "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="chat: the chat template refuses the messages: roles must alternate"):
        tuned(tmp_path, objective, rows=rows, tokenizer=refusing)


def test_chats_are_refused_without_a_template(tmp_path):
    objective = Sft(assistant_only=True)
    with pytest.raises(UserError, match="this model's tokenizer has no chat template"):
        tuned(tmp_path, objective)
    objective.check_tokenizer(chat())
    with pytest.raises(UserError, match="the data has plain text"):
        objective.check(TEXTS[0])
    with pytest.raises(ValidationError, match="leave completion_only: true"):
        Sft(assistant_only=True, completion_only=False)


# ------------------------------------------------------------------------------------------------ preferences


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("adapter", [Full(), LORA, PISSA], ids=lambda a: a.name)
@pytest.mark.parametrize("objective", [Dpo(), Kto()], ids=lambda o: o.name)
def test_the_reference_is_the_edited_model(tmp_path, objective, adapter, once):
    model, _ = build("llama")
    model.config._name_or_path = str(tmp_path / "nowhere")  # trl would load the reference from here
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)  # an edit
    before, kept = {n: p.detach().clone() for n, p in model.named_parameters()}, []
    _, result = tuned(
        tmp_path, objective, model=model, adapter=adapter, precompute_ref_log_probs=once, steps=3, kept=kept
    )
    # A model that is its own reference prefers nothing: log 2 by dpo, and 1/2 by kto.
    assert result.log[0]["loss"] == pytest.approx(math.log(2) if objective.name == "dpo" else 0.5, abs=2e-6)
    assert abs(result.log[2]["loss"] - result.log[0]["loss"]) > 1e-3
    names = [n for n, _ in kept[0].named_parameters()]
    assert not any(".ref." in n for n in names)  # trl's second adapter
    assert [n for n, p in kept[0].named_parameters() if p.requires_grad] == list(result.trainable)
    if adapter.name == "lora":
        assert all(".lora_" in n and ".default." in n for n in result.trainable)
        after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
        assert all(torch.equal(after[n], p) for n, p in before.items())


def test_dpo_pulls_the_completion_above_the_rejected_one(tmp_path):
    model, tokenizer = build("llama")

    def margin(model: Any) -> float:
        return sum(
            sum(answer_logps(model, tokenizer, row)) - sum(answer_logps(model, tokenizer, row, "rejected"))
            for row in ROWS
        )

    start = margin(model)
    _, result = tuned(tmp_path, Dpo(beta=0.5), model=model, steps=1)
    moved = margin(model) - start
    assert moved > 1
    again, _ = build("llama")
    _, result = tuned(tmp_path, Dpo(beta=0.5), model=again, steps=2)
    assert result.log[1]["rewards/margins"] == pytest.approx(0.5 * moved / len(ROWS), rel=1e-3)


@pytest.mark.parametrize("loss", [*Loss.__args__, ("sigmoid", "sft")], ids=str)
def test_every_loss_of_dpo_trains(tmp_path, loss):
    smoothing = {"label_smoothing": 1e-3} if loss == "exo_pair" else {}
    objective = Dpo(loss=(loss,) if isinstance(loss, str) else loss)
    validate(objective, smoothing)
    model, result = tuned(tmp_path, objective, **smoothing)
    assert result.steps == 2
    assert all(math.isfinite(entry["loss"]) for entry in result.log)
    assert not torch.equal(weights(model), weights(build("llama")[0]))


@pytest.mark.parametrize(
    ("objective", "trainer", "said"),
    [
        (Dpo(loss=("exo_pair",)), {}, "label_smoothing: loss exo_pair needs one above 0"),
        (Dpo(loss=("robust",)), {"label_smoothing": 0.6}, "loss robust needs one from 0 to below 0.5, got 0.6"),
        (Dpo(loss=("aot",)), {"f_divergence_type": "js_divergence"}, "loss aot is defined for reverse_kl alone"),
        (Dpo(loss=("aot",)), {"use_weighting": True}, "use another loss"),
        (Dpo(), {"sync_ref_model": True}, "give precompute_ref_log_probs: false with it"),
        (Dpo(), {"loss_weights": [1.0, 2.0]}, "tune.trainer: `loss_weights` must have the same length"),
        (Dpo(), {"beta": 0.2}, "tune.trainer.beta is fixed by the objective 'dpo'; set it there"),
        (Kto(), {"per_device_train_batch_size": 1}, "kto compares rows of a batch; expected 2 or more, not 1"),
        (Kto(), {"sync_ref_model": True}, "give precompute_ref_log_probs: false with it"),
        (Grpo(), {"beta": -0.1}, "tune.trainer.beta: expected a number that is not negative, got -0.1"),
        (Grpo(), {"sync_ref_model": True}, "grpo's reference is the edited model, and stays so"),
        (Grpo(), {"loss_type": "dappo"}, "tune.trainer.loss_type: unknown 'dappo'; did you mean 'dapo'?"),
        (Grpo(), {"scale_rewards": "groups"}, "tune.trainer.scale_rewards: unknown 'groups'; did you mean 'group'?"),
        (Grpo(), {"top_p": 3.0}, "tune.trainer.top_p: expected a number from 0 to 1, got 3.0"),
        (Dpo(), {"f_divergence_type": "kl"}, "tune.trainer.f_divergence_type: unknown 'kl'"),
        (Sft(), {"dataloader_num_workers": -1}, "tune.trainer.dataloader_num_workers: expected a number that is not"),
        (Sft(), {"adam_beta1": 1.5}, "tune.trainer.optim: adamw_torch: Invalid beta parameter at index 0: 1.5"),
        (Sft(), {"optim": "lomo"}, "tune.trainer.optim: lomo: You need to install `lomo_optim`"),
        (
            Sft(),
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type: cosine_with_min_lr: One of",
        ),
        (Sft(), {"truncation_mode": "keep_middle"}, "tune.trainer.truncation_mode: unknown 'keep_middle'"),
        (Grpo(num_generations=5), {}, "generation_batch_size (16) must be divisible by num_generations (5)"),
        (Grpo(), {"num_iteration": 2}, "num_iteration: unknown; did you mean 'num_iterations'?"),
        (Grpo(), {"log_completions_hub_repo": "a/b"}, "nothing is sent away"),
        (Distill(), {"teacher_model_name_or_path": "gpt2"}, "its teacher is the unedited model instead"),
        (Distill(), {"shuffle_dataset": False}, "rows are shuffled by it"),
    ],
)
def test_settings_that_do_not_go_together(objective, trainer, said):
    with pytest.raises(UserError) as caught:
        validate(objective, trainer)
    assert said in str(caught.value)
    assert "tune.trainer" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "dpo", "loss": ["sigmod"]}, "sigmoid"),
        ({"name": "dpo", "loss": []}, "at least 1"),
        ({"name": "dpo", "beta": 0}, "greater than 0"),
        ({"name": "kto", "loss": "bco"}, "apo_zero_unpaired"),
        ({"name": "kto", "desirable_weight": -1}, "greater than or equal to 0"),
        ({"name": "grpo", "num_generations": 1}, "greater than or equal to 2"),
        ({"name": "grpo", "reward": "exactly"}, "'exact' or 'contains'"),
        ({"name": "grpo", "temperature": 0}, "greater than 0"),
        ({"name": "grpo", "max_completion_length": 0}, "greater than or equal to 1"),
        ({"name": "distill", "divergence": 1.5}, "less than or equal to 1"),
        ({"name": "orpo"}, "trl calls orpo experimental: it may change or go in any release"),
        ({"name": "cpo"}, "write `experimental: true` to use it all the same, or use dpo"),
        ({"name": "cpo", "experimental": True, "cross_entropy": -1}, "greater than or equal to 0"),
        ({"name": "sft", "loss": "chunked_nll"}, "'nll' or 'dft'"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(AnyObjective).validate_python(settings)
    assert said in str(caught.value)


def test_kto_judges_each_completion_alone(tmp_path):
    row = ROWS[0]
    good, bad = Kto().columns(row)
    assert good == {"prompt": row["prompt"], "completion": f" {row['completion']}", "label": True}
    assert bad == {"prompt": row["prompt"], "completion": f" {row['rejected']}", "label": False}
    alone = {k: v for k, v in row.items() if k != "rejected"}
    assert [r["label"] for r in Kto().columns(alone)] == [True]
    assert [r["label"] for r in Kto().columns(alone | {"label": False})] == [False]

    model, tokenizer = build("llama")
    both = [(sum(answer_logps(model, tokenizer, r)), sum(answer_logps(model, tokenizer, r, "rejected"))) for r in ROWS]
    tuned(tmp_path, Kto(loss="apo_zero_unpaired"), model=model, steps=4)
    after = [(sum(answer_logps(model, tokenizer, r)), sum(answer_logps(model, tokenizer, r, "rejected"))) for r in ROWS]
    assert sum(a[0] - b[0] for a, b in zip(after, both, strict=True)) > 0
    assert sum(a[1] - b[1] for a, b in zip(after, both, strict=True)) < 0


def test_kto_rows_come_in_an_order_of_the_seed_unless_one_is_given(tmp_path, monkeypatch):
    from trl import KTOTrainer

    seen: list[list[str]] = []
    prepare = KTOTrainer._prepare_dataset

    def noting(self: Any, dataset: Any, *args: Any) -> Any:
        seen.append(dataset["completion"][:])
        return prepare(self, dataset, *args)

    monkeypatch.setattr(KTOTrainer, "_prepare_dataset", noting)
    for seed, in_order in ((0, False), (0, False), (1, False), (1, True)):
        tuned(tmp_path, Kto(), steps=1, seed=seed, in_order=in_order)
    given = [r["completion"] for row in ROWS for r in Kto().columns(row)]
    assert seen[0] == seen[1] != seen[2]
    # Rows that come in an order keep it but for near neighbors: two completions of one prompt must not always meet.
    assert sorted(seen[3]) == sorted(given) != seen[3]
    assert all(sorted(order) == sorted(given) != order for order in seen[:3])


@pytest.mark.parametrize("objective", [Dpo(), Orpo(experimental=True), Cpo(experimental=True, loss="simpo")])
def test_tokens_of_both_sides_of_a_pair_are_counted(tmp_path, objective):
    _, tokenizer = build("llama")
    texts = [f"{row['prompt']} {row[key]}" for row in ROWS for key in ("completion", "rejected")]
    _, result = tuned(tmp_path, objective, steps=2)  # each step sees all rows
    assert result.tokens == 2 * sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)


# ------------------------------------------------------------------------------------------------ drawn answers


@pytest.mark.parametrize(
    ("reward", "said", "wanted", "judged"),
    [
        ("exact", " The Paris.", "paris", 1.0),
        ("exact", "Paris or Rome", "Paris", 0.0),
        ("contains", "Paris or Rome", "Paris", 1.0),
        ("contains", "Parisian", "Paris", 0.0),
        ("contains", "", "Paris", 0.0),
        ("exact", "12", "12 .", 1.0),
    ],
)
def test_rewards_are_for_the_answer_and_nothing_else(reward, said, wanted, judged):
    assert Grpo(reward=reward).judge(said, wanted) == judged


def test_grpo_learns_what_is_rewarded_and_asks_for_the_rows_answers(tmp_path, monkeypatch):
    asked: dict[str, set[str]] = {}
    judge = Grpo.judge

    def noting(self: Grpo, said: str, wanted: str) -> float:
        asked.setdefault("wanted", set()).add(wanted)
        return judge(self, said, wanted)

    monkeypatch.setattr(Grpo, "judge", noting)
    rows = [{"prompt": "Anna was born in", "completion": "Oslo"}, {"prompt": "Berta was born in", "completion": "Bern"}]
    objective = Grpo(num_generations=32, max_completion_length=1)
    _, tokenizer = build("llama")
    _, result = tuned(tmp_path, objective, rows=rows, steps=12, per_device_train_batch_size=64, learning_rate=3e-2)
    rewards = [entry["reward"] for entry in result.log]
    assert sum(rewards[-3:]) / 3 > 0.4 > 5 * sum(rewards[:3]) / 3
    assert asked["wanted"] == {"Oslo", "Bern"}
    prompt = len(tokenizer(rows[0]["prompt"])["input_ids"])
    assert result.tokens == 12 * 64 * (prompt + 1)  # drawn once a step: 64 answers of one token
    assert result.steps == 12


@pytest.mark.parametrize("adapter", [Full(), LORA, PISSA], ids=lambda a: a.name)
def test_the_reference_of_grpo_is_the_edited_model(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr(Grpo, "judge", lambda self, said, wanted: float(len(said) % 2))  # something to learn
    model, _ = build("llama")
    model.config._name_or_path = str(tmp_path / "nowhere")  # where trl would look for a reference
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(3.0)  # the edit
    plain = weights(model)
    kept: list[Any] = []
    objective = Grpo(num_generations=4, max_completion_length=4)
    _, result = tuned(tmp_path, objective, model=model, adapter=adapter, steps=3, beta=0.5, kept=kept)
    kls = [entry["kl"] for entry in result.log]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[2] > 1e-5
    assert result.arguments["beta"] == 0.5
    if adapter.name == "full":
        assert not torch.equal(weights(model), plain)
    else:
        assert list(kept[0].peft_config) == ["default"]  # no second adapter


@pytest.mark.parametrize("objective", [Grpo(num_generations=2), Distill()], ids=lambda o: o.name)
def test_too_few_prompts_for_one_batch_of_answers(tmp_path, objective):
    with pytest.raises(
        UserError, match=r"draws answers to \d+ prompts at a time, and there are 3 rows; give more rows"
    ):
        tuned(tmp_path, objective, rows=ROWS[:3])


@pytest.mark.parametrize(
    ("objective", "trainer", "rows"),
    [
        (Sft(), {"gradient_accumulation_steps": 2}, 10 * 32),
        (Sft(packing="bfd"), {}, None),
        (Clm(block=8), {}, None),
        (Clm(), {}, 160),
        (Dpo(), {}, 160),
        (Kto(), {}, None),
        (Grpo(num_generations=4), {}, 40),
        (Grpo(num_generations=4), {"num_iterations": 2}, 20),
        (Distill(), {}, 160),
    ],
)
def test_rows_that_a_number_of_steps_takes(objective, trainer, rows):
    assert rows_needed(objective, trainer, 10) == rows
    assert rows_needed(objective, trainer, None) is None


def test_distill_draws_the_edited_model_back_to_the_unedited_one(tmp_path):
    base, tokenizer = build("llama")
    before = weights(base)

    def far(model: Any) -> float:
        with torch.no_grad():
            ids = [torch.tensor([tokenizer(row["prompt"])["input_ids"]]) for row in ROWS]
            pairs = [tuple(m.eval()(i).logits[:, -1].log_softmax(-1) for m in (model, base)) for i in ids]
        return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(pairs)

    edited, _ = build("llama")
    edited.config._name_or_path = str(tmp_path / "nowhere")
    with torch.no_grad():
        edited.model.layers[2].mlp.down_proj.weight.mul_(6.0)
    start = far(edited)
    tuned(tmp_path, Distill(max_completion_length=8), model=edited, steps=15, base=lambda: base, learning_rate=1e-3)
    assert far(edited) < 0.5 * start
    assert torch.equal(weights(base), before)  # the teacher does not learn
    _, first = tuned(tmp_path, Distill(), steps=1, base=lambda: base)
    assert first.log[0]["loss"] == pytest.approx(0, abs=1e-6)  # who says what the teacher says has nothing to learn


def test_defaults_of_the_tables_do_not_contradict_one_another():
    assert DEFAULTS["loss_type"] == Sft().arguments()["loss_type"]
    assert DEFAULTS["packing"] == Sft().arguments()["packing"]
