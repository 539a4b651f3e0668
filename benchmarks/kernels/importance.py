"""Measure what scoring the experts costs, relative to a training step.

    python -m benchmarks.kernels.importance [--repeats 60] [--level sample] [--softmax top_k]

The model has random weights: Qwen2-MoE, 4 layers of 16 experts, top-2, width 256, expert width
128, 9 million parameters, float32, one thread. A step is forward, backward and AdamW on all
parameters, for 8 samples of 128 tokens. Keeps JSON in results/; ``*_percent`` is of a step. The
parts are timed in turn, so that a slow moment of the machine meets all of them; every figure is the
median over the repeats, and a difference is the median of the differences within a repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks.kernels.report import HERE, page
from benchmarks.records import keep
from orchard.experts.importance import ImportanceSettings, UsageMeter, layer_importance
from orchard.models.view.detection import view_moe
from orchard.models.view.routing import RoutingRecord, record_routing
from orchard.results import environment

BATCH, LENGTH, VOCABULARY = 8, 128, 4096


def build() -> Qwen2MoeForCausalLM:
    """Build the model, with its experts run one after another as Orchard loads them."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
        decoder_sparse_step=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config._experts_implementation = "eager"
    model = Qwen2MoeForCausalLM(config)
    model.train()
    return model


def milliseconds(run: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def measure(settings: ImportanceSettings, *, repeats: int) -> dict[str, float]:
    """Time the parts in turn and return medians."""
    model = build()
    view = view_moe(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    input_ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    mask_BS = torch.ones_like(input_ids)
    sample_T = torch.arange(BATCH).repeat_interleave(LENGTH)

    def forward() -> Tensor:
        loss: Tensor = model(input_ids=input_ids, attention_mask=mask_BS, labels=input_ids).loss
        return loss

    def step() -> None:
        torch.autograd.backward(forward())
        optimizer.step()
        optimizer.zero_grad()

    def read(record: RoutingRecord) -> list[tuple[Tensor, Tensor, Tensor]]:
        kept = []
        for layer in record.layers:
            mask_T = layer.token_mask_T
            kept.append((layer.probabilities_TE[mask_T], layer.choices_TK[mask_T], mask_T))
        return kept

    def score(read_layers: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        for probabilities_TE, choices_TK, mask_T in read_layers:
            layer_importance(
                probabilities_TE, settings, choices_TK=choices_TK, sample_T=sample_T[mask_T]
            )

    def forward_scored() -> None:
        with record_routing(view, token_mask_BS=mask_BS) as record:
            forward()
        score(read(record))

    def meter(read_layers: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        usage = UsageMeter([layer.num_experts for layer in view.layers])
        for index, (probabilities_TE, choices_TK, mask_T) in enumerate(read_layers):
            usage.add(index, probabilities_TE, choices_TK=choices_TK, sample_T=sample_T[mask_T])

    with record_routing(view, token_mask_BS=mask_BS) as record:
        forward()
    layers = read(record)
    for warm_up in (step, forward, forward_scored):
        for _ in range(3):
            warm_up()
    times: dict[str, list[float]] = {
        name: [] for name in ("step", "importance", "usage", "forward", "recording_and_importance")
    }
    for repeat in range(repeats):
        times["step"].append(milliseconds(step))
        times["importance"].append(milliseconds(lambda: score(layers)))
        times["usage"].append(milliseconds(lambda: meter(layers)))
        if repeat % 2:  # neither of the two always comes first
            with_scores = milliseconds(forward_scored)
            without = milliseconds(forward)
        else:
            without = milliseconds(forward)
            with_scores = milliseconds(forward_scored)
        times["forward"].append(without)
        times["recording_and_importance"].append(with_scores - without)
    result = {f"{name}_milliseconds": statistics.median(t) for name, t in times.items()}
    step_time = result["step_milliseconds"]
    for name in ("importance", "usage", "recording_and_importance"):
        result[f"{name}_percent"] = 100 * result[f"{name}_milliseconds"] / step_time
    # A difference of two forward passes is the noisiest figure here.
    low, _, high = statistics.quantiles(times["recording_and_importance"], n=4)
    result["recording_and_importance_low_quartile_percent"] = 100 * low / step_time
    result["recording_and_importance_high_quartile_percent"] = 100 * high / step_time
    return {key: round(value, 3) for key, value in result.items()}


def main() -> None:
    """Measure, keep what was found, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--level", default="token")
    parser.add_argument("--softmax", default="full")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = ImportanceSettings(level=arguments.level, softmax=arguments.softmax)
    found = {**environment(), **measure(settings, repeats=arguments.repeats)}
    name = f"importance-{arguments.level}-{arguments.softmax}.json"
    keep(HERE / "results" / name, found)
    print(json.dumps(found, indent=1))
    page().write()


if __name__ == "__main__":
    main()
