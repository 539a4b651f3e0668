"""One site of a federation: a warm worker and a SuperNode, kept running until stopped."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from orchard.deployment.addresses import check_security
from orchard.deployment.consent import DRY_RUN_FILE, Consent, SiteSettings
from orchard.deployment.key_files import AUTHORITY, SITES, check_site_name
from orchard.deployment.private_files import UMASK, make_private
from orchard.deployment.terms import read_own_terms
from orchard.engine.processes import Child, child_environment, only_one
from orchard.extras import require
from orchard.recipe.method_options import BUILT_IN
from orchard.results import write_atomically

log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5
_NODE_ID = re.compile(r"SuperNode ID: (\d+)")


@dataclass(frozen=True)
class SiteOptions:
    """What ``orchard site`` is told.

    Attributes:
        name: Of the site; the coordinator knows its key by it.
        superlink: ``host:port`` of the coordinator.
        store: The site's folder: personal tensors, audit log, logs.
        consent: What its owner lets it do.
        keys: Folder with the authority's certificate and the site's key; None = without TLS.
        is_insecure: Whether going without keys to another machine was asked for.
        patience_seconds: Longest that one task may take.
        only_looks: Whether it joins nothing, and writes down what is asked of it.
    """

    name: str
    superlink: str
    store: Path
    consent: Consent
    keys: Path | None = None
    is_insecure: bool = False
    patience_seconds: float = 24 * 3600.0
    only_looks: bool = False


def run_site(options: SiteOptions, *, until: Callable[[], bool] = lambda: False) -> None:
    """Keep a worker and a SuperNode running, until interrupted or ``until`` says so.

    Raises:
        FileNotFoundError: Data or keys are not there.
        ValueError: The name, the address or the keys do not fit.
        TimeoutError: Another site uses the store.
    """
    check_site(options)
    store = options.store
    make_private(store)
    with only_one(store / "site.lock", seconds=30.0, what="site in one store"):
        # Paths of sockets are short, and those of stores may not be.
        room = Path(tempfile.mkdtemp(prefix="orchard-"))
        settings = SiteSettings(
            options.name, store.resolve(), room / "worker", options.consent, options.only_looks
        )
        write_atomically(store / "site.json", settings.to_json().encode())
        make_private(store)
        children = [_worker(options), _supernode(options, settings.socket)]
        log.info("site %s takes part through %s", options.name, options.superlink)
        try:
            while not until():
                for child in children:
                    child.keep_running()
                time.sleep(_LOOK_SECONDS)
        finally:
            for child in reversed(children):
                child.stop()
            shutil.rmtree(room, ignore_errors=True)


def look(options: SiteOptions) -> str:
    """Wait until a coordinator asks this site to join, and return what that would mean.

    The site joins nothing: the coordinator is told that its owner looks, and asks again later.

    Raises:
        FileNotFoundError: Data or keys are not there.
        ValueError: The name, the address or the keys do not fit.
        TimeoutError: Another site uses the store.
    """
    report = options.store / DRY_RUN_FILE
    report.unlink(missing_ok=True)
    run_site(replace(options, only_looks=True), until=report.exists)
    return report.read_text()


def check_site(options: SiteOptions) -> None:
    """Refuse what cannot work, before anything is started.

    Raises:
        FileNotFoundError: Data or keys are not there.
        ValueError: The name, the address, the keys or a method do not fit.
    """
    require("flower", to="leave one machine")
    check_site_name(options.name)
    check_security(options.superlink, keys=options.keys, is_insecure=options.is_insecure)
    consent = options.consent
    if set(consent.methods) - set(BUILT_IN):
        from orchard.experiment.methods import find_method

        for name in consent.methods:
            find_method(name)
    for option, given in (
        ("--data", consent.data),
        ("--data-recipe", consent.data_recipe),
        ("--calibration", consent.calibration),
        ("--retention", consent.retention),
    ):
        if given and not Path(given).is_file():
            raise FileNotFoundError(f"{option} must be a file, got {given}, which is not there")
    if consent.data_recipe:
        read_own_terms(consent.data_recipe)
    for option, value, least in (
        ("--min-test", consent.min_test, 1),
        ("--decimals", consent.decimals, 0),
        ("--trees-per-round", consent.trees_per_round, 1),
        ("--runs-per-day", consent.runs_per_day, 1),
        ("--requests-per-hour", consent.requests_per_hour, 1),
    ):
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}; raise it")
    _check_peers(options)
    if not 0 < consent.delta < 1:
        raise ValueError(
            f"--delta must be above 0 and below 1, got {consent.delta:g}; take less than one over "
            "the number of rows"
        )
    if consent.epsilon:
        require("privacy", to="count what updates cost")
    if options.keys:
        for path in (options.keys / AUTHORITY, options.keys / SITES / f"{options.name}.key"):
            if not path.is_file():
                raise FileNotFoundError(
                    f"--keys must hold {path.relative_to(options.keys)}, got {options.keys} "
                    "without it; orchard keys makes a site's key, and the coordinator's owner "
                    f"gives you {AUTHORITY}"
                )


def _check_peers(options: SiteOptions) -> None:
    """Refuse what could be no secret sum: no key of one's own, or too few of others."""
    consent = options.consent
    if consent.secure_least == 1:
        raise ValueError(
            "--secure-least must be 0 or at least 2, got 1; the sum of one is its update"
        )
    if consent.secure_least and not consent.peers:
        raise ValueError(
            f"--peers must name the public keys of other sites with --secure-least "
            f"{consent.secure_least}, got nothing; their owners give them to you"
        )
    if not consent.peers:
        return
    if not options.keys:
        raise ValueError(
            "--keys must be given with --peers, got nothing; a site signs with its own key"
        )
    require("secure", to="aggregate in secret")
    if not Path(consent.signing_key).is_file():
        return  # which is said with the authority's certificate
    from orchard.deployment.peers import read_peers, read_signing_key

    own = read_signing_key(Path(consent.signing_key))
    found = read_peers(Path(consent.peers), name=options.name, own=own)
    if len(found) < consent.secure_least:
        raise ValueError(
            f"--peers must hold the keys of at least {consent.secure_least - 1} other sites with "
            f"--secure-least {consent.secure_least}, got {len(found) - 1}; lower it, or add keys"
        )


def _worker(options: SiteOptions) -> Child:
    store = options.store.resolve()
    command = [sys.executable, "-m", "orchard.deployment.site_worker", str(store / "site.json")]
    log_path = store / "logs" / "worker.log"
    return Child("worker", command, log_path, child_environment(store), umask=UMASK)


def _supernode(options: SiteOptions, socket: Path) -> Child:
    store = options.store.resolve()
    if options.keys:
        security = [
            "--root-certificates",
            str(options.keys / AUTHORITY),
            "--private-key",
            str(options.keys / SITES / f"{options.name}.key"),
        ]
    else:
        security = ["--insecure"]
    command = [
        sys.executable,
        "-m",
        "orchard.engine.supernode",
        "--superlink",
        options.superlink,
        "--socket",
        str(socket),
        "--patience-seconds",
        str(options.patience_seconds),
        *security,
    ]
    log_path = store / "logs" / "supernode.log"

    def release() -> None:
        _release_place(options, log_path)

    if log_path.exists():  # a site that was killed left its SuperNode's place taken
        release()
    environment = child_environment(store / "flower")
    return Child("supernode", command, log_path, environment, before_restart=release, umask=UMASK)


def _release_place(options: SiteOptions, log_path: Path) -> None:
    """Give up the place of the SuperNode that ended, so that the next one is let in at once."""
    found = _NODE_ID.findall(log_path.read_text(errors="replace"))
    if not found or not options.keys:
        return
    from orchard.engine.control import release_node

    try:
        release_node(
            options.superlink,
            authority=options.keys / AUTHORITY,
            key=options.keys / SITES / f"{options.name}.key",
            node_id=int(found[-1]),
        )
    except (
        ConnectionError
    ) as error:  # the SuperLink may be away, or new: then there is no place taken
        log.info("the last SuperNode's place could not be released: %s", error)
