"""A new federated method in one file: clients send only the layers that moved most.

A method changes one of the five answers of ``Strategy``, here ``weigh``: what a client sends. The
server needs no change: a name that nobody sent keeps its value. A recipe names it where this file
can be imported, ``strategy.name = "add_a_method:send_most_moved"``; run with python, without
arguments, the file passes it to ``orchard.run`` itself.
"""

import tempfile
from dataclasses import replace
from functools import partial

import orchard
from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.strategies.strategy import Contribution, Strategy, Trained
from orchard.trees import select, squared_norm


def send_most_moved(strategy: Strategy, *, num_layers: int = 1) -> Strategy:
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


if __name__ == "__main__":
    quick = {"models": "global", "metrics": "loss"}
    recipe = orchard.load_recipe("tiny/fedavg", server={"rounds": 2}, evaluation=quick)
    for count in (4, 1):
        mine = partial(send_most_moved, num_layers=count)
        with tempfile.TemporaryDirectory() as folder:
            result = orchard.run(recipe, out=folder, progress=False, strategy=mine)
        uplink = result.record["uplink_bytes_per_round"][-1]
        loss = result.summary["global"]["loss"]["mean"]
        print(f"{result.strategy}: {uplink:,} bytes a round, loss {loss:.3f}")
