"""Greedy answers, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orchard.data.templates import collate_prompts
from orchard.models.trainable.adapters import AdaptedModel


def generate_greedily(
    model: AdaptedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """Answer every prompt with the most probable token at each place.

    Args:
        model: The model, in evaluation mode.
        prompts: Token ids, without padding.
        max_new_tokens: Answers end here if not at the end token.
        batch_size: Prompts at a time; prompts of similar length go together.

    Returns:
        The answers without special tokens, in the order of the prompts.
    """
    tokenizer = model.tokenizer
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        arrays = collate_prompts([prompts[i] for i in chosen], pad_id=tokenizer.pad_token_id)
        ids_BS, mask_BS = (
            torch.from_numpy(arrays[key]).to(model.device)
            for key in ("input_ids", "attention_mask")
        )
        new_ids = model.generate(ids_BS, mask_BS, max_new_tokens=max_new_tokens)
        texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers
