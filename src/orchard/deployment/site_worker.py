"""What a site does with a coordinator's requests, in a process that stays warm.

The base model is loaded once and serves every request. Personal tensors are on disk when an
update is returned, so that a worker which is killed at any moment is started again and answers the
same request with the same bytes.

Run as ``python -m orchard.deployment.site_worker SETTINGS`` by ``orchard site``.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchard.client.client import Client
from orchard.client.kept_messages import read_task, write_update
from orchard.communication.audit import AUDIT_FILE, AuditLog, content_digest
from orchard.communication.channel import Channel, MissingCopyError
from orchard.deployment.consent import Refusal, SiteSettings
from orchard.deployment.site_recipe import own_recipe
from orchard.engine.processes import only_one
from orchard.engine.worker import serve, watches_parent
from orchard.experiment.data_record import DATA_FILE, check_data, record_data
from orchard.experiment.methods import build_strategy, own_names
from orchard.experiment.own_methods import import_from, own_digests
from orchard.experiment.preparation import Experiment, Seat, prepare_experiment
from orchard.experiment.run_folder import folder_name
from orchard.experiment.running import build_clients, load_model, slow_ways_of
from orchard.experiment.settings import lora_settings
from orchard.experiment.wiring import build_channel
from orchard.models.stored.loading import threads
from orchard.models.trainable.adapters import AdaptedModel
from orchard.recipe.options import Recipe
from orchard.recipe.reading import parse_recipe
from orchard.strategies.strategy import Strategy, evaluate_client, train_client

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Session:
    """One run, as this site takes part in it."""

    recipe: Recipe
    client: Client
    strategy: Strategy
    channel: Channel


class SiteWorker:
    """Answers a coordinator's requests with one warm model."""

    def __init__(self, settings: SiteSettings) -> None:
        """Load nothing yet: the first request says which model."""
        self._settings = settings
        self._audit = AuditLog(settings.store / AUDIT_FILE)
        self._models: dict[str, AdaptedModel] = {}
        self._sessions: dict[str, _Session] = {}

    def handle(self, header: Mapping[str, Any], body: bytes) -> tuple[Mapping[str, Any], bytes]:
        """Answer one request.

        Args:
            header: ``kind`` and what belongs to it.
            body: A task, or nothing.

        Returns:
            A header with ``refused`` where the site does not do it; the update, or nothing.

        Raises:
            Exception: Whatever training raises, with a note of round, client and stage.
        """
        kind = header["kind"]
        if kind in ("who", "alive"):
            return {"site": self._settings.name}, b""
        try:
            if kind == "join":
                return self._join(header), b""
            if kind == "round":
                return self._round(header, body)
            raise Refusal(f"kind must be who, alive, join or round, got {kind}")
        except Refusal as refusal:
            self._audit.write("refused", run=header.get("run"), kind=kind, reason=str(refusal))
            return {"refused": str(refusal), "site": self._settings.name}, b""

    def _join(self, header: Mapping[str, Any]) -> Mapping[str, Any]:
        """Check that this site can do what a run asks, before any weight is loaded."""
        recipe = self._own_recipe(header)
        try:
            # Which seat it gets is known when all have joined; the first one must fit.
            experiment = prepare_experiment(
                _without_cohort(recipe), seat=Seat(self._settings.name, 0, 1)
            )
        except (ValueError, OSError) as error:
            raise Refusal(f"the recipe must fit this site: {error}") from error
        self._pin_data(str(header["run"]), experiment)
        num_examples = len(experiment.train[self._settings.name])
        self._audit.write(
            "joined", run=header["run"], strategy=recipe.strategy.name, num_examples=num_examples
        )
        return {"site": self._settings.name, "num_examples": num_examples}

    def _own_recipe(self, header: Mapping[str, Any]) -> Recipe:
        try:
            recipe = own_recipe(self._settings.consent, parse_recipe(str(header["recipe"])))
            theirs = dict(header.get("methods", {}))
            for name, digest in own_digests(own_names(recipe.strategy.name)).items():
                if theirs.get(name) != digest:
                    raise Refusal(
                        f"{name} must have the coordinator's source at this site, got SHA-256 "
                        f"{digest} for {theirs.get(name)}; install the same version"
                    )
        except Refusal:
            raise
        except (ValueError, OSError) as error:
            raise Refusal(str(error)) from error
        return recipe

    def _round(self, header: Mapping[str, Any], body: bytes) -> tuple[Mapping[str, Any], bytes]:
        """Evaluate what came, train from it, or both."""
        name, number = self._settings.name, int(header["round"])
        if header["site"] != name:
            raise Refusal(f"site must be {name}, got {header['site']}")
        self._audit.write(
            "asked",
            run=header["run"],
            round=number,
            trains=bool(header["train"]),
            evaluates=list(header["evaluate"]),
            bytes=len(body),
            sha256=content_digest(body),
        )
        session = self._session(header)
        reply: dict[str, Any] = {"site": name, "base_digest": session.client.model.base_digest}
        with threads(session.recipe.model.num_threads):
            try:
                task = read_task(body, session.channel, session.client.store)
            except MissingCopyError:
                return {"site": name, "lacks_values": True}, b""
            if task.round_number != number:
                raise Refusal(f"round must be {number} as announced, got {task.round_number}")
            if header["evaluate"]:
                started = time.monotonic()
                try:
                    reply["evaluation"] = evaluate_client(
                        session.strategy, session.client, task, set(header["evaluate"])
                    )
                except Exception as error:
                    error.add_note(f"after round {number - 1}, client {name}, evaluation")
                    raise
                reply["evaluation_seconds"] = time.monotonic() - started
            message = b""
            if header["train"]:
                try:
                    update = train_client(session.strategy, session.client, task)
                    message = write_update(update, session.channel, session.client.store)
                except Exception as error:
                    error.add_note(f"in round {number}, client {name}, local training")
                    raise
        self._audit.write(
            "sent",
            run=header["run"],
            round=number,
            names=sorted(update.delta) if header["train"] else [],
            metrics=sorted(
                {*reply.get("evaluation", {}), *(update.metrics if header["train"] else {})}
            ),
            bytes=len(message),
            sha256=content_digest(message),
        )
        return reply, message

    def _session(self, header: Mapping[str, Any]) -> _Session:
        """Return what is needed for a run, built once."""
        index, num_clients = int(header["index"]), int(header["num_clients"])
        key = json.dumps([header["run"], header["recipe"], index, num_clients])
        if key in self._sessions:
            return self._sessions[key]
        if not 0 <= index < num_clients:
            raise Refusal(f"index must be in 0..{num_clients - 1}, got {index}")
        recipe = self._own_recipe(header)
        try:
            experiment = prepare_experiment(
                recipe, seat=Seat(self._settings.name, index, num_clients)
            )
            strategy = build_strategy(recipe, num_clients=num_clients)
        except (ValueError, OSError) as error:
            raise Refusal(f"the recipe must fit this site: {error}") from error
        folder = self._pin_data(str(header["run"]), experiment)
        model = self._model(recipe, experiment.tokenizer)
        for sentence in slow_ways_of(experiment, model):
            log.warning("%s", sentence)
        (client,) = build_clients(experiment, model, folder)
        self._sessions = {key: _Session(recipe, client, strategy, build_channel(recipe))}
        return self._sessions[key]

    def _pin_data(self, run: str, experiment: Experiment) -> Path:
        """Return the folder of a run, with which this site takes part with the same data alone."""
        folder = self._settings.store / "personal" / folder_name(run)
        if (folder / DATA_FILE).exists():
            try:
                check_data(folder, experiment.digest, what=f"this site's part in run {run}")
            except ValueError as error:
                raise Refusal(str(error)) from error
        else:
            record_data(folder, experiment.digest)
        return folder

    def _model(self, recipe: Recipe, tokenizer: Any) -> AdaptedModel:
        """Return the warm model, loaded where it is not the one that the recipe needs."""
        key = json.dumps([asdict(recipe.model), asdict(lora_settings(recipe)), recipe.seed])
        if key not in self._models:
            self._models.clear()
            started = time.monotonic()
            with threads(recipe.model.num_threads):
                model = load_model(recipe, tokenizer)
            self._models[key] = model
            self._audit.write(
                "loaded",
                model=recipe.model.path,
                base_digest=model.base_digest,
                seconds=round(time.monotonic() - started, 3),
            )
        return self._models[key]


def _without_cohort(recipe: Recipe) -> Recipe:
    return replace(
        recipe,
        server=replace(recipe.server, clients_per_round=0),
        client=replace(recipe.client, budget="", memory_bytes="")
        if "," in recipe.client.budget + recipe.client.memory_bytes
        else recipe.client,
    )


def main() -> None:
    """Serve until the process that started this one ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = SiteSettings.from_json(Path(sys.argv[1]).read_text())
    import_from(Path.cwd())  # as where the site was started; its owner says what may be imported
    with ExitStack() as stack:
        stack.enter_context(
            only_one(settings.store / "worker.lock", seconds=30.0, what="worker of a site")
        )
        from orchard.process_memory import return_memory_at_once

        return_memory_at_once()
        log.info("worker of %s answers at %s", settings.name, settings.socket)
        serve(settings.socket, SiteWorker(settings).handle, until=watches_parent())


if __name__ == "__main__":
    main()
