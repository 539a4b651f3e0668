"""A new federated method in one file: clients send only the layers that moved most.

A method changes one of the five answers of ``Strategy``, here ``weigh``: what a client sends. The
server needs no change: a name that nobody sent keeps its value. Run with python, no arguments.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.engine.progress import Silent
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import run_experiment
from orchard.recipe.reading import read_recipe
from orchard.strategies.strategy import Contribution, Strategy, Trained
from orchard.trees import select, squared_norm

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny" / "fedavg.toml"
QUICK = ("server.rounds=2", "evaluation.models=global", "evaluation.metrics=loss")


def send_most_moved(strategy: Strategy, *, num_layers: int) -> Strategy:
    """Let each client of ``strategy`` send the ``num_layers`` layers with the longest deltas."""

    def weigh(client: Client, task: Task, trained: Trained) -> Contribution:
        sent = strategy.weigh(client, task, trained)
        layers: dict[str, list[str]] = {}
        for name in sent.delta:  # such as layers.3.self_attn.q_proj.lora_A
            layers.setdefault(".".join(name.split(".")[:2]), []).append(name)
        moved = sorted(layers.values(), key=lambda names: squared_norm(select(sent.delta, names)))
        kept = [name for names in moved[-num_layers:] for name in names]
        weight = {name: sent.weight[name] for name in kept}
        return replace(sent, delta=select(sent.delta, kept), weight=weight)

    return replace(strategy, weigh=weigh)


experiment = prepare_experiment(read_recipe(RECIPE, QUICK).recipe)
fedavg = build_strategy(experiment.recipe, num_clients=len(experiment.train))
for count in (4, 1):
    with tempfile.TemporaryDirectory() as folder:
        mine = send_most_moved(fedavg, num_layers=count)
        result = run_experiment(experiment, folder=Path(folder), reporter=Silent(), strategy=mine)
    uplink, loss = result["uplink_bytes_per_round"][-1], result["summary"]["global"]["loss"]["mean"]
    print(f"{count} of 4 layers: {uplink:,} bytes a round, loss {loss:.3f}")
