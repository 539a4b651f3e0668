"""Where in memory a model's tensors begin: the same for the same model, whatever file it is from.

A product's last bit may depend on that: libraries choose another kernel, or begin a loop elsewhere,
where a tensor does not begin at a multiple of the widest register, and which do so differs between
CPUs. Tensors that torch makes begin at such a multiple. Those of a checkpoint that is mapped into
memory begin wherever the file has them, and another copy of the same model, in other shards, has
them elsewhere.
"""

from __future__ import annotations

import torch
from torch import nn

ALIGNMENT_BYTES = 64
"""Of what torch allocates on a CPU."""


def align(model: nn.Module) -> None:
    """Let every parameter and buffer on a CPU begin at a multiple of ``ALIGNMENT_BYTES``.

    What does not is copied, one tensor at a time; tensors that are tied stay tied.
    """
    moved: dict[tuple[object, ...], torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT_BYTES:
            place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
            if place not in moved:
                moved[place] = tensor.detach().clone()
            tensor.data = moved[place]
