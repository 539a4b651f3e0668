"""Tiny random models with adapters, examples for them, and a tokenizer of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orchard.data.encoded import IGNORED, Encoded
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.models.view.detection import view_moe
from orchard.trees import digest
from tiny_models import FAMILIES, VOCABULARY


def targets_of(family: str) -> tuple[str, ...]:
    """Return two linear layers of the family's attention."""
    is_latent = family in ("deepseek_v2", "deepseek_v3")
    return ("q_b_proj", "kv_b_proj") if is_latent else ("q_proj", "v_proj")


class NumberTokenizer:
    """Writes token ids as numbers; 0 pads, 1 begins and 2 ends, as in ``tiny_models``."""

    pad_token_id = 0
    eos_token_id = 2

    def batch_decode(self, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        kept = [[i for i in row if i > 2 or not skip_special_tokens] for row in ids]
        return [" ".join(map(str, row)) for row in kept]


def adapt(
    family: str = "qwen2_moe",
    *,
    extra: Sequence[str] = (),
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdaptedModel:
    """Adapt a tiny model with rank 2 and scale 2; ``extra`` targets come after the family's own."""
    model = FAMILIES[family]().to(dtype)
    if targets is None:
        targets = (*targets_of(family), *extra)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return AdaptedModel(
        view_moe(model),
        LoraSettings(rank=2, alpha=4.0, dropout=dropout, targets=tuple(targets)),
        tokenizer=NumberTokenizer(),
        base_digest=digest(state),
        seed=seed,
    )


def stir(model: AdaptedModel, *, seed: int = 5, size: float = 0.2) -> None:
    """Give every adapter random values, so that it changes something."""
    generator = torch.Generator().manual_seed(seed)
    model.load(
        {n: size * torch.randn(t.shape, generator=generator) for n, t in model.fresh.items()}
    )


def example_of(length: int, prompt_length: int, *, seed: int = 0) -> Encoded:
    """Draw an example of ``length`` tokens, the last of which is the end token."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids = [*torch.randint(3, VOCABULARY, (length - 1,), generator=generator).tolist(), 2]
    labels = [IGNORED] * prompt_length + ids[prompt_length:]
    return Encoded(input_ids=ids, labels=labels, prompt_length=prompt_length, is_ended=True)


def examples(num: int = 8) -> list[Encoded]:
    """Draw examples of different lengths with different numbers of labels."""
    return [example_of(5 + i % 5, 1 + i % 3, seed=i) for i in range(num)]
