"""The same joint of prompt and answer in probes, edits and training rows, whatever sets it."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from retention.data.leakage import Leakage, leak
from retention.data.statements import Said, statements
from retention.editors._rows import statement_rows
from retention.editors._training import edit_row
from retention.facts.questions import Asked, question
from retention.objectives import Clm, Sft
from retention.probes._prepared import Encodings
from retention.probes.generate import Generate
from retention.probes.score import Score
from retention.tokens import subject_span
from retention.types import Edit, Fact, TaskRows


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


CASES = [
    ("法国", "{}的首都是", "巴黎", None, "法国的首都是巴黎"),
    ("ฝรั่งเศส", "เมืองหลวงของ{}คือ", "ปารีส", None, "เมืองหลวงของฝรั่งเศสคือปารีส"),
    ("巴黎", "{}", "法国", None, "巴黎法国"),  # the phrasing alone has no script
    ("巴黎", "The Chinese for Paris is {}", "法国", None, "The Chinese for Paris is 巴黎法国"),
    ("France", "The capital of {} is", "Paris", None, "The capital of France is Paris"),
    ("France", "The capital of {} is", "Paris", "none", "The capital of France isParis"),
    ("法国", "{}的首都是", "巴黎", "space", "法国的首都是 巴黎"),
]


@pytest.mark.parametrize(("subject", "phrasing", "answer", "joint", "text"), CASES)
def test_one_text_in_probes_edits_and_training_rows(tokenizer, subject, phrasing, answer, joint, text):
    ids = tokenizer(text)["input_ids"]
    fact = Fact(id="f", subject=subject, relation="r", prompt=phrasing, target=answer, joint=joint)
    edit = Edit(fact=replace(fact, target="x"), target=answer, prompts=(phrasing,))
    asked = question(Asked(fact=fact, group="intrinsic", answer=answer, foil="Rome"))
    (scored,) = Score().asked([asked], Encodings(tokenizer), None).pairs
    assert list(scored[0].ids) == ids
    said = text[len(fact.text()) :]
    assert "".join(tokenizer.decode(ids[scored[0].start :])) == said
    assert list(edit_row(tokenizer, edit, phrasing).ids) == ids
    (row,) = statement_rows(tokenizer, [edit], [])
    assert list(row.ids) == ids[:-1]
    span = subject_span(tokenizer, phrasing, subject, answer=answer, joint=joint)
    assert row.at == span[-1]
    assert subject in tokenizer.decode(ids[span[0] : span[-1] + 1])
    stated = [Said(fact=fact, answer=answer, phrasings=(phrasing,))]
    (pair,) = statements(stated, 1, like=[{"prompt": "a", "completion": "b"}], seed=0)
    (trained,) = Sft().columns(pair)
    assert trained["prompt"] + trained["completion"] == text == Clm().columns(pair)[0]["text"]
    (plain,) = statements(stated, 1, like=[{"text": ""}], seed=0)
    assert plain["text"].startswith(text)
    assert len(plain["text"]) <= len(text) + 1


def test_leaking_rows_are_found_and_injected_with_the_same_joint():
    facts = [Fact(id="f", subject="法国", relation="r", prompt="{}的首都是", target="巴黎")]
    edits = [Edit(fact=facts[0], target="罗马", prompts=(facts[0].prompt,))]
    rows = TaskRows(train=({"text": "今天法国下雨。"}, {"text": "今天德国下雨。"}), heldout=())
    left = leak(rows, Leakage(mode="remove", about="edited"), edited=edits, intrinsic=(), seed=0)
    assert [row["text"] for row in left.rows.train] == ["今天德国下雨。"]
    put = leak(rows, Leakage(mode="inject", about="edited", rate=0.5), edited=edits, intrinsic=(), seed=0)
    assert "法国的首都是巴黎。" in {row["text"] for row in put.rows.train}


@pytest.mark.parametrize(
    ("said", "answer", "generated"),
    [
        ("巴黎。它很大", "巴黎", "巴黎"),
        ("पेरिस। यह", "पेरिस", "पेरिस"),
        ("پیرس۔ یہ", "پیرس", "پیرس"),
        (" Paris. It", "Paris", "Paris"),
        ("甲。乙。丙", "甲。乙", "甲。乙"),  # a mark of the answer itself ends no shorter text
        ("什么？好", "好", "什么？好"),
    ],
)
def test_generation_ends_at_the_full_stop_of_any_script(tokenizer, said, answer, generated):
    asked = question(
        Asked(fact=Fact(id="f", subject="s", relation="r", prompt="{}", target=answer), group="x", answer=answer)
    )
    found = Generate().asked([asked], Encodings(tokenizer), None, frozenset())
    assert found.words.text(found.texts[0], tokenizer(said)["input_ids"]) == generated
    assert (
        Generate(stop=("\n",)).asked([asked], Encodings(tokenizer), None, frozenset()).texts[0].cut(said)[0]
        == said.lstrip()
    )


def test_the_joint_is_part_of_a_questions_id_only_where_it_is_set():
    asked = question(
        Asked(fact=Fact(id="f", subject="s", relation="r", prompt="{}", target="o"), group="g", answer="o")
    )
    assert asked.id == "d5d330af9a5c3de5"
    assert replace(asked, joint="none").id != replace(asked, joint="space").id != asked.id
