"""The page of what this machine can do, from results/: one record for each ``orchard bench NAME``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, machine, origins, read

HERE = Path(__file__).parent
MODELS = {
    "base-9m": "base-9m",
    "qwen1.5-moe-a2.7b": "Qwen1.5-MoE-A2.7B",
    "deepseek-moe-16b": "DeepSeek-MoE-16B",
}
SENT = {
    "fedavg_experts": "FedAvg, all experts",
    "fedavg_attention": "FedAvg, attention",
    "flex": "FLEx",
    "hfedmoe": "HFedMoE, half of the experts",
}
ENCODINGS = ("float32", "bfloat16", "int8")


def page() -> Page:
    """Return what is made of the results that are here."""
    names = ("aggregate", "graft", "memory", "rounds", "start", "step", "wire")
    found = {name: json.loads((HERE / "results" / f"{name}.json").read_text()) for name in names}
    everything = read(HERE / "results")
    return Page(
        HERE,
        {
            "summary": _summary(found),
            "origin": paragraph(origins(everything)),
            "importance": _importance(),
            "aggregate": _aggregate(found["aggregate"]),
            "rounds": _rounds(found["rounds"]),
            "start": _start(found["start"]),
            **{f"wire_{key[:4]}": _bytes(found["wire"], key) for key in MODELS},
            "wire_ratios": _ratios(found["wire"]),
            "wire_speed": _encoding_speed(found["wire"]),
            "step_machines": _machines(),
            "step": _step(found["step"]),
            "graft": _graft(found["graft"]),
            "memory": _memory(found["memory"]),
        },
    )


def _summary(found: dict[str, Record]) -> str:
    """Return every figure that has a target, the missed ones in bold."""
    step, graft, start = found["step"], found["graft"], found["start"]
    aggregate, rounds, memory = found["aggregate"], found["rounds"], found["memory"]
    ratios = found["wire"]["fedavg_experts_over_flex"]["qwen1.5-moe-a2.7b"]
    tensors = ("float32", "float32_small_tensors")

    def least(target: float, values: Sequence[float], digits: int = 2) -> str:
        return " / ".join(
            f"{value:,.{digits}f}" if value >= target else f"**{value:,.{digits}f}**"
            for value in values
        )

    def most(target: float, values: Sequence[float], digits: int = 2) -> str:
        return " / ".join(
            f"{value:,.{digits}f}" if value <= target else f"**{value:,.{digits}f}**"
            for value in values
        )

    def listed(encoding: str, target: float) -> str:
        fused, apart = (ratios[kind][encoding] for kind in ("fused", "listed"))
        return f"{least(target, [fused], 1)} (listed {least(target, [apart], 1)})"

    rows = [
        ["`graft`", "search of 3 of 60 experts, over every expert once", "≤ 2", most(2, [graft["search_over_floor_r3"]])],
        ["", "the same, faster than enumeration", "≥ 1,000", least(1000, [graft["speedup_r3"]], 0)],
        ["`step`", "tokens per second over the peer's, base of 9 M / Qwen1.5-MoE's shape", "≥ 1.5", least(1.5, [step[k]["speedup"] for k in ("small", "large")])],
        ["", "peak memory over the peer's", "≤ 0.7", most(0.7, [step[k]["peak_bytes_ratio"] for k in ("small", "large")])],
        ["`aggregate`", "over Flower's FedAvg, large / small tensors", "≥ 3", least(3, [aggregate[k]["speedup_over_flower"] for k in tensors], 1)],
        ["", "bandwidth over a copy's", "≥ 0.5", least(0.5, [aggregate[k]["bandwidth_share"] for k in tensors])],
        ["", "peak, in trees beside the global one", "< 3", most(3, [aggregate[k]["memory"]["peak_trees"] for k in tensors], 1)],
        ["`rounds`", "peak memory, 10,000 clients over 100", "flat", f"{rounds['peak_ratio']:.2f}"],
        ["`wire`", "FedAvg on all experts over FLEx, Qwen1.5-MoE, same encoding", "≥ 50", listed("bfloat16", 50)],
        ["", "the same, bfloat16 over FLEx in int8", "≥ 100", listed("bfloat16 over int8", 100)],
        ["`memory`", "peak of a client with 25 % of the experts over a whole one", "≤ 0.4", most(0.4, [memory["memory_ratio"]])],
        ["", "its tokens per second over those of the whole", "≥ 1.5", least(1.5, [memory["speedup"]])],
        ["`start`", "`import orchard` / `orchard --help` / first training, s", "0.3 / 0.5 / 10", " / ".join(most(start[f"{k}_limit_seconds"], [start[f"{k}_seconds"]]) for k in ("import", "help", "first_training"))],
    ]  # fmt: skip
    return table(("command", "figure", "target", "measured"), rows, num_words=2)


def _importance() -> str:
    token, sample = (
        json.loads((HERE / "results" / f"importance-{name}.json").read_text())
        for name in ("token-full", "sample-top_k")
    )
    rows = [
        ["a training step", f"{token['step_milliseconds']:.1f}", "100"],
        [
            "`layer_importance` of all layers",
            f"{token['importance_milliseconds']:.2f}",
            f"{token['importance_percent']:.2f}",
        ],
        [
            "the same with `--level sample --softmax top_k` "
            f"(its step: {sample['step_milliseconds']:.1f} ms)",
            f"{sample['importance_milliseconds']:.2f}",
            f"{sample['importance_percent']:.2f}",
        ],
        [
            "adding the batch to a `UsageMeter`",
            f"{token['usage_milliseconds']:.2f}",
            f"{token['usage_percent']:.2f}",
        ],
        [
            "recording the routing of the training forward, and importance",
            f"{token['recording_and_importance_milliseconds']:.2f}",
            f"{token['recording_and_importance_percent']:.2f}",
        ],
    ]
    name = "recording_and_importance"
    quartiles = [
        f"{own[f'{name}_percent']:.2f} % (quartiles "
        f"{own[f'{name}_low_quartile_percent']:.2f} and {own[f'{name}_high_quartile_percent']:.2f})"
        for own in (token, sample)
    ]
    note = (
        "The last is a difference of two forward passes, and noisy: "
        f"{quartiles[0]}; with `--level sample --softmax top_k` {quartiles[1]}."
    )
    return f"{table(('what', 'ms', '% of a training step'), rows)}\n\n{paragraph(note)}"


def _aggregate(found: Record) -> str:
    cases = {
        "float32": "float32, 24 tensors",
        "float32_small_tensors": "float32, 2,400 tensors",
        "bfloat16": "bfloat16, 24 tensors",
    }
    columns = (
        *("update", "copy", "ours", "Flower", "bandwidth", "bytes", "over Flower"),
        *("trees", "with global", "Flower's trees"),
    )
    rows = []
    for key, name in cases.items():
        own = found[key]
        has_peer = "flower_cpu_seconds_per_update" in own
        peer = 1e3 * own.get("flower_cpu_seconds_per_update", 0.0)
        rows.append(
            [
                name,
                f"{1e3 * own['copy_cpu_seconds_per_update']:.1f}",
                f"{1e3 * own['ours_cpu_seconds_per_update']:.1f}",
                f"{peer:.1f}" if has_peer else "-",
                f"{own['bandwidth_share']:.2f}",
                f"{own['update_bytes_over_copied_bytes']:.2f}",
                f"{own['speedup_over_flower']:.1f}" if has_peer else "-",
                f"{own['memory']['peak_trees']:.2f}",
                f"{own['memory']['peak_trees_with_global']:.2f}",
                f"{own['flower_memory']['peak_trees']:.1f}" if has_peer else "-",
            ]
        )
    difference = max(found[key]["largest_difference"] for key in list(cases)[:2])
    note = (
        f"{found['num_clients']} updates of {found['update_bytes'] / 1e6:.0f} MB, Flower "
        f"{found['flower']} with {found['peer_clients']}; CPU milliseconds per update, medians of "
        f"{found['repeats']}. Both means agree to {difference:.1e}."
    )
    return f"{table(columns, rows)}\n\n{paragraph(note)}"


def _rounds(found: Record) -> str:
    own = [
        ["CPU", f"{1e3 * found['cpu_seconds_per_client']:.2f} ms"],
        ["wall", f"{1e3 * found['seconds_per_client']:.2f} ms"],
        ["messages, both ways", f"{found['message_bytes_per_client']:,.0f} bytes"],
        [
            "of them no tensors: names, shapes, weights, metrics",
            f"{found['header_bytes_per_client']:,.0f} bytes",
        ],
        ["its line in `metrics.jsonl`", f"{found['log_bytes_per_client']:.0f} bytes"],
    ]
    peaks = found["peak_bytes_of"]
    memory = table(
        ["clients, one round", *(f"{int(n):,}" for n in peaks)],
        [["peak of a process of its own, MB", *(f"{size / 1e6:.1f}" for size in peaks.values())]],
    )
    note = (
        f"From the fewest to the most clients the peak grows by a factor of "
        f"{found['peak_ratio']:.3f}: {found['grown_bytes_per_client']:.0f} bytes per client, the "
        "client objects among them."
    )
    return f"{table(('per client and round', ''), own)}\n\n{memory}\n\n{paragraph(note)}"


def _start(found: Record) -> str:
    commands = {
        "interpreter": "`python -c pass`",
        "import": "`import orchard`",
        "help": "`orchard --help`",
        "libraries": "`import torch, transformers`",
        "first_training": "first training",
    }
    rows = []
    for key, name in commands.items():
        wall, cpu = found[f"{key}_seconds"], found[f"{key}_cpu_seconds"]
        digits = 2 if wall > 1 else 3
        limit = found.get(f"{key}_limit_seconds")
        rows.append(
            [name, f"{wall:.{digits}f}", f"{cpu:.{digits}f}", f"{limit:g}" if limit else "-"]
        )
    return table(("command", "wall, s", "CPU, s", "target, wall"), rows)


def _bytes(found: Record, model: str) -> str:
    storages = found["models"][model]
    how = "measured" if model == "base-9m" else "computed"
    digits = 2 if model == "base-9m" else 1
    rows = []
    for method, label in SENT.items():
        for storage, methods in storages.items():
            # Attention alone is the same however experts are stored.
            if storage == "listed" and method in ("fedavg_attention", "flex"):
                continue
            sizes = [methods[method][encoding] for encoding in ENCODINGS]
            rows.append(
                [
                    label if storage == "fused" else f"{label}, {storage}",
                    *(
                        f"{own['up_bytes'] / 1e6:.{digits}f} / {own['down_bytes'] / 1e6:.{digits}f}"
                        for own in sizes
                    ),
                ]
            )
    return table((f"{MODELS[model]}, {how}", *ENCODINGS), rows)


def _ratios(found: Record) -> str:
    ratios = found["fedavg_experts_over_flex"]
    kinds = [(model, storage) for model, own in ratios.items() for storage in own]
    heads = [MODELS[m] if s == "fused" else f"{MODELS[m]}, {s}" for m, s in kinds]
    rows = [
        [label, target, *(f"{ratios[m][s][key]:.1f}" for m, s in kinds)]
        for label, target, key in (
            ("in the same encoding", "50", "bfloat16"),
            ("bfloat16 over FLEx's int8", "100", "bfloat16 over int8"),
        )
    ]
    large = [model for model in ratios if model != "base-9m"]
    said = [
        Finding(
            "The targets are met where gate and up projection have an adapter each, and missed "
            "where they share one, because FedAvg then sends less, not FLEx more; the small base, "
            "with 16 experts in a layer and not 60, misses them by far.",
            all(
                ratios[m]["listed"]["bfloat16"] >= 50 > ratios[m]["fused"]["bfloat16"]
                and ratios[m]["listed"]["bfloat16 over int8"] >= 100
                and ratios[m]["fused"]["bfloat16 over int8"] < 100
                for m in large
            )
            and ratios["base-9m"]["fused"]["bfloat16"] < 25,
        ),
        Finding(
            f"Computed lengths are within {100 * found['formula_error']:.1f} % of the measured ones "
            "on base-9m (`formula_error`), the difference being the header."
        ),
        Finding(
            f"An int8 value takes {found['int8_bits']['sent_bits']:.3f} bits with its scale; the "
            "levels of normal values have an entropy of "
            f"{found['int8_bits']['entropy_bits']:.2f} bits, so no code of them alone could save "
            "more than "
            f"{100 * (1 - found['int8_bits']['entropy_bits'] / found['int8_bits']['sent_bits']):.0f}"
            " % of such a message; nothing tries to."
        ),
    ]
    return f"{table(('', 'target', *heads), rows)}\n\n{findings(said)}"


def _encoding_speed(found: Record) -> str:
    rows = [
        [
            stages,
            *(f"{own[f'{what}_mb_per_second']:,.0f}" for what in ("encode", "decode", "copy")),
        ]
        for stages, own in found["speed"].items()
    ]
    return table(("stages", "write", "read", "a copy"), rows)


def _machines() -> str:
    """Return the speed of our side over the peer's, on every machine that it was seen on."""
    records = sorted(
        (json.loads(p.read_text()) for p in (HERE / "results").glob("step*.json")),
        key=lambda record: str(machine(record["hardware"])),
        reverse=True,
    )
    rows = [
        [
            machine(record["hardware"]),
            *(
                f"{record[case]['speedup']:.2f}" if case in record else "-"
                for case in ("middle", "small", "large")
            ),
        ]
        for record in records
    ]
    columns = ("machine", "default", "`small`", "`large`")
    return table(columns, rows)


def _step(found: Record) -> str:
    small, large = found["small"], found["large"]
    both = (small, large)

    def speeds(own: Record) -> str:
        rates = own["tokens_per_second"]
        return f"{rates['ours']:,.0f} / {rates[own['peer']]:,.0f}"

    def megabytes(own: Record, key: str) -> str:
        ours, peer = (own["memory"][side][key] / 1e6 for side in ("ours", "peer"))
        return f"{own[f'{key}_ratio']:.2f} ({ours:,.0f} of {peer:,.0f} MB)"

    rows = [
        ["`tokens_per_second`, ours / peer", "", *map(speeds, both)],
        ["`speedup`", "1.5", *(f"{own['speedup']:.2f}" for own in both)],
        ["`cpu_speedup`", "", *(f"{own['cpu_speedup']:.2f}" for own in both)],
        ["`speedup_padded`", "", *(f"{own['speedup_padded']:.2f}" for own in both)],
        ["`training_bytes_ratio`", "", *(megabytes(own, "training_bytes") for own in both)],
        ["`peak_bytes_ratio`", "0.7", *(megabytes(own, "peak_bytes") for own in both)],
        [
            "`largest_loss_difference`",
            "1e-3",
            *(f"{own['largest_loss_difference']:.1e}" for own in both),
        ],
        ["padding of the peer", "", *(f"{100 * own['padding_share']:.0f} %" for own in both)],
        [
            "`share_of_matmul_limit`, ours / peer",
            "",
            *(
                f"{own['share_of_matmul_limit']:.2f} / {own['peer_share_of_matmul_limit']:.2f}"
                for own in both
            ),
        ],
    ]
    rates = large["matmul_gflops"]
    answers = found["evaluation"]
    said = [
        Finding(
            "Much of `large`'s gain in speed is that this CPU multiplies float32 "
            f"{rates['float32'] / rates['bfloat16']:.1f} times as fast as bfloat16; on a CPU with "
            "bfloat16 instructions that part is not there.",
            rates["float32"] > 2 * rates["bfloat16"],
        ),
        Finding(
            f"Answers: {answers['num_prompts']} prompts of Dolly on `small`, "
            f"{answers['speedup']:.2f} times as fast as `generate`; "
            f"{100 * answers['same_share']:.0f} % of the answers are equal."
        ),
    ]
    shown = table(("figure", "target", "small", "large"), rows)
    where = f"Of {machine(found['hardware'])}:"
    return f"{where}\n\n{shown}\n\n{findings(said)}"


def _graft(found: Record) -> str:
    rows = []
    for size, sets in ((1, 60), (2, 60 * 59 // 2), (3, 60 * 59 * 58 // 6)):
        enumeration = found[f"enumeration_extrapolated_seconds_r{size}"]
        speedup = found[f"speedup_r{size}"]
        rows.append(
            [
                str(size),
                f"{sets:,}",
                f"{found[f'search_seconds_r{size}']:.2f}",
                f"{found[f'search_over_floor_r{size}']:.2f}",
                f"{enumeration:,.1f}" if enumeration < 10 else f"{enumeration:,.0f}",
                f"{speedup:.1f}" if speedup < 10 else f"{speedup:,.0f}",
            ]
        )
    columns = (
        *("grafts", "sets", "search, s"),
        f"over the floor ({found['floor_seconds']:.2f} s)",
        *("enumeration, s", "faster"),
    )
    return table(columns, rows, num_words=0)


def _memory(found: Record) -> str:
    clients = {"whole": "all experts", "carved": "25 % of the experts, carved"}
    rows = [
        [
            name,
            f"{found[key]['peak_memory_bytes'] / 1e9:.2f} GB",
            f"{found[key]['predicted_peak_bytes'] / 1e9:.2f} GB",
            f"{found[key]['tokens_per_second']:.0f}",
        ]
        for key, name in clients.items()
    ]
    note = (
        f"{100 * found['memory_ratio']:.0f} % of the memory (target: 40 %), "
        f"{found['speedup']:.2f} times the speed (target: 1.5)."
    )
    return f"{table(('client', 'peak', 'predicted', 'tokens per second'), rows)}\n\n{note}"
