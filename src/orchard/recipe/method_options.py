"""Options of the federated method: what clients train and send, and how the server moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchard.recipe.describing import option

BUILT_IN: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "fedavg": ("weighted mean of what clients send", "McMahan et al., 2017, arXiv:1602.05629"),
        "fedavgm": ("server momentum", "Hsu et al., 2019, arXiv:1909.06335"),
        "fedadagrad": ("server Adagrad", "Reddi et al., 2021, arXiv:2003.00295"),
        "fedadam": ("server Adam", "Reddi et al., 2021, arXiv:2003.00295"),
        "fedyogi": ("server Yogi", "Reddi et al., 2021, arXiv:2003.00295"),
        "fedprox": ("clients are pulled to the global values", "Li et al., 2020, arXiv:1812.06127"),
        "hfedmoe": (
            "clients train the experts that they can afford",
            "Fang et al., 2026, arXiv:2601.00583",
        ),
        "fedavg_dropout": (
            "clients that cannot afford all experts drop out",
            "the reference of Fang et al., 2026, arXiv:2601.00583",
        ),
        "fedavg_random": (
            "clients train random experts",
            "the control of Fang et al., 2026, arXiv:2601.00583",
        ),
        "pflmoe": (
            "clients train and send the experts that they use most",
            "Guo et al., 2020, arXiv:2012.15589, as arXiv:2601.00583 describes it",
        ),
        "fedmoe": (
            "a submodel of the most used experts for each client",
            "Mei et al., 2024, arXiv:2408.11304",
        ),
        "seermoe": (
            "clients prune experts and train sharper routers",
            "Muzio et al., 2024, arXiv:2404.05089",
        ),
        "flex": (
            "a personal expert grafted beside the frozen ones",
            "Liu et al., 2025, arXiv:2506.00965",
        ),
        "ditto": (
            "beside the shared model a personal one, pulled to it",
            "Li et al., 2021, arXiv:2012.04221",
        ),
        "finetune": (
            "every client fine-tunes the shared model in the last rounds",
            "the reference of Yu et al., 2020, arXiv:2002.04758",
        ),
        "orchard": (
            "FLEx with a graft that counts as far as it has moved, judged where rows are few",
            "ours",
        ),
        "scaffold": (
            "control variates against client drift",
            "Karimireddy et al., 2020, arXiv:1910.06378",
        ),
        "local": (
            "no aggregation: every client alone",
            "the reference that a federation has to beat",
        ),
    }
)
"""Methods that come with Orchard, to what each is and where it comes from; what they do is in
``experiment/methods.py``, which takes longer to import."""

OWN_METHODS = "orchard.methods"
"""The group of entry points by which installed packages offer methods."""


def method_names(name: str) -> tuple[str, ...]:
    """Return the names that ``strategy.name`` joins by ``+``, whatever they mean."""
    return tuple(part.strip() for part in name.split("+"))


@dataclass(frozen=True)
class StrategyOptions:
    """The federated method."""

    name: str = option(
        "fedavg",
        "A method, or several joined by +, such as flex+fedadam; module:attribute for your own.",
    )
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
        "FLEx: F + s * graft, (1 - s) * F + s * graft, or F + s * (graft - E), E being the expert "
        "that the graft started as.",
        choices=("additive", "convex", "difference"),
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
        "reconstruction",
        "FLEx: how an expert is chosen; fresh = none is, a dense graft starts as one that says "
        "nothing.",
        choices=("reconstruction", "random", "fresh"),
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
    shared: str = option(
        "",
        "Of what is trained: patterns of the names that are sent, such as *.lora_A; empty = all "
        "that strategy.kept does not name. What neither names stays as it is.",
    )
    kept: str = option(
        "",
        "Of what is trained: patterns of the names that each client keeps, such as "
        "*.v_proj.*; they win over strategy.shared.",
    )
    kept_steps: int = option(
        0,
        "Steps of a round in which only what is kept trains; in the others only what is sent "
        "does. 0 = both train in every step.",
        minimum=0,
    )
    finetune_rounds: int = option(
        1, "finetune: so many of the last rounds train each client's own model.", minimum=1
    )
    arrival_rounds: int = option(
        5,
        "With data.arriving: rounds in which clients that arrive train what they keep.",
        minimum=1,
    )
    ditto_lambda: float = option(
        0.1, "Ditto: strength of the pull of a personal model to the shared one.", minimum=0
    )
    judged_below: int = option(
        32,
        "Orchard: clients of fewer training rows train their graft apart, and rows that it does "
        "not train on judge it; 0 = nobody.",
        minimum=0,
    )
    holdout: float = option(
        0.25,
        "Orchard: share of such a client's training rows that its graft does not train on, by "
        "which it is judged.",
        above=0,
        maximum=0.9,
    )
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
        4,
        "Batches of a step that experts are ranked on, for cadences round and run.",
        minimum=1,
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
        "How updates become one; all but the mean bear a minority of hostile clients (clipped_mean "
        "only updates that are too long), need three that sent a name, and hold all updates in "
        "memory.",
        choices=("mean", "median", "trimmed_mean", "clipped_mean", "krum"),
    )
    lora_aggregation: str = option(
        "factors",
        "How adapters become one: factors, the mean of the A and of the B; product, the mean of "
        "what they do, B A, brought back to their rank.",
        choices=("factors", "product"),
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
    keep_rounds: int = option(
        0,
        "Rounds of which checkpoints and what clients keep stay on the disk; 0 = two checkpoints, "
        "and of each client what it needs to go on from either.",
        minimum=0,
    )
    start: str = option(
        "",
        "Folder of orchard export --adapter on the same base, whose values the first round starts "
        "from; empty = fresh adapters, which change nothing.",
    )
