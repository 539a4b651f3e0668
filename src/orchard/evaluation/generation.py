"""Greedy answers, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch

from orchard.data.encoded import collate_prompts
from orchard.models.trainable.adapters import AdaptedModel


def generate_greedily(
    model: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    end_ids: Sequence[int] = (),
) -> list[str]:
    """Answer every prompt with the most probable token at each place.

    Args:
        model: The model, in evaluation mode.
        prompts: Token ids, without padding.
        max_new_tokens: Answers end here if not at an end token.
        batch_size: Prompts at a time; prompts of similar length go together.
        end_ids: The tokens that end an answer; empty = the tokenizer's end token.

    Returns:
        The answers without their end and without special tokens, in the order of the prompts.
    """
    tokenizer = model.tokenizer
    ends = frozenset(end_ids or (tokenizer.eos_token_id,))
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        arrays = collate_prompts([prompts[i] for i in chosen], pad_id=tokenizer.pad_token_id)
        ids_BS, mask_BS = (
            torch.from_numpy(arrays[key]).to(model.device)
            for key in ("input_ids", "attention_mask")
        )
        new_ids = model.generate(
            ids_BS, mask_BS, max_new_tokens=max_new_tokens, end_ids=sorted(ends)
        )
        # Not every token that ends a turn is one that its tokenizer calls special.
        rows = [list(takewhile(lambda index: index not in ends, row)) for row in new_ids.tolist()]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers
