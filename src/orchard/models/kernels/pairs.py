"""Models that read a prompt with an encoder and write the response with a decoder.

What is particular to calling one: a decoder starts from a token of its own, prompts are padded on
the right, and what an encoder reads has another length than what its decoder does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchard.models.kernels.caches import cache_name


def is_pair(model: nn.Module) -> bool:
    """Say whether a model is an encoder with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def start_id(model: nn.Module) -> int:
    """Return the token that a decoder reads before all others.

    Raises:
        ValueError: The configuration names none.
    """
    config: Any = model.config
    found = config.decoder_start_token_id
    if found is None:
        raise ValueError(
            "decoder_start_token_id must be a token, got none in the config.json of a "
            f"{config.model_type}; set it to the one that the model was trained with"
        )
    return int(found)


def to_right(ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of rows to the right, where it takes no expert's capacity from tokens."""
    order_BS = mask_BS.argsort(dim=1, descending=True, stable=True)
    return ids_BS.gather(1, order_BS), mask_BS.gather(1, order_BS)


class PairWriter:
    """A prompt that an encoder has read, and what its decoder says next."""

    def __init__(self, model: nn.Module, ids: Sequence[int]) -> None:
        """Read a prompt.

        Args:
            model: An encoder-decoder, in evaluation mode.
            ids: The prompt.
        """
        network: Any = model
        prompt_BS = torch.tensor([list(ids)], device=next(model.parameters()).device)
        self._network = network
        self._fixed = {
            "attention_mask": torch.ones_like(prompt_BS),
            "encoder_outputs": network.get_encoder()(
                input_ids=prompt_BS, attention_mask=torch.ones_like(prompt_BS)
            ),
        }
        self._cache: dict[str, Any] = {}

    def follow(self, token: int) -> Tensor:
        """Return the logits of what follows a token, (V,); the first is ``start_id``."""
        mask_BS = self._fixed["attention_mask"]
        outputs = self._network(
            decoder_input_ids=mask_BS.new_full((1, 1), token),
            use_cache=True,
            **self._fixed,
            **self._cache,
        )
        name = cache_name(self._network)
        assert name is not None, "a decoder keeps what it has written"
        self._cache = {name: outputs[name]}
        logits_V: Tensor = outputs.logits[0, -1]
        return logits_V


def read_by(arguments: Mapping[str, Any], *, is_decoder: bool) -> tuple[Tensor, Tensor | None]:
    """Return the tokens that one stack of layers reads in a forward pass, and their mask.

    Args:
        arguments: What the model was called with.
        is_decoder: Of a pair, whether its decoder is meant; else False.

    Returns:
        Token ids (B, S), and 1 = token, 0 = padding; None where there is no mask of these tokens,
        such as while a text is generated, when it is longer than what is fed.
    """
    prefix = "decoder_" if is_decoder else ""
    ids_BS, mask_BS = arguments[f"{prefix}input_ids"], arguments.get(f"{prefix}attention_mask")
    fits = mask_BS is not None and mask_BS.shape == ids_BS.shape
    return ids_BS, mask_BS if fits else None


def one_token(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of the shortest forward pass of a model."""
    token_BS = torch.zeros(1, 1, dtype=torch.long, device=device)
    return {"input_ids": token_BS} | ({"decoder_input_ids": token_BS} if is_pair(model) else {})
