"""Finding the MoE layers of a model by their interface, in its modules or from its config."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any, cast

import torch
from torch import nn

from orchard.models.view.adopting import adopt
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.routers import check_top_k, find_router, probe_top_k
from orchard.models.view.stacked import stacked
from orchard.models.view.storage import FusedExperts, ListedExperts, is_fused, is_listed, is_unknown

# What reads images or sound: no token of a text comes there.
_IS_FOR_OTHERS = re.compile(r"(^|\.)(vision|visual|image|audio)(_\w+)?\.")


def view_moe(model: nn.Module) -> MoEView:
    """Find the MoE layers of a model that tokens of a text go through.

    PEFT adapters, injected or wrapped around the model, change neither names nor values. Experts
    behind a call of their own are put behind the common one (``adopting``).

    Raises:
        ValueError: There is no MoE layer, or experts are stored in a way this package cannot
            name.
    """
    found = []
    for path, experts in model.named_modules():
        # PEFT puts its wrapper in the place of a module and keeps that as base_layer.
        if path.endswith(".base_layer") or _IS_FOR_OTHERS.search(path):
            continue
        while isinstance(getattr(experts, "base_layer", None), nn.Module):
            experts = cast(nn.Module, experts.base_layer)
        parent, _, own = path.rpartition(".")
        block = model.get_submodule(parent)
        if is_unknown(experts) and "shared" not in own and not adopt(block, experts):
            raise ValueError(
                f"experts at {path} must be fused behind transformers' experts interface or "
                f"listed as modules, got {type(experts).__name__}; choose another checkpoint"
            )
        storage = FusedExperts(experts) if is_fused(experts) else None
        if storage is None and not is_listed(experts):
            continue
        layer = _build_layer(path=parent, block=block, own=own, experts=experts, storage=storage)
        if layer is not None:
            found.append(layer)
    if not found:
        raise ValueError(
            f"model must have at least one MoE layer, got a dense {type(model).__name__}; "
            "choose a Mixture-of-Experts checkpoint"
        )
    return MoEView(model, _name_layers(found))


def view_config(config: Any, *, trust_remote_code: bool = False) -> MoEView:
    """View the model that a transformers config describes, without its weights.

    Builds the model without memory (on the ``meta`` device), so weights need not be there yet.

    Args:
        config: A ``PreTrainedConfig`` of a causal or encoder-decoder language model.
        trust_remote_code: Whether modeling code that came with the checkpoint may run.

    Raises:
        ValueError: As ``view_moe``.
    """
    from transformers import AutoModelForCausalLM

    auto = AutoModelForCausalLM if trust_remote_code else find_auto_class(config)
    with torch.device("meta"):
        # A copy: building a model fills in fields of its config.
        model = auto.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    return view_moe(model)


def find_auto_class(config: Any) -> Any:
    """Return the class of transformers that makes a language model of a config.

    A config of text and something else, such as images, whose text part has no class of its own,
    describes the whole model; fed with text alone, that is its text part.

    Raises:
        ValueError: There is none.
    """
    import transformers

    if config.is_encoder_decoder:
        if type(config) not in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise _no_language_model(config)
        return stacked(transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)])
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    # Images and text among them.
    if type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return transformers.AutoModelForMultimodalLM
    raise _no_language_model(config)


def _no_language_model(config: Any) -> ValueError:
    return ValueError(
        f"model.path must lead to a model of language, got model_type {config.model_type}, for "
        "which transformers has none; choose another checkpoint"
    )


def _build_layer(
    *, path: str, block: nn.Module, own: str, experts: nn.Module, storage: FusedExperts | None
) -> MoELayer | None:
    siblings = {name: child for name, child in block.named_children() if name != own}
    num_experts = storage.num_experts if storage else len(tuple(experts.children()))
    router = find_router(siblings, num_experts)
    if router is None:
        if storage is None:
            # A list of MLPs that nothing routes to is not an MoE layer.
            return None
        raise ValueError(
            f"{path} must have a router with one row for each of its {num_experts} experts, "
            f"got {', '.join(siblings) or 'no other module'}; choose another checkpoint"
        )
    shared = [
        child
        for name, child in siblings.items()
        # The sigmoid that weighs a shared expert (Qwen2-MoE) is a linear layer.
        if "shared" in name and child is not router and not isinstance(child, nn.Linear)
    ]
    top_k = check_top_k(router, block, num_experts)
    return MoELayer(
        name=path,
        path=path,
        block=block,
        router=router,
        experts=experts,
        shared_experts=tuple(shared),
        top_k=top_k or probe_top_k(router, block, num_experts),
        storage=storage or ListedExperts(experts),
        expert_ids=tuple(range(num_experts)),
    )


def _name_layers(layers: list[MoELayer]) -> tuple[MoELayer, ...]:
    """Shorten paths to names; blocks that would share a name keep their path."""
    short = [_shorten(layer.path) for layer in layers]
    count = Counter(short)
    return tuple(
        MoELayer(**{**vars(layer), "name": name if count[name] == 1 else layer.path})
        for layer, name in zip(layers, short, strict=True)
    )


def _shorten(path: str) -> str:
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    if match is None:
        return path
    stack = [part for part in path[: match.start()].split(".") if part in ("encoder", "decoder")]
    return ".".join([*stack, "layers", match[1]])
