"""The mean of adapters' products beside the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from federations import quick_recipe
from orchard.communication.messages import Update
from orchard.experiment.methods import build_strategy
from orchard.server.aggregation import mean
from orchard.server.lora_product import product_delta
from orchard.trees import Tree

RANK, WIDTH, HEIGHT = 3, 7, 5
A, B = "layers.0.q_proj.lora_A", "layers.0.q_proj.lora_B"
SHAPES = {A: (RANK, WIDTH), B: (HEIGHT, RANK), "norm": (4,)}


def random_values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


TREE = {**random_values(0), B: torch.zeros(HEIGHT, RANK)}


def update(client: str, values: Tree, weight: float) -> Update:
    delta = {name: value - TREE[name] for name, value in values.items()}
    return Update(client, 1, delta, dict.fromkeys(delta, weight), {})


def after(delta: Tree) -> dict[str, Tensor]:
    return {name: TREE[name].double() + value.double() for name, value in delta.items()}


def product(values: Tree) -> Tensor:
    return values[B].double() @ values[A].double()


def test_it_is_the_best_approximation_of_the_dense_mean() -> None:
    sent = {"x": (random_values(1), 1.0), "y": (random_values(2), 3.0), "z": (random_values(3), 2)}
    updates = [update(client, values, weight) for client, (values, weight) in sent.items()]
    delta = product_delta(updates, TREE)
    dense = torch.stack([w / 6 * product(values) for values, w in sent.values()]).sum(0)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    now = after(delta)
    wanted = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    torch.testing.assert_close(product(now), wanted, rtol=1e-4, atol=1e-5)
    assert delta[A].dtype == delta[B].dtype == torch.float32
    # The mean of the factors is another adapter, and a worse one.
    factors = after(mean(updates))
    assert (product(now) - dense).norm() < 0.9 * (product(factors) - dense).norm()
    torch.testing.assert_close(now["norm"], factors["norm"])


def test_equal_clients_keep_their_product() -> None:
    values = random_values(4)
    now = after(product_delta([update("x", values, 1.0), update("y", values, 5.0)], TREE))
    torch.testing.assert_close(product(now), product(values), rtol=1e-4, atol=1e-5)


def test_directions_that_nobody_uses_can_still_be_learned() -> None:
    values = random_values(5)
    values[B][:, 1:] = 0  # a product of rank 1
    now = after(product_delta([update("x", values, 1.0)], TREE))
    torch.testing.assert_close(product(now), product(values), rtol=1e-4, atol=1e-5)
    assert bool((now[A].norm(dim=1) > 0.1).all())
    still = product_delta([update("x", TREE, 1.0), update("y", TREE, 1.0)], TREE)
    assert not still[B].any()
    torch.testing.assert_close(still[A], torch.zeros_like(TREE[A]))


def test_one_factor_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an update must hold both factors of layers\.0\.q_proj"):
        product_delta([update("x", {A: TREE[A]}, 1.0)], TREE)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("server.aggregation=median",), "server.aggregation = median"),
        (("server.lr=0.5",), "server.lr = 0.5"),
        (("strategy.name=fedadam",), "fedadam in strategy.name"),
        (("strategy.name=scaffold",), "scaffold in strategy.name"),
        (("strategy.name=local",), "local in strategy.name"),
        (("strategy.kept=*.lora_B",), "strategy.kept on single factors"),
        (("model.lora_targets=q_proj,router",), "router in model.lora_targets"),
        (("privacy.secure_aggregation=true",), "privacy.secure_aggregation"),
        (("communication.dtype=int8",), r"what encoding took from factors"),
    ],
)
def test_what_acts_on_factors_is_refused_beside_it(options: tuple[str, ...], reason: str) -> None:
    recipe = quick_recipe("fedavg", "server.lora_aggregation=product", *options)
    with pytest.raises(ValueError, match=rf"lora_aggregation must be factors with {reason}"):
        build_strategy(recipe, num_clients=4)


def test_methods_with_private_parts_take_it() -> None:
    recipe = quick_recipe("flex", "server.lora_aggregation=product")
    assert build_strategy(recipe, num_clients=4).aggregate is product_delta
