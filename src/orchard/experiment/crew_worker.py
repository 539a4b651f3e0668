"""A worker of a run: it holds a warm model, and clients have their turns on it.

Run as ``python -m orchard.experiment.crew_worker SETTINGS SOCKET`` by ``orchard run --workers``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from orchard.client.client import Client
from orchard.communication.channel import Channel
from orchard.communication.messages import LocalSettings, Task, encode_task
from orchard.engine.team import raised_there, read_task_file
from orchard.engine.turns import take_test, take_turn
from orchard.engine.worker import Header, serve, watches_parent
from orchard.experiment.data_record import check_data
from orchard.experiment.methods import build_strategy
from orchard.experiment.own_methods import import_from
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.protecting import build_protection
from orchard.experiment.run_folder import RECIPE_FILE
from orchard.experiment.running import CLIENTS, build_clients, load_model, sizes_of, slow_ways_of
from orchard.experiment.settings import learning_rate
from orchard.experiment.wiring import build_channel
from orchard.experiment.workers import WorkerSettings
from orchard.models.stored.loading import threads
from orchard.models.trainable.adapters import AdaptedModel
from orchard.process_memory import loading_to_stay, peak_memory_bytes, shared_memory_bytes
from orchard.recipe.reading import read_recipe
from orchard.strategies.strategy import Strategy
from orchard.trees import digest


@dataclass(frozen=True)
class _Held:
    """What a worker holds from its first request on."""

    strategy: Strategy
    clients: Mapping[str, Client]
    channel: Channel
    model: AdaptedModel
    rate: float
    notes: tuple[str, ...]


class CrewWorker:
    """Answers what a ``Team`` asks."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Hold nothing yet: the first request loads data and model."""
        self._settings = settings
        self._held: _Held | None = None

    def handle(self, header: Header, body: bytes) -> tuple[Header, bytes]:
        """Answer one request; what it raises is an answer too."""
        with threads(self._settings.num_threads):
            try:
                reply, content = self._answer(header)
            except Exception as error:
                logging.exception("a turn failed")
                reply, content = {"raised": raised_there(error)}, b""
        memory = {"peak_bytes": peak_memory_bytes(), "now_bytes": shared_memory_bytes()}
        return {**reply, **memory}, content

    def _answer(self, header: Header) -> tuple[Header, bytes]:
        if self._held is None:
            with loading_to_stay():
                self._held = self._load()
        held, kind = self._held, header["kind"]
        if kind == "begin":
            facts = {
                "base_digest": held.model.base_digest,
                "learning_rate": held.rate,
                "notes": held.notes,
            }
            return facts, encode_task(Task(1, held.model.fresh, LocalSettings(0, 0, 0.0)))
        if kind == "end":
            return {
                "base_is_unchanged": digest(held.model.base_state) == held.model.base_digest
            }, b""
        client = held.clients[str(header["client"])]
        room = Path(self._settings.room)
        if kind == "train":
            has_values = bool(header["has_values"])
            update, downlink_bytes = take_turn(
                held.strategy,
                client,
                held.channel,
                since=read_task_file(room, is_since=True) if has_values else None,
                whole=lambda: read_task_file(room),
                round_number=int(header["round"]),
            )
            return {"downlink_bytes": downlink_bytes}, update
        task = held.channel.unpack_task(read_task_file(room))
        known = json.loads(str(header["known"]))
        measured = take_test(held.strategy, client, task, list(header["models"]), known=known)
        return {"measured": json.dumps(measured)}, b""

    def _load(self) -> _Held:
        """Load data and model as the run's own process prepared them.

        Raises:
            ValueError: The data is another.
        """
        folder = Path(self._settings.folder)
        recipe = read_recipe(folder / RECIPE_FILE).recipe
        experiment = prepare_experiment(recipe)
        check_data(folder, experiment.digest, what=f"the run in {folder}")
        method = build_strategy(recipe, num_clients=len(experiment.train))
        model = load_model(recipe, experiment.tokenizer)
        clients = build_clients(experiment, model, folder / CLIENTS)
        return _Held(
            replace(method, protection=build_protection(recipe, sizes_of(experiment))),
            {client.client_id: client for client in clients},
            build_channel(recipe),
            model,
            learning_rate(recipe, model.view),
            tuple(slow_ways_of(experiment, model)),
        )


def make_worker(settings: Path) -> CrewWorker:
    """Return a worker that finds files and modules as the run's own process does."""
    told = WorkerSettings.read(settings)
    os.chdir(told.directory)
    import_from(Path.cwd())
    return CrewWorker(told)


def main() -> None:
    """Serve until the process that started this one ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings, socket = Path(sys.argv[1]), Path(sys.argv[2])
    serve(socket, make_worker(settings).handle, until=watches_parent())


if __name__ == "__main__":
    main()
