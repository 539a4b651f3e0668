"""The coordinator of a federation: a SuperLink, and rounds that survive whatever ends them."""

from __future__ import annotations

import json
import logging
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchard.deployment.addresses import check_proxies, check_security, split_address
from orchard.deployment.key_files import AUTHORITY, CERTIFICATE, PRIVATE, site_keys
from orchard.deployment.server_app import FAILURE_FILE, RESULT_FILE, RUN_FILE
from orchard.engine.inbox import Inbox
from orchard.engine.journal import num_ended, num_tried
from orchard.engine.processes import Child, child_environment, free_port
from orchard.experiment.checking import check_between_sites
from orchard.experiment.methods import build_strategy, check_strategy, require_path
from orchard.experiment.run_folder import (
    begin_folder,
    check_folder,
    recorded_as,
    writing_alone,
)
from orchard.experiment.settings import lora_settings
from orchard.experiment.starting import Start, record_start
from orchard.experiment.wiring import check_communication
from orchard.extras import require
from orchard.models.stored.loading import check_device, check_model
from orchard.recipe.options import Recipe
from orchard.results import MetricsLog, write_atomically, write_json

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)
_START_SECONDS, _LOOK_SECONDS = 60.0, 0.5
LOCK_SECONDS = 30.0
"""How long one that is started again waits for the end of the one before."""


@dataclass(frozen=True)
class CoordinatorOptions:
    """What ``orchard coordinate`` is told.

    Attributes:
        folder: The run's folder.
        address: ``host:port`` that it listens at.
        keys: Folder with its certificate and the public keys of its sites; None = without TLS.
        is_insecure: Whether going without keys on a network was asked for.
        attempts: Restarts in a row that complete no round, before it gives up.
        trusted_proxies: Addresses or networks of reverse proxies, whose requests may say that they
            were forwarded.
        own_port: Of the loopback device, for this machine's own processes.
    """

    folder: Path
    address: str
    keys: Path | None = None
    is_insecure: bool = False
    attempts: int = 5
    trusted_proxies: tuple[str, ...] = ()
    own_port: int = field(default_factory=free_port)

    @property
    def own_address(self) -> str:
        """Where this machine's own processes reach the SuperLink, and nobody else."""
        return f"127.0.0.1:{self.own_port}"


class RoundsFailedError(OSError):
    """The process that runs the rounds ended again and again without completing one."""


def check_coordinator(recipe: Recipe, options: CoordinatorOptions, *, resume: bool) -> int:
    """Refuse what cannot work, before anything is started, and return the number of sites.

    Raises:
        FileNotFoundError: Keys are not there.
        ValueError: Recipe, folder, address or keys do not fit.
    """
    require("flower", to="leave one machine")
    check_security(options.address, keys=options.keys, is_insecure=options.is_insecure)
    check_proxies(options.trusted_proxies, keys=options.keys, is_insecure=options.is_insecure)
    check_strategy(recipe.strategy.name)
    check_folder(options.folder, recipe, resume=resume)
    check_communication(recipe)
    require_path(recipe)
    check_device(recipe.model.device)
    check_model(recipe.model.path, lora_settings(recipe))
    num_sites = recipe.deployment.sites
    if options.keys:
        for name in (AUTHORITY, CERTIFICATE, PRIVATE):
            if not (options.keys / name).is_file():
                raise FileNotFoundError(
                    f"--keys must hold {name}, got {options.keys} without it; "
                    "make it with orchard keys"
                )
        known = site_keys(options.keys)
        if not known:
            raise FileNotFoundError(
                f"--keys must hold the public key of each site in sites, got none in "
                f"{options.keys}; a site makes its own with orchard keys"
            )
        if num_sites > len(known):
            raise ValueError(
                f"deployment.sites must be at most the number of keys, {len(known)}, got "
                f"{num_sites}; add keys, or lower it"
            )
        num_sites = num_sites or len(known)
    if not num_sites:
        raise ValueError(
            "deployment.sites must say how many sites take part, got 0; for example "
            "deployment.sites=3"
        )
    check_between_sites(recipe, num_sites=num_sites)
    build_strategy(recipe, num_clients=num_sites)  # what cannot be put on is refused here
    for name, value in (
        ("deployment.quorum", recipe.deployment.quorum),
        ("server.clients_per_round", recipe.server.clients_per_round),
    ):
        if value > num_sites:
            raise ValueError(f"{name} must be at most {num_sites}, the sites, got {value}")
    return num_sites


def coordinate(recipe: Recipe, options: CoordinatorOptions, *, num_sites: int) -> dict[str, Any]:
    """Run a recipe with sites elsewhere, and return the content of ``result.json``.

    Whatever ends a process of it, it is started again and goes on from the last checkpoint.

    Args:
        recipe: Every choice, checked by ``check_coordinator``.
        options: Where and how it runs.
        num_sites: What ``check_coordinator`` returned.

    Raises:
        ConnectionError: The SuperLink does not start.
        RoundsFailedError: Again and again no round was completed.
        InUseError: Another coordinator, or a run, writes to the folder.
    """
    folder = options.folder.resolve()
    with writing_alone(folder, seconds=LOCK_SECONDS):
        check_folder(folder, recipe, resume=True)  # somebody may have begun another run meanwhile
        start = Start(
            directory=str(Path.cwd()),
            address=options.address,
            keys=str(options.keys or ""),
            is_insecure=options.is_insecure,
        )
        record_start(folder, start)
        begin_folder(folder, recorded_as(recipe))
        if not (folder / RUN_FILE).exists():
            write_json(folder / RUN_FILE, {"run": secrets.token_hex(8)})
        facts = json.loads((folder / RUN_FILE).read_text())
        # Flower starts the rounds elsewhere; modules of own methods are found from here.
        facts |= {"num_sites": num_sites, "directory": str(Path.cwd())}
        write_json(folder / RUN_FILE, facts)
        return _supervise(options, folder)


def _supervise(options: CoordinatorOptions, folder: Path) -> dict[str, Any]:
    """Keep the SuperLink and the rounds running until there is a result."""
    superlink = _superlink(options, folder)
    app: subprocess.Popen[bytes] | None = None
    failures, last, num_starts, is_ready = 0, _steps(folder), 0, False
    try:
        while not (folder / RESULT_FILE).exists():
            if not superlink.is_running:
                _stop(app)
                app, is_ready = None, False
                superlink.keep_running()
            if not is_ready:
                is_ready = superlink.is_running and _make_ready(options)
                num_starts = 0 if is_ready else num_starts + superlink.is_running
                if not is_ready:
                    superlink.stop()
                if num_starts >= options.attempts or superlink.num_failures >= options.attempts:
                    raise ConnectionError(
                        f"the SuperLink must start at {options.address}, got none in "
                        f"{options.attempts} attempts; see {superlink.log_path}"
                    )
                time.sleep(_LOOK_SECONDS)
                continue
            if app is None:
                app = _submit(folder)
            elif app.poll() is not None and not (folder / RESULT_FILE).exists():
                app = None
                now = _steps(folder)
                has_moved = any(new > old for new, old in zip(now, last, strict=True))
                failures = 1 if has_moved else failures + 1
                last = now
                reason = _failure(folder)
                if failures >= options.attempts:
                    raise RoundsFailedError(
                        f"{reason or 'the rounds ended without a result'}; tried {failures} "
                        f"times; see {folder / 'logs'}"
                    )
                log.warning("rounds ended (%s); going on after round %d", reason, last[0])
                time.sleep(min(2.0**failures, 30.0))
            time.sleep(_LOOK_SECONDS)
    finally:
        _stop(app)
        superlink.stop()
    result: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text())
    return result


def _superlink(options: CoordinatorOptions, folder: Path) -> Child:
    command = [
        sys.executable,
        "-m",
        "orchard.engine.superlink",
        "--public",
        options.address,
        *(part for one in options.trusted_proxies for part in ("--trusted-proxy", one)),
        "--host",
        "127.0.0.1",
        "--port",
        str(options.own_port),
        "--disable-runtime-dependency-installation",
    ]
    if options.keys:
        command += [
            "--ssl-certfile",
            str(options.keys / CERTIFICATE),
            "--ssl-keyfile",
            str(options.keys / PRIVATE),
            "--ssl-ca-certfile",
            str(options.keys / AUTHORITY),
            "--enable-supernode-auth",
        ]
    else:
        command += ["--insecure"]
    home = folder / "flower"
    _write_connection(options, home)
    return Child("superlink", command, folder / "logs" / "superlink.log", child_environment(home))


def _write_connection(options: CoordinatorOptions, home: Path) -> None:
    security = (
        f"root-certificates = {json.dumps(str((options.keys / AUTHORITY).resolve()))}"
        if options.keys
        else "insecure = true"
    )
    own = f'[superlink.own]\naddress = "{options.own_address}"\n{security}\n'
    text = f'[superlink]\ndefault = "own"\n\n{own}'
    write_atomically(home / "config.toml", text.encode())


def _wait_for(address: str) -> bool:
    """Wait until somebody listens, and say whether somebody does."""
    own = split_address(address)
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        try:
            with socket.create_connection(own, timeout=1.0):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def _make_ready(options: CoordinatorOptions) -> bool:
    """Wait for the SuperLink and tell it the keys of the sites; a new one knows none."""
    if not _wait_for(options.own_address):
        return False
    if not options.keys:
        return True
    from orchard.engine.control import register_nodes

    try:
        register_nodes(
            options.own_address,
            authority=options.keys / AUTHORITY,
            keys=site_keys(options.keys),
        )
    except ConnectionError as error:  # it ended meanwhile, and is started again
        log.warning("%s", error)
        return False
    return True


def _submit(folder: Path) -> subprocess.Popen[bytes]:
    """Start the rounds as an app of the SuperLink; the process ends when they do."""
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    bundle = Path(str(resources.files("orchard") / "flower_bundle"))
    child = Child(
        "rounds",
        [
            str(Path(sys.executable).parent / "flwr"),
            "run",
            str(bundle),
            "own",
            "--stream",
            "--run-config",
            f"folder={json.dumps(str(folder))}",
        ],
        folder / "logs" / "rounds.log",
        child_environment(folder / "flower"),
    )
    child.start()
    assert child.process is not None
    return child.process


def _stop(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None and process.poll() is None:
        process.terminate()
        process.wait(10.0)


def _steps(folder: Path) -> tuple[int, ...]:
    """Return what says that an end of the rounds was not in vain, each of which only grows so far.

    The last round; how many updates were set apart, tried, and found to be what a process ended in.
    Without these, whoever sends what ends a process, or those who take turns, would soon end the
    run.
    """
    rounds = [line["round"] for line in MetricsLog(folder / "metrics.jsonl").read()]
    set_apart = Inbox(folder / "inbox").num_set_apart()
    return max(rounds, default=0), set_apart, num_tried(folder), num_ended(folder)


def _failure(folder: Path) -> str:
    path = folder / FAILURE_FILE
    return str(json.loads(path.read_text())["error"]) if path.exists() else ""
