"""Amounts that differ between clients, as the text of one option.

``16`` is the same for all clients, ``8, 16, 16, 32`` gives one to each, and ``uniform(8, 32)``
draws one for each. An amount is a size in bytes (``12GB``, ``1.5GiB``, ``800 kB``, ``4096``) or
experts: a number (``16``), or a share of all of them (``25%``).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

if TYPE_CHECKING:
    import numpy as np

BYTES = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
    "KB": 1000,
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
"""Unit to bytes; what has an i is binary."""

_LARGEST = 2**63 - 1  # of what a generator draws integers from
_NUMBER = r"[0-9]{1,19}(?:\.[0-9]{1,19})?"
_SIZE = re.compile(rf"({_NUMBER}) ?({'|'.join(BYTES)})")
_SHARE = re.compile(rf"({_NUMBER}) ?%")
_COUNT = re.compile(r"[0-9]{1,19}")
_UNIFORM = re.compile(r"uniform\s*\(([^(),]*),([^(),]*)\)")
_RULE = {
    "bytes": (
        "sizes above 0",
        "write such as 12GB, 1.5GiB, 800 kB or a number of bytes, one for all or one for each "
        "client, or uniform(12GB, 32GB)",
    ),
    "experts": (
        "numbers of experts or shares of at most 100%, above 0",
        "write such as 16 or 25%, one for all or one for each client, or uniform(25%, 100%)",
    ),
}


@dataclass(frozen=True)
class ExpertAmount:
    """How many experts: a number, or a share of all.

    Attributes:
        value: The number, or the share in (0, 1]; exact, so that 29 % of 100 experts are 29.
        is_share: Whether ``value`` is a share.
    """

    value: Fraction
    is_share: bool

    def resolve(self, num_experts: int, *, name: str) -> int:
        """Return the number of experts, out of ``num_experts`` in total.

        A share is rounded down, so a small one of few experts may be 0.

        Args:
            num_experts: In all MoE layers together.
            name: Of the option, for the error.

        Raises:
            ValueError: It is a number above ``num_experts``.
        """
        if self.is_share:
            return math.floor(self.value * num_experts)
        if self.value > num_experts:
            raise ValueError(
                f"{name} must be at most the {num_experts} experts of the model, got {self.value}; "
                "lower it, or write 100% for all"
            )
        return int(self.value)


Amount: TypeAlias = int | ExpertAmount
"""Of kind ``bytes`` or ``experts``."""


@overload
def parse_amounts(
    text: str,
    *,
    name: str,
    num_clients: int,
    generator: np.random.Generator,
    kind: Literal["bytes"],
) -> tuple[int, ...]: ...


@overload
def parse_amounts(
    text: str,
    *,
    name: str,
    num_clients: int,
    generator: np.random.Generator,
    kind: Literal["experts"],
) -> tuple[ExpertAmount, ...]: ...


def parse_amounts(
    text: str,
    *,
    name: str,
    num_clients: int,
    generator: np.random.Generator,
    kind: Literal["experts", "bytes"],
) -> tuple[Amount, ...]:
    """Read one amount per client.

    Args:
        text: One amount for all clients, a comma-separated list with one for each, or
            ``uniform(low, high)``. The ends of ``uniform`` are both sizes, both numbers or both
            shares, which are drawn in steps of 1 %; both can be drawn.
        name: Of the option, for errors.
        num_clients: How many amounts to return.
        generator: For ``uniform``; nothing else draws from it.
        kind: ``bytes`` for sizes, decimal (kB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB) or
            without a unit; a fraction of a byte is dropped. ``experts`` for numbers and shares.

    Returns:
        Whole bytes of at least 1, or ``ExpertAmount``; one per client.

    Raises:
        ValueError: The text is none of these, an amount is not above 0 or a share above 100 %,
            the list has another length, or the ends of ``uniform`` are in the wrong order or of
            two kinds.
    """
    uniform = _UNIFORM.fullmatch(text.strip())
    if uniform:
        low, high = (_parse(part, text, name=name, kind=kind) for part in uniform.groups())
        return _draw(low, high, text, name=name, num_clients=num_clients, generator=generator)
    parts = text.split(",")
    amounts = tuple(_parse(part, text, name=name, kind=kind) for part in parts)
    if len(amounts) == 1:
        return amounts * num_clients
    if len(amounts) != num_clients:
        raise ValueError(
            f"{name} must give one amount for all or one for each of the {num_clients} clients, "
            f"got {len(amounts)} in {text}; add or drop some"
        )
    return amounts


def _parse(part: str, text: str, *, name: str, kind: Literal["experts", "bytes"]) -> Amount:
    part = part.strip()
    amount = _parse_size(part) if kind == "bytes" else _parse_experts(part)
    if amount is None:
        rule, advice = _RULE[kind]
        place = "" if part == text.strip() else f" in {text}"
        raise ValueError(f"{name} must be {rule}, got {part or 'nothing'}{place}; {advice}")
    return amount


def _parse_size(part: str) -> int | None:
    match = _SIZE.fullmatch(part)
    if match is None or (not match[2] and "." in match[1]):
        return None
    num_bytes = math.floor(Fraction(match[1]) * BYTES[match[2]])
    return num_bytes if 1 <= num_bytes <= _LARGEST else None


def _parse_experts(part: str) -> ExpertAmount | None:
    share = _SHARE.fullmatch(part)
    if share:
        value = Fraction(share[1]) / 100
        return ExpertAmount(value, is_share=True) if 0 < value <= 1 else None
    if not _COUNT.fullmatch(part) or not 1 <= int(part) <= _LARGEST:
        return None
    return ExpertAmount(Fraction(int(part)), is_share=False)


def _draw(
    low: Amount,
    high: Amount,
    text: str,
    *,
    name: str,
    num_clients: int,
    generator: np.random.Generator,
) -> tuple[Amount, ...]:
    if isinstance(low, int) and isinstance(high, int):
        _check_order(low <= high, text, name=name)
        return tuple(_draw_integers(low, high, num_clients, generator))
    assert isinstance(low, ExpertAmount)
    assert isinstance(high, ExpertAmount)
    if low.is_share != high.is_share:
        raise ValueError(
            f"{name} must draw between two numbers or two shares, got {text}; write both ends "
            "with % or none"
        )
    _check_order(low.value <= high.value, text, name=name)
    if low.is_share:
        # In steps of a percent, so that the whole of the experts can be drawn too.
        num_steps = math.floor((high.value - low.value) * 100)
        draws = _draw_integers(0, num_steps, num_clients, generator)
        values = [low.value + Fraction(draw, 100) for draw in draws]
    else:
        ends = int(low.value), int(high.value)
        values = [Fraction(draw) for draw in _draw_integers(*ends, num_clients, generator)]
    return tuple(ExpertAmount(value, is_share=low.is_share) for value in values)


def _draw_integers(
    low: int, high: int, num_clients: int, generator: np.random.Generator
) -> list[int]:
    return [int(draw) for draw in generator.integers(low, high, size=num_clients, endpoint=True)]


def _check_order(is_ordered: bool, text: str, *, name: str) -> None:
    if not is_ordered:
        raise ValueError(f"{name} must draw from low to high, got {text}; swap the two ends")
