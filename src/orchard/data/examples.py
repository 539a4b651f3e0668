"""One row becomes one example: free text, a label of a fixed set, or one of several options.

A row is checked where it enters; the message of what is wrong says which column of which row.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from orchard.data.conversations import check_order, read_pairs, read_turns
from orchard.data.turns import Role as Role
from orchard.data.turns import Turn as Turn
from orchard.data.turns import shorten, valid_text

Answer: TypeAlias = Literal["text", "index"]

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Example:
    """One instruction and the response a model should learn to give.

    Attributes:
        instruction: What is asked; never empty.
        response: The wanted answer; never empty.
        context: Text the instruction refers to; "" = none.
        category: The label that partitions are made of; "" = none.
        options: The possible responses, all different, one of which is ``response``; empty = any
            text is one.
        history: What was said before the instruction, in order: a system turn first where there is
            one, then user and assistant in turn, the last of them an assistant; empty = nothing.
            The instruction is the last turn of the user, the response the last of the assistant.
    """

    instruction: str
    response: str
    context: str = ""
    category: str = ""
    options: tuple[str, ...] = ()
    history: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Fields:
    """Which column of a data set holds which part of an example.

    A row without the column ``context``, ``category``, ``system`` or ``history`` has none; a row
    without a column that was named otherwise is an error, because then the name is more likely
    wrong than the row.

    Attributes:
        instruction: Column of the instruction, in every row.
        response: Column of the response, in every row.
        context: Column of the context; "" = the data set has none.
        category: Column of the category; "" = the data set has none.
        system: Column of a system turn; "" = the data set has none.
        history: Column of what was said before, as a list of pairs or of turns; "" = the data set
            has none.
        conversation: Instead of the columns of instruction, context, response and history, one with
            a list of turns; "" = there is none.
        wording: Instead of the column of the instruction, its words, in which ``{COLUMN}`` stands
            for the text of that column; "" = the column.
        labels: The possible responses, the same in every row; empty = they differ, or any is one.
        options: Where the possible responses of a row are: one column with a list of them, or one
            column for each; empty = nowhere.
        answer: Whether the response is the text of the right option, or its index from 0.
        letters: Whether the options are listed in the prompt, a letter before each, and the letter
            is the response. With an index as the answer, options may then be equal, as a few of
            MMLU's are.

    Raises:
        ValueError: ``instruction`` or ``response`` is empty; ``labels`` holds one label or the same
            twice; or these settings contradict each other.
    """

    instruction: str = "instruction"
    response: str = "response"
    context: str = "context"
    category: str = "category"
    system: str = "system"
    history: str = "history"
    conversation: str = ""
    wording: str = ""
    labels: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    answer: Answer = "text"
    letters: bool = False

    def __post_init__(self) -> None:
        """Check the names, and that the settings fit each other."""
        for part, column in (("instruction", self.instruction), ("response", self.response)):
            if not column:
                raise ValueError(
                    f"fields.{part} must name a column, got ''; name the column of the {part}"
                )
        if self.labels and self.options:
            raise ValueError(
                "only one of fields.labels and fields.options must be given, got both; labels are "
                "the same in every row, options are columns"
            )
        if self.labels:
            _check_options(self.labels, self, where="fields.labels")
        if not self.has_options and (self.answer == "index" or self.letters):
            setting = "answer = index" if self.answer == "index" else "letters = true"
            raise ValueError(
                f"fields.labels or fields.options must be given with {setting}, got neither; name "
                "the labels, or the columns of the options"
            )

    @property
    def has_options(self) -> bool:
        """Whether examples have options."""
        return bool(self.labels or self.options)

    @property
    def asked(self) -> tuple[str, ...]:
        """The columns that make the instruction."""
        if self.wording:
            return tuple(_PLACEHOLDER.findall(self.wording))
        return (self.instruction,)

    @property
    def read(self) -> frozenset[str]:
        """All columns that are read where a row has them."""
        if self.conversation:
            parts: tuple[str, ...] = (self.conversation,)
        else:
            parts = (*self.asked, self.response, self.context, self.history)
        return frozenset({*parts, *self.options, self.category, self.system} - {""})


def example_from_row(row: Mapping[str, object], *, fields: Fields, where: str) -> Example:
    """Return the example of a row.

    Args:
        row: Column to value.
        fields: Which column holds what.
        where: Where the row stands, for messages.

    Raises:
        ValueError: A column is missing, empty or no text; the options and the answer do not fit
            each other; or the turns of a conversation do not.
    """
    system = _optional_text(row, fields.system, default=Fields.system, where=where)
    history = [Turn("system", system)] if system.strip() else []
    context = ""
    if fields.conversation:
        _require_column(row, fields.conversation, where=where)
        place = f"column {fields.conversation!r} in {where}"
        history += read_turns(row[fields.conversation], where=place)
        check_order(history, where=place)
        *history, request, answer = history
        instruction, response = request.text, answer.text
    else:
        instruction = _instruction(row, fields, where=where)
        context = _optional_text(row, fields.context, default=Fields.context, where=where)
        response = _filled(row, fields.response, where=where)
        if fields.history and (fields.history in row or fields.history != Fields.history):
            _require_column(row, fields.history, where=where)
            place = f"column {fields.history!r} in {where}"
            history += read_pairs(row[fields.history], where=place)
            asked = [Turn("user", instruction), Turn("assistant", response)]
            check_order([*history, *asked], where=place)
    options = _options(row, fields, where=where)
    if options:
        index = _answer_index(response, options, fields, where=where)
        if fields.letters:
            letters = string.ascii_uppercase[: len(options)]
            listed = "".join(f"\n{a}. {b}" for a, b in zip(letters, options, strict=True))
            # Before the context, because a long prompt loses its end.
            instruction += f"{listed}\n" if context.strip() else listed
            options = tuple(letters)
        response = options[index]
    return Example(
        instruction=instruction,
        response=response,
        context=context,
        category=_optional_text(row, fields.category, default=Fields.category, where=where),
        options=options,
        history=tuple(history),
    )


def _instruction(row: Mapping[str, object], fields: Fields, *, where: str) -> str:
    if not fields.wording:
        return _filled(row, fields.instruction, where=where)
    instruction = _PLACEHOLDER.sub(
        lambda match: _text(row, match[1], where=where, required=True), fields.wording
    )
    if not instruction.strip():
        raise ValueError(
            f"wording {fields.wording!r} must not be empty in {where}, got {instruction!r}; "
            "fill a column or remove the row"
        )
    return instruction


def _options(row: Mapping[str, object], fields: Fields, *, where: str) -> tuple[str, ...]:
    """Return the options of a row; none where the data has none."""
    if not fields.options:
        return fields.labels
    if len(fields.options) > 1:
        options = tuple(_filled(row, column, where=where) for column in fields.options)
    else:
        (column,) = fields.options
        _require_column(row, column, where=where)
        listed = row[column]
        if not isinstance(listed, list | tuple):
            raise ValueError(
                f"column {column!r} in {where} must be a list of options, got "
                f"{type(listed).__name__} {shorten(str(listed))}; name a column with a list, or "
                "one column for each option"
            )
        numbered = {f"{column}[{number}]": option for number, option in enumerate(listed)}
        options = tuple(_filled(numbered, name, where=where) for name in numbered)
    columns = ", ".join(map(repr, fields.options))
    _check_options(options, fields, where=f"options ({columns}) in {where}")
    return options


def _check_options(options: Sequence[str], fields: Fields, *, where: str) -> None:
    num_letters = len(string.ascii_uppercase)
    if len(options) < 2 or (fields.letters and len(options) > num_letters):
        rule = f"2 to {num_letters} with letters = true" if fields.letters else "2 or more"
        raise ValueError(f"{where} must be {rule}, got {len(options)}; add or remove some")
    repeated = {option for option in options if options.count(option) > 1}
    if repeated and not (fields.letters and fields.answer == "index"):
        raise ValueError(
            f"{where} must differ, got {shorten(min(repeated))} more than once; change one or "
            "remove the row"
        )


def _answer_index(response: str, options: Sequence[str], fields: Fields, *, where: str) -> int:
    """Return which option is the right one."""
    column = f"column {fields.response!r} in {where}"
    if fields.answer == "index":
        if not (response.isascii() and response.isdigit() and int(response) < len(options)):
            raise ValueError(
                f"{column} must be an index in 0..{len(options) - 1}, got {shorten(response)}; "
                "correct it or remove the row"
            )
        return int(response)
    if response not in options:
        known = ", ".join(map(shorten, options))
        raise ValueError(
            f"{column} must be one of {known}, got {shorten(response)}; correct it, or say "
            "data.answer = index where it is an index"
        )
    return options.index(response)


def _filled(row: Mapping[str, object], column: str, *, where: str) -> str:
    """Return the text of a column that must hold more than white space."""
    text = _text(row, column, where=where, required=True)
    if not text.strip():
        raise ValueError(
            f"column {column!r} in {where} must not be empty, got {text!r}; "
            "fill it or remove the row"
        )
    return text


def _optional_text(row: Mapping[str, object], column: str, *, default: str, where: str) -> str:
    if not column or (column == default and column not in row):
        return ""
    return _text(row, column, where=where, required=False)


def _text(row: Mapping[str, object], column: str, *, where: str, required: bool) -> str:
    """Return the value of a column as text.

    Raises:
        ValueError: The column is missing, or its value is neither text nor a finite number.
    """
    _require_column(row, column, where=where)
    value = row[column]
    if value is None and not required:
        return ""
    if isinstance(value, str):
        return valid_text(value, where=f"column {column!r} in {where}")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise ValueError(
        f"column {column!r} in {where} must be text or a number, got "
        f"{type(value).__name__} {shorten(str(value))}; convert it to text first"
    )


def _require_column(row: Mapping[str, object], column: str, *, where: str) -> None:
    if column not in row:
        raise ValueError(
            f"{where} must have the column {column!r}, got {', '.join(map(repr, row)) or 'none'}; "
            "say in the fields which column holds what"
        )
