"""Servers in processes of their own: a base with random models, and ``transformers serve``.

python -m orchard.measurements.serving_process MODEL PORT NUMBER
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from orchard.engine.processes import free_port
from orchard.measurements.serving_models import random_model
from orchard.models.stored.loading import load_base, load_tokenizer
from orchard.models.stored.sources import resolve
from orchard.serving.engine import Engine
from orchard.serving.http import Served
from orchard.serving.registry import BASE, Registry, Source
from orchard.serving.running import listener
from orchard.serving.worker import Worker

_START_SECONDS, _END_SECONDS = 180.0, 20.0


def client_name(number: int) -> str:
    """Return the name under which a random model is served."""
    return f"client_{number}"


@contextmanager
def orchard_server(model: str, *, num_models: int) -> Iterator[str]:
    """Serve a base and random models, and yield the address.

    Raises:
        RuntimeError: It does not come up.
    """
    port = free_port()
    command = ["-m", __name__, model, str(port), str(num_models)]
    with _listening([sys.executable, *command], port) as url:
        yield url


@contextmanager
def transformers_server(model: str, *, is_continuous: bool) -> Iterator[str]:
    """Let transformers serve a base, and yield the address.

    Args:
        model: The base.
        is_continuous: Whether by its continuous batching.

    Raises:
        RuntimeError: It does not come up; what it wrote ends the message.
    """
    port = free_port()
    own = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    # Of its own accord it takes most of the memory for its cache before the first answer. These are
    # more blocks than the requests here can fill.
    batching = ["--continuous-batching", "--cb-num-blocks", "512"] if is_continuous else []
    start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "serve", resolve(model), *own, *batching]
    with _listening(command, port) as url:
        yield url


@contextmanager
def _listening(command: Sequence[str], port: int) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        try:
            end = time.monotonic() + _START_SECONDS
            while not _is_up(url):
                if process.poll() is not None or time.monotonic() > end:
                    said = " ".join(log.read_text(errors="replace").split())[-300:]
                    raise RuntimeError(f"a server must come up, got: {said}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def _serve(model: str, port: int, num_models: int) -> None:
    view = load_base(model, dtype="float32").view
    names = [client_name(number) for number in range(num_models)]
    registry = Registry(view, "", {name: Source() for name in (*names, BASE)}, max(num_models, 1))
    registry.held.update({n: random_model(view, seed) for seed, n in enumerate(names)})
    tokenizer = load_tokenizer(model)
    whole: Any = view.model
    config = whole.config.get_text_config()
    end = whole.generation_config.eos_token_id
    served = Served(
        worker=Worker(Engine(view), registry),
        tokenizer=tokenizer,
        encode_chat=lambda name, turns: [],
        end_ids=frozenset(end if isinstance(end, list) else [] if end is None else [end]),
        context=int(config.max_position_embeddings),
        vocabulary=int(config.vocab_size),
        keys={},
    )
    listener(served, host="127.0.0.1", port=port).run()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
