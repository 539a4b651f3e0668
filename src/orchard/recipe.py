"""A recipe: every choice of a run, as TOML with scalars only.

A value comes from the command line, else from the recipe, else from the recipe that it extends,
else it is the default here; ``sources`` remembers which. Whatever can be checked without reading
data or a model is checked here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

Scalar: TypeAlias = str | int | float | bool


def option(
    default: Scalar,
    about: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """Describe one option: its default, its meaning, and what values it takes.

    ``minimum`` and ``maximum`` are allowed values; ``above`` is not.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    return field(default=default, metadata={"about": about, **limits})


@dataclass(frozen=True)
class ModelOptions:
    """The base model and its adapters."""

    path: str = option("", "Folder, Hugging Face name, or orchard:tiny (ships with the package).")
    dtype: str = option("bfloat16", "Of the base.", choices=("bfloat16", "float32"))
    device: str = option("cpu", "Where the model runs: cpu, cuda, cuda:1.")
    lora_rank: int = option(32, "Rank of the shared LoRA adapters.", minimum=1)
    lora_alpha: float = option(64.0, "Their output is scaled by lora_alpha / lora_rank.", above=0)
    lora_dropout: float = option(0.05, "On their input.", minimum=0, maximum=0.99)
    lora_targets: str = option(
        "q_proj,k_proj,v_proj",
        "Linear layers outside the MoE blocks, and the words router and experts.",
    )


@dataclass(frozen=True)
class DataOptions:
    """Examples, and which client holds them."""

    path: str = option(
        "", "JSON Lines file, folder with one file per client, Hugging Face name, or orchard:world."
    )
    subset: str = option("", "Configuration of a Hugging Face data set.")
    split: str = option("train", "Split of a Hugging Face data set.")
    instruction: str = option("instruction", "Column with the instruction.")
    context: str = option("context", "Column with the context; empty = none.")
    response: str = option("response", "Column with the response.")
    category: str = option("category", "Column with the category; empty = none.")
    template: str = option(
        "alpaca", "How an example becomes text.", choices=("alpaca", "chat", "plain")
    )
    max_tokens: int = option(512, "Longest example, in tokens.", minimum=8)
    partition: str = option(
        "iid",
        "iid; dirichlet (label skew, disjoint); dirichlet_resample (FLEx: drawn with replacement); "
        "category (one client each); file (the source's own clients).",
        choices=("iid", "dirichlet", "dirichlet_resample", "category", "file"),
    )
    categories: str = option("", "Use only these categories, in this order; empty = all.")
    num_clients: int = option(4, "Clients of iid and the Dirichlet partitions.", minimum=1)
    alpha: float = option(0.5, "Dirichlet concentration; smaller is more skewed.", above=0)
    examples_per_client: int = option(1000, "Draws per client of dirichlet_resample.", minimum=2)
    test_size: float = option(
        0.1, "Held out per client: a share below 1, or a number of examples.", above=0
    )
    test_per_category: int = option(
        0, "If above 0, one test set for all clients, so many of each category.", minimum=0
    )
    duplicates: str = option(
        "report",
        "Training rows that also stand in a test split: report them, or drop them.",
        choices=("report", "drop"),
    )


@dataclass(frozen=True)
class StrategyOptions:
    """The federated method."""

    name: str = option("fedavg", "A method, or several joined by +, such as flex+fedadam.")
    graft_kind: str = option(
        "lora", "FLEx: LoRA over an aliased expert, or a dense copy.", choices=("lora", "dense")
    )
    graft_rank: int = option(32, "FLEx: rank of a graft's LoRA.", minimum=1)
    graft_alpha: float = option(64.0, "FLEx: scale of a graft's LoRA, over its rank.", above=0)
    graft_dropout: float = option(0.05, "FLEx: on a graft's input.", minimum=0, maximum=0.99)
    graft_gate: str = option(
        "router_row",
        "FLEx: a gate starts at its expert's router row (paper), closed, or there is none.",
        choices=("router_row", "closed", "none"),
    )
    graft_mix: str = option(
        "additive",
        "FLEx: F + s * graft, or (1 - s) * F + s * graft.",
        choices=("additive", "convex"),
    )
    graft_choice: str = option(
        "reconstruction", "FLEx: how an expert is chosen.", choices=("reconstruction", "random")
    )
    calibration: str = option(
        "own",
        "FLEx: choose experts on the client's own data, a corpus, or its majority category.",
        choices=("own", "corpus", "majority_category"),
    )
    calibration_path: str = option("", "FLEx: JSON Lines file for calibration = corpus.")
    calibration_blocks: int = option(128, "FLEx: at most so many blocks of tokens.", minimum=1)
    calibration_tokens: int = option(512, "FLEx: tokens per block.", minimum=8)
    prox_mu: float = option(0.01, "FedProx: strength of the pull to the global values.", minimum=0)


@dataclass(frozen=True)
class ClientOptions:
    """Local training."""

    steps: int = option(5, "Optimizer steps per round; 0 where epochs rules.", minimum=0)
    epochs: int = option(0, "Passes over the data per round; 0 where steps rules.", minimum=0)
    batch_size: int = option(4, "Examples per micro-batch.", minimum=1)
    grad_accumulation: int = option(1, "Micro-batches per step.", minimum=1)
    optimizer: str = option("adamw", "Made anew each round.", choices=("adamw", "sgd"))
    lr: float = option(4e-5, "Learning rate of the first round.", above=0)
    lr_min: float = option(1e-6, "Where the cosine ends.", minimum=0)
    schedule: str = option("cosine", "Over rounds.", choices=("cosine", "constant"))
    weight_decay: float = option(0.0, "Of the optimizer.", minimum=0)
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0 = never.", minimum=0)
    router_aux_coefficient: float = option(
        0.0, "Weight of the model's load-balancing loss.", minimum=0
    )


@dataclass(frozen=True)
class ServerOptions:
    """Rounds, weights, and how the global tree moves."""

    rounds: int = option(100, "Rounds of the run.", minimum=1)
    clients_per_round: int = option(0, "Size of the cohort; 0 = all clients.", minimum=0)
    weighting: str = option(
        "examples",
        "How much a client counts: its training examples, or all the same.",
        choices=("examples", "uniform"),
    )
    lr: float = option(1.0, "Server learning rate.", above=0)
    momentum: float = option(0.9, "FedAvgM.", minimum=0, maximum=0.999)
    dampening: float = option(0.1, "FedAvgM: what a new delta counts.", above=0, maximum=1)
    beta1: float = option(0.9, "FedAdagrad, FedAdam, FedYogi.", minimum=0, maximum=0.9999)
    beta2: float = option(0.99, "FedAdam, FedYogi.", minimum=0, maximum=0.9999)
    tau: float = option(1e-3, "FedAdagrad, FedAdam, FedYogi: adaptivity.", above=0)


@dataclass(frozen=True)
class CommunicationOptions:
    """What crosses the network."""

    dtype: str = option("float32", "Of values as sent.", choices=("float32", "bfloat16"))


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured."""

    models: str = option(
        "base,global,local,personal",
        "base; global; local (right after local training); personal (global and what is kept).",
    )
    metrics: str = option("loss,rouge_l,exact_match", "Of loss, rouge_l, exact_match.")
    every: int = option(0, "Rounds between evaluations; 0 = only after the last.", minimum=0)
    max_new_tokens: int = option(64, "Longest generated answer.", minimum=1)
    batch_size: int = option(32, "Examples at a time.", minimum=1)
    max_examples: int = option(0, "Test examples per client; 0 = all.", minimum=0)
    retention_path: str = option(
        "", "Examples of what the base knew before, JSON Lines or orchard:facts; empty = none."
    )


@dataclass(frozen=True)
class Recipe:
    """Every choice of a run, resolved."""

    seed: int = option(0, "Root of all randomness.", minimum=0)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    strategy: StrategyOptions = field(default_factory=StrategyOptions)
    client: ClientOptions = field(default_factory=ClientOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    communication: CommunicationOptions = field(default_factory=CommunicationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


@dataclass(frozen=True)
class Resolved:
    """A recipe, and where each of its values came from.

    Attributes:
        recipe: The values.
        sources: Dotted key to ``default``, a file, or ``command line``.
    """

    recipe: Recipe
    sources: Mapping[str, str]


def words(text: str) -> tuple[str, ...]:
    """Split a comma-separated value; blanks around a word do not count."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def known_options() -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    """Return every dotted key with its type and its description."""
    known: dict[str, tuple[type, dataclasses.Field[Any]]] = {}
    for section in dataclasses.fields(Recipe):
        kind = get_type_hints(Recipe)[section.name]
        if not dataclasses.is_dataclass(kind):
            known[section.name] = (kind, section)
            continue
        for entry in dataclasses.fields(kind):
            known[f"{section.name}.{entry.name}"] = (get_type_hints(kind)[entry.name], entry)
    return known


def option_value(recipe: Recipe, key: str) -> Scalar:
    """Return the value of a dotted key."""
    section, _, name = key.rpartition(".")
    value: Scalar = getattr(getattr(recipe, section) if section else recipe, name)
    return value


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """Read, merge and check a recipe.

    Args:
        path: TOML file. Its ``extends`` names another, relative to it, that it builds on.
        overrides: ``key=value`` from the command line.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no TOML, or a key or value is wrong.
    """
    values: dict[str, tuple[Any, str]] = {}
    for file in reversed(_chain(Path(path))):
        values |= {key: (value, str(file)) for key, value in _flatten(_parse(file)).items()}
    values.pop("extends", None)
    return resolve(values, overrides)


def resolve(values: Mapping[str, tuple[Any, str]], overrides: Sequence[str] = ()) -> Resolved:
    """Check values with their sources and fill in the defaults.

    Args:
        values: Dotted key to value and source.
        overrides: ``key=value`` from the command line, which win.

    Raises:
        ValueError: A key or value is wrong.
    """
    known = known_options()
    merged = {key: _check(key, value, known) for key, (value, _) in values.items()}
    sources = dict.fromkeys(known, "default")
    sources |= {key: source for key, (_, source) in values.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(
                f"an override must be key=value, got {override}; for example server.rounds=5"
            )
        _check_key(key, known)
        merged[key] = _check(key, _from_text(text, kind=known[key][0]), known)
        sources[key] = "command line"
    hints = get_type_hints(Recipe)
    sections: dict[str, Any] = {}
    for name, kind in hints.items():
        if dataclasses.is_dataclass(kind):
            prefix = f"{name}."
            chosen = {k.removeprefix(prefix): v for k, v in merged.items() if k.startswith(prefix)}
            sections[name] = kind(**chosen)  # type: ignore[operator]
        elif name in merged:
            sections[name] = merged[name]
    recipe = Recipe(**sections)
    _check_combinations(recipe)
    return Resolved(recipe, sources)


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML that reads back to the same."""
    lines = [f"seed = {recipe.seed}"]
    for section in dataclasses.fields(Recipe):
        options = getattr(recipe, section.name)
        if dataclasses.is_dataclass(options) and not isinstance(options, type):
            lines += ["", f"[{section.name}]"]
            lines += [
                f"{key} = {format_value(v)}" for key, v in dataclasses.asdict(options).items()
            ]
    return "\n".join(lines) + "\n"


def format_value(value: Scalar) -> str:
    """Return a scalar as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON escapes what TOML must, except for the delete character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _chain(path: Path) -> list[Path]:
    """Return a recipe and those it extends, the most particular first."""
    chain: list[Path] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in [file.resolve() for file in chain]:
            raise ValueError(f"extends must not lead back to {following}; remove one extends")
        chain.append(following)
        parent = _parse(following).get("extends")
        following = (following.parent / str(parent)) if parent is not None else None
    return chain


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"recipe must be an existing file, got {path}; orchard ls shows the recipes"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe must be valid TOML, got {path} with: {error}; mend it") from error


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_key(key: str, known: Mapping[str, Any]) -> None:
    if key in known:
        return
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    raise ValueError(f"recipe key must be a known one, got {key}; did you mean {nearest[0]}?")


def _from_text(text: str, *, kind: type) -> Any:
    if kind is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check(key: str, value: Any, known: Mapping[str, tuple[type, Any]]) -> Any:
    _check_key(key, known)
    kind, entry = known[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(
            f"{key} must be of type {kind.__name__}, got {format_value(value)}"
            if isinstance(value, str | int | float | bool)
            else f"{key} must be a single {kind.__name__}, got {type(value).__name__}"
        )
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{key} must be finite, got {value}")
    limits = entry.metadata
    if limits["choices"] and value not in limits["choices"]:
        nearest = difflib.get_close_matches(str(value), limits["choices"], n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{key} must be one of {', '.join(limits['choices'])}, got {value}{hint}")
    rules: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
        ("minimum", "at least", operator.ge),
        ("maximum", "at most", operator.le),
        ("above", "above", operator.gt),
    )
    for name, rule, is_kept in rules:
        limit = limits[name]
        if limit is not None and not is_kept(value, limit):
            raise ValueError(f"{key} must be {rule} {limit}, got {value}")
    return value


def _check_combinations(recipe: Recipe) -> None:
    client, data, evaluation = recipe.client, recipe.data, recipe.evaluation
    if (client.steps > 0) == (client.epochs > 0):
        raise ValueError(
            f"exactly one of client.steps and client.epochs must be above 0, got {client.steps} "
            f"and {client.epochs}; set the other to 0"
        )
    if data.partition == "dirichlet_resample" and data.test_per_category == 0:
        raise ValueError(
            "data.test_per_category must be above 0 with data.partition = dirichlet_resample, got "
            "0; clients may share examples there, so the test set has to leave the pool first"
        )
    if recipe.strategy.calibration == "corpus" and not recipe.strategy.calibration_path:
        raise ValueError(
            "strategy.calibration_path must be given with strategy.calibration = corpus, got "
            "nothing; name a JSON Lines file"
        )
    allowed = {
        "evaluation.models": (evaluation.models, ("base", "global", "local", "personal")),
        "evaluation.metrics": (evaluation.metrics, ("loss", "rouge_l", "exact_match")),
    }
    for key, (text, choices) in allowed.items():
        for word in words(text):
            if word not in choices:
                raise ValueError(f"{key} must be of {', '.join(choices)}, got {word}")
