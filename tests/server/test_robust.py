from __future__ import annotations

import pytest
import torch

from orchard.communication.messages import Update
from orchard.server.robust import KERNELS, RobustSettings, robust_aggregate

HONEST, HOSTILE = 8, 2


def update(number: int, values: dict[str, torch.Tensor], weight: float = 1.0) -> Update:
    return Update(f"client {number}", 1, values, dict.fromkeys(values, weight))


def honest_updates(generator: torch.Generator) -> list[Update]:
    truth = torch.linspace(-1, 1, 24).reshape(4, 6)
    return [
        update(n, {"a": truth + 0.1 * torch.randn(4, 6, generator=generator), "b": truth[0]})
        for n in range(HONEST)
    ]


def reduce(kernel: str, updates: list[Update], **options: float) -> dict[str, torch.Tensor]:
    return dict(robust_aggregate(RobustSettings(kernel, **options))(iter(updates), {}))


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_updates_reduce_to_themselves(kernel: str) -> None:
    value = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    reduced = reduce(kernel, [update(n, {"a": value}) for n in range(5)])
    torch.testing.assert_close(reduced["a"], value)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_order_of_clients_does_not_matter(kernel: str) -> None:
    updates = honest_updates(torch.Generator().manual_seed(0))
    torch.testing.assert_close(reduce(kernel, updates), reduce(kernel, updates[::-1]))


@pytest.mark.parametrize("attack", [lambda t: -10 * t, lambda t: 1e6 * torch.ones_like(t)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fifth_of_the_clients_cannot_steer_it(kernel: str, attack: object) -> None:
    updates = honest_updates(torch.Generator().manual_seed(0))
    clean = reduce(kernel, updates)["a"]
    bad = [
        update(HONEST + n, {k: attack(v) for k, v in updates[n].delta.items()}, weight=1.0)  # type: ignore[operator]
        for n in range(HOSTILE)
    ]
    attacked = reduce(kernel, [*updates, *bad])["a"]
    # Clipping bounds each hostile step to that of an honest client; the others leave them out.
    bound = 0.6 if kernel == "clipped_mean" else 0.15
    assert float((attacked - clean).abs().max()) < bound
    plain = torch.stack([u.delta["a"] for u in (*updates, *bad)]).mean(dim=0)
    assert float((plain - clean).abs().max()) > 2 * bound


def test_the_median_is_the_middle_and_of_an_even_number_the_mean_of_two() -> None:
    values = [torch.tensor([v, -v]) for v in (5.0, 1.0, 100.0)]
    odd = reduce("median", [update(n, {"a": v}) for n, v in enumerate(values)])
    assert odd["a"].tolist() == [5.0, -5.0]
    values.append(torch.tensor([7.0, -7.0]))
    even = reduce("median", [update(n, {"a": v}) for n, v in enumerate(values)])
    assert even["a"].tolist() == [6.0, -6.0]


def test_the_trimmed_mean_drops_each_end() -> None:
    updates = [
        update(n, {"a": torch.tensor([v])}) for n, v in enumerate((9.0, 1.0, 2.0, 3.0, -8.0))
    ]
    assert reduce("trimmed_mean", updates, trim=0.2)["a"].item() == 2.0
    # At least one at each end, and never all.
    assert reduce("trimmed_mean", updates, trim=0.01)["a"].item() == 2.0
    assert reduce("trimmed_mean", updates, trim=0.49)["a"].item() == 2.0


def test_clipping_scales_whole_updates_and_keeps_weights() -> None:
    updates = [
        update(0, {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, weight=2.0),
        update(1, {"a": torch.tensor([0.6]), "b": torch.tensor([0.8])}),
        update(2, {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])}),
    ]
    reduced = reduce("clipped_mean", updates, max_norm=1.0)
    assert reduced["a"].item() == pytest.approx((2 * 0.6 + 0.6) / 4)
    assert reduced["b"].item() == pytest.approx((2 * 0.8 + 0.8) / 4)
    # Nothing is scaled up to the norm.
    reduced = reduce("clipped_mean", updates, max_norm=20.0)
    assert reduced["a"].item() == pytest.approx((2 * 3.0 + 0.6) / 4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_name_of_two_clients_keeps_its_value(kernel: str) -> None:
    value = torch.ones(2)
    updates = [update(n, {"a": value} | ({"b": value} if n < 2 else {})) for n in range(4)]
    assert reduce(kernel, updates).keys() == {"a"}
    # A weight of 0 is no contribution.
    updates = [update(n, {"a": value}, weight=float(n > 1)) for n in range(4)]
    with pytest.raises(ValueError, match="at least 3 clients"):
        reduce(kernel, updates)


def test_distances_compare_clients_with_other_experts() -> None:
    value = torch.ones(4)
    updates = [update(n, {"a": value, f"e{n}": value}) for n in range(4)]
    updates.append(update(4, {"a": 50 * value, "e4": value}))
    assert reduce("krum", updates)["a"].tolist() == [1.0] * 4


def test_krum_looks_at_all_neighbors_but_the_hostile_and_two() -> None:
    # A score has the 3 nearest of the 6 others. That of 13 has 12, 7 and the hostile 20, the sum
    # of whose squares is 86; 12 has 90 and stays out. With one neighbor more or less, or with
    # itself as one, another client would.
    places = (0.0, 1.0, 2.0, 7.0, 12.0, 13.0, 20.0)
    updates = [update(n, {"a": torch.tensor([place])}) for n, place in enumerate(places)]
    reduced = reduce("krum", updates, trim=0.3)["a"].item()
    assert reduced == pytest.approx((0 + 1 + 2 + 7 + 13) / 5)


def test_of_an_even_number_at_most_the_smaller_half_is_left_out() -> None:
    updates = [update(n, {"a": torch.tensor([v])}) for n, v in enumerate((0.0, 1.0, 5.0, 90.0))]
    assert reduce("krum", updates, trim=0.5)["a"].item() == 2.0
    assert reduce("trimmed_mean", updates, trim=0.5)["a"].item() == 3.0
