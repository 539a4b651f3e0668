"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class GrowingText:
    """Text that grows with its tokens; of these only the last few are decoded again."""

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]) -> None:
        """Begin empty; tokens of ``end_ids`` are no text."""
        self.text = ""
        self._tokenizer, self._end_ids = tokenizer, end_ids
        self._ids: list[int] = []
        self._num_seen = self._start = self._done = 0

    def grow(self, tokens: Sequence[int], *, is_last: bool) -> str:
        """Return the text of all tokens so far.

        Half a letter is left out until the rest of it comes, or nothing more does.

        Args:
            tokens: All of the answer's, old ones too.
            is_last: Whether no more come.
        """
        seen = list(tokens)
        self._ids += [index for index in seen[self._num_seen :] if index not in self._end_ids]
        self._num_seen = len(seen)
        # Decoded behind the part before it, since a token's blank depends on what it follows.
        before = self._decode(self._ids[self._start : self._done])
        both = self._decode(self._ids[self._start :])
        if len(both) > len(before) and (is_last or not both.endswith("\ufffd")):
            self.text += both[len(before) :]
            self._start, self._done = self._done, len(self._ids)
        return self.text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
