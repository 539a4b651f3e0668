"""Which option does a model find likeliest?

An option's score is the sum of the log-probabilities of its tokens behind the prompt. The end
token is left out, as in lm-evaluation-harness, so an option that is the beginning of another never
scores below it.

Source: Brown et al., 2020, arXiv:2005.14165, section 2.4. lm-evaluation-harness normalizes by
characters or bytes; ours, like the paper, by tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from orchard.data.templates import Encoded, collate_prompts
from orchard.models.adapters import AdaptedModel

LengthNormalization: TypeAlias = Literal["none", "tokens"]
Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """One forward pass: a prompt and the beginning of an option.

    Attributes:
        ids: Of both.
        num_prompt: How many of them are prompt.
        options: Question and option to the option's ids, of those whose every token this row
            predicts: all but the last of an option begin what follows the prompt here.
    """

    ids: Sequence[int]
    num_prompt: int
    options: Mapping[tuple[int, int], Ids]


def choose(
    model: AdaptedModel,
    questions: Sequence[Sequence[Encoded]],
    *,
    batch_size: int,
    normalization: LengthNormalization = "none",
) -> list[int]:
    """Return the index of the likeliest option of each question; of equal ones, the first.

    Args:
        model: The model, in evaluation mode.
        questions: The options of each, encoded behind the same prompt.
        batch_size: Rows at a time.
        normalization: Whether an option's log-likelihood is divided by its number of tokens.
    """
    chosen = []
    sums = log_likelihoods(model, questions, batch_size=batch_size)
    for options, scores in zip(questions, sums, strict=True):
        if normalization == "tokens":
            scores = [
                score / len(_option_ids(option, model))
                for score, option in zip(scores, options, strict=True)
            ]
        chosen.append(scores.index(max(scores)))
    return chosen


@torch.inference_mode()
def log_likelihoods(
    model: AdaptedModel, questions: Sequence[Sequence[Encoded]], *, batch_size: int
) -> list[list[float]]:
    """Return the log-likelihood of each option of each question, in nats, without its end token.

    Options that begin alike share a forward pass as far as they can: labels of one token each need
    one for all of them.

    Args:
        model: The model, in evaluation mode.
        questions: The options of each, encoded behind the same prompt.
        batch_size: Rows at a time; rows of similar length go together.
    """
    rows = [
        row for number, options in enumerate(questions) for row in _rows(number, options, model)
    ]
    rows.sort(key=lambda row: len(row.ids))
    scores = [[math.nan] * len(options) for options in questions]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        logits_TV = _forward(model, batch)
        norm_T = logits_TV.logsumexp(dim=-1)
        first = 0  # where this row's places begin
        for row in batch:
            for (question, option), ids in row.options.items():
                places = torch.arange(first, first + len(ids), device=logits_TV.device)
                tokens = torch.tensor(ids, device=logits_TV.device)
                terms = logits_TV[places, tokens] - norm_T[places]
                scores[question][option] = float(terms.double().sum())
            first += len(row.ids) - row.num_prompt + 1
    return scores


def standard_error(share: float, num_examples: int) -> float:
    """Return the standard error of a share of right answers, sqrt(p (1 - p) / n).

    The binomial one. lm-evaluation-harness divides by n - 1; n is right for one example too.
    """
    return math.sqrt(share * (1 - share) / num_examples)


def _option_ids(option: Encoded, model: AdaptedModel) -> Ids:
    """Return the response without its end token, which an option that was cut has lost."""
    ids = option.input_ids[option.prompt_length :]
    is_ended = ids[-1] == model.tokenizer.eos_token_id
    return tuple(ids[:-1] if is_ended and len(ids) > 1 else ids)


def _rows(number: int, options: Sequence[Encoded], model: AdaptedModel) -> list[_Row]:
    """Return the fewest rows that predict every token of every option."""
    prompt = options[0].prompt_ids
    assert all(option.prompt_ids == prompt for option in options), "options of different prompts"
    all_ids = [_option_ids(option, model) for option in options]
    # The longest first: whatever begins one of them needs no row of its own.
    held: dict[Ids, dict[tuple[int, int], Ids]] = {}
    for index in sorted(range(len(options)), key=lambda index: -len(all_ids[index])):
        ids = all_ids[index]
        start = ids[:-1]  # the last token is predicted, not read
        found = next((other for other in held if other[: len(start)] == start), start)
        held.setdefault(found, {})[number, index] = ids
    return [_Row([*prompt, *start], len(prompt), found) for start, found in held.items()]


def _forward(model: AdaptedModel, batch: Sequence[_Row]) -> torch.Tensor:
    """Return the logits from the prompt's last token on, row after row, float32: (T, V)."""
    arrays = collate_prompts(
        [row.ids for row in batch], pad_id=model.tokenizer.pad_token_id, side="right"
    )
    ids_BS, mask_BS = (
        torch.from_numpy(arrays[key]).to(model.device) for key in ("input_ids", "attention_mask")
    )
    first = min(row.num_prompt for row in batch) - 1
    num_places = ids_BS.shape[1] - first
    forward = model.model.forward
    # Most models can leave out the logits that nobody reads; the vocabulary is large.
    can_leave_out = "logits_to_keep" in inspect.signature(forward).parameters
    options = {"logits_to_keep": num_places} if can_leave_out else {}
    outputs = model.model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, **options)
    logits_BSV = outputs.logits[:, -num_places:]
    is_read_BS = torch.zeros(logits_BSV.shape[:2], dtype=torch.bool, device=model.device)
    for index, row in enumerate(batch):
        is_read_BS[index, row.num_prompt - 1 - first : len(row.ids) - first] = True
    # Only these places become float32.
    logits_TV: torch.Tensor = logits_BSV[is_read_BS].float()
    return logits_TV
