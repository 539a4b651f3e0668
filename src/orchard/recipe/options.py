"""Every option of a recipe: its default, its meaning, and the values that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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
    num_threads: int = option(
        0,
        "Threads on a CPU; 0 = torch decides. Sums over another number of threads round "
        "differently: set it where runs must agree to the bit between machines.",
        minimum=0,
    )
    lora_rank: int = option(32, "Rank of the shared LoRA adapters.", minimum=1)
    lora_alpha: float = option(64.0, "Their output is scaled by lora_alpha / lora_rank.", above=0)
    lora_dropout: float = option(0.05, "On their input.", minimum=0, maximum=0.99)
    lora_targets: str = option(
        "q_proj,k_proj,v_proj",
        "Linear layers outside the MoE blocks, and the words router and experts.",
    )
    full_targets: str = option(
        "",
        "What is trained itself, without adapters: the same words, or all; needs float32. "
        "Experts and router rows then are names of their own.",
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
    wording: str = option(
        "",
        "Instead of an instruction column, its words; {COLUMN} stands for the text of that column.",
    )
    labels: str = option("", "Classification: the possible responses, the same for all examples.")
    options: str = option(
        "",
        "Multiple choice: the column with the list of an example's options, or the columns with "
        "one each.",
    )
    answer: str = option(
        "text",
        "With labels or options: the response column has the right one's text, or its index from "
        "0.",
        choices=("text", "index"),
    )
    letters: bool = option(
        False,
        "With labels or options: list them in the prompt after the letters A, B, ... and respond "
        "with the letter.",
    )
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
    graft_dropout: float = option(
        0.05, "FLEx: on the input of a graft's LoRA.", minimum=0, maximum=0.99
    )
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
    graft_experts: int = option(
        1,
        "FLEx: grafts in every MoE layer; with graft_budget, the most that a layer may have.",
        minimum=1,
    )
    graft_budget: int = option(
        0,
        "FLEx: at most so many grafts over all layers, one or more in each, where they lower the "
        "loss most; 0 = graft_experts in each.",
        minimum=0,
    )
    graft_choice: str = option(
        "reconstruction", "FLEx: how an expert is chosen.", choices=("reconstruction", "random")
    )
    graft_loss: str = option(
        "norm",
        "FLEx: what sets of experts are compared by: norm, what they miss of the layer's output "
        "(paper), or fitted, what they miss after the best scaling of each set.",
        choices=("norm", "fitted"),
    )
    graft_max_sets: int = option(
        50_000,
        "FLEx: a layer with at most so many sets of graft_experts is searched exhaustively, one "
        "with more greedily and by swaps, with a bound.",
        minimum=1,
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
    entropy_coefficient: float = option(
        0.01, "SEER-MoE: weight of the routing entropy beside the task loss.", minimum=0
    )


@dataclass(frozen=True)
class SelectionOptions:
    """Which experts a client with a budget trains, and which of them it sends."""

    mode: str = option(
        "mask",
        "mask: all experts run, the chosen ones learn (HFedMoE); carve: a client loads the chosen "
        "ones alone and routes among them, for cadence round or run.",
        choices=("mask", "carve"),
    )
    rank_by: str = option(
        "information",
        "HFedMoE: what is best: information (I), importance (s), cumulative, specific, frequency "
        "of use, random, or none, which trains all experts whatever the budget.",
        choices=(
            *("information", "importance", "cumulative", "specific", "frequency", "random"),
            "none",
        ),
    )
    cadence: str = option(
        "batch",
        "HFedMoE: choose for every batch (paper), every so many steps, each round, or once a run.",
        choices=("batch", "steps", "round", "run"),
    )
    every: int = option(1, "Optimizer steps between choices of cadence steps.", minimum=1)
    scoring_batches: int = option(
        4, "Batches that experts are ranked on, for cadences round and run.", minimum=1
    )
    cumulative_weight: float = option(
        0.9, "HFedMoE: lambda, mean against maximum probability.", minimum=0, maximum=1
    )
    beta: float = option(0.1, "HFedMoE: weight of the redundancy.", minimum=0)
    level: str = option(
        "token", "HFedMoE: what means and maxima go over.", choices=("token", "sample")
    )
    softmax: str = option(
        "full",
        "HFedMoE: probabilities as they are, or those of the chosen experts only.",
        choices=("full", "top_k"),
    )
    usage_mode: str = option(
        "softmax_mean",
        "HFedMoE: usage is the mean probability (Eq. 16), the share of samples that use the "
        "expert, or the mean over the layer's largest.",
        choices=("softmax_mean", "hit_rate", "relative"),
    )
    threshold: float = option(
        1.0,
        "HFedMoE: usage from which an expert is sent, in units of 1 / experts of a layer: the "
        "paper's tau times that number; 0 sends all.",
        minimum=0,
    )
    require_trained: bool = option(
        False, "HFedMoE: send only experts that were also trained in the round."
    )
    experts: str = option(
        "usage",
        "HFedMoE: send the experts that pass the threshold, or all.",
        choices=("usage", "all"),
    )
    router: str = option(
        "preference",
        "HFedMoE: routers count by preference (Eqs. 18-21, normalized), literal (Eq. 21 as "
        "printed, which collapses), damped (its weights on deltas), or as all else by examples.",
        choices=("preference", "literal", "damped", "examples"),
    )


@dataclass(frozen=True)
class ClientOptions:
    """Local training."""

    budget: str = option(
        "",
        "Experts that a client may train, over all layers: 16 or 25%; a list with one for each "
        "client; uniform(25%, 100%); empty = all.",
    )
    memory_bytes: str = option(
        "",
        "Memory of a client, from which its budget follows: 12GB; a list; uniform(12GB, 32GB); "
        "empty = no limit.",
    )

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
    packing: bool = option(
        True,
        "Read the examples of a batch behind each other, each by itself, where the model can; "
        "else pad them to the longest. The same gradients; with dropout, other draws.",
    )
    pass_tokens: int = option(
        512,
        "On a CPU, a batch with more tokens is read in several passes, which needs less memory; "
        "0 = never. The same gradients; with dropout, other draws.",
        minimum=0,
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
    aggregation: str = option(
        "mean",
        "How updates become one; all but the mean bear a minority of hostile clients, need three "
        "that sent a name, and hold all updates in memory.",
        choices=("mean", "median", "trimmed_mean", "clipped_mean", "krum"),
    )
    trim: float = option(
        0.2,
        "trimmed_mean, krum: share of clients left out, at each end or at all.",
        above=0,
        maximum=0.49,
    )
    clip: float = option(
        0.0, "clipped_mean: largest L2 norm of an update; 0 = the round's median.", minimum=0
    )
    lr: float = option(
        0.0,
        "Server learning rate; 0 = the method's own: 0.001 for FedAdagrad, FedAdam and FedYogi, "
        "1 for all others.",
        minimum=0,
    )
    momentum: float = option(0.9, "FedAvgM.", minimum=0, maximum=0.999)
    dampening: float = option(0.1, "FedAvgM: what a new delta counts.", above=0, maximum=1)
    beta1: float = option(0.9, "FedAdam, FedYogi.", minimum=0, maximum=0.9999)
    beta2: float = option(0.99, "FedAdam, FedYogi.", minimum=0, maximum=0.9999)
    tau: float = option(1e-3, "FedAdagrad, FedAdam, FedYogi: adaptivity.", above=0)


@dataclass(frozen=True)
class CommunicationOptions:
    """What crosses the network."""

    dtype: str = option(
        "bfloat16",
        "Of values as sent. int8 shares a scale among 128 of an update, or of a difference under "
        "downlink = differences, and sends whole global values in bfloat16.",
        choices=("float32", "bfloat16", "int8"),
    )
    top_k: float = option(
        0.0,
        "Share of each tensor of an update that is sent, the largest values; 0 = all.",
        minimum=0,
        maximum=1,
    )
    feedback: bool = option(
        True,
        "With int8 or top_k, and SCAFFOLD with bfloat16: a client adds to an update what encoding "
        "took from its last ones.",
    )
    downlink: str = option(
        "values",
        "What clients are sent of the global tree: its values, or differences to what they have.",
        choices=("values", "differences"),
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured."""

    models: str = option(
        "base,global,local,personal",
        "base; global; local (right after local training); personal (global and what is kept).",
    )
    metrics: str = option(
        "loss,rouge_l,exact_match",
        "Of loss, rouge_l, exact_match, and with labels or options, accuracy.",
    )
    length_normalization: str = option(
        "none",
        "Accuracy: an option's log-likelihood counts as it is, or divided by its number of tokens.",
        choices=("none", "tokens"),
    )
    every: int = option(0, "Rounds between evaluations; 0 = only after the last.", minimum=0)
    max_new_tokens: int = option(64, "Longest generated answer.", minimum=1)
    batch_size: int = option(32, "Examples at a time.", minimum=1)
    max_examples: int = option(0, "Test examples per client, drawn at random; 0 = all.", minimum=0)
    retention_path: str = option(
        "", "Examples of what the base knew before, JSON Lines or orchard:facts; empty = none."
    )


@dataclass(frozen=True)
class DeploymentOptions:
    """How long a coordinator waits for its sites, and what it does then; not for one machine."""

    sites: int = option(0, "Sites that take part; 0 = those with a key.", minimum=0)
    quorum: int = option(0, "Fewest updates of a round that counts; 0 = of all sites.", minimum=0)
    join_seconds: float = option(600.0, "Wait for sites to join.", above=0)
    round_seconds: float = option(3600.0, "Wait for the answers of a round.", above=0)
    probe_seconds: float = option(
        30.0, "Without an answer for so long, a site is asked whether it still works.", above=0
    )
    attempts: int = option(3, "Tries of one site's task, and of one round.", minimum=1)
    stragglers: str = option(
        "drop", "An answer after its round: dropped, or counted late.", choices=("drop", "late")
    )
    staleness: float = option(
        0.5, "What a late answer counts, to the power of the rounds it is late.", above=0, maximum=1
    )
    max_update_norm: float = option(
        0.0, "An update of a larger L2 norm is refused; 0 = any finite one.", minimum=0
    )
    max_weight: float = option(1e9, "A larger weight of a name is refused.", above=0)


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
    communication: CommunicationOptions = field(default_factory=CommunicationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    deployment: DeploymentOptions = field(default_factory=DeploymentOptions)
