"""How a tokenizer's chat template lays out a conversation, whatever is said in it.

The template is rendered with marks in the place of what was said. What it writes around the marks
is its own; text is put in their places afterwards, so no text can steer the template, and it is
known to the character whose every part is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from orchard.data.examples import Role
from orchard.data.special_tokens import Piece, PieceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What day it is for templates that write it: a run that goes on tomorrow keeps its prompts.
_TODAY = date(2025, 1, 1)
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.+?)\1")

# White space around a mark shows what a template strips.
_LEFT, _RIGHT = " \n\t ", " \t\n "


@dataclass(frozen=True)
class Slot:
    """The place of one turn's text.

    Attributes:
        turn: Which turn, from 0.
        is_learned: Whether it is a turn of the assistant.
        keeps_left: Whether white space at its beginning stays.
        keeps_right: Whether white space at its end stays.
        end: What the template writes behind it up to the end of the turn, its token included, where
            the turn is the assistant's; "" = no token ends it.
    """

    turn: int
    is_learned: bool
    keeps_left: bool
    keeps_right: bool
    end: str = ""

    def fill(self, text: str) -> str:
        """Return the text as the template would write it."""
        text = text if self.keeps_left else text.lstrip()
        return text if self.keeps_right else text.rstrip()


@dataclass(frozen=True)
class ChatLayout:
    """What a template writes around the turns of a conversation.

    Attributes:
        words: Its own words before, between and behind the slots, one more than there are slots.
        slots: The turns that come before the response, as the template orders them.
        lead: What the response begins with: blanks that a tokenizer joins to its first word.
        response: The response's place.
        special_ids: The special tokens of its own words, in order.
    """

    words: tuple[str, ...]
    slots: tuple[Slot, ...]
    lead: str
    response: Slot
    special_ids: tuple[int, ...] = ()

    def pieces(self, texts: Sequence[str]) -> list[Piece]:
        """Return everything before the response, with these texts as the turns."""
        pieces = [Piece(self.words[0], is_own=True)]
        for slot, words in zip(self.slots, self.words[1:], strict=True):
            pieces.append(Piece(slot.fill(texts[slot.turn]), is_learned=slot.is_learned))
            pieces.append(Piece(slot.end, is_own=True, is_learned=slot.is_learned))
            pieces.append(Piece(words.removeprefix(slot.end), is_own=True))
        return pieces


def read_layout(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[Role], encoder: PieceEncoder
) -> ChatLayout:
    """Return how the tokenizer's chat template lays out turns, and the response behind them.

    The prompt goes up to where the response's text begins, as the template writes a whole turn of
    the assistant, if that begins with the template's own prompt for an answer; else it is that
    prompt.

    Args:
        tokenizer: With a chat template.
        roles: Of the turns before the response, the last of them the user's.
        encoder: Knows the tokenizer's special tokens.

    Raises:
        ValueError: There is no chat template, it raises, or it leaves a turn out.
    """
    asked = _Renderer(tokenizer, roles)
    full = asked.render(with_response=True)
    padded = asked.render(with_response=True, left=_LEFT, right=_RIGHT)
    prompt = asked.render(with_response=False)
    marks = asked.marks
    head, tail = full.split(marks[-1])
    lead = ""
    if head.startswith(prompt):
        rest = head[len(prompt) :]
        lead = rest[len(rest.rstrip(" ")) :]
        prompt = head[: len(head) - len(lead)]

    def slot(turn: int, behind: str) -> Slot:
        place = padded.index(marks[turn])
        after = padded[place + len(marks[turn]) :]
        is_learned = turn == len(roles) or roles[turn] == "assistant"
        return Slot(
            turn,
            is_learned,
            keeps_left=padded[:place].endswith(_LEFT),
            keeps_right=after.startswith(_RIGHT),
            end=behind[: encoder.first_special(behind) or 0] if is_learned else "",
        )

    places = sorted((prompt.index(mark), turn) for turn, mark in enumerate(marks[:-1]))
    words, start = [], 0
    for place, turn in places:
        words.append(prompt[start:place])
        start = place + len(marks[turn])
    words.append(prompt[start:])
    slots = [slot(turn, words[number + 1]) for number, (_, turn) in enumerate(places)]
    ids, _ = encoder.encode([Piece(prompt, is_own=True)])
    return ChatLayout(
        words=tuple(words),
        slots=tuple(slots),
        lead=lead,
        response=slot(len(roles), tail),
        special_ids=tuple(encoder.special_ids(ids)),
    )


class _Renderer:
    """Renders turns with marks as their texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, roles: Sequence[Role]) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "data.template must be one that the tokenizer has, got chat and no chat template; "
                "choose alpaca, or a tokenizer with a chat template"
            )
        self._tokenizer = tokenizer
        self._roles: tuple[Role, ...] = (*roles, "assistant")
        letter = next(c for c in "xyzwvq" if f"{c}0turn" not in str(tokenizer.chat_template))
        self.marks = [f"{letter}{turn}turn{letter}" for turn in range(len(self._roles))]

    def render(self, *, with_response: bool, left: str = "", right: str = "") -> str:
        """Return what the template makes of the marks, each of which stands in it once."""
        num_turns = len(self._roles) if with_response else len(self._roles) - 1
        turns = [
            {"role": role, "content": f"{left}{mark}{right}"}
            for role, mark in zip(self._roles, self.marks, strict=True)
        ][:num_turns]
        shown = ", ".join(self._roles[:num_turns])
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    turns,
                    chat_template=_on_one_day(self._tokenizer.get_chat_template()),
                    tokenize=False,
                    add_generation_prompt=not with_response,
                )
            )
        # A template is a program of whoever made the model: it may raise anything.
        except Exception as error:
            reason = " ".join(str(error).split()) or "no message"
            raise ValueError(
                f"the tokenizer's chat template must render the turns {shown}, got "
                f"{type(error).__name__}: {reason}; choose another data.template, mend the "
                "template, or leave out turns that it does not take"
            ) from error
        for role, mark in list(zip(self._roles, self.marks, strict=True))[:num_turns]:
            if text.count(mark) != 1:
                raise ValueError(
                    f"the tokenizer's chat template must write each of the turns {shown} once, got "
                    f"the text of the turn of {role} {text.count(mark)} times; choose another "
                    "data.template, or leave out turns that it does not take"
                )
        return text


def _on_one_day(template: str) -> str:
    """Return a template for which it is always the same day."""
    formats = {found[2] for found in _DATE_CALL.finditer(template)}
    if not formats:
        return template
    days = {form: _TODAY.strftime(form) for form in sorted(formats)}
    # What ends in an expression keeps a line end that the template may begin with.
    return (
        f"{{%- macro strftime_now(form) -%}}{{{{ {days!r}[form] }}}}{{%- endmacro %}}{{{{ '' }}}}"
        + template
    )
