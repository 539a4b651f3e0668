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
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from orchard.data.encoded import IGNORED, Encoded, collate_prompts
from orchard.evaluation.loss import forward_losses
from orchard.models.kernels.caches import cache_name, can_be_continued
from orchard.models.kernels.pairs import is_pair
from orchard.models.trainable.adapters import AdaptedModel

LengthNormalization: TypeAlias = Literal["none", "tokens"]
Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """One forward pass: a prompt and the beginning of an option.

    Attributes:
        prompt: Ids of the prompt.
        start: Ids of the beginning, often none.
        options: Question and option to the option's ids, of those whose every token this row
            predicts: all but the last of an option begin what follows the prompt here.
    """

    prompt: Sequence[int]
    start: Ids
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
        batch_size: Questions at a time.
        normalization: Whether an option's log-likelihood is divided by its number of tokens.
    """
    chosen = []
    sums = log_likelihoods(model, questions, batch_size=batch_size)
    for options, scores in zip(questions, sums, strict=True):
        if normalization == "tokens":
            scores = [
                score / len(option.response_ids)
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
    one for all of them. A prompt is read once for all its options, where the model's cache allows
    it; else once for each row.

    Args:
        model: The model, in evaluation mode.
        questions: The options of each, encoded behind the same prompt.
        batch_size: Questions at a time; those of similar length go together.
    """
    if is_pair(model.model):
        return [_written(model, options) for options in questions]
    order = sorted(range(len(questions)), key=lambda number: len(questions[number][0].prompt_ids))
    scores = [[math.nan] * len(options) for options in questions]
    can_share = True
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = [row for number in numbers for row in _rows(number, questions[number])]
        shared_TV = _forward_shared(model, batch) if can_share else None
        can_share = shared_TV is not None
        logits_TV = torch.cat(_read(model, batch)[0]) if shared_TV is None else shared_TV
        norm_T = logits_TV.logsumexp(dim=-1)
        first = 0  # where this row's places begin
        for row in batch:
            for (question, option), ids in row.options.items():
                places = torch.arange(first, first + len(ids), device=logits_TV.device)
                tokens = torch.tensor(ids, device=logits_TV.device)
                terms = logits_TV[places, tokens] - norm_T[places]
                scores[question][option] = float(terms.double().sum())
            first += len(row.start) + 1
    return scores


def _written(model: AdaptedModel, options: Sequence[Encoded]) -> list[float]:
    """Return what ``log_likelihoods`` does of one question, of a decoder behind an encoder."""
    ended = [
        replace(one, labels=[*one.labels[:-1], IGNORED]) if one.is_ended else one for one in options
    ]
    losses_T, _ = forward_losses(model, ended)
    parts = torch.split(losses_T.double(), [one.num_labels for one in ended])
    return [-float(own_T.sum()) for own_T in parts]


def standard_error(share: float, num_examples: int) -> float:
    """Return the standard error of a share of right answers, sqrt(p (1 - p) / n).

    The binomial one. lm-evaluation-harness divides by n - 1; n is right for one example too.
    """
    return math.sqrt(share * (1 - share) / num_examples)


def _rows(number: int, options: Sequence[Encoded]) -> list[_Row]:
    """Return the fewest rows that predict every token of every option."""
    prompt = options[0].prompt_ids
    assert all(option.prompt_ids == prompt for option in options), "options of different prompts"
    all_ids = [tuple(option.response_ids) for option in options]
    # The longest first: whatever begins one of them needs no row of its own.
    held: dict[Ids, dict[tuple[int, int], Ids]] = {}
    for index in sorted(range(len(options)), key=lambda index: -len(all_ids[index])):
        ids = all_ids[index]
        start = ids[:-1]  # the last token is predicted, not read
        found = next((other for other in held if other[: len(start)] == start), start)
        held.setdefault(found, {})[number, index] = ids
    return [_Row(prompt, start, found) for start, found in held.items()]


def _forward_shared(model: AdaptedModel, batch: Sequence[_Row]) -> torch.Tensor | None:
    """Read each prompt once, then what follows it; None where the model's cache forbids that.

    Args:
        model: The model.
        batch: Rows; those of one prompt stand together.

    Returns:
        The logits from the prompt's last token on, row after row, float32: (T, V).
    """
    firsts = [i for i, row in enumerate(batch) if not i or row.prompt is not batch[i - 1].prompt]
    if len(firsts) == len(batch):
        return torch.cat(_read(model, batch)[0])
    prompts = [batch[index].prompt for index in firsts]
    last_1V, cache = _read(model, [replace(batch[i], start=()) for i in firsts], keep=True)
    if not can_be_continued(cache):
        return None
    own = [sum(first <= index for first in firsts) - 1 for index in range(len(batch))]
    longer = [(own[index], row.start) for index, row in enumerate(batch) if row.start]
    following = iter(_go_on(model, prompts, cache, longer))
    parts = []
    for index, row in enumerate(batch):
        parts.append(last_1V[own[index]])
        if row.start:
            parts.append(next(following))
    return torch.cat(parts)


def _read(
    model: AdaptedModel, rows: Sequence[_Row], *, keep: bool = False
) -> tuple[list[torch.Tensor], Any]:
    """Run whole rows; return the logits of each from its prompt's last token on, and the cache.

    Args:
        model: The model.
        rows: What to read.
        keep: Whether to return the cache, padded on the right as the rows are.
    """
    ids_BS, mask_BS = _pad([[*row.prompt, *row.start] for row in rows], model)
    first = min(len(row.prompt) for row in rows) - 1
    num_places = ids_BS.shape[1] - first
    # Most models can leave out the logits that nobody reads; the vocabulary is large.
    can_leave_out = "logits_to_keep" in inspect.signature(model.model.forward).parameters
    options = {"logits_to_keep": num_places} if can_leave_out else {}
    outputs = model.model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=keep, **options)
    logits_BSV = outputs.logits[:, -num_places:]
    logits = []
    for index, row in enumerate(rows):
        place = len(row.prompt) - 1 - first
        # Only these places become float32.
        logits.append(logits_BSV[index, place : place + len(row.start) + 1].float())
    return logits, outputs.get(cache_name(model.model)) if keep else None


def _go_on(
    model: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    cache: Any,
    starts: Sequence[tuple[int, Ids]],
) -> list[torch.Tensor]:
    """Return the logits of what follows prompts that have been read, (len(start), V) for each.

    Args:
        model: The model.
        prompts: Those of the cache.
        cache: Of the prompts, padded on the right; used up.
        starts: Index of a prompt, and the ids that follow it.
    """
    own = torch.tensor([prompt for prompt, _ in starts], device=model.device)
    ids_BS, mask_BS = _pad([start for _, start in starts], model)
    _, mask_PS = _pad(prompts, model)
    length_P1 = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
    cache.batch_select_indices(own)
    outputs = model.model(
        input_ids=ids_BS,
        attention_mask=torch.cat((mask_PS[own], mask_BS), dim=1),
        position_ids=length_P1[own] + torch.arange(ids_BS.shape[1], device=model.device),
        **{cache_name(model.model) or "": cache},
        use_cache=True,
    )
    return [outputs.logits[i, : len(start)].float() for i, (_, start) in enumerate(starts)]


def _pad(rows: Sequence[Sequence[int]], model: AdaptedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, (B, S), padded on the right."""
    arrays = collate_prompts(rows, pad_id=model.tokenizer.pad_token_id, side="right")
    ids_BS, mask_BS = (
        torch.from_numpy(arrays[key]).to(model.device) for key in ("input_ids", "attention_mask")
    )
    return ids_BS, mask_BS
