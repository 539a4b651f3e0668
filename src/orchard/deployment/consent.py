"""What a site's owner lets its site do, whatever a coordinator asks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchard.budgets import build_requirements
from orchard.methods import check_strategy, has_part, lora_settings
from orchard.models.loading import check_model
from orchard.recipe.amounts import parse_amounts
from orchard.recipe.options import Recipe
from orchard.seeding import Seeds

PACKAGED = "orchard:"


class Refusal(ValueError):
    """A task that this site does not do; its message says why, and goes to the coordinator."""


@dataclass(frozen=True)
class Consent:
    """What this site accepts, and what of its own it uses.

    Attributes:
        data: The site's examples, JSON Lines.
        model: The base model on this machine; empty = only one that ships with the package.
        methods: Methods that it takes part in; empty = all.
        budget: Experts that it trains, as ``client.budget``; empty = as the recipe says.
        memory: Bytes that training may take, as ``client.memory_bytes``; empty = not limited.
        calibration: Its own file for ``strategy.calibration = corpus``.
        retention: Its own file for ``evaluation.retention_path``.
    """

    data: str
    model: str = ""
    methods: tuple[str, ...] = ()
    budget: str = ""
    memory: str = ""
    calibration: str = ""
    retention: str = ""

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe as this site does it: with its own files, model and limits.

        No path of the coordinator's is ever opened here.

        Raises:
            Refusal: The site does not do what the recipe asks.
        """
        methods = check_strategy(recipe.strategy.name)
        if self.methods and not set(methods) <= set(self.methods):
            raise Refusal(
                f"strategy.name must be of {', '.join(self.methods)} at this site, got "
                f"{recipe.strategy.name}"
            )
        model = self.model or recipe.model.path
        if not self.model and not model.startswith(PACKAGED):
            raise Refusal(
                f"model.path must be a model that this site has, got {model}; its owner names one "
                "with --model"
            )
        if recipe.model.device != "cpu" and not recipe.model.device.startswith("cuda"):
            raise Refusal(f"model.device must be cpu or cuda, got {recipe.model.device}")
        client = recipe.client
        if self.budget or self.memory:
            if has_part(methods, "budget"):
                client = replace(client, budget=self.budget, memory_bytes=self.memory)
            elif self.budget:
                raise Refusal(
                    f"strategy.name must be one that trains a part of the experts: this site "
                    f"trains {self.budget}, got {recipe.strategy.name}, which trains all"
                )
        own = replace(
            recipe,
            model=replace(recipe.model, path=model),
            data=replace(recipe.data, path=self.data, partition="file"),
            strategy=replace(
                recipe.strategy,
                calibration_path=self._own_file(
                    recipe.strategy.calibration_path, self.calibration, "--calibration"
                ),
            ),
            evaluation=replace(
                recipe.evaluation,
                retention_path=self._own_file(
                    recipe.evaluation.retention_path, self.retention, "--retention"
                ),
            ),
            client=client,
        )
        if self.memory and client is recipe.client:
            self._check_memory(own)
        return own

    @staticmethod
    def _own_file(asked: str, own: str, option: str) -> str:
        if not asked or asked.startswith(PACKAGED):
            return asked
        if not own:
            raise Refusal(f"{option} must name this site's own file, got nothing for {asked}")
        return own

    def _check_memory(self, recipe: Recipe) -> None:
        """Refuse training that is predicted to take more than this site gives."""
        (cap,) = parse_amounts(
            self.memory,
            name="--memory",
            num_clients=1,
            generator=Seeds(recipe.seed).generator("budgets"),
            kind="bytes",
        )
        view = check_model(recipe.model.path, lora_settings(recipe))
        requirements = build_requirements(recipe, view)
        needed = requirements.peak(sum(requirements.footprint.layers.values())).total
        if needed > cap:
            raise Refusal(
                f"training must take at most {self.memory} at this site, got a prediction of "
                f"{needed / 1e9:.3g} GB for {recipe.strategy.name}"
            )
