"""What Prometheus reads of a server: counters, gauges and seconds to first and next tokens."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass
class Histogram:
    """How many values were up to each bound, their sum and their number."""

    bounds: Sequence[float] = _SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0
    number: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Begin with none."""
        self.counts = [0] * len(self.bounds)

    def add(self, value: float) -> None:
        """Count a value."""
        with self._lock:
            self.total += value
            self.number += 1
            for place, bound in enumerate(self.bounds):
                self.counts[place] += value <= bound

    def lines(self, name: str, about: str) -> Iterator[str]:
        """Yield it as Prometheus has it."""
        with self._lock:
            counts, total, number = list(self.counts), self.total, self.number
        yield from _head(name, "histogram", about)
        for bound, count in zip(self.bounds, counts, strict=True):
            yield f'{name}_bucket{{le="{bound:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {number}'
        yield f"{name}_sum {total:.6f}"
        yield f"{name}_count {number}"


@dataclass
class Counts:
    """What is counted of answers.

    Attributes:
        answers: By status, of which there are few.
        num_prompt_tokens: Read.
        first_seconds: From a request to its first token.
        between_seconds: Between pieces of an answer, of a token or a few.
    """

    answers: Counter[int] = field(default_factory=Counter)
    num_prompt_tokens: int = 0
    first_seconds: Histogram = field(default_factory=Histogram)
    between_seconds: Histogram = field(default_factory=Histogram)

    def lines(self) -> Iterator[str]:
        """Yield them as Prometheus has them."""
        yield from plain("prompt_tokens_total", self.num_prompt_tokens, "Tokens of prompts.")
        yield from self.first_seconds.lines(
            "orchard_first_token_seconds", "From a request to its first token."
        )
        yield from self.between_seconds.lines(
            "orchard_between_tokens_seconds", "Between pieces of an answer."
        )
        yield from _head("orchard_answers_total", "counter", "Answers by status.")
        for status, number in sorted(self.answers.items()):
            yield f'orchard_answers_total{{status="{status}"}} {number}'


def plain(name: str, value: int, about: str) -> Iterator[str]:
    """Yield one number as Prometheus has it; a counter where its name ends in total."""
    kind = "counter" if name.endswith("_total") else "gauge"
    yield from _head(f"orchard_{name}", kind, about)
    yield f"orchard_{name} {value}"


def _head(name: str, kind: str, about: str) -> Iterator[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
