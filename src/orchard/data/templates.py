"""Examples become token ids: prompts, labels, padded batches and calibration blocks.

Training and evaluation call the same functions, so a model is asked in the words it was trained
in. A prompt and its response are encoded apart: the ids of the prompt are the ones a model sees
when it generates, whatever the response begins with.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from orchard.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template: TypeAlias = Literal["alpaca", "plain", "chat"]
IntArray: TypeAlias = npt.NDArray[np.int64]

# The label that PyTorch's cross-entropy and every causal model in transformers leave out.
IGNORED = -100


def prompt_text(example: Example) -> str:
    """Return what is asked: the instruction, and the context behind one space where there is one.

    Source: FLEx (Liu et al., 2025, arXiv:2506.00965). Theirs trains so, but evaluates with the
    word "context: " between the two; ours is the same in both.
    """
    if not example.context.strip():
        return example.instruction
    return f"{example.instruction} {example.context}"


def render_prompt(template: Template, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt as text, up to where the response begins.

    To feed a model, use ``encode_prompt``: only it knows whether the tokenizer should still add
    its own special tokens (a chat template writes them itself).

    Raises:
        ValueError: ``template`` is unknown, or is "chat" and the tokenizer has no chat template.
    """
    return _render(prompt_text(example), template=template, tokenizer=tokenizer)


def encode_prompt(
    template: Template,
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
) -> list[int]:
    """Return the ids of the prompt, as in training, ready to generate from.

    A prompt of more than ``max_tokens`` loses the end of its text, that is, of its context; the
    instruction's beginning and the template's own words stay.

    Args:
        template: How the example is worded.
        example: Only its instruction and context are read.
        tokenizer: Adds its begin token, where it has that habit, but no end token.
        max_tokens: The longest prompt; None = no limit.

    Raises:
        ValueError: As in ``render_prompt``, or ``max_tokens`` has no room for the template.
    """
    text = prompt_text(example)
    input_ids = _encode_text(text, template=template, tokenizer=tokenizer)
    if max_tokens is None or len(input_ids) <= max_tokens:
        return input_ids
    return _shorten_prompt(text, template=template, tokenizer=tokenizer, max_tokens=max_tokens)


@dataclass(frozen=True)
class Encoded:
    """An example as token ids.

    Attributes:
        input_ids: Prompt, response and end token.
        labels: -100 on the prompt, the id itself on the response and the end token. A label
            belongs to the id at its own place; the model shifts.
        prompt_length: How many ids are prompt, in tokens.
        is_truncated: Something was left out to stay within the longest length.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    is_truncated: bool = False

    @property
    def prompt_ids(self) -> list[int]:
        """The ids before the response."""
        return self.input_ids[: self.prompt_length]

    @property
    def num_labels(self) -> int:
        """How many tokens carry loss; at least 1."""
        return len(self.input_ids) - self.prompt_length


def encode(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
) -> Encoded:
    """Encode prompt, response and end token, with loss on the last two only.

    The end token is in the loss by its place, not by its id, so it stays there for tokenizers
    that pad with it.

    Where all of it is more than ``max_tokens``, the response (with its end token) has a right to
    ``max_tokens // 2`` and the prompt to the rest; what one does not need the other may use. A
    prompt above its room loses the end of its text (see ``encode_prompt``), a response above its
    room loses its end and with it the end token, because the model should not learn to stop
    there. Every encoded example has at least one label. An example with options leaves room for
    the longest of them, so that the length of its prompt does not give the right one away.

    Args:
        example: What to encode.
        template: How it is worded.
        tokenizer: Must have an end token.
        max_tokens: The longest result, at least 2.

    Raises:
        ValueError: ``max_tokens`` is below 2 or has no room for the template, the tokenizer has no
            end token, or ``template`` does not fit as in ``render_prompt``.
    """
    prompt_ids, (response_ids, *_), is_truncated = _fit(
        example, [example.response, *example.options], template, tokenizer, max_tokens=max_tokens
    )
    return _join(prompt_ids, response_ids, is_truncated=is_truncated)


def encode_options(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
) -> tuple[Encoded, ...]:
    """Encode the example with each of its options as the response, behind one and the same prompt.

    As ``encode`` does it; the one of the right option is what ``encode`` returns. An option that
    loses its end has lost its end token too.

    Returns:
        One for each option, in their order; none where the example has no options.

    Raises:
        ValueError: As in ``encode``.
    """
    if not example.options:
        return ()
    prompt_ids, responses, is_truncated = _fit(
        example, example.options, template, tokenizer, max_tokens=max_tokens
    )
    return tuple(_join(prompt_ids, ids, is_truncated=is_truncated) for ids in responses)


def _fit(
    example: Example,
    responses: Sequence[str],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
) -> tuple[list[int], list[list[int]], bool]:
    """Return the prompt, the responses with end tokens, and whether anything was left out."""
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}; raise it")
    end_id = tokenizer.eos_token_id
    if not isinstance(end_id, int):
        raise ValueError(
            f"tokenizer must have an end token, got eos_token_id {end_id!r}; set its eos_token"
        )
    responses_ids = [[*_plain_ids(response, tokenizer), end_id] for response in responses]
    num_longest = max(map(len, responses_ids))
    prompt_ids = encode_prompt(template, example, tokenizer)
    if len(prompt_ids) + num_longest <= max_tokens:
        return prompt_ids, responses_ids, False
    room = max_tokens - min(num_longest, max_tokens // 2)
    prompt_ids = encode_prompt(template, example, tokenizer, max_tokens=room)
    room = max_tokens - len(prompt_ids)
    return prompt_ids, [response_ids[:room] for response_ids in responses_ids], True


def _join(prompt_ids: list[int], response_ids: list[int], *, is_truncated: bool) -> Encoded:
    return Encoded(
        input_ids=prompt_ids + response_ids,
        labels=[IGNORED] * len(prompt_ids) + response_ids,
        prompt_length=len(prompt_ids),
        is_truncated=is_truncated,
    )


def collate(
    batch: Sequence[Encoded], *, pad_id: int, side: Literal["right", "left"] = "right"
) -> dict[str, IntArray]:
    """Pad examples to the longest of the batch.

    Returns:
        ``input_ids``, ``attention_mask`` (1 = token, 0 = padding) and ``labels`` (-100 on padding),
        each (B, S). The mask comes from the lengths, so a token whose id equals ``pad_id`` stays.

    Raises:
        ValueError: The batch is empty, or ``side`` is neither right nor left.
    """
    inputs = collate_prompts([encoded.input_ids for encoded in batch], pad_id=pad_id, side=side)
    labels = _pad([encoded.labels for encoded in batch], value=IGNORED, side=side)
    return {**inputs, "labels": labels}


def collate_prompts(
    prompts: Sequence[Sequence[int]], *, pad_id: int, side: Literal["right", "left"] = "left"
) -> dict[str, IntArray]:
    """Pad prompts to the longest, on the left, so that all responses begin at the same place.

    Returns:
        ``input_ids`` and ``attention_mask`` as in ``collate``, each (B, S).

    Raises:
        ValueError: There is no prompt, or ``side`` is neither right nor left.
    """
    return {
        "input_ids": _pad(prompts, value=pad_id, side=side),
        "attention_mask": _pad([[1] * len(prompt) for prompt in prompts], value=0, side=side),
    }


def blocks(encoded: Sequence[Encoded], *, block_tokens: int, max_blocks: int) -> list[list[int]]:
    """Cut the concatenated examples into blocks for calibration, without padding.

    Prompts, responses and end tokens follow each other in the order given; what does not fill the
    last block is left out. Where there is less than one full block, it is the one, shorter block.

    Source: FLEx (Liu et al., 2025, arXiv:2506.00965), 128 blocks of 2048 in their code, which
    stops where a client has less.

    Args:
        encoded: The examples, already shuffled where that matters.
        block_tokens: Length of a block, in tokens.
        max_blocks: The most blocks to return.

    Raises:
        ValueError: There is no example, or one of the numbers is below 1.
    """
    if block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, got {block_tokens}; raise it")
    if max_blocks < 1:
        raise ValueError(f"max_blocks must be at least 1, got {max_blocks}; raise it")
    if not encoded:
        raise ValueError("encoded must hold at least one example, got none; add examples")
    stream: list[int] = []
    for example in encoded:
        stream.extend(example.input_ids)
        if len(stream) >= block_tokens * max_blocks:
            break
    if len(stream) < block_tokens:
        return [stream]
    num_blocks = min(len(stream) // block_tokens, max_blocks)
    return [stream[i * block_tokens : (i + 1) * block_tokens] for i in range(num_blocks)]


def _render(text: str, *, template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    if template == "alpaca":
        return (
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{text}\n\n### Response:\n"
        )
    if template == "plain":
        return f"{text}\n"
    if template == "chat":
        if tokenizer.chat_template is None:
            raise ValueError(
                "template must be one that the tokenizer has, got 'chat' and no chat template; "
                "choose 'alpaca', or a tokenizer with a chat template"
            )
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        )
    known = ", ".join(get_args(Template))
    raise ValueError(f"template must be one of {known}, got {template!r}; choose one of them")


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Not verbose: lengths are our business, and the tokenizer warns of its own maximum.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _encode_text(text: str, *, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    rendered = _render(text, template=template, tokenizer=tokenizer)
    if template == "chat":
        return _plain_ids(rendered, tokenizer)
    # Keep what the tokenizer puts before a text (a begin token) and drop what it puts behind (an
    # end token would tell the model that it is done before it began). The template's own words
    # come last, so what is special at the end was added.
    encoding = tokenizer(rendered, return_special_tokens_mask=True, verbose=False)
    input_ids, special_mask = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
    while special_mask and special_mask[-1]:
        special_mask.pop()
        input_ids.pop()
    return input_ids


def _shorten_prompt(
    text: str, *, template: Template, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[int]:
    """Return the ids of the longest prompt within ``max_tokens`` that loses the end of ``text``.

    Searched by characters and encoded anew each time, so it holds for any template and tokenizer
    and never cuts a character into bytes.
    """

    def encode_first(num_characters: int) -> list[int]:
        return _encode_text(text[:num_characters], template=template, tokenizer=tokenizer)

    num_template_tokens = len(encode_first(0))
    if num_template_tokens > max_tokens:
        raise ValueError(
            f"max_tokens must leave the prompt at least {num_template_tokens} tokens for the words "
            f"of the template {template!r}, got {max_tokens}; raise max_tokens or choose 'plain'"
        )
    # The number of tokens grows about evenly with the number of characters: begin where they would
    # run out, and widen the bracket around that until it holds the answer.
    num_all_tokens = len(encode_first(len(text)))
    share = (max_tokens - num_template_tokens) / max(1, num_all_tokens - num_template_tokens)
    low = high = min(int(share * len(text)), len(text))
    width = 32
    while low > 0 and len(encode_first(low)) > max_tokens:
        high, low, width = low, max(0, low - width), 2 * width
    while high < len(text) and len(encode_first(high)) <= max_tokens:
        low, high, width = high, min(len(text), high + width), 2 * width
    num_fitting = bisect.bisect_right(
        range(high + 1), max_tokens, lo=low + 1, key=lambda number: len(encode_first(number))
    )
    return encode_first(num_fitting - 1)


def _pad(rows: Sequence[Sequence[int]], *, value: int, side: Literal["right", "left"]) -> IntArray:
    """Return the rows as (B, S), padded with ``value``."""
    if side not in ("right", "left"):
        raise ValueError(f"side must be right or left, got {side!r}; choose one of them")
    if not rows:
        raise ValueError("batch must hold at least one example, got none; add examples")
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for row, target in zip(rows, padded, strict=True):
        if side == "right":
            target[: len(row)] = row
        else:
            target[len(target) - len(row) :] = row
    return padded
