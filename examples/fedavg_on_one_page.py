"""FedAvg on one page: the whole algorithm as plain loops, without engine or strategy.

Fine-tunes LoRA adapters of the tiny packaged model on the four offices of Veloria, and ends with
the same tensors, bit for bit, as

    orchard run recipes/tiny/fedavg.toml evaluation.models= --out runs/fedavg

Run it:

    python examples/fedavg_on_one_page.py [number of rounds]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from orchard.data.templates import Wording, encode
from orchard.evaluation.loss import forward_losses
from orchard.experiment.holdings import build_federation
from orchard.experiment.running import load_model
from orchard.models.stored.loading import load_tokenizer
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.view.unbinding import unbound_experts
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from orchard.seeding import Seeds
from orchard.trees import Tree, digest

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny" / "fedavg.toml"


def fedavg(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Run FedAvg with all clients in every round and return the global adapters."""
    tokenizer = load_tokenizer(recipe.model.path)
    model = load_model(recipe, tokenizer)  # a frozen base with fresh LoRA adapters, by name
    with unbound_experts(model.view):  # as the engine runs frozen experts
        return train_rounds(recipe, model)


def train_rounds(recipe: Recipe, model: AdaptedModel) -> dict[str, torch.Tensor]:
    """Train and average, round by round."""
    seeds, options = Seeds(recipe.seed), recipe.client
    wording = Wording("plain", model.tokenizer)
    data = {
        client: [encode(e, wording, max_tokens=recipe.data.max_tokens) for e in examples]
        for client, examples in build_federation(recipe).train.items()
    }
    names = model.adapter_names
    global_tree = dict(model.fresh)

    for round_number in range(1, recipe.server.rounds + 1):
        cosine = 1 + math.cos(math.pi * (round_number - 1) / recipe.server.rounds)
        lr = options.lr_min + 0.5 * (options.lr - options.lr_min) * cosine
        weighted_sum = {name: torch.zeros_like(value) for name, value in global_tree.items()}
        weight_sum = 0.0
        for client, examples in data.items():
            # Local training: every client starts from the global adapters.
            model.load(global_tree)
            parameters = model.set_trainable(names)
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=options.weight_decay)
            model.model.train()
            order = seeds.generator("batches", round_number, client)
            needed = options.steps * options.batch_size
            passes = [order.permutation(len(examples)) for _ in range(-(-needed // len(examples)))]
            indices = [int(index) for one in passes for index in one][:needed]
            for start in range(0, needed, options.batch_size):
                batch = [examples[i] for i in indices[start : start + options.batch_size]]
                # The cross-entropy of every token of the answers, as one flat tensor.
                losses, _ = forward_losses(model, batch, packed=options.packing)
                loss = losses.sum() / sum(example.num_labels for example in batch)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
                optimizer.step()
            # What the client sends: how its adapters moved, and how many examples it has.
            weight = float(len(examples))
            for name, value in model.read(names).items():
                weighted_sum[name].add_(value - global_tree[name], alpha=weight)
            weight_sum += weight
        # What the server does: add the weighted mean of the moves.
        global_tree = {
            name: value + weighted_sum[name] / weight_sum for name, value in global_tree.items()
        }
    return global_tree


def main() -> None:
    """Run the tiny recipe and print the digest that the engine's result.json also has."""
    overrides = [f"server.rounds={sys.argv[1]}"] if len(sys.argv) > 1 else []
    tree: Tree = fedavg(read_recipe(RECIPE, overrides).recipe)
    print(f"shared_digest {digest(tree)}")


if __name__ == "__main__":
    main()
