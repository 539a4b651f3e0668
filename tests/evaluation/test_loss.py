"""The loss of responses, with logits for responses alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from orchard.data.templates import IGNORED, Encoded
from orchard.evaluation.loss import forward_losses
from tiny_adapted import adapt, stir
from tiny_models import FAMILIES


def examples() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length, prompt in ((9, 4), (5, 3), (12, 0)):
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        made.append(Encoded(ids, [IGNORED] * prompt + ids[prompt:], prompt))
    return made


# Their logits are divided by a constant, which is 1 unless a configuration says otherwise.
SCALED: tuple[str, ...] = ()


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"switch"}))
def test_losses_are_those_of_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(family)
    stir(model)
    expected = []
    with torch.no_grad():
        for example in examples():
            ids = torch.tensor([example.input_ids])
            logits = model.model(input_ids=ids).logits[0, :-1].float()
            targets = torch.tensor(example.labels[1:])
            losses = functional.cross_entropy(logits, targets, reduction="none")
            expected.append(losses[targets != IGNORED])
        seen = []
        network = model.model
        head = network.get_output_embeddings()  # type: ignore[operator]
        handle = head.register_forward_hook(lambda *call: seen.append(call[2].shape[:-1]))
        losses_T, _ = forward_losses(model, examples())
        handle.remove()
    torch.testing.assert_close(losses_T, torch.cat(expected), rtol=1e-5, atol=1e-5)
    # Where nothing follows the head, its products are made in blocks beside the model.
    assert model.ends_with_head == (family not in SCALED)
    assert [tuple(shape) for shape in seen] == [(1 if model.ends_with_head else len(losses_T),)]
    assert not head._forward_pre_hooks
