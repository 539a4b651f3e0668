"""What one trained model is made of: no base is loaded, and no private data is read."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from orchard.client.store import ClientStore
from orchard.experiment.data_record import DATA_FILE
from orchard.experiment.run_folder import RECIPE_FILE, folder_name
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from orchard.server.checkpoint import newest_round
from orchard.trees import Tree

_MEMORY = ("control.", "subset.")  # what clients keep without training it
_CHOICE = ".graft.expert"


@dataclass(frozen=True)
class ModelState:
    """What one trained model is made of.

    Attributes:
        recipe: Of the run.
        client_id: Whose model it is; None = the global one.
        round_number: The completed round of the shared values.
        base_digest: Of the base that it was trained on.
        shared: Global values, names as on the wire.
        own: What the client trained and kept.
        graft_experts: Layer name to the experts that its grafts started as; empty = no grafts.
        held_experts: Of a carved client, what its submodel holds of each layer; None = all.
    """

    recipe: Recipe
    client_id: str | None
    round_number: int
    base_digest: str
    shared: Tree
    own: Tree
    graft_experts: Mapping[str, tuple[int, ...]]
    held_experts: Mapping[str, tuple[int, ...]] | None


def find_models(folder: Path) -> Sequence[str]:
    """Return the ids of clients that have a personal model, in the order of the data.

    Raises:
        ValueError: ``folder`` holds no run.
    """
    _recipe(folder)
    path = folder / DATA_FILE
    ids = json.loads(path.read_text())["clients"] if path.exists() else {}
    stores = folder / "clients"
    return [name for name in ids if any((stores / folder_name(name)).glob("round_*.safetensors"))]


def read_state(
    folder: Path, *, client: str | None = None, round_number: int | None = None
) -> ModelState:
    """Read the global model of a run, or a client's.

    Args:
        folder: The run's.
        client: Whose model; None = the global one.
        round_number: After which completed round; None = the last.

    Raises:
        ValueError: No finished round, an unknown client, or a damaged file, which is named.
    """
    recipe = _recipe(folder)
    number = newest_round(folder / "checkpoints") if round_number is None else round_number
    checkpoint = folder / "checkpoints" / f"round_{number:06d}"
    if number == 0 or not (checkpoint / "state.json").exists():
        raise ValueError(
            f"{folder} must hold a finished round{f' {number}' if number else ''}, got none; "
            "let the run complete a round, or go on with it by orchard resume"
        )
    saved: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    path = checkpoint / "shared.safetensors"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != saved["trees"]["shared"]:
        raise ValueError(f"{path} must be as it was written, got another checksum; bring it back")
    try:
        shared = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} must hold tensors, got a file that does not decode") from error
    base_digest = str(saved["about"]["base_digest"])
    own: Tree = {}
    experts: dict[str, tuple[int, ...]] = {}
    if client is not None:
        _check_client(folder, client)
        store = ClientStore(folder / "clients" / folder_name(client), base_digest)
        kept = store.load(before_round=number + 1)
        tensors = kept.tensors if kept else {}
        own = {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith(_MEMORY) and not name.endswith(_CHOICE)
        }
        experts = {
            name.removesuffix(_CHOICE): tuple(int(index) for index in tensor.reshape(-1))
            for name, tensor in tensors.items()
            if name.endswith(_CHOICE)
        }
    if client is not None and recipe.selection.mode == "carve" and recipe.client.budget:
        raise ValueError(
            f"{client} must have trained the whole model, got a run whose clients carve; "
            "its submodel is not written down"
        )
    # A server's control variates are no part of the model.
    values = {name: t for name, t in shared.items() if not name.startswith(_MEMORY)}
    return ModelState(recipe, client, number, base_digest, values, own, experts, None)


def _recipe(folder: Path) -> Recipe:
    if not (folder / RECIPE_FILE).exists():
        raise ValueError(f"RUN must be a run's folder, got {folder} without {RECIPE_FILE}")
    return read_recipe(folder / RECIPE_FILE).recipe


def _check_client(folder: Path, client: str) -> None:
    known = find_models(folder)
    if client not in known:
        nearest = difflib.get_close_matches(client, known, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]}?" if nearest else "no client has a personal model"
        raise ValueError(f"client must have a personal model in {folder}, got {client}; {hint}")
