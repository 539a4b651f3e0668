"""What adapters drop depends on the row, whatever it is read with."""

from __future__ import annotations

import pytest
import torch

from orchard.evaluation.loss import forward_losses
from orchard.models.trainable.dropout import dropout_by_row
from tiny_adapted import adapt, examples, stir

FAMILIES = ["qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_loses_the_same_alone_packed_and_padded(family: str) -> None:
    model = adapt(family, dropout=0.4)
    stir(model)
    model.model.train()
    rows = examples(4)
    found = []
    for batches, packed in (([rows], True), ([rows], False), ([[row] for row in rows], True)):
        with dropout_by_row(model.model, seed=3), torch.no_grad():
            losses = [forward_losses(model, batch, packed=packed)[0] for batch in batches]
        found.append(torch.cat(losses))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    model.model.eval()
    with torch.no_grad():
        plain, _ = forward_losses(model, rows)
    assert not torch.allclose(plain, found[0], rtol=1e-3)


def test_so_many_values_are_dropped_and_the_rest_grow() -> None:
    model = adapt(dropout=0.25)
    module = next(m for m in model.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0)
    seen: list[torch.Tensor] = []
    model.model.train()
    with dropout_by_row(model.model, seed=0), torch.no_grad():
        handle = module.register_forward_hook(
            lambda own, args, output: seen.append(output / args[0])
        )
        for _ in range(20):
            forward_losses(model, examples(8))
        handle.remove()
    scales = torch.cat([one.flatten() for one in seen])
    torch.testing.assert_close(scales, (scales > 0) / 0.75)
    assert float((scales == 0).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_rows_and_seeds_differ_and_the_model_is_left_as_it_was() -> None:
    model = adapt(dropout=0.4)
    stir(model)
    model.model.train()
    (row, *_) = examples(1)
    found = []
    for seed in (1, 1, 2):
        with dropout_by_row(model.model, seed=seed), torch.no_grad():
            found.append([forward_losses(model, [row])[0].tolist() for _ in range(2)])
    assert found[0] == found[1]
    # The same text twice in a step is two rows.
    assert found[0][0] != found[0][1]
    assert found[0] != found[2]
    shares = [m.p for m in model.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert 0.4 in shares


def test_a_look_in_between_neither_drops_nor_counts() -> None:
    model = adapt(dropout=0.4)
    stir(model)
    rows = examples(2)
    found = []
    for looks in (False, True):
        model.model.train()
        with dropout_by_row(model.model, seed=0), torch.no_grad():
            losses = [forward_losses(model, rows[:1])[0]]
            if looks:
                model.model.eval()
                forward_losses(model, rows)
                model.model.train()
            losses.append(forward_losses(model, rows[1:])[0])
        found.append(torch.cat(losses))
    assert torch.equal(*found)
