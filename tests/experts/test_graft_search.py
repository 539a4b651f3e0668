"""The experts that together come closest to their layer, against running every set of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from federations import short_first
from orchard.experts import subset_losses
from orchard.experts.graft_search import LayerSearch, SearchSettings, check_sizes, search_grafts
from orchard.experts.reconstruction import choose_by_reconstruction, reconstruction_losses
from orchard.experts.subset_losses import Tally, all_sets, first_smallest, one_more, token_terms
from orchard.models.view.detection import view_moe
from orchard.models.view.moe import MoELayer, MoEView
from tiny_models import _COMMON, EXPERTS, FAMILIES, VOCABULARY, WIDTH, build

MANY = 16
SIZES = (1, 2, 3, 4)
LOSSES = ("norm", "fitted")


def many_experts(*, seed: int = 0, width: int = WIDTH) -> MoEView:
    """Build two layers of 16 experts, 4 of them per token, in float64."""
    model = build(
        "Qwen2MoeConfig",
        **{**_COMMON, "num_experts_per_tok": 4, "hidden_size": width},
        num_experts=MANY,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
        norm_topk_prob=False,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return view_moe(model.double())


def corpus(num_batches: int = 3, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (2, 6), generator=generator) for _ in range(num_batches)]


def see_layers(view: MoEView, batches: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """Return what each layer's experts read, and what they answer together, batch by batch."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in view.layers]

    def watch(index: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[index].append((args[0].reshape(-1, args[0].shape[-1]), output.flatten(0, -2)))

        return see

    handles = [
        layer.experts.register_forward_hook(watch(index)) for index, layer in enumerate(view.layers)
    ]
    with torch.no_grad():
        for batch_BS in batches:
            view.model(input_ids=batch_BS)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def run_set(layer: MoELayer, experts: tuple[int, ...], x_TD: Tensor) -> Tensor:
    """Let the model's own experts module run a set, with the softmax of its router rows."""
    rows = layer.router_tensors()
    logits_TE = functional.linear(x_TD, rows["weight"], rows.get("bias"))
    weights_TK = logits_TE[:, list(experts)].softmax(-1)
    choices_TK = torch.tensor(experts).expand(len(x_TD), -1)
    output: Tensor = layer.experts(x_TD, choices_TK, weights_TK)
    return output


def brute_force(layer: MoELayer, seen: list[tuple[Tensor, Tensor]], size: int) -> dict[str, Tensor]:
    """Run every set of ``size`` experts on all tokens; return both losses of each."""
    x_TD, routed_TD = (torch.cat(parts) for parts in zip(*seen, strict=True))
    lengths = [len(x) for x, _ in seen]
    norms, fitted = [], []
    for experts in itertools.combinations(range(layer.num_experts), size):
        own_TD = run_set(layer, experts, x_TD)
        missing = (routed_TD - own_TD).split(lengths)
        norms.append(sum(part.square().sum().sqrt() for part in missing))
        scale = max(0.0, float((own_TD * routed_TD).sum() / own_TD.square().sum()))
        fitted.append((routed_TD - scale * own_TD).norm())
    return {"norm": torch.stack(norms), "fitted": torch.stack(fitted)}


def first_of(losses_N: Tensor) -> int:
    """Return the first of the smallest; a sum in another order is not another loss."""
    return int((losses_N <= losses_N.min() * (1 + 1e-9) + 1e-12).nonzero()[0, 0])


def tally(layer: MoELayer, seen: list[tuple[Tensor, Tensor]], size: int, *, loss: str) -> Tally:
    found = Tally(all_sets(size), math.comb(layer.num_experts, size), loss=loss)
    with torch.no_grad():
        for x_TD, routed_TD in seen:
            for part in (slice(0, 5), slice(5, None)):  # blocks of tokens add up
                found.add(token_terms(layer, x_TD[part], routed_TD[part]))
            found.end_batch()
    return found


@pytest.mark.parametrize("size", [1, 2, *(pytest.param(s, marks=pytest.mark.long) for s in (3, 4))])
def test_every_loss_and_the_choice_equal_brute_force(size: int) -> None:
    view, batches = many_experts(), corpus()
    seen = see_layers(view, batches)
    expected = [brute_force(layer, own, size) for layer, own in zip(view.layers, seen, strict=True)]
    sets = list(itertools.combinations(range(MANY), size))
    for loss in LOSSES:
        found = search_grafts(view, batches, sizes=[size], settings=SearchSettings(loss=loss))
        for index, own in enumerate(found):
            expected_N = expected[index][loss]
            losses_N = tally(view.layers[index], seen[index], size, loss=loss).losses()
            torch.testing.assert_close(losses_N, expected_N, rtol=1e-9, atol=1e-12)
            chosen = first_of(expected_N)
            assert own.sets[size].experts == sets[chosen]
            assert own.sets[size].loss == pytest.approx(float(expected_N[chosen]), rel=1e-9)
            assert own.sets[size].lower_bound == own.sets[size].loss
            assert own.sets[size].is_exact


@pytest.mark.parametrize("size", [1, 2, *(pytest.param(s, marks=pytest.mark.long) for s in (3, 4))])
def test_of_equal_sets_the_first_is_chosen(size: int) -> None:
    view, batches = many_experts(), corpus()
    for name in view.names():  # four times four of a kind, router rows too
        view.write(name, view.read(re.sub(r"\.(\d+)(?=$|\.\w+_proj$)", first_alike, name)).clone())
    seen = see_layers(view, batches)
    sets = list(itertools.combinations(range(MANY), size))
    expected = [brute_force(layer, own, size) for layer, own in zip(view.layers, seen, strict=True)]
    for loss in LOSSES:
        found = search_grafts(view, batches, sizes=[size], settings=SearchSettings(loss=loss))
        for losses, own in zip(expected, found, strict=True):
            expected_N = losses[loss]
            assert int((expected_N <= expected_N.min() * (1 + 1e-9)).sum()) > 1
            assert own.sets[size].experts == sets[first_of(expected_N)]


def first_alike(found: re.Match[str]) -> str:
    return f".{int(found[1]) % 4}"


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_moe_16b", "mixtral"])
def test_one_expert_is_the_choice_by_running_each(family: str) -> None:
    view, batches = view_moe(FAMILIES[family]()), corpus()
    losses = reconstruction_losses(view, batches)
    found = search_grafts(view, batches, sizes=[1])
    assert tuple(own.sets[1].experts[0] for own in found) == choose_by_reconstruction(losses)
    for own, loss_E in zip(found, losses, strict=True):
        assert own.sets[1].loss == pytest.approx(float(loss_E.min()), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_a_bfloat16_model_chooses_as_its_outputs_say(family: str) -> None:
    view, batches = view_moe(FAMILIES[family]().bfloat16()), corpus()
    found = search_grafts(view, batches, sizes=[2])
    for layer, seen, own in zip(view.layers, see_layers(view, batches), found, strict=True):
        rows = layer.router_tensors()
        losses = []
        for pair in itertools.combinations(range(EXPERTS), 2):
            total = torch.zeros((), dtype=torch.float64)
            for x_TD, routed_TD in seen:
                bias = rows["bias"].double() if "bias" in rows else None
                logits_TE = functional.linear(x_TD.double(), rows["weight"].double(), bias)
                w_TK = logits_TE[:, list(pair)].softmax(-1)
                with torch.no_grad():
                    y = [layer.run_expert(expert, x_TD).double() for expert in pair]
                missing_TD = routed_TD.double() - w_TK[:, :1] * y[0] - w_TK[:, 1:] * y[1]
                total += missing_TD.norm()
            losses.append(total)
        best = first_of(torch.stack(losses))
        assert own.sets[2].experts == list(itertools.combinations(range(EXPERTS), 2))[best]
        assert own.sets[2].loss == pytest.approx(float(losses[best]), rel=1e-9)


def test_the_loss_of_no_expert_is_the_norm_of_the_layer() -> None:
    view, batches = many_experts(), corpus()
    seen = see_layers(view, batches)
    norm = search_grafts(view, batches, sizes=[1])
    fitted = search_grafts(view, batches, sizes=[1], settings=SearchSettings(loss="fitted"))
    for own, scaled, parts in zip(norm, fitted, seen, strict=True):
        assert own.output_norm == pytest.approx(sum(float(f.norm()) for _, f in parts))
        assert scaled.output_norm == pytest.approx(float(torch.cat([f for _, f in parts]).norm()))
        assert scaled.sets[1].loss <= scaled.output_norm


def test_memory_is_bounded_by_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    view, batches = many_experts(), corpus()
    expected = search_grafts(view, batches, sizes=[1, 3])
    monkeypatch.setattr(subset_losses, "BLOCK_BYTES", 3 * MANY * (WIDTH * 8 + 24 * MANY))
    seen: list[int] = []
    run_expert = MoELayer.run_expert

    def see(self: MoELayer, expert: int, x_TD: Tensor) -> Tensor:
        seen.append(len(x_TD))
        return run_expert(self, expert, x_TD)

    monkeypatch.setattr(MoELayer, "run_expert", see)
    found = search_grafts(view, batches, sizes=[1, 3])
    assert set(seen) == {3}
    # Each expert sees each token once: 3 batches of 12 tokens, two layers.
    assert sum(seen) == 3 * 12 * MANY * 2
    for before, after in zip(expected, found, strict=True):
        for size in (1, 3):
            assert after.sets[size].experts == before.sets[size].experts
            assert after.sets[size].loss == pytest.approx(before.sets[size].loss, rel=1e-12)


@pytest.mark.parametrize("max_sets", [10**6, 16])
def test_experts_may_be_run_elsewhere_one_at_a_time(
    max_sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, batches = many_experts(), corpus()
    settings = SearchSettings(max_sets=max_sets)
    expected = search_grafts(view, batches, sizes=[3], settings=settings)
    run_expert, order = MoELayer.run_expert, []

    def run(index: int, expert: int, x_TD: Tensor) -> Tensor:
        order.append((index, expert))
        return run_expert(view.layers[index], expert, x_TD)

    monkeypatch.delattr(MoELayer, "run_expert")
    found = search_grafts(view, batches, sizes=[3], settings=settings, run_expert=run)
    assert found == expected
    # Once for each batch in every pass, layer by layer.
    one_pass = [(index, expert) for index in (0, 1) for expert in range(MANY)]
    assert order[: 3 * len(one_pass)] == one_pass * 3
    assert (len(order) == 3 * len(one_pass)) == (max_sets > 16)


@pytest.mark.parametrize(
    ("size", "loss"),
    short_first(
        [(size, LOSSES[position % 2]) for position, size in enumerate((2, 3, 4, 6))],
        itertools.product([2, 3, 4, 6, 9], LOSSES),
    ),
)
def test_a_search_is_bounded_by_the_best_and_by_its_bound(size: int, loss: str) -> None:
    view, batches = many_experts(width=64), corpus()
    settings = SearchSettings(loss=loss, max_sets=130)  # all pairs of 16, no triples
    exact = search_grafts(view, batches, sizes=[size], settings=SearchSettings(loss=loss))
    found = search_grafts(view, batches, sizes=[size], settings=settings)
    for best, own in zip(exact, found, strict=True):
        searched, optimum = own.sets[size], best.sets[size]
        assert len(set(searched.experts)) == size
        assert list(searched.experts) == sorted(searched.experts)
        assert optimum.loss <= searched.loss * (1 + 1e-12)
        assert searched.lower_bound <= optimum.loss * (1 + 1e-12)
        if size == 2:
            assert searched == optimum
        elif loss == "norm" and size <= 4:  # what it is worth; of nine of 16 it knows little
            assert searched.lower_bound > 0.3 * optimum.loss


def test_no_single_swap_helps_a_set_that_was_searched_for() -> None:
    view, batches = many_experts(), corpus()
    (own, *_) = search_grafts(view, batches, sizes=[5], settings=SearchSettings(max_sets=16))
    experts, layer = own.sets[5].experts, view.layers[0]
    losses_N = tally(layer, see_layers(view, batches)[0], 5, loss="norm").losses()
    by_set = dict(zip(itertools.combinations(range(MANY), 5), losses_N.tolist(), strict=True))
    assert own.sets[5].loss == pytest.approx(by_set[experts], rel=1e-9)
    for out, into in itertools.product(experts, range(MANY)):
        swapped = tuple(sorted({*experts} - {out} | {into}))
        if len(swapped) == 5:
            assert by_set[swapped] >= own.sets[5].loss * (1 - 1e-8)


def test_one_more_expert_is_the_set_with_it() -> None:
    view, batches = many_experts(), corpus(1)
    layer, ((x_TD, routed_TD),) = view.layers[1], see_layers(view, batches)[1]
    with torch.no_grad():
        terms = token_terms(layer, x_TD, routed_TD)
    bases = [(2, 9), (9, 11)]
    for loss in LOSSES:
        more, every = (
            Tally(one_more(bases), 2 * MANY, loss=loss),
            Tally(all_sets(3), math.comb(MANY, 3), loss=loss),
        )
        for count in (more, every):
            count.add(terms)
            count.end_batch()
        sets = list(itertools.combinations(range(MANY), 3))
        by_set = dict(zip(sets, every.losses().tolist(), strict=True))
        for (row, base), expert in itertools.product(enumerate(bases), range(MANY)):
            if expert not in base:
                expected = by_set[tuple(sorted((*base, expert)))]
                assert float(more.losses()[row * MANY + expert]) == pytest.approx(expected)


def test_an_expert_against_the_layer_has_the_loss_of_none_after_fitting() -> None:
    view, batches = many_experts(), corpus(1)
    layer, ((x_TD, _),) = view.layers[0], see_layers(view, batches)[0]
    with torch.no_grad():
        against_TD = -layer.run_expert(4, x_TD)
        count = Tally(all_sets(1), MANY, loss="fitted")
        count.add(token_terms(layer, x_TD, against_TD))
    assert float(count.losses()[4]) == pytest.approx(float(against_TD.norm()))
    assert bool((count.losses() <= against_TD.norm() * (1 + 1e-12)).all())


def test_a_set_that_is_the_layer_lacks_nothing() -> None:
    view, batches = many_experts(), corpus(1)
    layer, ((x_TD, _),) = view.layers[0], see_layers(view, batches)[0]
    routed_TD = run_set(layer, (1, 6, 12), x_TD)
    for loss in LOSSES:
        count = Tally(all_sets(3), math.comb(MANY, 3), loss=loss)
        with torch.no_grad():
            count.add(token_terms(layer, x_TD, routed_TD))
        count.end_batch()
        sets = list(itertools.combinations(range(MANY), 3))
        losses_N = count.losses()
        assert sets[first_smallest(losses_N, rounding=count.rounding)] == (1, 6, 12)
        assert float(losses_N.min()) < 1e-6 * float(routed_TD.norm())


def test_a_size_that_does_not_fit_is_an_error() -> None:
    view = many_experts()
    for size in (0, 17):
        with pytest.raises(
            ValueError, match=rf"^strategy.graft_experts must be in 1..16, got {size}"
        ):
            search_grafts(view, corpus(), sizes=[1, size])
    assert check_sizes([3, 1, 3], view.layers[0]) == (1, 3)


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^calibration must have at least one batch, got none; "):
        search_grafts(many_experts(), [], sizes=[2])


def test_a_broken_model_is_an_error_and_leaves_no_hooks() -> None:
    view = many_experts()
    view.write("layers.1.experts.5.down_proj", torch.full((WIDTH, 12), torch.nan).double())
    for max_sets in (10_000, 16):
        with pytest.raises(ValueError, match=r"got NaN or infinity in MoE layer 1"):
            search_grafts(view, corpus(), sizes=[2], settings=SearchSettings(max_sets=max_sets))
        assert not any(m._forward_hooks for m in view.model.modules())


def test_logits_beyond_float64_are_an_error() -> None:
    view = many_experts()
    with torch.no_grad():
        view.layers[0].router_tensors()["weight"].mul_(1e6)
    with pytest.raises(ValueError, match=r"^router logits of layers.0 must lie within 300 "):
        search_grafts(view, corpus(), sizes=[2])


def test_the_model_is_left_as_it_was() -> None:
    view = many_experts()
    with torch.no_grad():
        before = view.model(input_ids=corpus()[0]).logits
    search_grafts(view, corpus(), sizes=[3], settings=SearchSettings(max_sets=16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in view.model.modules())
    with torch.no_grad():
        assert torch.equal(view.model(input_ids=corpus()[0]).logits, before)


def test_all_experts_are_the_only_set_of_their_number() -> None:
    found: tuple[LayerSearch, ...] = search_grafts(many_experts(), corpus(1), sizes=[MANY])
    assert all(own.sets[MANY].experts == tuple(range(MANY)) for own in found)


@pytest.mark.parametrize(("family", "scale"), [("deepseek_v2", 1.5), ("deepseek_v3", 2.5)])
@pytest.mark.parametrize("size", [1, 2])
def test_sets_of_a_scaled_family_are_compared_on_the_scale_of_the_layer(
    family: str, scale: float, size: int
) -> None:
    view, batches = view_moe(FAMILIES[family]().double()), corpus()
    found = search_grafts(view, batches, sizes=[size])
    for index, own in enumerate(see_layers(view, batches)):
        layer = view.layers[index]
        best = (math.inf, ())
        for experts in itertools.combinations(range(layer.num_experts), size):
            missing = 0.0
            for x_TD, routed_TD in own:
                logits_TE = x_TD @ layer.router_tensors()["weight"].T
                scores_TE = logits_TE.sigmoid() if family == "deepseek_v3" else logits_TE.exp()
                weights_TK = scores_TE[:, list(experts)]
                weights_TK = scale * weights_TK / weights_TK.sum(-1, keepdim=True)
                answers = [layer.run_expert(expert, x_TD) for expert in experts]
                y_TD = sum(w_T[:, None] * y for w_T, y in zip(weights_TK.T, answers, strict=True))
                missing += float((routed_TD - y_TD).detach().norm())
            best = min(best, (missing, experts))
        assert found[index].sets[size].experts == best[1]
        assert found[index].sets[size].loss == pytest.approx(best[0], rel=1e-5)
