"""What was trained, without its base: an adapter for PEFT, or a client's grafts alone."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from orchard.experiment.settings import graft_settings, lora_settings
from orchard.export.card import portable_toml
from orchard.export.writing import new_folder
from orchard.models.kernels.pairs import is_pair
from orchard.models.stored.conversion import find_path, match_checkpoint
from orchard.models.stored.deepseek_moe import is_rewritten
from orchard.models.stored.exported_parts import ADAPTER_FORMAT, ADAPTER_PREFIX, GRAFT_FORMAT
from orchard.models.trainable.slots import canonical
from orchard.models.trainable.targets import find_targets
from orchard.models.view.moe import MoEView
from orchard.models.view.storage import FusedExperts
from orchard.personal.state import ModelState
from orchard.results import write_json

# Last words of paths that PEFT takes for experts' or routers' in some families.
_REWRITTEN = frozenset(("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"))


def export_graft(state: ModelState, out: Path) -> int:
    """Write a client's grafts and gates alone, with what they need to be put back.

    Returns:
        The bytes of the folder.

    Raises:
        ValueError: The model has no grafts.
        FileExistsError: ``out`` is there.
    """
    if not state.graft_experts:
        whose = state.client_id or "the global model"
        raise ValueError(
            f"--graft must be asked of a client with grafts, got {whose} of "
            f"{state.recipe.strategy.name}; export the whole model, or --adapter"
        )
    tensors = {name: t.contiguous() for name, t in state.own.items() if ".graft." in name}
    settings = graft_settings(state.recipe)
    with new_folder(out) as folder:
        save_file(tensors, folder / "graft.safetensors", metadata={"format": "pt"})
        write_json(
            folder / "graft.json",
            {
                "format": GRAFT_FORMAT,
                "base_digest": state.base_digest,
                "client": state.client_id,
                "round": state.round_number,
                "experts": {name: list(own) for name, own in state.graft_experts.items()},
                "settings": vars(settings),
                "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
                "recipe": portable_toml(state.recipe),
            },
        )
    return sum(file.stat().st_size for file in out.iterdir())


def export_adapter(state: ModelState, out: Path) -> int:
    """Write what was trained of the base as an adapter that stock PEFT loads.

    Returns:
        The bytes of the folder.

    Raises:
        ValueError: Something was trained itself, which no adapter can say; or the model is carved;
            or there is nothing.
        FileExistsError: ``out`` is there.
    """
    lora = lora_settings(state.recipe)
    if state.held_experts is not None:
        raise ValueError(
            f"--adapter must be asked of a model with all experts, got {state.client_id}, which "
            "holds some; export the whole model"
        )
    values = {**state.shared, **{n: t for n, t in state.own.items() if ".graft." not in n}}
    if lora.full:
        raise ValueError(
            f"--adapter must be asked of a model whose adapters alone were trained, got "
            f"model.full_targets={','.join(lora.full)}; export the whole model"
        )
    view = match_checkpoint(state.recipe.model.path).whole
    modules, parameters = find_targets(view, lora.targets)
    inside = [path for path in (*modules, *parameters) if ".mlp." in path]
    if is_rewritten(view.model.config) and inside:
        raise ValueError(
            f"--adapter must be asked of a model of which attention alone was trained, where the "
            f"base is a DeepSeek-MoE, got {inside[0]}, which its published code names otherwise; "
            "export the whole model"
        )
    is_apart = is_pair(view.model)
    stacked = [path for path in parameters if ".experts." in path]
    if is_apart and stacked:
        raise ValueError(
            "--adapter must be asked of a model of which attention and routers alone were trained, "
            f"where the base lists its experts, got {stacked[0]}; export the whole model"
        )
    tensors = adapter_tensors(view, values, modules, parameters)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "peft_version": version("peft"),  # whose layout it is; before 0.19 there was another
        "task_type": "SEQ_2_SEQ_LM" if is_apart else "CAUSAL_LM",
        "base_model_name_or_path": Path(state.recipe.model.path).name
        if Path(state.recipe.model.path).is_absolute()
        else state.recipe.model.path,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(modules),
        "target_parameters": parameters or None,
    }
    with new_folder(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)
        write_json(
            folder / "orchard.json",
            {
                "format": ADAPTER_FORMAT,
                "base_digest": state.base_digest,
                "client": state.client_id,
                "round": state.round_number,
                "recipe": portable_toml(state.recipe),
            },
        )
    return sum(file.stat().st_size for file in out.iterdir())


def _target_modules(modules: list[str]) -> list[str] | str | None:
    """Return whole paths of linear layers as PEFT takes them to be these layers and no others.

    PEFT turns names of dense MLPs into those of routed experts, by the type of a model, but for one
    pattern of all; up to 0.19 it reads such a pattern as a set of letters.
    """
    if any(path.rpartition(".")[2] in _REWRITTEN for path in modules):
        return "|".join(path.replace(".", r"\.") for path in modules)
    return modules or None


def adapter_tensors(
    view: MoEView, values: dict[str, Tensor], modules: list[str], parameters: list[str]
) -> dict[str, Tensor]:
    """Return adapters under PEFT's names and in its layout.

    Of an experts' parameter PEFT keeps A as (E * R, in) with the expert slowest and B as
    (out, R * E) with the expert fastest. Two adapted parameters of one module are two wrappers
    around it, the second inside the first's ``base_layer``.

    Raises:
        ValueError: A value has no place there.
    """
    rest = dict(values)
    found: dict[str, Tensor] = {}
    layers = {layer.path: layer for layer in view.layers}
    for path in modules:
        layer = next((own for p, own in layers.items() if path.startswith(f"{p}.")), None)
        prefix = canonical(path)
        a = rest.pop(f"{prefix}.lora_A", None) if layer is None else None
        if layer is None and a is not None:
            b = rest.pop(f"{prefix}.lora_B")
        elif layer is not None:
            a = rest.pop(f"{layer.name}.router.lora_A")
            rows = [rest.pop(f"{layer.name}.router.{e}.lora_B") for e in layer.expert_ids]
            b = torch.stack(rows)
        else:
            continue
        found[f"{ADAPTER_PREFIX}{path}.lora_A.weight"] = a.contiguous()
        found[f"{ADAPTER_PREFIX}{path}.lora_B.weight"] = b.contiguous()
    by_module: dict[str, list[str]] = {}
    for path in parameters:
        owner, _, name = path.rpartition(".")
        by_module.setdefault(owner, []).append(name)
    for owner, names in by_module.items():
        layer = max(
            (own for p, own in layers.items() if owner.startswith(f"{p}.")),
            key=lambda own: len(own.path),
        )
        for name, depth in _depths(view, owner, names):
            if owner == find_path(layer) and isinstance(layer.storage, FusedExperts):
                start = [f"{layer.name}.experts.{e}.{name}" for e in layer.expert_ids]
                a = torch.stack([rest.pop(f"{own}.lora_A") for own in start]).flatten(0, 1)
                b = torch.stack([rest.pop(f"{own}.lora_B") for own in start], dim=-1).flatten(1, 2)
            else:
                a = rest.pop(f"{layer.name}.router.lora_A")
                own = [rest.pop(f"{layer.name}.router.{e}.lora_B") for e in layer.expert_ids]
                b = torch.stack(own)
            inside = owner + ".base_layer" * depth
            found[f"{ADAPTER_PREFIX}{inside}.lora_A.weight"] = a.contiguous()
            found[f"{ADAPTER_PREFIX}{inside}.lora_B.weight"] = b.contiguous()
    if rest or not found:
        raise ValueError(
            f"every trained tensor must have a place in an adapter, got "
            f"{'none for ' + next(iter(rest)) if rest else 'nothing trained'}; "
            "export the whole model"
        )
    return found


def _depths(view: MoEView, owner: str, names: list[str]) -> list[tuple[str, int]]:
    """Return how deep PEFT wraps each parameter: it goes by the module's order, last outermost."""
    order = [n for n, _ in view.model.get_submodule(owner).named_parameters(recurse=False)]
    placed = sorted(names, key=order.index)
    return [(name, len(placed) - 1 - index) for index, name in enumerate(placed)]
