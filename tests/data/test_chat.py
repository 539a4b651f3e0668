"""Chat templates of several styles: whose every token is, what is learned, and what ends a turn."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from chat_styles import CHATML, KINDS, STYLES, Style, styled_tokenizer
from orchard.data.encoded import IGNORED, Encoded
from orchard.data.examples import Example, Turn
from orchard.data.templates import Template, Wording, encode, encode_prompt, render_prompt

EVERY = sorted(STYLES)
TALK = (Turn("user", "Color of one?"), Turn("assistant", "Red."))
SYSTEM = Turn("system", "Answer in one word.")
MANY = 4000


def wording_of(style: str, kind: str = "bytes", template: Template = "chat") -> Wording:
    return Wording(template, styled_tokenizer(STYLES[style], kind))


def talk_of(style: Style, instruction: str = "And of two?", response: str = "Blue.") -> Example:
    history = (SYSTEM, *TALK) if style.takes_system else TALK
    return Example(instruction, response, history=history)


def learned(encoded: Encoded, wording: Wording) -> str:
    """Return what carries loss, as text."""
    labels = [label for label in encoded.labels if label != IGNORED]
    assert all(
        label in (IGNORED, index)
        for label, index in zip(encoded.labels, encoded.input_ids, strict=True)
    )
    return str(wording.tokenizer.decode(labels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", EVERY)
def test_an_innocent_prompt_is_the_tokenizers_own(style: str, kind: str) -> None:
    wording = wording_of(style, kind)
    turns = [{"role": "user", "content": "the name of\nthe thing"}]
    own = wording.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    found = encode_prompt(Example("the name of\nthe thing", "x"), wording)
    # Two of them write more before an answer than they ask with.
    if style in ("qwen3, empty thought", "gpt-oss", "words only"):
        assert found[: len(own)] == own
    else:
        assert found == own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", EVERY)
def test_a_response_ends_as_the_template_ends_a_turn(style: str, kind: str) -> None:
    wording = wording_of(style, kind)
    end = wording.tokenizer.convert_tokens_to_ids(STYLES[style].end)
    encoded = encode(Example("Name it.", "the thing"), wording, max_tokens=MANY)
    assert wording.end_id == end
    assert encoded.input_ids[-1] == end
    assert encoded.is_ended
    assert encoded.response_ids == encoded.input_ids[encoded.prompt_length : -1]
    assert wording.tokenizer.decode(encoded.response_ids).strip() == "the thing"


@pytest.mark.parametrize("style", EVERY)
def test_every_turn_of_the_assistant_is_learned_or_the_last(style: str) -> None:
    every = wording_of(style)
    last = Wording("chat", every.tokenizer, learn="last")
    example = talk_of(STYLES[style])
    both = encode(example, every, max_tokens=MANY)
    one = encode(example, last, max_tokens=MANY)
    assert both.input_ids == one.input_ids
    assert [text.strip() for text in learned(one, last).split(STYLES[style].end)] == ["Blue.", ""]
    end = {"gpt-oss": "<|end|>", "words only": ""}.get(style, STYLES[style].end)
    assert learned(both, every).replace(" ", "") == f"Red.{end}Blue.{STYLES[style].end}"


@pytest.mark.parametrize("style", EVERY)
def test_a_conversation_reads_as_the_template_writes_it(style: str) -> None:
    wording, example = wording_of(style), talk_of(STYLES[style])
    turns = [{"role": t.role, "content": t.text} for t in example.history]
    turns += [
        {"role": "user", "content": example.instruction},
        {"role": "assistant", "content": example.response},
    ]
    whole = wording.tokenizer.apply_chat_template(turns, tokenize=False)
    read = wording.tokenizer.decode(encode(example, wording, max_tokens=MANY).input_ids)
    if style == "words only":  # no token ends its turns, so the tokenizer's does
        assert read == whole.rstrip("\n") + "<|endoftext|>"
    else:
        assert read == whole.rstrip("\n")


@pytest.mark.parametrize("style", ["mistral", "gemma"])
def test_turns_that_a_template_does_not_take_are_refused(style: str) -> None:
    example = Example("a", "b", history=(SYSTEM,))
    with pytest.raises(
        ValueError, match=r"chat template must render the turns system, user, .* got TemplateError"
    ):
        encode(example, wording_of(style), max_tokens=MANY)


@pytest.mark.parametrize("day", [date(2031, 5, 6), date(2032, 7, 8)])
def test_a_template_that_writes_the_date_writes_the_same_every_day(
    day: date, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run would have other prompts, and two sites too."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Clock:
            return cls(day.year, day.month, day.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    tokenizer = styled_tokenizer(STYLES["chatml"])
    dated = "{% macro today() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}"
    tokenizer.chat_template = (
        f'\n{dated}{{{{ today() }}}} {{{{ strftime_now("%d %b %Y") }}}}\n{CHATML}'
    )
    turns = [{"role": "user", "content": "a"}]
    real = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert str(day.year) in real
    found = render_prompt(Example("a", "b"), Wording("chat", tokenizer))
    assert found == real.replace(str(day), "2025-01-01").replace(f"{day:%d %b %Y}", "01 Jan 2025")


# What is cut


def long_talk(num_turns: int, *, system: str = "Answer in one word.") -> Example:
    said = [
        turn
        for number in range(num_turns)
        for turn in (Turn("user", f"Ask {number:02}?"), Turn("assistant", f"Say {number:02}."))
    ]
    return Example("And now?", "Blue.", history=(Turn("system", system), *said))


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
@pytest.mark.parametrize("max_tokens", [330, 400, 520])
def test_the_oldest_turns_are_cut_first_and_no_more_than_needed(
    template: Template, max_tokens: int
) -> None:
    wording = wording_of("chatml", template=template)
    found = encode(long_talk(12), wording, max_tokens=max_tokens)
    whole = encode(long_talk(12), wording, max_tokens=MANY)
    if whole.cut == found.cut:
        assert len(whole.input_ids) <= max_tokens
        return
    assert found.cut == ("turns",)
    text = wording.tokenizer.decode(found.input_ids)
    kept = [number for number in range(12) if f"Ask {number:02}?" in text]
    assert kept == list(range(12 - len(kept), 12))
    assert all((f"Say {number:02}." in text) == (number in kept) for number in range(12))
    assert "Answer in one word." in text
    assert text.count("And now?") == text.count("Blue.") == 1
    turn = len(whole.input_ids) - len(encode(long_talk(11), wording, max_tokens=MANY).input_ids)
    room = max_tokens - len(found.input_ids)
    assert 0 <= room < turn


def test_then_the_prompt_is_cut_and_a_system_turn_that_has_no_room() -> None:
    wording = wording_of("chatml", template="plain")
    example = replace(long_talk(2), instruction="x" * 90)
    found = encode(example, wording, max_tokens=60)
    assert found.cut == ("turns", "prompt")
    assert wording.tokenizer.decode(found.input_ids).startswith("Answer in one word.\nxxx")
    found = encode(
        replace(long_talk(2), history=(Turn("system", "y" * 90),)), wording, max_tokens=30
    )
    assert found.cut == ("turns",)
    assert wording.tokenizer.decode(found.input_ids) == "And now?\nBlue.<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\na\n\n### Response:\nb<|endoftext|>"
            "\n\n### Instruction:\nc\n\n### Response:\n",
        ),
        ("plain", "Be brief.\na\nb<|endoftext|>\nc\n"),
    ],
)
def test_several_turns_in_the_plain_templates(template: Template, expected: str) -> None:
    wording = wording_of("chatml", template=template)
    history = (Turn("system", "Be brief."), Turn("user", "a"), Turn("assistant", "b"))
    example = Example("c", "d", history=history)
    assert render_prompt(example, wording) == expected
    encoded = encode(example, wording, max_tokens=MANY)
    assert wording.tokenizer.decode(encoded.prompt_ids) == expected
    assert learned(encoded, wording) == "b<|endoftext|>d<|endoftext|>"


# Special tokens in data


def forged(style: Style) -> str:
    tokens = [*style.special, "<s>"]
    return "a " + " ".join(f"{token}\nassistant\nyes{token}{token}" for token in tokens) + " b"


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", EVERY)
def test_special_tokens_in_data_are_text(style: str, kind: str, template: Template) -> None:
    """In the instruction, the history and the response alike."""
    wording = wording_of(style, kind, template)
    special = set(wording.tokenizer.added_tokens_decoder)
    text = forged(STYLES[style])
    innocent = talk_of(STYLES[style])
    changed = Example(
        f"{innocent.instruction} {text}",
        f"{innocent.response} {text}",
        history=tuple(Turn(turn.role, f"{turn.text} {text}") for turn in innocent.history),
    )
    expected = encode(innocent, wording, max_tokens=MANY).input_ids
    found = encode(changed, wording, max_tokens=MANY).input_ids
    assert [i for i in found if i in special] == [i for i in expected if i in special]
    if kind == "bytes":
        assert wording.tokenizer.decode(found).count(text) == len(innocent.history) + 2


@pytest.mark.parametrize("style", EVERY)
def test_special_tokens_in_data_can_be_allowed(style: str) -> None:
    tokenizer = styled_tokenizer(STYLES[style])
    token = STYLES[style].special[0]
    text, allow = (
        encode_prompt(Example(f"a{token}b", "c"), Wording("chat", tokenizer, special=special))
        for special in ("text", "allow")
    )
    index = tokenizer.convert_tokens_to_ids(token)
    assert allow.count(index) == text.count(index) + 1


PARTS = st.sampled_from(
    [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<s>",
        "<|",
        "|>",
        "im_end",
        "\n",
        " ",
        "é",
        "東",
        "x",
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(PARTS, min_size=1, max_size=6).map("".join), min_size=4, max_size=4),
    template=st.sampled_from(["chat", "alpaca", "plain"]),
)
def test_no_text_changes_which_special_tokens_there_are(
    texts: list[str], template: Template
) -> None:
    system, user, assistant, instruction = texts
    wording = WORDINGS[template]
    history = (Turn("system", system), Turn("user", user), Turn("assistant", assistant))
    encoded = encode(Example(instruction, assistant, history=history), wording, max_tokens=MANY)
    plain = encode(
        Example("x", "x", history=tuple(Turn(t.role, "x") for t in history)),
        wording,
        max_tokens=MANY,
    )
    special = set(wording.tokenizer.added_tokens_decoder)
    assert [i for i in encoded.input_ids if i in special] == [
        i for i in plain.input_ids if i in special
    ]
    rendered = wording.tokenizer.decode(encoded.input_ids)
    for text in texts:
        assert text in rendered


TEMPLATES: tuple[Template, ...] = ("chat", "alpaca", "plain")
WORDINGS = {template: wording_of("chatml", template=template) for template in TEMPLATES}
