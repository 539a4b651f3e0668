"""Fused experts that are in the host's memory, and on the device while their layer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orchard.models.kernels.frozen_experts import run_frozen
from orchard.models.kernels.grouped_experts import can_group, run_grouped
from orchard.models.kernels.routed_experts import FrozenWeights
from orchard.models.view.held import HeldExperts
from orchard.trees import SlicedTensor

OnDevice = Callable[[], AbstractContextManager[Mapping[str, Tensor | SlicedTensor]]]
"""What has the parameters of a layer on the device while a context lasts."""


class OffloadedExperts(HeldExperts):
    """Experts whose layer is brought to the device for each pass over it, forward and back.

    A single expert, such as one that a graft starts as, is read from the host on its own.
    """

    def __init__(
        self,
        module: nn.Module,
        held: Mapping[str, SlicedTensor],
        *,
        host: Mapping[str, Tensor | SlicedTensor],
        on_device: OnDevice,
    ) -> None:
        """Let a module compute with experts that come when they are needed.

        Args:
            module: For which ``is_fused`` holds, with parameters on ``meta``.
            held: Attribute of each parameter to what reads an expert of it to the device.
            host: What ``on_device`` gives, as it lies in the host's memory.
            on_device: Opened for each pass.
        """
        self._host, self._on_device = host, on_device
        super().__init__(module, held)

    def run_routed(self, x_TD: Tensor, choices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return what ``FusedExperts.run_routed`` does, (T, D), with experts that are brought."""
        if not self.has_post_norm and not self.is_random:
            run = run_grouped if can_group(self._frozen(self._host), x_TD) else run_frozen
            return run(self, x_TD, choices_TK, weights_TK)

        def run_each(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
            with self._on_device() as held:
                return self._run_each(held, x_TD, choices_TK, weights_TK)

        if not torch.is_grad_enabled():
            return run_each(x_TD, weights_TK)
        # What autograd would keep of the experts is gone when it goes back.
        y_TD: Tensor = checkpoint(
            run_each, x_TD, weights_TK, use_reentrant=False, preserve_rng_state=self.is_random
        )
        return y_TD

    @contextmanager
    def opened(self) -> Iterator[FrozenWeights]:
        """Give the layer's weights on the device while the context lasts."""
        with self._on_device() as held:
            yield self._frozen(held)
