"""An answer is written token by token, and ends where it is told to."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orchard.models.kernels.caches import cache_name
from orchard.models.kernels.decoding import can_decode, fresh_cache
from orchard.models.kernels.pairs import PairWriter, is_pair, start_id
from orchard.personal.sampling import Sampling, choose_token

MAX_STOPS, MAX_NEW_TOKENS = 64, 256


@dataclass(frozen=True)
class StopTexts:
    """Texts before which an answer ends.

    Attributes:
        texts: None is empty; at most ``MAX_STOPS``.
    """

    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ValueError: There are too many, or one is empty.
        """
        if len(self.texts) > MAX_STOPS:
            raise ValueError(
                f"stop must be at most {MAX_STOPS} texts, got {len(self.texts)}; name fewer"
            )
        if "" in self.texts:
            raise ValueError("stop must be texts, got an empty one; leave it out")

    def sure(self, text: str) -> tuple[bool, str]:
        """Return whether one stands in ``text``, and what of it is the answer whatever follows."""
        found = [text.find(stop) for stop in self.texts if stop in text]
        if found:
            return True, text[: min(found)]
        held = max(
            (n for stop in self.texts for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        return False, text[: len(text) - held]


def longest_answer(model: nn.Module, num_prompt: int, max_new_tokens: int | None) -> int:
    """Return how many tokens an answer may have.

    Args:
        model: Has a context.
        num_prompt: Tokens of the prompt.
        max_new_tokens: What was asked for; None = what there is room for, ``MAX_NEW_TOKENS`` at
            most.

    Raises:
        ValueError: Prompt and answer do not fit into the context, or it is below 1.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}; raise it")
    network: Any = model
    room = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and num_prompt + (max_new_tokens or 1) > room:
        raise ValueError(
            f"prompt and answer must fit into the model's {room} tokens, got {num_prompt} and "
            f"{max_new_tokens or 'at least 1'}; shorten the prompt, or lower max_new_tokens"
        )
    return max_new_tokens or min(MAX_NEW_TOKENS, (room or MAX_NEW_TOKENS + num_prompt) - num_prompt)


def write_tokens(
    model: nn.Module,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    end_ids: frozenset[int],
) -> Generator[int, None, None]:
    """Yield the tokens that follow a prompt, one after the other, without the one that ends it.

    Args:
        model: In evaluation mode.
        ids: The prompt.
        max_new_tokens: At most so many follow.
        sampling: How they are chosen.
        generator: Of the draws.
        end_ids: Tokens that end the answer.
    """
    network: Any = model
    device = next(model.parameters()).device
    # A model whose cache cannot be continued reads everything anew for each token.
    caches = can_decode(model)
    cache = fresh_cache(model) if caches else None
    pair, token = (PairWriter(model, ids), start_id(model)) if is_pair(model) else (None, -1)
    read, feed = list(ids), list(ids)
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            inputs_BS = torch.tensor([feed], device=device)
            mask_BS = torch.ones(1, len(read), dtype=torch.long, device=device)
            if pair is not None:
                logits_V = pair.follow(token)
            elif caches:
                place_BS = torch.arange(len(read) - len(feed), len(read), device=device)[None]
                logits_V = network(
                    input_ids=inputs_BS,
                    attention_mask=mask_BS,
                    position_ids=place_BS,
                    use_cache=True,
                    logits_to_keep=1,
                    **{cache_name(model) or "": cache},
                ).logits[0, -1]
            else:
                logits_V = network(
                    input_ids=inputs_BS, attention_mask=mask_BS, use_cache=False
                ).logits[0, -1]
            token = choose_token(logits_V, sampling, generator)
        if token in end_ids:
            return
        yield token
        read.append(token)
        feed = [token] if caches else read
