"""Run folders with chosen numbers, for what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchard.experiment.run_folder import RECIPE_FILE
from orchard.reports import build_result
from orchard.results import MetricsLog, write_json

CLIENTS = ("harbor", "hill", "</script><img src=x onerror=alert(1)>")
_LAYERS = ("layers.0", "layers.10")


def write_run(folder: Path, *, seed: int = 0, is_plain: bool = False) -> None:
    """Write a finished run of two rounds; a plain one has neither grafts nor trained experts."""
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(
        f'seed = {seed}\n[model]\npath = "orchard:tiny"\n[data]\npath = "orchard:tiny"\n'
    )
    log = MetricsLog(folder / "metrics.jsonl")
    log.append(_evaluation(0, ("base",), seed))
    for number in (1, 2):
        for place, client in enumerate(CLIENTS):
            log.append(_client(number, place, client, is_plain=is_plain))
        log.append(_round(number, is_plain=is_plain))
        log.append(_evaluation(number, ("global", "personal"), seed))
    facts = {
        "versions": {"python": "3.11"},
        "commit": None,
        "hardware": {"cpu": "a CPU"},
        "seed": seed,
        "strategy": "flex",
        "recipe_digest": "0" * 64,
        "data_digest": "1" * 64,
        "base_digest": "2" * 64,
        "shared_digest": "3" * 64,
        "test_digest": f"{seed}" * 64,
        "learning_rate": 0.01,
        "clients": {
            client: {"num_train": 10 + i, "num_test": 5} for i, client in enumerate(CLIENTS)
        },
    }
    write_json(folder / "result.json", build_result(folder, facts))


def _evaluation(number: int, models: tuple[str, ...], seed: int) -> dict[str, Any]:
    def score(place: int, model: str) -> float:
        return (1 + place + number + len(model) + seed) / 20

    return {
        "kind": "evaluation",
        "round": number,
        "seconds": 0.5,
        "clients": {
            client: {
                key: value
                for model in models
                for key, value in (
                    (f"{model}/exact_match", score(place, model)),
                    (f"{model}/loss", 3 * score(place, model)),
                )
            }
            for place, client in enumerate(CLIENTS)
        },
    }


def _client(number: int, place: int, client: str, *, is_plain: bool) -> dict[str, Any]:
    line: dict[str, Any] = {
        "kind": "client",
        "round": number,
        "client": client,
        "client/train_loss": 2.0 - number / 4 - place / 8,
        "client/train_seconds": 0.25,
    }
    for depth, layer in enumerate(() if is_plain else _LAYERS):
        line |= {
            f"client/graft_expert_{layer}": float(place),
            f"client/graft_loss_{layer}": 0.25 + depth / 4,
            f"client/graft_loss_second_{layer}": 0.75,
            f"client/graft_loss_none_{layer}": 1.0,
            f"client/gate_mean_{layer}": 0.1 * (1 + place + depth),
            f"client/active_share_{layer}": 0.25 * number,
        }
    return line


def _round(number: int, *, is_plain: bool) -> dict[str, Any]:
    since = {layer: [0, number - 1, number] for layer in _LAYERS}
    return {
        "kind": "round",
        "round": number,
        "round/train_loss": 2.0 - number / 4,
        "round/num_dropped_out": 0,
        "round/seconds": 2.0,
        "round/prepare_seconds": 0.25,
        "round/train_seconds": 0.75,
        "round/evaluation_seconds": 0.75,
        "round/overhead_seconds": 0.25,
        "round/uplink_bytes": 1000 * number,
        "round/downlink_bytes": 3000,
        "round/peak_memory_bytes": 10**8,
        **({} if is_plain else {"rounds_since_sent": since}),
    }
