"""Several rows in one forward pass without padding, each of which reads itself alone.

Rows stand behind each other as one long row. All that a model does token by token it does once for
each real token; attention, the one part in which tokens meet, runs row by row, on the kernel that
the model uses for padded rows too. Positions begin anew in each row.

A model can be run so if all its mixing of tokens is attention behind transformers' interface, which
its class says of itself. Others, such as those with a recurrent state, are padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchard.models.kernels.pairs import read_by

_NAME = "orchard_packed"
_LENGTHS = "packed_lengths"  # an argument of the model that reaches every attention
_WINDOWED = "sliding_attention"
_KNOWN_LAYERS = frozenset(("full_attention", _WINDOWED))


def can_pack(model: nn.Module, *, longest: int) -> bool:
    """Say whether a model can read rows behind each other without mixing them.

    Args:
        model: A language model.
        longest: Tokens of the longest row. A window that is shorter would be exceeded unseen.
    """
    return not why_not_packed(model, longest=longest)


def why_not_packed(model: nn.Module, *, longest: int) -> str:
    """Say why a model cannot read rows behind each other; nothing where it can.

    Args:
        model: A language model.
        longest: Tokens of the longest row.
    """
    network: Any = model
    config = getattr(network, "config", None)
    if config is None or config.is_encoder_decoder:
        return "it is no decoder of transformers"
    is_by_interface = (
        getattr(network, "_supports_attention_backend", False)
        and getattr(network, "_supports_sdpa", False)
        and config._attn_implementation in ("sdpa", _NAME)
    )
    if not is_by_interface:
        return (
            f"its attention is {config._attn_implementation}, not sdpa by transformers' interface"
        )
    text = config.get_text_config()
    kinds = frozenset(getattr(text, "layer_types", None) or ())
    if kinds - _KNOWN_LAYERS:
        return f"it has layers of {', '.join(sorted(kinds - _KNOWN_LAYERS))}"
    window = getattr(text, "sliding_window", None)
    is_windowed = _WINDOWED in kinds if kinds else bool(window)
    if is_windowed and (window is None or longest > window):
        return f"its window of {window} tokens is shorter than {longest}"
    return ""


@dataclass(frozen=True)
class Packed:
    """Rows behind each other.

    Attributes:
        ids_1T: Their tokens.
        positions_1T: Places within each row, from 0.
        lengths: Tokens of each row.
    """

    ids_1T: Tensor
    positions_1T: Tensor
    lengths: tuple[int, ...]

    def arguments(self) -> dict[str, Any]:
        """Return what the model is called with, inside ``packed_attention``."""
        return {
            "input_ids": self.ids_1T,
            "position_ids": self.positions_1T,
            _LENGTHS: self.lengths,
        }


def pack(rows: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Put rows of token ids behind each other."""
    lengths = tuple(len(row) for row in rows)
    ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Packed(ids[None].to(device), positions[None].to(device), lengths)


def packed_lengths(arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the tokens of each row of a packed forward pass; None where it is padded.

    Args:
        arguments: What the model was called with.
    """
    lengths: tuple[int, ...] | None = arguments.get(_LENGTHS)
    return lengths


def rows_of(arguments: Mapping[str, Any], *, is_decoder: bool = False) -> Tensor:
    """Return the row that each token of a forward pass belongs to, (T,).

    Args:
        arguments: What the model was called with, packed or padded.
        is_decoder: Of an encoder-decoder, whether the decoder's tokens are meant.
    """
    ids_BS, _ = read_by(arguments, is_decoder=is_decoder)
    lengths = arguments.get(_LENGTHS)
    if lengths is None:
        row_B = torch.arange(ids_BS.shape[0], device=ids_BS.device)
        return row_B.repeat_interleave(ids_BS.shape[1])
    # On the host, which knows the lengths: a device would be waited for to say how many there are.
    row_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return row_T.to(ids_BS.device)


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Let attention run row by row while the context lasts."""
    config: Any = model.config
    before = config._attn_implementation
    if before == _NAME:
        yield
        return
    # transformers makes no mask for a name that has no maker of masks.
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    lengths = options.pop(_LENGTHS)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    heads = (query_1HTD, key_1HTD, value_1HTD)
    spans = [
        slice(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)
    ]
    outputs = [
        attend(module, *(part[:, :, span] for part in heads), None, **options)[0] for span in spans
    ]
    return torch.cat(outputs, dim=1), None
