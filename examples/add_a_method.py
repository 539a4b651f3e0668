"""A new federated method in one file: clients send only the layers that moved most.

A method changes one of the five answers of ``Strategy``, here ``weigh``: what a client sends. The
server needs no change: a name that nobody sent keeps its value. Run with python, no arguments.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from orchard import experiment as parts
from orchard.channels import build_channel
from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.engine.progress import Silent
from orchard.engine.simulator import simulate
from orchard.methods import build_strategy
from orchard.recipe.reading import read_recipe
from orchard.reports import build_result
from orchard.seeding import Seeds
from orchard.strategies.strategy import Contribution, Strategy, Trained, start_server
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


recipe = read_recipe(RECIPE, QUICK).recipe
data = parts.prepare_experiment(recipe)
model = parts.load_model(recipe, data.tokenizer)
channel, schedule = build_channel(recipe), parts.build_schedule(recipe)
engine = partial(simulate, schedule=schedule, channel=channel, seeds=Seeds(recipe.seed), about={})
for count in (len(model.view.layers), 1):
    with tempfile.TemporaryDirectory() as name:
        clients = parts.build_clients(data, model, Path(name))
        strategy = build_strategy(recipe, num_clients=len(clients))
        strategy = send_most_moved(strategy, num_layers=count)
        state = start_server(strategy, model.fresh)
        engine(strategy, clients, state, folder=Path(name), reporter=Silent(), title="")
        result = build_result(Path(name), {})
    uplink, loss = result["uplink_bytes_per_round"][-1], result["summary"]["global"]["loss"]["mean"]
    print(f"{count} of {len(model.view.layers)} layers: {uplink:,} bytes a round, loss {loss:.3f}")
