"""Examples as the model sees them: their tokens, what of them is learned, what was cut.

Colors help, and nothing is said by color alone: ``[`` and ``]`` are around what is learned, ``{``
and ``}`` around special tokens, and ``|`` stands between tokens. A character that is split over
several tokens is shown with the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from orchard.data.encoded import IGNORED, Encoded
from orchard.data.templates import Wording
from orchard.evaluation.quality import TestExample
from orchard.experiment.encoding import (
    cut_note,
    encode_clients,
    end_ids,
    make_wording,
    options_note,
)
from orchard.experiment.holdings import build_federation
from orchard.models.stored.loading import load_tokenizer
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words

_LEARNED, _SPECIAL, _BETWEEN = "bold green", "cyan", "dim"
_NUM_BINS = 8
# So many ids before a token are decoded with it: enough for its blanks and for split characters.
_CONTEXT = 8


@dataclass(frozen=True)
class Preview:
    """What there is to show.

    Attributes:
        recipe: Of the run.
        wording: How examples become ids.
        client: Whose examples are shown.
        train: Client id to encoded training examples.
        test: The same for held-out ones; with a central test set, of one client alone.
        end_ids: The tokens that end an answer.
        notes: What a person should know about the data.
    """

    recipe: Recipe
    wording: Wording
    client: str
    train: Mapping[str, Sequence[Encoded]]
    test: Mapping[str, Sequence[TestExample]]
    end_ids: tuple[int, ...]
    notes: tuple[str, ...]


def make_preview(recipe: Recipe, *, client: str = "") -> Preview:
    """Read a recipe's data and encode it, without the model.

    Args:
        recipe: Every choice.
        client: Whose examples; "" = all, and those of the first are shown.

    Raises:
        FileNotFoundError: Data or tokenizer are not there.
        ValueError: Something does not fit, or there is no such client.
    """
    federation = build_federation(recipe)
    if client and client not in federation.train:
        known = ", ".join(federation.train)
        raise ValueError(f"--client must be one of {known}, got {client}; name one of them")
    wording = make_wording(recipe, load_tokenizer(recipe.model.path))
    chosen = [client] if client else list(federation.train)
    limit, chooses = recipe.data.max_tokens, "accuracy" in words(recipe.evaluation.metrics)
    tested_of = chosen[:1] if federation.has_central_test else chosen
    train, test = encode_clients(
        {name: federation.train[name] for name in chosen},
        {name: federation.test[name] for name in tested_of},
        wording,
        has_central_test=federation.has_central_test,
        max_tokens=limit,
        chooses=chooses,
        has_shots=recipe.evaluation.shots > 0,
    )
    tested = [example for examples in test.values() for example in examples]
    notes = [
        *federation.notes(),
        cut_note(
            [e for examples in train.values() for e in examples],
            max_tokens=limit,
            whose="training examples",
        ),
        cut_note([e.encoded for e in tested], max_tokens=limit, whose="test examples"),
        options_note(tested, max_tokens=limit, whose="test examples"),
    ]
    return Preview(
        recipe=recipe,
        wording=wording,
        client=chosen[0],
        train=train,
        test=test,
        end_ids=end_ids(recipe, wording),
        notes=tuple(note for note in notes if note),
    )


def print_preview(preview: Preview, console: Console, *, num_examples: int) -> None:
    """Print examples of one client, and how long all are.

    Args:
        preview: What there is to show.
        console: Where; narrow ones and those of few letters are good enough.
        num_examples: How many training and how many test examples.
    """
    tokenizer = preview.wording.tokenizer
    special = frozenset(tokenizer.all_special_ids) | set(preview.end_ids)
    data = preview.recipe.data

    def say(*parts: str | tuple[str, str]) -> None:
        shown = [(part, "") if isinstance(part, str) else part for part in parts]
        text = Text(overflow="fold")
        for part, style in shown:
            text.append(_writable(part, console), style=style)
        console.print(text, highlight=False)

    ends = ", ".join(str(tokenizer.decode([index])) for index in preview.end_ids)
    train = preview.train[preview.client]
    test = next(iter(preview.test.values())) if preview.test else ()
    say(f"{preview.client}: {len(train)} training and {len(test)} test examples")
    say(f"template {data.template}, at most {data.max_tokens} tokens; answers end at {ends}")
    say(("[", _BETWEEN), ("learned", _LEARNED), ("]", _BETWEEN), " ", ("{special}", _SPECIAL))
    for number, example in enumerate(train[:num_examples], start=1):
        say("")
        say((f"training example {number} of {len(train)}: {_facts(example)}", "bold"))
        say(*_marked(example, tokenizer, special))
    for number, tested in enumerate(test[:num_examples], start=1):
        say("")
        say((f"test example {number} of {len(test)}: {_facts(tested.encoded)}", "bold"))
        say(*_marked(tested.encoded, tokenizer, special))
        for place, option in enumerate(tested.options):
            if place != tested.answer:
                is_cut = " (cut)" if "response" in option.cut else ""
                ids = option.input_ids[option.prompt_length :]
                say(f"or{is_cut}: ", *_joined(ids, [True] * len(ids), tokenizer, special))
    lengths = [len(e.input_ids) for examples in preview.train.values() for e in examples]
    whose = preview.client if len(preview.train) == 1 else f"{len(preview.train)} clients"
    say("")
    say((f"tokens of the training examples of {whose}", "bold"))
    for line in histogram(lengths, width=min(console.width, 100)):
        say(line)
    for note in preview.notes:
        say((f"note: {note}", "yellow"))


def histogram(lengths: Sequence[int], *, width: int) -> list[str]:
    """Return how many of the lengths are in which range, a line for each of a few ranges.

    Args:
        lengths: At least one.
        width: Of the longest line, in characters.
    """
    low, high = min(lengths), max(lengths)
    size = -(-(high - low + 1) // _NUM_BINS)
    counts: dict[int, int] = {}
    for length in lengths:
        place = (length - low) // size
        counts[place] = counts.get(place, 0) + 1
    digits, count_digits = len(str(high)), len(str(max(counts.values())))
    room = max(1, width - 2 * digits - count_digits - 4)
    lines = []
    for place in range(max(counts) + 1):
        start = low + place * size
        count = counts.get(place, 0)
        bar = "#" * -(-count * room // max(counts.values()))
        end = min(start + size - 1, high)
        lines.append(f"{start:>{digits}}-{end:<{digits}} {count:>{count_digits}} {bar}".rstrip())
    return lines


def _facts(example: Encoded) -> str:
    cut = f", cut: {' and '.join(example.cut)}" if example.cut else ""
    return f"{len(example.input_ids)} tokens, {example.num_labels} learned{cut}"


def _marked(example: Encoded, tokenizer: Any, special: frozenset[int]) -> list[tuple[str, str]]:
    is_learned = [label != IGNORED for label in example.labels]
    return _joined(example.input_ids, is_learned, tokenizer, special)


def _joined(
    ids: Sequence[int], is_learned: Sequence[bool], tokenizer: Any, special: frozenset[int]
) -> list[tuple[str, str]]:
    """Return tokens with marks around and between them, and the style of each part."""
    parts: list[tuple[str, str]] = []
    before = False
    for text, index, now in zip(token_texts(ids, tokenizer), ids, is_learned, strict=True):
        if not text:
            continue
        if before and not now:
            parts.append(("]", _BETWEEN))
        if now and not before:
            parts.append(("[", _BETWEEN))
        elif parts and not (before and not now):
            parts.append(("|", _BETWEEN))
        before = now
        style = _LEARNED if now else ""
        shown = text.replace("\n", "\\n\n").replace("\t", "\\t").replace("\r", "\\r")
        if index in special:
            parts.append((f"{{{shown}}}", f"{style} {_SPECIAL}".strip()))
        else:
            parts.append((shown, style))
    if before:
        parts.append(("]", _BETWEEN))
    return parts


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return what each token adds to the text; of a character in several, the last has it all."""
    texts = []
    done = 0  # ids whose text has been given
    for number in range(len(ids)):
        start = max(0, done - _CONTEXT)
        before = str(tokenizer.decode(list(ids[start:done]), skip_special_tokens=False))
        whole = str(tokenizer.decode(list(ids[start : number + 1]), skip_special_tokens=False))
        is_split = whole.endswith("\N{REPLACEMENT CHARACTER}") and number - done < 4
        if is_split and number < len(ids) - 1:
            texts.append("")
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else whole)
        done = number + 1
    return texts


def _writable(text: str, console: Console) -> str:
    """Return text in which letters that the terminal does not have are escaped."""
    encoding = console.encoding
    return text.encode(encoding, "backslashreplace").decode(encoding)
