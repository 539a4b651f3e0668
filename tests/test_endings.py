"""What the end of a run says of how it went."""

from __future__ import annotations

import pytest

from orchard.endings import ending_notes, graft_record


def on_loss(*losses: float | None, rate: float | None = 1e-4) -> str:
    return " ".join(ending_notes(losses, {}, learning_rate=rate))


def test_a_loss_that_hardly_moved_is_said_with_what_to_try() -> None:
    note = on_loss(4.87, *[4.75] * 18, 4.64)
    assert "in 20 rounds: it hardly moved" in note
    assert "client.lr=4.0e-04" in note
    assert "server.rounds=60" in note
    assert "a higher client.lr" in on_loss(4.87, 4.8, rate=None)


def test_a_loss_that_rose_asks_for_a_lower_rate() -> None:
    note = on_loss(2.0, 2.1, 2.2, 3.0, rate=4e-3)
    assert "it rose; try client.lr=1.0e-03" in note


@pytest.mark.parametrize("losses", [(4.87, 4.0, 3.0), (4.87,), (), (None, 4.0), (None, None)])
def test_a_loss_that_fell_or_is_one_alone_says_nothing(losses: tuple[float | None, ...]) -> None:
    assert on_loss(*losses) == ""


def line(client: str, **metrics: float) -> dict[str, object]:
    named = {f"client/graft_{key.replace('__', '_layers.')}": v for key, v in metrics.items()}
    return {"kind": "client", "client": client, "client/train_loss": 1.0, **named}


def test_grafts_are_recorded_by_client_and_layer() -> None:
    one = line(
        "north", expert__0=3, loss__0=0.5, loss_second__0=0.7, loss_none__0=1.0, output_norm__0=8.0
    )
    two = line("south", expert__1_0=2, expert__1_1=5, loss__1=0.2, loss_bound__1=0.1)
    assert graft_record([one, two, line("north"), {"kind": "round"}]) == {
        "north": {
            "layers.0": {
                **{"experts": [3], "loss": 0.5, "loss_second": 0.7, "loss_none": 1.0},
                "output_norm": 8.0,
            }
        },
        "south": {"layers.1": {"experts": [2, 5], "loss": 0.2, "loss_bound": 0.1}},
    }


def test_an_expert_that_is_worse_than_none_is_named_once_for_all_clients() -> None:
    grafts = graft_record(
        [
            line("north", expert__0=3, loss__0=1.2, loss_none__0=1.0, expert__1=1, loss__1=0.9),
            line("south", expert__0=4, loss__0=1.1, loss_none__0=1.0),
            line("east", expert__0=4, loss__0=0.9, loss_none__0=1.0),
        ]
    )
    (note,) = ending_notes([4.0, 3.0], grafts, learning_rate=1e-3)
    assert "in layers.0 the best experts alone miss 1.20" in note
    assert "for 2 of 3 clients" in note
