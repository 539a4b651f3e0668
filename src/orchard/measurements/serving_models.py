"""Models of random adapters and grafts, as many as a measurement of serving asks for."""

from __future__ import annotations

import torch

from orchard.experts.grafting import GraftSettings
from orchard.models.trainable.slots import canonical
from orchard.models.trainable.targets import LoraSettings, find_targets
from orchard.models.view.moe import MoEView
from orchard.serving.values import RowValues, read_values

_RANK = 16


def random_model(view: MoEView, seed: int) -> RowValues:
    """Return a model with adapters of attention and a graft in every MoE layer.

    Args:
        view: The base.
        seed: Of its values, and of the experts that its grafts started as.
    """
    generator = torch.Generator().manual_seed(seed)
    tree: dict[str, torch.Tensor] = {}

    def adapt(name: str, weight: torch.Tensor) -> None:
        out, width = weight.shape
        tree[f"{name}.lora_A"] = 0.05 * torch.randn(_RANK, width, generator=generator)
        tree[f"{name}.lora_B"] = 0.05 * torch.randn(out, _RANK, generator=generator)

    lora = LoraSettings(_RANK, 2.0 * _RANK, 0.0, ("q_proj", "v_proj"))
    for path in find_targets(view, lora.targets)[0]:
        adapt(canonical(path), view.model.get_parameter(f"{path}.weight"))
    for layer in view.layers:
        for local, tensor in layer.expert_tensors(0).items():
            if tensor.ndim == 2:
                adapt(f"{layer.name}.graft.{local}", tensor)
        gate_D = 0.05 * torch.randn(layer.width, generator=generator)
        tree[f"{layer.name}.graft.gate.weight"] = gate_D
    return read_values(
        view,
        tree,
        lora=lora,
        graft=GraftSettings(rank=_RANK, alpha=2.0 * _RANK),
        graft_experts={layer.name: (seed % layer.num_experts,) for layer in view.layers},
        body="",
    )
