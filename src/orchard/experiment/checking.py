"""What ``orchard plan`` and ``orchard run`` refuse alike, once the data is read."""

from __future__ import annotations

from collections.abc import Sequence

from orchard.evaluation.quality import check_options
from orchard.experiment.budgets import build_requirements
from orchard.experiment.holdings import Elsewhere, Federation, refuse_conventions
from orchard.experiment.methods import check_strategy, has_grafts
from orchard.experiment.protecting import check_privacy, check_sound
from orchard.experiment.secrecy import check_deployed_secrecy, check_secrecy
from orchard.experiment.settings import lora_settings
from orchard.experts.submodel_source import check_several
from orchard.extras import require
from orchard.models.kernels.pairs import is_pair, start_id
from orchard.models.stored.carving import check_carvable
from orchard.models.stored.conversion import match_checkpoint
from orchard.models.stored.loading import load_config, refuse_pair
from orchard.models.stored.sources import build_view
from orchard.models.trainable.adapters import trainable_names
from orchard.models.view.detection import view_config
from orchard.models.view.moe import MoEView
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.strategies.splitting import Split


def check_clients(recipe: Recipe, federation: Federation) -> None:
    """Check that what is promised to clients can be kept with these.

    Raises:
        ValueError: An option of privacy or of secure aggregation does not fit.
    """
    sizes = {name: len(rows) for name, rows in federation.train.items()}
    check_privacy(recipe, sizes)
    check_secrecy(recipe, sizes)


def check_between_sites(recipe: Recipe, *, num_sites: int = 0) -> None:
    """Refuse what there is in the simulator alone, protections first, rather than go without it.

    Args:
        recipe: Every choice.
        num_sites: Sites of the federation; 0 = that is not known yet.

    Raises:
        ValueError: The recipe asks for it, or for a secure sum that could not be kept.
    """
    if recipe.privacy.unit == "client":
        raise ValueError(
            "privacy.unit must not be client between sites, got client; what bounds strangers' "
            "updates looks at all of a round, so one site's would change how others count"
        )
    check_sound(recipe)
    if recipe.privacy.epsilon and recipe.privacy.noise:
        raise ValueError(
            f"privacy.noise must be 0 with privacy.epsilon between sites, got "
            f"{recipe.privacy.noise:g}; each site finds the noise for its own rows"
        )
    if recipe.privacy.unit:
        require("privacy", to="account for privacy")
    check_deployed_secrecy(recipe, num_sites=num_sites)
    if recipe.data.arriving:
        raise ValueError(
            f"data.arriving must be 0 between sites, got {recipe.data.arriving}; a site that comes "
            "later starts from what orchard export writes, with server.start"
        )
    if recipe.evaluation.other_clients:
        raise ValueError(
            f"evaluation.other_clients must be 0 between sites, got "
            f"{recipe.evaluation.other_clients}; no site has another's rows"
        )
    if recipe.evaluation.shots:
        raise ValueError(
            f"evaluation.shots must be 0 between sites, got {recipe.evaluation.shots}; so far they "
            "are read in orchard run alone"
        )
    refuse_conventions(recipe.data)


def check_pair(recipe: Recipe, view: MoEView) -> None:
    """Refuse what an encoder-decoder has no place for.

    Args:
        recipe: Every choice.
        view: The model, which may be on the meta device.

    Raises:
        ValueError: The recipe asks for it, or nothing says what its decoder starts from.
    """
    if not is_pair(view.model):
        return
    start_id(view.model)
    if has_grafts(check_strategy(recipe.strategy.name)):
        refuse_pair(recipe.model.path, doing=f"strategy.name = {recipe.strategy.name}")
    kind = type(view.model.config).model_type  # type: ignore[union-attr]
    if recipe.model.lora_dropout:
        raise ValueError(
            f"model.lora_dropout must be 0 with an encoder-decoder ({kind}), got "
            f"{recipe.model.lora_dropout:g}; it is drawn by rows, and such a row has two lengths"
        )
    if recipe.client.router_aux_coefficient:
        raise ValueError(
            f"client.router_aux_coefficient must be 0 with an encoder-decoder ({kind}), got "
            f"{recipe.client.router_aux_coefficient:g}; it has a loss for each of its stacks"
        )


def check_cohort(recipe: Recipe, *, num_clients: int) -> None:
    """Check that a cohort is no larger than the federation.

    Raises:
        ValueError: It is.
    """
    if recipe.server.clients_per_round > num_clients:
        raise ValueError(
            f"server.clients_per_round must be in 0..{num_clients}, got "
            f"{recipe.server.clients_per_round}; there are {num_clients} clients"
        )


def check_tested(recipe: Recipe, federation: Federation, elsewhere: Elsewhere) -> None:
    """Check that all that is tested on has options where a model is asked to choose.

    Raises:
        ValueError: An example has none.
    """
    if "accuracy" not in words(recipe.evaluation.metrics):
        return
    held_out = [example.options for examples in federation.test.values() for example in examples]
    check_options(held_out, whose="the test examples of data.path")
    check_options(
        [example.options for example in elsewhere.retention if example.instruction],
        whose="the examples of evaluation.retention_path",
    )


def check_names(recipe: Recipe) -> None:
    """Check that patterns of names fit what is trained.

    Raises:
        ValueError: One fits nothing.
    """
    split = Split(words(recipe.strategy.shared), words(recipe.strategy.kept))
    if split != Split():
        view = build_view(load_config(recipe.model.path), recipe.model.path)
        split.check(trainable_names(view, lora_settings(recipe)))


def check_carving(recipe: Recipe, view: MoEView, budgets: Sequence[int | None]) -> None:
    """Check that clients can load some experts of a base alone, where a method lets them.

    Which experts a client holds follows from its data; here it is as many in every layer as the
    smallest budget affords.

    Args:
        recipe: Every choice.
        view: The model, which may be on the meta device.
        budgets: Of clients, in experts over all MoE layers; None = all, 0 = takes no part.

    Raises:
        ValueError: Experts of the checkpoint cannot be read one by one, or its routers do not
            choose among some of them.
    """
    affordable = [budget for budget in budgets if budget]
    if recipe.selection.mode != "carve" or not affordable:
        return
    requirements = build_requirements(recipe, view)
    if not requirements.is_carved:
        return
    match_checkpoint(recipe.model.path)
    numbers = requirements.spread(min(affordable))
    check_carvable(view_config(view.model.config), [range(number) for number in numbers])
    for layer, number in zip(view.layers, numbers, strict=True):
        check_several(layer, number, lora_settings(recipe))
