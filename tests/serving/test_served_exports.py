"""What was exported is served: a whole folder as it is, parts as the run that is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from orchard.export.folder import export_model
from orchard.export.importing import make_run
from orchard.export.parts import export_adapter, export_graft
from orchard.personal.state import find_models, read_state
from tests.federations import quick_recipe, run_quickly, short_model
from tests.served_runs import serving


def _answers(url: str, model: str) -> tuple[list[str], list[float]]:
    """Return texts, and the scores of prompts and answers."""
    asked: dict[str, Any] = {"model": model, "max_tokens": 8, "temperature": 0, "seed": 1}
    texts = {**asked, "prompt": [[5, 6, 7], [40, 41]], "echo": True, "logprobs": 2}
    turns = {**asked, "messages": [{"role": "user", "content": "Who?"}]}
    said: list[str] = []
    scores: list[float] = []
    for kind, body in (("completions", texts), ("chat/completions", turns)):
        answer = httpx.post(f"{url}/v1/{kind}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        for choice in answer.json()["choices"]:
            said.append(choice["text"] if "text" in choice else choice["message"]["content"])
            scores += (choice["logprobs"] or {"token_logprobs": [None]})["token_logprobs"][1:]
    assert len(scores) >= 3
    return said, scores


def _check(found: tuple[list[str], list[float]], wanted: tuple[list[str], list[float]]) -> None:
    assert found[0] == wanted[0]
    assert found[1] == pytest.approx(wanted[1], abs=1e-4, rel=0)


def test_what_is_exported_answers_as_its_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_quickly(run, quick_recipe("flex"))
    client = find_models(run)[0]
    with serving([run]) as url:
        own, shared = _answers(url, client), _answers(url, "global")
    mine, everybodys = read_state(run, client=client), read_state(run)
    export_model(mine, tmp_path / "whole")
    export_model(everybodys, tmp_path / "plain")
    export_graft(mine, tmp_path / "graft")
    export_adapter(everybodys, tmp_path / "adapter")
    for name, wanted in (("whole", own), ("plain", shared)):
        with serving([tmp_path / name]) as url:
            models = httpx.get(f"{url}/v1/models").json()["data"]
            assert [model["id"] for model in models] == [name]
            _check(_answers(url, name), wanted)
    make_run(
        [tmp_path / "adapter", tmp_path / "graft"],
        tmp_path / "made",
        model=short_model(),
        client=None,
    )
    with serving([tmp_path / "made"]) as url:
        _check(_answers(url, client), own)
        _check(_answers(url, "global"), shared)
    for part in ("graft", "adapter"):
        with pytest.raises(ValueError, match=f"{part}, which is a part of a model; make a run"):
            _never(tmp_path / part)
    with pytest.raises(ValueError, match="whole beside others; serve it by a server of its own"):
        _never(run, tmp_path / "whole")
    file = tmp_path / "whole" / "modeling_grafted.py"
    file.write_text(f"{file.read_text()}\nraise SystemExit\n")
    with pytest.raises(ValueError, match="got other code, which is not run"):
        _never(tmp_path / "whole")


def test_a_run_without_a_finished_round_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_quickly(run, quick_recipe("flex", "server.rounds=1"))
    for state in (run / "checkpoints").glob("round_*/state.json"):
        state.unlink()
    with pytest.raises(ValueError, match=r"must hold a finished round, got none; let the run"):
        _never(run)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        _never(tmp_path / "nowhere")


def _never(*folders: Path) -> None:
    with serving(folders):
        raise AssertionError("it is served")
