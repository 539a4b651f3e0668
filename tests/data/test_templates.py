from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from orchard.data.datasets import Example
from orchard.data.encoded import IGNORED, Encoded, blocks, collate, collate_prompts
from orchard.data.templates import (
    Template,
    Wording,
    encode,
    encode_options,
    encode_prompt,
    prompt_text,
    render_prompt,
)

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<pad>"]


def make_tokenizer(
    *, adds_special_tokens: bool = False, pads_with_end: bool = False
) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each byte and a few merges, so that borders matter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "Ċ" is a line end and "Ġ" a space in the alphabet of byte-level models.
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("#", "#"), ("##", "#")]
    vocab = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if adds_special_tokens:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>" if pads_with_end else "<pad>",
    )


def words(template: Template, tokenizer: PreTrainedTokenizerFast) -> Wording:
    return Wording(template, tokenizer)


def decode(token_ids: Sequence[int]) -> str:
    """Decode with the vocabulary that all tokenizers of this module share."""
    return str(TOKENIZER.decode(list(token_ids)))


TOKENIZER = make_tokenizer()
END = 1
EXAMPLE = Example("Name the capital.", "Paris", context="France is a country.")
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)


# Prompts


def test_the_alpaca_prompt_word_for_word() -> None:
    assert render_prompt(EXAMPLE, words("alpaca", TOKENIZER)) == (
        f"{PREAMBLE}### Instruction:\nName the capital. France is a country.\n\n### Response:\n"
    )


def test_the_plain_prompt_is_the_text_and_a_line_end() -> None:
    assert (
        render_prompt(EXAMPLE, words("plain", TOKENIZER))
        == "Name the capital. France is a country.\n"
    )


def test_the_chat_prompt_is_the_tokenizers_own() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    assert render_prompt(EXAMPLE, words("chat", tokenizer)) == (
        "<s><user>Name the capital. France is a country.\n<assistant>"
    )


@pytest.mark.parametrize("context", ["", " ", "\n"])
def test_without_context_the_text_is_the_instruction(context: str) -> None:
    assert prompt_text(Example("Name it.", "x", context=context)) == "Name it."


def test_a_chat_template_must_exist() -> None:
    with pytest.raises(ValueError, match="template must be one that the tokenizer has, got chat"):
        render_prompt(EXAMPLE, words("chat", TOKENIZER))


def test_an_unknown_template_lists_the_known() -> None:
    with pytest.raises(ValueError, match="template must be one of alpaca, plain, chat, got 'vic"):
        render_prompt(EXAMPLE, words("vicuna", TOKENIZER))  # type: ignore[arg-type]


def test_the_begin_token_stands_once_and_the_end_token_not_in_the_prompt() -> None:
    tokenizer = make_tokenizer(adds_special_tokens=True)
    tokenizer.chat_template = CHAT
    templates: list[Template] = ["alpaca", "plain", "chat"]
    for template in templates:
        prompt_ids = encode_prompt(EXAMPLE, words(template, tokenizer))
        assert prompt_ids[0] == tokenizer.bos_token_id
        assert prompt_ids.count(0) == 1
        assert END not in prompt_ids
        encoded = encode(EXAMPLE, words(template, tokenizer), max_tokens=1000)
        assert encoded.prompt_ids == prompt_ids
        assert encoded.input_ids.count(END) == 1
    assert 0 not in encode_prompt(EXAMPLE, words("alpaca", TOKENIZER))


# Loss


@pytest.mark.parametrize("pads_with_end", [False, True])
def test_the_prompt_is_masked_exactly_and_the_end_token_carries_loss(pads_with_end: bool) -> None:
    tokenizer = make_tokenizer(pads_with_end=pads_with_end)
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) is pads_with_end
    encoded = encode(EXAMPLE, words("alpaca", tokenizer), max_tokens=1000)
    prompt_ids = tokenizer(render_prompt(EXAMPLE, words("alpaca", tokenizer)))["input_ids"]
    assert encoded.prompt_ids == prompt_ids
    assert encoded.labels[: encoded.prompt_length] == [IGNORED] * len(prompt_ids)
    response = encoded.labels[encoded.prompt_length :]
    assert response == encoded.input_ids[encoded.prompt_length :]
    assert response[-1] == END
    assert decode(response[:-1]) == "Paris"
    assert encoded.num_labels == len("Paris") + 1
    assert not encoded.is_truncated


@pytest.mark.parametrize("side", ["left", "right"])
def test_collating_keeps_the_end_token_in_the_loss_when_it_also_pads(side: str) -> None:
    tokenizer = make_tokenizer(pads_with_end=True)
    examples = [Example("a", "b"), Example("a longer one", "b")]
    batch = collate(
        [encode(example, words("plain", tokenizer), max_tokens=50) for example in examples],
        pad_id=tokenizer.pad_token_id,
        side=side,  # type: ignore[arg-type]
    )
    assert (batch["labels"] == END).sum(axis=1).tolist() == [1, 1]
    ends = batch["labels"] == END
    assert batch["attention_mask"][ends].tolist() == [1, 1]


def test_a_response_that_begins_with_a_line_end_does_not_change_the_prompt() -> None:
    # Encoded together, the prompt's last line end would merge with the response's first.
    encoded = encode(Example("a", "\nb"), words("plain", TOKENIZER), max_tokens=50)
    assert encoded.prompt_ids == TOKENIZER("a\n")["input_ids"]
    assert decode(encoded.input_ids[encoded.prompt_length : -1]) == "\nb"
    together = TOKENIZER("a\n\nb")["input_ids"]
    assert together[: encoded.prompt_length] != encoded.prompt_ids


# Truncation


def test_a_long_response_loses_its_end_and_the_end_token() -> None:
    encoded = encode(Example("abc", "x" * 50), words("plain", TOKENIZER), max_tokens=20)
    assert decode(encoded.input_ids) == "abc\n" + "x" * 16
    assert encoded.labels == [IGNORED] * 4 + encoded.input_ids[4:]
    assert END not in encoded.input_ids
    assert encoded.is_truncated


def test_a_long_prompt_loses_the_end_of_its_context_and_keeps_the_template() -> None:
    example = Example("Sum up.", "short", context="word " * 200)
    encoded = encode(example, words("alpaca", TOKENIZER), max_tokens=250)
    prompt = decode(encoded.prompt_ids)
    assert prompt.startswith(f"{PREAMBLE}### Instruction:\nSum up. word word ")
    assert prompt.endswith("\n\n### Response:\n")
    assert decode(encoded.input_ids[encoded.prompt_length :]) == "short</s>"
    assert len(encoded.input_ids) == 250
    assert encoded.is_truncated


def test_long_prompts_and_responses_share_the_room_in_halves() -> None:
    encoded = encode(Example("p" * 90, "r" * 90), words("plain", TOKENIZER), max_tokens=41)
    assert decode(encoded.input_ids) == "p" * 20 + "\n" + "r" * 20


def test_what_just_fits_is_left_whole() -> None:
    whole = encode(EXAMPLE, words("plain", TOKENIZER), max_tokens=1000)
    num_tokens = len(whole.input_ids)
    assert encode(EXAMPLE, words("plain", TOKENIZER), max_tokens=num_tokens) == whole
    assert encode(EXAMPLE, words("plain", TOKENIZER), max_tokens=num_tokens - 1).is_truncated


texts = st.text(st.sampled_from("a the#\né😀"), min_size=1, max_size=80)


@settings(deadline=None)
@given(texts, texts, texts, st.integers(2, 120), st.booleans())
def test_every_example_fits_and_has_a_label(
    instruction: str, context: str, response: str, max_tokens: int, pads_with_end: bool
) -> None:
    tokenizer = make_tokenizer(pads_with_end=pads_with_end)
    example = Example(instruction, response, context=context)
    encoded = encode(example, words("plain", tokenizer), max_tokens=max_tokens)
    prompt_ids, response_ids = encoded.prompt_ids, encoded.input_ids[encoded.prompt_length :]
    whole_response = [*tokenizer(response)["input_ids"], END]
    whole_prompt = tokenizer(render_prompt(example, words("plain", tokenizer)))["input_ids"]
    assert len(encoded.input_ids) == len(encoded.labels) <= max_tokens
    assert encoded.labels == [IGNORED] * encoded.prompt_length + response_ids
    assert encoded.num_labels == len(response_ids) >= 1
    assert response_ids == whole_response[: len(response_ids)]
    assert len(response_ids) >= min(len(whole_response), max_tokens // 2)
    assert encoded.is_truncated == (len(whole_prompt) + len(whole_response) > max_tokens)
    if len(whole_prompt) <= max_tokens - max_tokens // 2:
        assert prompt_ids == whole_prompt
    kept = decode(prompt_ids)
    assert kept.endswith("\n")
    assert prompt_text(example).startswith(kept[:-1])


@settings(deadline=None)
@given(texts, st.integers(1, 100))
def test_a_shortened_prompt_is_as_long_as_it_can_be(text: str, max_tokens: int) -> None:
    prompt_ids = encode_prompt(Example(text, "x"), words("plain", TOKENIZER), max_tokens=max_tokens)
    kept = decode(prompt_ids)[:-1]
    assert len(prompt_ids) <= max_tokens
    if kept != text:
        one_more = encode_prompt(Example(text[: len(kept) + 1], "x"), words("plain", TOKENIZER))
        assert len(one_more) > max_tokens


def test_a_shortened_chat_prompt_keeps_the_roles() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    encoded = encode(Example("p" * 99, "r"), words("chat", tokenizer), max_tokens=40)
    num_kept = 40 - len("r") - 1 - len(encode_prompt(Example("", "r"), words("chat", tokenizer)))
    assert decode(encoded.input_ids) == (f"<s><user>{'p' * num_kept}\n<assistant>r</s>")


def test_max_tokens_must_have_room_for_the_template() -> None:
    with pytest.raises(ValueError, match=r"max_tokens must leave the prompt at least \d+ tokens"):
        encode(Example("a" * 99, "b" * 99), words("alpaca", TOKENIZER), max_tokens=100)


def test_max_tokens_must_have_room_for_prompt_and_response() -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        encode(EXAMPLE, words("plain", TOKENIZER), max_tokens=1)


def test_the_tokenizer_must_have_an_end_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an end token"):
        encode(EXAMPLE, words("plain", tokenizer), max_tokens=50)


# Batches


def encoded(prompt: Sequence[int], response: Sequence[int]) -> Encoded:
    return Encoded(
        input_ids=[*prompt, *response],
        labels=[*[IGNORED] * len(prompt), *response],
        prompt_length=len(prompt),
    )


PAIR = [encoded([5, 6], [7, 1]), encoded([8], [1])]


def test_padding_on_the_right() -> None:
    batch = collate(PAIR, pad_id=1, side="right")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [8, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 1], [-100, 1, -100, -100]]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


def test_padding_on_the_left() -> None:
    batch = collate(PAIR, pad_id=1, side="left")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [1, 1, 8, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 1], [-100, -100, -100, 1]]


def test_prompts_are_padded_on_the_left() -> None:
    batch = collate_prompts([[5, 6, 0], [8]], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_batch_must_hold_something() -> None:
    with pytest.raises(ValueError, match="batch must hold at least one example, got none"):
        collate([], pad_id=0)


def test_a_side_is_left_or_right() -> None:
    with pytest.raises(ValueError, match="side must be right or left, got 'both'"):
        collate(PAIR, pad_id=0, side="both")  # type: ignore[arg-type]


# Calibration blocks


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
    st.integers(1, 12),
    st.integers(1, 6),
)
def test_blocks_are_full_and_follow_the_stream(
    lengths: list[int], block_tokens: int, max_blocks: int
) -> None:
    ends = [0, *np.cumsum(lengths).tolist()]
    examples = [encoded(list(range(a, b)), []) for a, b in pairwise(ends)]
    result = blocks(examples, block_tokens=block_tokens, max_blocks=max_blocks)
    joined = [token for block in result for token in block]
    assert joined == list(range(len(joined)))
    if ends[-1] < block_tokens:
        assert joined == list(range(ends[-1]))
        assert len(result) == 1
    else:
        assert len(result) == min(max_blocks, ends[-1] // block_tokens)
        assert all(len(block) == block_tokens for block in result)


def test_blocks_hold_prompts_responses_and_end_tokens() -> None:
    assert blocks(PAIR, block_tokens=3, max_blocks=9) == [[5, 6, 7], [1, 8, 1]]


@pytest.mark.parametrize(
    ("block_tokens", "max_blocks", "message"),
    [
        (0, 1, "block_tokens must be at least 1, got 0"),
        (1, 0, "max_blocks must be at least 1, got 0"),
    ],
)
def test_block_numbers_must_be_positive(block_tokens: int, max_blocks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks(PAIR, block_tokens=block_tokens, max_blocks=max_blocks)


def test_blocks_need_an_example() -> None:
    with pytest.raises(ValueError, match="encoded must hold at least one example"):
        blocks([], block_tokens=2, max_blocks=1)


# Options


def test_options_are_encoded_as_in_training() -> None:
    example = Example("Which?", "left", options=("left", "right there", "up"))
    found = encode_options(example, words("plain", TOKENIZER), max_tokens=64)
    assert found[0] == encode(example, words("plain", TOKENIZER), max_tokens=64)
    assert [decode(option.input_ids) for option in found] == [
        f"Which?\n{text}</s>" for text in example.options
    ]


def test_options_share_a_prompt_with_room_for_the_longest() -> None:
    example = Example("Which one? " + "x" * 100, "a", options=("a", "b" * 20))
    found = encode_options(example, words("plain", TOKENIZER), max_tokens=48)
    assert found[0].prompt_ids == found[1].prompt_ids
    assert len(found[1].input_ids) == 48
    assert [decode(option.input_ids[option.prompt_length :]) for option in found] == [
        "a</s>",
        "b" * 20 + "</s>",
    ]
    assert all(option.is_truncated for option in found)


@pytest.mark.parametrize("answer", ["a", "b" * 20])
def test_the_length_of_a_shortened_prompt_does_not_give_the_answer_away(answer: str) -> None:
    """Not in training either: a model would learn to read it there."""
    example = Example("Which one? " + "x" * 100, answer, options=("a", "b" * 20))
    trained = encode(example, words("plain", TOKENIZER), max_tokens=48)
    options = encode_options(example, words("plain", TOKENIZER), max_tokens=48)
    assert trained == options[example.options.index(answer)]
    assert trained.prompt_length == 48 - 21


def test_an_option_above_its_room_loses_its_end() -> None:
    example = Example("Which?", "a", options=("a", "b" * 100))
    short, long = encode_options(example, words("plain", TOKENIZER), max_tokens=40)
    assert len(long.input_ids) == 40
    assert long.input_ids[-1] != TOKENIZER.eos_token_id
    assert short.input_ids[-1] == TOKENIZER.eos_token_id


def test_an_example_without_options_has_none() -> None:
    assert encode_options(Example("Which?", "a"), words("plain", TOKENIZER), max_tokens=40) == ()


def test_a_prompt_is_shortened_right_where_its_tokens_are_uneven() -> None:
    # Where the search begins is far off on either side: a "#" is a third of a token, an "a" one.
    for text in ("#" * 3000 + "a" * 3000, "a" * 3000 + "#" * 3000):
        for max_tokens in (500, 1500, 3500):
            prompt_ids = encode_prompt(
                Example(text, "x"), words("plain", TOKENIZER), max_tokens=max_tokens
            )
            kept = decode(prompt_ids)[:-1]
            assert text.startswith(kept)
            one_more = encode_prompt(Example(text[: len(kept) + 1], "x"), words("plain", TOKENIZER))
            assert len(prompt_ids) <= max_tokens < len(one_more)
