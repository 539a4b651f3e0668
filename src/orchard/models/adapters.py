"""LoRA on a shared base, seen as a tree of names.

PEFT puts the adapters in; this module names them, so that what trains, what is sent and what is
kept can be said in names: ``layers.3.self_attn.q_proj.lora_A``, or per expert
``layers.3.experts.17.down_proj.lora_B``. Adapters are float32 over a base of any dtype, and one
base serves many clients: switching clients copies adapter values and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig

from orchard.models.moe import MoEView
from orchard.trees import Tree

ROUTER, EXPERTS = "router", "experts"


@dataclass(frozen=True)
class LoraSettings:
    """Where and how large the adapters are.

    Attributes:
        rank: R, from 1.
        alpha: The adapter's output is scaled by alpha / rank.
        dropout: On the adapter's input, in [0, 1); 0 with ``router`` or ``experts``.
        targets: Names of linear layers outside the MoE blocks, such as ``q_proj``, and the words
            ``router`` and ``experts``.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """A named tensor that lives in a parameter, whole or as a slice of it.

    Attributes:
        parameter: The parameter.
        view: Returns the named part of it, sharing memory and gradient.
    """

    parameter: nn.Parameter
    view: Callable[[nn.Parameter], torch.Tensor]


def whole(parameter: nn.Parameter) -> torch.Tensor:
    """Return the parameter itself."""
    return parameter


def canonical(path: str) -> str:
    """Turn a parameter path of a model into a name: no ``model.`` and no adapter wrapping."""
    path = re.sub(r"\.default(\.weight)?$", "", path)
    return path.replace("base_layer.", "").removeprefix("model.")


def find_targets(view: MoEView, targets: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the module paths and the parameter paths that ``targets`` mean in a model.

    Raises:
        ValueError: A target fits nothing.
    """
    blocks = tuple(f"{layer.path}." for layer in view.layers)
    linear = {
        path
        for path, module in view.model.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(blocks) and "." in path
    }
    modules: list[str] = []
    parameters: list[str] = []
    for target in targets:
        if target in (ROUTER, EXPERTS):
            found_modules, found_parameters = _routed_targets(view, target)
            modules += found_modules
            parameters += found_parameters
            continue
        matches = sorted(path for path in linear if path.rpartition(".")[2] == target)
        if not matches:
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise ValueError(
                f"model.lora_targets must name linear layers of the model, got {target}; "
                f"this model has {', '.join(known)}, {ROUTER} and {EXPERTS}"
            )
        modules += matches
    return modules, parameters


def _routed_targets(view: MoEView, target: str) -> tuple[list[str], list[str]]:
    wanted = view.router_parameters() if target == ROUTER else view.routed_parameters()
    modules, parameters = [], []
    for path in sorted(wanted):
        owner, _, name = path.rpartition(".")
        module = view.model.get_submodule(owner)
        # A linear layer with a forward of its own, such as a router, is adapted by its weight.
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            modules.append(owner)
        elif name.endswith("bias"):
            continue
        else:
            parameters.append(path)
    return sorted(set(modules)), parameters


def inject_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    modules: list[str],
    parameters: list[str] | None = None,
) -> None:
    """Put fresh float32 LoRA adapters on named parts of ``module``, in place.

    A fresh adapter changes nothing: A is random (from torch's own generator), B is zero.

    Args:
        module: What to adapt.
        rank: R.
        alpha: The adapter's output is scaled by alpha / rank.
        dropout: On the adapter's input.
        modules: Paths of linear layers.
        parameters: Paths of parameters that belong to no linear layer.
    """
    # PEFT rewrites targets by model type, dense MLPs into routed experts; in a holder of no type
    # it takes paths as they are.
    holder = nn.Module()
    holder.add_module("whole", module)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[f"whole.{path}" for path in modules],
        target_parameters=[f"whole.{path}" for path in parameters] if parameters else None,
    )
    inject_adapter_in_model(config, holder)
    for path, parameter in module.named_parameters():
        if is_adapter(path):
            parameter.data = parameter.data.float()


def is_adapter(path: str) -> bool:
    """Say whether a parameter's path is that of a LoRA factor."""
    return re.search(r"\.lora_[AB]\.", path) is not None


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
        modules, parameters = find_targets(view, settings.targets)
        if parameters and settings.dropout > 0:
            raise ValueError(
                f"model.lora_dropout must be 0 with {ROUTER} or {EXPERTS} in model.lora_targets, "
                f"got {settings.dropout}; PEFT has no dropout on such parameters"
            )
        self.view = view
        self.model = view.model
        self.tokenizer = tokenizer
        self.base_digest = base_digest
        self.model.requires_grad_(False)
        self.base_state = {
            **dict(self.model.named_parameters()),
            **dict(self.model.named_buffers()),
        }
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
        self._slots = dict(_find_slots(self.model, view))
        self.adapter_names = tuple(self._slots)
        self.set_trainable(())
        self.fresh = self.read(self.adapter_names)

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
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            self.set_trainable(())

    def parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the live tensors with these names; a slice carries its parameter's gradient."""
        return {name: self._slots[name].view(self._slots[name].parameter) for name in names}

    def gradients(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the gradients of the tensors with these names; zeros where there was none."""
        gradients = {}
        for name in names:
            slot = self._slots[name]
            gradient = slot.parameter.grad
            if gradient is None:
                gradients[name] = torch.zeros_like(slot.view(slot.parameter))
            else:
                gradients[name] = slot.view(nn.Parameter(gradient, requires_grad=False)).detach()
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
        self, ids_BS: torch.Tensor, mask_BS: torch.Tensor, *, max_new_tokens: int
    ) -> torch.Tensor:
        """Return the ids that follow prompts padded on the left, by greedy decoding: (B, new)."""
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        generate: Any = self.model.generate
        output_BS: torch.Tensor = generate(
            input_ids=ids_BS, attention_mask=mask_BS, generation_config=config
        )
        return output_BS[:, ids_BS.shape[1] :]

    def companions(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the other names that live in the parameters of ``names``: slices of the same."""
        named = set(names)
        parameters = {id(self._slots[name].parameter) for name in named}
        return tuple(
            name
            for name, slot in self._slots.items()
            if name not in named and id(slot.parameter) in parameters
        )

    def set_trainable(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Let exactly the parameters behind ``names`` have gradients, and return them once each."""
        self.model.requires_grad_(False)
        chosen = {
            id(slot.parameter): slot.parameter for slot in map(self._slots.__getitem__, names)
        }
        for parameter in chosen.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        return list(chosen.values())


def _find_slots(model: nn.Module, view: MoEView) -> Iterator[tuple[str, Slot]]:
    """Yield every adapter tensor with its name, in the order of the model's modules."""
    wrapped = {id(parameter) for slot in _wrapped_slots(model, view) for parameter in slot[2]}
    for path, parameter in model.named_parameters():
        if is_adapter(path) and id(parameter) not in wrapped:
            yield _name_inside_block(canonical(path), view), Slot(parameter, whole)
    for name, slot, _ in _wrapped_slots(model, view):
        yield name, slot


def _name_inside_block(name: str, view: MoEView) -> str:
    """Name adapters of listed experts and linear routers as those of fused ones are named."""
    for layer in view.layers:
        block = f"{canonical(layer.path)}."
        if name.startswith(block):
            inside = name.removeprefix(block)
            kind, _, factor = inside.rpartition(".")
            return f"{layer.name}.{inside if kind.startswith('experts.') else f'router.{factor}'}"
    return name


def _wrapped_slots(
    model: nn.Module, view: MoEView
) -> Iterator[tuple[str, Slot, tuple[nn.Parameter, ...]]]:
    """Yield the adapters of fused experts, one expert at a time, and of routers.

    PEFT stores them for all experts at once: A is (E * R, in) with the expert slowest, B is
    (out, R * E) with the expert fastest.
    """
    layers = {canonical(layer.path): layer for layer in view.layers}
    for path, module in model.named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        lora_A, lora_B = module.lora_A["default"].weight, module.lora_B["default"].weight
        block = max(
            (prefix for prefix in layers if canonical(path).startswith(prefix)), key=len, default=""
        )
        name, num_experts = layers[block].name, int(module.num_experts)
        if num_experts == 1:
            yield f"{name}.router.lora_A", Slot(lora_A, whole), (lora_A,)
            yield f"{name}.router.lora_B", Slot(lora_B, whole), (lora_B,)
            continue
        for expert in range(num_experts):
            prefix = f"{name}.experts.{expert}.{module.parameter_name}"
            yield f"{prefix}.lora_A", Slot(lora_A, _slice_of_A(expert, num_experts)), (lora_A,)
            yield f"{prefix}.lora_B", Slot(lora_B, _slice_of_B(expert, num_experts)), (lora_B,)


def _slice_of_A(expert: int, num_experts: int) -> Callable[[nn.Parameter], torch.Tensor]:
    return lambda weight: weight.view(num_experts, -1, weight.shape[-1])[expert]


def _slice_of_B(expert: int, num_experts: int) -> Callable[[nn.Parameter], torch.Tensor]:
    return lambda weight: weight.view(weight.shape[0], -1, num_experts)[:, :, expert]
