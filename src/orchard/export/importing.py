"""Exported parts go back: grafts to a client of a run or to a site, and parts become a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from orchard.client.store import ClientStore, Personal
from orchard.experiment.data_record import DATA_FILE
from orchard.experiment.run_folder import RECIPE_FILE, folder_name, recipe_digest
from orchard.experiment.settings import graft_settings, lora_settings
from orchard.export.checking import open_checked
from orchard.export.writing import new_folder
from orchard.models.stored.conversion import match_checkpoint
from orchard.models.stored.exported_parts import (
    Part,
    check_part,
    read_adapter,
    read_graft_tensors,
    read_part,
)
from orchard.personal.state import client_store, find_clients, read_recipe_of, read_state
from orchard.recipe.options import Recipe
from orchard.recipe.reading import parse_recipe, to_toml
from orchard.recipe.run_options import CommunicationOptions
from orchard.results import write_json
from orchard.server.checkpoint import ServerState, save_checkpoint

_CHOICE = ".graft.expert"


def import_into(folder: Path, run: Path, *, client: str | None) -> str:
    """Put exported grafts into a run on the same base, for one of its clients; or into a store.

    What the client had before stays as the versions of earlier rounds; the version of the run's
    last round is replaced.

    Args:
        folder: That ``orchard export --graft`` wrote.
        run: A run's folder, or a site's store.
        client: Whose grafts they become; None = the site's, or whose they were.

    Returns:
        What was done, as a sentence.

    Raises:
        ValueError: It is no graft, for another base or other settings, or damaged; or the run has
            no such client, or no finished round.
        FileNotFoundError: ``run`` is no run.
    """
    part = read_part(folder)
    if not part.is_graft:
        raise ValueError(
            f"{folder} must hold grafts to go into a run, got an adapter, which is everybody's; "
            "start a run from it by server.start, or make a run of it by --into a new folder"
        )
    is_store = not (run / RECIPE_FILE).is_file()
    owner = client or (_site_of(run) if is_store else part.client)
    assert owner is not None, "a graft is a client's"
    state = read_state(run, client=None)
    check_part(part, state.base_digest, what=str(run))
    before = read_state(run, client=owner)
    if part.about["settings"] != vars(graft_settings(state.recipe)) or not before.graft_experts:
        raise ValueError(
            f"{folder} must have the graft settings of {run}, got {part.about['settings']}; import "
            "it into a run of the same recipe"
        )
    tensors = read_graft_tensors(part)
    store = client_store(run, owner, state.base_digest)
    kept = store.load(before_round=state.round_number + 1)
    assert kept is not None, "read_state found grafts"
    known = {n for n in before.own if ".graft." in n}
    if tensors.keys() != known:
        raise ValueError(
            f"{folder} must hold the grafts that {owner} of {run} has, got "
            f"{min(tensors.keys() ^ known)}; import it into a run of the same recipe"
        )
    own = {**kept.tensors, **tensors, **_choices(part)}
    store.save(Personal(own), round_number=state.round_number)
    return f"{owner} of {run} has the grafts of {folder} after round {state.round_number}"


def make_run(folders: Sequence[Path], out: Path, *, model: str | None, client: str | None) -> str:
    """Make a run's folder of exported parts, to be asked, served, measured and exported.

    Nothing is trained in it, and it cannot be resumed: it holds no data.

    Args:
        folders: An adapter, or grafts, or both; of each at most one.
        out: The folder, which is not there yet.
        model: Where the base is; None = as the parts say.
        client: What the client is called; None = as the grafts say.

    Returns:
        What was done, as a sentence.

    Raises:
        FileNotFoundError: A part or the base is not there.
        FileExistsError: ``out`` is there.
        ValueError: Parts do not go together, are for another base, or are damaged; or grafts stand
            alone, which were trained beside values that all clients share.
    """
    parts = [read_part(folder) for folder in folders]
    grafts = [part for part in parts if part.is_graft]
    adapters = [part for part in parts if not part.is_graft]
    if len(grafts) > 1 or len(adapters) > 1:
        raise ValueError(
            f"PART must be one adapter and grafts of one client, got {len(adapters)} and "
            f"{len(grafts)}; import the grafts of others into the run that is made"
        )
    part = (adapters or grafts)[0]
    check_part(part, parts[-1].base_digest, what=str(parts[-1].folder))
    recipe = _recipe_of((grafts or adapters)[0], model)
    if grafts and not adapters:
        raise ValueError(
            f"PART must be an adapter too where a new run is made, got {folders[0]} alone, which "
            "was trained beside what all clients share; export that by --global --adapter"
        )
    owner = client or part.client or (grafts[0].client if grafts else None)
    with new_folder(out) as folder:
        stored = match_checkpoint(recipe.model.path)
        open_checked(recipe, stored, part.base_digest)
        digest = part.base_digest
        shared = read_adapter(part, stored.whole, lora_settings(recipe))
        about = {"base_digest": digest, "recipe_digest": recipe_digest(recipe)}
        number = (grafts or adapters)[0].round_number
        save_checkpoint(folder / "checkpoints", ServerState(number, shared), about=about)
        (folder / RECIPE_FILE).write_text(to_toml(recipe), encoding="utf-8")
        write_json(folder / DATA_FILE, {"clients": {owner: ""} if grafts else {}})
        if grafts:
            assert owner is not None, "a graft is a client's"
            own = {**read_graft_tensors(grafts[0]), **_choices(grafts[0])}
            store = ClientStore(folder / "clients" / folder_name(owner), digest)
            store.save(Personal(own), round_number=number)
    how = f"--client {shlex.quote(str(owner))}" if grafts else "--global"
    chat = f"orchard chat {shlex.quote(str(out))} {how}"
    return f"{out} is a run of {' and '.join(map(str, folders))}: {chat}"


def _recipe_of(part: Part, model: str | None) -> Recipe:
    """Return the recipe of a part's run, on a base that is here, as it is asked and not trained."""
    recipe = parse_recipe(part.recipe)
    own = replace(recipe.model, path=model or recipe.model.path)
    # Values were rounded when they were sent, and nothing of it is sent again.
    return replace(recipe, model=own, communication=CommunicationOptions(dtype="float32"))


def _choices(part: Part) -> dict[str, Tensor]:
    """Return which experts grafts started as, as a client keeps it."""
    experts: Mapping[str, Sequence[int]] = part.about["experts"]
    return {
        f"{layer}{_CHOICE}": torch.tensor(own if len(own) > 1 else own[0])
        for layer, own in experts.items()
    }


def _site_of(store: Path) -> str:
    read_recipe_of(store)  # or say that it is no run
    (site,) = find_clients(store)
    return site
