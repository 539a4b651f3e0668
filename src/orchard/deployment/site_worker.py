"""What a site does with a coordinator's requests, in a process that stays warm.

The base model is loaded once and serves every request. Personal tensors are on disk when an
update is returned, so that a worker which is killed at any moment is started again and answers the
same request with the same bytes.

Run as ``python -m orchard.deployment.site_worker SETTINGS`` by ``orchard site``.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchard.client.kept_messages import keep_values, read_task, write_update
from orchard.client.store import DamagedError, OtherBaseError, set_aside
from orchard.communication.audit import AUDIT_FILE, MAX_TEXT, AuditLog, content_digest
from orchard.communication.channel import MissingCopyError
from orchard.communication.door import (
    Alive,
    Join,
    MalformedError,
    RoundTask,
    Who,
    read_request,
)
from orchard.communication.messages import Task, Update
from orchard.communication.readable import readable
from orchard.communication.refusals import Code
from orchard.deployment.accepted import check_request, check_task, check_tree
from orchard.deployment.consent import DRY_RUN_FILE, Refusal, SiteSettings
from orchard.deployment.failures import as_refusal, code_of, in_words
from orchard.deployment.fits import check_fits
from orchard.deployment.joined import Runs
from orchard.deployment.looking import LookingError, describe
from orchard.deployment.measures import check_rows, let_out, rounded, rows_read
from orchard.deployment.pace import Pace
from orchard.deployment.privacy_ledger import Ledger, check_owner
from orchard.deployment.site_recipe import (
    check_methods,
    check_sources,
    differences,
    own_recipe,
    without_cohort,
)
from orchard.deployment.site_session import Session, Sessions, pin_data
from orchard.deployment.site_sums import SiteSums, Waiting
from orchard.deployment.terms import AGREED_FILE, Agreement, Terms
from orchard.engine.processes import only_one
from orchard.engine.worker import serve, watches_parent
from orchard.experiment.own_methods import import_from
from orchard.experiment.preparation import Seat, data_notes, prepare_experiment
from orchard.experiment.run_folder import RECIPE_FILE, folder_name, recipe_digest
from orchard.models.stored.loading import threads
from orchard.recipe.options import Recipe
from orchard.recipe.reading import parse_recipe, to_toml
from orchard.results import write_atomically
from orchard.server.admission import Admission
from orchard.strategies.strategy import evaluate_client, train_client
from orchard.trees import digest

log = logging.getLogger(__name__)


class SiteWorker:
    """Answers a coordinator's requests with one warm model.

    What leaves it is an update, numbers that the owner lets out, and codes: no message of an error,
    no value of the data, no path.
    """

    def __init__(self, settings: SiteSettings) -> None:
        """Load nothing yet: the first request says which model."""
        self._settings = settings
        self._consent = settings.consent
        self._audit = AuditLog(settings.store / AUDIT_FILE)
        self._agreement = Agreement(settings.store / AGREED_FILE)
        self._runs = Runs(settings.store)
        self._ledger = Ledger(settings.store)
        self._pace = Pace(settings.consent.requests_per_hour)
        self._sessions = Sessions(settings, self._audit)
        self._sums = SiteSums(settings, self._audit)

    def handle(self, header: Mapping[str, Any], body: bytes) -> tuple[Mapping[str, Any], bytes]:
        """Answer one request.

        Args:
            header: As it came from the network.
            body: A task, or nothing.

        Returns:
            A header, and the update or nothing. Where the site does not do it, the header has
            ``refused``, a code, and the ``option`` that it is about; where it could not, ``error``,
            a code. Why in words stands in the site's own log and audit.
        """
        try:
            return self._answer(header, body)
        except Exception as error:
            log.exception("a request could not be answered")
            code = code_of(error)
            with suppress(OSError):  # the disk may be what is wrong
                self._audit.write("failed", code=code, reason=in_words(error))
            return {"error": str(code)}, b""

    def _answer(self, header: Mapping[str, Any], body: bytes) -> tuple[Mapping[str, Any], bytes]:
        own: dict[str, Any] = {}
        try:
            try:
                request = read_request(header)
            except MalformedError as error:
                if not self._pace.allows():
                    return self._too_often(), b""
                raise Refusal(Code.REQUEST, str(error)) from error
            if isinstance(request, Who | Alive):
                return {"site": self._settings.name}, b""
            if not self._pace.allows():
                return self._too_often(), b""
            own = {"run": request.run, "kind": request.__struct_config__.tag}
            if isinstance(request, Join):
                return self._join(request), b""
            if self._settings.only_looks:
                raise LookingError
            if isinstance(request, RoundTask):
                return self._round(request, body)
            self._check_site(request.site)
            return self._sums.answer(request)
        except Refusal as refusal:
            if self._settings.only_looks:
                return self._looked(f"the site would refuse: {refusal}\n"), b""
            refused = {"refused": str(refusal.code), "option": refusal.option}
            self._audit.write("refused", **own, **refused, reason=str(refusal))
            log.warning("refused: %s", readable(str(refusal), limit=MAX_TEXT))
        except OtherBaseError as error:
            refused = {"refused": str(Code.BASE_CHANGED), "option": "model.path"}
            self._audit.write("refused", **own, **refused, reason=str(error))
        except DamagedError as error:
            self._set_aside(error)
            refused = {"refused": str(Code.STATE), "option": ""}
        except LookingError as looked:
            return self._looked(str(looked)), b""
        return {**refused, "site": self._settings.name}, b""

    def _too_often(self) -> Mapping[str, Any]:
        """Refuse, and write it down once an hour: the audit is what a flood would fill."""
        refused = {"refused": str(Code.RATE), "option": "--requests-per-hour"}
        if self._pace.is_news():
            most = self._consent.requests_per_hour
            reason = f"requests must be at most {most} in an hour, got more; said once an hour"
            self._audit.write("refused", **refused, reason=reason)
        return {**refused, "site": self._settings.name}

    def _looked(self, report: str) -> Mapping[str, Any]:
        """Write down for the owner what was asked, and tell whoever asked that nobody joins yet."""
        if report:
            write_atomically(self._settings.store / DRY_RUN_FILE, report.encode())
        return {"error": str(Code.LOOKING)}

    def _set_aside(self, error: DamagedError) -> None:
        """Write down that a file is damaged, and what is there instead."""
        before = set_aside(error)
        goes_on = f"the version of round {before}" if before else "nothing: it is lost"
        path = error.path.relative_to(self._settings.store)
        self._audit.write("damaged", file=str(path), goes_on_with=goes_on, reason=str(error))
        log.error("%s; goes on with %s", error, goes_on)

    def _join(self, request: Join) -> Mapping[str, Any]:
        """Check that this site can do what a run asks, before any weight is loaded."""
        name = self._settings.name
        asked, recipe, terms = self._own_recipe(request)
        try:
            # Which seat it gets is known when all have joined; the first one must fit.
            experiment = prepare_experiment(
                without_cohort(recipe), seat=Seat(name, 0, 1, terms.split_seed)
            )
        except (ValueError, OSError) as error:
            if not self._settings.only_looks:
                self._agreement.failed()
            raise as_refusal(Code.DATA, error) from error
        try:
            check_rows(experiment, self._consent, client_id=name)
        except Refusal:
            # That a choice of rows leaves few of them tells of the rows too.
            if not self._settings.only_looks:
                self._agreement.failed()
            raise
        is_seated = "," not in recipe.client.budget + recipe.client.memory_bytes
        check_fits(self._consent, experiment, client_id=name, is_seated=is_seated)
        differs = differences(asked, recipe)
        if self._settings.only_looks:
            text = describe(experiment, self._settings, run=request.run, differs=differs)
            raise LookingError(text)
        if recipe.privacy.unit and not self._runs.knows(request.run):
            rows = len(experiment.train[name])
            self._ledger.check_whole(recipe, self._consent, site=name, rows=rows)
        # First: a run that is one too many leaves nothing on the disk.
        self._runs.join(request.run, recipe_digest(asked), self._consent)
        pin_data(self._settings.store, request.run, experiment)
        for note in data_notes(experiment):
            log.info("data: %s", note)
        self._agreement.keep(terms, run=request.run)
        self._audit.write(
            "joined",
            run=request.run,
            recipe_sha256=recipe_digest(asked),
            consent_sha256=self._consent.digest(),
            strategy=recipe.strategy.name,
            rounds=recipe.server.rounds,
            steps=recipe.client.steps,
            epochs=recipe.client.epochs,
            learning_rate=recipe.client.lr,
            num_examples=len(experiment.train[name]),
            own=differs,
        )
        return {"site": name, "num_examples": len(experiment.train[name])}

    def _own_recipe(self, request: Join | RoundTask) -> tuple[Recipe, Recipe, Terms]:
        """Return the recipe as asked, as this site does it, and how it reads its rows."""
        num_clients = request.num_clients if isinstance(request, RoundTask) else 1
        try:
            asked = parse_recipe(request.recipe)
            check_methods(self._consent, asked)
            terms = self._agreement.terms(self._consent, asked)
            recipe = own_recipe(self._consent, asked, terms, num_clients=num_clients)
            check_sources(recipe, request.methods)
            self._sums.check(recipe)
            check_owner(self._consent, recipe)
        except Refusal:
            raise
        except (ValueError, OSError, RecursionError) as error:
            raise as_refusal(Code.RECIPE, error) from error
        return asked, recipe, terms

    def _check_site(self, asked: str) -> None:
        if asked != self._settings.name:
            raise Refusal(Code.SITE, f"site must be {self._settings.name}, got {asked}")

    def _round(self, request: RoundTask, body: bytes) -> tuple[Mapping[str, Any], bytes]:
        """Evaluate what came, train from it, or both."""
        name, number = self._settings.name, request.round
        self._check_site(request.site)
        self._audit.write(
            "asked",
            run=request.run,
            round=number,
            trains=request.train,
            evaluates=request.evaluate,
            bytes=len(body),
            sha256=content_digest(body),
        )
        session, changed = self._session(request)
        check_request(request, session.schedule)
        reply: dict[str, Any] = {"site": name, "base_digest": session.client.model.base_digest}
        if changed:
            reply["changed"] = changed
        with threads(session.recipe.model.num_threads):
            try:
                task = self._read_task(body, session)
            except MissingCopyError:
                return {"site": name, "lacks_values": True}, b""
            check_task(task, request, session.schedule)
            most = self._consent.trees_per_round
            tree = self._runs.note_tree(request.run, number, digest(task.shared), most=most)
            self._keep_values(request.run, session, task)
            if request.evaluate:
                reply |= self._evaluate(session, task, request.evaluate)
            update = self._train(session, task) if request.train else None
            message = self._write_update(update, session) if update else b""
            if update and session.recipe.privacy.secure_aggregation:
                update = self._keep_back(request.run, message, task, session)
                message = session.channel.pack_update(update)
        self._audit.write(
            "sent",
            run=request.run,
            round=number,
            trees=f"{tree} of at most {most} in this round",
            names=sorted(update.delta) if update else [],
            **({"settings": asdict(task.settings)} if update else {}),
            evaluation=reply.get("evaluation", {}),
            metrics=dict(update.metrics) if update else {},
            bytes=len(message),
            sha256=content_digest(message),
        )
        return reply, message

    def _read_task(self, body: bytes, session: Session) -> Task:
        try:
            # Before memory is taken for what it claims to hold.
            Admission().check_header(body, session.shared)
            task = read_task(body, session.channel, session.client.store)
            check_tree(task, session.shared)
            return task
        except MissingCopyError:
            raise
        except DamagedError as error:  # of the values that it was sent: it can be sent them again
            self._set_aside(error)
            raise MissingCopyError(str(error)) from error
        except ValueError as error:
            if isinstance(error, OtherBaseError | Refusal):
                raise
            raise as_refusal(Code.REQUEST, error) from error

    def _keep_values(self, run: str, session: Session, task: Task) -> None:
        """Keep what this site's own model is opened from where the coordinator is not there."""
        folder = self._settings.store / "personal" / folder_name(run)
        model = session.recipe.model
        if Path(model.path).is_dir():  # meant from where the site was started
            model = replace(model, path=str(Path(model.path).resolve()))
        recipe = to_toml(replace(session.recipe, model=model)).encode()
        path = folder / RECIPE_FILE
        if not path.exists() or path.read_bytes() != recipe:
            write_atomically(path, recipe)
        keep_values(task, session.channel, session.client.store)

    def _evaluate(self, session: Session, task: Task, models: Sequence[str]) -> dict[str, Any]:
        """Measure models of the round before, as exactly as the owner lets it out."""
        started = time.monotonic()
        try:
            values = evaluate_client(session.strategy, session.client, task, set(models))
        except Exception as error:
            error.add_note(f"after round {task.round_number - 1}, evaluation")
            raise
        return {
            "evaluation": rounded(values, self._consent),
            "evaluation_seconds": round(time.monotonic() - started, 3),
        }

    def _train(self, session: Session, task: Task) -> Update:
        client = session.client
        if session.recipe.privacy.unit:
            self._pay(session, task)
        try:
            update = train_client(session.strategy, client, task)
        except Exception as error:
            error.add_note(f"in round {task.round_number}, local training")
            raise
        rows = rows_read(session.recipe, client, task.settings)
        return replace(update, metrics=let_out(update.metrics, self._consent, rows=rows))

    def _pay(self, session: Session, task: Task) -> None:
        """Count a training before it begins: what a site that is killed has drawn may be known."""
        name, rows = self._settings.name, session.client.num_examples
        epsilon = self._ledger.charge(session.recipe, self._consent, site=name, rows=rows)
        self._audit.write(
            "paid", round=task.round_number, epsilon=epsilon, delta=self._consent.delta
        )

    def _keep_back(self, run: str, message: bytes, task: Task, session: Session) -> Update:
        """Keep an update for a secure sum, and return what is sent now: what was measured.

        It is kept as it would have arrived, so that a sum is that of the simulator.
        """
        update = session.channel.unpack_update(message)
        privacy = session.recipe.privacy
        shapes = {name: tuple(tensor.shape) for name, tensor in session.shared.items()}
        waiting = Waiting(
            update,
            shapes,
            tree_digest=digest(task.shared),
            recipe_digest=session.recipe_digest,
            bound=privacy.secure_bound,
            least=privacy.secure_least,
            num_neighbors=privacy.secure_neighbors,
        )
        self._sums.keep(run, waiting)
        return replace(update, delta={}, weight={})

    def _write_update(self, update: Update, session: Session) -> bytes:
        try:
            return write_update(update, session.channel, session.client.store)
        except DamagedError:
            raise
        except ValueError as error:  # what was trained is not finite
            raise FloatingPointError(str(error)) from error

    def _session(self, request: RoundTask) -> tuple[Session, list[str]]:
        """Return what is needed for a run, built once, and what has changed since a round."""
        index, num_clients = request.index, request.num_clients
        if not 0 <= index < num_clients:
            raise Refusal(Code.REQUEST, f"index must be in 0..{num_clients - 1}, got {index}")
        asked, recipe, terms = self._own_recipe(request)
        joined = self._runs.of_round(request.run, recipe_digest(asked))
        self._runs.check_seat(request.run, index, num_clients)
        changed = []
        if self._runs.note_consent(joined, self._consent):
            changed.append("consent")
            self._audit.write(
                "changed",
                run=request.run,
                round=request.round,
                what="consent",
                consent_sha256=self._consent.digest(),
            )
        session = self._sessions.of(request, recipe, terms, asked=recipe_digest(asked))
        self._runs.check_base(request.run, session.client.model.base_digest)
        return session, changed


def main() -> None:
    """Serve until the process that started this one ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)  # what this process writes is its user's alone
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
