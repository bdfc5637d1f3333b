"""Chat templates: questions and rows as turns, against ids written by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from retention import preflight
from retention.adapters import Full
from retention.models import anatomy, load_model
from retention.objectives import Sft
from retention.probes import Generate, Score, read_all
from retention.probes.ability import heldout
from retention.probes.rivals import rivals
from retention.study import Study, Tune
from retention.tokens import encode, turn
from retention.tune import Budget, Held, fine_tune
from retention.types import Question, UserError
from tests import tiny
from tests.small_study import TUNE, one

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' You ' if message['role'] == 'user' else ' I ' }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %} I{% endif %}"
)
QUESTION = Question(fact_id="f", group="edited", form="direct", text="Anna was born in", answer="Paris", foil=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tiny.save("gpt2", tmp_path / "chats")
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(path)
    return path


def by_hand(loaded: Any, text: str, answer: str) -> tuple[float, float]:
    """Log-probability of a word after a text of words, the BOS token before it, and its lead over all other words."""
    ids = loaded.tokenizer.convert_tokens_to_ids(["<s>", *text.split(), answer])
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -2].double()
    others = torch.cat([logits[: ids[-1]], logits[ids[-1] + 1 :]])
    return float(torch.log_softmax(logits, -1)[ids[-1]]), float(logits[ids[-1]] - others.max())


def test_a_question_is_put_as_a_users_turn(folder):
    loaded = load_model(folder)
    assert turn(loaded.tokenizer, "Anna was born in") == "<s> You Anna was born in I"
    for template in (TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")):  # the tokenizer would put a BOS of its own
        loaded.tokenizer.chat_template = template
        turns = [{"role": "user", "content": QUESTION.text}, {"role": "assistant", "content": "Paris"}]
        trained = loaded.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]  # as trl does
        assert list(encode(loaded.tokenizer, QUESTION.text, "Paris", chat=True).ids) == trained
        assert list(encode(loaded.tokenizer, QUESTION.text, chat=True).ids) == trained[:-1]
    loaded.tokenizer.chat_template = TEMPLATE
    plain = by_hand(loaded, "Anna was born in", "Paris")
    asked = by_hand(loaded, "You Anna was born in I", "Paris")
    assert abs(plain[0] - asked[0]) > 1e-3
    (reading,) = Score().read(loaded.model, loaded.tokenizer, [QUESTION], 0)
    assert (reading.logp_target, reading.lead) == pytest.approx(plain, abs=1e-5)
    probes = [Score(chat=True), Generate(chat=True, max_new_tokens=3)]
    (together,) = read_all(probes, loaded.model, loaded.tokenizer, [QUESTION], 0)
    assert (together.logp_target, together.lead) == pytest.approx(asked, abs=1e-5)
    said = loaded.model.generate(
        torch.tensor([loaded.tokenizer.convert_tokens_to_ids(["<s>", *["You", "Anna", "was", "born", "in", "I"]])]),
        max_new_tokens=3, do_sample=False, pad_token_id=0,
    )[0, 7:]  # fmt: skip
    words = loaded.tokenizer.decode(said, skip_special_tokens=True)
    assert together.generated == words.split(".")[0].strip()
    (mixed,) = read_all([Score(), Generate(chat=True, max_new_tokens=3)], loaded.model, loaded.tokenizer, [QUESTION], 0)
    assert (mixed.logp_target, mixed.lead) == pytest.approx(plain, abs=1e-5)
    assert mixed.generated == together.generated


@pytest.mark.parametrize(
    ("asks", "replies", "expected"),
    [
        ("<I>", "<I>{{ m['content'] }}", "<U>born in<I>Paris"),
        ("<I>\n", "<I>\n{{ m['content'] }}", "<U>born in<I>\nParis"),
        ("<I>", "<I> {{ m['content'] }} ", "<U>born in<I> Paris"),
        ("<I><think></think>", "<I>{{ m['content'] }}", "<U>born in<I><think></think> Paris"),
    ],
    ids=["nothing-between", "in-the-prompt", "a-space", "written-otherwise"],
)
def test_an_answer_stands_where_the_template_puts_a_reply(asks, replies, expected):
    letters = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}{% else %}" + replies + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + asks + "{% endif %}"
    )
    found = encode(tokenizer, "born in ", "Paris", chat=True)
    assert tokenizer.decode(found.ids) == expected
    assert tokenizer.decode(found.ids[found.answer_start :]).strip() == "Paris"


def test_a_rival_is_sought_after_the_same_turn(folder):
    loaded = load_model(folder)
    objects = ("Paris", "Rome", "Berlin", "Madrid", "Oslo", "Bern")
    (found,) = rivals(loaded.model, loaded.tokenizer, [(QUESTION, objects)], chat=True)
    by_word = {name: by_hand(loaded, "You Anna was born in I", name)[0] for name in objects if name != "Paris"}
    assert found == max(by_word, key=lambda name: by_word[name])


def test_rows_are_trained_on_and_held_out_as_turns(folder, tmp_path):
    loaded = load_model(folder, device="cpu")
    expected = -by_hand(loaded, "You Anna was born in I", "Paris")[0]
    row = {"prompt": "Anna was born in", "completion": "Paris"}
    assert heldout(loaded.model, loaded.tokenizer, [row], chat=True).loss == pytest.approx(expected, abs=1e-5)
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    result = fine_tune(
        loaded.model, loaded.tokenizer, [row], objective=Sft(), adapter=Full(), hold=lambda _: Held(), chat=True,
        anatomy=anatomy(loaded.model), budget=Budget(steps=1), trainer={"logging_steps": 1}, seed=0, at=set(),
        on_checkpoint=lambda *_: None, folder=tmp_path / "out", base=lambda: loaded.model,
    )  # fmt: skip
    assert math.isclose(result.log[0]["loss"], expected, abs_tol=1e-4)


def test_keys_stay_where_there_is_no_chat():
    assert "chat" not in Score().model_dump()
    assert "chat" not in Generate().model_dump(mode="json")
    assert Score(chat=True).model_dump()["chat"] is True
    assert "chat" not in Tune.model_validate(TUNE).model_dump()


def test_a_model_without_a_template_and_objectives_without_turns_are_refused(tmp_path):
    with pytest.raises(UserError, match="chat: the models that are pretrained here know no chat"):
        preflight.check(Study.of(one(probes=[{"name": "score", "chat": True}]), name="chat"))
    plain = str(tiny.save("gpt2", tmp_path / "plain"))
    found = preflight.examine(Study.of(one(model={"name": plain}, tune=TUNE | {"chat": True}), name="chat"))
    assert any("chat: this model's tokenizer has no chat template" in line for line in found)
    with pytest.raises(UserError, match=r"tune.chat: objective clm reads no turns; use one of sft, dpo, kto"):
        Study.of(one(tune=TUNE | {"chat": True}, objective="clm"), name="chat")
