"""What of a model is to be trained: which modules and parameters a recipe's words mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from orchard.models.view.moe import MoEView

ROUTER, EXPERTS, ALL, ATTENTION = "router", "experts", "all", "attention"
_PLAIN = ("q_proj", "k_proj", "v_proj")
# What families call a projection to queries, keys, values or several of these: q_b_proj,
# kv_a_proj_with_mqa, Wqkv, query_key_value, q. Projections of outputs and gates begin otherwise.
_PROJECTION = re.compile(r"W?(q|k|v|kv|qkv|query|key|value|query_key_value)(_\w+)?")
_ATTENTION_CLASS = re.compile(r"attention|mla|projection", re.IGNORECASE)


@dataclass(frozen=True)
class LoraSettings:
    """What can be trained, and where and how large the adapters are.

    Attributes:
        rank: R, from 1.
        alpha: The adapter's output is scaled by alpha / rank.
        dropout: On the adapter's input, in [0, 1); 0 with ``router`` or ``experts``.
        targets: What gets an adapter: names of linear layers outside the MoE blocks, such as
            ``q_proj``, and the words ``attention`` (``find_attention``), ``router`` and
            ``experts``.
        full: What is trained itself: the same, or the word ``all``.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    full: tuple[str, ...] = ()


def find_targets(view: MoEView, targets: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the module paths and the parameter paths that ``targets`` mean in a model.

    Raises:
        ValueError: A target fits nothing.
    """
    return _find_targets(view, targets, option="model.lora_targets")


def _find_targets(
    view: MoEView, targets: Iterable[str], *, option: str
) -> tuple[list[str], list[str]]:
    linear = _linear_outside(view)
    modules: list[str] = []
    parameters: list[str] = []
    for target in targets:
        if target in (ROUTER, EXPERTS):
            found_modules, found_parameters = _routed_targets(view, target)
            modules += found_modules
            parameters += found_parameters
            continue
        if target == ATTENTION:
            modules += find_attention(view)
            continue
        matches = sorted(path for path in linear if path.rpartition(".")[2] == target)
        if not matches:
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise ValueError(
                f"{option} must name linear layers of the model, got {target}; "
                f"this model has {', '.join(known)}, {ROUTER} and {EXPERTS}"
            )
        modules += matches
    return list(dict.fromkeys(modules)), parameters


def find_attention(view: MoEView) -> list[str]:
    """Return the paths of the projections to queries, keys and values beside the MoE layers.

    These are ``q_proj``, ``k_proj`` and ``v_proj`` of every layer where a model has all three.
    Elsewhere they are whatever its attention modules have for them: ``q_a_proj``, ``q_b_proj``,
    ``kv_a_proj_with_mqa`` and ``kv_b_proj`` under latent attention, or one fused projection. Towers
    without MoE layers, such as that of a vision model, have no part in it.

    Raises:
        ValueError: The model has none.
    """
    stacks = tuple({_stack(layer.path) for layer in view.layers})
    linear = sorted(path for path in _linear_outside(view) if path.startswith(stacks))
    plain = {name: [path for path in linear if path.rpartition(".")[2] == name] for name in _PLAIN}
    if all(plain.values()):
        return [path for paths in plain.values() for path in paths]
    found = [path for path in linear if _is_projection(view.model, path)]
    if not found:
        raise ValueError(
            f"model.lora_targets must name linear layers of the model, got {ATTENTION}, and "
            f"{type(view.model).__name__} has no projections to queries, keys and values; "
            "name its layers"
        )
    return found


def _stack(path: str) -> str:
    """Return the path of the list of layers that a block stands in, with its dot."""
    match = re.search(r"(?:^|\.)\d+(?=\.|$)", path)
    return "" if match is None else path[: match.start() + (path[match.start()] == ".")]


def _is_projection(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    owner = type(model.get_submodule(parent)).__name__
    return bool(_PROJECTION.fullmatch(name) and _ATTENTION_CLASS.search(owner))


def _linear_outside(view: MoEView) -> set[str]:
    """Return the paths of linear layers that are neither in an MoE block nor the output layer."""
    blocks = tuple(f"{path}." for layer in view.layers for path in layer.own_paths)
    return {
        path
        for path, module in view.model.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(blocks) and "." in path
    }


def _routed_targets(view: MoEView, target: str) -> tuple[list[str], list[str]]:
    wanted = view.scoring_parameters() if target == ROUTER else view.routed_parameters()
    modules, parameters = [], []
    for path in sorted(wanted):
        owner, _, name = path.rpartition(".")
        module = view.model.get_submodule(owner)
        # A linear layer with a forward of its own, such as a router, is adapted by its weight.
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            modules.append(owner)
        elif view.model.get_parameter(path).ndim == 1 or name.endswith("bias"):
            continue
        else:
            parameters.append(path)
    return sorted(set(modules)), parameters


def check_targets(view: MoEView, settings: LoraSettings) -> None:
    """Check that targets fit a model, which may be on the meta device.

    Raises:
        ValueError: A target fits nothing, two claim the same, or PEFT has no dropout there.
    """
    modules, parameters = find_targets(view, settings.targets)
    if parameters and settings.dropout > 0:
        raise ValueError(
            f"model.lora_dropout must be 0 with {ROUTER} or {EXPERTS} in model.lora_targets, "
            f"got {settings.dropout}; PEFT has no dropout on such parameters"
        )
    twice = set(settings.targets) & set(settings.full)
    published = getattr(getattr(view.model, "config", None), "published_model_type", None)
    if ALL in settings.full and published:
        raise ValueError(
            f"model.full_targets must not be {ALL} for a {published} model, got {ALL}; it has "
            f"tensors that stand for its own layout, so name {EXPERTS}, {ROUTER} or linear layers"
        )
    if ALL not in settings.full:
        full, _ = _find_targets(view, settings.full, option="model.full_targets")
        twice |= {path.rpartition(".")[2] for path in {*modules} & {*full}}
    if twice:
        raise ValueError(
            f"model.full_targets must not name what model.lora_targets names, got {min(twice)} in "
            "both; train it in one way"
        )


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
