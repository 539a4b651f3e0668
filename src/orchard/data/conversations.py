"""Lists of turns become an example: what was said before, the last request, the last answer.

Two ways to write a turn are read: ``{"role": ..., "content": ...}`` as OpenAI's and TRL's data has
it, and ``{"from": ..., "value": ...}`` as ShareGPT's has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

from orchard.data.turns import Role, Turn, shorten, valid_text

ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")

_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}


def is_turn(value: object) -> bool:
    """Say whether a value looks like one turn of a conversation."""
    return isinstance(value, Mapping) and any(key in value for key in ROLE_KEYS)


def read_turns(listed: object, *, where: str) -> list[Turn]:
    """Return the turns of a list; a system turn without text is none.

    Args:
        listed: The list, as the data has it.
        where: Column and row, for messages.

    Raises:
        ValueError: It is no list of turns, or a turn has another role, or no text.
    """
    if not isinstance(listed, list | tuple):
        raise ValueError(
            f"{where} must be a list of turns, got {type(listed).__name__} "
            f"{shorten(str(listed))}; write "
            '[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'
        )
    turns = [_turn(turn, where=f"turn {n} of {where}") for n, turn in enumerate(listed, start=1)]
    return [turn for turn in turns if turn.role != "system" or turn.text.strip()]


def read_pairs(listed: object, *, where: str) -> list[Turn]:
    """Return the turns of a history: pairs of a request and its answer, or a list of turns.

    Raises:
        ValueError: It is neither.
    """
    if listed is None or listed == "":
        return []
    if isinstance(listed, list | tuple) and all(is_turn(turn) for turn in listed):
        return read_turns(listed, where=where)
    if not is_pairs(listed):
        raise ValueError(
            f"{where} must be a list of pairs of a request and its answer, got "
            f"{type(listed).__name__} {shorten(str(listed))}; write [[request, answer], ...], or "
            "say data.history= where it is something else"
        )
    turns: list[Turn] = []
    for number, (request, answer) in enumerate(listed, start=1):
        place = f"pair {number} of {where}"
        turns += [
            Turn("user", _said(request, where=f"the request in {place}")),
            Turn("assistant", _said(answer, where=f"the answer in {place}")),
        ]
    return turns


def is_pairs(listed: object) -> TypeGuard[Sequence[Sequence[object]]]:
    """Say whether a value is a list of pairs."""
    return isinstance(listed, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in listed
    )


def check_order(turns: Sequence[Turn], *, where: str) -> None:
    """Check that turns are a whole conversation that ends with an answer.

    A system turn comes first or not at all; then user and assistant take turns, and the assistant
    has the last word: a request that nobody answered cannot be learned.

    Raises:
        ValueError: They are in another order, or there are too few.
    """
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    for number, turn in enumerate(rest):
        wanted = "assistant" if number % 2 else "user"
        if turn.role == "system":
            raise ValueError(
                f"{where} must have one system turn, the first, or none, got another as turn "
                f"{len(turns) - len(rest) + number + 1}; join them, or remove the row"
            )
        if turn.role != wanted:
            place = "the first turn" if number == 0 else f"the turn after {rest[number - 1].role}'s"
            raise ValueError(
                f"{where} must be of user and assistant in turn, after at most one system turn, "
                f"got {place} from {turn.role}; repair or remove the row"
            )
    if len(rest) < 2 or len(rest) % 2:
        last = rest[-1].role if rest else "nobody"
        raise ValueError(
            f"{where} must end with a turn of the assistant, got the last turn from {last}; "
            "add the answer or remove the row"
        )


def unread_keys(listed: object) -> set[str]:
    """Return what turns hold beside their role and text."""
    if not isinstance(listed, list | tuple):
        return set()
    return {
        str(key)
        for turn in listed
        if isinstance(turn, Mapping)
        for key, value in turn.items()
        if key not in (*ROLE_KEYS, *TEXT_KEYS) and value not in (None, "", [])
    }


def _turn(turn: object, *, where: str) -> Turn:
    roles = [key for key in ROLE_KEYS if isinstance(turn, Mapping) and key in turn]
    texts = [key for key in TEXT_KEYS if isinstance(turn, Mapping) and key in turn]
    if not isinstance(turn, Mapping) or len(roles) != 1 or len(texts) != 1:
        raise ValueError(
            f"{where} must have a role and a content, or from and value, got "
            f"{shorten(str(turn))}; repair or remove the row"
        )
    name = turn[roles[0]]
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(
            f"{where} must be from system, user or assistant, got {shorten(str(name))}; Orchard "
            "reads no turns of tools: remove the row, or the turn"
        )
    text = turn[texts[0]]
    if role == "system" and text in (None, ""):
        return Turn(role, "")
    return Turn(role, _said(text, where=where, may_be_blank=role == "system"))


def _said(text: object, *, where: str, may_be_blank: bool = False) -> str:
    if isinstance(text, list | tuple):
        text = "".join(_part(part, where=where) for part in text)
    if not isinstance(text, str) or not (text.strip() or may_be_blank):
        raise ValueError(
            f"{where} must be text, got {type(text).__name__} {shorten(str(text))}; fill it or "
            "remove the row"
        )
    return valid_text(text, where=where)


def _part(part: object, *, where: str) -> str:
    """Return the text of one of the parts that OpenAI's data divides a content into."""
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise ValueError(
        f"{where} must be text alone, got the part {shorten(str(part))}; remove the row, or the "
        "parts that are no text"
    )
