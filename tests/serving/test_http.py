"""OpenAI's own client against a server over a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from orchard.serving.protocol import MAX_BODY_BYTES
from orchard.serving.registry import Source
from orchard.serving.running import make_server, read_keys
from tests.federations import quick_recipe, run_quickly
from tests.served_runs import serving

ALL, ONE = "k" * 16, "o" * 16


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    folder = tmp_path_factory.mktemp("served")
    recipe = quick_recipe("flex")
    run_quickly(folder / "run", recipe)
    names = sorted(path.name for path in (folder / "run" / "clients").iterdir())
    (folder / "keys").write_text(f"# two keys\n{ALL}\n{ONE} base {names[0]}\n")
    (folder / "keys").chmod(0o600)
    with serving([folder / "run"], key_file=folder / "keys") as url:
        yield url, names


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

    def fail(self: object, name: str, *, keep: object) -> None:
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
        ({"n": 1000}, 400, "n must be"),
        ({"prompt": ["a"] * 64, "n": 8}, 400, "n times the number of prompts"),
        ({"logprobs": 21}, 400, "logprobs must be in 0..20"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias must be left out"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty must be left out"),
        ({"tempreature": 1}, 400, "unknown field `tempreature`"),
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


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"model": "base", "prompt": "a", "temperature": NaN}',
        b'{"model": "base", "prompt": "a", "temperature": 1e999}',
        b'{"model": "base", "prompt": "a", "seed": 1e30}',
        b'{"model": "base", "prompt": "a", "prompt": "b"}',
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "base", "prompt": ' + b"[" * 60_000 + b"]" * 60_000 + b"}",
        b'{"model": "base", "prompt": "a", "user": ' + b"[" * 60_000 + b"]" * 60_000 + b"}",
        b'{"model": "base", "prompt": "a", "other": ' + b'{"a":' * 60_000 + b"1" + b"}" * 60_001,
    ],
    ids=range(12),
)
def test_a_body_that_is_none_gets_a_reason(address: tuple[str, list[str]], content: bytes) -> None:
    head = {"authorization": f"Bearer {ALL}"}
    answer = httpx.post(f"{address[0]}/v1/completions", content=content, headers=head)
    assert answer.status_code == 400
    assert "the body must be JSON" in answer.json()["error"]["message"]


def test_a_body_of_100_mb_gets_a_reason(address: tuple[str, list[str]]) -> None:
    url, _ = address
    part = b" " * 2**20
    for key, status in ((ALL, 413), ("w" * 16, 401)):
        head = {"authorization": f"Bearer {key}"}
        parts = (part for _ in range(100))
        answer = httpx.post(f"{url}/v1/completions", content=parts, headers=head)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    missing = httpx.post(f"{url}/v1/other", json={})
    assert (missing.status_code, "error" in missing.json()) == (404, True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"top_logprobs": 3}, "top_logprobs must come with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be in 0..20"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs must be in 0..20"),
        ({"messages": []}, "messages must end with one of the user"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "messages must end with"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "parts of the type text",
        ),
        ({"tools": [{"type": "function"}]}, "tools must be left out"),
    ],
)
def test_bad_chats_get_a_reason(
    address: tuple[str, list[str]], changes: dict[str, object], says: str
) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "a"}], **changes}
    head = {"authorization": f"Bearer {ALL}"}
    answer = httpx.post(f"{address[0]}/v1/chat/completions", json=body, headers=head)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_a_key_file_is_its_owners_alone_and_names_what_is_served(
    address: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{ALL} bose\n")
    keys.chmod(0o640)
    with pytest.raises(ValueError, match=r"must be readable by its owner alone, got mode 640"):
        read_keys(keys)
    keys.chmod(0o600)
    assert read_keys(keys) == {ALL: frozenset({"bose"})}
    monkeypatch.setattr("orchard.serving.running.find_sources", lambda folders: {"base": Source()})
    with pytest.raises(ValueError, match="must name models that are served, got bose"):
        make_server(
            [tmp_path], host="127.0.0.1", port=1, key_file=keys, max_models=1, is_insecure=False
        )


def test_another_address_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--api-key-file must be given"):
        make_server(
            [tmp_path], host="0.0.0.0", port=1, key_file=None, max_models=1, is_insecure=False
        )
    with pytest.raises(FileNotFoundError, match=r"must be a folder with a recipe\.toml"):  # next
        make_server(
            [tmp_path], host="0.0.0.0", port=1, key_file=None, max_models=1, is_insecure=True
        )
