"""Messages as somebody makes them who means harm: valid ones, changed where bytes of chance say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from safetensors.torch import save

_T = TypeVar("_T")

# What a field may be made into. Texts that are too long stand for longer ones.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 4, 2**31, 2**63, 10**18, 10**400),
    *(0.0, -0.0, 1.0, 1.9, -1.0, 1e-46, 1e-320, 1e-24, 1e9, 1e30, 1e38, 1e308, -1e308),
    *("", "1", "1e3", "NaN", "a", "bad", "a\n\x1b[2J\x07", "\ud800", "\u202e", "x" * 70_000),
    *([], {}, [1], [[]], {"a": 1}, {"a": {"b": {}}}),
)
KEYS = ("", "a", "site", "kind", "refused", "lacks_values", "error", "evaluation", "base_digest")
KEYS += ("global/loss", "global/foo", "local/loss", "base/loss", "client/kind", "\x1b[31m", "#x")
TEXTS = ("NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "[" * 60_000, '{"a":' * 12_000)
NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 3e38, 1e30, 1e18, 1e6, 60.0)
NUMBERS += (0.0, -0.0, 1e-46, -3.0)


class Chance:
    """Choices that bytes make, so that a case is found again from them; 0 when they are used up."""

    def __init__(self, content: bytes) -> None:
        self._left = list(content)

    def below(self, number: int) -> int:
        found = self._left.pop(0) if self._left else 0
        if number > 256:
            found = found << 8 | (self._left.pop(0) if self._left else 0)
        return found % max(number, 1)

    def one_of(self, options: Sequence[_T]) -> _T:
        return options[self.below(len(options))]


def changed(value: Any, chance: Chance) -> Any:
    """Return JSON with one field made into something else, taken out or put in."""
    copy = json.loads(json.dumps(value))
    places = list(_containers(copy))
    if not places:
        return chance.one_of(VALUES)
    container = chance.one_of(places)
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    what = chance.below(4)
    if what == 0 and isinstance(container, dict):
        container[chance.one_of(KEYS)] = chance.one_of(VALUES)
    elif what == 1 and keys:
        del container[chance.one_of(keys)]
    elif what == 2 and isinstance(container, dict):
        container |= {f"{chance.one_of(KEYS)}{i}": 1.0 for i in range(chance.below(2000))}
    elif keys:
        container[chance.one_of(keys)] = chance.one_of(VALUES)
    return copy


def _containers(value: Any) -> Any:
    if isinstance(value, dict | list):
        yield value
        for own in value.values() if isinstance(value, dict) else value:
            yield from _containers(own)


def changed_text(text: str, chance: Chance) -> str:
    """Return JSON text that is no longer what a writer of JSON writes."""
    what = chance.below(5)
    at = chance.below(max(len(text), 1))
    if what == 0:
        return text[:at] + text[at + 1 + chance.below(8) :]
    if what == 1:
        return text[:at] + chance.one_of(TEXTS) + text[at:]
    if what == 2:  # a key twice
        return text.replace("{", '{"site": "a", "round_number": 1, ', 1)
    if what == 3:
        digits = [i for i, character in enumerate(text) if character.isdigit()] or [0]
        number = chance.one_of(digits)
        return text[:number] + chance.one_of(TEXTS) + text[number + 1 :]
    return text[:at] + chr(chance.below(256)) + text[at:]


def header_text(header: Any, chance: Chance) -> str:
    """Return a header as text, changed in its values, in its letters, or in neither."""
    for _ in range(chance.one_of((0, 0, 0, 0, 1, 2))):
        header = changed(header, chance)
    text = json.dumps(header)
    return changed_text(text, chance) if chance.below(10) == 9 else text


def update_message(
    header: Any, tensors: Mapping[str, torch.Tensor], chance: Chance, *, names: Sequence[str]
) -> bytes:
    """Return an update that was changed in its tensors, its headers or its bytes."""
    own = dict(tensors)
    for _ in range(chance.one_of((0, 0, 1, 2))):
        _change_tensors(own, chance, names=names)
    try:
        message = save(own, metadata={"orchard": header_text(header, chance)})
    except (UnicodeEncodeError, RuntimeError, ValueError):  # what cannot be written is not sent
        message = save(dict(tensors))
    if chance.below(8) == 7:
        message = _with_layout(message, chance)
    if chance.below(10) == 9:
        at = chance.below(len(message))
        other = bytes([chance.below(256)]) * chance.below(300)
        message = message[:at] + other + message[at + chance.below(2) * len(other) :]
    return message


def _change_tensors(
    tensors: dict[str, torch.Tensor], chance: Chance, *, names: Sequence[str]
) -> None:
    name = chance.one_of(sorted(tensors) or [""])
    what = chance.below(6)
    tensor = tensors.get(name, torch.zeros(2))
    if what == 0:
        tensors.pop(name, None)
    elif what == 1:
        tensors[chance.one_of([*names, "other", "#shapes", "#scales"])] = tensor.clone()
    elif what == 2:
        tensors[name] = torch.full_like(tensor.float(), chance.one_of(NUMBERS))
    elif what == 3 and tensor.numel():
        one = tensor.float().clone()
        one.view(-1)[chance.below(one.numel())] = chance.one_of(NUMBERS)
        tensors[name] = one
    elif what == 4:
        shape = [chance.below(5) for _ in range(chance.below(4))]
        tensors[name] = torch.ones(shape)
    else:
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool)
        tensors[name] = tensor.to(chance.one_of(kinds))


def _with_layout(message: bytes, chance: Chance) -> bytes:
    size = int.from_bytes(message[:8], "little")
    layout = json.loads(message[8 : 8 + size])
    text = header_text(layout, chance).encode("utf-8", "replace")
    claimed = len(text) if chance.below(4) else chance.one_of((0, 2**40, 2**63, len(text) - 1))
    return max(claimed, 0).to_bytes(8, "little") + text + message[8 + size :]
