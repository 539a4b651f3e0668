"""On what, and in which state of the model, a client chooses its experts."""

from __future__ import annotations

from pathlib import Path

import torch

from federations import build, quick_recipe
from orchard.communication.messages import LocalSettings, Task
from orchard.strategies.session import Session, SubsetSettings
from orchard.strategies.strategy import Plan, start_server

SETTINGS = LocalSettings(2, 0, 1e-3)


def test_a_choice_for_the_round_looks_at_so_many_batches_of_different_examples(
    tmp_path: Path,
) -> None:
    strategy, clients, model, _ = build(quick_recipe("hfedmoe"), tmp_path)
    task = Task(1, start_server(strategy, model.fresh).shared, SETTINGS)
    sizes = {layer.name: layer.num_experts for layer in model.view.layers}
    client = clients[0]
    size, number = client.training.batch_size, client.num_examples
    assert number > 2 * size
    for num_batches in (2, number):
        settings = SubsetSettings(scoring_batches=num_batches)
        session = Session(client, task, Plan(shared=()), settings, sizes)
        batches = session.scoring_batches()
        # All batches are full, but the last where there are no more examples.
        assert {len(batch) for batch in batches[:-1]} == {size}
        looked_at = [id(example) for batch in batches for example in batch]
        assert len(looked_at) == len(set(looked_at)) == min(num_batches * size, number)
        assert set(looked_at) <= {id(example) for example in client.train}


def test_a_choice_for_the_run_is_made_on_the_global_values(tmp_path: Path) -> None:
    strategy, clients, model, _ = build(quick_recipe("fedmoe"), tmp_path)
    task = Task(1, start_server(strategy, model.fresh).shared, SETTINGS)
    chosen = []
    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 3.0):
        # What the model holds of another client, whose turn it was before.
        model.load(
            {n: size * torch.randn(t.shape, generator=generator) for n, t in model.fresh.items()}
        )
        with strategy.prepare(clients[0], task) as plan:
            chosen.append({n: t.tolist() for n, t in plan.memory.items() if "subset" in n})
    assert chosen[0]
    assert chosen[0] == chosen[1]
