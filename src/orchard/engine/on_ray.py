"""Workers on a Ray cluster, which places and replaces them.

Source: Moritz et al., 2018, arXiv:1712.05889. Of Ray only actors are used, each asked one request
after another. The run's folder, the model and the data must be found by every node under the same
paths: personal tensors stay where they are in any run, in the run's folder.

Ray's processes trust each other, and whoever reaches one can run code there: a cluster is for the
nodes of one owner. Nothing of it is between sites.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchard.engine.worker import Handle, Header

log = logging.getLogger(__name__)
AUTO = "auto"
_ANSWER_SECONDS = 3.0
_MAX_DEATHS = 3


def check_address(address: str) -> None:
    """Check that somebody answers at a cluster's address.

    Ray itself would try for minutes.

    Raises:
        ValueError: It is no address.
        ConnectionError: Nobody answers within seconds.
    """
    if address == AUTO:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"--ray must be host:port or {AUTO}, got {address}; ray start --head prints it"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS):
            pass
    except OSError as error:
        raise ConnectionError(
            f"--ray must be the address of a Ray cluster that answers, got {address}, which does "
            f"not ({error}); start one with ray start --head"
        ) from error


class OnRay:
    """A worker that is an actor of a cluster."""

    num_restarts = 0

    def __init__(self, number: int, make: Callable[[], Any]) -> None:
        """Start an actor with ``make``, and another one when it dies."""
        self._number, self._make = number, make
        self._actor = make()

    def ask(self, header: Header, body: bytes) -> tuple[Header, bytes]:
        """Have a request answered, by another actor where the first one dies of it."""
        import ray
        from ray.exceptions import RayActorError, RayError

        for _ in range(_MAX_DEATHS):
            try:
                found: tuple[Header, bytes] = ray.get(self._actor.handle.remote(dict(header), body))
                return found
            except RayActorError as error:
                log.warning("worker %d died (%s); starting another", self._number, error)
                self._actor = self._make()
                self.num_restarts += 1
            except RayError as error:
                raise ChildProcessError(
                    f"worker {self._number} must be asked through Ray, got {error}; look at "
                    "ray status"
                ) from error
        raise ChildProcessError(
            f"worker {self._number} must live, got an actor that died {_MAX_DEATHS} times of one "
            "request; look at ray status and at the memory of its nodes"
        )

    def stop(self) -> None:
        """End the actor."""
        import ray

        with suppress(Exception):  # whatever becomes of an actor that is no longer needed
            ray.kill(self._actor)


def _actor_of(make: Callable[[Path], Handle]) -> type:
    """Return a class whose actors answer by what ``make`` returns on their node."""

    class Worker:
        def __init__(self, settings: str) -> None:
            path = Path(settings)
            if not path.is_file():
                raise FileNotFoundError(
                    f"the run's folder must be found by every node, got {os.uname().nodename} "
                    f"without {path}; choose an --out on a disk that all nodes share"
                )
            self._handle = make(path)

        def handle(self, header: Header, body: bytes) -> tuple[Header, bytes]:
            return self._handle(header, body)

    return Worker


@contextmanager
def workers_on_ray(
    address: str,
    settings: Path,
    *,
    make: Callable[[Path], Handle],
    number: int,
    num_threads: int,
    has_gpu: bool,
) -> Iterator[list[OnRay]]:
    """Hold workers on a cluster while the context lasts.

    Args:
        address: Of the cluster; see ``check_address``.
        settings: What workers are told, a file that every node reads.
        make: From that file to what answers requests; looked up by its module on each node.
        number: Of workers.
        num_threads: CPUs that each asks Ray for, which it computes with.
        has_gpu: Whether each asks for a GPU.

    Raises:
        ConnectionError: The cluster does not let us in, or has too few CPUs or GPUs.
    """
    import ray

    environment = {"OMP_NUM_THREADS": str(num_threads)}
    if path := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] = path
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": environment},
        )
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ConnectionError(
            f"--ray must be the address of a Ray cluster that lets us in, got {address} ({text}); "
            "see ray status"
        ) from error
    places: list[OnRay] = []
    try:
        there = ray.cluster_resources()
        wanted = {"CPU": num_threads * number, "GPU": number if has_gpu else 0}
        for kind, amount in wanted.items():
            if amount > there.get(kind, 0):
                raise ConnectionError(
                    f"--workers must fit the Ray cluster, got {number} workers that need "
                    f"{amount} {kind} of {there.get(kind, 0):g}; lower it, or add nodes"
                )
        remote = ray.remote(num_cpus=num_threads, num_gpus=1 if has_gpu else 0)(_actor_of(make))
        for own in range(number):
            places.append(OnRay(own, lambda: remote.remote(str(settings))))
        yield places
    finally:
        for place in places:
            place.stop()
        ray.shutdown()
