"""Answers as OpenAI's interface has them, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchard.serving.engine import TokenScores

_LEAST = -9999.0  # what OpenAI says instead of minus infinity, which JSON lacks


def usage(num_read: int, num_written: int) -> dict[str, int]:
    """Return how many tokens were read and written."""
    return {
        "prompt_tokens": num_read,
        "completion_tokens": num_written,
        "total_tokens": num_read + num_written,
    }


@dataclass(frozen=True)
class Shapes:
    """What answers to one request look like.

    Attributes:
        model: Which model was asked.
        is_chat: Whether for a turn of a conversation.
        is_stream: Whether in pieces.
        tokenizer: Tells tokens' texts.
        end_ids: Tokens that end an answer; a conversation shows no scores of them.
        identity: Of the answer.
        created: When it was asked for, in seconds since 1970.
    """

    model: str
    is_chat: bool
    is_stream: bool
    tokenizer: Any
    end_ids: frozenset[int]
    identity: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        """Return what is sent, around choices."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        kind += ".chunk" if self.is_chat and self.is_stream else ""
        about = {"object": kind, "created": self.created, "model": self.model}
        return {"id": self.identity, **about, "choices": list(choices), **more}

    def choice(
        self, index: int, text: str, finish: str | None, *, logprobs: Any, is_first: bool
    ) -> dict[str, Any]:
        """Return one choice, or what is new of it."""
        said: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": logprobs}
        if not self.is_chat:
            return {**said, "text": text}
        turn = {"role": "assistant"} if is_first or not self.is_stream else {}
        return {**said, ("delta" if self.is_stream else "message"): {**turn, "content": text}}

    def logprobs(
        self, tokens: Sequence[int], scores: Sequence[TokenScores | None], *, offset: int
    ) -> tuple[dict[str, Any], int]:
        """Return the scores of tokens, and where the text of the next one starts.

        Args:
            tokens: In order.
            scores: Of each; None = nothing stands before it.
            offset: Where the first one's text starts.
        """
        if self.is_chat:
            said = [
                self._spoken(token, score)
                for token, score in zip(tokens, scores, strict=True)
                if token not in self.end_ids
            ]
            return {"content": said, "refusal": None}, offset
        names = [self._shown(token) for token in tokens]
        starts = []
        for name in names:
            starts.append(offset)
            offset += len(name)
        said_of_all = {
            "tokens": names,
            "token_logprobs": [score and _finite(score.logprob) for score in scores],
            "top_logprobs": [
                score and self._best(token, score)
                for token, score in zip(tokens, scores, strict=True)
            ],
            "text_offset": starts,
        }
        return said_of_all, offset

    def _best(self, token: int, score: TokenScores) -> dict[str, float]:
        """Return the best tokens, and the one that came; of two with one text the better."""
        best: dict[str, float] = {}
        for index, logprob in (*score.top, *(((token, score.logprob),) if score.top else ())):
            best.setdefault(self._shown(index), _finite(logprob))
        return best

    def _spoken(self, token: int, score: TokenScores | None) -> dict[str, Any]:
        assert score is not None, "a token of an answer follows something"
        return {
            **self._with_bytes(token, score.logprob),
            "top_logprobs": [self._with_bytes(*one) for one in score.top],
        }

    def _with_bytes(self, token: int, logprob: float) -> dict[str, Any]:
        text = str(self.tokenizer.decode([token]))
        own = None if "\ufffd" in text else list(text.encode())
        return {"token": self._shown(token), "logprob": _finite(logprob), "bytes": own}

    def _shown(self, token: int) -> str:
        text = str(self.tokenizer.decode([token]))
        return f"token_id:{token}" if "\ufffd" in text or not text else text


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
