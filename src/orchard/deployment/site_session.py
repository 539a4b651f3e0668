"""One run as a site takes part in it: a warm model, its client, what a task of it looks like."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchard.client.client import Client
from orchard.communication.audit import AuditLog
from orchard.communication.channel import Channel
from orchard.communication.door import RoundTask
from orchard.communication.refusals import Code
from orchard.deployment.accepted import shapes_of
from orchard.deployment.consent import SiteSettings
from orchard.deployment.data_files import FileState, states_of
from orchard.deployment.failures import as_refusal
from orchard.deployment.fits import check_fits
from orchard.deployment.measures import check_rows
from orchard.deployment.terms import Terms
from orchard.engine.simulator import Schedule
from orchard.experiment.data_record import DATA_FILE, check_data, record_data
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import Experiment, Seat, prepare_experiment
from orchard.experiment.run_folder import folder_name
from orchard.experiment.running import build_clients, build_schedule, load_model, slow_ways_of
from orchard.experiment.settings import learning_rate, lora_settings
from orchard.experiment.wiring import build_channel
from orchard.models.stored.loading import threads
from orchard.models.trainable.adapters import AdaptedModel
from orchard.recipe.options import Recipe
from orchard.strategies.strategy import Strategy, start_server
from orchard.trees import Tree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """One run, as this site takes part in it.

    Attributes:
        recipe: With the site's own files, model and data section.
        client: The site's, on the warm model.
        strategy: Of the recipe.
        channel: Of the recipe.
        schedule: Of the recipe.
        shared: What a task holds, without its values.
        files: What it was built from.
        recipe_digest: Of the recipe as it was asked.
    """

    recipe: Recipe
    client: Client
    strategy: Strategy
    channel: Channel
    schedule: Schedule
    shared: Tree
    files: tuple[FileState, ...]
    recipe_digest: str


class Sessions:
    """Builds the session of a run once, and keeps the last one and the last model."""

    def __init__(self, settings: SiteSettings, audit: AuditLog) -> None:
        """Build nothing yet."""
        self._settings, self._audit = settings, audit
        self._models: dict[str, AdaptedModel] = {}
        self._last: dict[str, Session] = {}

    def of(self, request: RoundTask, recipe: Recipe, terms: Terms, *, asked: str) -> Session:
        """Return the session of a request's run.

        Args:
            request: Of a round.
            recipe: As this site does it.
            terms: How it reads its rows.
            asked: Digest of the recipe as it was asked.

        Raises:
            Refusal: Its data cannot be read so, has changed, or does not fit.
        """
        key = json.dumps([request.run, asked, request.index, request.num_clients])
        session = self._last.get(key)
        # A worker lives long: what it has in memory must still be what is on the disk.
        if session is None or session.files != states_of(self._settings.consent):
            session = self._build(recipe, terms, request, asked)
            self._last = {key: session}
        return session

    def last(self) -> Session | None:
        """Return the session that was asked for last, if any."""
        return next(iter(self._last.values()), None)

    def _build(self, recipe: Recipe, terms: Terms, request: RoundTask, asked: str) -> Session:
        name, consent = self._settings.name, self._settings.consent
        files = states_of(consent)  # before they are read: a change meanwhile is seen later
        try:
            experiment = prepare_experiment(
                recipe, seat=Seat(name, request.index, request.num_clients, terms.split_seed)
            )
            strategy = build_strategy(recipe, num_clients=request.num_clients)
        except (ValueError, OSError) as error:
            raise as_refusal(Code.DATA, error) from error
        folder = pin_data(self._settings.store, request.run, experiment)
        check_rows(experiment, consent, client_id=name)
        check_fits(consent, experiment, client_id=name)
        model = self._model(recipe, experiment.tokenizer)
        for sentence in slow_ways_of(experiment, model):
            log.warning("%s", sentence)
        (client,) = build_clients(experiment, model, folder)
        return Session(
            recipe,
            client,
            strategy,
            build_channel(recipe),
            build_schedule(recipe, rate=learning_rate(recipe, model.view)),
            shapes_of(start_server(strategy, model.fresh).shared),
            files,
            asked,
        )

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


def pin_data(store: Path, run: str, experiment: Experiment) -> Path:
    """Return the folder of a run, with which a site takes part with the same data alone.

    Raises:
        Refusal: It began the run with other data.
    """
    folder = store / "personal" / folder_name(run)
    if (folder / DATA_FILE).exists():
        try:
            check_data(folder, experiment.digest, what=f"this site's part in run {run}")
        except ValueError as error:
            raise as_refusal(Code.DATA_CHANGED, error) from error
    else:
        record_data(folder, experiment.digest)
    return folder
