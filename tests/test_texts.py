"""Texts of any script: what joins a prompt and its answer, what ends a text, what is a word, what is equal."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retention.data._mentions import Phrases
from retention.facts.counterfact import CounterFact
from retention.facts.zsre import ZsRE
from retention.texts import closed, follow, full_stops, join, mentions, normalise


def one_space(prompt, answer):
    """How every prompt and answer were joined before scripts were looked at."""
    return prompt + answer if prompt[-1:].isspace() or answer[:1].isspace() else f"{prompt} {answer}"


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("法国的首都是", "巴黎", "法国的首都是巴黎"),
        ("法国的首都是哪里？", "巴黎", "法国的首都是哪里？巴黎"),
        ("この会社は", "1998", "この会社は1998"),  # digits are of the other side's script
        ("1998年に", "2", "1998年に2"),
        ("東京タワーの色は", "ー", "東京タワーの色はー"),
        ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส", "เมืองหลวงของฝรั่งเศสคือปารีส"),
        ("ນະຄອນຫຼວງຂອງລາວແມ່ນ", "ວຽງຈັນ", "ນະຄອນຫຼວງຂອງລາວແມ່ນວຽງຈັນ"),
        ("法国的首都是", "Paris", "法国的首都是 Paris"),  # one side's script puts spaces
        ("The Chinese word for Paris is", "巴黎", "The Chinese word for Paris is 巴黎"),
        ("프랑스의 수도는", "파리", "프랑스의 수도는 파리"),
        ("Столица Франции -", "Париж", "Столица Франции - Париж"),
        ("He said “", "Paris", "He said “Paris"),
        ("他说「", "Paris", "他说「Paris"),
        ("The capital (", "Paris", "The capital (Paris"),
        ("La capital es ¿", "París", "La capital es ¿París"),
        ("1 + 1 =", "2", "1 + 1 = 2"),
        ("法国的首都是 ", "巴黎", "法国的首都是 巴黎"),
        ("法国的首都是", " 巴黎", "法国的首都是 巴黎"),
    ],
)
def test_the_joint_follows_the_scripts(prompt, answer, joined):
    assert join(prompt, answer) == joined
    assert join(prompt.strip(), answer.strip(), "space") == f"{prompt.strip()} {answer.strip()}"
    assert join(prompt.strip(), answer.strip(), "none") == prompt.strip() + answer.strip()


LATIN = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_categories=("Ps", "Pi", "Cc")), max_size=20
)


@given(LATIN, LATIN)
def test_in_latin_script_one_space_joins_as_ever(prompt, answer):
    if not prompt.endswith("¿") and not prompt.endswith("¡"):
        assert join(prompt, answer) == one_space(prompt, answer)


def test_english_data_are_joined_as_ever(real):
    real("counterfact/counterfact_10k.jsonl"), real("zsre/zsre_3k.json")
    for pool in (CounterFact().pool(0), ZsRE().pool(0)):
        facts = [*pool.facts, *(f for near in pool.neighborhood.values() for f in near)]
        for fact in facts:
            for text in (fact.text(), *map(fact.text, fact.paraphrases)):
                assert join(text, fact.target) == one_space(text, fact.target)


@pytest.mark.parametrize("mark", "。｡．।॥۔։።។။།᙮꓿")
def test_full_stops_of_all_scripts_are_found(mark):
    assert list(full_stops(f"a{mark}b！c？d؟e!f?")) == [(1, mark)]


def test_statements_are_closed_in_their_script():
    assert closed("法国的首都是巴黎") == "法国的首都是巴黎。"
    assert closed("法国的首都是巴黎", " .") == "法国的首都是巴黎 ."
    assert closed("เมืองหลวงของฝรั่งเศสคือปารีส") == "เมืองหลวงของฝรั่งเศสคือปารีส"
    assert closed("फ़्रांस की राजधानी पेरिस है") == "फ़्रांस की राजधानी पेरिस है।"
    assert closed("Zoë lives in Łódź") == "Zoë lives in Łódź."
    assert follow("法国的首都是巴黎。", "德国") == "法国的首都是巴黎。德国"
    assert follow("It is Paris.", "It") == "It is Paris. It"


def test_words_of_scripts_without_spaces_are_mentioned_inside_longer_ones():
    assert mentions("大家都说法国的首都是巴黎。", "法国")
    assert mentions("是Paris的", "Paris")
    assert not mentions("是Parisian的", "Paris")
    assert not mentions("ที่", "ท")  # never within a letter and its marks
    assert not mentions("Parisian", "Paris")
    text = "昨天法国的Paris下雨；เมืองหลวงของฝรั่งเศส"
    assert Phrases(["法国", "Paris", "德国", "ฝรั่งเศส", "Par"]).found(text) == {"法国", "Paris", "ฝรั่งเศส"}


@given(
    st.text(st.sampled_from("ab é中国ไทย.1_-"), max_size=12),
    st.text(st.sampled_from("ab é中国ไทย.1_-"), min_size=1, max_size=3),
)
def test_the_index_finds_what_the_text_mentions(text, phrase):
    if phrase.strip():
        assert (phrase in Phrases([phrase, "b"]).found(text)) == mentions(
            unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", phrase)
        )


@given(st.text(st.sampled_from("ab é.1_-'"), max_size=12), st.text(st.sampled_from("ab é1_"), min_size=1, max_size=3))
def test_words_of_latin_script_are_whole_as_ever(text, phrase):
    if re.fullmatch(r"\w+", phrase):
        assert mentions(text, phrase) == bool(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text))


def test_decomposed_texts_are_equal_to_composed_ones():
    for text in ("Zoë Brandt", "が", "서울", "Việt Nam"):
        assert normalise(unicodedata.normalize("NFD", text)) == normalise(text)
