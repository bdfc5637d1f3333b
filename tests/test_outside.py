"""Edits and probes outside a study: an edited folder gives the readings a study would store; taking out is exact."""

import contextlib
import io
import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import retention
from retention.cli import main
from retention.deltas import load_delta, revert, save_delta, write_edited
from retention.models import load_model
from retention.outside import ProbeCallback, edit_model, editor_of, probe_model
from retention.probes import Generate, Score, read_all
from retention.store import ROWS
from retention.types import Delta, LowRank, Question, UserError
from retention.world import WorldModel
from tests.small_study import WORLD

EDITS = [("Anna Klein", "Paris", "Rome"), ("Berta Vogel", "Berlin", "Madrid"), ("Carl Keller", "Oslo", "Bern")]
LORA = "{name: lora, epochs: 30, lr: 0.01, keep_anchors: 0, stop_loss: 0.0}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny.save("llama", folder)
    return folder


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "edits.jsonl"
    records = [
        {"subject": s, "relation": "born", "object": o, "target_new": n, "prompt": "{} was born in"}
        for s, o, n in EDITS
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_edit_put_into_a_folder_comes_out_bit_for_bit(model, tmp_path, dtype):
    loaded = load_model(model)
    name = "model.layers.1.mlp.down_proj.weight"
    before = loaded.model.get_parameter(name).detach().clone()
    rows, columns = before.shape
    generator = torch.Generator().manual_seed(0)
    update = LowRank(torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator) * 0.01)
    delta = Delta({name: update})
    write_edited(loaded, delta, tmp_path / "edited", dtype)
    assert torch.equal(loaded.model.get_parameter(name), before)
    stored = load_file(tmp_path / "edited" / "model.safetensors")[name]
    assert stored.dtype == getattr(torch, dtype)
    assert torch.equal(stored, (before + update.dense()).to(stored.dtype))
    revert(tmp_path / "edited", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    first = load_file(model / "model.safetensors")
    assert first.keys() == back.keys()
    assert all(torch.equal(first[k].to(back[k].dtype), back[k]) for k in first)


def test_subtraction_alone_would_not_be_exact(model):
    """Why the folder keeps more than the factors."""
    weight = load_model(model).model.get_parameter("model.layers.1.mlp.down_proj.weight").detach()
    update = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    assert ((weight + update) - update != weight).any()


def test_a_fine_tuned_folder_is_not_reverted(model, tmp_path):
    loaded = load_model(model)
    name = "model.layers.0.mlp.down_proj.weight"
    write_edited(loaded, Delta({name: torch.ones_like(loaded.model.get_parameter(name))}), tmp_path / "edited")
    moved = load_model(tmp_path / "edited").model
    with torch.no_grad():
        moved.get_parameter(name)[0, 0] += 1
    moved.save_pretrained(tmp_path / "edited")
    with pytest.raises(UserError, match="fine-tuned since"):
        revert(tmp_path / "edited", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_second_edit_never_takes_the_place_of_the_first(model, edits, tmp_path):
    loaded = load_model(model)
    name = "model.layers.0.mlp.down_proj.weight"
    delta = Delta({name: torch.ones_like(loaded.model.get_parameter(name))})
    write_edited(loaded, delta, tmp_path / "edited")
    again = "holds an edit already.*retention revert .*edited --out"
    with pytest.raises(UserError, match=again):
        write_edited(load_model(tmp_path / "edited"), delta, tmp_path / "twice")
    with pytest.raises(UserError, match=again):
        edit_model(str(tmp_path / "edited"), LORA, edits, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    revert(tmp_path / "edited", tmp_path / "back")
    write_edited(load_model(tmp_path / "back"), delta, tmp_path / "twice")  # what was taken out leaves no trace


def test_a_folder_without_an_edit_is_not_reverted(model, tmp_path):
    with pytest.raises(UserError, match=r"lama: no such folder; did you mean .*llama\?; expected one that"):
        revert(model.parent / "lama", tmp_path / "back")
    with pytest.raises(UserError, match="holds no edit to take out"):
        revert(model, tmp_path / "back")


def test_the_edited_folder_reads_as_the_edited_model_in_memory(model, edits, tmp_path):
    report = edit_model(str(model), LORA, edits, tmp_path / "edited")
    assert report["efficacy"] == 1.0
    assert report["lost"] == 0.0
    edit_model(str(model), LORA, edits, tmp_path / "delta.safetensors", delta_only=True)
    delta, soft_prompt = load_delta(tmp_path / "delta.safetensors")
    assert soft_prompt is None
    pairs = probe_model(str(tmp_path / "edited"), edits, tmp_path / "rows.parquet")
    base = load_model(model)
    asked = [question for question, _ in pairs]
    with delta.applied(base.model):
        again = read_all([Score(), Generate()], base.model, base.tokenizer, asked, 0)
    assert again == [reading for _, reading in pairs]
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert list(rows.columns) == ROWS.names
    assert rows["all_correct"].all()
    questions = pd.read_parquet(tmp_path / "rows-questions.parquet")
    assert set(questions["question_id"]) == set(rows["question_id"])


def test_an_edit_of_a_study_put_into_a_folder_gives_the_readings_that_the_study_stored(finished, cache, tmp_path):
    """By plain transformers, one question at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = retention.load(finished / "small")
    rows = rows[(rows["editor"] == "rome") & (rows["step"] == 0)].drop_duplicates("question_id")
    questions = pd.read_parquet(next((finished / "bases").glob("*/questions.parquet"))).set_index("question_id")
    delta = finished / "edits" / rows["edit_id"].iloc[0] / "delta.safetensors"
    main_ok(["apply", str(delta), str(WorldModel.model_validate(WORLD).folder(cache)), "--out", str(tmp_path / "e")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "e").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "e")
    assert len(rows) > 20
    for row in rows.iloc[::3].itertuples():
        asked = questions.loc[row.question_id]
        start = len(tokenizer(asked["text"])["input_ids"])
        ids = tokenizer(f"{asked['text']} {asked['answer']}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        said = sum(float(logp[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
        assert said == pytest.approx(row.logp_target, abs=1e-4)


def test_the_command_line_does_the_same(model, edits, tmp_path, capsys):
    main_ok(
        [
            "edit",
            str(model),
            "--editor",
            LORA,
            "--edits",
            str(edits),
            "--out",
            str(tmp_path / "d.safetensors"),
            "--delta",
        ]
    )
    main_ok(["apply", str(tmp_path / "d.safetensors"), str(model), "--out", str(tmp_path / "edited")])
    main_ok(["revert", str(tmp_path / "edited"), "--out", str(tmp_path / "back")])
    first, back = (load_file(f / "model.safetensors") for f in (model, tmp_path / "back"))
    assert all(torch.equal(first[k], back[k]) for k in first)
    main_ok(
        [
            "probe",
            str(tmp_path / "edited"),
            "--facts",
            str(edits),
            "--out",
            str(tmp_path / "r.parquet"),
            "--no-generate",
        ]
    )
    assert "edited       direct     1.000 right of 3" in capsys.readouterr().out


def main_ok(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code


@pytest.mark.parametrize(
    ("editor", "message"),
    [
        ("roem", "--editor: unknown name 'roem'; did you mean 'rome'"),
        ("{name: rome, layr: 1}", "--editor: layr: unknown key; did you mean 'layer'"),
        ("{name: rome, layer: one}", "layer: input should be a valid integer"),
        ("{name: rome, layer: '1'}", "layer: input should be a valid integer"),
        ("{name: rome, layer: true}", "layer: input should be a valid integer"),
        ("{name: rome, layer: -1}", "layer: input should be greater than or equal to 0"),
        ("{name: rome, layer: 1, v_lr: .inf}", "v_lr: expected a finite number"),
        ("{name: rome, layer: 1, context_lengths: [0]}", "context_lengths[0]: input should be greater"),
        ("{name: memit, covariance: {tokenz: 1}}", "covariance.tokenz: unknown key; did you mean 'tokens'"),
        ("{name: ft, postprocess: [{name: rectt}]}", "postprocess[0]: unknown name 'rectt'; did you mean 'rect'"),
        ("{name: ft, norm_constraint: 0}", "norm_constraint: input should be greater than 0"),
        ("{name: ft, layer: -1}", "layer: input should be greater than or equal to 0"),
        ("{name: freeze_tuning, layers: []}", "layers: tuple should have at least 1 item"),
        ("{name: lora, layers: []}", "layers: tuple should have at least 1 item"),
        ("{name: lora, targets: []}", "targets: tuple should have at least 1 item"),
        ("{name: lora, method: loora}", "--editor: unknown adapter 'loora'; did you mean 'lora'"),
        ("[rome]", "expected a name or a mapping"),
        ("{name: rome", "expected a name or a mapping"),
        ("", "expected a name or a mapping"),
    ],
)
def test_a_wrong_editor_is_told(editor, message):
    with pytest.raises(UserError, match=re.escape(message)):
        editor_of(editor)


ROME = "{name: rome, layer: 1, covariance: {tokens: 0}, context_lengths: [], v_steps: 2}"


def test_a_name_that_cannot_be_written_is_told_before_any_work(model, edits, tmp_path, monkeypatch):
    monkeypatch.setattr("retention.outside.load_model", None)
    monkeypatch.setattr("retention.models.load_model", None)
    monkeypatch.setattr("retention.deltas.load_model", None)
    d = tmp_path / "d.safetensors"
    save_delta(d, Delta({"model.layers.0.mlp.down_proj.weight": torch.ones(2, 2)}))
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "retention_delta.safetensors").write_bytes(d.read_bytes())
    verbs = [
        ["edit", model, "--edits", edits, "--editor", ROME],
        ["edit", model, "--edits", edits, "--editor", ROME, "--delta"],
        ["apply", d, model],
        ["revert", edited],
        ["layers", model, "--facts", edits],
    ]
    for verb in verbs:
        for out, told in ((edits, "exists already"), (edits / "x", "cannot be made"), ("y" * 300, "cannot be made")):
            assert told in refused([*verb, "--out", out]), verb
    for out, told in ((edits, "a parquet file"), (tmp_path, "a parquet file"), (edits / "r.parquet", "cannot be made")):
        assert told in refused(["probe", model, "--facts", edits, "--out", out])
    (tmp_path / "r.parquet").touch()
    assert "exists already" in refused(["probe", model, "--facts", edits, "--out", tmp_path / "r.parquet"])
    assert "no weight" in refused(["edit", model, "--edits", edits, "--editor", "ptuning", "--out", tmp_path / "p"])


def refused(arguments):
    """The message of a command that is refused with exit code 2."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2, error.getvalue()
    return error.getvalue()


def test_an_update_for_other_weights_is_told(model, edits, tmp_path, capsys):
    d, other = tmp_path / "d.safetensors", tiny.save("llama", tmp_path / "other", seed=1)
    main_ok(["edit", str(model), "--editor", ROME, "--edits", str(edits), "--out", str(d), "--delta"])
    main_ok(["apply", str(d), str(model), "--out", str(tmp_path / "a")])
    assert "other weights" not in capsys.readouterr().err
    main_ok(["apply", str(d), str(other), "--out", str(tmp_path / "b")])
    assert "made for a model with other weights" in capsys.readouterr().err


def test_damaged_updates_are_named(model, edits, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    whole = {f"{name}:left": torch.ones(32, 2), f"{name}:right": torch.ones(2, 64)}
    wrong = [
        ({f"{name}:left": torch.ones(32, 2)}, "do not fit each other"),
        ({f"{name}:right": torch.ones(2, 64)}, "do not fit each other"),
        (whole | {f"{name}:left": torch.ones(32, 5)}, "do not fit each other"),
        (whole | {f"{name}:left": torch.ones(32)}, "do not fit each other"),
        (whole | {f"{name}:left": torch.full((32, 2), torch.nan)}, "not finite"),
        ({}, "holds no update"),
    ]
    d = tmp_path / "d.safetensors"
    for tensors, told in wrong:
        save_file(tensors, d, {"format": "retention-delta"})
        assert told in refused(["apply", d, model, "--out", tmp_path / "x"])
    save_delta(d, Delta({name: LowRank(*whole.values())}))
    main_ok(["apply", str(d), str(model), "--out", str(tmp_path / "edited")])
    record = tmp_path / "edited" / "retention_delta.safetensors"
    kept, meta = load_file(record), {"format": "retention-delta", "dtype": "float32"}
    far = {f"{name}:undo_index": torch.tensor([10**9]), f"{name}:undo_value": torch.ones(1)}
    without = {key: value for key, value in kept.items() if not key.endswith("undo_hash")}
    for tensors, told in (
        (kept | far, "has another shape"),
        (kept | {f"{name}:left": torch.ones(3, 2)}, "has another shape"),
        (kept | {"no.such.weight": torch.ones(2)}, "the model has no no.such.weight"),
        (without, "does not say how to take"),
    ):
        save_file(tensors, record, meta)
        assert told in refused(["revert", tmp_path / "edited", "--out", tmp_path / "x"])
    assert not (tmp_path / "x").exists()


def test_texts_longer_than_the_model_are_named(tmp_path):
    folder, edits = tiny.save("gpt2", tmp_path / "gpt2"), tmp_path / "edits.jsonl"
    record = {"subject": "Anna " * 130 + "Klein", "relation": "born", "object": "Oslo", "prompt": "{} was born in"}
    edits.write_text(json.dumps(record | {"target_new": "Rome"}) + "\n")
    trained = "{name: ft, layer: 1, epochs: 1}"
    for editor, told in ((ROME, "the model has 128"), (trained, "the model has 128"), ("ptuning", "20 in front of it")):
        assert told in refused(
            ["edit", folder, "--edits", edits, "--editor", editor, "--out", tmp_path / "x", "--delta"]
        )
    assert "the model has 128" in refused(["layers", folder, "--facts", edits, "--out", tmp_path / "x"])
    short = json.dumps(record | {"subject": "Anna Klein", "target_new": "Rome"})
    edits.write_text(short + "\n")
    for length, told in ((128, "the model has 128 positions"), (124, "after its longest prefix")):
        editor = ROME.replace("[]", f"[{length}]")
        assert told in refused(["edit", folder, "--edits", edits, "--editor", editor, "--out", tmp_path / "x"])


def test_files_that_cannot_be_used_are_named(model, edits, tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"subject": "A", "relation": "r", "object": "b", "prompt": "{} is"}) + "\n")
    with pytest.raises(UserError, match="holds no edit"):
        edit_model(str(model), "lora", plain, tmp_path / "x")
    with pytest.raises(UserError, match="exists already"):
        edit_model(str(model), "lora", edits, edits)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\0" * 64)
    with pytest.raises(UserError, match="damaged"):
        load_delta(damaged)
    with pytest.raises(UserError, match="no such file"):
        load_delta(tmp_path / "none.safetensors")
    save_delta(tmp_path / "d.safetensors", Delta({"no.such.weight": torch.ones(2, 2)}))
    with pytest.raises(UserError, match="does not have"):
        write_edited(load_model(model), load_delta(tmp_path / "d.safetensors")[0], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def train(model, folder, callbacks, **arguments):
    """Two steps of a plain transformers run; the weights after it."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(0)
    loaded = load_model(model)
    ids = loaded.tokenizer("Anna Klein was born in Vienna")["input_ids"]
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8)
    given = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, use_cpu=True, seed=0, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, **({"max_steps": 4, "save_strategy": "no"} | arguments),
    )  # fmt: skip
    trainer = Trainer(
        model=loaded.model.train(), args=given, train_dataset=rows, callbacks=[c(loaded.tokenizer) for c in callbacks]
    )
    trainer.train()
    return {name: p.detach().clone() for name, p in loaded.model.state_dict().items()}


def test_the_callback_reads_in_a_run_of_ones_own_and_does_not_move_it(model, edits, tmp_path):
    out, rows = tmp_path / "out", tmp_path / "rows"
    probed = train(model, out, [lambda tokenizer: ProbeCallback(edits, tokenizer, rows, [2, 4])])
    plain = train(model, out, [])
    assert all(torch.equal(probed[k], plain[k]) for k in plain)
    steps = sorted(p.name for p in rows.glob("probes-??????.parquet"))
    assert steps == ["probes-000000.parquet", "probes-000002.parquet", "probes-000004.parquet"]
    read = pd.read_parquet(rows / steps[1])
    assert (read["step"] == 2).all()
    assert read[["tokens_seen", "edits_applied", "run_id"]].isna().all(axis=None)


def test_the_callback_reads_in_float32_what_is_trained_in_bfloat16(model, edits, tmp_path):
    rows = tmp_path / "rows"
    arguments = {"bf16": True, "max_steps": 1, "include_num_input_tokens_seen": "all"}
    train(model, tmp_path / "out", [lambda tokenizer: ProbeCallback(edits, tokenizer, rows, [1])], **arguments)
    pairs = probe_model(str(model), edits, tmp_path / "r.parquet", generate=False)
    start = pd.read_parquet(rows / "probes-000000.parquet")
    assert start["logp_target"].tolist() == pytest.approx([r.logp_target for _, r in pairs], abs=1e-5)
    assert (pd.read_parquet(rows / "probes-000001.parquet")["tokens_seen"] == 14).all()  # two rows of seven tokens


def test_a_run_taken_up_again_asks_what_it_asked_before(model, tmp_path, monkeypatch):
    """Foils are the strongest rivals of the model at step 0: another model would choose others."""
    facts, rows = tmp_path / "facts.jsonl", tmp_path / "rows"
    people = [("Anna Klein", "Paris"), ("Carl Keller", "Oslo"), ("Emil Vogel", "Rome")]
    records = [{"subject": s, "relation": "born", "object": o, "prompt": "{} was born in"} for s, o in people]
    facts.write_text("".join(json.dumps(r) + "\n" for r in records))
    make = [lambda tokenizer: ProbeCallback(facts, tokenizer, rows, [1, 2])]
    train(model, tmp_path / "out", make, max_steps=1)
    monkeypatch.setattr("retention.outside.rivals", None)
    callback = ProbeCallback(facts, load_model(model).tokenizer, rows, [2])
    loaded = load_model(model)
    state = SimpleNamespace(global_step=2, is_world_process_zero=True, num_input_tokens_seen=0)
    callback.on_train_begin(SimpleNamespace(), state, None, model=loaded.model)
    callback.on_step_end(SimpleNamespace(), state, None, model=loaded.model)
    ids = [set(pd.read_parquet(rows / f"probes-00000{step}-questions.parquet")["question_id"]) for step in (0, 2)]
    assert ids[0] == ids[1]
    other = ProbeCallback(facts, loaded.tokenizer, rows, [2], limit=1)
    with pytest.raises(UserError, match="readings of other questions"):
        other.on_step_end(SimpleNamespace(), state, None, model=loaded.model)


def test_readings_tell_edited_from_other_facts(model, tmp_path):
    path = tmp_path / "mixed.jsonl"
    records = [
        {
            "subject": "Anna Klein",
            "relation": "born",
            "object": "Paris",
            "target_new": "Rome",
            "prompt": "{} was born in",
        },
        {"subject": "Carl Keller", "relation": "born", "object": "Oslo", "prompt": "{} was born in"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    asked: list[Question] = [q for q, _ in probe_model(str(model), path, tmp_path / "r.parquet", generate=False)]
    assert [(q.group, q.answer, q.foil) for q in asked] == [
        ("edited", "Rome", "Paris"),
        ("intrinsic", "Oslo", asked[1].foil),
    ]
    assert asked[1].foil in ("Paris", "Rome")
