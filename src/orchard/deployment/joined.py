"""What a site remembers of a run that it joined, so that no later request says otherwise.

A file for each run in the site's store: which recipe it joined with, under which consent, on which
base, and which global trees it was asked about in which round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from orchard.communication.refusals import Code
from orchard.deployment.consent import Consent, Refusal
from orchard.experiment.run_folder import folder_name
from orchard.results import write_json

_DAY_SECONDS = 24 * 3600.0
_RUNS, _PREFIX = "runs", 16  # digits of a digest that tell two trees of one run apart


@dataclass(frozen=True)
class Joined:
    """One run, as a site joined it.

    Attributes:
        run: Its name.
        recipe_digest: Of the coordinator's recipe, without how long it waits.
        consent_digest: Of the owner's consent when it was last asked.
        base_digest: Of the base; empty until it was loaded.
        seat: Its place among the sites and how many they are; empty until a round was asked for.
        time: When it joined.
        trees: Round to the digests of the global trees that came for it.
    """

    run: str
    recipe_digest: str
    consent_digest: str
    base_digest: str = ""
    seat: tuple[int, ...] = ()
    time: float = field(default_factory=time.time)
    trees: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Runs:
    """The runs that a site knows.

    Attributes:
        store: The site's folder.
    """

    store: Path

    def join(self, run: str, recipe_digest: str, consent: Consent) -> None:
        """Remember a run; one that is known must be as it was.

        Raises:
            Refusal: It has another recipe, or there were too many new ones today.
        """
        if self.knows(run):
            self._check_recipe(self._read(run), recipe_digest)
            return
        since = time.time() - _DAY_SECONDS
        folder = self.store / _RUNS
        recent = [path for path in folder.glob("*.json") if path.stat().st_mtime > since]
        new = [path for path in recent if json.loads(path.read_text())["time"] > since]
        if len(new) >= consent.runs_per_day:
            raise Refusal(
                Code.RUNS,
                f"new runs must be at most {consent.runs_per_day} in 24 hours, got another; its "
                "owner raises it with --runs-per-day",
                option="--runs-per-day",
            )
        self._write(Joined(run, recipe_digest, consent.digest()))

    def knows(self, run: str) -> bool:
        """Say whether the site has joined a run."""
        return self._path(run).exists()

    def of_round(self, run: str, recipe_digest: str) -> Joined:
        """Return a run whose round is asked for.

        Raises:
            Refusal: The site has not joined it, or joined it with another recipe.
        """
        if not self.knows(run):
            raise Refusal(
                Code.NOT_JOINED,
                f"run must be one that this store has joined, got {run}; what the site kept of it "
                "may be lost, so the coordinator has to ask again",
            )
        joined = self._read(run)
        self._check_recipe(joined, recipe_digest)
        return joined

    def note_consent(self, joined: Joined, consent: Consent) -> bool:
        """Say whether the owner's consent is another than when this was last asked."""
        now = consent.digest()
        if now != joined.consent_digest:
            self._write(replace(self._read(joined.run), consent_digest=now))
        return now != joined.consent_digest

    def check_seat(self, run: str, index: int, num_clients: int) -> None:
        """Check that the site's place is the one that the run began with.

        What a site may train depends on it, so that each other place would tell of the data anew.

        Raises:
            Refusal: It is another.
        """
        joined, seat = self._read(run), (index, num_clients)
        if joined.seat and joined.seat != seat:
            raise Refusal(
                Code.SITE,
                f"the site must be number {joined.seat[0]} of {joined.seat[1]} as when run {run} "
                f"began, got {index} of {num_clients}",
            )
        if not joined.seat:
            self._write(replace(joined, seat=seat))

    def check_base(self, run: str, base_digest: str) -> None:
        """Check that the base is the one that the run began with.

        Raises:
            Refusal: It is another.
        """
        joined = self._read(run)
        if joined.base_digest == base_digest:
            return
        if joined.base_digest:
            raise Refusal(
                Code.BASE_CHANGED,
                f"base model must be {joined.base_digest[:12]} as when run {run} began, got "
                f"{base_digest[:12]}; bring back the model, or take part in another run",
                option="--model",
            )
        self._write(replace(joined, base_digest=base_digest))

    def note_tree(self, run: str, round_number: int, digest: str, *, most: int) -> int:
        """Remember which global tree came for a round, and return how many different ones did.

        Raises:
            Refusal: There were as many others as the owner allows.
        """
        joined, key, short = self._read(run), str(round_number), digest[:_PREFIX]
        known = joined.trees.get(key, ())
        if short in known:
            return len(known)
        if len(known) >= most:
            raise Refusal(
                Code.REPEATED,
                f"round {round_number} must come with at most {most} different global trees, got "
                "another; each one that is measured or trained tells something of the data",
                option="--trees-per-round",
            )
        self._write(replace(joined, trees={**joined.trees, key: (*known, short)}))
        return len(known) + 1

    @staticmethod
    def _check_recipe(joined: Joined, recipe_digest: str) -> None:
        if joined.recipe_digest != recipe_digest:
            raise Refusal(
                Code.RECIPE_CHANGED,
                f"recipe must be the one that run {joined.run} was joined with, "
                f"{joined.recipe_digest[:12]}, got {recipe_digest[:12]}",
            )

    def _path(self, run: str) -> Path:
        return self.store / _RUNS / f"{folder_name(run)}.json"

    def _read(self, run: str) -> Joined:
        values: dict[str, Any] = json.loads(self._path(run).read_text())
        trees = {key: tuple(known) for key, known in values["trees"].items()}
        return Joined(**{**values, "trees": trees, "seat": tuple(values.get("seat", ()))})

    def _write(self, joined: Joined) -> None:
        write_json(self._path(joined.run), asdict(joined))
