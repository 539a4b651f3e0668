"""How the next token is chosen: pure functions of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose.

    Attributes:
        temperature: What logits are divided by; 0 = the most probable token.
        top_p: The fewest tokens whose probabilities reach this are drawn from, in (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: One is out of range.
        """
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature must be 0 or more, got {self.temperature:g}; 0 takes the most "
                "probable token"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p:g}; 1 leaves nothing out")


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token; of equal ones the first, where the most probable is taken."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The largest is taken off first: whatever the temperature, it stays zero and none is infinite.
    logits_V = logits_V.double()
    scaled_V = (logits_V - logits_V.max()) / sampling.temperature
    probabilities_V = scaled_V.softmax(dim=-1).cpu()
    if sampling.top_p < 1:
        ordered_V, token_V = probabilities_V.sort(descending=True, stable=True)
        before_V = ordered_V.cumsum(dim=-1) - ordered_V
        ordered_V[before_V >= sampling.top_p] = 0
        probabilities_V = torch.zeros_like(probabilities_V).scatter(0, token_V, ordered_V)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
