"""Known forms of instruction data, recognized by the names of their columns.

The forms are those that the documentation of axolotl and TRL names for supervised fine-tuning. A
form says which column holds what; an option of the recipe that is not at its default says it
otherwise. Forms of other kinds of training (preferences, plain text, tokens) are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from orchard.data.conversations import is_pairs, is_turn
from orchard.data.examples import Example, Fields, example_from_row

Format: TypeAlias = Literal[
    "auto",
    "instruction",
    "alpaca",
    "question_answer",
    "prompt_completion",
    "input_output",
    "messages",
    "sharegpt",
]

_PARTS = ("instruction", "context", "response", "system", "history")

# Form to the columns that it may have: of each part, the first that the data has.
_COLUMNS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "alpaca": {"instruction": ("instruction",), "context": ("input",), "response": ("output",)},
    "question_answer": {
        "instruction": ("question",),
        "context": ("context",),
        "response": ("answer", "response"),
        "system": ("system", "system_prompt"),
    },
    "prompt_completion": {
        "instruction": ("prompt",),
        "response": ("completion", "response", "generation"),
    },
    "input_output": {
        "instruction": ("input", "inputs"),
        "response": ("output", "outputs", "target", "targets"),
    },
}
_CONVERSATIONS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation"),
    "sharegpt": ("conversations",),
}
# Where rows fit several forms, the first of them is taken.
_ORDER = (
    *("instruction", "messages", "sharegpt"),
    *("alpaca", "question_answer", "prompt_completion", "input_output"),
)
# Columns of other kinds of training, and what to do with such data.
_REFUSED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("chosen", "rejected"),
        "preferences",
        "to learn the chosen answers, write them as responses, or say data.instruction=prompt "
        "data.response=chosen where both are text",
    ),
    (
        ("prompt", "completions", "labels"),
        "steps with labels",
        "write each prompt with its right answer as prompt and completion",
    ),
    (("input_ids",), "tokens", "give the text, which Orchard encodes for the model"),
    (("segments",), "segments", "write instruction and response as columns"),
    (("text",), "text without a response", "write what is asked and the response as columns"),
    (("prompt",), "prompts without a response", "add the response as a column completion"),
)
_JOINED = "prompt and completion"
_PROBABLY = {
    "input": "Alpaca's context: data.context=input",
    "context": "the context: data.context=context",
    "category": "the category: data.category=category",
    "system": "a system turn: data.system=system",
    "system_prompt": "a system turn: data.system=system_prompt",
    "history": "earlier turns: data.history=history",
    "messages": "a conversation: data.format=messages",
    "conversations": "a conversation: data.format=sharegpt",
    "instruction": "what is asked: data.instruction=instruction",
    "response": "the response: data.response=response",
    "output": "the response: data.response=output",
    "rejected": "the worse answer of a preference, which is not learned",
    "tools": "what tools the assistant has, which Orchard does not read",
    "weight": "whether a turn is learned, which Orchard does not read",
    "train": "whether a turn is learned, which Orchard does not read",
}


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read.

    Attributes:
        name: Of the format.
        fields: Which column holds what.
        turned_off: Columns of a usual name that hold something else, to what they lack.
    """

    name: str
    fields: Fields
    turned_off: Mapping[str, str]

    def example(self, row: Mapping[str, object], *, where: str) -> Example:
        """Return the example of a row.

        Raises:
            ValueError: See ``example_from_row``.
        """
        fields = self.fields
        if self.name == "prompt_completion":
            prompt, completion = row.get(fields.instruction), row.get(fields.response)
            if isinstance(prompt, list | tuple) or isinstance(completion, list | tuple):
                turns = [*_turns(prompt, "user"), *_turns(completion, "assistant")]
                row = {**row, _JOINED: turns}
                fields = replace(fields, conversation=_JOINED)
        return example_from_row(row, fields=fields, where=where)

    def taken(self, given: Fields, columns: Sequence[str]) -> str:
        """Say what was taken of the columns there are that ``given`` did not name; "" = nothing."""
        if self.fields.conversation:
            parts = [("conversation", self.fields.conversation)]
        else:
            parts = [(part, getattr(self.fields, part)) for part in _PARTS]
        parts.append(("system", self.fields.system))
        found = dict(part for part in parts if part[1] in columns)
        usual = ("instruction", "context", "response")
        if all(part in usual and column == getattr(given, part) for part, column in found.items()):
            return ""
        named = ", ".join(f"{part} from {column!r}" for part, column in found.items())
        return f"{self.name} ({named})"


def probably(column: str, layout: Layout) -> str:
    """Say what a column that is not read probably is; "" = nobody knows."""
    if column in layout.turned_off:
        return layout.turned_off[column]
    return _PROBABLY.get(column.rpartition("[].")[2], "")


def choose_layout(
    rows: Sequence[Mapping[str, object]], *, fields: Fields, format: Format, where: str
) -> Layout:
    """Return how rows are read.

    Under ``auto`` the format is the one whose columns the most rows have.

    Args:
        rows: The first rows of a source, without those that are broken.
        fields: What the recipe names.
        format: What the recipe says.
        where: The source, for messages.

    Raises:
        ValueError: The rows are of no known format, or of one for another kind of training.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    names = _ORDER if format == "auto" else (format,)
    layouts = [
        layout
        for name in names
        if (layout := _layout(name, fields, columns, rows, is_given=format != "auto"))
    ]
    fitting = [sum(_fits(layout, row) for row in rows) for layout in layouts]
    if format == "auto":
        if rows and not any(fitting):
            _refuse(columns, rows, fields, layouts, where=where)
        best = fitting.index(max(fitting))
        layout = layouts[best]
        if layout.name == "prompt_completion" and _is_judged(rows):
            raise ValueError(
                f"{where} must be data for supervised fine-tuning, got prompts with completions "
                "and whether each is wanted ('label'); remove those that are not and say "
                "data.format=prompt_completion"
            )
        return layout
    return layouts[0]


def _layout(
    name: str,
    fields: Fields,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    *,
    is_given: bool,
) -> Layout | None:
    """Return how a format reads these columns; None where the recipe names others."""
    turned_off: dict[str, str] = {}
    changed: dict[str, Any] = {}
    if name in _CONVERSATIONS:
        known = [column for column in _CONVERSATIONS[name] if column in columns]
        changed["conversation"] = fields.conversation or (known or list(_CONVERSATIONS[name]))[0]
        named = ("instruction", "response", "wording")
        if not (is_given or fields.conversation) and any(
            getattr(fields, part) != getattr(Fields, part) for part in named
        ):
            return None
    elif fields.conversation:
        if is_given:
            raise ValueError(
                f"data.format must be messages or sharegpt with data.conversation, got {name}; "
                "drop one of the two"
            )
        return None
    for part, candidates in _COLUMNS.get(name, {}).items():
        if getattr(fields, part) == getattr(Fields, part):
            known = [column for column in candidates if column in columns]
            if known or part in ("instruction", "response"):
                changed[part] = (known or list(candidates))[0]
        elif not is_given and getattr(fields, part) not in (*candidates, ""):
            return None
    if name == "instruction" and not is_given:
        takes_input = fields.context == Fields.context and Fields.context not in columns
        if takes_input and "input" in columns and "input" not in fields.read:
            changed["context"] = "input"
    # A column of a usual name may hold something else, such as a patient's history.
    held = [row["history"] for row in rows if row.get("history") not in (None, "", [])]
    are_turns = all(is_pairs(value) or _are_turns(value) for value in held)
    if fields.history == Fields.history and not are_turns and not is_given:
        changed["history"] = ""
        turned_off["history"] = "something else than a list of earlier turns"
    return Layout(name, replace(fields, **changed), turned_off)


def _fits(layout: Layout, row: Mapping[str, object]) -> bool:
    if layout.fields.conversation:
        return _are_turns(row.get(layout.fields.conversation))
    return all(row.get(column) is not None for column in _needed(layout.fields))


def _needed(fields: Fields) -> tuple[str, ...]:
    return (fields.conversation,) if fields.conversation else (*fields.asked, fields.response)


def _are_turns(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(is_turn(turn) for turn in value)


def _turns(value: object, role: str) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [{"role": role, "content": value}]


def _is_judged(rows: Sequence[Mapping[str, object]]) -> bool:
    labels = [row["label"] for row in rows if row.get("label") is not None]
    return bool(labels) and all(str(label).lower() in ("true", "false") for label in labels)


def _refuse(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    fields: Fields,
    layouts: Sequence[Layout],
    *,
    where: str,
) -> None:
    """Say that rows are of no known format, and what they probably are."""
    shown = ", ".join(map(repr, columns)) or "none"
    is_named = any(
        getattr(fields, part) != getattr(Fields, part)
        for part in ("instruction", "response", "wording", "conversation")
    )
    for layout in () if is_named else layouts:
        needed = _needed(layout.fields)
        if set(needed) <= set(columns):
            what = "a list of turns" if layout.fields.conversation else "values"
            raise ValueError(
                f"{where} must have {what} in {' and '.join(map(repr, needed))} of a row (format "
                f"{layout.name}), got none in {len(rows)}; fill them, or say in data.instruction "
                "and data.response which columns hold what"
            )
    for needed, kind, remedy in () if is_named else _REFUSED:
        if set(needed) <= set(columns):
            raise ValueError(
                f"{where} must be data for supervised fine-tuning, got {kind} (columns {shown}); "
                f"{remedy}"
            )
    asked = " and ".join(map(repr, _needed(fields)))
    if is_named:
        raise ValueError(
            f"{where} must have the columns {asked} with values in a row, got the columns {shown}; "
            "say in data.instruction and data.response which column holds what"
        )
    inside = [
        column
        for column, value in (rows[0].items() if len(rows) == 1 else ())
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    ]
    if inside:
        raise ValueError(
            f"{where} must be a list of rows, got an object with lists inside "
            f"({', '.join(map(repr, inside))}); write the list of rows alone"
        )
    raise ValueError(
        f"{where} must have the columns of a known format ({', '.join(_ORDER)}), got {shown}; say "
        "in data.instruction and data.response which column holds what (the first row of a CSV "
        "file must name them)"
    )
