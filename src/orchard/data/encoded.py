"""Examples as token ids: padded batches, and blocks for calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]

# What was left out of an example to stay within the longest length.
Cut: TypeAlias = Literal["turns", "prompt", "response"]

# The label that PyTorch's cross-entropy and every causal model in transformers leave out.
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """An example as token ids.

    Attributes:
        input_ids: Prompt, response and end token.
        labels: The id itself on what is learned, the response and its end token and, where it is
            asked for, earlier turns of the assistant; -100 elsewhere. A label belongs to the id at
            its own place; the model shifts.
        prompt_length: How many ids stand before the response, in tokens.
        cut: What was left out to stay within the longest length; empty = nothing.
        is_ended: Whether the last id is an end token, which no option is judged by.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    cut: tuple[Cut, ...] = ()
    is_ended: bool = False

    @property
    def prompt_ids(self) -> list[int]:
        """The ids before the response."""
        return self.input_ids[: self.prompt_length]

    @property
    def response_ids(self) -> list[int]:
        """The ids of the response, without its end token."""
        return self.input_ids[self.prompt_length : len(self.input_ids) - self.is_ended]

    @property
    def num_labels(self) -> int:
        """How many tokens carry loss; at least 1."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def is_truncated(self) -> bool:
        """Whether something was left out."""
        return bool(self.cut)


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


def collate_pairs(batch: Sequence[Encoded], *, pad_id: int, start_id: int) -> dict[str, IntArray]:
    """Pad examples for an encoder that reads prompts and a decoder that writes responses.

    On the right, so that a row's tokens stand at the same places whatever it is read with.

    Args:
        batch: Examples, each with a prompt.
        pad_id: What rows are padded with.
        start_id: What the decoder reads before a response.

    Returns:
        ``input_ids`` and ``attention_mask`` of the prompts, (B, S); ``decoder_input_ids`` and
        ``decoder_attention_mask`` of the responses, each behind ``start_id`` and without its last
        token, and ``labels``, what is to be written at the same place (-100 on padding), (B, N).

    Raises:
        ValueError: The batch is empty.
    """
    prompts = collate_prompts([one.prompt_ids for one in batch], pad_id=pad_id, side="right")
    read = [[start_id, *one.input_ids[one.prompt_length : -1]] for one in batch]
    responses = collate_prompts(read, pad_id=pad_id, side="right")
    labels = [one.labels[one.prompt_length :] for one in batch]
    return {
        **prompts,
        **{f"decoder_{name}": array for name, array in responses.items()},
        "labels": _pad(labels, value=IGNORED, side="right"),
    }


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
