"""A recipe: every section of it, each with its own options."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchard.recipe.describing import option
from orchard.recipe.method_options import SelectionOptions, ServerOptions, StrategyOptions
from orchard.recipe.run_options import (
    ClientOptions,
    CommunicationOptions,
    DataOptions,
    DeploymentOptions,
    EvaluationOptions,
    ModelOptions,
    PrivacyOptions,
)


@dataclass(frozen=True)
class Recipe:
    """Every choice of a run, resolved."""

    seed: int = option(0, "Root of all randomness.", minimum=0)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    strategy: StrategyOptions = field(default_factory=StrategyOptions)
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    client: ClientOptions = field(default_factory=ClientOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    communication: CommunicationOptions = field(default_factory=CommunicationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    deployment: DeploymentOptions = field(default_factory=DeploymentOptions)
