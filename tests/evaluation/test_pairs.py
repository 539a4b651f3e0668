"""An encoder-decoder reads prompts and writes responses as the family's own class does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from orchard.data.encoded import Encoded
from orchard.data.examples import Example, Turn
from orchard.data.templates import Wording, encode
from orchard.evaluation.loss import forward_losses
from orchard.evaluation.multiple_choice import log_likelihoods
from orchard.experts.observation import LayerPass, watch_routing
from orchard.models.stored.loading import load_base, load_tokenizer
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from tiny_adapted import NumberTokenizer, example_of, examples, stir
from tiny_pairs import EXPERTS, tiny_switch

CAPACITY = 2
# Before, the family's own router counts in a dimension of one, and drops no token.
IS_COUNTED = Version(transformers.__version__) >= Version("5.22")


@pytest.fixture(scope="module")
def own() -> Any:
    """The family's own model, in which experts are full after two tokens."""
    return tiny_switch(size=64, capacity=CAPACITY)


@pytest.fixture(scope="module")
def adapted(own: Any, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    folder = tmp_path_factory.mktemp("switch")
    own.save_pretrained(folder)
    base = load_base(str(folder), dtype="float32")
    return AdaptedModel(
        base.view,
        LoraSettings(2, 4.0, 0.0, ("attention", "router", "experts")),
        tokenizer=NumberTokenizer(),
        base_digest=base.digest,
        seed=0,
    )


def labels_of(example: Encoded) -> torch.Tensor:
    return torch.tensor([example.input_ids[example.prompt_length :]])


def prompt_of(example: Encoded) -> torch.Tensor:
    return torch.tensor([example.prompt_ids])


@torch.no_grad()
def test_the_loss_is_what_the_family_says_of_labels(own: Any, adapted: AdaptedModel) -> None:
    # Long enough that experts of the encoder and of the decoder are full.
    batch = [example_of(30, 14), *examples(3)]
    losses_T, _ = forward_losses(adapted, batch)
    parts = torch.split(losses_T, [example.num_labels for example in batch])
    for example, own_T in zip(batch, parts, strict=True):
        expected = own(input_ids=prompt_of(example), labels=labels_of(example)).loss
        torch.testing.assert_close(own_T.mean(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tokens_beyond_the_capacity_have_no_expert(adapted: AdaptedModel) -> None:
    seen: list[tuple[LayerPass, ...]] = []
    long, short = example_of(30, 14), example_of(5, 2)
    with watch_routing(adapted.view, seen.append):
        forward_losses(adapted, [long, short])
    (layers,) = seen
    for layer, view, sizes in zip(layers, adapted.view.layers, ([14, 2], [16, 3]), strict=True):
        assert layer.sample_T.bincount().tolist() == sizes, "a row's own tokens, of its stack"
        for row in (0, 1):
            chosen = layer.choices_TK[layer.sample_T == row].flatten()
            counts = chosen.bincount(minlength=view.num_experts + 1)
            wanted = layer.probabilities_TE[layer.sample_T == row].argmax(dim=-1)
            asked = wanted.bincount(minlength=view.num_experts)
            assert torch.equal(counts[:-1], asked.clamp(max=CAPACITY) if IS_COUNTED else asked)
    assert any(bool((layer.choices_TK == EXPERTS).any()) for layer in layers) == IS_COUNTED


def test_adapters_are_on_all_three_kinds_of_attention(adapted: AdaptedModel) -> None:
    names = {name.partition(".lora_")[0] for name in adapted.adapter_names if ".lora_" in name}
    attention = {name for name in names if name.endswith((".q", ".k", ".v"))}
    of_encoder = {name for name in attention if name.startswith("encoder")}
    crossing = {name for name in attention if "EncDecAttention" in name}
    assert (len(of_encoder), len(crossing), len(attention)) == (6, 6, 18)
    before = forward_losses(adapted, examples(2))[0]
    stir(adapted)
    after = forward_losses(adapted, examples(2))[0]
    adapted.load(adapted.fresh)
    assert not torch.allclose(before, after)


def test_answers_are_those_of_the_family_whatever_they_are_asked_with(
    own: Any, adapted: AdaptedModel
) -> None:
    long, short = prompt_of(example_of(20, 12)), prompt_of(example_of(9, 5))
    ids = torch.cat([long, torch.cat([torch.zeros(1, 7, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    answers = adapted.generate(ids, mask, max_new_tokens=6, end_ids=[2])
    for prompt, found in zip((long, short), answers.tolist(), strict=True):
        expected = own.generate(prompt, max_new_tokens=6, eos_token_id=2, pad_token_id=0)
        wanted = expected[0, 1:].tolist()
        assert found[: len(wanted)] == wanted
        assert not any(found[len(wanted) :])


def test_an_option_is_as_likely_as_its_loss_says(own: Any, adapted: AdaptedModel) -> None:
    prompt, options = [5, 6, 7, 8], ([9, 10], [11], [9, 12, 13])
    question = [
        Encoded([*prompt, *ids, 2], [-100] * 4 + [*ids, 2], prompt_length=4, is_ended=True)
        for ids in options
    ]
    (scores,) = log_likelihoods(adapted, [question], batch_size=2)
    for ids, score in zip(options, scores, strict=True):
        with torch.no_grad():
            loss = own(input_ids=torch.tensor([prompt]), labels=torch.tensor([ids])).loss
        assert score == pytest.approx(-float(loss) * len(ids), rel=1e-5)


def test_a_prompt_that_is_read_apart_learns_none_of_its_turns() -> None:
    tokenizer = load_tokenizer("orchard:tiny")
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    asked = Example("c", "d", history=turns)
    with pytest.raises(ValueError, match=r"^data\.learn must be last with an encoder-decoder"):
        encode(asked, Wording("plain", tokenizer, is_read_apart=True), max_tokens=64)
    wording = Wording("plain", tokenizer, learn="last", is_read_apart=True)
    assert encode(asked, wording, max_tokens=64).num_labels == 2  # of d and the end
