"""What one trained model is made of: no base is loaded, and no private data is read.

A run of one machine has all of it in its folder. A site has its part in its store: what it trained
and kept, and the global values that it was sent last.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from orchard.client.kept_messages import HELD
from orchard.client.store import ClientStore
from orchard.communication.messages import LocalSettings, Task
from orchard.experiment.data_record import DATA_FILE
from orchard.experiment.methods import METHODS, check_strategy
from orchard.experiment.run_folder import RECIPE_FILE, folder_name
from orchard.experiment.starting import read_start
from orchard.experiment.wiring import build_channel
from orchard.models.stored.placing import NO_CACHE
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from orchard.results import MetricsLog
from orchard.server.checkpoint import newest_round
from orchard.trees import Tree

_MEMORY = ("control.", "subset.")  # what clients and servers keep without training it
_SUBSET, _CHOICE = "subset.", ".graft.expert"


@dataclass(frozen=True)
class ModelState:
    """What one trained model is made of.

    Attributes:
        recipe: Of the run.
        client_id: Whose model it is; None = the global one.
        round_number: The completed round of the shared values.
        base_digest: Of the base that it was trained on.
        shared: Global values as clients receive them, names as on the wire.
        own: What the client trained and kept: private adapters, ``layers.3.graft.*``.
        graft_experts: Layer name to the experts that its grafts started as; empty = no grafts.
        held_experts: Of a client that carves, what its submodel holds of each layer; None = the
            whole model.
    """

    recipe: Recipe
    client_id: str | None
    round_number: int
    base_digest: str
    shared: Tree
    own: Tree
    graft_experts: Mapping[str, tuple[int, ...]]
    held_experts: Mapping[str, tuple[int, ...]] | None

    def on_base(self, path: str) -> ModelState:
        """Return the same model with its base in another place."""
        own = replace(self.recipe.model, path=path)
        return replace(self, recipe=replace(self.recipe, model=own))

    def as_base(self) -> ModelState:
        """Return the base that this was trained on, as a model of which nothing was trained."""
        return replace(self, client_id=None, shared={}, own={}, graft_experts={}, held_experts=None)


def read_recipe_of(folder: Path) -> Recipe:
    """Return the recipe of a run, or of the one that a site took part in last.

    Raises:
        FileNotFoundError: ``folder`` holds no run.
        ValueError: The recipe does not parse.
    """
    return _read_recipe(_run_of(folder))


def find_clients(folder: Path) -> Sequence[str]:
    """Return the ids of all clients of a run, in the order of the data; of a store, the site's.

    Raises:
        ValueError: ``folder`` holds no run, or a file in it is damaged.
    """
    run = _run_of(folder)
    path = run / DATA_FILE
    if not path.is_file():
        return ()
    try:
        return tuple(json.loads(path.read_bytes())["clients"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} must be as the run wrote it, got what does not parse; bring it back from a "
            "copy"
        ) from error


def client_store(folder: Path, client: str, base_digest: str) -> ClientStore:
    """Return where a client of a run, or of a site's store, keeps its part of the model."""
    return ClientStore(_client_folder(_run_of(folder), client), base_digest)


def find_models(folder: Path) -> Sequence[str]:
    """Return the ids of clients that have a personal model, in the order of the data.

    Raises:
        ValueError: ``folder`` holds no run, or a file in it is damaged.
    """
    clients, run = find_clients(folder), _run_of(folder)
    keeps = _needs_kept(_read_recipe(run))
    return [
        client
        for client in clients
        if not keeps or any(_client_folder(run, client).glob("round_[0-9]*.safetensors"))
    ]


def read_state(
    folder: Path, *, client: str | None = None, round_number: int | None = None
) -> ModelState:
    """Read the global model of a run, or a client's.

    Args:
        folder: The run's, or a site's store.
        client: Whose model; None = the global one.
        round_number: After which completed round; None = the last.

    Raises:
        FileNotFoundError: ``folder`` holds no run.
        ValueError: No finished round, an unknown client, a damaged file, or one that is not kept
            any more; each is named.
    """
    run = _run_of(folder)
    recipe = _read_recipe(run)
    if client is not None:
        _check_client(folder, client)
    if run != folder:
        return _of_site(folder, run, recipe, client, round_number)
    number, base_digest, shared = _read_checkpoint(folder, round_number)
    # As clients receive them: what leaves the server is rounded to the channel's dtype.
    channel = build_channel(recipe)
    task = Task(number + 1, shared, LocalSettings(0, 0, 0.0))
    shared = channel.unpack_task(channel.broadcast(task, {}).whole).shared
    state = ModelState(recipe, client, number, base_digest, _without_memory(shared), {}, {}, None)
    if client is None:
        return state
    return _with_kept(state, run, trained=_last_trained(folder, client, number))


def _of_site(
    folder: Path, run: Path, recipe: Recipe, client: str | None, round_number: int | None
) -> ModelState:
    """Read what a site kept of the run that it took part in last."""
    base_digest = _joined_base(folder, run)
    (site,) = find_clients(folder)
    held = ClientStore(_client_folder(run, site), base_digest).beside(HELD)
    before = 2**31 if round_number is None else round_number + 2
    kept = held.load(before_round=before)
    newest = max(held.rounds(), default=0) - 1
    number = newest if round_number is None else round_number
    if kept is None or number < 1 or number + 1 not in held.rounds():
        raise ValueError(
            f"{folder} must hold a finished round{f' {number}' if round_number else ''}, got "
            f"{_named_rounds([r - 1 for r in held.rounds() if r > 1])}; a site has one when the "
            "coordinator sends it what came of its first"
        )
    state = ModelState(
        recipe, client, number, base_digest, _without_memory(kept.tensors), {}, {}, None
    )
    return state if client is None else _with_kept(state, run, trained=None)


def _with_kept(state: ModelState, run: Path, *, trained: int | None) -> ModelState:
    """Return a state with what its client kept.

    Args:
        state: With the shared values.
        run: The folder of the run, or the part of a store that is about it.
        trained: The last round up to that of ``state`` in which the client trained; 0 = none, None
            = unknown.
    """
    client, number, recipe = state.client_id, state.round_number, state.recipe
    assert client is not None
    store = ClientStore(_client_folder(run, client), state.base_digest)
    rounds = store.rounds()
    kept = store.load(before_round=number + 1)
    found = max((own for own in rounds if own <= number), default=0)
    if trained is not None and rounds and found < trained:
        raise ValueError(
            f"what {client} kept in round {trained} must still be there, got "
            f"{_named_rounds(rounds)}; choose a later --round, or keep more by server.keep_rounds"
        )
    if kept is None:
        if not _needs_kept(recipe):
            return state
        why = f"got {_named_rounds(rounds)}" if rounds else "and has not been trained in any"
        raise ValueError(
            f"{client} must have a personal model in round {number}, {why}; choose another client "
            "or --round"
        )
    tensors = kept.tensors
    own = {n: t for n, t in tensors.items() if not n.startswith(_MEMORY) and _CHOICE not in n}
    experts = {
        name.removesuffix(_CHOICE): tuple(int(index) for index in tensor.reshape(-1))
        for name, tensor in tensors.items()
        if name.endswith(_CHOICE)
    }
    held = None
    if _carves(recipe):
        held = {
            name.removeprefix(_SUBSET): tuple(tensor.nonzero().flatten().tolist())
            for name, tensor in tensors.items()
            if name.startswith(_SUBSET)
        }
        if not held:
            raise ValueError(
                f"{client} must have written down which experts it holds, got none in "
                f"{store.folder}; an older version trained it: start the run anew"
            )
    return replace(state, own=own, graft_experts=experts, held_experts=held)


def _run_of(folder: Path) -> Path:
    """Return the folder of a run: itself, or of a store the part of the run that was last.

    Raises:
        FileNotFoundError: There is none.
    """
    if (folder / RECIPE_FILE).is_file():
        return folder
    found = [path.parent for path in (folder / "personal").glob(f"*/{RECIPE_FILE}")]
    if found:
        return max(found, key=lambda path: (path / RECIPE_FILE).stat().st_mtime_ns)
    if (folder / "orchard.json").is_file() or (folder / "graft.json").is_file():
        raise FileNotFoundError(
            f"run must be a folder with a {RECIPE_FILE}, got {folder}, which was exported from "
            "one; name the run, load a whole model with transformers, or make a run of parts by "
            "orchard import"
        )
    raise FileNotFoundError(
        f"run must be a folder with a {RECIPE_FILE}, or the store of a site that took part in one, "
        f"got {folder}; name the folder that orchard run was given as --out"
    )


def _client_folder(run: Path, client: str) -> Path:
    own = folder_name(client)
    return run / "clients" / own if (run / "clients").is_dir() else run / own


def _joined_base(folder: Path, run: Path) -> str:
    path = folder / "runs" / f"{run.name}.json"
    try:
        return str(json.loads(path.read_text())["base_digest"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} must be as the site wrote it, got what does not parse; bring it back from a "
            "copy"
        ) from error


def _read_recipe(run: Path) -> Recipe:
    """Return the recipe of a run, with paths as they were meant where it was started."""
    recipe, start = read_recipe(run / RECIPE_FILE).recipe, read_start(run)
    directory, own = start.directory if start else "", recipe.model
    if not own.path.startswith("orchard:") and (meant := Path(directory, own.path)).is_dir():
        own = replace(own, path=str(meant))
    if own.expert_cache not in ("", NO_CACHE):
        own = replace(own, expert_cache=str(Path(directory, own.expert_cache)))
    return replace(recipe, model=own)


def _read_checkpoint(folder: Path, round_number: int | None) -> tuple[int, str, Tree]:
    """Return number, digest of the base and global values of a completed round."""
    checkpoints = folder / "checkpoints"
    number = newest_round(checkpoints) if round_number is None else round_number
    path = checkpoints / f"round_{number:06d}"
    if number < 1 or not (path / "state.json").is_file():
        kept = [int(own.parent.name[6:]) for own in checkpoints.glob("round_*/state.json")]
        way = (
            "choose one of these, or keep more by server.keep_rounds"
            if kept
            else f"let the run finish one: orchard resume {folder}"
        )
        asked = "" if round_number is None else f" {round_number}"
        raise ValueError(
            f"{folder} must hold a finished round{asked}, got {_named_rounds(kept)}; {way}"
        )
    try:
        saved: dict[str, Any] = json.loads((path / "state.json").read_bytes())
        wanted, base_digest = saved["trees"]["shared"], str(saved["about"]["base_digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path / "state.json", "what does not parse") from error
    file = path / "shared.safetensors"
    if not file.is_file():
        raise _damaged(file, "no file")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != wanted:
        raise _damaged(file, "another checksum")
    try:
        return number, base_digest, load(content)
    except SafetensorError as error:
        raise _damaged(file, "a file that does not decode") from error


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} must be as the run wrote it, got {why}; bring it back from a copy, or choose "
        "another --round"
    )


def _last_trained(folder: Path, client: str, number: int) -> int | None:
    """Return the last round up to ``number`` in which a client trained; 0 = none."""
    lines = MetricsLog(folder / "metrics.jsonl").read()
    if not lines:
        return None
    return max(
        (
            int(line["round"])
            for line in lines
            if line["kind"] == "client"
            and line["client"] == client
            and line["round"] <= number
            and not line.get("client/dropped_out")
        ),
        default=0,
    )


def _check_client(folder: Path, client: str) -> None:
    known = find_clients(folder)
    if client in known:
        return
    if not known:
        raise ValueError(
            f"client must have trained in {folder}, got {client}; what sites keep is on their own "
            "machines: orchard generate --store FOLDER there"
        )
    nearest = difflib.get_close_matches(client, known, n=1, cutoff=0.0)
    raise ValueError(
        f"client must be one of the {len(known)} of this run, got {client}; did you mean "
        f"{nearest[0]}?"
    )


def _needs_kept(recipe: Recipe) -> bool:
    """Say whether clients of a method that ships with the package keep part of their model."""
    methods = check_strategy(recipe.strategy.name)
    keeping = {"flex", "local", "ditto", "orchard"}
    # Fine-tuning keeps something in the last rounds alone.
    return bool(keeping & set(methods) or recipe.strategy.kept) or _carves(recipe)


def _carves(recipe: Recipe) -> bool:
    budgets = [
        name
        for name in check_strategy(recipe.strategy.name)
        if name in METHODS and METHODS[name].part == "budget" and name != "fedavg_dropout"
    ]
    return recipe.selection.mode == "carve" and bool(budgets)


def _without_memory(shared: Tree) -> Tree:
    return {name: tensor for name, tensor in shared.items() if not name.startswith(_MEMORY)}


def _named_rounds(rounds: Sequence[int]) -> str:
    return f"round {', '.join(map(str, sorted(rounds)))}" if rounds else "none"
