"""A recipe is checked against its data and its model, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchard.data.encoded import Encoded
from orchard.data.templates import Wording
from orchard.evaluation.quality import TestExample
from orchard.experiment.budgets import expert_budgets
from orchard.experiment.checking import (
    check_carving,
    check_clients,
    check_cohort,
    check_names,
    check_pair,
    check_tested,
)
from orchard.experiment.data_record import DataDigest, data_digest
from orchard.experiment.encoding import (
    cut_note,
    encode_all,
    encode_clients,
    encode_test,
    end_ids,
    make_wording,
    options_note,
)
from orchard.experiment.holdings import (
    Elsewhere,
    Federation,
    build_federation,
    build_site,
    read_elsewhere,
)
from orchard.experiment.methods import build_strategy, check_strategy, require_path
from orchard.experiment.settings import lora_settings, placement_of
from orchard.experiment.start_values import check_start
from orchard.experiment.wiring import check_communication
from orchard.models.stored.endings import unknown_ends
from orchard.models.stored.loading import (
    check_checkpoint,
    check_device,
    check_tokens,
    check_vocabulary,
    load_tokenizer,
)
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.seeding import Seeds


@dataclass(frozen=True)
class Experiment:
    """A checked recipe with its data, before any model is loaded.

    Attributes:
        recipe: Every choice.
        federation: Who holds which examples.
        train: Client id to encoded training examples.
        test: Client id to encoded held-out examples; with a central test set, all the same list.
        retention: Encoded examples of what the base knew before.
        calibration: Encoded calibration corpus.
        tokenizer: The model's.
        budgets: Client id to the experts that it can afford, over all MoE layers; None = all.
        digest: Of everything that the clients hold, before it was encoded.
        remarks: What of retention and calibration was taken, left out or not read.
        model_notes: What a person should know about the base.
        end_ids: The tokens that end an answer.
        others: Client id to what is drawn of the other clients' test examples; empty = nothing is.
    """

    recipe: Recipe
    federation: Federation
    train: Mapping[str, list[Encoded]]
    test: Mapping[str, list[TestExample]]
    retention: list[TestExample]
    calibration: list[Encoded]
    tokenizer: Any
    budgets: Mapping[str, int | None]
    digest: DataDigest
    end_ids: tuple[int, ...]
    remarks: tuple[str, ...] = ()
    model_notes: tuple[str, ...] = ()
    others: Mapping[str, list[TestExample]] = field(default_factory=dict)


@dataclass(frozen=True)
class Seat:
    """One client's place in a federation whose other clients are elsewhere.

    Attributes:
        client_id: Its name.
        index: Its place among all clients, from 0.
        num_clients: How many there are.
        split_seed: What draws its held-out rows; None = the recipe's seed.
    """

    client_id: str
    index: int
    num_clients: int
    split_seed: int | None = None


def prepare_experiment(recipe: Recipe, *, seat: Seat | None = None) -> Experiment:
    """Check a recipe against its data and model, without loading the model's weights.

    Args:
        recipe: Every choice.
        seat: Whose data ``data.path`` is, where it is one client's file; None = all clients'.

    Raises:
        FileNotFoundError: Data or model are not there.
        ValueError: Something does not fit.
    """
    check_strategy(recipe.strategy.name)
    require_path(recipe)
    check_communication(recipe)
    federation = _build_seat(recipe, seat) if seat else build_federation(recipe)
    num_clients = seat.num_clients if seat else len(federation.train)
    if seat is None:
        build_strategy(recipe, num_clients=num_clients)  # what cannot be put on is refused here
    if seat is None:
        check_clients(recipe, federation)
    check_cohort(recipe, num_clients=num_clients)
    elsewhere = read_elsewhere(recipe)
    check_tested(recipe, federation, elsewhere)
    check_device(recipe.model.device)
    placement_of(recipe)  # what cannot be placed there is refused
    checked = check_checkpoint(recipe.model.path, lora_settings(recipe))
    check_names(recipe)
    check_pair(recipe, checked.view)
    if seat is None:  # a site is sent what a run starts from
        check_start(recipe)
    budgets = expert_budgets(recipe, checked.view, num_clients=num_clients)
    if seat:
        budgets = budgets[seat.index : seat.index + 1]
    check_carving(recipe, checked.view, budgets)
    tokenizer = load_tokenizer(recipe.model.path)
    unknown = check_vocabulary(tokenizer, checked.vocabulary, path=recipe.model.path)

    wording = make_wording(recipe, tokenizer)
    held = encode_holdings(
        recipe, federation, elsewhere, wording, rows=checked.vocabulary if unknown else None
    )
    ends = end_ids(recipe, wording)
    beyond = unknown_ends(ends, checked.vocabulary, path=recipe.model.path)
    return Experiment(
        recipe=recipe,
        federation=federation,
        train=held.train,
        test=held.test,
        retention=held.retention,
        calibration=held.calibration,
        tokenizer=tokenizer,
        budgets=dict(zip(federation.train, budgets, strict=True)),
        digest=data_digest(
            federation, retention=elsewhere.retention, calibration=elsewhere.calibration
        ),
        end_ids=ends,
        remarks=elsewhere.remarks,
        model_notes=(*checked.notes, *(note for note in (unknown, beyond) if note)),
        others=held.others,
    )


@dataclass(frozen=True)
class Held:
    """What clients hold and are measured on, as token ids; see ``Experiment``."""

    train: Mapping[str, list[Encoded]]
    test: Mapping[str, list[TestExample]]
    retention: list[TestExample]
    calibration: list[Encoded]
    others: Mapping[str, list[TestExample]]


def encode_holdings(
    recipe: Recipe,
    federation: Federation,
    elsewhere: Elsewhere,
    wording: Wording,
    *,
    rows: int | None,
) -> Held:
    """Encode all data of an experiment.

    Args:
        recipe: Every choice.
        federation: Who holds what.
        elsewhere: Retention and calibration.
        wording: How examples become ids.
        rows: Of the embedding, where the tokenizer knows tokens beyond them; None = it does not.

    Raises:
        ValueError: An example cannot be encoded, or has a token beyond the embedding, or options of
            equal tokens.
    """
    limit, chooses = recipe.data.max_tokens, "accuracy" in words(recipe.evaluation.metrics)
    train, test = encode_clients(
        federation.train,
        federation.test,
        wording,
        has_central_test=federation.has_central_test,
        max_tokens=limit,
        chooses=chooses,
        has_shots=recipe.evaluation.shots > 0,
    )
    retention = encode_test(
        elsewhere.retention,
        wording,
        max_tokens=limit,
        whose="the examples of evaluation.retention_path",
        chooses=chooses,
    )
    calibration = encode_all(
        elsewhere.calibration,
        wording,
        max_tokens=limit,
        whose="the examples of strategy.calibration_path",
    )
    if rows is not None:
        tests = [own for each in (*test.values(), retention) for own in each]
        encoded = [own for each in (*train.values(), calibration) for own in each]
        encoded += [one for own in tests for one in (own.encoded, *own.options)]
        check_tokens((own.input_ids for own in encoded), rows, path=recipe.model.path)
    return Held(train, test, retention, calibration, _tests_of_others(test, recipe))


def _tests_of_others(
    test: Mapping[str, list[TestExample]], recipe: Recipe
) -> dict[str, list[TestExample]]:
    """Draw what each client is measured on of the other clients' test examples."""
    number, seeds = recipe.evaluation.other_clients, Seeds(recipe.seed)
    if not number:
        return {}
    if len(test) < 2:
        raise ValueError(
            f"evaluation.other_clients must be 0 with one client, got {number}; there is no other"
        )
    drawn = {}
    for client in test:
        others = [example for other, own in test.items() if other != client for example in own]
        order = seeds.generator("tests of others", client).permutation(len(others))[:number]
        drawn[client] = [others[index] for index in sorted(order.tolist())]
    return drawn


def _build_seat(recipe: Recipe, seat: Seat) -> Federation:
    seed = recipe.seed if seat.split_seed is None else seat.split_seed
    return build_site(replace(recipe, seed=seed), seat.client_id)


def data_notes(experiment: Experiment) -> list[str]:
    """Return what a person should know about data and base before trusting a result."""
    limit = experiment.recipe.data.max_tokens
    notes = [*experiment.federation.notes(), *experiment.remarks]
    for whose, examples in _encoded(experiment).items():
        notes.append(cut_note(examples, max_tokens=limit, whose=f"{whose} examples"))
    held_out = {"test": _test_examples(experiment), "retention": experiment.retention}
    for whose, tested in held_out.items():
        notes.append(options_note(tested, max_tokens=limit, whose=f"{whose} examples"))
    return [note for note in (*notes, *experiment.model_notes) if note]


def count_truncated(experiment: Experiment) -> dict[str, int]:
    """Return how many examples of each kind were cut to ``data.max_tokens``."""
    return {
        whose: sum(example.is_truncated for example in examples)
        for whose, examples in _encoded(experiment).items()
    }


def _encoded(experiment: Experiment) -> dict[str, list[Encoded]]:
    return {
        "training": [e for examples in experiment.train.values() for e in examples],
        "test": [example.encoded for example in _test_examples(experiment)],
        "retention": [example.encoded for example in experiment.retention],
        "calibration": experiment.calibration,
    }


def _test_examples(experiment: Experiment) -> list[TestExample]:
    """Return all test examples, those that all clients share once."""
    lists = list(experiment.test.values())
    if experiment.federation.has_central_test:
        lists = lists[:1]
    return [example for examples in lists for example in examples]
