from __future__ import annotations

import torch

from orchard.experts.observation import LayerPass, concatenate, watch_routing
from orchard.models.view.detection import view_moe
from tiny_models import FAMILIES, batch_of


def test_padding_is_left_out_and_tokens_know_their_sample() -> None:
    model = FAMILIES["qwen2_moe"]()
    seen: list[tuple[LayerPass, ...]] = []
    with watch_routing(view_moe(model), seen.append), torch.no_grad():
        model(**batch_of(model, num_padding=3))
        model(**batch_of(model))
    assert [layers[0].sample_T.tolist() for layers in seen] == [
        [0] * 7 + [1] * 4,
        [0] * 7 + [1] * 7,
    ]
    (layer, _) = concatenate(seen)
    assert layer.sample_T.tolist() == [0] * 7 + [1] * 4 + [2] * 7 + [3] * 7
    assert layer.probabilities_TE.shape == (25, 8)


def test_what_parts_of_the_model_see_alone_does_not_count() -> None:
    model = FAMILIES["qwen2_moe"]()
    seen: list[tuple[LayerPass, ...]] = []
    batch = batch_of(model, num_padding=2)
    with watch_routing(view_moe(model), seen.append), torch.no_grad():
        model(**batch)
        for num_samples in (1, 2):
            model.model(input_ids=batch["input_ids"][:num_samples])
        model(**batch)
    assert len(seen) == 2
    for first, second in zip(*seen, strict=True):
        assert torch.equal(first.probabilities_TE, second.probabilities_TE)
        assert torch.equal(first.sample_T, second.sample_T)


def test_probabilities_keep_their_graph_where_asked_to() -> None:
    model = FAMILIES["qwen2_moe"]()
    model.requires_grad_(True)
    for keeps in (False, True):
        seen: list[tuple[LayerPass, ...]] = []
        with watch_routing(view_moe(model), seen.append, keep_graph=keeps):
            model(**batch_of(model))
        assert all(layer.probabilities_TE.requires_grad == keeps for layer in seen[0])
        assert not any(layer.choices_TK.requires_grad for layer in seen[0])
