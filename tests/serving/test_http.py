"""OpenAI's own client against a server over a run."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from orchard.serving.protocol import MAX_BODY_BYTES
from orchard.serving.running import make_server
from tests.federations import quick_recipe, run_quickly

ALL, ONE = "k" * 16, "o" * 16


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    folder = tmp_path_factory.mktemp("served")
    recipe = quick_recipe("flex")
    run_quickly(folder / "run", recipe)
    names = sorted(path.name for path in (folder / "run" / "clients").iterdir())
    (folder / "keys").write_text(f"# two keys\n{ALL}\n{ONE} base {names[0]}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = make_server(
        [folder / "run"],
        host="127.0.0.1",
        port=port,
        key_file=folder / "keys",
        max_models=2,
        is_insecure=False,
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}", names
    server.should_exit = True
    thread.join()


def test_the_official_client_gets_the_same_answer_streamed_and_not(
    address: tuple[str, list[str]],
) -> None:
    url, names = address
    with openai.OpenAI(base_url=f"{url}/v1", api_key=ALL, max_retries=0) as client:
        assert {m.id for m in client.models.list()} == {"base", "global", *names}
        for model in ("base", "global", *names):
            whole = client.completions.create(
                model=model, prompt="The office", max_tokens=8, temperature=0.8, seed=3
            )
            parts = client.completions.create(
                model=model, prompt="The office", max_tokens=8, temperature=0.8, seed=3, stream=True
            )
            assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
            assert whole.usage is not None
            assert 1 <= whole.usage.completion_tokens <= 8
        asked = [{"role": "user", "content": "Who?"}]
        said = client.chat.completions.create(
            model=names[0],
            messages=asked,
            max_tokens=6,
            temperature=0,
            n=2,  # type: ignore[arg-type]
        )
        streamed = client.chat.completions.create(
            model=names[0],
            messages=asked,
            max_tokens=6,
            temperature=0,
            stream=True,  # type: ignore[call-overload]
        )
        text = "".join(part.choices[0].delta.content or "" for part in streamed)
        assert [choice.message.content for choice in said.choices] == [text, text]
        scored = (
            client.completions.create(
                model="base", prompt=[5, 6, 7], max_tokens=1, echo=True, logprobs=1, temperature=0
            )
            .choices[0]
            .logprobs
        )
        assert scored is not None
        assert scored.token_logprobs is not None
        assert scored.token_logprobs[0] is None
        assert len(scored.token_logprobs) == 4
        assert all(value < 0 for value in scored.token_logprobs[1:] if value is not None)


def test_a_stream_ends_with_its_usage_where_asked(address: tuple[str, list[str]]) -> None:
    with openai.OpenAI(base_url=f"{address[0]}/v1", api_key=ALL, max_retries=0) as client:
        asked = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 3, "seed": 1}
        whole = client.completions.create(**asked)  # type: ignore[call-overload]
        parts = list(
            client.completions.create(  # type: ignore[call-overload]
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert all(part.usage is None for part in parts[:-1])


def test_a_full_queue_is_refused_and_a_failure_tells_a_stranger_nothing(
    address: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"authorization": f"Bearer {ALL}"}
    body = {"model": "base", "prompt": [5], "max_tokens": 1}

    def ask() -> httpx.Response:
        return httpx.post(f"{address[0]}/v1/completions", json=body, headers=head)

    with monkeypatch.context() as patch:
        patch.setattr("orchard.serving.worker.Worker.submit", lambda self, jobs: False)
        full = ask()
    assert full.status_code == 429
    assert full.json()["error"]["type"] == "rate_limit_error"

    def fail(self: object, name: str) -> None:
        raise ValueError("inner/path must be whole")

    with monkeypatch.context() as patch:
        patch.setattr("orchard.serving.registry.Registry.values", fail)
        failed = ask()
    assert failed.status_code == 500
    assert "inner" not in failed.text
    assert ask().status_code == 200


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"model": "bose"}, 404, "did you mean base"),
        ({"temperature": -1}, 400, "temperature must be 0 or more"),
        ({"stop": ["x"] * 10_000}, 400, "stop must be"),
        ({"prompt": [5] * 5000}, 400, "prompt and max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens must be"),
        ({"n": 0}, 400, "n must be"),
        ({"prompt": [10**6]}, 400, "tokens must be in"),
        ({"prompt": 7}, 400, "the body must be JSON"),
    ],
)
def test_bad_requests_get_a_status_and_a_reason(
    address: tuple[str, list[str]], changes: dict[str, object], status: int, says: str
) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 1, **changes}
    head = {"authorization": f"Bearer {ALL}"}
    answer = httpx.post(f"{address[0]}/v1/completions", json=body, headers=head)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_keys_bound_what_is_seen_and_bodies_are_bounded(address: tuple[str, list[str]]) -> None:
    url, names = address
    head = {"authorization": f"Bearer {ONE}"}
    listed = httpx.get(f"{url}/v1/models", headers=head).json()["data"]
    assert [model["id"] for model in listed] == ["base", names[0]]
    body = {"model": names[1], "prompt": "a"}
    hidden = httpx.post(f"{url}/v1/completions", json=body, headers=head)
    assert hidden.status_code == 404
    assert f"did you mean {names[1]}" not in hidden.text
    assert httpx.get(f"{url}/v1/models").status_code == 401
    large = httpx.post(f"{url}/v1/completions", content=b" " * (MAX_BODY_BYTES + 1), headers=head)
    assert large.status_code == 413
    broken = httpx.post(f"{url}/v1/completions", content=b"{", headers=head)
    assert broken.status_code == 400
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_another_address_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--api-key-file must be given"):
        make_server(
            [tmp_path], host="0.0.0.0", port=1, key_file=None, max_models=1, is_insecure=False
        )
