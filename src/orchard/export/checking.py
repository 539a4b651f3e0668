"""Whether a base on disk is the one that a model was trained on, asked without loading it whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeAlias

import torch

from orchard.models.stored.conversion import StoredModel, find_path
from orchard.models.stored.loading import DTYPES
from orchard.models.stored.submodel import load_skeleton
from orchard.models.view.held import HeldExperts
from orchard.personal.opening import base_of
from orchard.recipe.options import Recipe

ReadSlice: TypeAlias = Callable[[str, str, int], torch.Tensor]
"""From a MoE layer's name, a parameter of its experts and an expert to that slice of it."""


def open_checked(recipe: Recipe, stored: StoredModel, wanted: str) -> ReadSlice | None:
    """Check that a recipe's base is the right one, with one expert in memory at a time.

    A base whose frozen experts are kept in few bits is opened so, since it computes with these.

    Args:
        recipe: Of the run.
        stored: Where its base has each expert.
        wanted: The digest of the base that was trained on.

    Returns:
        What reads experts as the run has them, where that is not what the checkpoint has.

    Raises:
        ValueError: It is another.
    """
    path = recipe.model.path
    if recipe.model.frozen_precision == "bf16":
        check_base(streamed_digest(path, stored, dtype=recipe.model.dtype), wanted, path=path)
        return None
    base = base_of(recipe, device="cpu")
    check_base(base.digest, wanted, path=path)
    held = {
        layer.name: layer.storage.held
        for layer in base.view.layers
        if isinstance(layer.storage, HeldExperts)
    }
    return lambda layer, name, expert: held[layer][name].read(expert)


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
