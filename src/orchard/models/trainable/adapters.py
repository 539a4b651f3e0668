"""What can be trained of a shared base, seen as a tree of names.

PEFT puts LoRA adapters in; this module names them, so that what trains, what is sent and what is
kept can be said in names: ``layers.3.self_attn.q_proj.lora_A``, or per expert
``layers.3.experts.17.down_proj.lora_B``. What is trained itself has the names of ``MoEView`` or of
the model: ``layers.3.experts.17.down_proj``, ``layers.3.router.17``. Adapters are float32 over a
base of any dtype, and one base serves many clients: switching clients copies the values of names
and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig

from orchard.models.kernels.decoding import can_decode, decode_greedily
from orchard.models.kernels.pairs import is_pair, one_token, start_id, to_right
from orchard.models.trainable.slots import Slot, full_slots, lora_slots
from orchard.models.trainable.targets import LoraSettings, check_targets, find_targets, inject_lora
from orchard.models.view.moe import MoEView
from orchard.trees import SlicedTensor, Tree


class AdaptedModel:
    """A frozen base with LoRA adapters, addressed by name."""

    def __init__(
        self, view: MoEView, settings: LoraSettings, *, tokenizer: Any, base_digest: str, seed: int
    ) -> None:
        """Inject fresh adapters, which change nothing: B is zero.

        Args:
            view: The base model, as loaded.
            settings: Where and how large.
            tokenizer: The base's tokenizer.
            base_digest: SHA-256 of the base's tensors.
            seed: Decides the values of A.

        Raises:
            ValueError: A target fits nothing, or dropout is asked for where PEFT has none.
        """
        check_targets(view, settings)
        modules, parameters = find_targets(view, settings.targets)
        self.view = view
        self.model = view.model
        self.tokenizer = tokenizer
        self.base_digest = base_digest
        self.model.requires_grad_(False)
        self._base_state = view.state()
        full = dict(full_slots(view, settings.full, adapted=(*modules, *parameters)))
        narrow = next((n for n, s in full.items() if s.parameter.dtype != torch.float32), None)
        if narrow is not None:
            raise ValueError(
                f"model.dtype must be float32 with model.full_targets, got "
                f"{full[narrow].parameter.dtype} in {narrow}; small steps would be rounded away"
            )
        self._full_names = tuple(full)
        if modules or parameters:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                inject_lora(
                    self.model,
                    rank=settings.rank,
                    alpha=settings.alpha,
                    dropout=settings.dropout,
                    modules=modules,
                    parameters=parameters or None,
                )
        lora = dict(lora_slots(self.model, view))
        self._slots = {**lora, **full}
        self.adapter_names = tuple(self._slots)
        # Adapters are small; a copy of what is trained itself is made when it is asked for.
        self._fresh = self.read(lora)
        self._is_fresh = True
        self.ends_with_head = _ends_with_head(view)
        self.set_trainable(())

    @property
    def fresh(self) -> Tree:
        """Values with which the model is the base."""
        if len(self._fresh) < len(self.adapter_names):
            assert self._is_fresh, "fresh values were asked for after others had been loaded"
            self._fresh |= self.read(self._full_names)
        return self._fresh

    def read_fresh(self, names: Iterable[str]) -> Tree:
        """Return the values with which these names are the base's, copying no others."""
        # A model that was just loaded has them; what is trained may be most of its memory.
        return self.read(names) if self._is_fresh else {name: self.fresh[name] for name in names}

    def knows(self, name: str) -> bool:
        """Say whether a tensor of this name can be trained."""
        return name in self._slots

    @property
    def base_state(self) -> Mapping[str, torch.Tensor | SlicedTensor]:
        """The base's parameters and buffers as they are; what is trained itself is fresh."""
        full = [self._slots[name] for name in self._full_names]
        if not full:
            return self._base_state
        own = {id(slot.parameter) for slot in full}
        with self.without_adapters():
            return {
                name: tensor.clone()
                if isinstance(tensor, torch.Tensor) and id(tensor) in own
                else tensor
                for name, tensor in self._base_state.items()
            }

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @contextmanager
    def extended(self, slots: Mapping[str, Slot]) -> Iterator[None]:
        """Know ``slots`` too while the context lasts, such as the tensors of a client's grafts."""
        assert not self._slots.keys() & slots.keys()
        self._slots.update(slots)
        try:
            yield
        finally:
            for name in slots:
                del self._slots[name]

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Be the base while the context lasts."""
        fresh = {name: self.fresh[name] for name in self._full_names}
        kept = self.read(self._full_names)
        self.load(fresh)
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            self.load(kept)
            self.set_trainable(())

    def parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the live tensors with these names; a slice carries its parameter's gradient."""
        return {name: self._slots[name].view(self._slots[name].parameter) for name in names}

    def whole_parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Return the parameters that tensors with these names are, or are parts of, once each."""
        slots = [self._slots[name] for name in names]
        return list({id(slot.parameter): slot.parameter for slot in slots}.values())

    def parts(self, whole: Mapping[int, torch.Tensor], names: Iterable[str]) -> Tree:
        """Return what is named of tensors shaped as the parameters are, as views of them.

        Args:
            whole: A tensor for each parameter, by its id.
            names: What to return.
        """
        slots = {name: self._slots[name] for name in names}
        return {name: slot.view(whole[id(slot.parameter)]) for name, slot in slots.items()}

    def gradients(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the gradients of the tensors with these names; zeros where there was none."""
        gradients = {}
        for name in names:
            slot = self._slots[name]
            gradient = slot.parameter.grad
            if gradient is None:
                gradients[name] = torch.zeros_like(slot.view(slot.parameter))
            else:
                gradients[name] = slot.view(gradient).detach()
        return gradients

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return copies of the tensors with these names, on the CPU."""
        return {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in self.parameters(names).items()
        }

    def load(self, tree: Tree) -> None:
        """Copy the values of ``tree`` into the model.

        Raises:
            ValueError: A name is not of this model, or has another shape.
        """
        self._is_fresh = self._is_fresh and not tree
        for name, value in tree.items():
            if name not in self._slots:
                raise ValueError(
                    f"{name} must be a trainable tensor of this model, got an unknown name; "
                    "check model.lora_targets and strategy.name"
                )
            slot = self._slots[name]
            with torch.no_grad():
                target = slot.view(slot.parameter)
                if target.shape != value.shape:
                    raise ValueError(
                        f"{name} must have shape {tuple(target.shape)}, got {tuple(value.shape)}; "
                        "check model.lora_rank and strategy.graft_rank"
                    )
                target.copy_(value)

    @torch.inference_mode()
    def generate(
        self,
        ids_BS: torch.Tensor,
        mask_BS: torch.Tensor,
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
    ) -> torch.Tensor:
        """Return the ids that follow prompts padded on the left, by greedy decoding: (B, new).

        A row ends at the first of ``end_ids``, which is part of it.
        """
        if can_decode(self.model):
            return decode_greedily(
                self.model,
                ids_BS,
                mask_BS,
                max_new_tokens=max_new_tokens,
                end_ids=end_ids,
                pad_id=self.tokenizer.pad_token_id,
            )
        is_apart = is_pair(self.model)
        if is_apart:
            ids_BS, mask_BS = to_right(ids_BS, mask_BS)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=list(end_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            decoder_start_token_id=start_id(self.model) if is_apart else None,
        )
        generate: Any = self.model.generate
        output_BS: torch.Tensor = generate(
            input_ids=ids_BS, attention_mask=mask_BS, generation_config=config
        )
        return output_BS[:, 1 if is_apart else ids_BS.shape[1] :]

    def leaves(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Return a parameter of its own for every name, sharing the model's memory.

        Experts of one layer are slices of one parameter; an optimizer over leaves moves one of
        them, decay and momentum included, without touching the others.
        """
        return {
            name: nn.Parameter(value.detach()) for name, value in self.parameters(names).items()
        }

    def hand_gradients(self, leaves: Mapping[str, nn.Parameter], names: Collection[str]) -> None:
        """Give the leaves of ``names`` the model's gradients, and all others none."""
        for name, leaf in leaves.items():
            slot = self._slots[name]
            gradient = slot.parameter.grad if name in names else None
            leaf.grad = None if gradient is None else slot.view(gradient)

    def drop_gradients(self) -> None:
        """Free all gradients."""
        for slot in self._slots.values():
            slot.parameter.grad = None

    def set_trainable(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Let exactly the parameters behind ``names`` have gradients, and return them once each."""
        self.model.requires_grad_(False)
        chosen = self.whole_parameters(names)
        for parameter in chosen:
            parameter.requires_grad_(True)
            parameter.grad = None
            self._is_fresh = False
        return chosen


def trainable_names(view: MoEView, settings: LoraSettings) -> tuple[str, ...]:
    """Return the names of what an adapted model would train; adapters stay in ``view``'s model.

    Args:
        view: Of a model that is used for nothing else, which may be on the meta device.
        settings: Where adapters go, and what is trained itself.
    """
    modules, parameters = find_targets(view, settings.targets)
    full = [name for name, _ in full_slots(view, settings.full, adapted=(*modules, *parameters))]
    if modules or parameters:
        inject_lora(
            view.model,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            modules=modules,
            parameters=parameters or None,
        )
    return (*(name for name, _ in lora_slots(view.model, view)), *full)


@torch.no_grad()
def _ends_with_head(view: MoEView) -> bool:
    """Say whether a model's logits are its head's output as it is, not scaled or capped.

    Asked of one token. A model whose experts are not in memory cannot be asked, and then not.
    """
    model: Any = view.model
    head = model.get_output_embeddings()
    is_elsewhere = any(tensor.device.type == "meta" for tensor in view.state().values())
    if not isinstance(head, nn.Linear) or is_elsewhere:
        return False
    seen: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    try:
        logits = model(**one_token(model, head.weight.device), use_cache=False).logits
    finally:
        handle.remove()
    return len(seen) == 1 and torch.equal(seen[0], logits)
