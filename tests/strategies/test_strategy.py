"""One client's turn, whatever the method."""

from __future__ import annotations

from pathlib import Path

from federations import build, quick_recipe
from orchard.communication.messages import LocalSettings, Task
from orchard.strategies.strategy import start_server, train_client


def test_the_local_model_is_evaluated_where_the_task_asks_for_it(tmp_path: Path) -> None:
    strategy, clients, model, _ = build(quick_recipe("fedavg", "evaluation.metrics=loss"), tmp_path)
    shared, settings = start_server(strategy, model.fresh).shared, LocalSettings(1, 0, 1e-3)
    for is_asked in (False, True):
        task = Task(1, shared, settings, evaluate_local=is_asked)
        metrics = train_client(strategy, clients[0], task).metrics
        assert ("local/loss" in metrics) == is_asked
        assert ("client/evaluation_seconds" in metrics) == is_asked
