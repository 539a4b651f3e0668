"""A chat that is served is worded, and answered, as the same run's model is at the command."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

import orchard
from orchard.data.turns import Turn
from orchard.personal.state import find_models
from tests.federations import quick_recipe, run_quickly
from tests.served_runs import serving

SAID = [("user", "Greet Mila"), ("assistant", "Good day"), ("user", "Greet Ivo")]


@pytest.mark.parametrize("template", ["plain", pytest.param("alpaca", marks=pytest.mark.long)])
def test_a_conversation_has_one_answer_over_http_and_from_python(
    template: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_quickly(
        run,
        quick_recipe("flex", "server.rounds=1", f"data.template={template}", "data.max_tokens=160"),
    )
    client = find_models(run)[0]
    *before, (_, asked) = SAID
    history = [Turn(role, text) for role, text in before]  # type: ignore[arg-type]
    answers = {}
    with serving([run]) as url:
        for model, own in ((client, {"client": client}), ("global", {"model": "global"})):
            found = []
            for said in (SAID, SAID[-1:]):
                turns = [{"role": role, "content": text} for role, text in said]
                body = {"model": model, "messages": turns, "max_tokens": 12, "temperature": 0}
                answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
                found.append(answer["choices"][0]["message"]["content"].strip())
            with orchard.load(run, **own) as opened:  # type: ignore[call-overload]
                assert found[0] == opened.generate(asked, history=history, max_new_tokens=12)
                assert found[1] == opened.generate(asked, max_new_tokens=12)
            answers[model] = found
    assert len({text for found in answers.values() for text in found}) > 1
