"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchard.personal.writing import StopTexts
from orchard.serving.engine import Row, TokenScores

_MAX_PENDING = 64  # tokens; a letter has four bytes, so what is longer is none


class GrowingText:
    """Text that grows with its tokens; of these only the last few are decoded again."""

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]) -> None:
        """Begin empty; tokens of ``end_ids`` are no text."""
        self.text = ""
        self._tokenizer, self._end_ids = tokenizer, end_ids
        self._ids: list[int] = []  # of the last letters, and what came before these
        self._done = 0

    def grow(self, tokens: Sequence[int], *, is_last: bool) -> str:
        """Return the text of all tokens so far.

        Half a letter is left out until the rest of it comes, or nothing more does.

        Args:
            tokens: Those that are new.
            is_last: Whether no more come.
        """
        self._ids += [index for index in tokens if index not in self._end_ids]
        # Decoded behind the part before it, since a token's blank depends on what it follows.
        before = self._decode(self._ids[: self._done])
        both = self._decode(self._ids)
        is_whole = not both.endswith("\ufffd") or len(self._ids) - self._done > _MAX_PENDING
        if len(both) > len(before) and (is_last or is_whole):
            self.text += both[len(before) :]
            self._ids = self._ids[self._done :]
            self._done = len(self._ids)
        return self.text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    Attributes:
        text: Sure, whatever follows.
        tokens: Those that were read for it; a letter may come a piece later than its first token.
        scores: Of these, where they were asked for.
        finish: Why it ended; None while it goes on.
    """

    text: str
    tokens: tuple[int, ...]
    scores: tuple[TokenScores, ...]
    finish: str | None


class Answer:
    """One answer, read from a row token by token.

    Where it ends, and what it says, does not depend on how far the engine is ahead of its reader.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], stops: StopTexts) -> None:
        """Begin with nothing read."""
        self.num_tokens = 0
        self.is_finished = False
        self._growing = GrowingText(tokenizer, end_ids)
        self._stops = stops
        self._num_sent = self._num_told = 0

    def read(self, row: Row) -> Piece | None:
        """Return what came since the last time; None where nothing can be said yet.

        A row whose text is stopped is cancelled.
        """
        if self.is_finished:
            return None
        finish = row.finish  # before the tokens: the engine may write on while this is read
        whole = list(row.tokens)
        is_stopped, sure = False, ""
        if finish and self.num_tokens == len(whole):
            text = self._growing.grow((), is_last=True)
            is_stopped, sure = self._stops.sure(text[self._num_sent :])
        while self.num_tokens < len(whole) and not is_stopped:
            token = whole[self.num_tokens]
            self.num_tokens += 1
            is_last = bool(finish) and self.num_tokens == len(whole)
            text = self._growing.grow((token,), is_last=is_last)
            is_stopped, sure = self._stops.sure(text[self._num_sent :])
        if is_stopped:
            finish, row.is_cancelled = "stop", True
        elif finish:
            sure = text[self._num_sent :]
        if not (sure or finish):
            return None
        self.is_finished = bool(finish)
        told = slice(self._num_told, self.num_tokens)
        self._num_sent += len(sure)
        self._num_told = self.num_tokens
        tokens, scores = tuple(whole[told]), tuple(row.scores[told])
        return Piece(sure, tokens, scores, finish or None)
