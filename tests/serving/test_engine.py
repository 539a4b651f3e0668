"""Whatever else is in the batch, a row gets the logits of its own model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from orchard.experts.grafting import GraftSettings, grafted
from orchard.models.stored.loading import load_base, load_tokenizer
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.serving.engine import Engine, Row
from orchard.serving.registry import Registry, Source
from orchard.serving.values import RowValues, read_values
from orchard.serving.worker import Job, Worker
from orchard.trees import Tree
from tests.federations import short_model

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@contextmanager
def _adapted(
    lora: LoraSettings, graft: GraftSettings | None, experts: tuple[tuple[int, ...], ...]
) -> Iterator[AdaptedModel]:
    base = load_base(short_model(), dtype="float32")
    model = AdaptedModel(
        base.view, lora, tokenizer=load_tokenizer(short_model()), base_digest=base.digest, seed=0
    )
    with ExitStack() as stack:
        if graft is not None:
            stack.enter_context(grafted(model, experts, graft, seed=0))
        yield model


def _trained(model: AdaptedModel, seed: int) -> dict[str, torch.Tensor]:
    """Return values as a client might have them: none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    names = tuple(model._slots)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in model.read(names).items()
    }


CASES = {
    "flex": (("q_proj", "v_proj"), (), GraftSettings(rank=4, alpha=8.0), ((1,), (2,))),
    "two grafts": (("q_proj",), (), GraftSettings(rank=4), ((1, 5), (2,))),
    "dense, closed": (("o_proj",), (), GraftSettings("dense", gate="closed"), ((0,), (3,))),
    "convex": (("q_proj",), (), GraftSettings(rank=2, mix="convex"), ((1, 2), (4,))),
    "difference": (("q_proj",), (), GraftSettings(rank=2, mix="difference"), ((1, 2), (4,))),
    "dense difference": (("v_proj",), (), GraftSettings("dense", mix="difference"), ((1,), (4,))),
    "routed": (("q_proj", "router", "experts"), (), None, ((), ())),
    "full": (("q_proj",), ("router", "experts"), None, ((), ())),
}


def _model_of(
    case: str, seed: int
) -> tuple[Tree, LoraSettings, GraftSettings, dict[str, tuple[int, ...]]]:
    targets, full, graft, experts = CASES[case]
    lora = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=targets, full=full)
    with _adapted(lora, graft, experts) as model:
        tree = _trained(model, seed)
        layers = [layer.name for layer in model.view.layers]
    names = dict(zip(layers, experts, strict=True)) if graft else {}
    return tree, lora, graft or GraftSettings(), names


def _alone(case: str, tree: Tree, prompt: list[int]) -> torch.Tensor:
    targets, full, graft, experts = CASES[case]
    lora = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=targets, full=full)
    with _adapted(lora, graft, experts) as model, torch.inference_mode():
        model.load(tree)
        logits: torch.Tensor = model.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        return logits


def test_logits_do_not_depend_on_the_batch() -> None:
    draw = random.Random(0)
    base = load_base(short_model(), dtype="float32")
    models: dict[str, RowValues] = {"base": RowValues()}
    trees: dict[str, Tree] = {}
    for number, case in enumerate(CASES):
        tree, lora, graft, experts = _model_of(case, number)
        trees[case] = tree
        models[case] = read_values(
            base.view, tree, lora=lora, graft=graft, graft_experts=experts, body=case
        )
    engine = Engine(base.view, max_rows=5, prefill_tokens=40, keeps_logits=True)
    names = [*models, *draw.choices(list(models), k=9)]
    rows = {
        index: Row(
            models[name],
            [draw.randrange(5, 300) for _ in range(draw.choice((1, 3, 17, 60)))],
            max_tokens=draw.randrange(1, 7),
        )
        for index, name in enumerate(names)
    }
    with engine.running():
        for row in rows.values():
            engine.submit(row)
            engine.step()
        while not engine.is_idle:
            engine.step()
    for index, row in rows.items():
        name = names[index]
        read = [*row.prompt, *row.tokens[:-1]]
        if name == "base":
            with torch.inference_mode():
                expected = base.view.model(input_ids=torch.tensor([read])).logits[0, -1]
        else:
            expected = _alone(name, trees[name], read)
        assert len(row.tokens) == row.max_tokens
        torch.testing.assert_close(row.logits_V, expected, **TOLERANCE)


def test_a_name_of_another_base_is_refused() -> None:
    base = load_base(short_model(), dtype="float32")
    lora = LoraSettings(rank=2, alpha=2.0, dropout=0.0, targets=("q_proj",))
    with pytest.raises(ValueError, match=r"layers\.9\.nothing must be a tensor of this base"):
        read_values(
            base.view,
            {"layers.9.nothing": torch.zeros(1)},
            lora=lora,
            graft=GraftSettings(),
            graft_experts={},
            body="x",
        )


def test_who_no_longer_reads_frees_its_row_and_a_full_queue_takes_nothing() -> None:
    base = load_base(short_model(), dtype="float32")
    engine = Engine(base.view, max_rows=1)
    rows = [Row(RowValues(), [5, 6], max_tokens=50) for _ in range(2)]
    with engine.running():
        for row in rows:
            engine.submit(row)
        engine.step()
        assert (len(rows[0].tokens), len(rows[1].tokens)) == (1, 0)
        rows[0].is_cancelled = True
        engine.step()
    assert (len(rows[0].tokens), len(rows[1].tokens)) == (1, 1)
    registry = Registry(base.view, base.digest, {"base": Source()})
    worker = Worker(engine, registry, max_queue=1)
    job = Job("base", lambda values: rows[1], lambda what: None)
    assert worker.submit([job])
    assert not worker.submit([job])
