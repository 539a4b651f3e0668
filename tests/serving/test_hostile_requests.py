"""What strangers send so that others are not served; each is closed, refused or bounded."""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from orchard.models.stored.loading import load_base
from orchard.personal.sampling import Sampling, choose_token
from orchard.serving import connections, engine, http
from orchard.serving.engine import Engine, Row
from orchard.serving.values import RowValues
from tests.federations import quick_recipe, run_quickly, short_model
from tests.served_runs import serving

BODY: dict[str, Any] = {"model": "base", "prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("hostile")
    run_quickly(folder / "run", quick_recipe("fedavg"))
    with serving([folder / "run"]) as address:
        yield address


def _line(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    line = socket.create_connection((host, int(port)))
    line.settimeout(20)
    return line


def _rest(line: socket.socket) -> bytes:
    """Return what comes until the connection is closed."""
    found = b""
    try:
        while part := line.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def test_who_sends_half_a_head_is_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.3)
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for before in (b"", head):  # as a first request, and behind one that was answered
        with _line(url) as line:
            line.sendall(before + b"GET /health HTTP/1.1\r\nho")
            assert _rest(line).count(b"200 OK") == bool(before)
    with _line(url) as line:
        assert _rest(line) == b""


def test_who_sends_half_a_body_is_told_and_closed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_BODY_SECONDS", 0.3)
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.6)
    with _line(url) as line:
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{"
        )
        said = _rest(line)
    assert b"408 Request Timeout" in said
    assert b"the body must come within 0.3 s" in said


def test_connections_are_bounded_and_free_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_MAX_CONNECTIONS", 3)
    lines = [_line(url) for _ in range(3)]
    for _ in range(20):
        with _line(url) as more:
            assert _rest(more) == b""
    for line in lines:
        line.close()
    end = time.monotonic() + 10
    while True:
        try:
            assert httpx.get(f"{url}/health").status_code == 200
            return
        except httpx.TransportError:
            assert time.monotonic() < end, "no connection is taken any more"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 2**20,
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: a\r\n" * 2**17,
        b"GET /" + b"a" * 2**20,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x00\xff" * 1000,
    ],
    ids=["header", "headers", "address", "length", "chunk", "noise"],
)
def test_what_is_no_request_is_closed(url: str, head: bytes) -> None:
    with _line(url) as line:
        try:
            line.sendall(head)
        except (BrokenPipeError, ConnectionResetError):
            return  # it is closed before all of it is sent
        assert b"200 OK" not in _rest(line)
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a\r\nset-cookie: b", "\0", "", "x" * 3 * 2**20, "é" * 99]
)
def test_a_name_of_a_model_is_never_a_path_or_a_header(url: str, name: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={**BODY, "model": name})
    assert answer.status_code == 404
    assert "set-cookie" not in answer.headers
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"temperature": 1e-320}, 200),
        ({"temperature": 1e308}, 200),
        ({"top_p": 1e-300, "temperature": 1e-30}, 200),
        ({"seed": -(2**63)}, 200),
        ({"seed": 2**64}, 200),
        ({"n": 2**70}, 400),
        ({"max_tokens": 10**9}, 400),
        ({"max_tokens": 2**64}, 400),
        ({"logprobs": 10**6}, 400),
        ({"prompt": ["a"] * 10_000}, 400),
        ({"prompt": [[5]] * 10_000}, 400),
        ({"prompt": [2**63]}, 400),
        ({"prompt": [True]}, 400),
        ({"prompt": []}, 400),
        ({"prompt": ""}, 400),
    ],
    ids=range(15),
)
def test_numbers_at_the_edge_are_answered_or_refused(
    url: str, changes: dict[str, Any], status: int
) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={**BODY, **changes})
    assert answer.status_code == status, answer.text
    if status == 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_text_that_is_too_long_is_not_read(url: str) -> None:
    started = time.monotonic()
    for prompt in ("a" * 3 * 2**20, " " * 3 * 2**20):
        answer = httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": prompt})
        assert answer.status_code == 400
        assert "prompt must have up to" in answer.json()["error"]["message"]
        chat = {"model": "base", "messages": [{"role": "user", "content": prompt}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=chat)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    # Read by the tokenizer, the four take more than a minute.
    assert time.monotonic() - started < 20


def test_others_are_served_while_a_text_is_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    read = http._encode

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        asked = time.monotonic()
        assert httpx.get(f"{url}/health").status_code == 200  # the loop is free
        taken.append(time.monotonic() - asked)
        return read(*arguments)

    monkeypatch.setattr(http, "_encode", slowly)
    assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=30).status_code == 200
    assert len(taken) == 1


def test_a_draw_that_fails_ends_its_own_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
        raise RuntimeError("no draw")

    monkeypatch.setattr(engine, "choose_token", choose)
    rows = [Row(RowValues(), [5, 6], 3, sampling=Sampling(heat)) for heat in (0.0, 1.0, 0.0)]
    whole = Engine(load_base(short_model(), dtype="float32").view)
    with whole.running():
        for row in rows:
            whole.submit(row)
        while not whole.is_idle:
            whole.step()
    assert [row.finish for row in rows] == ["length", "failed", "length"]
    assert str(rows[1].failure) == "no draw"


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-30, 1e-5])
def test_hardly_any_temperature_takes_the_most_probable(temperature: float) -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0, -1e30])
    generator = torch.Generator().manual_seed(0)
    assert choose_token(logits_V, Sampling(temperature), generator) == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "stranger.example"}, 403),
        ({"host": "stranger.example:8000"}, 403),
        ({"host": "localhost.stranger.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "https://stranger.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
    ],
    ids=range(9),
)
def test_a_strangers_page_in_a_browser_here_asks_nothing(
    url: str, headers: dict[str, str], status: int
) -> None:
    for answer in (
        httpx.get(f"{url}/v1/models", headers=headers),
        httpx.post(f"{url}/v1/completions", json=BODY, headers=headers),
    ):
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers


def test_a_model_is_told_of_by_its_name(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert client.models.retrieve("global").id == "global"
        with pytest.raises(openai.NotFoundError, match="did you mean global"):
            client.models.retrieve("globl")
    assert httpx.get(f"{url}/v1/models/").status_code == 404
    wrong = httpx.put(f"{url}/v1/models")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")


def test_a_developer_speaks_as_the_system(url: str) -> None:
    said = []
    for role in ("system", "developer"):
        turns = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Who?"}]
        body = {"model": "base", "messages": turns, "max_tokens": 4, "temperature": 0}
        said.append(httpx.post(f"{url}/v1/chat/completions", json=body).json())
    assert said[0]["choices"] == said[1]["choices"]
    assert said[0]["usage"] == said[1]["usage"]


def test_metrics_are_as_prometheus_reads_them(url: str) -> None:
    httpx.post(f"{url}/v1/completions", json={**BODY, "max_tokens": 4, "stream": True})
    answer = httpx.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, float] = {}
    typed: set[str] = set()
    for line in answer.text.splitlines():
        if line.startswith("#"):
            typed.add(line.split()[2])
            continue
        match = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[^"]+"\})? (\S+)', line)
        assert match, line
        base = re.sub("_(bucket|sum|count)$", "", match[1])
        assert base in typed or match[1] in typed
        found[match[1] + (match[2] or "")] = float(match[3])
    name = "orchard_first_token_seconds"
    buckets = [value for key, value in found.items() if key.startswith(f"{name}_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found[f"{name}_count"] >= 1
    assert math.isclose(found["orchard_requests_running"] + found["orchard_requests_waiting"], 0)
