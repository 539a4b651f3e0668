"""Steps over a batch that rows join and leave at any of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orchard.models.kernels.caches import cache_name
from orchard.models.kernels.row_cache import empty_cache, joined, selected
from orchard.models.view.moe import MoEView
from orchard.models.view.unbinding import unbound_experts
from orchard.personal.sampling import Sampling, choose_token
from orchard.serving.rows import Assignment, Rows
from orchard.serving.values import RowValues


@dataclass(frozen=True)
class TokenScores:
    """What a model said of one token.

    Attributes:
        logprob: Of the token that came.
        top: The most probable tokens with theirs, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Row:
    """One answer that is being written.

    Attributes:
        values: The model that writes it.
        prompt: What it follows; at least one token.
        max_tokens: At most so many new tokens; 0 = only the prompt is read.
        sampling: How tokens are chosen.
        seed: Of the draws.
        end_ids: Tokens that end it.
        num_top: Scores of so many tokens at each place; -1 = no scores.
        scores_prompt: Whether the prompt's tokens get scores too.
        tokens: What came so far.
        scores: Of these, where they are asked for.
        prompt_scores: Of the prompt's tokens after the first.
        finish: Why it ended; empty while it goes on.
        failure: What its model could not do; it ended by that.
        is_cancelled: Set by whoever no longer reads it; the next step drops it.
    """

    values: RowValues
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    num_top: int = -1
    scores_prompt: bool = False
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScores] = field(default_factory=list)
    prompt_scores: list[TokenScores] = field(default_factory=list)
    finish: str = ""
    failure: Exception | None = None
    is_cancelled: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator)
    logits_V: Tensor | None = None

    def __post_init__(self) -> None:
        """Seed the draws."""
        self.generator.manual_seed(self.seed)


class _Batch:
    """Rows that share a body, with what they have read."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.lengths: list[int] = []
        self.cache: Any = None
        self.assignment: Assignment | None = None


class Engine:
    """One base, and rows of any of its models.

    Not safe between threads: one thread calls ``step``, ``submit`` and what else there is.
    """

    def __init__(
        self,
        view: MoEView,
        *,
        max_rows: int = 64,
        prefill_tokens: int = 512,
        keeps_logits: bool = False,
    ) -> None:
        """Take a base.

        Args:
            view: The base, in evaluation mode.
            max_rows: At most so many rows in all batches.
            prefill_tokens: At most so many tokens of prompts in one forward pass.
            keeps_logits: Whether a row keeps the last logits, for tests.
        """
        self.view = view
        self.rows = Rows(view)
        self.waiting: deque[Row] = deque()
        self.max_rows, self._prefill_tokens = max_rows, prefill_tokens
        self._keeps_logits = keeps_logits
        self._batches: dict[str, _Batch] = {}
        self._cache_name = cache_name(view.model) or ""
        self._device = next(view.model.parameters()).device

    @contextmanager
    def running(self) -> Iterator[Engine]:
        """Hook the base while the context lasts."""
        with unbound_experts(self.view), self.rows.hooked():
            yield self

    @property
    def num_running(self) -> int:
        """Rows in batches."""
        return sum(len(batch.rows) for batch in self._batches.values())

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.waiting and not self._batches

    def submit(self, row: Row) -> None:
        """Let a row wait for its place."""
        self.waiting.append(row)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Write one token of every row that runs, take rows in, and return those that moved."""
        moved: list[Row] = []
        for body in list(self._batches):
            self._drop(body)
            if body in self._batches:
                moved += self._decode(self._batches[body])
                self._drop(body)
        self.waiting = deque(row for row in self.waiting if not row.is_cancelled)
        room = self.max_rows - self.num_running
        if self.waiting and room > 0:
            group = self._next_group(room)
            moved += self._prefill(group)
            self._drop(group[0].values.body)
        return moved

    def abort(self) -> list[Row]:
        """Give up all rows, after a step that failed, and return them."""
        rows = [row for batch in self._batches.values() for row in batch.rows]
        rows += self.waiting
        self._batches.clear()
        self.waiting.clear()
        return rows

    def _next_group(self, room: int) -> list[Row]:
        """Take rows of one body from the front of the queue, as many as one pass may read."""
        first = self.waiting.popleft()
        group, longest = [first], len(first.prompt)
        while self.waiting and len(group) < room:
            row = self.waiting[0]
            longest = max(longest, len(row.prompt))
            too_many = longest * (len(group) + 1) > self._prefill_tokens
            if too_many or row.values.body != first.values.body:
                break
            group.append(self.waiting.popleft())
        return group

    def _prefill(self, group: list[Row]) -> list[Row]:
        """Read the prompts of rows, write their first tokens, and let them join their batch."""
        width = max(len(row.prompt) for row in group)
        ids = torch.zeros(len(group), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(group):
            ids[index, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[index, width - len(row.prompt) :] = 1
        assignment = self.rows.assign([row.values for row in group])
        places = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        ids, mask, places = (part.to(self._device) for part in (ids, mask, places))
        cache = empty_cache()
        scores_prompt = any(row.scores_prompt for row in group)
        logits: Tensor = torch.empty(0)
        for start in range(0, width, self._prefill_tokens):
            end = min(start + self._prefill_tokens, width)
            logits = self.rows.run(
                assignment,
                group[0].values,
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=places[:, start:end],
                **{self._cache_name: cache},
                use_cache=True,
                logits_to_keep=0 if scores_prompt else 1,
            ).logits
            if scores_prompt:
                _score_prompts(group, logits, start=start, width=width)
        self._choose(group, logits[:, -1])
        lengths = [len(row.prompt) for row in group]
        batch = self._batches.setdefault(group[0].values.body, _Batch())
        batch.cache = cache if batch.cache is None else joined([batch.cache, cache])
        batch.rows += group
        batch.lengths += lengths
        batch.assignment = None
        return group

    def _decode(self, batch: _Batch) -> list[Row]:
        """Write the next token of every row of a batch."""
        if batch.assignment is None:
            batch.assignment = self.rows.assign([row.values for row in batch.rows])
        length_B = torch.tensor(batch.lengths, device=self._device)
        width = batch.cache.get_seq_length() + 1
        column_W = torch.arange(width, device=self._device)
        mask_BW = (column_W[None] >= width - 1 - length_B[:, None]).long()
        logits = self.rows.run(
            batch.assignment,
            batch.rows[0].values,
            input_ids=torch.tensor([[row.tokens[-1]] for row in batch.rows], device=self._device),
            attention_mask=mask_BW,
            position_ids=length_B[:, None],
            **{self._cache_name: batch.cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits
        batch.lengths = [length + 1 for length in batch.lengths]
        self._choose(batch.rows, logits[:, -1])
        return list(batch.rows)

    def _choose(self, rows: Sequence[Row], logits_BV: Tensor) -> None:
        """Write the next token of each row, and say which have ended."""
        # The largest of a row is a number just where all of it can be drawn from: none that is no
        # number, no infinite one, and not all minus infinity.
        most_B, best_B = (found.tolist() for found in logits_BV.max(dim=-1))
        for index, (row, most) in enumerate(zip(rows, most_B, strict=True)):
            if self._keeps_logits:
                row.logits_V = logits_BV[index].clone()
            if not math.isfinite(
                most
            ):  # such as by a graft that a run left broken; others are not harmed
                row.failure = ValueError("logits must be numbers, got others from this model")
                row.finish = "failed"
                continue
            if row.max_tokens == 0:
                row.finish = "length"
                continue
            logits_V = logits_BV[index].float()
            try:
                token = best_B[index]
                if row.sampling.temperature > 0:
                    token = choose_token(logits_V, row.sampling, row.generator)
            except RuntimeError as error:  # what one row asks for must not end the others
                row.failure, row.finish = error, "failed"
                continue
            if row.num_top >= 0:  # before the token, for another thread reads as many
                row.scores.append(_score(logits_V.log_softmax(dim=-1), token, row.num_top))
            row.tokens.append(token)
            if token in row.end_ids:
                row.finish = "stop"
            elif len(row.tokens) >= row.max_tokens:
                row.finish = "length"

    def _drop(self, body: str) -> None:
        """Let rows go that have ended."""
        batch = self._batches[body]
        kept = [i for i, row in enumerate(batch.rows) if not (row.finish or row.is_cancelled)]
        if len(kept) == len(batch.rows):
            return
        if not kept:
            del self._batches[body]
            return
        batch.rows = [batch.rows[index] for index in kept]
        batch.lengths = [batch.lengths[index] for index in kept]
        batch.assignment = None
        width = max(batch.lengths)
        selected(batch.cache, torch.tensor(kept, device=self._device), width=width)


def _score(logprobs_V: Tensor, token: int, num_top: int) -> TokenScores:
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, tokens = logprobs_V.topk(min(num_top, len(logprobs_V)))
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenScores(float(logprobs_V[token]), top)


def _score_prompts(group: Sequence[Row], logits_BSV: Tensor, *, start: int, width: int) -> None:
    """Add the scores of prompts that logits from column ``start`` on say something of."""
    for index, row in enumerate(group):
        if not row.scores_prompt:
            continue
        before = width - len(row.prompt)
        first = max(start, before)
        told = row.prompt[first - before + 1 : start + logits_BSV.shape[1] - before + 1]
        if not told:
            continue
        found_SV = logits_BSV[index, first - start : first - start + len(told)].float()
        for logprobs_V, token in zip(found_SV.log_softmax(dim=-1), told, strict=True):
            row.prompt_scores.append(_score(logprobs_V, token, max(row.num_top, 0)))
