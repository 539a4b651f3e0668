"""Scores of tokens in OpenAI's shapes, and what a reader of an answer sees of it."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from orchard.models.stored.loading import load_base, load_tokenizer
from orchard.personal.writing import StopTexts
from orchard.serving.engine import Row
from orchard.serving.text import Answer, Piece
from orchard.serving.values import RowValues
from tests.federations import quick_recipe, run_quickly, short_model
from tests.served_runs import serving

ASKED: Any = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("scored")
    run_quickly(folder / "run", quick_recipe("fedavg"))
    with pytest.MonkeyPatch.context() as patch:
        # Answers are as long as is asked: so short a model soon says that it has ended.
        patch.setattr("orchard.serving.running.end_ids", lambda recipe, wording: ())
        with serving([folder / "run"]) as address:
            yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_scores_of_a_chat_are_the_same_streamed_and_not(client: openai.OpenAI) -> None:
    options: Any = {
        "model": "global",
        "messages": ASKED,
        "max_tokens": 9,
        "temperature": 0.9,
        "seed": 4,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.content
    for token in whole.logprobs.content:
        assert token.logprob <= 0
        best = [one.logprob for one in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert len(best) == 3
        assert best[0] >= token.logprob
    parts = list(client.chat.completions.create(**options, stream=True))
    streamed = [
        token
        for part in parts
        if part.choices[0].logprobs is not None
        for token in part.choices[0].logprobs.content or ()
    ]
    assert streamed == whole.logprobs.content
    assert [part.choices[0].delta.role for part in parts].count("assistant") == 1
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.message.content
    said = b"".join(bytes(token.bytes or b"") for token in whole.logprobs.content).decode()
    assert said.replace("<|end|>", "").strip() == (whole.message.content or "").strip()
    plain = client.chat.completions.create(**{**options, "top_logprobs": None})
    assert plain.choices[0].logprobs is not None
    assert all(token.top_logprobs == [] for token in plain.choices[0].logprobs.content or ())


def test_a_harness_gets_the_scores_of_its_prompts(client: openai.OpenAI) -> None:
    """What lm_eval's local-completions asks: all prompts' scores, and one token more."""
    prompts = [[5, 6, 7, 30, 9], [40, 41], [12]]
    options: Any = {
        "model": "base",
        "prompt": prompts,
        "max_tokens": 1,
        "echo": True,
        "logprobs": 1,
        "temperature": 0,
        "seed": 1,
    }
    whole = client.completions.create(**options).choices
    model: Any = load_base(short_model(), dtype="float32").view.model
    for prompt, choice in zip(prompts, whole, strict=True):
        scores = choice.logprobs
        assert scores is not None
        assert scores.token_logprobs is not None
        assert scores.top_logprobs is not None
        assert len(scores.token_logprobs) == len(prompt) + 1
        assert scores.token_logprobs[0] is None
        with torch.inference_mode():
            logprobs = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
        for place in range(1, len(prompt)):
            wanted = float(logprobs[place - 1, prompt[place]])
            assert math.isclose(scores.token_logprobs[place], wanted, abs_tol=1e-4)
            best = float(logprobs[place - 1].max())
            assert math.isclose(max(scores.top_logprobs[place].values()), best, abs_tol=1e-4)
    streamed: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    texts = dict.fromkeys(streamed, "")
    offsets: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for part in client.completions.create(**options, stream=True):
        (choice,) = part.choices
        texts[choice.index] += choice.text
        assert choice.logprobs is not None
        streamed[choice.index] += choice.logprobs.token_logprobs or []
        offsets[choice.index] += choice.logprobs.text_offset or []
    for choice in whole:
        assert choice.logprobs is not None
        assert streamed[choice.index] == pytest.approx(choice.logprobs.token_logprobs)
        assert offsets[choice.index] == choice.logprobs.text_offset
        assert texts[choice.index] == choice.text


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_prompt_is_scored_without_a_new_token(client: openai.OpenAI, *, is_stream: bool) -> None:
    options: Any = {"model": "global", "prompt": [[5, 6, 7], [9]], "max_tokens": 0, "echo": True}
    found: dict[int, list[Any]] = {0: [], 1: []}
    usage = None
    asked = client.completions.create(**options, logprobs=0, stream=is_stream)
    for answer in asked if is_stream else [asked]:
        usage = answer.usage or usage
        for choice in answer.choices:
            assert choice.finish_reason == "length"
            assert choice.text == choice.logprobs.tokens[0] + "".join(choice.logprobs.tokens[1:])
            found[choice.index] += choice.logprobs.token_logprobs
    assert [len(scores) for scores in found.values()] == [3, 1]
    assert found[0][0] is None
    assert all(score < 0 for score in found[0][1:])
    assert is_stream or usage.completion_tokens == 0


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("phase", ["writing", "waiting"])
def test_who_hangs_up_frees_what_was_asked(url: str, *, is_stream: bool, phase: str) -> None:
    body = {
        "model": "base",
        "prompt": [5, 6, 7],
        "max_tokens": 200,
        "logprobs": 0,
        "n": 8,
        "stream": is_stream,
    }
    prompts = [[5 + number, 6] for number in range(8 if phase == "waiting" else 1)]
    asked = httpx.Request("POST", f"{url}/v1/completions", json={**body, "prompt": prompts})
    host, _, port = url.removeprefix("http://").partition(":")
    assert _running(url) == 0
    with socket.create_connection((host, int(port))) as line:
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        length = f"content-length: {len(asked.content)}"
        line.sendall(head.encode() + length.encode() + b"\r\n\r\n" + asked.content)
        _wait_until(lambda: _running(url) == 8 * len(prompts))
        written = _number(url, "orchard_tokens_written_total")
        _wait_until(lambda: _number(url, "orchard_tokens_written_total") > written)
    _wait_until(lambda: _running(url) == 0)
    # Left to itself, it would write all of its tokens.
    assert _number(url, "orchard_tokens_written_total") - written < 8 * len(prompts) * 150


def _wait_until(holds: Any) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


def _running(url: str) -> int:
    names = ("orchard_requests_waiting", "orchard_requests_running")
    return sum(_number(url, name) for name in names)


def _number(url: str, name: str) -> int:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def _read(ids: list[int], stops: tuple[str, ...], step: int) -> tuple[str, str, int]:
    """Read an answer of these tokens that comes ``step`` tokens at a time."""
    answer = Answer(load_tokenizer(short_model()), frozenset({0}), StopTexts(stops))
    row = Row(RowValues(), [1], len(ids))
    pieces: list[Piece] = []
    for start in range(0, len(ids), step):
        row.tokens += ids[start : start + step]
        row.finish = "length" if len(row.tokens) == len(ids) else ""
        piece = answer.read(row)
        pieces += [piece] if piece else []
    assert sum(len(piece.tokens) for piece in pieces) == answer.num_tokens
    return "".join(piece.text for piece in pieces), pieces[-1].finish or "", answer.num_tokens


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one two END three", ("END",), "one two "),
        ("one two EN", ("END",), "one two EN"),
        ("日本語🙂 Zürich", ("🙂",), "日本語"),
        ("aaab", ("aab",), "a"),
        ("x\n\ny", ("\n\n", "y"), "x"),
        ("🙂🙂", (), "🙂🙂"),
    ],
)
def test_an_answer_does_not_depend_on_how_far_the_engine_is_ahead(
    text: str, stops: tuple[str, ...], kept: str
) -> None:
    ids = load_tokenizer(short_model())(text)["input_ids"]
    found = {_read(ids, stops, step) for step in (1, 2, 3, len(ids))}
    assert len(found) == 1
    said, finish, _ = found.pop()
    assert said == kept
    assert finish == ("stop" if kept != text else "length")


def test_a_seed_gives_one_text_whatever_else_is_asked(client: openai.OpenAI) -> None:
    alone = {
        seed: client.completions.create(
            model="global", prompt="The office", max_tokens=12, temperature=3.0, seed=seed
        )
        .choices[0]
        .text
        for seed in range(3)
    }
    prompts = ["The office", "Who", "The mill is old and", "The office"]
    for seed, text in alone.items():
        among = client.completions.create(
            model="global", prompt=prompts, max_tokens=12, temperature=3.0, seed=seed, n=2
        ).choices
        assert among[0].text == text
        assert among[6].text == text
    assert len(set(alone.values())) > 1
