"""Dropout on adapters that depends on the row alone, not on what it is read with.

torch draws for a whole forward pass at once. Then the same row loses other values when it is
padded, packed, or read in another pass, and a setting of memory changes what is trained. Here every
row has a generator of its own, which each adapter in turn draws from for the row's tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchard.models.kernels.packing import packed_lengths, rows_of


@dataclass
class _Rows:
    """The rows of the forward pass that is under way.

    Attributes:
        seed: Of all of them.
        is_dropping: Whether the pass is one of training.
        num_seen: Rows of earlier passes.
        row_T: The row of each token, counted in this pass; -1 for padding.
        lengths: Tokens of each row.
        generators: One for each row.
        is_packed: Whether rows stand behind each other, so that the host knows where they are.
    """

    seed: int
    is_dropping: bool = False
    num_seen: int = 0
    row_T: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    lengths: tuple[int, ...] = ()
    generators: tuple[torch.Generator, ...] = ()
    is_packed: bool = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read from a model's arguments which token is of which row."""
        self.is_dropping = module.training
        if not self.is_dropping:
            return
        row_T, mask_BS = rows_of(kwargs), kwargs.get("attention_mask")
        if mask_BS is not None:
            row_T = row_T.where(mask_BS.flatten().bool(), -1)
        self.row_T = row_T
        packed = packed_lengths(kwargs)
        self.is_packed = packed is not None
        self.lengths = packed or tuple(torch.bincount(row_T[row_T >= 0]).tolist())
        self.generators = tuple(
            torch.Generator(row_T.device).manual_seed(_mixed(self.seed, self.num_seen + index))
            for index in range(len(self.lengths))
        )
        self.num_seen += len(self.lengths)

    def drop(
        self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor, *, share: float
    ) -> Tensor:
        """Return what an adapter reads, with a share of each row dropped by its own draws."""
        if not self.is_dropping:
            return output
        num_tokens = len(self.row_T)
        # Tokens stand before the features: flat, as (B, S), or as (B, 1, S).
        counts = accumulate(output.shape[:-1], operator.mul)
        depth = next((d for d, count in enumerate(counts, start=1) if count == num_tokens), 0)
        if not depth:
            raise ValueError(
                f"an adapter with dropout must read every token of a pass ({num_tokens}), got "
                f"shape {tuple(output.shape)}; set model.lora_dropout to 0 for this model"
            )
        features = output.shape[depth:]
        kept_TF = torch.zeros((num_tokens, *features), dtype=output.dtype, device=output.device)
        end = 0
        for row, (length, generator) in enumerate(zip(self.lengths, self.generators, strict=True)):
            draws = torch.rand((length, *features), generator=generator, device=output.device)
            start, end = end, end + length
            own = slice(start, end) if self.is_packed else self.row_T == row
            kept_TF[own] = (draws >= share).to(output.dtype)
        return output * (kept_TF / (1 - share)).reshape(output.shape)


@contextmanager
def dropout_by_row(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Let adapters of a model in training drop values by rows while the context lasts.

    Rows are counted from the start of the context, over all passes in training mode. What a model
    drops of its own, outside adapters, is drawn as ever.

    Args:
        model: The model, in training mode.
        seed: Decides all draws.
    """
    modules = [
        module
        for path, module in model.named_modules()
        if ".lora_dropout." in f".{path}." and isinstance(module, nn.Dropout) and module.p > 0
    ]
    if not modules:
        yield
        return
    rows = _Rows(seed)
    with ExitStack() as undo:
        handle = model.register_forward_pre_hook(rows.begin, with_kwargs=True)
        undo.callback(handle.remove)
        for module in modules:
            hook = partial(rows.drop, share=module.p)
            undo.callback(module.register_forward_hook(hook).remove)
            # Not its mode, which whoever looks at the model in between sets for all of it.
            undo.callback(setattr, module, "p", module.p)
            module.p = 0.0
        yield


def _mixed(*numbers: int) -> int:
    """Return a seed that every one of these numbers changes."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))
