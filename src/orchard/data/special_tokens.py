"""Text becomes ids in which special tokens stand only where the template wrote them.

A tokenizer reads ``<|im_start|>`` as the token that begins a turn, whoever wrote it: a row of data
with these letters could forge a turn, or end a prompt. So text that is not the template's own is
encoded as the letters that it consists of.

A special token is one that the tokenizer calls special, or one that was added to its vocabulary and
stands in its chat template: published chat models do not always mark the tokens of their turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, TypeAlias

from orchard.data.turns import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SpecialTokens: TypeAlias = Literal["text", "allow"]

# What may stand before a text to encode it as if it went on: not all begin as they would inside.
_BEFORE = ("\n", "a", ".", " ")


@dataclass(frozen=True)
class Piece:
    """A part of what a model reads.

    Attributes:
        text: The part.
        is_own: It is the template's, whose special tokens are meant.
        is_learned: It carries loss.
    """

    text: str
    is_own: bool = False
    is_learned: bool = False


class PieceEncoder:
    """Encodes pieces with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special: SpecialTokens) -> None:
        """Find the tokenizer's special tokens.

        Args:
            tokenizer: Of the model.
            special: Whether special tokens in data are text, or are allowed to be what they are.
        """
        self._tokenizer = tokenizer
        self._special = special
        template = str(tokenizer.chat_template or "")
        added = tokenizer.added_tokens_decoder
        self._ids = {
            index: token.content
            for index, token in added.items()
            if token.special or (token.content in template and not token.content.isspace())
        }
        # What stands for anything that the tokenizer does not know forges nothing.
        self._unknown = tokenizer.unk_token_id

    def encode(
        self, pieces: Sequence[Piece], *, begins: bool = False, expected: Sequence[int] = ()
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of pieces as one text, and which of them are learned.

        Args:
            pieces: What is read, in order.
            begins: Whether the tokenizer adds what it puts before a text (a begin token). What it
                puts behind is left out: an end token would say that all is done.
            expected: The special tokens that the pieces have of their own. Where there are no
                others, nobody has to be told apart, which is much faster.

        Raises:
            ValueError: A special token in the data cannot be encoded as text.
        """
        text = "".join(piece.text for piece in pieces)
        ids, num_before = self._ids_of(text, begins=begins)
        may_be_forged = self._special == "text" and (
            self.special_ids(ids[num_before:]) != list(expected) or self._names_unknown(text)
        )
        if not self._tokenizer.is_fast:
            # It does not say where a token stands, so the letters themselves are looked for.
            data = [piece.text for piece in pieces if not piece.is_own]
            may_be_forged &= any(token in part for token in self._ids.values() for part in data)
        if may_be_forged or any(piece.is_learned for piece in pieces):
            return self._encode_by_place(pieces, text, begins=begins)
        return ids, [False] * len(ids)

    @property
    def ends_texts(self) -> bool:
        """Whether the tokenizer puts its end token behind a text by itself."""
        return bool(
            self._tokenizer("a", verbose=False)["input_ids"][-1] == self._tokenizer.eos_token_id
        )

    def special_ids(self, ids: Sequence[int]) -> list[int]:
        """Return those of ``ids`` that are special, in order, without the unknown token."""
        if self._ids.keys().isdisjoint(ids):
            return []
        return [index for index in ids if index in self._ids and index != self._unknown]

    def first_special(self, text: str) -> int | None:
        """Return where the first special token of ``text`` ends; None where it has none."""
        found = [(text.index(token), -len(token)) for token in self._ids.values() if token in text]
        return min(found)[0] - min(found)[1] if found else None

    def _ids_of(self, text: str, *, begins: bool) -> tuple[list[int], int]:
        """Return the ids of a text, and how many of them the tokenizer has put before it."""
        # Not verbose: lengths are our business, and the tokenizer warns of its own maximum.
        if not begins:
            found = self._tokenizer(text, add_special_tokens=False, verbose=False)
            return list(found["input_ids"]), 0
        encoding = self._tokenizer(text, return_special_tokens_mask=True, verbose=False)
        ids, mask = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
        kept = mask[: len(mask) - _num_added_behind(mask)]
        return ids[: len(kept)], _num_added_behind(kept[::-1])

    def _names_unknown(self, text: str) -> bool:
        return self._unknown is not None and str(self._tokenizer.unk_token) in text

    def _is_special(self, index: int, text: str) -> bool:
        return index in self._ids and (index != self._unknown or self._ids[index] in text)

    def _encode_by_place(
        self, pieces: Sequence[Piece], text: str, *, begins: bool
    ) -> tuple[list[int], list[bool]]:
        """Encode with the place of every token in the text, which says whose it is."""
        if not self._tokenizer.is_fast:
            raise ValueError(
                "tokenizer must be a fast one (tokenizer.json) where data hold the letters of its "
                "special tokens or earlier turns are learned, got "
                f"{type(self._tokenizer).__name__} and the text {shorten(text)}; convert it, or "
                "set data.learn = last and data.special_tokens = allow"
            )
        encoding = self._tokenizer(
            text,
            add_special_tokens=begins,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids, mask = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
        num_kept = len(ids) - _num_added_behind(mask)
        ends = list(accumulate(len(piece.text) for piece in pieces))
        spans = list(zip([0, *ends[:-1]], ends, pieces, strict=True))
        own = _joined((a, b) for a, b, piece in spans if piece.is_own)
        learned = _joined((a, b) for a, b, piece in spans if piece.is_learned)
        out_ids: list[int] = []
        out_learned: list[bool] = []
        for index, is_added, (start, end) in zip(
            ids[:num_kept], mask, encoding["offset_mapping"], strict=False
        ):
            found = [index]
            # White space that a token takes with it says nothing of who wrote the token.
            inner = text[start:end]
            first = start + len(inner) - len(inner.lstrip())
            last = max(first, start + len(inner.rstrip()))
            if (
                self._special == "text"
                and not (is_added and start == end)
                and self._is_special(index, inner)
                and not any(a <= first and last <= b for a, b in own)
            ):
                found = self._as_text(inner)
            is_learned = start < end and any(
                (a <= start or not text[start:a].strip()) and a < end <= b for a, b in learned
            )
            out_ids += found
            out_learned += [is_learned] * len(found)
        return out_ids, out_learned

    def _as_text(self, text: str) -> list[int]:
        """Return the ids of letters that would be a special token, as inside a text."""
        for before in _BEFORE:
            start = self._bare(before)
            whole = self._bare(before + text)
            rest = whole[len(start) :]
            if whole[: len(start)] == start and rest and not self._holds_special(rest, text):
                return rest
        letters = [index for letter in text for index in self._bare(letter)]
        if self._holds_special(letters, text):
            raise ValueError(
                f"data must not hold {shorten(text)}, which this tokenizer can only read as a "
                "special token; remove it from the data, or set data.special_tokens = allow"
            )
        return letters

    def _holds_special(self, ids: Sequence[int], text: str) -> bool:
        return any(self._is_special(index, text) for index in ids)

    def _bare(self, text: str) -> list[int]:
        """Return the ids of a text without any of the tokens that were added to the vocabulary."""
        core = self._tokenizer.backend_tokenizer
        if core.normalizer is not None:
            text = core.normalizer.normalize_str(text)
        parts = [text]
        if core.pre_tokenizer is not None:
            parts = [part for part, _ in core.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for part in parts for token in core.model.tokenize(part)]


def _num_added_behind(mask: Sequence[int]) -> int:
    """Return how many tokens at the end the tokenizer has added."""
    return next((count for count, is_added in enumerate(reversed(mask)) if not is_added), len(mask))


def _joined(spans: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif start < end:
            joined.append((start, end))
    return joined
