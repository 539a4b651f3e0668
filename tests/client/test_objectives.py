"""What a client minimizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from orchard.client.objectives import Objective, Situation, causal_lm, proximal, pulled


def situation_of(*, loss: float = 2.0, share: float = 1.0) -> Situation:
    """Return a micro-batch whose two sent tensors are 3 and (1, 2) away from their anchor."""
    shared = {
        "a": torch.tensor([5.0], requires_grad=True),
        "b": torch.tensor([1.0, -2.0], requires_grad=True),
    }
    anchor = {"a": torch.tensor([2.0]), "b": torch.zeros(2)}
    return Situation(
        task_loss=torch.tensor(loss, requires_grad=True),
        share=share,
        shared=shared,
        anchor=anchor,
        memory={},
        broadcast={},
    )


def test_causal_lm_is_the_task_loss() -> None:
    situation = situation_of()
    assert causal_lm(situation) is situation.task_loss


def test_proximal_worked_number() -> None:
    # 2 + 0.1 / 2 * (3^2 + 1^2 + 2^2)
    assert proximal(causal_lm, mu=0.1)(situation_of()).item() == pytest.approx(2.7)


def test_the_pull_to_what_was_sent_worked_number() -> None:
    sent = {"a": torch.tensor([2.0]), "b": torch.zeros(2), "other": torch.ones(3)}
    situation = replace(situation_of(share=0.5), broadcast=sent)
    # 2 + 0.5 * 0.1 / 2 * (3^2 + 1^2 + 2^2)
    assert pulled(strength=0.1)(situation).item() == pytest.approx(2.35)


def test_proximal_pulls_back_with_mu_times_the_distance() -> None:
    situation = situation_of()
    proximal(causal_lm, mu=0.1)(situation).backward()
    assert situation.shared["a"].grad is not None
    torch.testing.assert_close(situation.shared["a"].grad, torch.tensor([0.3]))
    torch.testing.assert_close(situation.shared["b"].grad, torch.tensor([0.1, -0.2]))
    assert situation.task_loss.grad is not None
    assert situation.task_loss.grad.item() == 1.0


def test_proximal_with_mu_0_is_the_task_loss() -> None:
    situation = situation_of()
    loss = proximal(causal_lm, mu=0.0)(situation)
    assert loss.item() == situation.task_loss.item()
    loss.backward()
    assert not situation.shared["a"].grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("num_micro_batches", [1, 2, 5])
def test_the_proximal_term_counts_once_per_step(num_micro_batches: int) -> None:
    share = 1 / num_micro_batches
    objective = proximal(causal_lm, mu=0.1)
    total = sum(
        objective(situation_of(loss=2.0 * share, share=share)).item()
        for _ in range(num_micro_batches)
    )
    assert total == pytest.approx(2.7)


def test_objectives_stack() -> None:
    def doubled(situation: Situation) -> torch.Tensor:
        return 2 * situation.task_loss

    stacked: Objective = proximal(proximal(doubled, mu=0.1), mu=0.2)
    assert stacked(situation_of()).item() == pytest.approx(4 + 0.05 * 14 + 0.1 * 14)


def test_proximal_of_a_client_that_sends_nothing_is_the_task_loss() -> None:
    situation = Situation(torch.tensor(2.0), 1.0, {}, {}, {}, {})
    assert proximal(causal_lm, mu=0.1)(situation).item() == 2.0
