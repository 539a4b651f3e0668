"""A real server: killed in the middle of its load and started again, and ended by SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchard.deployment.localhost import start_orchard
from orchard.engine.processes import free_port
from tests.federations import quick_recipe, run_quickly

pytestmark = pytest.mark.deployment


@contextmanager
def _server(run: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    log = run.parent / "log"
    process = start_orchard("serve", str(run), "--port", str(port), log=log)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while not _is_up(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def _ask(url: str, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def test_killed_and_damaged_and_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_quickly(run, quick_recipe("flex"))
    with _server(run) as (url, process):
        names = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        before = {name: _ask(url, name).json()["choices"][0]["text"] for name in names}

        def load() -> None:
            try:
                _ask(url, names[-1], max_tokens=200, n=8)
            except httpx.TransportError:
                return

        asking = [threading.Thread(target=load) for _ in range(4)]
        for thread in asking:
            thread.start()
        time.sleep(0.3)
        process.kill()
        for thread in asking:
            thread.join()
    damaged, *others = [name for name in names if name not in ("base", "global")]
    stored = max((run / "clients" / damaged).glob("round_*.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"\xff")
    with _server(run) as (url, process):
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == names
        for _ in range(2):
            assert _ask(url, damaged).status_code == 500
        for name in ("base", "global", *others):
            assert _ask(url, name).json()["choices"][0]["text"] == before[name]
        said = (tmp_path / "log").read_text()
        assert said.count(f"{damaged} cannot be served") == 1
        assert stored.name in said
        # SIGTERM: what runs is finished, and then the process ends by itself.
        parts = []
        options = {"max_tokens": 150, "stream": True, "temperature": 20.0, "seed": 1}
        body = {"model": "base", "prompt": [5, 6, 7], **options}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not parts:
                    process.send_signal(signal.SIGTERM)
                parts.append(line)
        assert parts[-2:] == ["data: [DONE]", ""] or parts[-1] == "data: [DONE]"
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
        assert not _is_up(url)
