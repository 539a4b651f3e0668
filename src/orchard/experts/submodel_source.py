"""A client's way to the experts it can afford: from the checkpoint, never through a whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from orchard.experts.grafting import Origin, ReadOrigin
from orchard.experts.reconstruction import RunExpert
from orchard.models.stored.conversion import StoredModel, match_checkpoint
from orchard.models.stored.streaming import (
    ReadExpert,
    checkpoint_reader,
    expert_runner,
    router_reader,
    streamed_experts,
)
from orchard.models.stored.submodel import load_skeleton, load_submodel
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import EXPERTS, LoraSettings
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.storage import FusedExperts
from orchard.trees import Tree


@dataclass(frozen=True)
class SubmodelSource:
    """Where a client opens submodels and skeletons, and what of them is trained.

    Attributes:
        path: Of the checkpoint: folder, hub name, or ``orchard:tiny``.
        dtype: Of the base.
        device: Where models run.
        lora: What is trained, as in the whole model.
        tokenizer: The base's.
        base_digest: SHA-256 of the whole base's tensors.
        seed: Of fresh adapters; global values are loaded over them.
    """

    path: str
    dtype: str
    device: str
    lora: LoraSettings
    tokenizer: Any
    base_digest: str
    seed: int

    @cached_property
    def stored(self) -> StoredModel:
        """Where the checkpoint keeps each expert, found once.

        Raises:
            ValueError: See ``match_checkpoint``.
        """
        return match_checkpoint(self.path)

    def carve(self, kept: Sequence[Sequence[int]]) -> AdaptedModel:
        """Load the model with these experts of each MoE layer only, and its adapters.

        Raises:
            ValueError: See ``load_submodel``; or one expert of a layer alone should get an adapter
                where PEFT cannot put it.
        """
        view = load_submodel(self.stored, kept, dtype=self.dtype, device=self.device)
        for layer in view.layers:
            check_several(layer, layer.num_experts, self.lora)
        return self._adapt(view, self.lora)

    @contextmanager
    def skeleton(self, shared: Tree) -> Iterator[AdaptedModel]:
        """Open the model forward-only at these global values, one expert in memory at a time.

        Args:
            shared: The global tree: experts are the checkpoint's with these values over them, or
                with these adapters in them.
        """
        without = replace(self.lora, targets=tuple(t for t in self.lora.targets if t != EXPERTS))
        model = self._adapt(
            load_skeleton(self.stored, dtype=self.dtype, device=self.device), without
        )
        model.load({name: shared[name] for name in model.adapter_names if name in shared})
        read = checkpoint_reader(self.stored, self.dtype)
        with streamed_experts(model.view, self._at(model.view, shared, read)):
            yield model

    @contextmanager
    def base(self) -> Iterator[tuple[MoEView, RunExpert]]:
        """Open the base forward-only, one expert in memory at a time.

        Yields:
            The base, and what runs one of its experts, which the view itself cannot.
        """
        with self.skeleton({}) as model, model.without_adapters():
            read = checkpoint_reader(self.stored, self.dtype)
            yield model.view, expert_runner(model.view, read)

    def origin_reader(self) -> ReadOrigin:
        """Return what reads the expert that a graft starts as, with its row of the router."""
        read_expert, read_row = (
            checkpoint_reader(self.stored, self.dtype),
            router_reader(self.stored),
        )

        def read(layer: int, expert: int) -> Origin:
            row = read_row(layer, expert)
            return Origin(read_expert(layer, expert), row["weight"], row.get("bias"))

        return read

    def _adapt(self, view: MoEView, lora: LoraSettings) -> AdaptedModel:
        return AdaptedModel(
            view,
            lora,
            tokenizer=self.tokenizer,
            base_digest=self.base_digest,
            seed=self.seed,
        )

    def _at(self, view: MoEView, shared: Tree, read: ReadExpert) -> ReadExpert:
        """Return a reader of experts at the global values."""
        scale = self.lora.alpha / self.lora.rank

        def read_expert(index: int, expert: int) -> Mapping[str, Tensor]:
            layer = view.layers[index]
            prefix = f"{layer.name}.experts.{expert}."
            tensors = {
                name: shared.get(prefix + name, tensor).to(tensor.dtype)
                for name, tensor in read(index, expert).items()
            }
            storage = layer.storage
            assert isinstance(storage, FusedExperts)
            for parameter, locals_ in storage.projections().items():
                if f"{prefix}{parameter}.lora_A" in shared:
                    factors = (shared[f"{prefix}{parameter}.lora_{f}"].float() for f in "BA")
                    delta = scale * torch.matmul(*factors)
                    for local, own in zip(locals_, storage.halve(delta, locals_), strict=True):
                        tensors[local] = (tensors[local].float() + own).to(tensors[local].dtype)
            return tensors

        return read_expert


def check_several(layer: MoELayer, num_kept: int, lora: LoraSettings) -> None:
    """Check that adapters can be put on so few experts of a layer.

    Raises:
        ValueError: There is one, and PEFT cannot put it there.
    """
    storage = layer.storage
    is_transposed = isinstance(storage, FusedExperts) and storage.is_transposed
    if num_kept < 2 and is_transposed and EXPERTS in lora.targets:
        raise ValueError(
            f"a carved layer with adapters on experts stored transposed must keep at least 2, got "
            f"{num_kept} in {layer.name}; raise client.budget or train experts themselves"
        )
