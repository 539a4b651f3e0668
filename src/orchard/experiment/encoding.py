"""A recipe's examples become token ids, and what was cut of them is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from orchard.data.encoded import IGNORED, Cut, Encoded
from orchard.data.examples import Example
from orchard.data.special_tokens import Piece
from orchard.data.templates import Wording, encode, encode_options
from orchard.evaluation.quality import TestExample
from orchard.models.stored.endings import read_end_ids
from orchard.models.stored.sources import is_read_apart
from orchard.recipe.options import Recipe

_PARTS = {"turns": "earlier turns of", "prompt": "the prompt of", "response": "the response of"}


def make_wording(recipe: Recipe, tokenizer: Any) -> Wording:
    """Return how a recipe's examples become ids.

    Raises:
        ValueError: Template and tokenizer do not fit.
    """
    data = recipe.data
    return Wording(
        data.template,  # type: ignore[arg-type]
        tokenizer,
        special=data.special_tokens,  # type: ignore[arg-type]
        learn=data.learn,  # type: ignore[arg-type]
        is_read_apart=is_read_apart(recipe.model.path),
    )


def end_ids(recipe: Recipe, wording: Wording) -> tuple[int, ...]:
    """Return every token that ends an answer: what is learned as one, and what the model names.

    Raises:
        FileNotFoundError: There is no model.
        ValueError: It names something else than tokens.
    """
    own = {wording.end_id, int(wording.tokenizer.eos_token_id)}
    return tuple(sorted(own | set(read_end_ids(recipe.model.path))))


def encode_all(
    examples: Sequence[Example], wording: Wording, *, max_tokens: int, whose: str
) -> list[Encoded]:
    """Encode examples to learn from.

    Args:
        examples: What to encode; one without an instruction is a text alone.
        wording: How.
        max_tokens: The longest result.
        whose: What the examples are called in messages.

    Raises:
        ValueError: One cannot be encoded; a note says which.
    """
    found = []
    for number, example in enumerate(examples, start=1):
        with _naming(number, whose):
            if example.instruction:
                found.append(encode(example, wording, max_tokens=max_tokens))
            else:
                found.append(_encode_text(example.response, wording, max_tokens=max_tokens))
    return found


def _encode_text(text: str, wording: Wording, *, max_tokens: int) -> Encoded:
    """Encode a text of a corpus as it is, up to a length."""
    if wording.is_read_apart:
        raise ValueError(
            "an example must have an instruction with an encoder-decoder, got a text alone; choose "
            "data of instructions and responses, or another checkpoint"
        )
    ids, _ = wording.encoder.encode([Piece(text)], begins=True)
    cut: tuple[Cut, ...] = ("response",) if len(ids) > max_tokens else ()
    ids = ids[:max_tokens]
    # Nothing comes before the first, by which it could be predicted.
    return Encoded(ids, [IGNORED, *ids[1:]], prompt_length=0, cut=cut)


def encode_test(
    examples: Sequence[Example],
    wording: Wording,
    *,
    max_tokens: int,
    whose: str,
    chooses: bool = False,
) -> list[TestExample]:
    """Encode examples to be tested on.

    Args:
        examples: What to encode; one without an instruction is a text alone, which has a loss only.
        wording: How.
        max_tokens: The longest result.
        whose: What the examples are called in messages.
        chooses: Whether a model is asked which of their options is the likeliest; then these must
            differ in their tokens.

    Raises:
        ValueError: One cannot be encoded, or has options of equal tokens.
    """
    found = []
    for number, example in enumerate(examples, start=1):
        with _naming(number, whose):
            if not example.instruction:
                text = _encode_text(example.response, wording, max_tokens=max_tokens)
                found.append(TestExample(text, ""))
                continue
            test_example = TestExample(
                encode(example, wording, max_tokens=max_tokens),
                example.response.strip(),
                options=encode_options(example, wording, max_tokens=max_tokens),
                answer=example.options.index(example.response) if example.options else 0,
            )
            found.append(test_example)
    if chooses:
        _check_options_differ(found, max_tokens=max_tokens, whose=whose)
    return found


def encode_clients(
    train: Mapping[str, Sequence[Example]],
    test: Mapping[str, Sequence[Example]],
    wording: Wording,
    *,
    has_central_test: bool,
    max_tokens: int,
    chooses: bool,
    has_shots: bool = False,
) -> tuple[dict[str, list[Encoded]], dict[str, list[TestExample]]]:
    """Encode what clients hold.

    Args:
        train: Client id to training examples.
        test: Client id to held-out examples.
        wording: How.
        has_central_test: Whether all clients are tested on the same list; then it is encoded once.
        max_tokens: The longest result.
        chooses: See ``encode_test``.
        has_shots: Whether earlier turns of test examples are other examples, whose answers carry no
            loss whatever ``wording.learn`` says.

    Returns:
        Client id to encoded training examples, and the same for held-out ones.

    Raises:
        ValueError: An example cannot be encoded, or has options of equal tokens.
    """
    # What is shown before a question is no answer of the model's.
    tested_wording = replace(wording, learn="last") if has_shots else wording
    encode_held_out = partial(
        encode_test, wording=tested_wording, max_tokens=max_tokens, chooses=chooses
    )
    if has_central_test:
        central = encode_held_out(next(iter(test.values())), whose="the test examples")
        tested = dict.fromkeys(test, central)
    else:
        tested = {
            client: encode_held_out(examples, whose=f"the test examples of {client}")
            for client, examples in test.items()
        }
    learned = {
        client: encode_all(
            examples, wording, max_tokens=max_tokens, whose=f"the training examples of {client}"
        )
        for client, examples in train.items()
    }
    return learned, tested


def cut_note(examples: Iterable[Encoded], *, max_tokens: int, whose: str) -> str:
    """Return a sentence on how many of the examples were cut; "" = none was."""
    encoded = list(examples)
    parts = Counter(part for example in encoded for part in example.cut)
    if not parts:
        return ""
    num_cut = sum(example.is_truncated for example in encoded)
    named = ", ".join(f"{words} {parts[part]}" for part, words in _PARTS.items() if parts[part])  # type: ignore[index]
    return f"{num_cut} of {len(encoded)} {whose} were cut to {max_tokens} tokens ({named})"


def options_note(examples: Sequence[TestExample], *, max_tokens: int, whose: str) -> str:
    """Return a sentence on how many examples have options that were cut; "" = none has."""
    num_cut = sum(
        any("response" in option.cut for option in example.options) for example in examples
    )
    if not num_cut:
        return ""
    return (
        f"{num_cut} of {len(examples)} {whose} have options that were cut to {max_tokens} tokens; "
        "they are judged by what is left"
    )


def _check_options_differ(examples: Sequence[TestExample], *, max_tokens: int, whose: str) -> None:
    """Check that a choice between the options of every example can be right or wrong.

    Raises:
        ValueError: Two options of an example have the same tokens, or one has none.
    """
    equal = []
    for number, example in enumerate(examples, start=1):
        ids = [tuple(option.response_ids) for option in example.options]
        if () in ids or len(set(ids)) < len(ids):
            equal.append(number)
    if not equal:
        return
    is_cut = any("response" in option.cut for n in equal for option in examples[n - 1].options)
    reason = f"cut to data.max_tokens = {max_tokens}" if is_cut else "as tokens"
    advice = "raise data.max_tokens" if is_cut else "reword them"
    raise ValueError(
        f"options of {whose} must differ {reason}, got equal ones in {len(equal)} of "
        f"{len(examples)}, the first in number {equal[0]}; {advice}, remove these examples, or "
        "drop accuracy from evaluation.metrics"
    )


@contextmanager
def _naming(number: int, whose: str) -> Iterator[None]:
    """Say in a note which example an error is about."""
    try:
        yield
    except ValueError as error:
        error.add_note(f"number {number} of {whose}")
        raise
