"""Greedy decoding in which a row that has ended leaves the batch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from orchard.models.kernels.caches import cache_name, why_not_continued

_NEEDED = frozenset(("position_ids", "logits_to_keep"))


def can_decode(model: nn.Module) -> bool:
    """Say whether ``decode_greedily`` can run a model: by its arguments, and by what it keeps."""
    return not why_not_decoded(model)


def why_not_decoded(model: nn.Module) -> str:
    """Say why ``decode_greedily`` cannot run a model; nothing where it can."""
    network: Any = model
    supports = getattr(network, "_supports_default_dynamic_cache", None)
    if network.config.is_encoder_decoder or supports is None or not supports():
        return "it is no decoder with a cache of keys and values"
    lacking = _NEEDED - inspect.signature(network.forward).parameters.keys()
    if lacking:
        return f"its forward pass has no argument {', '.join(sorted(lacking))}"
    return why_not_continued(network)


def fresh_cache(model: nn.Module) -> Any:
    """Return an empty cache of keys and values for a model for which ``can_decode`` holds."""
    network: Any = model
    return DynamicCache(config=network.config)


@torch.inference_mode()
def decode_greedily(
    model: nn.Module,
    ids_BS: Tensor,
    mask_BS: Tensor,
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
) -> Tensor:
    """Return what follows prompts, the most probable token at each place, (B, new).

    Args:
        model: For which ``can_decode`` holds, in evaluation mode.
        ids_BS: Prompts, padded on the left.
        mask_BS: 1 = token, 0 = padding.
        max_new_tokens: Answers end here if not at an end token.
        end_ids: The tokens that end an answer; the one that does is part of what is returned.
        pad_id: Fills what follows it.
    """
    network: Any = model
    answers_BN = ids_BS.new_full((len(ids_BS), max_new_tokens), pad_id)
    end_N = torch.tensor(end_ids, device=ids_BS.device)
    row_R = torch.arange(len(ids_BS), device=ids_BS.device)
    cache = fresh_cache(network)
    kept_cache = {cache_name(model) or "": cache}
    place_RS = (mask_BS.cumsum(dim=1) - 1).clamp_(min=0)
    feed_RS = ids_BS
    for number in range(max_new_tokens):
        logits_RV = network(
            input_ids=feed_RS,
            attention_mask=mask_BS,
            position_ids=place_RS,
            **kept_cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        next_R = logits_RV.argmax(dim=-1)
        answers_BN[row_R, number] = next_R
        goes_on_R = ~torch.isin(next_R, end_N)
        num_left = int(goes_on_R.sum())
        if num_left == 0:
            return answers_BN[:, : number + 1]
        place_RS = place_RS[:, -1:] + 1
        if num_left < len(row_R):
            kept = goes_on_R.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            next_R, row_R, mask_BS, place_RS = (
                part[kept] for part in (next_R, row_R, mask_BS, place_RS)
            )
        feed_RS = next_R[:, None]
        mask_BS = torch.cat((mask_BS, mask_BS.new_ones(len(mask_BS), 1)), dim=1)
    return answers_BN
