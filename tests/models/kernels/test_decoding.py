"""Greedy decoding gives what ``generate`` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchard.models.kernels.decoding import can_decode, decode_greedily
from tiny_models import FAMILIES, VOCABULARY

OPTIONS = {"max_new_tokens": 7, "pad_token_id": 0, "do_sample": False}
DECODED = ["qwen2_moe", "mixtral", "deepseek_v3", "granitemoe", "aria"]


@pytest.mark.parametrize("family", DECODED)
def test_answers_are_those_of_generate(family: str) -> None:
    model: Any = FAMILIES[family]()
    assert can_decode(model)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (6, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(6):
        ids[row, :row] = mask[row, :row] = 0
    free = model.generate(ids, attention_mask=mask, eos_token_id=2, **OPTIONS)[:, 9:]
    # An end that some rows reach before the others.
    early = {end: (free[:, :5] == end).any(dim=1) for end in free[:, :5].flatten().tolist()}
    end = next(end for end, rows in early.items() if rows.any() and not rows.all())
    expected = model.generate(ids, attention_mask=mask, eos_token_id=end, **OPTIONS)[:, 9:]
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = decode_greedily(model, ids, mask, max_new_tokens=7, end_ids=[end], pad_id=0)
    handle.remove()
    assert torch.equal(found, expected)
    ended = (expected == end).int().cumsum(dim=1).clamp(max=1)
    assert seen == [6, *(6 - ended[:, : found.shape[1] - 1].sum(dim=0)).tolist()]
    assert min(seen) < 6


def test_what_keeps_a_state_is_left_to_generate() -> None:
    for family in ("qwen3_next", "nemotron_h", "gpt_oss", "switch", "deepseek_moe_16b"):
        assert not can_decode(FAMILIES[family]()), family
