"""The loss of responses, with logits for responses alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from orchard.data.encoded import IGNORED, Encoded
from orchard.evaluation.loss import forward_losses
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.models.view.detection import view_moe
from tiny_adapted import NumberTokenizer, adapt, example_of, stir
from tiny_models import FAMILIES


def examples() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length, prompt in ((9, 4), (5, 3), (12, 0)):
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        made.append(Encoded(ids, [IGNORED] * prompt + ids[prompt:], prompt))
    return made


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
    assert [tuple(shape) for shape in seen] == [(1 if model.ends_with_head else len(losses_T),)]
    assert not head._forward_pre_hooks


def test_logits_that_are_scaled_behind_the_head_are_the_models_own() -> None:
    plain, scaled = FAMILIES["granitemoe"](), FAMILIES["granitemoe"]()
    scaled.config.logits_scaling = scaled.logits_scaling = 4.0
    losses = {}
    for name, network in (("plain", plain), ("scaled", scaled)):
        lora = LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",))
        model = AdaptedModel(
            view_moe(network), lora, tokenizer=NumberTokenizer(), base_digest="", seed=0
        )
        assert model.ends_with_head == (name == "plain")
        assert not network.get_output_embeddings()._forward_hooks  # it was asked once
        with torch.no_grad():
            losses[name], _ = forward_losses(model, [example_of(7, 3)])
            ids = torch.tensor([example_of(7, 3).input_ids])
            logits = network(input_ids=ids).logits[0, 2:-1].float()
            expected = functional.cross_entropy(logits, ids[0, 3:], reduction="none")
        torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(losses["plain"], losses["scaled"], rtol=0.01)
