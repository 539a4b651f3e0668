"""Fused experts that a model does not have, but reads one by one where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from orchard.models.view.storage import FusedExperts, Slice
from orchard.trees import SlicedTensor


class HeldExperts(FusedExperts):
    """Fused experts whose weights are not in the model's memory, but read one expert at a time.

    The module keeps its parameters without values, on ``meta``, and in front of each stands what
    reads it; its own forward indexes that as it would the parameter.
    """

    def __init__(self, module: nn.Module, held: Mapping[str, SlicedTensor]) -> None:
        """Let a module read its experts elsewhere, from now on.

        Args:
            module: For which ``is_fused`` holds, with parameters on ``meta``.
            held: Attribute of each parameter to what reads it, in the model's layout.
        """
        self.held = held
        # Found before the parameter, which modules keep apart from their attributes.
        vars(module).update(held)
        super().__init__(module)

    def slices(self, expert: int) -> dict[str, Slice]:
        """Refuse: what is read elsewhere cannot be trained."""
        raise ValueError(
            f"experts that are trained must be in memory, got expert {expert} elsewhere; "
            "set model.placement to memory"
        )

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters without values."""
        own = self.module._parameters
        return [cast(nn.Parameter, own[name]) for name in self._names()]
