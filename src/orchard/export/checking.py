"""Whether a base on disk is the one that a model was trained on, asked without loading it whole."""

from __future__ import annotations

import hashlib

import torch

from orchard.models.stored.conversion import StoredModel, find_path
from orchard.models.stored.loading import DTYPES
from orchard.models.stored.submodel import load_skeleton


def streamed_digest(path: str, stored: StoredModel, *, dtype: str) -> str:
    """Return what ``Base.digest`` of a base would be, with one expert in memory at a time."""
    model = load_skeleton(path, dtype=dtype).model
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {
        f"{find_path(layer)}.{attribute}": experts
        for layer in stored.whole.layers
        for attribute, experts in stored.parameters(layer).items()
    }
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if name not in own:
            _add(sha, tensor)
            continue
        for expert in range(tensor.shape[0]):
            _add(sha, own[name].read(stored.checkpoint, expert).to(DTYPES[dtype]))
    return sha.hexdigest()


def _add(sha: hashlib._Hash, tensor: torch.Tensor) -> None:
    sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def check_base(found: str, wanted: str, *, path: str) -> None:
    """Check that a base is the right one.

    Raises:
        ValueError: It is another.
    """
    if found != wanted:
        raise ValueError(
            f"base at {path} must be {wanted[:12]}, on which this was trained, got {found[:12]}; "
            "bring back that base"
        )
