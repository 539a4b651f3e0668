"""Options of what a method runs on: model, data, training, messages, measures, sites."""

from __future__ import annotations

from dataclasses import dataclass

from orchard.recipe.describing import option


@dataclass(frozen=True)
class ModelOptions:
    """The base model and its adapters."""

    path: str = option("", "Folder, Hugging Face name, or orchard:tiny (ships with the package).")
    dtype: str = option("bfloat16", "Of the base.", choices=("bfloat16", "float32"))
    device: str = option("cpu", "Where the model runs: cpu, cuda, cuda:1.")
    placement: str = option(
        "memory",
        "Where frozen experts are: in memory; mapped read-only from disk, of which the system "
        "keeps in memory what it has room for, once for all processes; or, with a GPU, offload: "
        "in the machine's memory, and two layers at a time on the GPU. Results are the same.",
        choices=("memory", "mapped", "offload"),
    )
    expert_cache: str = option(
        "",
        "With placement = mapped: the folder of the experts as they are mapped, made once; empty = "
        "in the checkpoint's folder; none = they are read where the checkpoint has them. "
        "With placement = offload: empty = in pinned memory, or the folder they are brought from.",
    )
    frozen_precision: str = option(
        "bf16",
        "What frozen experts are kept in: bf16 = the base's dtype; int8 = a scale for each row; "
        "nf4 = 4 bits with a scale for 64 values. What is trained, and grafts, stay exact.",
        choices=("bf16", "int8", "nf4"),
    )
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
        "attention",
        "Linear layers outside the MoE blocks, such as q_proj; the word attention for the model's "
        "own projections to queries, keys and values; and the words router and experts.",
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
        "",
        "File (JSON Lines, JSON, CSV, TSV, parquet), folder with one file per client, several "
        "files as client=file,client=file, Hugging Face name, or orchard:world.",
    )
    format: str = option(
        "auto",
        "What rows are; auto = recognized by their columns, and said. The columns that the options "
        "below name; instruction, input, output; question, answer; prompt, completion; input, "
        "output; a list of turns with role and content; one with from and value.",
        choices=(
            *("auto", "instruction", "alpaca", "question_answer", "prompt_completion"),
            *("input_output", "messages", "sharegpt"),
        ),
    )
    bad_rows: str = option(
        "error",
        "A row that is no example: an error, or left out and counted.",
        choices=("error", "skip"),
    )
    subset: str = option("", "Configuration of a Hugging Face data set.")
    split: str = option("train", "Split of a Hugging Face data set.")
    instruction: str = option("instruction", "Column with the instruction.")
    context: str = option("context", "Column with the context; empty = none.")
    response: str = option("response", "Column with the response.")
    category: str = option("category", "Column with the category; empty = none.")
    system: str = option("system", "Column with a system turn; empty = none.")
    history: str = option(
        "history", "Column with the turns before, a list of pairs or of turns; empty = none."
    )
    conversation: str = option(
        "", "Column with the turns of a conversation; empty = messages or conversations."
    )
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
    special_tokens: str = option(
        "text",
        "Special tokens that stand in data, such as <|im_start|>: encoded as the text that they "
        "are, or allowed to be tokens, with which a row can forge turns.",
        choices=("text", "allow"),
    )
    learn: str = option(
        "every",
        "Of several turns: loss on every turn of the assistant, or on the last only.",
        choices=("every", "last"),
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
    min_examples: int = option(
        0,
        "Clients with fewer examples are left out, and named; 0 = none is, and one that is too "
        "small for data.test_size is an error.",
        minimum=0,
    )
    max_train: int = option(0, "Training rows per client, drawn at random; 0 = all.", minimum=0)
    arriving: int = option(
        0,
        "So many of the last clients arrive after training: they take no part in rounds, get the "
        "final global values, and train what they keep alone. In the simulator alone.",
        minimum=0,
    )
    validation_size: float = option(
        0.0,
        "If above 0, the test rows are set aside and a part of each client's training rows is "
        "measured instead, a share below 1 or a number: to choose options by.",
        minimum=0,
    )
    conventions: str = option(
        "",
        "Clients that must answer the same differently, by their order: label_names = client k "
        "calls a label of data.labels by the name of the k-th one after it; answer_form = UPPER "
        "CASE, the first sentence, a numbered list of sentences, or quotes after a lead-in, in "
        "turn; empty = answers stay as they are.",
        choices=("", "label_names", "answer_form"),
    )
    duplicates: str = option(
        "report",
        "Training rows that also stand in a test split: report them, or drop them.",
        choices=("report", "drop"),
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
    lr: float = option(
        4e-5,
        "Learning rate of the first round; 0 = 0.2 over the model's width, which orchard plan and "
        "result.json say.",
        minimum=0,
    )
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
        "else pad them to the longest. The same result, rounding aside.",
    )
    pass_tokens: int = option(
        512,
        "On a CPU, a batch with more tokens is read in several passes, which needs less memory; "
        "0 = never. The same result, rounding aside.",
        minimum=0,
    )


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
class PrivacyOptions:
    """What the values that leave the server say of a client."""

    unit: str = option(
        "",
        "What is protected: client, everything that one client has, from whoever sees the global "
        "values; example, one training row, from whoever sees whatever its client trained; "
        "empty = nothing.",
        choices=("", "client", "example"),
    )
    epsilon: float = option(
        0.0,
        "Budget of all rounds: the noise follows from it; with noise given, the run ends when it "
        "is spent. 0 = no budget.",
        minimum=0,
    )
    delta: float = option(
        1e-5, "Probability with which epsilon may not hold.", above=0, maximum=0.5
    )
    noise: float = option(
        0.0,
        "Standard deviation of the noise over the norm of an update, or of an example's gradient; "
        "0 = what epsilon asks for.",
        minimum=0,
    )
    clip: float = option(
        1.0, "L2 norm that a client's update, or an example's gradient, is scaled down to.", above=0
    )
    clip_quantile: float = option(
        0.0,
        "With client: share of the updates that are to be shorter than the norm, which then "
        "follows them from round to round; 0 = the norm stays.",
        minimum=0,
        maximum=0.99,
    )
    random: str = option(
        "system",
        "Where noise comes from: the operating system, which nobody can repeat, or the seed, which "
        "repeats a run to the bit and protects nothing from whoever knows it.",
        choices=("system", "seed"),
    )
    secure_aggregation: bool = option(
        False,
        "Let the server see the sum of a round's updates and none of them: each is masked by its "
        "client. Every client sends every name, in 32 bits.",
    )
    secure_least: int = option(
        3, "With secure_aggregation: fewest clients of whose updates a sum is made.", minimum=2
    )
    secure_neighbors: int = option(
        0,
        "With secure_aggregation: with how many others each client masks its update, an even "
        "number; 0 = with all of its round.",
        minimum=0,
    )
    secure_bound: float = option(
        16.0,
        "With secure_aggregation: the largest absolute value in an update. A larger one is an "
        "error, and the sum's digits are shares of it.",
        above=0,
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
        "Of loss, rouge_l, chrf, exact_match, last_number, and with labels or options, accuracy.",
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
    keep_answers: bool = option(
        True,
        "Each client keeps the answers that are generated beside the right ones, in its own "
        "folder: orchard answers shows them.",
    )
    best: str = option(
        "",
        "Metric that --round best goes by; empty = the first of evaluation.metrics.",
    )
    other_clients: int = option(
        0,
        "Each client's models are measured on so many rows of the other clients' tests too, drawn "
        "at random; 0 = none. In the simulator alone.",
        minimum=0,
    )
    shots: int = option(
        0,
        "So many answered examples of the same category stand before each test example, from "
        "shots_path; 0 = none. In the simulator alone.",
        minimum=0,
    )
    shots_path: str = option(
        "",
        "With shots: a file of examples in the form of the data's, such as MMLU's dev split; its "
        "first ones are shown, never the one that is asked.",
    )
    retention_path: str = option(
        "",
        "Examples of what the base knew before, JSON Lines or orchard:facts, or a corpus of plain "
        "texts (a column text), which has a loss only; empty = none.",
    )


@dataclass(frozen=True)
class DeploymentOptions:
    """How long a coordinator waits for its sites, and what it does then; not for one machine."""

    sites: int = option(0, "Sites that take part; 0 = those with a key.", minimum=0)
    quorum: int = option(
        0,
        "Fewest sites that join, and fewest updates of a round that counts; 0 = all of them join, "
        "and all of a round are asked deployment.attempts times before more than half are enough.",
        minimum=0,
    )
    join_seconds: float = option(600.0, "Wait for sites to join.", above=0)
    round_seconds: float = option(
        3600.0,
        "Wait for the answers of a round; Flower keeps a message for 12 hours.",
        above=0,
        maximum=43200.0,
    )
    probe_seconds: float = option(
        30.0, "Without an answer for so long, a site is asked whether it still works.", above=0
    )
    sum_seconds: float = option(
        120.0,
        "With privacy.secure_aggregation: wait for the answers to each of a sum's five questions.",
        above=0,
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
    max_norm_ratio: float = option(
        10.0,
        "An update whose L2 norm is above so many times the median of its round is refused, from "
        "three updates on; 0 = never.",
        minimum=0,
    )
    max_weight: float = option(1e9, "A larger weight of a name is refused.", above=0)
    max_examples: int = option(
        0,
        "Most examples that one site counts for, whatever it joined with; 0 = three times the "
        "median of the sites.",
        minimum=0,
    )
    weights: str = option(
        "examples",
        "What a site counts: what its method says, within the examples that it joined with; or "
        "equal, the same as every other.",
        choices=("examples", "equal"),
    )
    max_move: float = option(
        0.0,
        "Largest L2 norm by which a round may move the global tree; 0 = a hundred times the norm "
        "of the tree, of the longest update, or 1, whichever is most.",
        minimum=0,
    )
