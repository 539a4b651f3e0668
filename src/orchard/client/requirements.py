"""What a client needs in memory to train, from a model's configuration alone.

A model of the peak, part by part, of a client in a process of its own. It errs on the side of too
much: batches as long as ``data.max_tokens`` allows, and every tensor that training ever holds at
the same time as the activations that it may meet. ``benchmarks/planner`` compares it with
what was measured.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from orchard.models.kernels.carrying import NUM_PLACES
from orchard.models.stored.footprint import Footprint, activation_bytes, measure_footprint
from orchard.models.stored.loading import DTYPES
from orchard.models.stored.placing import Placement
from orchard.models.stored.precision import bytes_per_value
from orchard.models.trainable.targets import EXPERTS, LoraSettings

PROCESS_BYTES = 560_000_000
"""Python with torch, transformers and PEFT after training, on a CPU: 557 MB were measured."""
ANONYMOUS_BYTES = 385_000_000
"""Of a process that has trained, what is no page of a file: 385 MB were measured."""
KERNEL_BYTES = 135_000_000
"""In bfloat16, what oneDNN makes and keeps for products of many sizes: 118 to 143 MB measured."""
_IN_MEMORY = Placement()
_FLOAT = 4  # bytes of what is trained, whatever the base's dtype


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak of a client's local training, by what they are for.

    Attributes:
        process: Code and libraries.
        weights: The model that is held.
        adapters: Trainable tensors beside it: LoRA factors, grafts.
        received: The global values of what is trained.
        optimizer: Moments, of what has moved.
        gradients: Of one optimizer step.
        folded: Expert weights that are made for a moment: with their adapters in them, a copy of
            all or, where experts are mapped, of one layer; or one that is read back from few bits.
        activations: What autograd keeps of one micro-batch, and the logits.
        loading: Of the file, while the model is read from it; before there is anything else.
        kernels: What oneDNN makes for products in bfloat16.
        offloaded: Of experts that wait in the host's memory for their turn on a GPU.
    """

    process: int
    weights: int
    adapters: int
    received: int
    optimizer: int
    gradients: int
    folded: int
    activations: int
    loading: int
    kernels: int = 0
    offloaded: int = 0

    @property
    def device(self) -> int:
        """Of training on a GPU, what is there and not in the host's memory."""
        return (
            self.weights
            + self.adapters
            + self.optimizer
            + self.gradients
            + self.folded
            + self.activations
            - min(self.activations, self.gradients) // 2
        )

    @property
    def training(self) -> int:
        """Of training, in which two parts overlap."""
        # The backward pass frees a layer's activations as it makes its gradients; half of what
        # that saves is left for what it needs for a moment.
        overlap = min(self.activations, self.gradients) // 2
        parts: int = sum(getattr(self, f.name) for f in fields(self))
        return parts - self.loading - overlap

    @property
    def total(self) -> int:
        """The larger of training and loading."""
        return max(self.training, self.process + self.weights + self.loading)

    @property
    def anonymous(self) -> int:
        """Of training, what the system cannot take back: no pages of files, mapped or of code."""
        return self.training - self.process + ANONYMOUS_BYTES

    @property
    def host(self) -> int:
        """Of training on a GPU, what the host has of its own; the dense part was read there."""
        return ANONYMOUS_BYTES + self.weights + self.offloaded + self.received


@dataclass(frozen=True)
class TrainingShape:
    """What of a recipe decides how much memory training takes.

    Attributes:
        lora: What is trained.
        dtype: Of the base.
        batch_size: Examples of a micro-batch.
        num_tokens: Of the longest example.
        optimizer: ``adamw`` or ``sgd``.
        is_carved: Whether a client holds only the experts that it trains.
        num_choices: How often in a round a client chooses experts: what a choice moves for the
            first time gets optimizer state, which stays to the end of the round.
        personal: Elements that are trained and never received, such as a graft.
        placement: Where the frozen experts of a client that holds all of them are.
    """

    lora: LoraSettings
    dtype: str
    batch_size: int
    num_tokens: int
    optimizer: str
    is_carved: bool
    num_choices: int
    personal: int = 0
    placement: Placement = _IN_MEMORY


class Requirements:
    """What training needs with more or fewer experts."""

    def __init__(self, config: Any, shape: TrainingShape, *, stored_bytes: int) -> None:
        """Read the sizes off a model without values.

        Args:
            config: A transformers config.
            shape: How it is trained.
            stored_bytes: Of the checkpoint's tensors, from its file headers.

        Raises:
            ValueError: A target fits nothing.
        """
        self._config, self._shape, self._stored_bytes = config, shape, stored_bytes
        self.footprint: Footprint = measure_footprint(config, shape.lora, dtype=shape.dtype)
        self._counted: dict[str, tuple[dict[str, int], int]] = {}
        self._traced: dict[tuple[int, ...], int] = {}

    @property
    def is_carved(self) -> bool:
        """Whether a client holds only the experts that it trains."""
        return self._shape.is_carved

    def placed(self, placement: Placement) -> Requirements:
        """Return the same with frozen experts in another place."""
        other = copy.copy(self)  # what was counted and traced does not depend on it
        other._shape = replace(self._shape, placement=placement)
        return other

    @property
    def personal(self) -> int:
        """Elements that are trained and never sent."""
        return self._shape.personal

    def spread(self, budget: int) -> tuple[int, ...]:
        """Divide a budget over the MoE layers, as evenly as their sizes allow.

        Args:
            budget: Experts over all layers, at least one for each.
        """
        sizes = list(self.footprint.layers.values())
        kept = [0] * len(sizes)
        left = min(budget, sum(sizes))
        while left:
            open_ = [index for index, size in enumerate(sizes) if kept[index] < size]
            # Earlier layers take what does not divide.
            for index in open_[:left]:
                kept[index] += 1
            left -= min(left, len(open_))
        return tuple(kept)

    def peak(self, budget: int) -> PeakMemory:
        """Return the peak with ``budget`` experts over all layers.

        Raises:
            ValueError: The family's forward pass cannot be measured without values.
        """
        shape, sizes = self._shape, self.footprint
        chosen = self.spread(budget)
        held = chosen if shape.is_carved else tuple(sizes.layers.values())
        moved = tuple(
            min(size, own * shape.num_choices)
            for size, own in zip(sizes.layers.values(), chosen, strict=True)
        )
        own_bytes = zip(sizes.expert_bytes.values(), held, strict=True)
        expert_bytes = [size * number for size, number in own_bytes]
        # What is carved is in memory, wherever the whole model would be.
        placement = _IN_MEMORY if shape.is_carved else shape.placement
        states = 2 if shape.optimizer == "adamw" else 0
        return PeakMemory(
            process=PROCESS_BYTES,
            weights=sizes.dense_bytes + self._held(placement, expert_bytes),
            adapters=_FLOAT * (self.trainable(held, kind="lora") + shape.personal),
            received=_FLOAT * self.trainable(held),
            optimizer=_FLOAT * states * (self.trainable(moved) + shape.personal),
            gradients=_FLOAT * (self.trainable(held) + shape.personal),
            folded=self._folded(placement, expert_bytes),
            activations=self._activations(held),
            # Read slice by slice, and what was read of a file can be dropped.
            loading=0 if shape.is_carved or not placement.is_plain else self._stored_bytes,
            kernels=KERNEL_BYTES if shape.dtype == "bfloat16" else 0,
            offloaded=(
                self._kept(placement, sum(expert_bytes))
                if placement.kind == "offload" and not placement.is_mapped
                else 0
            ),
        )

    def _held(self, placement: Placement, expert_bytes: Sequence[int]) -> int:
        """Return what experts take of the memory that computes, a layer's bytes each."""
        if placement.kind == "mapped":
            return 0
        if placement.kind == "offload":
            return NUM_PLACES * self._kept(placement, max(expert_bytes))
        return self._kept(placement, sum(expert_bytes))

    def _kept(self, placement: Placement, num_bytes: int) -> int:
        """Return what experts of so many bytes take in their precision."""
        if placement.precision == "bf16":
            return num_bytes
        width = DTYPES[self._shape.dtype].itemsize
        return round(num_bytes / width * bytes_per_value(placement.precision))

    @property
    def _folds(self) -> bool:
        """Whether adapters are added to the weights of experts before these multiply."""
        return EXPERTS in self._shape.lora.targets and not self.footprint.is_factored

    def _folded(self, placement: Placement, expert_bytes: Sequence[int]) -> int:
        """Return what experts take beside themselves, a layer's bytes each, while they run."""
        if self._folds:
            # A copy with adapters in it of all layers, or of one at a time; and one of a layer's
            # gradient, in slices and then in one piece.
            kept = max(expert_bytes) if placement.kind == "mapped" else sum(expert_bytes)
            return kept + 2 * max(expert_bytes)
        if placement.precision == "bf16":
            return 0
        # One expert that is read back, in float32 and then in the model's dtype.
        width = DTYPES[self._shape.dtype].itemsize
        return max(self.footprint.expert_bytes.values()) * (_FLOAT + width) // width

    def evaluation(
        self, *, batch_size: int, num_tokens: int, num_answered: int, num_new: int = 0
    ) -> int:
        """Return the bytes of a process that measures a whole model, at the most.

        Args:
            batch_size: Examples at a time.
            num_tokens: Of the longest example.
            num_answered: Of the longest response, whose logits are made.
            num_new: Generated for each, at the most.
        """
        config, sizes = self._config.get_text_config(), self.footprint
        width = DTYPES[self._shape.dtype].itemsize
        expert_bytes = [
            size * number
            for size, number in zip(sizes.expert_bytes.values(), sizes.layers.values(), strict=True)
        ]
        experts = sum(expert_bytes)
        placed = self._held(self._shape.placement, expert_bytes)
        held = sizes.dense_bytes + placed + _FLOAT * (sum(sizes.trainable.values()) * 2)
        if self._folds:
            held += experts * _FLOAT // width
        # Logits as the model makes them, in float32, and their softmax.
        logits = num_answered * sizes.vocabulary * (width + 2 * _FLOAT)
        state: int = config.hidden_size * width
        # Keys and values of each layer, at the most; and what one layer works with.
        cache: int = 2 * config.num_hidden_layers * (num_tokens + num_new) * state
        return PROCESS_BYTES + held + batch_size * (logits + cache + 8 * num_tokens * state)

    def trainable(self, experts: Sequence[int], *, kind: str = "all") -> int:
        """Return the trainable elements of everything with so many experts in each layer.

        Args:
            experts: In each MoE layer.
            kind: ``all``, or ``lora`` for adapters alone.
        """
        sizes = self.footprint
        per_expert, rest = self._elements(kind)
        return rest + sum(
            number * per_expert[layer] // sizes.layers[layer]
            for layer, number in zip(sizes.layers, experts, strict=True)
        )

    def _elements(self, kind: str) -> tuple[dict[str, int], int]:
        """Return trainable elements of the experts of each layer, and of all else."""
        if kind not in self._counted:
            of_layer, rest = dict.fromkeys(self.footprint.layers, 0), 0
            for name, elements in self.footprint.trainable.items():
                if kind == "lora" and ".lora_" not in name:
                    continue
                layer, is_expert, _ = name.partition(".experts.")
                if is_expert:
                    of_layer[layer] += elements
                else:
                    rest += elements
            self._counted[kind] = of_layer, rest
        return self._counted[kind]

    def _activations(self, held: Sequence[int]) -> int:
        shape, key = self._shape, tuple(held)
        if key not in self._traced:
            self._traced[key] = activation_bytes(
                self._config,
                shape.lora,
                held,
                dtype=shape.dtype,
                batch_size=shape.batch_size,
                num_tokens=shape.num_tokens,
            )
        places = shape.batch_size * shape.num_tokens
        # Three at a time, each in float32 at most: logits, those with a label, their log-softmax;
        # on the way back the log-softmax, its gradient and that of the logits.
        return self._traced[key] + places * self.footprint.vocabulary * 3 * _FLOAT
