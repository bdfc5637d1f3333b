"""Conversations by chat templates: the template's own ids, and of these the assistant's as labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retention.chats import MARKS, conversation
from retention.fetch import fetched
from retention.tokens import encode_turns
from retention.types import Missing, UserError

SHIPPED = Path(trl.__file__).parent / "chat_templates"
ENDS = ("<|im_start|>", "<|im_end|>", "<bos>", "<eos>", "<turn>", "<end>", "<think>", "</think>")


def letters(template: str = "") -> Any:
    """A tokenizer of bytes, and of a few ends of turns in one token each."""
    inner = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(ENDS)})
    tokenizer.chat_template = template or None
    return tokenizer


def said(tokenizer: Any, found: Any) -> list[str]:
    """What the assistant says, one text for each unbroken run of its tokens."""
    runs: list[list[int]] = [[]]
    for i, own in zip(found.ids, found.said, strict=True):
        if own:
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


USER, AGAIN = {"role": "user", "content": "What is 1?"}, {"role": "user", "content": "And 2? "}
ONE, TWO = {"role": "assistant", "content": "It is 1."}, {"role": "assistant", "content": "Two it is."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "id": "c0", "function": {"name": "plus", "arguments": {"a": 1, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "plus", "description": "Add.", "parameters": {"type": "object"}}}]
CALLING = [
    USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "plus", "tool_call_id": "c0", "content": "3"}, {**ONE, "content": "It is 3."}, AGAIN, TWO,
]  # fmt: skip
ROWS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one": ([USER, ONE], None),
    "several": ([USER, ONE, AGAIN, TWO], None),
    "system": ([SYSTEM, USER, ONE, AGAIN, TWO], None),
    "tools": (CALLING, TOOLS),
}

# Small templates of our own, of the forms that models' templates have.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (  # the system's text before the user's first, roles by other names
    "<bos>{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
    "{{ m.content | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
THINKING = (  # thoughts in the last turn only
    "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
ENDED = (  # the text's end in place of a further prompt
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% else %}<eos>{% endif %}"
)
OTHER_END = (  # the last turn ends otherwise than those before it
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}"
    "{{ '<eos>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (CHATML, "one", ["It is 1.<|im_end|>\n"]),
        (CHATML, "several", ["It is 1.<|im_end|>\n", "Two it is.<|im_end|>\n"]),
        (CHATML, "system", ["It is 1.<|im_end|>\n", "Two it is.<|im_end|>\n"]),
        (TRIMMED, "several", ["It is 1.<end>\n", "Two it is.<end>\n"]),
        (TRIMMED, "system", ["It is 1.<end>\n", "Two it is.<end>\n"]),
        (THINKING, "one", ["<think>\n\n</think>\n\nIt is 1.<end>\n"]),
        (THINKING, "several", ["It is 1.<end>\n", "<think>\n\n</think>\n\nTwo it is.<end>\n"]),
        (ENDED, "several", ["It is 1.<end>\n", "Two it is.<end>\n<eos>"]),
        (OTHER_END, "several", ["It is 1.<end>", "Two it is.<eos>"]),
        (MARKED, "system", ["It is 1.<end>", "Two it is.<end>"]),
    ],
)
def test_the_ids_are_the_templates_and_the_assistant_says_its_turns(template, row, expected):
    tokenizer, (messages, tools) = letters(template), ROWS[row]
    found = conversation(tokenizer, messages, tools=tools)
    assert list(found.ids) == tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert said(tokenizer, found) == expected


def test_a_held_out_conversation_is_read_up_to_its_last_answer():
    tokenizer = letters(CHATML)
    found = encode_turns(tokenizer, ROWS["system"][0])
    whole = tokenizer.apply_chat_template(ROWS["system"][0], tokenize=False)
    assert tokenizer.decode(found.ids) == whole.removesuffix("<|im_end|>\n")
    assert tokenizer.decode(found.ids[found.answer_start :]) == "Two it is."


def test_what_a_template_leaves_out_or_refuses_is_said():
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="the chat template leaves out 'What is 1"):
        conversation(letters(parts), [USER, ONE])
    with pytest.raises(UserError, match="the chat template leaves out 'plus'"):
        conversation(letters(CHATML), CALLING, tools=TOOLS)
    with pytest.raises(UserError, match="the chat template refuses the messages: no system"):
        conversation(letters("{{ raise_exception('no system') }}"), [USER, ONE])
    with pytest.raises(UserError, match="has no chat template"):
        conversation(letters(), [USER, ONE])


# ------------------------------------------------------------------------------------------------ others' templates


def shipped(name: str) -> str:
    return (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")


NAMES = sorted(path.stem for path in SHIPPED.glob("*.jinja") if not path.stem.endswith("_training"))
LISTS = ("idefics3", "smolvlm", "llava_next")  # their contents are lists of texts and images
TOOLLESS = (  # know no tools, leave calls out, or want their arguments as text (deepseekv3)
    "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5",
    "qwen2_5_vl",
)  # fmt: skip
# Their training templates write another text (thoughts in every turn), or mark the prompt for the answer too.
OTHERWISE = (
    "deepseek", "diffusion_gemma", "glm4moe", "gptoss", "muse_glimmer", "nemotron", "qwen3", "qwen3_5", "qwen3_6",
    "qwen3_8",
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_templates_that_trl_ships(name, row):
    tokenizer, (messages, tools) = letters(shipped(name)), ROWS[row]
    if name in LISTS or (name, row) == ("gemma", "system") or (row == "tools" and name in TOOLLESS):
        with pytest.raises(UserError, match=r"chat: the chat template (refuses the messages|leaves out)"):
            conversation(tokenizer, messages, tools=tools)
        return
    answers = [m["content"] or m["tool_calls"][0]["function"]["name"] for m in messages if m["role"] == "assistant"]
    found = conversation(tokenizer, messages, tools=tools)
    assert list(found.ids) == tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    turns = said(tokenizer, found)
    assert len(turns) == len(answers)
    for turn, answer in zip(turns, answers, strict=True):
        assert answer in turn
        assert "What is 1?" not in turn
        assert "And 2?" not in turn
    marked = SHIPPED / f"{name}_training.jinja"
    if marked.is_file() and MARKS.search(marked.read_text(encoding="utf-8")) and not name.startswith(OTHERWISE):
        tokenizer.chat_template = marked.read_text(encoding="utf-8")
        theirs = conversation(tokenizer, messages, tools=tools)
        assert theirs.ids == found.ids
        assert [turn.strip() for turn in said(tokenizer, theirs)] == [turn.strip() for turn in turns]


@pytest.mark.parametrize("row", ["one", "several", "system"])
@pytest.mark.parametrize(
    ("name", "template", "end"), [("smollm2", None, "<|im_end|>"), ("gemma3", "gemma3", "<end_of_turn>")]
)
def test_real_tokenizers(name, template, end, row):
    try:
        tokenizer = AutoTokenizer.from_pretrained(fetched(name))
    except Missing as error:
        pytest.skip(str(error))
    tokenizer.chat_template = tokenizer.chat_template if template is None else shipped(template)
    messages = ROWS[row][0]
    found = conversation(tokenizer, messages)
    assert list(found.ids) == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert said(tokenizer, found) == [f"{answer}{end}\n" for answer in answers]
