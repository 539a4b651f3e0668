"""A judge behind a real HTTP server: both orders, garbage, silence, floods and a cut."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchard.cli import app
from orchard.personal.judge_endpoint import KEY_VARIABLE, Endpoint, EndpointError
from orchard.personal.judging import read_questions, read_verdict, settle, tally

NUM_QUESTIONS = 3


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question_id": n, "turns": [f"Greet Mila {n}"]} for n in range(NUM_QUESTIONS)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


class Judge(BaseHTTPRequestHandler):
    """Answers each request by the server's own function."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((dict(self.headers), json.loads(body)))  # type: ignore[attr-defined]
        try:
            self.server.answer(self)  # type: ignore[attr-defined]
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        return

    def say(self, text: str) -> None:
        self.raw(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def raw(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(
    answer: Callable[[Judge], None],
) -> Iterator[tuple[str, list[tuple[dict[str, str], dict]]]]:  # type: ignore[type-arg]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads = True
    server.answer, server.seen = answer, []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server.seen  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def call(run: Path, questions: Path, url: str, out: Path, *more: object) -> tuple[int, str, str]:
    words = ("judge", run, "--client", "harbor", "--questions", questions, "--endpoint", url)
    words += ("--judge", "j", "--out", out, "--max-new-tokens", 4, "--retries", 0, *more)
    found = CliRunner().invoke(app, [str(word) for word in words])
    return found.exit_code, found.stdout, found.stderr


def test_a_judge_that_prefers_the_first_position_sees_only_ties(
    run: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    out = tmp_path / "out.json"
    with serving(lambda judge: judge.say("VERDICT: A")) as (url, seen):
        code, said, error = call(run, questions, url, out)
        assert (code, error) == (0, "")
        assert f"0 won, {NUM_QUESTIONS} tied, 0 lost, 0 not scored (0 malformed" in said
        assert "no difference seen" in said
        assert len(seen) == 2 * NUM_QUESTIONS
        assert all(headers["Authorization"] == "Bearer s3cret" for headers, _ in seen)
        # The second judgment of a question has the answers in the other order.
        texts = [body["messages"][1]["content"] for _, body in seen[:2]]
        answers = [re.findall(r"\[Answer [AB]\]\n(.*?)\n\[End", text, re.DOTALL) for text in texts]
        assert answers[0] == answers[1][::-1]
        before = out.read_bytes()
        assert call(run, questions, url, out)[0] == 0
        assert len(seen) == 2 * NUM_QUESTIONS
    assert out.read_bytes() == before
    assert b"s3cret" not in before
    assert out.stat().st_mode & 0o077 == 0


def test_a_judge_that_prefers_one_answer_decides(
    run: Path, questions: Path, tmp_path: Path
) -> None:
    firsts: list[str] = []

    def prefer(judge: Judge) -> None:
        _, body = judge.server.seen[-1]  # type: ignore[attr-defined]
        text = body["messages"][1]["content"]
        first, second = re.findall(r"\[Answer [AB]\]\n(.*?)\n\[End", text, re.DOTALL)
        firsts.append(first)
        judge.say(f"VERDICT: {'A' if first > second else 'B' if second > first else 'TIE'}")

    with serving(prefer) as (url, _):
        code, said, _ = call(run, questions, url, tmp_path / "out.json")
    assert code == 0
    record = json.loads((tmp_path / "out.json").read_text())
    own, other = record["answers"]["a"], record["answers"]["b"]
    result = record["result"]
    assert result["win"] == sum(own[key] > other[key] for key in own)
    assert result["loss"] == sum(own[key] < other[key] for key in own)
    assert result["win"] + result["loss"] > 0
    assert f"{result['win']} won" in said


def test_garbage_is_counted_and_not_scored(run: Path, questions: Path, tmp_path: Path) -> None:
    said = iter(
        [
            lambda judge: judge.say("Both are nice."),
            lambda judge: judge.say("VERDICT: A"),
            lambda judge: judge.raw(b"<html>"),
            lambda judge: judge.raw(b'{"choices": []}'),
            lambda judge: judge.raw(b"[" * 100_000),
            lambda judge: judge.say("VERDICT: A or VERDICT: B"),
        ]
    )
    with serving(lambda judge: next(said)(judge)) as (url, _):
        code, told, _ = call(run, questions, url, tmp_path / "out.json")
    assert code == 0
    assert "0 won, 0 tied, 0 lost, 3 not scored (5 malformed judgments)" in told
    assert json.loads((tmp_path / "out.json").read_text())["result"]["lead"] is None


def test_a_judge_that_dies_midway_is_gone_on_with(
    run: Path, questions: Path, tmp_path: Path
) -> None:
    out, left = tmp_path / "out.json", [3]

    def die(judge: Judge) -> None:
        left[0] -= 1
        if left[0] < 0:
            judge.raw(b"", status=503)
        else:
            judge.say("VERDICT: TIE")

    with serving(die) as (url, seen):
        code, _, error = call(run, questions, url, out)
        assert code == 1
        assert "must answer within 120 s, got status 503 after 1 tries; what was judged" in error
        left[0] = 100
        first = len(seen)
        code, said, _ = call(run, questions, url, out)
        assert (code, len(seen) - first) == (0, 2 * NUM_QUESTIONS - 3)
        assert f"{NUM_QUESTIONS} tied" in said
        code, _, error = call(run, questions, url, out, "--max-new-tokens", 5)
        assert code == 1
        assert "--out must be a new file or one of the same comparison" in error
    with serving(lambda judge: judge.raw(b"", status=401)) as (url, _):
        code, _, error = call(run, questions, url, tmp_path / "other.json")
        assert code == 1
        assert "got status 401; check its path" in error


def flood(judge: Judge) -> None:
    judge.send_response(200)
    judge.send_header("Content-Length", str(1 << 30))
    judge.end_headers()
    for _ in range(1 << 10):
        judge.wfile.write(bytes(1 << 20))
        judge.server.sent += 1  # type: ignore[attr-defined]


def test_a_gigabyte_is_not_read() -> None:
    sent = 0

    def counted(judge: Judge) -> None:
        nonlocal sent
        judge.server.sent = 0  # type: ignore[attr-defined]
        try:
            flood(judge)
        finally:
            sent = judge.server.sent  # type: ignore[attr-defined]

    with serving(counted) as (url, _):
        assert Endpoint(url, "j", retries=0).ask("s", "u") is None
    assert sent < 64


def drip(judge: Judge) -> None:
    judge.send_response(200)
    judge.end_headers()
    for _ in range(200):
        judge.wfile.write(b" ")
        judge.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [drip, lambda judge: time.sleep(3)])
def test_a_slow_judge_is_left_after_its_time_and_tries(answer: Callable[[Judge], None]) -> None:
    with serving(answer) as (url, seen):
        started = time.monotonic()
        with pytest.raises(EndpointError, match=r"^--endpoint must answer within 0.4 s, got .* 2 "):
            Endpoint(url, "j", timeout_seconds=0.4, retries=1, wait_seconds=0.01).ask("s", "u")
        assert time.monotonic() - started < 2.5
        assert len(seen) == 2


def test_a_redirect_is_not_followed_and_a_broken_response_is_tried_again() -> None:
    def redirect(judge: Judge) -> None:
        judge.send_response(302)
        judge.send_header("Location", "/elsewhere")
        judge.send_header("Content-Length", "0")
        judge.end_headers()

    with serving(redirect) as (url, seen):
        with pytest.raises(EndpointError, match="status 302"):
            Endpoint(url, "j", retries=2).ask("s", "u")
        assert len(seen) == 1

    def cut(judge: Judge) -> None:
        if len(judge.server.seen) > 1:  # type: ignore[attr-defined]
            judge.say("VERDICT: B")
            return
        judge.send_response(200)
        judge.send_header("Content-Length", "100")
        judge.end_headers()
        judge.wfile.write(b'{"choices"')
        judge.close_connection = True

    with serving(cut) as (url, seen):
        assert Endpoint(url, "j", wait_seconds=0.01).ask("s", "u") == "VERDICT: B"
        assert len(seen) == 2


@pytest.mark.parametrize(
    "url", ["ftp://a/v1", "a/v1", "http://", "http://me:key@127.0.0.1/v1", "http://a:b/v1"]
)
def test_an_endpoint_is_a_url_without_a_key(url: str) -> None:
    with pytest.raises(ValueError, match="--endpoint must be a URL") as caught:
        Endpoint(url, "j")
    assert "key@" not in str(caught.value)


def test_a_key_does_not_cross_a_network_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    Endpoint("http://judge.invalid/v1", "j")
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    Endpoint("https://judge.invalid/v1", "j")
    with pytest.raises(ValueError, match="must be https") as caught:
        Endpoint("http://judge.invalid/v1", "j")
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(Endpoint("http://127.0.0.1/v1", "j"))


def test_verdicts_and_what_two_of_them_make() -> None:
    assert [read_verdict("VERDICT: A", order) for order in ("ab", "ba")] == ["a", "b"]
    assert read_verdict("verdict a", "ab") == read_verdict(None, "ab") == "malformed"
    assert read_verdict("I say.\nVERDICT: TIE", "ba") == "tie"
    assert settle("a", "a") == "a"
    assert settle("a", "b") == settle("a", "tie") == settle("tie", "tie") == "tie"
    assert settle("a", "malformed") == "malformed"


def test_a_lead_has_an_interval_over_questions() -> None:
    found = tally(["a"] * 30 + ["b"] * 10 + ["tie"] * 20 + ["malformed"] * 5, num_malformed=7)
    assert (found["win"], found["tie"], found["loss"]) == (30, 20, 10)
    assert (found["not_scored"], found["malformed"]) == (5, 7)
    assert found["lead"] == pytest.approx(20 / 60)
    deviation = ((40 - 60 / 9) / 60 / 60) ** 0.5
    assert found["low"] == pytest.approx(1 / 3 - 1.96 * deviation, abs=0.02)
    assert found["high"] == pytest.approx(1 / 3 + 1.96 * deviation, abs=0.02)
    assert tally(["a"] * 4, num_malformed=0)["low"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1}\n', "must have turns or question"),
        ('{"question": "a", "question_id": 1}\n' * 2, "ids that differ, got 1 twice"),
        ("", "ids that differ, got none"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_questions(path)
